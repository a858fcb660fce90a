//! Whose sockets the programs leave alone: the daemon's, and those of predecessors that still drain.

use super::sys::{self, Map};
use mesh_common::{key, map::entries, pod::Pod as _, value};
use std::io;

/// This daemon's row.
#[derive(Debug)]
pub(super) struct Daemons {
    map: Map,
    key: key::Daemon,
    row: value::Daemon,
}

impl Daemons {
    /// Enters a daemon's cgroup.
    pub(super) fn enter(map: Map, cgroup: u64) -> io::Result<Self> {
        make_room(&map, key::Daemon { cgroup })?;
        let (key, row) = (key::Daemon { cgroup }, value::Daemon { since_ns: sys::monotonic_ns()? });
        map.update(key.bytes(), row.bytes())?;
        Ok(Self { map, key, row })
    }

    /// Takes this daemon's row away, unless a successor in the same cgroup has made it its own.
    pub(super) fn leave(&self) -> io::Result<()> {
        let mut row = [0; size_of::<value::Daemon>()];
        if self.map.lookup(self.key.bytes(), &mut row)? && row == self.row.bytes() {
            self.map.delete(self.key.bytes())?;
        }
        Ok(())
    }
}

/// A daemon that was killed leaves its row behind, which does no harm (a cgroup's id is not given to another one); when
/// there is no room for a new one the oldest goes.
fn make_room(map: &Map, key: key::Daemon) -> io::Result<()> {
    let mut known = Vec::new();
    let mut next = map.next_key(None)?;
    while let Some(key) = next {
        let mut row = vec![0; map.value_size()];
        if map.lookup(&key, &mut row)?
            && let Some(row) = value::Daemon::from_bytes(&row)
        {
            known.push((row.since_ns, key.clone()));
        }
        next = map.next_key(Some(&key))?;
    }
    known.retain(|(_, other)| other != key.bytes());
    known.sort_unstable();
    for (_, oldest) in known.iter().take((known.len() + 1).saturating_sub(entries::DAEMONS)) {
        map.delete(oldest)?;
    }
    Ok(())
}
