//! The certificates of this node in a file, so that a restarted daemon serves mutual TLS while the CA is away.
//!
//! The file is in the run directory, which is in memory on every usual system, and goes with a reboot as the pods do. It
//! follows what [`CertManager::export`] gives: what has expired, or belongs to no pod any more, leaves it. It is never
//! believed unchecked. Deliberately absent: encryption, since whoever reads root's files has the daemon's memory too.

use super::{CertManager, Exported};
use crate::disk;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use serde::{Deserialize, Serialize};
use std::{
    error::Error,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// The form of the file. One of another form is refused.
const FORMAT: u32 = 1;
/// Far above what [`super::MAX_IDENTITIES`] need.
const MAX_BYTES: u64 = 64 << 20;
/// How long changes are gathered.
const GATHER: Duration = Duration::from_millis(200);
/// How often it is looked for certificates that have expired.
const EXPIRE: Duration = Duration::from_secs(60);

#[derive(Serialize, Deserialize)]
struct Kept {
    format: u32,
    certificates: Vec<Exported>,
}

/// The file of certificates.
#[derive(Clone, Debug)]
pub struct CertKeeper {
    path: PathBuf,
}

impl CertKeeper {
    /// The file in a run directory; its own directory is made, or made private.
    pub fn new(run_dir: &Path) -> io::Result<Self> {
        let dir = run_dir.join("certificates");
        disk::private_dir(&dir)?;
        if statfs(&dir).is_ok_and(|fs| fs.filesystem_type() != TMPFS_MAGIC) {
            tracing::warn!(
                ?dir,
                "keys are kept in a directory that is not on tmpfs; see --keep-certificates"
            );
        }
        Ok(Self { path: dir.join("current") })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes what an earlier daemon may have kept.
    pub fn remove(run_dir: &Path) -> io::Result<()> {
        match fs::remove_dir_all(run_dir.join("certificates")) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    fn read(&self) -> Result<Vec<Exported>, Box<dyn Error + Send + Sync>> {
        let Some(bytes) = disk::read_private(&self.path, MAX_BYTES)? else { return Ok(vec![]) };
        // The parser's own words may quote the file, which holds keys.
        let kept: Kept = serde_json::from_slice(&bytes)
            .map_err(|e| format!("line {}, column {} is not as written here", e.line(), e.column()))?;
        if kept.format != FORMAT {
            return Err(
                format!("it has format {}, and this version reads format {FORMAT}", kept.format).into()
            );
        }
        Ok(kept.certificates)
    }

    /// Gives `manager` what the file holds. What is of no use is said and left out: the CA is asked.
    pub fn load(&self, manager: &CertManager) -> usize {
        let all = match self.read() {
            Ok(all) => all,
            Err(error) => {
                let path = &self.path;
                tracing::error!(?path, error = &*error as &dyn Error, "the kept certificates are not used");
                return 0;
            }
        };
        let (taken, errors) = manager.import(all);
        for error in &errors {
            tracing::warn!(error = error as &dyn Error, "a kept certificate is not used");
        }
        tracing::info!(taken, refused = errors.len(), "certificates of the former daemon");
        taken
    }

    fn write(&self, certificates: Vec<Exported>) -> io::Result<()> {
        let bytes = serde_json::to_vec(&Kept { format: FORMAT, certificates })?;
        disk::replace(&self.path, |file| io::Write::write_all(file, &bytes)).map(|_| ())
    }

    /// Keeps the file in step until `stop`. At the end it is left as it is: the pods let go of their certificates then,
    /// but the next daemon will want them.
    pub async fn run(self, manager: CertManager, stop: CancellationToken) {
        let mut changes = manager.changes();
        let mut written = None;
        loop {
            let all = manager.export();
            if stop.is_cancelled() {
                return;
            }
            if written.as_ref() != Some(&all) {
                let (this, copy) = (self.clone(), all.clone());
                let result = tokio::task::spawn_blocking(move || this.write(copy)).await;
                match result.map_err(io::Error::other).flatten() {
                    Ok(()) => written = Some(all),
                    Err(error) => {
                        tracing::warn!(path = ?self.path, %error, "the certificates cannot be kept for a restart");
                    }
                }
            }
            let wait = async {
                // The sender lives in the manager.
                let _ = timeout(EXPIRE, changes.changed()).await;
                sleep(GATHER).await;
            };
            if stop.run_until_cancelled(wait).await.is_none() {
                return;
            }
        }
    }
}
