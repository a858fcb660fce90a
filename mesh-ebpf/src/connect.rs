//! `connect4/6`: TCP and connected UDP.

use crate::{
    balance,
    ctx::{self, ALLOW, Family, V4, V6},
    daemon, find,
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
    if ctx::is_daemon() {
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
    let way = match decision {
        Outbound::Pass => {
            count(counter::CONNECT_PASS);
            return pass(ctx, config, ip_proto, &dst);
        }
        Outbound::Deny(reason) => return deny(ctx, config, cookie, ip_proto, &dst, reason),
        Outbound::Proxy { listener, fallback } => {
            let target = match frontend {
                None => dst,
                Some(frontend) if frontend.count == 0 => Endpoint::NONE,
                Some(frontend) => match balance::backend(cookie, pod, &service, frontend) {
                    Ok(backend) => backend,
                    // The daemon chooses.
                    Err(_) => Endpoint::NONE,
                },
            };
            if let Some(generation) = daemon::verdict(cookie, &target) {
                let outcome = counter::CONNECT_LOCAL;
                Way { target, kind: flow::LOCAL, generation, chosen: Endpoint::NONE, outcome }
            } else if daemon::serves(ctx, &listener) {
                let chosen = if frontend.is_some() { target } else { Endpoint::NONE };
                let outcome = counter::CONNECT_PROXY;
                Way { target: listener, kind: flow::PROXY, generation: 0, chosen, outcome }
            } else if !decide::away_direct(fallback, target.port.is_some()) {
                return deny(ctx, config, cookie, ip_proto, &dst, deny::DAEMON_AWAY);
            } else if frontend.is_some() {
                Way::direct(target, counter::AWAY_DIRECT)
            } else {
                count(counter::AWAY_DIRECT);
                return pass(ctx, config, ip_proto, &dst);
            }
        }
        Outbound::Balance => {
            // The decision to balance came from a frontend.
            let Some(frontend) = frontend else { return ALLOW };
            let outcome = if ip_proto == proto::UDP { counter::UDP_CONNECT } else { counter::CONNECT_DIRECT };
            match balance::backend(cookie, pod, &service, frontend) {
                Ok(backend) => Way::direct(backend, outcome),
                Err(reason) => return deny(ctx, config, cookie, ip_proto, &dst, reason),
            }
        }
    };
    let remembered = SOCKET_FLOW.set(
        ctx::socket(ctx),
        value::SocketFlow {
            cookie,
            original: dst,
            actual: way.target,
            kind: u32::from(way.kind),
            received_at_fin: 0,
            generation: way.generation,
            chosen: way.chosen,
            reserved: 0,
        },
    );
    if !remembered {
        count(counter::STORE_FAILED);
        // Without it the daemon could not tell where the connection wants to go, nor would a target know that it is
        // allowed; a direct one only loses its statistics and shows the backend's address.
        if way.kind != flow::DIRECT {
            return deny(ctx, config, cookie, ip_proto, &dst, deny::NO_MEMORY);
        }
    }
    if !F::rewrite(ctx, &way.target) {
        return deny(ctx, config, cookie, ip_proto, &dst, deny::NO_CAPTURE_ADDRESS);
    }
    count(way.outcome);
    report::log_captured(ctx, config, ip_proto, &dst, &way.target);
    ALLOW
}

/// Where a captured connection goes.
struct Way {
    target: Endpoint,
    /// `code::flow`.
    kind: u8,
    /// Of the verdict that allows it, if it is a local one.
    generation: u64,
    /// The backend that the daemon is told, or none.
    chosen: Endpoint,
    /// `code::counter`.
    outcome: u32,
}

impl Way {
    #[inline(always)]
    fn direct(target: Endpoint, outcome: u32) -> Self {
        Self { target, kind: flow::DIRECT, generation: 0, chosen: Endpoint::NONE, outcome }
    }
}

/// Leaves a connection as it is.
#[inline(always)]
fn pass(ctx: &SockAddrContext, config: &value::Config, ip_proto: u8, dst: &Endpoint) -> i32 {
    // A socket that dials again must not show what it dialled before.
    SOCKET_FLOW.clear(ctx::socket(ctx));
    report::log_passed(ctx, config, ip_proto, dst);
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
    count(if reason == deny::DAEMON_AWAY { counter::AWAY_DENY } else { counter::CONNECT_DENY });
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
