//! The kernel data path as the daemon sees it; the only user of aya.
//!
//! [`intent`] says in domain terms what the kernel should do, [`lower`] turns it into map rows (pure), [`reconcile`]
//! makes the maps equal to the rows (idempotent, referents first), [`datapath`] owns the loaded programs, [`sockmeta`]
//! asks the kernel about single sockets. Deliberately absent: deciding what the intent is, which is `plan`'s part.

mod alias;
pub mod counters;
pub mod datapath;
pub mod error;
pub mod events;
pub mod heartbeat;
pub mod intent;
pub mod lower;
mod maglev;
pub mod ops;
mod pins;
pub mod reconcile;
pub mod sockmeta;
mod sys;
pub mod verdicts;

pub use counters::DirectStat;
pub use datapath::{Datapath, LoadOptions};
pub use error::BpfError;
pub use events::{DenyEvent, DenyEvents};
pub use heartbeat::Heartbeat;
pub use intent::{Away, Backend, Balancing, CapturedPod, Destination, Frontend, Intent, Verdict};
pub use mesh_common::code::{Counter, DenyReason};
pub use reconcile::{ReconcileError, Report};
pub use sockmeta::{OriginalDst, SocketMeta};
pub use verdicts::{LocalFlow, Verdicts};
