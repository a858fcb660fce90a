//! The folder of the pins: `PIN_DIR/v{ABI_VERSION}/`.
//!
//! Pinned links and maps keep the capture in force while no daemon is there. A new daemon with the same maps goes on with
//! them (`load`); one with others pins into a staging folder and takes the place of the old pins only when everything is
//! attached. One process at a time has the folder, by a lock; at a takeover the lock itself is handed over.

use super::sys;
use mesh_common::{ABI_VERSION, map};
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use std::{
    fs::{self, File, TryLockError},
    io,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
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
    #[error(
        "another mesh-node uses the pins under {0}; stop it, take over from it (--takeover), or give this one another --pin-dir"
    )]
    InUse(PathBuf),
    /// A takeover by a daemon with another folder.
    #[error("the running mesh-node keeps its pins elsewhere than in {0}; give both the same --pin-dir")]
    Elsewhere(PathBuf),
}

/// The pin folder, locked for this process.
#[derive(Debug)]
pub(super) struct Pins {
    base: PathBuf,
    /// Locked as long as the pins are this process's, or its successor's: the lock belongs to the open file and not to
    /// the process, so that two processes have it together during a takeover.
    lock: Option<File>,
}

/// What [`unload`] removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unloaded {
    /// Programs at the cgroup.
    pub programs: usize,
    /// Network namespaces whose inbound side was captured.
    pub inbound: usize,
    /// Maps.
    pub maps: usize,
}

impl Pins {
    /// Opens (and makes, and mounts a bpffs if there is none) the folder, and locks it.
    pub(super) fn open(base: &Path) -> Result<Self, PinError> {
        ensure_bpffs(base)?;
        fs::create_dir_all(base).map_err(|source| file("create", base, source))?;
        let dir = File::open(base).map_err(|source| file("open", base, source))?;
        match dir.try_lock() {
            Ok(()) => Ok(Self { base: base.to_owned(), lock: Some(dir) }),
            Err(TryLockError::WouldBlock) => Err(PinError::InUse(base.to_owned())),
            Err(TryLockError::Error(source)) => Err(file("lock", base, source)),
        }
    }

    /// The folder of a daemon that handed its lock over.
    pub(super) fn inherit(base: &Path, lock: OwnedFd) -> Result<Self, PinError> {
        let id = |meta: fs::Metadata| (meta.dev(), meta.ino());
        let lock = File::from(lock);
        let theirs = lock.metadata().map(id).map_err(|source| file("look at the lock of", base, source))?;
        let ours = fs::metadata(base).map(id).map_err(|source| file("open", base, source))?;
        if theirs != ours {
            return Err(PinError::Elsewhere(base.to_owned()));
        }
        Ok(Self { base: base.to_owned(), lock: Some(lock) })
    }

    /// The lock, for a successor.
    pub(super) fn lock(&self) -> Option<BorrowedFd<'_>> {
        self.lock.as_ref().map(File::as_fd)
    }

    /// Leaves the folder to the successor, which has the lock as well.
    pub(super) fn let_lock_go(&mut self) {
        self.lock = None;
    }

    /// Pins something in the place of what may be there: the new pin is there before the old one goes.
    pub(super) fn put<E: From<PinError>>(
        &self,
        path: &Path,
        pin: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<(), E> {
        // A bpffs takes no names with a dot.
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let beside = path.with_file_name(format!("{name}_new"));
        remove_file(&beside)?;
        pin(&beside)?;
        remove_file(path)?;
        Ok(fs::rename(&beside, path).map_err(|source| file("rename", &beside, source))?)
    }

    /// The pins of inbound links in a folder, by cookie.
    pub(super) fn inbound_pins(&self, dir: &Path) -> Result<Vec<(u64, PathBuf)>, PinError> {
        let entries = fs::read_dir(dir).map_err(|source| file("read", dir, source))?;
        let cookie = |path: &Path| path.file_name()?.to_str()?.strip_prefix(INBOUND)?.parse().ok();
        Ok(entries.flatten().filter_map(|e| Some((cookie(&e.path())?, e.path()))).collect())
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
        self.sweep()?;
        Ok(current)
    }

    /// Removes the pins of other versions, and what a start that did not end well has left. Inbound links are held.
    pub(super) fn sweep(&self) -> Result<(), PinError> {
        remove(&self.staging())?;
        let entries = fs::read_dir(&self.base).map_err(|source| file("read", &self.base, source))?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let version = name.to_str().and_then(|name| name.strip_prefix('v')).map(str::parse::<u32>);
            if name == "stale" || matches!(version, Some(Ok(number)) if number != ABI_VERSION) {
                self.hold_inbound(&entry.path())?;
                remove(&entry.path())?;
            }
        }
        Ok(())
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
        remove_link(&self.held().join(inbound(cookie)))
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
        current(&self.base)
    }

    fn staging(&self) -> PathBuf {
        self.base.join("staging")
    }

    fn held(&self) -> PathBuf {
        self.base.join("held")
    }
}

