//! The maps that the reconciler writes, behind a trait, so that it is tested without a kernel.
//!
//! Deliberately absent: the kernel's maps themselves (`datapath`), and maps that the programs write.

use mesh_common::{
    code::proto,
    key, map,
    net::{Endpoint, Ip},
    pod::Pod,
    value,
};
use std::{fmt, io};

/// A map that mirrors a part of the desired state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// `key::Member` -> u32.
    Members,
    /// `key::Backend` -> `value::Backend`.
    Backends,
    /// `key::Maglev` -> `value::MaglevChunk`.
    Maglev,
    /// `key::Frontend` -> `value::Frontend`.
    Frontends,
    /// `net::Ip` -> `value::Destination`.
    Destinations,
    /// `net::Endpoint` -> `value::InboundPort`.
    InboundPorts,
    /// `net::Ip` -> `value::Inbound`.
    Inbound,
    /// `key::Netns` -> `value::Pod`.
    Pods,
}

impl Table {
    /// Every table, referents before what refers to them: rows are added in this order and removed in the reverse.
    pub const ALL: [Self; 8] = [
        Self::Members,
        Self::Backends,
        Self::Maglev,
        Self::Frontends,
        Self::Destinations,
        Self::InboundPorts,
        Self::Inbound,
        Self::Pods,
    ];

    /// The map's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Members => map::MEMBERS,
            Self::Backends => map::BACKENDS,
            Self::Maglev => map::MAGLEV,
            Self::Frontends => map::FRONTENDS,
            Self::Destinations => map::DESTINATIONS,
            Self::InboundPorts => map::INBOUND_PORTS,
            Self::Inbound => map::INBOUND,
            Self::Pods => map::PODS,
        }
    }

    /// Sizes of a key and of a value in bytes.
    pub const fn sizes(self) -> (usize, usize) {
        match self {
            Self::Members => (size_of::<key::Member>(), size_of::<u32>()),
            Self::Backends => (size_of::<key::Backend>(), size_of::<value::Backend>()),
            Self::Maglev => (size_of::<key::Maglev>(), size_of::<value::MaglevChunk>()),
            Self::Frontends => (size_of::<key::Frontend>(), size_of::<value::Frontend>()),
            Self::Destinations => (size_of::<Ip>(), size_of::<value::Destination>()),
            Self::InboundPorts => (size_of::<Endpoint>(), size_of::<value::InboundPort>()),
            Self::Inbound => (size_of::<Ip>(), size_of::<value::Inbound>()),
            Self::Pods => (size_of::<key::Netns>(), size_of::<value::Pod>()),
        }
    }

    /// The position in [`Table::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }

    /// How many rows the map holds.
    pub const fn capacity(self) -> usize {
        match self {
            Self::Members => map::entries::MEMBERS,
            Self::Backends => map::entries::BACKENDS,
            Self::Maglev => map::entries::MAGLEV,
            Self::Frontends => map::entries::FRONTENDS,
            Self::Destinations => map::entries::DESTINATIONS,
            Self::InboundPorts => map::entries::INBOUND_PORTS,
            Self::Inbound => map::entries::INBOUND,
            Self::Pods => map::entries::PODS,
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The operations that the reconciler needs. Keys and values are the ABI types' bytes.
pub trait MapOps {
    /// Every row.
    fn rows(&mut self, table: Table) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>>;
    /// Inserts or replaces one row, which readers see as a whole or not at all. `E2BIG`: the map is full.
    fn put(&mut self, table: Table, key: &[u8], value: &[u8]) -> io::Result<()>;
    /// Removes one row; it is no error when there is none.
    fn remove(&mut self, table: Table, key: &[u8]) -> io::Result<()>;
}

/// What was to be done to a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// To add or replace it.
    Write,
    /// To remove it.
    Remove,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Write => "write",
            Self::Remove => "remove",
        })
    }
}

