//! `sendmsg4/6` and `recvmsg4/6`: UDP without a connection, and the way back of all UDP.
//!
//! A socket keeps its backend for each service while that is a member of the service's set, as a connection would.
//! An IPv6 socket that sends to `::ffff:VIP` comes through sendmsg4 and receives through recvmsg6; both use the same
//! keys, since IPv4 is kept in its mapped form.

use crate::{
    balance,
    ctx::{self, ALLOW, Family, V4, V6},
    dns, find,
    maps::{self, FRONTENDS, PODS, SOCKET_FLOW, Storage as _, UDP_FLOWS, UDP_STICKY},
    report::{self, count},
};
use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use mesh_common::{
    code::{counter, deny, proto},
    decide::{self, Outbound},
    key,
    net::Endpoint,
    value,
};

#[cgroup_sock_addr(sendmsg4)]
pub(crate) fn sendmsg4(ctx: SockAddrContext) -> i32 {
    send::<V4>(&ctx)
}

#[cgroup_sock_addr(sendmsg6)]
pub(crate) fn sendmsg6(ctx: SockAddrContext) -> i32 {
    send::<V6>(&ctx)
}

#[cgroup_sock_addr(recvmsg4)]
pub(crate) fn recvmsg4(ctx: SockAddrContext) -> i32 {
    receive::<V4>(&ctx)
}

#[cgroup_sock_addr(recvmsg6)]
pub(crate) fn recvmsg6(ctx: SockAddrContext) -> i32 {
    receive::<V6>(&ctx)
}

#[inline(always)]
fn send<F: Family>(ctx: &SockAddrContext) -> i32 {
    let Some(config) = maps::config() else { return ALLOW };
    let dst = F::address(ctx);
    let cookie = ctx::netns(ctx);
    let Some(pod) = find!(PODS, key::Netns::new(cookie)) else { return ALLOW };
    let query = dns::capture(ctx, pod, proto::UDP, &dst);
    if query != 0 && !ctx::is_daemon() {
        let listener = dns::target(pod, &dst, query);
        dns::remember(ctx, cookie, &listener, &dst);
        if !F::rewrite(ctx, &listener) {
            return deny(ctx, config, cookie, &dst, deny::NO_CAPTURE_ADDRESS);
        }
        count(counter::DNS_CAPTURE);
        return ALLOW;
    }
    let service = key::Frontend::new(dst.addr, dst.port, proto::UDP);
    let Some(frontend) = find!(FRONTENDS, &service) else { return ALLOW };
    if ctx::is_daemon() || decide::dials_itself(pod, &dst.addr) {
        return ALLOW;
    }
    match decide::frontend(pod, &dst.addr, proto::UDP, frontend) {
        Outbound::Pass => return ALLOW,
        Outbound::Deny(reason) => return deny(ctx, config, cookie, &dst, reason),
        Outbound::Proxy { .. } => return deny(ctx, config, cookie, &dst, deny::UDP_NOT_PROXIED),
        Outbound::Balance => {}
    }
    let socket = ctx::socket_cookie(ctx);
    let sticky = key::Udp::new(socket, dst);
    let mut backend = Endpoint::NONE;
    match maps::copy(UDP_STICKY.get_ptr(&sticky)) {
        Some(known) if balance::is_member(frontend.set, &known) => backend = known,
        _ => {
            let reason = balance::backend(cookie, pod, &service, frontend, &mut backend);
            if reason != 0 {
                return deny(ctx, config, cookie, &dst, reason);
            }
            if UDP_STICKY.insert(&sticky, backend, 0).is_err() {
                count(counter::STORE_FAILED);
            }
            report::log_captured(ctx, config, proto::UDP, &dst, &backend);
        }
    }
    // Looked up for every datagram, which also keeps the row young in the LRU map.
    let back = key::Udp::new(socket, backend);
    let known = maps::copy(UDP_FLOWS.get_ptr(&back));
    if !known.is_some_and(|service| service.same(&dst)) && UDP_FLOWS.insert(&back, dst, 0).is_err() {
        count(counter::STORE_FAILED);
    }
    if !F::rewrite(ctx, &backend) {
        return deny(ctx, config, cookie, &dst, deny::NO_CAPTURE_ADDRESS);
    }
    count(counter::UDP_SEND);
    ALLOW
}

#[inline(always)]
fn deny(ctx: &SockAddrContext, config: &value::Config, cookie: u64, dst: &Endpoint, reason: u8) -> i32 {
    count(counter::UDP_DENY);
    report::denied(reason, proto::UDP, cookie, &Endpoint::NONE, dst, false);
    report::log_denied(ctx, config, reason, proto::UDP, dst);
    ctx::refuse()
}

/// Shows a datagram's sender as the service that the app sent to.
#[inline(always)]
fn receive<F: Family>(ctx: &SockAddrContext) -> i32 {
    let sender = F::address(ctx);
    if find!(PODS, key::Netns::new(ctx::netns(ctx))).is_none() {
        return ALLOW;
    }
    let service = match SOCKET_FLOW.of(ctx::socket(ctx)) {
        Some(flow) if flow.actual.same(&sender) => Some(flow.original),
        _ => maps::copy(UDP_FLOWS.get_ptr(key::Udp::new(ctx::socket_cookie(ctx), sender))),
    };
    if let Some(service) = service
        && F::rewrite(ctx, &service)
    {
        count(counter::UDP_RECEIVE);
    }
    ALLOW
}
