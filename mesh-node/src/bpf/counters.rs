//! What the programs counted: outcomes per CPU, and the statistics of direct connections.

use super::sys::Map;
use aya::maps::{MapData, MapError, PerCpuArray};
use mesh_common::{
    code::{Counter, flow},
    key,
    pod::Pod as _,
    value,
};
use std::{io, net::SocketAddr};

/// One row of the statistics of direct (in-kernel) connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectStat {
    /// The client pod, by its network namespace's cookie.
    pub src_cookie: u64,
    /// The service address that the client dialled.
    pub vip: SocketAddr,
    /// The backend that it got.
    pub backend: SocketAddr,
    /// Whether it is a pod of this node that a cached verdict allows, in place of the daemon.
    pub local: bool,
    /// Connections established since the programs were loaded.
    pub opened: u64,
    /// Connections closed since then.
    pub closed: u64,
    /// Bytes from the client to the backend, of closed connections.
    pub sent_bytes: u64,
    /// Bytes from the backend to the client, of closed connections.
    pub received_bytes: u64,
    /// Segments that the client sent again, of closed connections.
    pub retransmits: u64,
    /// Mean of the smoothed round-trip times at close, in microseconds; `None` before a connection closed.
    pub rtt_us: Option<u64>,
    /// Sum of these times in microseconds, and of how many connections.
    pub rtt_sum_us: (u64, u64),
}

/// The sums over all CPUs.
pub(super) fn counters(map: &PerCpuArray<MapData, u64>) -> Result<Vec<(Counter, u64)>, MapError> {
    Counter::ALL
        .iter()
        .map(|counter| {
            Ok((*counter, map.get(&counter.code(), 0)?.iter().fold(0_u64, |sum, n| sum.wrapping_add(*n))))
        })
        .collect()
}

/// Removes rows that were counted and that nothing adds to: of pods that are not captured any more, and of all whose
/// connections have ended when the table is nearly full. Returns how many.
pub(super) fn forget(
    map: &Map,
    counted: &[DirectStat],
    is_captured: impl Fn(u64) -> io::Result<bool>,
) -> io::Result<usize> {
    let crowded = counted.len() > mesh_common::map::entries::DIRECT_STATS / 4 * 3;
    let mut bytes = vec![0; map.value_size()];
    let mut removed = 0;
    for row in counted.iter().filter(|row| row.opened == row.closed) {
        if !crowded && is_captured(row.src_cookie)? {
            continue;
        }
        let kind = if row.local { flow::LOCAL } else { flow::DIRECT };
        let key = key::Direct::new(row.src_cookie, row.vip.into(), row.backend.into(), u32::from(kind));
        if map.lookup(key.bytes(), &mut bytes)?
            && value::Direct::from_bytes(&bytes)
                .is_some_and(|now| (now.opened, now.closed) == (row.opened, row.closed))
        {
            removed += usize::from(map.delete(key.bytes())?);
        }
    }
    Ok(removed)
}

/// Every row. The walk may miss rows that appear meanwhile, and a row that vanishes ends it early only if it was the
/// one just read; the next reading has them all.
pub(super) fn direct_stats(map: &Map) -> io::Result<Vec<DirectStat>> {
    let mut rows = Vec::new();
    let mut bytes = vec![0; map.value_size()];
    let mut next = map.next_key(None)?;
    // The bound ends a walk that the kernel restarts over and over because of concurrent deletions.
    for _ in 0..2 * mesh_common::map::entries::DIRECT_STATS {
        let Some(raw) = next else { break };
        if map.lookup(&raw, &mut bytes)?
            && let (Some(key), Some(value)) =
                (key::Direct::from_bytes(&raw), value::Direct::from_bytes(&bytes))
        {
            rows.push(DirectStat {
                src_cookie: key.cookie,
                vip: key.service.into(),
                backend: key.backend.into(),
                local: key.kind == u32::from(flow::LOCAL),
                opened: value.opened,
                closed: value.closed,
                sent_bytes: value.sent,
                received_bytes: value.received,
                retransmits: value.retransmits,
                rtt_us: value.rtt_us.checked_div(value.rtt_count),
                rtt_sum_us: (value.rtt_us, value.rtt_count),
            });
        }
        next = map.next_key(Some(&raw))?;
    }
    Ok(rows)
}
