//! Makes the maps equal to the desired state: idempotent, and in an order in which every moment is consistent.
//!
//! 1. Pods that are gone: nothing of theirs is captured any more.
//! 2. New backend sets, each under an id that nothing in the maps uses: their rows are written once and never changed.
//! 3. New and changed rows, referents first: a frontend moves to its new set with a single write, and only if the set
//!    is there as a whole. Pods come last.
//! 4. Rows that are gone, in the reverse order: a set only after no frontend in the kernel names it.
//!
//! What fails is left out and the rest goes on, so that one service that does not fit neither keeps a denial of another
//! one from coming into force nor the rows that are gone from making room. If room was made for what did not fit, the
//! steps run once more. The next run after an error reads the maps again and repairs them. Deliberately absent: back-off
//! between runs, which is the caller's; emptying a service to make room for its own next set (for a moment both have to
//! fit, else it keeps its old backends and the run says so).

use super::{
    lower::{BackendSet, BpfState, Issue},
    ops::{MapOps, Operation, RowError, RowKey, Table},
};
use mesh_common::{
    code::verdict,
    key,
    net::{Endpoint, Ip},
    pod::Pod,
    value,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

/// How often a run goes through the steps at most.
const MAX_PASSES: usize = 3;

/// How many errors a run keeps; the others are only counted.
const MAX_ERRORS: usize = 8;

/// What a run did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Rows that were added or changed.
    pub written: usize,
    /// Rows that were removed.
    pub removed: usize,
    /// Rows that each table has now, in the order of [`Table::ALL`]; for metrics, beside [`Table::capacity`].
    pub rows: [usize; Table::ALL.len()],
    /// Parts of the intent that could not be taken as they were.
    pub issues: Vec<Issue>,
}

/// Why the maps are not equal to the desired state.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// A map could not be read. Nothing was changed.
    #[error("cannot read the BPF map {table}; is mesh-node still allowed to call bpf(2)?")]
    Read {
        /// The map.
        table: Table,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A row of a map is not of this version's form. Nothing was changed.
    #[error("a row of the BPF map {table} has another size; the map belongs to another version of mesh-node")]
    Form {
        /// The map.
        table: Table,
    },
    /// Some rows could not be changed. What depends on them is as it was, the rest is in force.
    #[error("{count} changes of BPF map rows failed; what depends on these rows stays as it was")]
    Rows {
        /// How many changes failed.
        count: usize,
        /// The first of them.
        #[source]
        first: Box<RowError>,
        /// The next ones, a few at most.
        others: Vec<RowError>,
        /// What was done all the same.
        report: Box<Report>,
    },
}

impl ReconcileError {
    /// Whether the same run may succeed later without anybody changing anything.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Read { .. } => true,
            Self::Form { .. } => false,
            Self::Rows { first, others, .. } => first.retryable() || others.iter().any(RowError::retryable),
        }
    }
}

/// Keeps the maps equal to the desired state.
#[derive(Debug)]
pub struct Reconciler<M> {
    maps: M,
    /// What is in the maps; `None` when that is not known (at the start, and after an error).
    actual: Option<Actual>,
    /// The id that a backend set was last given.
    last_id: u64,
}

/// The rows of the maps.
#[derive(Debug, Default, PartialEq, Eq)]
struct Actual {
    members: BTreeMap<key::Member, u32>,
    backends: BTreeMap<key::Backend, value::Backend>,
    maglev: BTreeMap<key::Maglev, value::MaglevChunk>,
    frontends: BTreeMap<key::Frontend, value::Frontend>,
    destinations: BTreeMap<Ip, value::Destination>,
    inbound_ports: BTreeMap<Endpoint, value::InboundPort>,
    inbound: BTreeMap<Ip, value::Inbound>,
    pods: BTreeMap<key::Netns, value::Pod>,
    /// The ids of the sets that are there as a whole, by content.
    ids: BTreeMap<BackendSet, u64>,
}

/// The maps during one pass, with its tally.
struct Pass<'a, M> {
    maps: &'a mut M,
    report: &'a mut Report,
    count: usize,
    errors: Vec<RowError>,
    /// How many of the errors say that there was no room.
    full: usize,
}