/// Why a row could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum RowError {
    /// The map has no room.
    #[error(
        "the BPF map {table} is full: no room for {key} within its {} rows; let this node see fewer services or raise \
         the map's size in mesh-common",
        table.capacity()
    )]
    Full {
        /// The map.
        table: Table,
        /// The row.
        key: String,
    },
    /// The kernel has no memory.
    #[error("no memory for {key} in the BPF map {table}; raise the memory limit of mesh-node")]
    Memory {
        /// The map.
        table: Table,
        /// The row.
        key: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel does not allow it.
    #[error("not allowed to {operation} {key} in the BPF map {table}; mesh-node needs CAP_BPF")]
    Forbidden {
        /// The map.
        table: Table,
        /// The row.
        key: String,
        /// What was tried.
        operation: Operation,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Anything else, which the next run tries again.
    #[error("cannot {operation} {key} in the BPF map {table}; the next run tries again")]
    Other {
        /// The map.
        table: Table,
        /// The row.
        key: String,
        /// What was tried.
        operation: Operation,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl RowError {
    pub(super) fn new(table: Table, key: String, operation: Operation, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::E2BIG) => Self::Full { table, key },
            Some(libc::ENOMEM) => Self::Memory { table, key, source },
            Some(libc::EPERM | libc::EACCES) => Self::Forbidden { table, key, operation, source },
            _ => Self::Other { table, key, operation, source },
        }
    }

    /// Whether the same run may succeed later without anybody changing anything.
    pub fn retryable(&self) -> bool {
        matches!(self, Self::Memory { .. } | Self::Other { .. })
    }
}

/// A key of a table: its bytes for the kernel, its text for errors.
pub(super) trait RowKey: Pod + Ord {
    /// What the row is about.
    fn text(&self) -> String;
}

impl RowKey for key::Member {
    fn text(&self) -> String {
        format!("backend {} of set {}", self.backend, self.set)
    }
}

impl RowKey for key::Backend {
    fn text(&self) -> String {
        format!("slot {} of set {}", self.slot, self.set)
    }
}

impl RowKey for key::Maglev {
    fn text(&self) -> String {
        format!("part {} of the Maglev table of set {}", self.chunk, self.set)
    }
}

impl RowKey for key::Frontend {
    fn text(&self) -> String {
        let name = match self.proto {
            proto::TCP => "TCP",
            proto::UDP => "UDP",
            _ => "protocol?",
        };
        format!("service {} {name}", Endpoint::new(self.addr, self.port))
    }
}

impl RowKey for Ip {
    fn text(&self) -> String {
        format!("address {self}")
    }
}

impl RowKey for Endpoint {
    fn text(&self) -> String {
        format!("port {self}")
    }
}

impl RowKey for key::Netns {
    fn text(&self) -> String {
        format!("network namespace {}", self.cookie)
    }
}

#[cfg(any(test, feature = "testing"))]
pub use doubles::{Fake, Fault, Faulty};

/// Doubles for tests.
#[cfg(any(test, feature = "testing"))]
mod doubles {
    use super::{MapOps, Operation, Table};
    use std::{collections::BTreeMap, io};

    /// Maps in memory, with the sequence of changes.
    #[derive(Clone, Debug, Default)]
    pub struct Fake {
        /// The rows of each table.
        pub tables: BTreeMap<Table, BTreeMap<Vec<u8>, Vec<u8>>>,
        /// How many rows a table holds; without an entry, [`Table::capacity`].
        pub capacity: BTreeMap<Table, usize>,
        /// Changes so far.
        pub changes: Vec<(Table, Operation, Vec<u8>)>,
    }

    impl MapOps for Fake {
        fn rows(&mut self, table: Table) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
            Ok(self.tables.get(&table).into_iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect())
        }

        fn put(&mut self, table: Table, key: &[u8], value: &[u8]) -> io::Result<()> {
            let capacity = self.capacity.get(&table).copied().unwrap_or(table.capacity());
            let rows = self.tables.entry(table).or_default();
            if rows.len() >= capacity && !rows.contains_key(key) {
                return Err(io::Error::from_raw_os_error(libc::E2BIG));
            }
            rows.insert(key.to_vec(), value.to_vec());
            self.changes.push((table, Operation::Write, key.to_vec()));
            Ok(())
        }

        fn remove(&mut self, table: Table, key: &[u8]) -> io::Result<()> {
            self.tables.entry(table).or_default().remove(key);
            self.changes.push((table, Operation::Remove, key.to_vec()));
            Ok(())
        }
    }

    /// What goes wrong with a [`Faulty`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Fault {
        /// How many operations (reads of a table count as one) still succeed.
        pub after: usize,
        /// Whether all operations fail from then on, as if the daemon had died, or only one.
        pub lasting: bool,
        /// Whether a failing change is done all the same.
        pub done: bool,
        /// The error number.
        pub errno: i32,
    }

    /// Maps of which some operations fail.
    #[derive(Clone, Debug, Default)]
    pub struct Faulty<M = Fake> {
        /// The maps behind.
        pub maps: M,
        /// What goes wrong; `None` for nothing (more).
        pub fault: Option<Fault>,
    }

    impl<M: MapOps> Faulty<M> {
        /// The fault of this operation, if it is the one.
        fn step(&mut self) -> Option<Fault> {
            let fault = self.fault.as_mut()?;
            if fault.after > 0 {
                fault.after -= 1;
                return None;
            }
            let fault = *fault;
            if !fault.lasting {
                self.fault = None;
            }
            Some(fault)
        }

        fn change(&mut self, change: impl FnOnce(&mut M) -> io::Result<()>) -> io::Result<()> {
            match self.step() {
                None => change(&mut self.maps),
                Some(fault) => {
                    if fault.done {
                        change(&mut self.maps)?;
                    }
                    Err(io::Error::from_raw_os_error(fault.errno))
                }
            }
        }
    }

    impl<M: MapOps> MapOps for Faulty<M> {
        fn rows(&mut self, table: Table) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
            match self.step() {
                None => self.maps.rows(table),
                Some(fault) => Err(io::Error::from_raw_os_error(fault.errno)),
            }
        }

        fn put(&mut self, table: Table, key: &[u8], value: &[u8]) -> io::Result<()> {
            self.change(|maps| maps.put(table, key, value))
        }

        fn remove(&mut self, table: Table, key: &[u8]) -> io::Result<()> {
            self.change(|maps| maps.remove(table, key))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_common::net::NetPort;
    use std::error::Error as _;

    #[test]
    fn errors_name_map_row_and_remedy() {
        let key = key::Frontend::new(Ip::v4(0x0100_600a_u32.to_le()), NetPort::new(80), proto::TCP);
        let error = |errno| {
            RowError::new(Table::Frontends, key.text(), Operation::Write, io::Error::from_raw_os_error(errno))
        };
        for (errno, retryable, parts) in [
            (libc::E2BIG, false, ["FRONTENDS is full", "service 10.96.0.1:80 TCP", "fewer services"]),
            (libc::ENOMEM, true, ["FRONTENDS", "service 10.96.0.1:80 TCP", "memory limit"]),
            (libc::EPERM, false, ["FRONTENDS", "write service 10.96.0.1:80 TCP", "CAP_BPF"]),
            (libc::EBUSY, true, ["FRONTENDS", "write service 10.96.0.1:80 TCP", "tries again"]),
        ] {
            let error = error(errno);
            let text = error.to_string();
            assert!(parts.iter().all(|part| text.contains(part)), "{text}");
            assert_eq!(error.retryable(), retryable, "{text}");
            assert_eq!(error.source().is_none(), errno == libc::E2BIG, "{text}");
        }
    }

    #[test]
    fn tables_are_in_the_order_of_their_index() {
        for (index, table) in Table::ALL.into_iter().enumerate() {
            assert_eq!(table.index(), index);
            assert!(map::ALL.contains(&table.name()) && table.capacity() > 0);
        }
    }
}
