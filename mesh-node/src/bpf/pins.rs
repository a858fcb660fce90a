//! The folder of the pins: `PIN_DIR/v{ABI_VERSION}/`.
//!
//! Pinned links keep the capture in force when the daemon dies: its pods' connections are then refused rather than
//! sent in the clear. A new daemon pins into a staging folder and takes the place of the old pins only when
//! everything is attached. Deliberately absent: taking a predecessor's programs over.

use mesh_common::ABI_VERSION;
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

/// Why the pin folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// A file operation failed.
    #[error("cannot {doing} {path}")]
    File {
        /// What was tried.
        doing: &'static str,
        /// On which path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Another process holds the folder.
    #[error("another mesh-node uses the pins under {0}; stop it, or give this one another --pin-dir")]
    InUse(PathBuf),
}

/// The pin folder, locked for this process.
#[derive(Debug)]
pub(super) struct Pins {
    base: PathBuf,
    /// Held as long as the pins are this process's.
    _lock: Flock<File>,
}

impl Pins {
    /// Opens (and makes, and mounts a bpffs if there is none) the folder, and locks it.
    pub(super) fn open(base: &Path) -> Result<Self, PinError> {
        ensure_bpffs(base)?;
        fs::create_dir_all(base).map_err(|source| file("create", base, source))?;
        let dir = File::open(base).map_err(|source| file("open", base, source))?;
        let lock = Flock::lock(dir, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            nix::errno::Errno::EWOULDBLOCK => PinError::InUse(base.to_owned()),
            errno => file("lock", base, errno.into()),
        })?;
        Ok(Self { base: base.to_owned(), _lock: lock })
    }

    /// An empty folder to pin into.
    pub(super) fn stage(&self) -> Result<PathBuf, PinError> {
        let staging = self.staging();
        remove(&staging)?;
        fs::create_dir(&staging).map_err(|source| file("create", &staging, source))?;
        Ok(staging)
    }

    /// Puts the staged pins into force and removes those of predecessors, of other versions as well. With the last
    /// pin of a dead process its programs are detached, but for the inbound ones: those are held until
    /// [`let_go`](Self::let_go), so that a strict pod stays shut until its new capture.
    pub(super) fn commit(&self) -> Result<PathBuf, PinError> {
        let (staging, current, stale) = (self.staging(), self.current(), self.base.join("stale"));
        // Left by a process that died in here.
        self.hold_inbound(&stale)?;
        remove(&stale)?;
        if current.exists() {
            fs::rename(&current, &stale).map_err(|source| file("rename", &current, source))?;
        }
        fs::rename(&staging, &current).map_err(|source| file("rename", &staging, source))?;
        let entries = fs::read_dir(&self.base).map_err(|source| file("read", &self.base, source))?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let version = name.to_str().and_then(|name| name.strip_prefix('v')).map(str::parse::<u32>);
            if name == "stale" || matches!(version, Some(Ok(number)) if number != ABI_VERSION) {
                self.hold_inbound(&entry.path())?;
                remove(&entry.path())?;
            }
        }
        Ok(current)
    }

    /// Moves the inbound links of a predecessor to where they are held; a newer one takes the place of an older one.
    fn hold_inbound(&self, dir: &Path) -> Result<(), PinError> {
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(file("read", dir, source)),
        };
        let held = self.held();
        for entry in
            entries.flatten().filter(|e| e.file_name().as_encoded_bytes().starts_with(INBOUND.as_bytes()))
        {
            fs::create_dir_all(&held).map_err(|source| file("create", &held, source))?;
            let to = held.join(entry.file_name());
            remove_file(&to)?;
            fs::rename(entry.path(), &to).map_err(|source| file("rename", &to, source))?;
        }
        Ok(())
    }

    /// Lets a predecessor's inbound link to a network namespace go.
    pub(super) fn let_go(&self, cookie: u64) -> Result<(), PinError> {
        remove_file(&self.held().join(inbound(cookie)))
    }

    /// Lets all inbound links of predecessors go; whether there were any.
    pub(super) fn let_all_go(&self) -> Result<bool, PinError> {
        let held = self.held();
        let any = held.exists();
        remove(&held)?;
        Ok(any)
    }

    /// Removes all pins, those that are held for a predecessor as well, and the folder if nothing else is in it.
    pub(super) fn clear(&self) -> Result<(), PinError> {
        self.let_all_go()?;
        self.clear_own()
    }

    /// Removes this process's pins, and the folder if nothing else is in it.
    pub(super) fn clear_own(&self) -> Result<(), PinError> {
        remove(&self.staging())?;
        remove(&self.current())?;
        // Not empty means that something is held, or that somebody else keeps something there.
        drop(fs::remove_dir(&self.base));
        Ok(())
    }

    /// Where this version's pins are.
    pub(super) fn current(&self) -> PathBuf {
        self.base.join(format!("v{ABI_VERSION}"))
    }

    fn staging(&self) -> PathBuf {
        self.base.join("staging")
    }

    fn held(&self) -> PathBuf {
        self.base.join("held")
    }
}

/// What the names of inbound links begin with.
const INBOUND: &str = "inbound_";

/// The name of the pin of a network namespace's inbound link.
pub(super) fn inbound(cookie: u64) -> String {
    format!("{INBOUND}{cookie}")
}

fn remove_file(path: &Path) -> Result<(), PinError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(file("remove", path, source)),
        _ => Ok(()),
    }
}

fn file(doing: &'static str, path: &Path, source: io::Error) -> PinError {
    PinError::File { doing, path: path.to_owned(), source }
}

/// Removes a folder of pins (which has no folders in it) if it is there.
pub(super) fn remove(dir: &Path) -> Result<(), PinError> {
    match fs::remove_dir_all(dir) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(file("remove", dir, source)),
        _ => Ok(()),
    }
}

/// Mounts a bpffs at the folder's parent unless the folder will be on one anyway.
fn ensure_bpffs(base: &Path) -> Result<(), PinError> {
    if let Some(existing) = base.ancestors().find(|path| path.exists())
        && statfs(existing).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC)
    {
        return Ok(());
    }
    let mount_point = base.parent().unwrap_or(base);
    fs::create_dir_all(mount_point).map_err(|source| file("create", mount_point, source))?;
    mount(
        Some("bpf"),
        mount_point,
        Some("bpf"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        Some("mode=0700"),
    )
    .map_err(|errno| file("mount a bpffs at", mount_point, errno.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    // A plain folder has the same file operations; the bpffs itself is exercised by the end-to-end tests.
    fn pins(base: &Path) -> Pins {
        let dir = File::open(base).unwrap();
        Pins { base: base.to_owned(), _lock: Flock::lock(dir, FlockArg::LockExclusiveNonblock).unwrap() }
    }

    #[test]
    fn new_pins_take_the_place_of_old_ones() {
        let dir = tempfile::tempdir().unwrap();
        let pins = pins(dir.path());
        fs::create_dir(dir.path().join("v0")).unwrap();
        fs::write(dir.path().join("v0/link"), "older version").unwrap();
        for generation in ["first", "second"] {
            fs::write(pins.stage().unwrap().join("link"), generation).unwrap();
            let current = pins.commit().unwrap();
            assert_eq!(fs::read_to_string(current.join("link")).unwrap(), generation);
        }
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(left, [pins.current().file_name().unwrap()]);
        pins.clear().unwrap();
        assert!(!dir.path().exists());
    }

    #[test]
    fn a_second_process_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let _first = pins(dir.path());
        let second = File::open(dir.path()).unwrap();
        assert!(Flock::lock(second, FlockArg::LockExclusiveNonblock).is_err());
    }
}
