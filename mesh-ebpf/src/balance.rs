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

/// A backend for a client in the network namespace `cookie`, or a `code::deny`.
#[inline(always)]
pub(crate) fn backend(
    cookie: u64,
    pod: &value::Pod,
    service: &key::Frontend,
    frontend: &value::Frontend,
) -> Result<Endpoint, u8> {
    if frontend.affinity_ns == 0 {
        return pick(cookie, pod, service, frontend, false);
    }
    let client = key::Affinity::new(cookie, *service);
    let now = ctx::now();
    if let Some(entry) = maps::copy(AFFINITY.get_ptr(&client))
        && decide::affinity_holds(&entry, now, frontend.affinity_ns)
        && is_member(frontend.set, &entry.backend)
    {
        remember(&client, now, entry.backend);
        count(counter::AFFINITY_HIT);
        return Ok(entry.backend);
    }
    let backend = pick(cookie, pod, service, frontend, true)?;
    remember(&client, now, backend);
    count(counter::AFFINITY_MISS);
    Ok(backend)
}

/// Whether a backend still belongs to a set.
#[inline(always)]
pub(crate) fn is_member(set: u64, backend: &Endpoint) -> bool {
    find!(MEMBERS, key::Member::new(set, *backend)).is_some()
}

#[inline(always)]
fn remember(client: &key::Affinity, now: u64, backend: Endpoint) {
    let entry = value::Affinity { last_use_ns: now, backend, reserved: 0 };
    if AFFINITY.insert(client, entry, 0).is_err() {
        count(counter::STORE_FAILED);
    }
}

/// The choice by weight: by hash of the client, random, or (with affinity) drawn for the client. A set that vanishes
/// between the look-ups was replaced: the frontend names the new one.
#[inline(always)]
fn pick(
    cookie: u64,
    pod: &value::Pod,
    service: &key::Frontend,
    frontend: &value::Frontend,
    sticky: bool,
) -> Result<Endpoint, u8> {
    if let Some(backend) = choose(cookie, pod, service, frontend, sticky) {
        return Ok(backend);
    }
    count(counter::BACKEND_RETRY);
    match find!(FRONTENDS, service) {
        Some(frontend) if decide::has_backends(frontend) => {
            choose(cookie, pod, service, frontend, sticky).ok_or(deny::BACKEND_GONE)
        }
        Some(frontend) if frontend.count == 0 => Err(deny::NO_ENDPOINTS),
        _ => Err(deny::BACKEND_GONE),
    }
}

#[inline(always)]
fn choose(
    cookie: u64,
    pod: &value::Pod,
    service: &key::Frontend,
    frontend: &value::Frontend,
    sticky: bool,
) -> Option<Endpoint> {
    if frontend.maglev != 0 {
        return maglev(pod, service, frontend);
    }
    let draws =
        if sticky { decide::sticky_draws(cookie, frontend.set) } else { (ctx::random(), ctx::random()) };
    draw(frontend.set, frontend.count, draws)
}

/// Weighted, in constant time: Vose's alias table.
#[inline(always)]
fn draw(set: u64, count: u32, draws: (u32, u32)) -> Option<Endpoint> {
    let cell = decide::cell(draws.0, count);
    let backend = find!(BACKENDS, key::Backend::new(set, cell))?;
    let slot = decide::slot(draws.1, cell, backend);
    if slot == cell {
        return Some(backend.endpoint);
    }
    Some(find!(BACKENDS, key::Backend::new(set, slot))?.endpoint)
}

/// Consistent: the same for a client as long as its backend is there.
#[inline(always)]
fn maglev(pod: &value::Pod, service: &key::Frontend, frontend: &value::Frontend) -> Option<Endpoint> {
    let client = if service.addr.is_v4() { &pod.addr_v4 } else { &pod.addr_v6 };
    let position = decide::maglev_position(client, service, frontend.maglev);
    let chunk = find!(MAGLEV, key::Maglev::new(frontend.set, position / decide::MAGLEV_CHUNK))?;
    let slot = chunk.slots[(position % decide::MAGLEV_CHUNK) as usize];
    Some(find!(BACKENDS, key::Backend::new(frontend.set, u32::from(slot)))?.endpoint)
}
