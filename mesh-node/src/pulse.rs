//! Whether a thread gets on with its work.
//!
//! The thread ticks; somebody else looks how long ago that was. Deliberately absent: what follows from a thread that
//! hangs, which is `role::heartbeat`'s.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// How long a thread may be silent unless it says otherwise.
pub const LIMIT: Duration = Duration::from_secs(2);

/// How long it may be silent in a long computation.
const BUSY: Duration = Duration::from_secs(30);

/// The sign of life of one thread. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Pulse(Arc<State>);

#[derive(Debug)]
struct State {
    /// Milliseconds since the first use in this process.
    last: AtomicU64,
    limit: AtomicU64,
}

/// A long computation; see [`Pulse::busy`].
#[derive(Debug)]
pub struct Busy(Pulse);

impl Default for Pulse {
    fn default() -> Self {
        Self(Arc::new(State { last: now().into(), limit: millis(LIMIT).into() }))
    }
}

impl Pulse {
    /// One that has been silent for too long.
    #[cfg(test)]
    pub(crate) fn hanging() -> Self {
        now();
        std::thread::sleep(Duration::from_millis(5));
        Self(Arc::new(State { last: 0.into(), limit: 1.into() }))
    }

    /// The thread is alive.
    pub fn tick(&self) {
        self.0.last.store(now(), Relaxed);
    }

    /// Until the guard is dropped the thread may be silent for longer: it computes.
    pub fn busy(&self) -> Busy {
        self.0.limit.store(millis(BUSY), Relaxed);
        self.tick();
        Busy(self.clone())
    }

    /// For how long the thread has been silent, if that is longer than it may be.
    pub fn hung(&self) -> Option<Duration> {
        // The limit first: it shrinks only after a tick.
        let limit = self.0.limit.load(Relaxed);
        let silent = now().saturating_sub(self.0.last.load(Relaxed));
        (silent > limit).then_some(Duration::from_millis(silent))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.tick();
        self.0.0.limit.store(millis(LIMIT), Relaxed);
    }
}

fn now() -> u64 {
    static BASE: OnceLock<Instant> = OnceLock::new();
    millis(BASE.get_or_init(Instant::now).elapsed())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_counts_against_the_limit_of_the_moment() {
        let pulse = Pulse::default();
        now();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(pulse.hung(), None);
        pulse.0.limit.store(5, Relaxed);
        assert!(pulse.hung().is_some_and(|silent| silent >= Duration::from_millis(15)));
        let busy = pulse.busy();
        assert_eq!(pulse.hung(), None);
        drop(busy);
        assert_eq!((pulse.hung(), pulse.0.limit.load(Relaxed)), (None, millis(LIMIT)));
    }
}
