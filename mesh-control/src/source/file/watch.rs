//! Says when a directory may have changed.
//!
//! The kernel's notifications make it fast, a periodic tick makes it sure: a notification can be lost (queue overflow,
//! network file systems), and a directory that is itself a link may be replaced. Bursts are joined: a tick comes after
//! a quiet moment, or at the latest after [`MAX_DELAY`].

use notify::{RecursiveMode, Watcher};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout, timeout_at},
};

/// How long nothing has to happen after a change.
const QUIET: Duration = Duration::from_millis(100);
/// The longest time that changes can put off a scan.
const MAX_DELAY: Duration = Duration::from_secs(1);
/// A scan happens at least this often.
const RESCAN: Duration = Duration::from_secs(5);

/// Why a directory cannot be watched.
#[derive(Debug, thiserror::Error)]
#[error("cannot watch {dir}; raise fs.inotify.max_user_instances or max_user_watches if they are used up")]
pub struct WatchError {
    dir: PathBuf,
    #[source]
    source: notify::Error,
}

/// A watch on a directory; ends when it is dropped.
pub struct Watch {
    dir: PathBuf,
    watcher: notify::RecommendedWatcher,
    changes: mpsc::Receiver<()>,
}

impl Watch {
    /// Starts watching `dir`.
    pub fn new(dir: &Path) -> Result<Self, WatchError> {
        // One slot is enough: it only says that there is something to look at.
        let (sender, changes) = mpsc::channel(1);
        let wrap = |source| WatchError { dir: dir.to_owned(), source };
        let watcher = notify::recommended_watcher(move |_: notify::Result<notify::Event>| {
            let _ = sender.try_send(());
        })
        .map_err(wrap)?;
        let mut watch = Self { dir: dir.to_owned(), watcher, changes };
        watch.arm().map_err(wrap)?;
        Ok(watch)
    }

    fn arm(&mut self) -> notify::Result<()> {
        self.watcher.watch(&self.dir, RecursiveMode::NonRecursive)
    }

    /// Waits until it is time to scan. Safe to cancel.
    pub async fn changed(&mut self) {
        let Ok(_) = timeout(RESCAN, self.changes.recv()).await else {
            // The path may lead to another directory by now; watching it again is harmless if not.
            let _ = self.arm();
            return;
        };
        let latest = Instant::now() + MAX_DELAY;
        loop {
            let quiet = (Instant::now() + QUIET).min(latest);
            match timeout_at(quiet, self.changes.recv()).await {
                Ok(Some(())) if Instant::now() < latest => {}
                _ => return,
            }
        }
    }
}
