//! Writes the configuration behind the daemon's back: gathers for a second, writes once, on a thread of its own.
//!
//! Nothing is written before the control plane has sent everything once, so that half of a configuration is never taken
//! for the last good one. While the disk refuses, changes wait, by name and thus bounded by the configuration; if they
//! outgrow [`MAX_WAITING`], the file is removed rather than left to grow old in silence.

use super::{CacheError, ConfigCache, cache::Latest};
use mesh_xds::{delta::Changes, grpc::AdsStatus};
use std::{
    error::Error,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// How long changes are gathered.
const GATHER: Duration = Duration::from_secs(1);
/// Pause after a failure.
const RETRY: Duration = Duration::from_secs(5);
/// How often a contact without news is noted.
const TOUCH: Duration = Duration::from_secs(15);
/// Bytes of changes that may wait for the disk.
const MAX_WAITING: usize = 256 << 20;

/// Counters of a writer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Writes that succeeded.
    pub written: u64,
    /// Writes that failed.
    pub failed: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Bytes of the file; 0 if there is none.
    pub file_bytes: u64,
}

#[derive(Default)]
struct Waiting {
    latest: Latest,
    bytes: usize,
    stop: bool,
    /// Nothing is taken any more.
    given_up: bool,
}

#[derive(Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    wake: Condvar,
    written: AtomicU64,
    failed: AtomicU64,
    written_bytes: AtomicU64,
    file_bytes: AtomicU64,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes changes that were applied, and writes them in its own time. Cheap to clone.
#[derive(Clone)]
pub struct CacheWriter {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for CacheWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CacheWriter").field("stats", &self.stats()).finish()
    }
}

impl Default for CacheWriter {
    fn default() -> Self {
        Self::new()
    }
}

impl CacheWriter {
    /// A writer that gathers; [`start`](Self::start) makes it write.
    pub fn new() -> Self {
        Self { shared: Arc::default() }
    }

    /// Starts its thread. `ads` tells when the configuration is complete, and when the control plane is there.
    pub fn start(
        &self,
        cache: ConfigCache,
        ads: watch::Receiver<AdsStatus>,
    ) -> std::io::Result<JoinHandle<()>> {
        let shared = self.shared.clone();
        std::thread::Builder::new().name("config-cache".into()).spawn(move || run(&shared, cache, &ads))
    }

    /// Changes that are in force now; what was refused is not among them.
    pub fn record(&self, changes: Changes) {
        let waiting = &mut *self.shared.waiting();
        if waiting.given_up {
            return;
        }
        for resource in changes.resources {
            waiting.bytes += resource.size();
            let key = (changes.type_url.clone(), resource.name.clone());
            let before = waiting.latest.insert(key, Some(resource));
            waiting.bytes -= before.flatten().map_or(0, |r| r.size());
        }
        for name in changes.removed {
            waiting.bytes += name.len();
            let before = waiting.latest.insert((changes.type_url.clone(), name), None);
            waiting.bytes -= before.flatten().map_or(0, |r| r.size());
        }
    }

    /// Writes what waits and ends the thread.
    pub fn stop(&self) {
        self.shared.waiting().stop = true;
        self.shared.wake.notify_one();
    }

    /// Counters.
    pub fn stats(&self) -> CacheStats {
        let s = &self.shared;
        CacheStats {
            written: s.written.load(Relaxed),
            failed: s.failed.load(Relaxed),
            written_bytes: s.written_bytes.load(Relaxed),
            file_bytes: s.file_bytes.load(Relaxed),
        }
    }
}

fn run(shared: &Shared, mut cache: ConfigCache, ads: &watch::Receiver<AdsStatus>) {
    let mut next = Instant::now() + GATHER;
    let mut touched = Instant::now();
    loop {
        let (latest, stop) = {
            let mut waiting = shared.waiting();
            while !waiting.stop && Instant::now() < next {
                let pause = next.saturating_duration_since(Instant::now());
                waiting = shared.wake.wait_timeout(waiting, pause).unwrap_or_else(PoisonError::into_inner).0;
            }
            let complete = ads.borrow().synced;
            waiting.bytes = if complete { 0 } else { waiting.bytes };
            (if complete { std::mem::take(&mut waiting.latest) } else { Latest::new() }, waiting.stop)
        };
        next = Instant::now() + GATHER;
        if !latest.is_empty() {
            match cache.write(&latest) {
                Ok(bytes) => {
                    shared.written.fetch_add(1, Relaxed);
                    shared.written_bytes.fetch_add(bytes, Relaxed);
                    tracing::debug!(resources = latest.len(), bytes, "the configuration is on disk");
                    touched = Instant::now();
                }
                Err(error) => {
                    shared.failed.fetch_add(1, Relaxed);
                    next = Instant::now() + RETRY;
                    failed(shared, &mut cache, &error, latest);
                }
            }
        } else if touched.elapsed() >= TOUCH && ads.borrow().current {
            if let Err(error) = cache.touch() {
                tracing::warn!(error = &error as &dyn Error, "the age of the configuration cannot be noted");
            }
            touched = Instant::now();
        }
        shared.file_bytes.store(cache.bytes(), Relaxed);
        if stop {
            return;
        }
    }
}

fn failed(shared: &Shared, cache: &mut ConfigCache, error: &CacheError, latest: Latest) {
    let mut waiting = shared.waiting();
    let newer = std::mem::replace(&mut waiting.latest, latest);
    waiting.latest.extend(newer);
    waiting.bytes =
        waiting.latest.iter().map(|((_, name), r)| r.as_ref().map_or(name.len(), |r| r.size())).sum();
    let cause = error as &dyn Error;
    if error.retryable() && waiting.bytes <= MAX_WAITING {
        tracing::warn!(error = cause, "the configuration is not on disk yet; trying again");
        return;
    }
    tracing::error!(
        error = cause,
        "the configuration is not kept any more; a restart needs the control plane"
    );
    (waiting.latest, waiting.bytes, waiting.given_up) = (Latest::new(), 0, true);
    if let Err(error) = cache.remove() {
        tracing::error!(%error, path = ?cache.path(), "the old configuration cannot be removed; remove it by hand");
    }
}
