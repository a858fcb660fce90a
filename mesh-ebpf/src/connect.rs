//! `connect4/6`: TCP and connected UDP.

use crate::{
    balance,
    ctx::{self, ALLOW, Family, V4, V6},
    daemon, dns, find,
    maps::{self, DESTINATIONS, FRONTENDS, INBOUND, PODS, SOCKET_FLOW, Storage as _, UDP_FLOWS},
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
    // One place for each end of the way: what is written here is in the program once.
    match route::<F>(ctx, cookie, pod, ip_proto, &dst) {
        Step::Go(outcome, target) => {
            if ip_proto == proto::UDP {
                // For user space, to which sock_diag shows no storage of UDP sockets. Whom it tells nothing loses
                // nothing else.
                let _: Result<(), i32> =
                    UDP_FLOWS.insert(key::Udp::new(ctx::socket_cookie(ctx), *target), dst, 0);
            }
            count(outcome);
            report::log_captured(ctx, config, ip_proto, &dst, target);
            ALLOW
        }
        Step::Pass(outcome) => {
            // A socket that dials again must not show what it dialled before.
            SOCKET_FLOW.clear(ctx::socket(ctx));
            if ip_proto == proto::UDP {
                let _: Result<(), i32> = UDP_FLOWS.remove(key::Udp::new(ctx::socket_cookie(ctx), dst));
            }
            count(outcome);
            report::log_passed(ctx, config, ip_proto, &dst);
            ALLOW
        }
        Step::Deny(reason) => deny::<F>(ctx, config, pod, cookie, ip_proto, &dst, reason),
    }
}

/// What becomes of a connect.
enum Step {
    /// Rewritten to this address; a `code::counter`.
    Go(u32, &'static Endpoint),
    /// Left as it is; a `code::counter`.
    Pass(u32),
    /// Refused; a `code::deny`.
    Deny(u8),
}

/// Decides, and rewrites the destination. What has to be remembered is written to the socket's storage as it becomes
/// known, since the stack is small; nobody reads it before the connect goes on.
#[inline(always)]
fn route<F: Family>(
    ctx: &SockAddrContext,
    cookie: u64,
    pod: &value::Pod,
    ip_proto: u8,
    dst: &Endpoint,
) -> Step {
    if decide::dials_itself(pod, &dst.addr) {
        return Step::Pass(counter::CONNECT_PASS);
    }
    let listener = dns::capture(ctx, pod, ip_proto, dst);
    if listener != 0 {
        return query::<F>(ctx, cookie, pod, ip_proto, dst, listener);
    }
    let service = key::Frontend::new(dst.addr, dst.port, ip_proto);
    let frontend = find!(FRONTENDS, &service);
    let decision = if let Some(frontend) = frontend {
        decide::frontend(pod, &dst.addr, ip_proto, frontend)
    } else if ip_proto == proto::TCP
        && let Some(destination) = find!(DESTINATIONS, &dst.addr)
    {
        decide::destination(pod, &dst.addr, destination)
    } else {
        Outbound::Pass
    };
    let proxied = match decision {
        Outbound::Pass => return Step::Pass(counter::CONNECT_PASS),
        Outbound::Deny(reason) => return Step::Deny(reason),
        Outbound::Balance => None,
        Outbound::Proxy { listener, fallback } => Some((listener, fallback)),
    };
    let Some(memory) = SOCKET_FLOW.slot(ctx::socket(ctx)) else {
        count(counter::STORE_FAILED);
        return Step::Deny(deny::NO_MEMORY);
    };
    let reason = match frontend {
        None => {
            memory.chosen = *dst;
            0
        }
        Some(frontend) if frontend.count == 0 => {
            memory.chosen = Endpoint::NONE;
            deny::NO_ENDPOINTS
        }
        Some(frontend) => balance::backend(cookie, pod, &service, frontend, &mut memory.chosen),
    };
    memory.generation = 0;
    let (kind, outcome) = match proxied {
        None if reason != 0 => return Step::Deny(reason),
        None if ip_proto == proto::UDP => (flow::DIRECT, counter::UDP_CONNECT),
        None => (flow::DIRECT, counter::CONNECT_DIRECT),
        // Without a choice of the kernel's the daemon chooses.
        Some((listener, fallback)) => {
            if let Some(generation) = daemon::verdict(cookie, &memory.chosen) {
                memory.generation = generation;
                (flow::LOCAL, counter::CONNECT_LOCAL)
            } else if daemon::serves(ctx, &listener) {
                if frontend.is_none() {
                    memory.chosen = Endpoint::NONE;
                }
                memory.actual = listener;
                (flow::PROXY, counter::CONNECT_PROXY)
            } else if !decide::away_direct(fallback, memory.chosen.port.is_some()) {
                return Step::Deny(deny::DAEMON_AWAY);
            } else if frontend.is_none() {
                return Step::Pass(counter::AWAY_DIRECT);
            } else {
                (flow::DIRECT, counter::AWAY_DIRECT)
            }
        }
    };
    if kind != flow::PROXY {
        memory.actual = memory.chosen;
    }
    memory.cookie = cookie;
    memory.original = *dst;
    memory.kind = u32::from(kind);
    memory.received_at_fin = 0;
    if F::rewrite(ctx, &memory.actual) {
        Step::Go(outcome, &memory.actual)
    } else {
        Step::Deny(deny::NO_CAPTURE_ADDRESS)
    }
}

/// To the daemon, which answers DNS queries: to its socket for datagrams, to its listener for connections.
#[inline(always)]
fn query<F: Family>(
    ctx: &SockAddrContext,
    cookie: u64,
    pod: &value::Pod,
    ip_proto: u8,
    dst: &Endpoint,
    listener: u16,
) -> Step {
    let Some(memory) = SOCKET_FLOW.slot(ctx::socket(ctx)) else {
        count(counter::STORE_FAILED);
        return Step::Deny(deny::NO_MEMORY);
    };
    memory.cookie = cookie;
    memory.original = *dst;
    memory.actual = dns::target(pod, dst, listener);
    memory.kind = u32::from(flow::PROXY);
    memory.received_at_fin = 0;
    memory.generation = 0;
    memory.chosen = Endpoint::NONE;
    if ip_proto == proto::UDP {
        memory.kind = u32::from(flow::DNS);
        dns::remember(ctx, cookie, &memory.actual, dst);
    }
    if F::rewrite(ctx, &memory.actual) {
        Step::Go(counter::DNS_CAPTURE, &memory.actual)
    } else {
        Step::Deny(deny::NO_CAPTURE_ADDRESS)
    }
}

#[inline(always)]
fn deny<F: Family>(
    ctx: &SockAddrContext,
    config: &value::Config,
    pod: &value::Pod,
    cookie: u64,
    ip_proto: u8,
    dst: &Endpoint,
    reason: u8,
) -> i32 {
    SOCKET_FLOW.clear(ctx::socket(ctx));
    count(if reason == deny::DAEMON_AWAY { counter::AWAY_DENY } else { counter::CONNECT_DENY });
    report::denied(reason, ip_proto, cookie, &Endpoint::NONE, dst, false);
    report::log_denied(ctx, config, reason, ip_proto, dst);
    if ip_proto == proto::TCP { ctx::refuse_tcp::<F>(ctx, pod, dst) } else { ctx::refuse() }
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
