//! The kernel data path as the daemon sees it; the only user of aya.
//!
//! [`intent`] says in domain terms what the kernel should do, [`lower`] turns it into map rows (pure), [`reconcile`]
//! makes the maps equal to the rows (idempotent, referents first), [`load`] loads the programs or adopts a predecessor's
//! maps and links, [`datapath`] owns them, [`sockmeta`] asks the kernel about single sockets. Deliberately absent: deciding what the intent is, which is `plan`'s part.

mod alias;
pub mod counters;
mod daemons;
pub mod datapath;
pub mod error;
pub mod events;
pub mod heartbeat;
pub mod intent;
pub mod load;
pub mod lower;
mod maglev;
pub mod nameservers;
pub mod ops;
mod pins;
pub mod probe;
pub mod reconcile;
pub mod sockmeta;
mod sys;
pub mod verdicts;

pub use counters::DirectStat;
pub use datapath::Datapath;
pub use error::BpfError;
pub use events::{DenyEvent, DenyEvents};
pub use heartbeat::Heartbeat;
pub use intent::{Away, Backend, Balancing, CapturedPod, Destination, Frontend, Intent, Verdict};
pub use load::{LoadOptions, try_load};
pub use mesh_common::code::{Counter, DenyReason};
pub use nameservers::Nameservers;
pub use pins::{PinError, Unloaded, unload};
pub use probe::{Feature, Features};
pub use reconcile::{ReconcileError, Report};
pub use sockmeta::{BalancedSocket, OriginalDst, SocketMeta};
pub use verdicts::{LocalFlow, Verdicts};
