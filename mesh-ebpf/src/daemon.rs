//! Whether the daemon is there, and what goes without it: the verdict cache of the same-node fast path.

use crate::{
    ctx, features,
    maps::{self, GENERATION, HEARTBEAT, VERDICTS},
};
use aya_ebpf::programs::SockAddrContext;
use mesh_common::{code::feature, decide, key, net::Endpoint};

/// Whether the daemon serves a pod: its heart beats, and its listener in the pod is there. Either alone is not enough: a
/// process that hangs keeps its sockets, and one that died a moment ago has beaten before. Where the kernel cannot look
/// listeners up, a connect in the seconds after a death finds nobody.
#[inline(always)]
pub(crate) fn serves(ctx: &SockAddrContext, listener: &Endpoint) -> bool {
    beats() && (!features::has(feature::LISTENER_LOOKUP) || ctx::listens(ctx, listener))
}

/// Whether the daemon said a moment ago that it serves.
#[inline(always)]
pub(crate) fn beats() -> bool {
    match HEARTBEAT.get(0) {
        Some(heart) => decide::beats(heart, ctx::now()),
        None => false,
    }
}

/// The generation of the verdict that lets a client go straight to a pod of this node, if there is one in force.
#[inline(always)]
pub(crate) fn verdict(cookie: u64, target: &Endpoint) -> Option<u64> {
    let verdict = maps::copy(VERDICTS.get_ptr(key::Verdict::new(cookie, *target)))?;
    if is_current(verdict.generation) { Some(verdict.generation) } else { None }
}

/// Whether a verdict of this generation is in force.
#[inline(always)]
pub(crate) fn is_current(generation: u64) -> bool {
    match GENERATION.get(0) {
        Some(current) => decide::verdict_holds(generation, current),
        None => false,
    }
}