impl<M: MapOps> Reconciler<M> {
    /// A reconciler that knows nothing yet about the maps.
    pub fn new(maps: M) -> Self {
        Self { maps, actual: None, last_id: 0 }
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
            None => Actual::read(&mut self.maps)?,
        };
        let mut report = Report::default();
        for round in 1.. {
            let mut pass =
                Pass { maps: &mut self.maps, report: &mut report, count: 0, errors: vec![], full: 0 };
            let made_room = pass.run(desired, &mut actual, &mut self.last_id);
            let Pass { count, mut errors, full, .. } = pass;
            if errors.is_empty() {
                break;
            }
            // After any other error it is not certain what the maps hold, so that they have to be read first.
            if full < count || !made_room || round == MAX_PASSES {
                report.rows = actual.rows();
                let first = Box::new(errors.remove(0));
                return Err(ReconcileError::Rows { count, first, others: errors, report: Box::new(report) });
            }
        }
        report.rows = actual.rows();
        self.actual = Some(actual);
        Ok(report)
    }
}

impl Actual {
    fn read(maps: &mut impl MapOps) -> Result<Self, ReconcileError> {
        let mut actual = Self {
            members: read(maps, Table::Members)?,
            backends: read(maps, Table::Backends)?,
            maglev: read(maps, Table::Maglev)?,
            frontends: read(maps, Table::Frontends)?,
            destinations: read(maps, Table::Destinations)?,
            inbound_ports: read(maps, Table::InboundPorts)?,
            inbound: read(maps, Table::Inbound)?,
            pods: read(maps, Table::Pods)?,
            ids: BTreeMap::new(),
        };
        for id in actual.present() {
            if let Some(set) = actual.whole(id) {
                actual.ids.entry(set).or_insert(id);
            }
        }
        Ok(actual)
    }

    /// How many rows each table has.
    fn rows(&self) -> [usize; Table::ALL.len()] {
        Table::ALL.map(|table| match table {
            Table::Members => self.members.len(),
            Table::Backends => self.backends.len(),
            Table::Maglev => self.maglev.len(),
            Table::Frontends => self.frontends.len(),
            Table::Destinations => self.destinations.len(),
            Table::InboundPorts => self.inbound_ports.len(),
            Table::Inbound => self.inbound.len(),
            Table::Pods => self.pods.len(),
        })
    }

    /// The ids of all sets of which the maps have any slot, member or part of a table.
    fn present(&self) -> BTreeSet<u64> {
        let slots = sets(&self.backends, |id| key::Backend::new(id, 0), |key| key.set);
        let members = sets(&self.members, |id| key::Member::new(id, Endpoint::NONE), |key| key.set);
        let tables = sets(&self.maglev, |id| key::Maglev::new(id, 0), |key| key.set);
        slots.into_iter().chain(members).chain(tables).collect()
    }

    /// The ids that frontends in the kernel name.
    fn named(&self) -> BTreeSet<u64> {
        self.frontends.values().filter(|row| row.count > 0).map(|row| row.set).collect()
    }

    fn slots(&self, id: u64) -> impl Iterator<Item = (&key::Backend, &value::Backend)> {
        self.backends.range(key::Backend::new(id, 0)..).take_while(move |(key, _)| key.set == id)
    }

    fn table(&self, id: u64) -> impl Iterator<Item = (&key::Maglev, &value::MaglevChunk)> {
        self.maglev.range(key::Maglev::new(id, 0)..).take_while(move |(key, _)| key.set == id)
    }

    fn members(&self, id: u64) -> impl Iterator<Item = (&key::Member, &u32)> {
        self.members.range(key::Member::new(id, Endpoint::NONE)..).take_while(move |(key, _)| key.set == id)
    }

    /// The content of the set, if neither its slots nor its table leave a gap and its members are exactly its slots'
    /// endpoints. A table that lacks its end is another content than any that is wanted.
    fn whole(&self, id: u64) -> Option<BackendSet> {
        let mut slots = Vec::new();
        for (slot, (key, row)) in (0..).zip(self.slots(id)) {
            if *key != key::Backend::new(id, slot)
                || self.members.get(&key::Member::new(id, row.endpoint)) != Some(&slot)
            {
                return None;
            }
            slots.push(*row);
        }
        if slots.is_empty() || self.members(id).count() != slots.len() {
            return None;
        }
        let mut maglev = Vec::new();
        for (chunk, (key, row)) in (0..).zip(self.table(id)) {
            if *key != key::Maglev::new(id, chunk) {
                return None;
            }
            maglev.push(*row);
        }
        Some(BackendSet { slots: slots.into(), maglev: maglev.into() })
    }
}

