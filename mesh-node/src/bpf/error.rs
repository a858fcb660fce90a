//! Why the data path cannot be loaded or changed: one error type for [`super::datapath`].

use super::{pins::PinError, reconcile::ReconcileError};
use aya::{
    EbpfError,
    maps::MapError,
    pin::PinError as AyaPinError,
    programs::{ProgramError, links::LinkError},
};
use std::{io, path::PathBuf};

/// Why the data path cannot be loaded or changed.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    /// The pin folder.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// The object was refused.
    #[error(
        "cannot load the BPF object; mesh-node needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, and Linux 5.15 or later (`mesh-node check` tells more)"
    )]
    Load(#[source] Box<EbpfError>),
    /// The kernel does not say what it has.
    #[error("cannot ask the kernel for its BPF features; mesh-node needs CAP_BPF and CAP_NET_ADMIN")]
    Probe(#[source] io::Error),
    /// A program was refused or could not be attached.
    #[error("cannot load or attach the BPF program {program}")]
    Program {
        /// Its symbol.
        program: String,
        /// Why; its text carries the verifier's log.
        #[source]
        source: Box<ProgramError>,
    },
    /// A link could not be pinned.
    #[error("cannot pin {path}")]
    Pin {
        /// The pin's path.
        path: PathBuf,
        /// Why.
        #[source]
        source: AyaPinError,
    },
    /// A takeover finds maps that it cannot go on with.
    #[error(
        "the running mesh-node's maps cannot be used on ({0}); stop it and start this one instead of taking over"
    )]
    NotAdoptable(String),
    /// A link is not of the form that can be pinned.
    #[error("the kernel gave no link for {program}; mesh-node needs Linux 5.15 or later")]
    Link {
        /// The program's symbol.
        program: String,
        /// Why.
        #[source]
        source: LinkError,
    },
    /// The object lacks a map or program that this version expects.
    #[error("the BPF object has no {what} {name}: it is of another build than the daemon")]
    Missing {
        /// "map" or "program".
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A map has another layout than the daemon's types.
    #[error(
        "the BPF map {name} has keys of {key} and values of {value} bytes, but {expected:?} are expected: the object is of another build than the daemon"
    )]
    Layout {
        /// The map.
        name: &'static str,
        /// Its key size.
        key: usize,
        /// Its value size.
        value: usize,
        /// What the daemon's types have.
        expected: (usize, usize),
    },
    /// A map could not be opened.
    #[error("cannot use the BPF map {name}")]
    Map {
        /// The map.
        name: &'static str,
        /// Why.
        #[source]
        source: Box<MapError>,
    },
    /// A map row could not be read or written.
    #[error("cannot access a row of the BPF map {name}")]
    Row {
        /// The map.
        name: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A cgroup folder is not usable.
    #[error(
        "cannot use the cgroup {path}: it has to be a folder of a cgroup2 file system whose root is visible"
    )]
    Cgroup {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The maps could not be made equal to the intent.
    #[error(transparent)]
    Reconcile(#[from] ReconcileError),
}
