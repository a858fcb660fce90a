//! Delta xDS without I/O: the state machines of both ends, and the snapshots that a server serves.
//!
//! [`DeltaServer`] and [`DeltaClient`] take messages and the time, and give messages; `crate::grpc` puts them on
//! streams. Deliberately absent: sockets, clocks, tasks, and what resources mean.

mod client;
mod record;
mod server;
mod snapshot;
mod subscription;

#[cfg(test)]
mod tests;

pub use client::{
    Changes, ClientError, ClientLimits, DeltaClient, Received, Rejection, Subscription, Ticket, Update,
};
pub use record::RecordError;
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

    /// A random delay after so many failures in a row, for clients that must not come back all at once: somewhere
    /// between `initial` and what the doubling has reached, by `fraction` (0 to 1, drawn by the caller).
    pub fn jittered(&self, failures: u32, fraction: f64) -> Duration {
        if failures == 0 {
            return Duration::ZERO;
        }
        let most = self.delay(failures.saturating_add(1));
        let least = self.initial.min(most);
        least + (most - least).mul_f64(fraction.clamp(0.0, 1.0))
    }
}

/// Counts failures in a row for a [`Backoff`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Retry {
    failures: u32,
}

impl Retry {
    /// Something has ended; `stable` if it was good for long enough that what went wrong earlier does not count. The
    /// time to wait before the next attempt.
    pub fn after(&mut self, backoff: Backoff, stable: bool, fraction: f64) -> Duration {
        self.failures = if stable { 1 } else { self.failures.saturating_add(1) };
        backoff.jittered(self.failures, fraction)
    }

    /// Failures in a row.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod backoff {
    use super::*;

    #[test]
    fn failures_are_forgotten_after_a_stable_stream_only() {
        let backoff = Backoff { initial: Duration::from_millis(200), max: Duration::from_secs(15) };
        let (mut retry, stable) = (Retry::default(), Duration::from_secs(30));
        let mut most =
            |lived: u64| retry.after(backoff, Duration::from_secs(lived) >= stable, 1.0).as_millis();
        assert_eq!([most(0), most(0), most(0)], [400, 800, 1_600]);
        // A server that accepts, sends everything and falls over, again and again.
        assert_eq!([most(3), most(29)], [3_200, 6_400]);
        assert_eq!([most(0), most(0), most(0)], [12_800, 15_000, 15_000]);
        assert_eq!([most(30), most(0)], [400, 800]);
    }

    #[test]
    fn jitter_stays_between_the_first_delay_and_the_doubled_one() {
        let backoff = Backoff { initial: Duration::from_millis(200), max: Duration::from_secs(15) };
        let ms = |failures, fraction| backoff.jittered(failures, fraction).as_millis();
        assert_eq!((ms(0, 1.0), ms(1, 0.0), ms(1, 1.0), ms(3, 1.0)), (0, 200, 400, 1_600));
        assert_eq!((ms(u32::MAX, 0.0), ms(u32::MAX, 0.5), ms(u32::MAX, 1.0)), (200, 7_600, 15_000));
    }
}