/// The ids in the keys of a table that is ordered by them, without going through every row.
fn sets<K: Ord, V>(rows: &BTreeMap<K, V>, first: impl Fn(u64) -> K, id: impl Fn(&K) -> u64) -> Vec<u64> {
    let mut ids = Vec::new();
    let mut from = Some(0);
    while let Some(start) = from
        && let Some((key, _)) = rows.range(first(start)..).next()
    {
        let id = id(key);
        ids.push(id);
        from = id.checked_add(1);
    }
    ids
}

/// The next id of which nothing in the maps knows (`taken`). Ids go up, so that a program that has just read a frontend
/// does not find another set's backend under the id that it read.
fn unused_id(last: &mut u64, taken: &BTreeSet<u64>) -> u64 {
    loop {
        *last = last.wrapping_add(1);
        // 0 means no set. The loop ends: there are fewer sets than ids.
        if *last != 0 && !taken.contains(last) {
            return *last;
        }
    }
}

impl<M: MapOps> Pass<'_, M> {
    /// All steps once. Returns whether removals made room.
    fn run(&mut self, desired: &BpfState, actual: &mut Actual, last_id: &mut u64) -> bool {
        self.remove_rest(Table::Pods, &desired.pods, &mut actual.pods);
        let ids = self.place_sets(desired, actual, last_id);
        let mut frontends = BTreeMap::new();
        for (key, row) in &desired.frontends {
            if row.count == 0 {
                frontends.insert(*key, *row);
            } else if let Some(id) = ids.get(&row.set) {
                frontends.insert(*key, value::Frontend { set: *id, ..*row });
            } else if row.verdict == verdict::PROXY {
                // The daemon can do without the kernel's choice, but what has to go through it must not go past it.
                frontends
                    .insert(*key, value::Frontend { set: 0, count: 0, affinity_ns: 0, maglev: 0, ..*row });
            }
        }
        self.write_rows(Table::Frontends, &frontends, &mut actual.frontends);
        self.write_rows(Table::Destinations, &desired.destinations, &mut actual.destinations);
        self.write_rows(Table::InboundPorts, &desired.inbound_ports, &mut actual.inbound_ports);
        self.write_rows(Table::Inbound, &desired.inbound, &mut actual.inbound);
        self.write_rows(Table::Pods, &desired.pods, &mut actual.pods);

        let removed = self.report.removed;
        self.remove_rest(Table::Inbound, &desired.inbound, &mut actual.inbound);
        self.remove_rest(Table::InboundPorts, &desired.inbound_ports, &mut actual.inbound_ports);
        self.remove_rest(Table::Destinations, &desired.destinations, &mut actual.destinations);
        self.remove_rest(Table::Frontends, &desired.frontends, &mut actual.frontends);
        let mut keep = actual.named();
        keep.extend(ids.values());
        actual.ids.retain(|_, id| keep.contains(id));
        for id in actual.present().difference(&keep) {
            self.remove_set(*id, actual);
        }
        self.report.removed > removed
    }

    /// Writes the sets that are not there. Returns the id of each set (by its number) that is there as a whole.
    fn place_sets(
        &mut self,
        desired: &BpfState,
        actual: &mut Actual,
        last_id: &mut u64,
    ) -> BTreeMap<u64, u64> {
        let mut ids = BTreeMap::new();
        let mut missing = Vec::new();
        for (number, set) in &desired.sets {
            match actual.ids.get(set) {
                Some(id) => _ = ids.insert(*number, *id),
                None => missing.push((*number, set)),
            }
        }
        if missing.is_empty() {
            return ids;
        }
        let mut taken = actual.present();
        taken.extend(actual.named());
        *last_id = taken.last().copied().unwrap_or(0).max(*last_id);
        for (number, set) in missing {
            let id = unused_id(last_id, &taken);
            if self.place_set(id, set, actual) {
                actual.ids.insert(set.clone(), id);
                ids.insert(number, id);
            } else {
                // Its rows would only take room from sets that fit.
                self.remove_set(id, actual);
            }
        }
        ids
    }

    /// Writes one set; false when that failed.
    fn place_set(&mut self, id: u64, set: &BackendSet, actual: &mut Actual) -> bool {
        if actual.backends.len() + set.slots.len() > Table::Backends.capacity() {
            let text = format!("a set of {} backends", set.slots.len());
            let full = io::Error::from_raw_os_error(libc::E2BIG);
            self.failed(RowError::new(Table::Backends, text, Operation::Write, full));
            return false;
        }
        let slots = (0..).zip(set.slots.iter()).all(|(slot, row)| {
            let member = key::Member::new(id, row.endpoint);
            self.write(Table::Members, member, slot, &mut actual.members)
                && self.write(Table::Backends, key::Backend::new(id, slot), *row, &mut actual.backends)
        });
        slots
            && (0..).zip(set.maglev.iter()).all(|(chunk, row)| {
                self.write(Table::Maglev, key::Maglev::new(id, chunk), *row, &mut actual.maglev)
            })
    }

    /// Removes whatever there is of a set that no frontend names.
    fn remove_set(&mut self, id: u64, actual: &mut Actual) {
        let table: Vec<key::Maglev> = actual.table(id).map(|(key, _)| *key).collect();
        for key in table {
            self.remove(Table::Maglev, key, &mut actual.maglev);
        }
        let slots: Vec<key::Backend> = actual.slots(id).map(|(key, _)| *key).collect();
        for key in slots {
            self.remove(Table::Backends, key, &mut actual.backends);
        }
        let members: Vec<key::Member> = actual.members(id).map(|(key, _)| *key).collect();
        for key in members {
            self.remove(Table::Members, key, &mut actual.members);
        }
    }

    /// Writes what is missing or different.
    fn write_rows<K: RowKey, V: Pod + Eq>(
        &mut self,
        table: Table,
        desired: &BTreeMap<K, V>,
        actual: &mut BTreeMap<K, V>,
    ) {
        for (key, value) in desired {
            if actual.get(key) != Some(value) {
                self.write(table, *key, *value, actual);
            }
        }
    }

    /// Removes what is too much.
    fn remove_rest<K: RowKey, V: Pod>(
        &mut self,
        table: Table,
        desired: &BTreeMap<K, V>,
        actual: &mut BTreeMap<K, V>,
    ) {
        let gone: Vec<K> = actual.keys().filter(|key| !desired.contains_key(key)).copied().collect();
        for key in gone {
            self.remove(table, key, actual);
        }
    }

    /// One write; false when it failed. `actual` stays true either way.
    fn write<K: RowKey, V: Pod>(
        &mut self,
        table: Table,
        key: K,
        value: V,
        actual: &mut BTreeMap<K, V>,
    ) -> bool {
        match self.maps.put(table, key.bytes(), value.bytes()) {
            Ok(()) => {
                actual.insert(key, value);
                self.report.written += 1;
                true
            }
            Err(source) => {
                self.failed(RowError::new(table, key.text(), Operation::Write, source));
                false
            }
        }
    }

    fn remove<K: RowKey, V: Pod>(&mut self, table: Table, key: K, actual: &mut BTreeMap<K, V>) {
        match self.maps.remove(table, key.bytes()) {
            Ok(()) => {
                actual.remove(&key);
                self.report.removed += 1;
            }
            Err(source) => self.failed(RowError::new(table, key.text(), Operation::Remove, source)),
        }
    }

    fn failed(&mut self, error: RowError) {
        self.count += 1;
        self.full += usize::from(matches!(error, RowError::Full { .. }));
        if self.errors.len() < MAX_ERRORS {
            self.errors.push(error);
        }
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

#[cfg(test)]
mod tests {
    use super::super::intent::{Away, Balancing};
    use super::super::{
        intent::{Backend, CapturedPod, DenyReason, Destination, Frontend, Intent, Verdict},
        lower::lower,
        ops::{Fake, Fault, Faulty},
    };
    use super::*;
    use mesh_common::decide;
    use mesh_xds::model::Protocol;
    use proptest::prelude::*;
    use std::{error::Error as _, net::IpAddr, time::Duration};

    type Rows<'a> = std::collections::btree_map::Iter<'a, Vec<u8>, Vec<u8>>;

    /// Maps that check after every change what the programs rely on. Starting from consistent maps it is enough to look
    /// at what the change touches.
    #[derive(Clone, Debug, Default)]
    struct Watched {
        maps: Fake,
        /// Sets of which a row was removed.
        gone: BTreeSet<u64>,
    }

    impl Watched {
        fn table(&self, table: Table) -> Rows<'_> {
            static EMPTY: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
            self.maps.tables.get(&table).unwrap_or(&EMPTY).iter()
        }

        fn row(&self, table: Table, key: &[u8]) -> Option<&Vec<u8>> {
            self.maps.tables.get(&table)?.get(key)
        }

        /// Every slot of the frontend's set is there, with its member row, and its alias is a slot.
        fn check_frontend(&self, frontend: &[u8]) {
            let frontend = value::Frontend::from_bytes(frontend).unwrap();
            for slot in 0..frontend.count {
                let row = self.row(Table::Backends, key::Backend::new(frontend.set, slot).bytes());
                let row = row.unwrap_or_else(|| panic!("{frontend:?} names a set without slot {slot}"));
                let row = value::Backend::from_bytes(row).unwrap();
                assert!(row.alias < frontend.count, "{row:?} leads outside of {frontend:?}");
                let member = key::Member::new(frontend.set, row.endpoint);
                assert!(self.row(Table::Members, member.bytes()).is_some(), "{member:?} is missing");
            }
            for place in 0..frontend.maglev {
                let key = key::Maglev::new(frontend.set, place / decide::MAGLEV_CHUNK);
                let row = self.row(Table::Maglev, key.bytes());
                let row = row.unwrap_or_else(|| panic!("{frontend:?} names a set without {key:?}"));
                let slots = value::MaglevChunk::from_bytes(row).unwrap().slots;
                let slot = slots[(place % decide::MAGLEV_CHUNK) as usize];
                assert!(u32::from(slot) < frontend.count, "{slot} is outside of {frontend:?}");
            }
        }

        fn set_of(table: Table, key: &[u8]) -> Option<u64> {
            match table {
                Table::Backends => Some(key::Backend::from_bytes(key).unwrap().set),
                Table::Members => Some(key::Member::from_bytes(key).unwrap().set),
                Table::Maglev => Some(key::Maglev::from_bytes(key).unwrap().set),
                _ => None,
            }
        }
    }

    impl MapOps for Watched {
        fn rows(&mut self, table: Table) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
            self.maps.rows(table)
        }

        fn put(&mut self, table: Table, key: &[u8], value: &[u8]) -> io::Result<()> {
            if let Some(set) = Self::set_of(table, key) {
                assert!(self.row(table, key).is_none(), "a row of set {set} is written a second time");
                assert!(!self.gone.contains(&set), "the id {set} is used again");
            }
            self.maps.put(table, key, value)?;
            if table == Table::Frontends {
                self.check_frontend(value);
            }
            Ok(())
        }

        fn remove(&mut self, table: Table, key: &[u8]) -> io::Result<()> {
            if let Some(set) = Self::set_of(table, key) {
                self.gone.insert(set);
                for (_, row) in self.table(Table::Frontends) {
                    let row = value::Frontend::from_bytes(row).unwrap();
                    assert!(row.count == 0 || row.set != set, "{row:?} loses a row of its set");
                }
            }
            self.maps.remove(table, key)
        }
    }

    /// The maps hold the desired state and nothing else, whatever ids the sets have.
    fn assert_equal(maps: &Fake, desired: &BpfState, when: &str) {
        let actual = Actual::read(&mut maps.clone()).unwrap();
        assert_eq!(actual.rows(), Table::ALL.map(|table| desired.len(table)), "{when}");
        assert_eq!(actual.present().len(), desired.sets.len(), "{when}");
        for (key, row) in &desired.frontends {
            let found = actual.frontends[key];
            assert_eq!(value::Frontend { set: row.set, ..found }, *row, "{when}");
            let content = (row.count > 0).then(|| actual.whole(found.set).expect("a whole set"));
            assert_eq!(content.as_ref(), desired.sets.get(&row.set), "{when}");
        }
        assert_eq!(actual.destinations, desired.destinations, "{when}");
        assert_eq!(actual.inbound_ports, desired.inbound_ports, "{when}");
        assert_eq!(actual.inbound, desired.inbound, "{when}");
        assert_eq!(actual.pods, desired.pods, "{when}");
    }

    fn backends(hosts: impl IntoIterator<Item = (u16, u32)>) -> Vec<Backend> {
        let addr = |n: u16| (IpAddr::from([10, 0, (n >> 8) as u8, n as u8]), 8080).into();
        hosts.into_iter().map(|(n, weight)| Backend { addr: addr(n), weight }).collect()
    }

    fn frontend(n: u8, verdict: Verdict, backends: Vec<Backend>) -> Frontend {
        let (addr, port) = (IpAddr::from([10, 96, 0, n]), 80);
        Frontend {
            addr,
            port,
            proto: Protocol::Tcp,
            verdict,
            away: Away::Deny,
            balancing: Balancing::Random,
            affinity: None,
            backends,
        }
    }

    /// A service with this many backends, the first one being host `first`.
    fn direct(n: u8, first: u16, count: u16) -> Frontend {
        frontend(n, Verdict::Direct, backends((first..first + count).map(|n| (n, 1))))
    }

    fn state(frontends: Vec<Frontend>) -> BpfState {
        lower(&Intent { frontends, ..Intent::default() }).0
    }

    fn intents() -> impl Strategy<Value = Intent> {
        let verdict = prop_oneof![
            3 => Just(Verdict::Direct),
            1 => Just(Verdict::Proxy),
            1 => Just(Verdict::Deny(DenyReason::Policy)),
        ];
        let hosts = prop::collection::vec((0..5_u16, 1..3_u32), 0..5);
        let frontends =
            prop::collection::btree_map(0..5_u8, (verdict, hosts, any::<bool>(), any::<bool>()), 0..5);
        let destinations = prop::collection::btree_set(0..4_u8, 0..4);
        let ports = prop::collection::btree_map(80..83_u16, any::<bool>(), 0..3);
        let pods = prop::collection::btree_map(1..4_u8, (any::<bool>(), ports), 0..3);
        (frontends, destinations, pods).prop_map(|(frontends, destinations, pods)| Intent {
            frontends: frontends
                .into_iter()
                .map(|(n, (verdict, hosts, sticky, hashed))| Frontend {
                    balancing: if hashed { Balancing::Maglev } else { Balancing::Random },
                    affinity: sticky.then_some(Duration::from_secs(1)),
                    ..frontend(n, verdict, backends(hosts))
                })
                .collect(),
            destinations: destinations
                .into_iter()
                .map(|n| Destination {
                    addr: IpAddr::from([10, 0, 0, n]),
                    verdict: Verdict::Proxy,
                    away: Away::Deny,
                })
                .collect(),
            pods: pods
                .into_iter()
                .map(|(n, (strict, port_strict))| CapturedPod {
                    cookie: n.into(),
                    addrs: vec![IpAddr::from([10, 0, 1, n])],
                    outbound_v4: Some(40000 + u16::from(strict)),
                    outbound_v6: None,
                    dns: false,
                    strict,
                    port_strict,
                })
                .collect(),
        })
    }

    /// Every way to fail at every step on the way from one state to another.
    fn fail_everywhere(from: &BpfState, to: &BpfState) {
        let mut reconciler = Reconciler::new(Watched::default());
        reconciler.apply(from).unwrap();
        let start = reconciler.maps().clone();
        let steps = {
            let mut reconciler = Reconciler::new(start.clone());
            let report = reconciler.apply(to).unwrap();
            assert_equal(&reconciler.maps().maps, to, "without a fault");
            Table::ALL.len() + report.written + report.removed
        };
        for after in 0..steps {
            for (lasting, done, errno) in [
                (false, false, libc::E2BIG),
                (false, false, libc::EIO),
                (false, true, libc::EIO),
                (true, false, libc::ENOMEM),
                (true, false, libc::E2BIG),
            ] {
                let fault = Fault { after, lasting, done, errno };
                let when = format!("{fault:?}");
                let maps = Faulty { maps: start.clone(), fault: Some(fault) };
                let mut reconciler = Reconciler::new(maps);
                match reconciler.apply(to) {
                    // Room was made in the same run.
                    Ok(_) => assert_eq!((lasting, errno), (false, libc::E2BIG), "an error is lost: {when}"),
                    Err(error) => assert!(error.source().is_some(), "{error}"),
                }
                reconciler.maps.fault = None;
                let mut restarted = Reconciler::new(reconciler.maps().maps.clone());
                reconciler.apply(to).unwrap_or_else(|error| panic!("not repaired after {when}: {error}"));
                assert_equal(&reconciler.maps().maps.maps, to, &when);
                let report = reconciler.apply(to).unwrap();
                assert_eq!((report.written, report.removed), (0, 0), "not at rest after {when}");

                // The daemon died instead, and the next one wants what was before.
                restarted.maps_mut().gone.clear();
                restarted.apply(from).unwrap();
                assert_equal(&restarted.maps().maps, from, &when);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_failure_at_any_step_is_consistent_and_repaired(from in intents(), to in intents()) {
            fail_everywhere(&lower(&from).0, &lower(&to).0);
        }

        #[test]
        fn any_sequence_ends_where_it_should(all in prop::collection::vec(intents(), 1..8)) {
            let mut reconciler = Reconciler::new(Watched::default());
            for intent in all {
                let desired = lower(&intent).0;
                let report = reconciler.apply(&desired).unwrap();
                assert_equal(&reconciler.maps().maps, &desired, "after a run");
                prop_assert_eq!(report.rows, Table::ALL.map(|table| desired.len(table)));
            }
        }
    }

    #[test]
    fn a_second_run_writes_nothing_nor_does_a_restarted_daemon() {
        let desired = state(vec![direct(1, 0, 3), direct(2, 0, 3), direct(3, 5, 2)]);
        let mut reconciler = Reconciler::new(Watched::default());
        let first = reconciler.apply(&desired).unwrap();
        assert_eq!((first.written, first.removed), (2 * 5 + 3, 0), "two sets, one of them shared");
        assert_eq!(first.rows[Table::Backends.index()], 5);
        let idle = Report { written: 0, ..first };
        assert_eq!(reconciler.apply(&desired).unwrap(), idle);
        let mut restarted = Reconciler::new(reconciler.maps().clone());
        assert_eq!(restarted.apply(&desired).unwrap(), idle, "it reads before it writes");
    }

    #[test]
    fn a_changed_set_is_written_beside_the_old_one_and_the_frontend_moves_with_one_write() {
        let mut reconciler = Reconciler::new(Watched::default());
        reconciler.apply(&state(vec![direct(1, 0, 2)])).unwrap();
        let before = reconciler.maps().maps.changes.len();
        reconciler.apply(&state(vec![direct(1, 0, 3)])).unwrap();
        let changes: Vec<_> = reconciler.maps().maps.changes[before..].iter().map(|c| (c.0, c.1)).collect();
        use Operation::{Remove, Write};
        use Table::{Backends, Frontends, Members};
        let expected = [
            [(Members, Write), (Backends, Write)].repeat(3),
            vec![(Frontends, Write)],
            vec![(Backends, Remove); 2],
            vec![(Members, Remove); 2],
        ];
        assert_eq!(changes, expected.concat());
    }

    #[test]
    fn what_does_not_fit_holds_nothing_else_up() {
        let mut reconciler = Reconciler::new(Watched::default());
        reconciler.maps_mut().maps.capacity.insert(Table::Backends, 10);
        reconciler.apply(&state(vec![direct(1, 0, 4), direct(2, 100, 4), direct(3, 200, 2)])).unwrap();

        // Service 1 grows beyond the map, 2 becomes denied, 3 changes, 4 is new.
        let denied = frontend(2, Verdict::Deny(DenyReason::Policy), vec![]);
        let services = |first| vec![first, denied.clone(), direct(3, 300, 3), direct(4, 400, 3)];
        let error = reconciler.apply(&state(services(direct(1, 0, 50)))).unwrap_err();
        let ReconcileError::Rows { count: 1, first, report, .. } = &error else { panic!("{error:?}") };
        assert!(matches!(**first, RowError::Full { table: Table::Backends, .. }), "{first}");
        assert!(!error.retryable() && report.written > 0);
        let actual = Actual::read(&mut reconciler.maps().maps.clone()).unwrap();
        let counts: Vec<_> = actual.frontends.values().map(|row| (row.verdict, row.count)).collect();
        let expected = [(verdict::DIRECT, 4), (verdict::DENY, 0), (verdict::DIRECT, 3), (verdict::DIRECT, 3)];
        assert_eq!(counts, expected, "the first one keeps its old set");
        assert_eq!(actual.backends.len(), 10, "and nothing is left of the one that did not fit");
        actual.frontends.values().for_each(|row| reconciler.maps().check_frontend(row.bytes()));

        // The service shrinks and another one goes, which makes the room for the new set beside the old one.
        let desired = state(vec![direct(1, 0, 2), denied.clone(), direct(3, 300, 3)]);
        reconciler.apply(&desired).unwrap();
        assert_equal(&reconciler.maps().maps, &desired, "repaired");
    }

    #[test]
    fn a_proxied_service_whose_backends_do_not_fit_still_goes_to_the_daemon() {
        let mut reconciler = Reconciler::new(Watched::default());
        reconciler.maps_mut().maps.capacity.insert(Table::Backends, 3);
        reconciler.apply(&state(vec![direct(1, 0, 3)])).unwrap();
        let proxied = frontend(1, Verdict::Proxy, backends((0..4).map(|n| (n, 1))));
        let desired = state(vec![proxied]);
        assert!(!reconciler.apply(&desired).unwrap_err().retryable());
        let actual = Actual::read(&mut reconciler.maps().maps.clone()).unwrap();
        let rows: Vec<_> = actual.frontends.values().map(|row| (row.verdict, row.count, row.set)).collect();
        assert_eq!(rows, [(verdict::PROXY, 0, 0)], "without a choice in the kernel");
        reconciler.maps_mut().maps.capacity.clear();
        reconciler.apply(&desired).unwrap();
        assert_equal(&reconciler.maps().maps, &desired, "with room");
    }

    #[test]
    fn a_full_map_gets_room_in_the_same_run() {
        let mut reconciler = Reconciler::new(Watched::default());
        reconciler.maps_mut().maps.capacity.extend([(Table::Backends, 6), (Table::Frontends, 2)]);
        reconciler.apply(&state(vec![direct(1, 0, 3), direct(2, 100, 3)])).unwrap();
        // Neither the new frontends nor their sets fit beside the old ones.
        let desired = state(vec![direct(3, 200, 3), direct(4, 300, 3)]);
        reconciler.apply(&desired).unwrap();
        assert_equal(&reconciler.maps().maps, &desired, "after the second pass");
    }

    #[test]
    fn a_set_larger_than_the_map_is_refused_before_anything_is_written() {
        let count = u32::try_from(Table::Backends.capacity()).unwrap() + 1;
        let hosts = (0..count)
            .map(|n| Backend { addr: (std::net::Ipv4Addr::from(0x0a00_0000 + n), 80).into(), weight: 1 });
        let mut reconciler = Reconciler::new(Watched::default());
        let error =
            reconciler.apply(&state(vec![frontend(1, Verdict::Direct, hosts.collect())])).unwrap_err();
        assert!(error.source().unwrap().to_string().contains("a set of 524289 backends"), "{error:?}");
        assert_eq!(reconciler.maps().maps.changes, [], "nothing was written in vain");
    }

    #[test]
    fn rows_that_others_left_are_repaired_or_removed() {
        let desired = state(vec![direct(1, 0, 2)]);
        let mut reconciler = Reconciler::new(Fake::default());
        reconciler.apply(&desired).unwrap();
        let row = |set, count| value::Frontend {
            set,
            count,
            verdict: verdict::DIRECT,
            ..value::Frontend::zeroed()
        };
        let service = *desired.frontends.keys().next().unwrap();
        let backend = value::Backend::zeroed();

        // A frontend that names nothing, the highest id, and a member too many.
        let maps = reconciler.maps_mut();
        maps.put(Table::Frontends, service.bytes(), row(77, 2).bytes()).unwrap();
        maps.put(Table::Backends, key::Backend::new(u64::MAX, 3).bytes(), backend.bytes()).unwrap();
        maps.put(Table::Members, key::Member::new(1, backend.endpoint).bytes(), 0_u32.bytes()).unwrap();
        reconciler.apply(&desired).unwrap();
        assert_equal(reconciler.maps(), &desired, "repaired");

        // A hole in a set that is in use.
        let actual = Actual::read(&mut reconciler.maps().clone()).unwrap();
        let set = actual.frontends[&service].set;
        assert_ne!(set, 1, "the set with one member too many was not taken");
        reconciler.maps_mut().remove(Table::Backends, key::Backend::new(set, 0).bytes()).unwrap();
        reconciler.apply(&desired).unwrap();
        assert_equal(reconciler.maps(), &desired, "the hole is repaired");
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
        let addr = IpAddr::from([10, 0, 0, 1]);
        let pod = CapturedPod {
            cookie: 1,
            addrs: vec![addr],
            outbound_v4: Some(40000),
            outbound_v6: None,
            dns: false,
            strict: true,
            port_strict: BTreeMap::from([(80, false)]),
        };
        let desired = lower(&Intent {
            frontends: vec![frontend(1, Verdict::Proxy, vec![])],
            destinations: vec![Destination { addr, verdict: Verdict::Proxy, away: Away::Deny }],
            pods: vec![pod],
        })
        .0;
        let mut reconciler = Reconciler::new(Fake::default());
        reconciler.apply(&desired).unwrap();
        reconciler.apply(&BpfState::default()).unwrap();
        let tables: Vec<Table> = reconciler.maps().changes.iter().map(|change| change.0).collect();
        let (come, leave) = tables.split_at(5);
        assert!(come.is_sorted() && come.last() == Some(&Table::Pods), "{come:?}");
        assert!(leave.is_sorted_by(|a, b| a >= b) && leave.first() == Some(&Table::Pods), "{leave:?}");
    }
}
