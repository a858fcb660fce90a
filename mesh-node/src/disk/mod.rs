//! What outlives the daemon: the last good configuration, and small secrets.
//!
//! Everything here is private (files 0600 in a directory 0700), is replaced as a whole by writing aside, syncing and
//! renaming, and is believed only after its checks. [`ConfigCache`] is for configuration, which is large and changes a
//! little at a time: a snapshot, and changes appended to it. Deliberately absent: what the kept things mean.

mod cache;
mod crc;
mod format;
#[cfg(test)]
mod tests;
mod writer;

pub use cache::{CacheError, ConfigCache, Loaded, Owner};
pub use writer::{CacheStats, CacheWriter};

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Read},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// Makes a directory (and what is missing above it) that only this user can look into, or makes an existing one so.
pub fn private_dir(dir: &Path) -> io::Result<()> {
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            let meta = fs::symlink_metadata(dir)?;
            if !meta.is_dir() {
                return Err(io::Error::new(
                    io::ErrorKind::NotADirectory,
                    "there is a file or a link of that name",
                ));
            }
            if meta.uid() != nix::unistd::geteuid().as_raw() {
                return Err(io::Error::new(
                    io::ErrorKind::PermissionDenied,
                    "the directory belongs to another user",
                ));
            }
            fs::set_permissions(dir, Permissions::from_mode(0o700))
        }
        other => other,
    }
}

/// Opens a file for reading, if nobody else could have written or read it; `None` if there is none.
pub fn open_private(path: &Path) -> io::Result<Option<File>> {
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let meta = file.metadata()?;
    let ours = meta.uid() == nix::unistd::geteuid().as_raw();
    if !meta.is_file() || !ours || meta.mode() & 0o077 != 0 {
        let text = "it is not a file of this user with mode 0600; remove it";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Ok(Some(file))
}

/// Reads a private file of at most `limit` bytes; `None` if there is none.
pub fn read_private(path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let Some(file) = open_private(path)? else { return Ok(None) };
    let mut bytes = vec![];
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        let text = format!("it is larger than {limit} bytes; remove it");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    Ok(Some(bytes))
}

/// Replaces a private file as a whole: at every moment, and after a crash at any moment, there is the old one or the new
/// one. Gives what `write` gave, and the new file, positioned at its end.
pub fn replace<T>(path: &Path, write: impl FnOnce(&mut File) -> io::Result<T>) -> io::Result<(T, File)> {
    let staged = beside(path, ".new");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&staged)?;
    // It may be there with another mode, left by a crash.
    file.set_permissions(Permissions::from_mode(0o600))?;
    let result = write(&mut file).and_then(|value| {
        file.sync_all()?;
        fs::rename(&staged, path)?;
        if let Some(dir) = path.parent() {
            File::open(dir)?.sync_all()?;
        }
        Ok(value)
    });
    match result {
        Ok(value) => Ok((value, file)),
        Err(error) => {
            // Best effort: the next replacement truncates it anyway.
            let _ = fs::remove_file(&staged);
            Err(error)
        }
    }
}

/// `path` with more at its end.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}
