//! Where objects come from. A source turns whatever it watches into [`Event`]s; the index does not know the difference.
//!
//! Today there is one, a directory of YAML files. Deliberately absent: what the objects mean.

pub mod file;

use crate::object::{Object, ObjectKey};

/// A change of the set of objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The object is new or has changed.
    Put(Object),
    /// The object is gone.
    Delete(ObjectKey),
}