/// Where this version's pins are below the folder.
pub(super) fn current(base: &Path) -> PathBuf {
    base.join(format!("v{ABI_VERSION}"))
}

/// What the names of inbound links begin with.
const INBOUND: &str = "inbound_";

/// The name of the pin of a network namespace's inbound link.
pub(super) fn inbound(cookie: u64) -> String {
    format!("{INBOUND}{cookie}")
}

/// Takes the mesh off a node where no daemon runs: whatever is pinned goes, of all versions.
pub fn unload(base: &Path) -> Result<Unloaded, PinError> {
    if !base.exists() {
        return Ok(Unloaded::default());
    }
    let pins = Pins::open(base)?;
    let mut gone = Unloaded::default();
    let folders = fs::read_dir(base).map_err(|source| file("read", base, source))?;
    for folder in folders.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()) {
        let entries = fs::read_dir(&folder).map_err(|source| file("read", &folder, source))?;
        let (maps, links): (Vec<_>, Vec<_>) = entries
            .flatten()
            .map(|entry| entry.path())
            .partition(|path| path.file_name().is_some_and(|name| map::ALL.iter().any(|map| name == *map)));
        // Links first: no program is to run on maps that are going away.
        for link in &links {
            let inbound =
                link.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(INBOUND.as_bytes()));
            gone.inbound += usize::from(inbound);
            gone.programs += usize::from(!inbound);
            remove_link(link)?;
        }
        gone.maps += maps.len();
        remove(&folder)?;
    }
    drop(pins);
    // Not empty means that somebody else keeps something there.
    drop(fs::remove_dir(base));
    Ok(gone)
}

/// Removes the pin of a link. When this returns the link is gone: the kernel detaches at once when a descriptor closes,
/// and some time later when a pin goes.
pub(super) fn remove_link(path: &Path) -> Result<(), PinError> {
    let link = sys::obj_get(path);
    remove_file(path)?;
    drop(link);
    Ok(())
}

pub(super) fn remove_file(path: &Path) -> Result<(), PinError> {
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
        dir.try_lock().unwrap();
        Pins { base: base.to_owned(), lock: Some(dir) }
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
        assert!(second.try_lock().is_err());
    }

    #[test]
    fn the_lock_outlives_the_predecessor_in_its_successor() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = pins(dir.path());
        let successor =
            Pins::inherit(dir.path(), first.lock().unwrap().try_clone_to_owned().unwrap()).unwrap();
        first.let_lock_go();
        assert!(File::open(dir.path()).unwrap().try_lock().is_err(), "the successor has it");
        drop(successor);
        assert!(File::open(dir.path()).unwrap().try_lock().is_ok());
        let elsewhere = tempfile::tempdir().unwrap();
        let lock = File::open(dir.path()).unwrap().into();
        assert!(matches!(Pins::inherit(elsewhere.path(), lock), Err(PinError::Elsewhere(_))));
    }
}
