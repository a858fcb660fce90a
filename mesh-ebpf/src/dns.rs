//! DNS: queries of captured pods go to the daemon's socket in the pod while it is there, else where they went without it.
//!
//! The daemon learns the nameserver by the socket (`UDP_FLOWS`, the same row that shows the answer as the nameserver's) and
//! by the pod (`NAMESERVERS`). Not by the source port: `connect` runs before the kernel chooses it.
//!
//! Both functions are not inlined: the stack of `connect` has no room for what they need.

use crate::{
    ctx, daemon, features,
    maps::{NAMESERVERS, UDP_FLOWS},
    report::count,
};
use aya_ebpf::{bindings::BPF_NOEXIST, programs::SockAddrContext};
use mesh_common::{
    code::{counter, feature, proto},
    decide, key,
    net::{Endpoint, NetPort},
    value,
};

/// The port of the daemon's socket that a datagram or connection to `dst` goes to, if it is for a nameserver and the daemon
/// is there to answer; else 0. TCP goes to the listener for all connections, and is told apart by its original destination.
#[inline(never)]
pub(crate) fn capture(ctx: &SockAddrContext, pod: &value::Pod, ip_proto: u8, dst: &Endpoint) -> u16 {
    let Some(mut to) = decide::dns(pod, dst) else { return 0 };
    let udp = ip_proto == proto::UDP;
    if !udp {
        to.port = if to.addr.is_v4() { pod.outbound_v4 } else { pod.outbound_v6 };
    }
    let there = daemon::beats() && (!features::has(feature::LISTENER_LOOKUP) || ctx::exists(ctx, &to, udp));
    if to.port.is_some() && there { to.port.be } else { 0 }
}

/// The address that [`capture`]'s port belongs to.
#[inline(always)]
pub(crate) fn target(pod: &value::Pod, dst: &Endpoint, port: u16) -> Endpoint {
    let addr = if dst.addr.is_v4() { pod.addr_v4 } else { pod.addr_v6 };
    Endpoint::new(addr, NetPort::from_be(port))
}

/// Keeps the nameserver that a socket means by `listener`; 1 when that worked.
#[inline(never)]
pub(crate) fn remember(
    ctx: &SockAddrContext,
    cookie: u64,
    listener: &Endpoint,
    nameserver: &Endpoint,
) -> u32 {
    let socket = ctx::socket_cookie(ctx);
    let row = key::Udp::new(socket, *listener);
    let known = match UDP_FLOWS.get_ptr(&row) {
        // SAFETY: as in `maps::copy`; a concurrent reuse of the row makes the comparison fail at worst.
        Some(server) => unsafe { (*server).same(nameserver) },
        None => false,
    };
    if !known && UDP_FLOWS.insert(&row, nameserver, 0).is_err() {
        count(counter::STORE_FAILED);
        return 0;
    }
    note(key::Nameserver::of_pod(cookie), nameserver) & note(key::Nameserver::of_socket(socket), nameserver)
}

/// Adds a nameserver to those that a pod or a socket has used, from its first place on. When all are taken one of them is
/// lost.
#[inline(always)]
fn note(mut key: key::Nameserver, nameserver: &Endpoint) -> u32 {
    while key.slot < key::NAMESERVERS_PER_OWNER {
        match NAMESERVERS.get_ptr(&key) {
            // SAFETY: as above.
            Some(server) if unsafe { (*server).same(nameserver) } => return 1,
            Some(_) => {}
            // Another program may be first, and then this one looks at the next place.
            None if NAMESERVERS.insert(&key, nameserver, BPF_NOEXIST as u64).is_ok() => return 1,
            None => {}
        }
        key.slot += 1;
    }
    key.slot = ctx::random() % key::NAMESERVERS_PER_OWNER;
    if NAMESERVERS.insert(&key, nameserver, 0).is_err() {
        count(counter::STORE_FAILED);
        return 0;
    }
    1
}
