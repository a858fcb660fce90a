//! Delta xDS without I/O: the state machines of both ends, and the snapshots that a server serves.
//!
//! [`DeltaServer`] and [`DeltaClient`] take messages and the time, and give messages; `crate::grpc` puts them on
//! streams. Deliberately absent: sockets, clocks, tasks, and what resources mean.

mod client;
mod server;
mod snapshot;
mod subscription;

#[cfg(test)]
mod tests;

pub use client::{
    Changes, ClientError, ClientLimits, DeltaClient, Received, Rejection, Subscription, Ticket, Update,
};
pub use server::{Answer, DeltaServer, ProtocolError, ServerLimits};
pub use snapshot::{Audience, FilteredView, Resource, Snapshot, SnapshotEdit, View};

use std::time::Duration;

/// The name that subscribes to everything.
pub const WILDCARD: &str = "*";

/// Type URL of the details of our NACKs.
const REJECTIONS_TYPE: &str = "type.googleapis.com/nodemesh.v1.Rejections";

/// At the end of `system_version_info`: more responses of the same version follow. A client is in step with its
/// server once it applied a response without it. Clients that do not know it lose nothing.
const PARTIAL: char = '+';

/// Exponential back-off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// After the first failure.
    pub initial: Duration,
    /// Never more than this.
    pub max: Duration,
}

impl Backoff {
    /// The delay after so many failures in a row; none after none.
    pub fn delay(&self, failures: u32) -> Duration {
        match failures {
            0 => Duration::ZERO,
            n => self.initial.saturating_mul(1u32.checked_shl(n - 1).unwrap_or(u32::MAX)).min(self.max),
        }
    }
}
