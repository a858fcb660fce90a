//! Picks a backend: session affinity first, then the weighted random choice.

use crate::{
    ctx, find,
    maps::{self, AFFINITY, BACKENDS, FRONTENDS, MEMBERS},
    report::count,
};
use mesh_common::{
    code::{counter, deny, verdict},
    decide, key,
    net::Endpoint,
    value,
};

/// A backend for a client of the network namespace `cookie`, or a `code::deny`.
#[inline(always)]
pub(crate) fn backend(
    cookie: u64,
    service: &key::Frontend,
    frontend: &value::Frontend,
) -> Result<Endpoint, u8> {
    if frontend.affinity_ns == 0 {
        return pick(cookie, service, frontend, false);
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
    let backend = pick(cookie, service, frontend, true)?;
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

/// The choice by weight, random or (with affinity) fixed for the client. A set that vanishes between the two look-ups
/// was replaced: the frontend names the new one.
#[inline(always)]
fn pick(
    cookie: u64,
    service: &key::Frontend,
    frontend: &value::Frontend,
    sticky: bool,
) -> Result<Endpoint, u8> {
    let draws = |set| if sticky { decide::sticky_draws(cookie, set) } else { (ctx::random(), ctx::random()) };
    if let Some(backend) = draw(frontend.set, frontend.count, draws(frontend.set)) {
        return Ok(backend);
    }
    count(counter::BACKEND_RETRY);
    match find!(FRONTENDS, service) {
        Some(frontend) if frontend.verdict == verdict::DIRECT && frontend.count == 0 => {
            Err(deny::NO_ENDPOINTS)
        }
        Some(frontend) if frontend.verdict == verdict::DIRECT => {
            draw(frontend.set, frontend.count, draws(frontend.set)).ok_or(deny::BACKEND_GONE)
        }
        _ => Err(deny::BACKEND_GONE),
    }
}

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
