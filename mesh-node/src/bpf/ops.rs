//! The maps that the reconciler writes, behind a trait, so that it is tested without a kernel.

use mesh_common::{
    key, map,
    net::{Endpoint, Ip},
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
    pub const ALL: [Self; 7] = [
        Self::Members,
        Self::Backends,
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
    /// Inserts or replaces one row.
    fn put(&mut self, table: Table, key: &[u8], value: &[u8]) -> io::Result<()>;
    /// Removes one row; it is no error when there is none.
    fn remove(&mut self, table: Table, key: &[u8]) -> io::Result<()>;
}

#[cfg(any(test, feature = "testing"))]
pub use doubles::{Fake, Faulty};

/// Doubles for tests.
#[cfg(any(test, feature = "testing"))]
mod doubles {
    use super::{MapOps, Table};
    use std::{collections::BTreeMap, io};

    /// Maps in memory, with the sequence of writes.
    #[derive(Clone, Debug, Default)]
    pub struct Fake {
        /// The rows of each table.
        pub tables: BTreeMap<Table, BTreeMap<Vec<u8>, Vec<u8>>>,
        /// Writes so far: table, key, and whether it was a removal.
        pub writes: Vec<(Table, Vec<u8>, bool)>,
    }

    impl MapOps for Fake {
        fn rows(&mut self, table: Table) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
            Ok(self.tables.get(&table).into_iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect())
        }

        fn put(&mut self, table: Table, key: &[u8], value: &[u8]) -> io::Result<()> {
            self.writes.push((table, key.to_vec(), false));
            self.tables.entry(table).or_default().insert(key.to_vec(), value.to_vec());
            Ok(())
        }

        fn remove(&mut self, table: Table, key: &[u8]) -> io::Result<()> {
            self.writes.push((table, key.to_vec(), true));
            self.tables.entry(table).or_default().remove(key);
            Ok(())
        }
    }

    /// A [`Fake`] of which one write, counted from 0, fails as a full map does.
    #[derive(Clone, Debug, Default)]
    pub struct Faulty {
        /// The maps behind.
        pub maps: Fake,
        /// Which write fails; `None` for no more failures.
        pub fail_at: Option<usize>,
    }

    impl Faulty {
        fn step(&mut self) -> io::Result<()> {
            match &mut self.fail_at {
                Some(0) => {
                    self.fail_at = None;
                    Err(io::Error::from_raw_os_error(libc::E2BIG))
                }
                Some(left) => {
                    *left -= 1;
                    Ok(())
                }
                None => Ok(()),
            }
        }
    }

    impl MapOps for Faulty {
        fn rows(&mut self, table: Table) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
            self.maps.rows(table)
        }

        fn put(&mut self, table: Table, key: &[u8], value: &[u8]) -> io::Result<()> {
            self.step()?;
            self.maps.put(table, key, value)
        }

        fn remove(&mut self, table: Table, key: &[u8]) -> io::Result<()> {
            self.step()?;
            self.maps.remove(table, key)
        }
    }
}
