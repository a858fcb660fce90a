//! `connect4/6`: TCP and connected UDP.

use crate::{
    balance,
    ctx::{self, ALLOW, Family, V4, V6},
    find,
    maps::{self, DESTINATIONS, FRONTENDS, INBOUND, PODS, SOCKET_FLOW, Storage as _},
    report::{self, count},
};
use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use mesh_common::{
    code::{counter, deny, flow, proto},
    decide::{self, Outbound},
    key,
    net::Endpoint,
    value,
};

#[cgroup_sock_addr(connect4)]
pub(crate) fn connect4(ctx: SockAddrContext) -> i32 {
    connect::<V4>(&ctx)
}

#[cgroup_sock_addr(connect6)]
pub(crate) fn connect6(ctx: SockAddrContext) -> i32 {
    connect::<V6>(&ctx)
}

#[inline(always)]
fn connect<F: Family>(ctx: &SockAddrContext) -> i32 {
    let ip_proto = ctx::protocol(ctx);
    if ip_proto != proto::TCP && ip_proto != proto::UDP {
        return ALLOW;
    }
    let Some(config) = maps::config() else { return ALLOW };
    let dst = F::address(ctx);
    let cookie = ctx::netns(ctx);
    let Some(pod) = find!(PODS, key::Netns::new(cookie)) else {
        if ip_proto == proto::TCP && cookie == config.host_netns {
            announce_probe(ctx, config, cookie, &dst);
        }
        return ALLOW;
    };
    if ctx::is_daemon(config) {
        count(counter::CONNECT_BYPASS);
        return ALLOW;
    }
    let service = key::Frontend::new(dst.addr, dst.port, ip_proto);
    let frontend = find!(FRONTENDS, &service);
    let decision = if decide::dials_itself(pod, &dst.addr) {
        Outbound::Pass
    } else if let Some(frontend) = frontend {
        decide::frontend(pod, &dst.addr, ip_proto, frontend)
    } else if ip_proto == proto::TCP
        && let Some(destination) = find!(DESTINATIONS, &dst.addr)
    {
        decide::destination(pod, &dst.addr, destination)
    } else {
        Outbound::Pass
    };
    let socket = ctx::socket(ctx);
    let (target, kind) = match decision {
        Outbound::Pass => {
            // A socket that dials again must not show what it dialled before.
            SOCKET_FLOW.clear(socket);
            count(counter::CONNECT_PASS);
            report::log_passed(ctx, config, ip_proto, &dst);
            return ALLOW;
        }
        Outbound::Deny(reason) => return deny(ctx, config, cookie, ip_proto, &dst, reason),
        Outbound::Proxy(listener) => (listener, flow::PROXY),
        Outbound::Balance => {
            // The decision to balance came from a frontend.
            let Some(frontend) = frontend else { return ALLOW };
            match balance::backend(cookie, &service, frontend) {
                Ok(backend) => (backend, flow::DIRECT),
                Err(reason) => return deny(ctx, config, cookie, ip_proto, &dst, reason),
            }
        }
    };
    let remembered = SOCKET_FLOW.set(
        socket,
        value::SocketFlow {
            cookie,
            original: dst,
            actual: target,
            kind: u32::from(kind),
            received_at_fin: 0,
            generation: 0,
            chosen: Endpoint::NONE,
            reserved: 0,
        },
    );
    if !remembered {
        count(counter::STORE_FAILED);
        // Without it the daemon could not tell where the connection wants to go; a direct one only loses its
        // statistics and shows the backend's address.
        if kind == flow::PROXY {
            return deny(ctx, config, cookie, ip_proto, &dst, deny::NO_MEMORY);
        }
    }
    if !F::rewrite(ctx, &target) {
        return deny(ctx, config, cookie, ip_proto, &dst, deny::NO_CAPTURE_ADDRESS);
    }
    count(if ip_proto == proto::UDP {
        counter::UDP_CONNECT
    } else if kind == flow::PROXY {
        counter::CONNECT_PROXY
    } else {
        counter::CONNECT_DIRECT
    });
    report::log_captured(ctx, config, ip_proto, &dst, &target);
    ALLOW
}

#[inline(always)]
fn deny(
    ctx: &SockAddrContext,
    config: &value::Config,
    cookie: u64,
    ip_proto: u8,
    dst: &Endpoint,
    reason: u8,
) -> i32 {
    SOCKET_FLOW.clear(ctx::socket(ctx));
    count(counter::CONNECT_DENY);
    report::denied(reason, ip_proto, cookie, &Endpoint::NONE, dst, false);
    report::log_denied(ctx, config, reason, ip_proto, dst);
    ctx::refuse()
}

/// Marks a host process's socket to a captured pod of this node: a probe of the kubelet. sockops then announces its
/// 4-tuple to the pod's sk_lookup program.
#[inline(always)]
fn announce_probe(ctx: &SockAddrContext, config: &value::Config, cookie: u64, dst: &Endpoint) {
    if find!(INBOUND, &dst.addr).is_none() || !ctx::is_host_process(config) {
        return;
    }
    let probe = value::SocketFlow {
        cookie,
        original: *dst,
        actual: *dst,
        kind: u32::from(flow::PROBE),
        received_at_fin: 0,
        generation: 0,
        chosen: Endpoint::NONE,
        reserved: 0,
    };
    if !SOCKET_FLOW.set(ctx::socket(ctx), probe) {
        count(counter::STORE_FAILED);
    }
}
