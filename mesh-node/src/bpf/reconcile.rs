//! Makes the maps equal to the desired state: idempotent, and in an order in which every moment is consistent.
//!
//! 1. Pods that are gone: nothing of theirs is captured any more.
//! 2. New and changed rows, referents first: backends, then the frontends that name them, then pods.
//! 3. Rows that are gone, in the reverse order: a backend only after no frontend names it.
//!
//! An error ends the run at once. What was written so far is consistent by the order above; the next run reads the
//! maps again and does the rest. Deliberately absent: retries and back-off, which are the caller's.

use super::{
    lower::{BpfState, Issue},
    ops::{MapOps, Table},
};
use mesh_common::pod::Pod;
use std::{collections::BTreeMap, io};

/// What a run did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Rows that were added or changed.
    pub written: usize,
    /// Rows that were removed.
    pub removed: usize,
    /// Parts of the intent that could not be taken as they were.
    pub issues: Vec<Issue>,
}

/// Why the maps are not equal to the desired state.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// A map could not be read.
    #[error("cannot read the BPF map {table}; is mesh-node still allowed to call bpf(2)?")]
    Read {
        /// The map.
        table: Table,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A row of a map is not of this version's form.
    #[error("a row of the BPF map {table} has another size; the map belongs to another version of mesh-node")]
    Form {
        /// The map.
        table: Table,
    },
    /// More rows than the map holds.
    #[error("the BPF map {table} is full: {wanted} rows are wanted; raise its size or mesh fewer services")]
    Full {
        /// The map.
        table: Table,
        /// Rows that it should have.
        wanted: usize,
    },
    /// A row could not be written or removed.
    #[error("cannot write a row of the BPF map {table}")]
    Write {
        /// The map.
        table: Table,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// Keeps the maps equal to the desired state.
#[derive(Debug)]
pub struct Reconciler<M> {
    maps: M,
    /// What is in the maps; `None` when that is not known (at the start, and after an error).
    actual: Option<BpfState>,
}

/// The steps of a run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Write,
    Remove,
}

impl<M: MapOps> Reconciler<M> {
    /// A reconciler that knows nothing yet about the maps.
    pub fn new(maps: M) -> Self {
        Self { maps, actual: None }
    }

    /// The maps.
    pub fn maps(&self) -> &M {
        &self.maps
    }

    /// The maps, for writing behind the reconciler's back; the next run reads them again.
    pub fn maps_mut(&mut self) -> &mut M {
        self.actual = None;
        &mut self.maps
    }

    /// One run. See the module's head for the order and for what an error leaves behind.
    pub fn apply(&mut self, desired: &BpfState) -> Result<Report, ReconcileError> {
        // Taken out: an error on the way leaves None, so that the next run looks at the maps.
        let mut actual = match self.actual.take() {
            Some(actual) => actual,
            None => self.read()?,
        };
        let mut report = Report::default();
        self.step(Table::Pods, Step::Remove, desired, &mut actual, &mut report)?;
        for table in Table::ALL {
            self.step(table, Step::Write, desired, &mut actual, &mut report)?;
        }
        for table in Table::ALL.into_iter().rev() {
            self.step(table, Step::Remove, desired, &mut actual, &mut report)?;
        }
        self.actual = Some(actual);
        Ok(report)
    }

    fn step(
        &mut self,
        table: Table,
        step: Step,
        desired: &BpfState,
        actual: &mut BpfState,
        report: &mut Report,
    ) -> Result<(), ReconcileError> {
        let maps = &mut self.maps;
        match table {
            Table::Members => walk(maps, table, step, &desired.members, &mut actual.members, report),
            Table::Backends => walk(maps, table, step, &desired.backends, &mut actual.backends, report),
            Table::Frontends => walk(maps, table, step, &desired.frontends, &mut actual.frontends, report),
            Table::Destinations => {
                walk(maps, table, step, &desired.destinations, &mut actual.destinations, report)
            }
            Table::InboundPorts => {
                walk(maps, table, step, &desired.inbound_ports, &mut actual.inbound_ports, report)
            }
            Table::Inbound => walk(maps, table, step, &desired.inbound, &mut actual.inbound, report),
            Table::Pods => walk(maps, table, step, &desired.pods, &mut actual.pods, report),
        }
    }

    fn read(&mut self) -> Result<BpfState, ReconcileError> {
        let maps = &mut self.maps;
        Ok(BpfState {
            members: read(maps, Table::Members)?,
            backends: read(maps, Table::Backends)?,
            frontends: read(maps, Table::Frontends)?,
            destinations: read(maps, Table::Destinations)?,
            inbound_ports: read(maps, Table::InboundPorts)?,
            inbound: read(maps, Table::Inbound)?,
            pods: read(maps, Table::Pods)?,
        })
    }
}

fn read<K: Pod + Ord, V: Pod>(
    maps: &mut impl MapOps,
    table: Table,
) -> Result<BTreeMap<K, V>, ReconcileError> {
    let rows = maps.rows(table).map_err(|source| ReconcileError::Read { table, source })?;
    rows.iter()
        .map(|(key, value)| Some((K::from_bytes(key)?, V::from_bytes(value)?)))
        .collect::<Option<_>>()
        .ok_or(ReconcileError::Form { table })
}

/// Writes what is missing or different, or removes what is too much, and keeps `actual` true after every row.
fn walk<K: Pod + Ord, V: Pod + Eq>(
    maps: &mut impl MapOps,
    table: Table,
    step: Step,
    desired: &BTreeMap<K, V>,
    actual: &mut BTreeMap<K, V>,
    report: &mut Report,
) -> Result<(), ReconcileError> {
    match step {
        Step::Write => {
            for (key, value) in desired {
                if actual.get(key) != Some(value) {
                    maps.put(table, key.bytes(), value.bytes()).map_err(|source| {
                        match source.raw_os_error() {
                            Some(libc::E2BIG) => ReconcileError::Full { table, wanted: desired.len() },
                            _ => ReconcileError::Write { table, source },
                        }
                    })?;
                    actual.insert(*key, *value);
                    report.written += 1;
                }
            }
        }
        Step::Remove => {
            let gone: Vec<K> = actual.keys().filter(|key| !desired.contains_key(key)).copied().collect();
            for key in gone {
                maps.remove(table, key.bytes()).map_err(|source| ReconcileError::Write { table, source })?;
                actual.remove(&key);
                report.removed += 1;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{
        intent::{Backend, CapturedPod, Destination, Frontend, Intent, Verdict},
        lower::lower,
        ops::{Fake, Faulty},
    };
    use super::*;
    use mesh_common::{key, value};
    use mesh_xds::model::Protocol;
    use std::net::IpAddr;

    /// A small mesh; `generation` changes some rows of every table.
    fn state(generation: u8) -> BpfState {
        let frontend = |n: u8, backends: &[u8]| Frontend {
            addr: IpAddr::from([10, 96, 0, n]),
            port: 80,
            proto: Protocol::Tcp,
            verdict: Verdict::Direct,
            affinity: None,
            backends: backends
                .iter()
                .map(|b| Backend { addr: (IpAddr::from([10, 0, 0, *b]), 8080).into(), weight: 1 })
                .collect(),
        };
        let pod = |n: u8| CapturedPod {
            cookie: u64::from(n),
            addrs: vec![IpAddr::from([10, 0, 0, n])],
            outbound_v4: Some(40000 + u16::from(generation)),
            outbound_v6: None,
            strict: generation % 2 == 1,
            port_strict: BTreeMap::from([(80 + u16::from(generation), true)]),
        };
        let destination = |n: u8| Destination { addr: IpAddr::from([10, 0, 0, n]), verdict: Verdict::Proxy };
        lower(&Intent {
            frontends: vec![frontend(1, &[1, 2, generation + 3]), frontend(generation + 2, &[1, 2])],
            destinations: vec![destination(1), destination(generation + 5)],
            pods: vec![pod(1), pod(generation + 7)],
        })
        .0
    }

    /// What a BPF program relies on: every slot of every frontend's set is there, with its member row.
    fn assert_consistent(maps: &Fake, when: &str) {
        let table = |table| maps.tables.get(&table).into_iter().flatten();
        for (_, row) in table(Table::Frontends) {
            let row = value::Frontend::from_bytes(row).unwrap();
            for slot in 0..row.count {
                let backend = key::Backend::new(row.set, slot);
                let found = table(Table::Backends).find(|(key, _)| key.as_slice() == backend.bytes());
                let backend =
                    found.unwrap_or_else(|| panic!("{when}: a frontend names a missing {backend:?}"));
                let backend = value::Backend::from_bytes(backend.1).unwrap();
                let member = key::Member::new(row.set, backend.endpoint);
                let found = table(Table::Members).any(|(key, _)| key.as_slice() == member.bytes());
                assert!(found, "{when}: {member:?} is missing");
            }
        }
    }

    fn assert_equal(maps: &Fake, desired: &BpfState, when: &str) {
        let actual = Reconciler::new(maps.clone()).read().unwrap();
        assert_eq!(&actual, desired, "{when}");
    }

    #[test]
    fn a_second_run_writes_nothing() {
        let mut reconciler = Reconciler::new(Fake::default());
        let first = reconciler.apply(&state(0)).unwrap();
        assert!(first.written > 10 && first.removed == 0, "{first:?}");
        assert_eq!(reconciler.apply(&state(0)).unwrap(), Report::default());
        assert_equal(reconciler.maps(), &state(0), "after the runs");

        let mut restarted = Reconciler::new(reconciler.maps().clone());
        assert_eq!(
            restarted.apply(&state(0)).unwrap(),
            Report::default(),
            "a restart reads before it writes"
        );
    }

    #[test]
    fn every_moment_is_consistent() {
        let mut reconciler = Reconciler::new(Fake::default());
        reconciler.apply(&state(0)).unwrap();
        let before = reconciler.maps().clone();
        reconciler.apply(&state(1)).unwrap();
        let after = reconciler.maps().clone();
        assert_equal(&after, &state(1), "after the change");
        // Replay the writes one by one.
        let mut replay = before.clone();
        for (step, (table, key, removal)) in after.writes[before.writes.len()..].iter().enumerate() {
            if *removal {
                replay.remove(*table, key).unwrap();
            } else {
                replay.put(*table, key, &after.tables[table][key]).unwrap();
            }
            assert_consistent(&replay, &format!("after step {step}"));
        }
    }

    #[test]
    fn a_failure_at_any_step_is_consistent_and_repaired_by_the_next_run() {
        let mut first = Reconciler::new(Faulty::default());
        first.apply(&state(0)).unwrap();
        let start = first.maps().maps.clone();
        let mut probe = Reconciler::new(start.clone());
        probe.apply(&state(1)).unwrap();
        let steps = probe.maps().writes.len() - start.writes.len();
        assert!(steps > 10, "too few steps to prove anything: {steps}");
        for fail_at in 0..steps {
            let maps = Faulty { maps: start.clone(), fail_at: Some(fail_at) };
            let mut reconciler = Reconciler::new(maps);
            let error = reconciler.apply(&state(1)).unwrap_err();
            assert!(matches!(error, ReconcileError::Full { .. } | ReconcileError::Write { .. }), "{error}");
            assert_consistent(&reconciler.maps().maps, &format!("after a failure at step {fail_at}"));
            reconciler.apply(&state(1)).unwrap();
            assert_equal(&reconciler.maps().maps, &state(1), &format!("repaired after step {fail_at}"));
        }
    }

    #[test]
    fn rows_of_another_size_are_refused() {
        let mut maps = Fake::default();
        maps.put(Table::Pods, &[1, 2, 3], &[4]).unwrap();
        let error = Reconciler::new(maps).apply(&BpfState::default()).unwrap_err();
        assert!(matches!(error, ReconcileError::Form { table: Table::Pods }), "{error}");
    }

    #[test]
    fn pods_leave_first_and_come_last() {
        let mut reconciler = Reconciler::new(Fake::default());
        reconciler.apply(&state(0)).unwrap();
        let tables: Vec<Table> = reconciler.maps().writes.iter().map(|(table, ..)| *table).collect();
        assert!(tables.is_sorted(), "{tables:?}");
        let before = tables.len();
        reconciler.apply(&BpfState::default()).unwrap();
        let tables: Vec<Table> =
            reconciler.maps().writes[before..].iter().map(|(table, ..)| *table).collect();
        assert!(tables.is_sorted_by(|a, b| a >= b), "{tables:?}");
    }
}
