//! `getpeername4/6`: the address that the app expects. The kernel also runs them to fill in accept's address.

use crate::{
    ctx::{self, ALLOW, Family, V4, V6},
    maps::{CLIENT, SOCKET_FLOW, Storage as _},
    report::count,
};
use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use mesh_common::code::counter;

#[cgroup_sock_addr(getpeername4)]
pub(crate) fn getpeername4(ctx: SockAddrContext) -> i32 {
    peername::<V4>(&ctx)
}

#[cgroup_sock_addr(getpeername6)]
pub(crate) fn getpeername6(ctx: SockAddrContext) -> i32 {
    peername::<V6>(&ctx)
}

/// A client sees the service that it dialled, a server the client that the daemon speaks for.
#[inline(always)]
fn peername<F: Family>(ctx: &SockAddrContext) -> i32 {
    let socket = ctx::socket(ctx);
    let peer = F::address(ctx);
    let shown = match SOCKET_FLOW.of(socket) {
        Some(flow) if flow.actual.same(&peer) => Some(flow.original),
        _ => CLIENT.of(socket).map(|client| *client),
    };
    let Some(shown) = shown else { return ALLOW };
    // The daemon's own dialling sockets carry a client too, and it wants to know its real peer.
    if ctx::is_daemon() {
        return ALLOW;
    }
    if F::rewrite(ctx, &shown) {
        count(counter::PEERNAME);
    }
    ALLOW
}
