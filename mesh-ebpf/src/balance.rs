//! Picks a backend: session affinity first, then the choice by weight, random or by consistent hash (Maglev).

use crate::{
    ctx, find,
    maps::{self, AFFINITY, BACKENDS, FRONTENDS, MAGLEV, MEMBERS},
    report::count,
};
use mesh_common::{
    code::{counter, deny},
    decide, key,
    net::Endpoint,
    value,
};

/// Writes a backend for a client in the network namespace `cookie`; returns 0, or a `code::deny` with
/// [`Endpoint::NONE`] written. A function of its own, since the callers' frames have no room for what it keeps on the
/// stack.
#[inline(never)]
pub(crate) fn backend(
    cookie: u64,
    pod: &value::Pod,
    service: &key::Frontend,
    frontend: &value::Frontend,
    backend: &mut Endpoint,
) -> u8 {
    if frontend.affinity_ns == 0 {
        return pick(cookie, pod, service, frontend, backend);
    }
    let client = key::Affinity::new(cookie, *service);
    let now = ctx::now();
    if let Some(entry) = maps::copy(AFFINITY.get_ptr(&client))
        && decide::affinity_holds(&entry, now, frontend.affinity_ns)
        && is_member(frontend.set, &entry.backend)
    {
        *backend = entry.backend;
        count(counter::AFFINITY_HIT);
    } else {
        let reason = pick(cookie, pod, service, frontend, backend);
        if reason != 0 {
            return reason;
        }
        count(counter::AFFINITY_MISS);
    }
    let entry = value::Affinity { last_use_ns: now, backend: *backend, reserved: 0 };
    if AFFINITY.insert(&client, entry, 0).is_err() {
        count(counter::STORE_FAILED);
    }
    0
}

/// Whether a backend still belongs to a set.
#[inline(always)]
pub(crate) fn is_member(set: u64, backend: &Endpoint) -> bool {
    find!(MEMBERS, key::Member::new(set, *backend)).is_some()
}

/// The choice by weight: by hash of the client, random, or (with affinity) drawn for the client. A set that vanishes
/// between the look-ups was replaced: the frontend names the new one.
#[inline(always)]
fn pick(
    cookie: u64,
    pod: &value::Pod,
    service: &key::Frontend,
    frontend: &value::Frontend,
    backend: &mut Endpoint,
) -> u8 {
    let mut chosen = choose(cookie, pod, service, frontend);
    let mut reason = deny::BACKEND_GONE;
    if chosen.is_none() {
        count(counter::BACKEND_RETRY);
        if let Some(now) = find!(FRONTENDS, service) {
            if decide::has_backends(now) {
                chosen = choose(cookie, pod, service, now);
            } else if now.count == 0 {
                reason = deny::NO_ENDPOINTS;
            }
        }
    }
    match chosen {
        Some(chosen) => {
            *backend = *chosen;
            0
        }
        None => {
            *backend = Endpoint::NONE;
            reason
        }
    }
}

#[inline(always)]
fn choose(
    cookie: u64,
    pod: &value::Pod,
    service: &key::Frontend,
    frontend: &value::Frontend,
) -> Option<&'static Endpoint> {
    if frontend.maglev != 0 {
        return maglev(pod, service, frontend);
    }
    let draws = if frontend.affinity_ns != 0 {
        decide::sticky_draws(cookie, frontend.set)
    } else {
        (ctx::random(), ctx::random())
    };
    draw(frontend.set, frontend.count, draws)
}

/// Weighted, in constant time: Vose's alias table.
#[inline(always)]
fn draw(set: u64, count: u32, draws: (u32, u32)) -> Option<&'static Endpoint> {
    let cell = decide::cell(draws.0, count);
    let backend = find!(BACKENDS, key::Backend::new(set, cell))?;
    let slot = decide::slot(draws.1, cell, backend);
    if slot == cell {
        return Some(&backend.endpoint);
    }
    Some(&find!(BACKENDS, key::Backend::new(set, slot))?.endpoint)
}

/// Consistent: the same for a client as long as its backend is there.
#[inline(always)]
fn maglev(
    pod: &value::Pod,
    service: &key::Frontend,
    frontend: &value::Frontend,
) -> Option<&'static Endpoint> {
    let client = if service.addr.is_v4() { &pod.addr_v4 } else { &pod.addr_v6 };
    let position = decide::maglev_position(client, service, frontend.maglev);
    let chunk = find!(MAGLEV, key::Maglev::new(frontend.set, position / decide::MAGLEV_CHUNK))?;
    let slot = chunk.slots[(position % decide::MAGLEV_CHUNK) as usize];
    Some(&find!(BACKENDS, key::Backend::new(frontend.set, u32::from(slot)))?.endpoint)
}
