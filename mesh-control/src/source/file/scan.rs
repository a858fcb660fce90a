//! Reads a configuration directory.
//!
//! A ConfigMap mount replaces all files at once by moving the link `..data`. If that happens while the files are being
//! read, they are read again, so that no mixture of two versions is ever used.

use super::tracker::Files;
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Larger files are not read: nobody writes that by hand, and it bounds the memory of a scan.
const MAX_FILE: u64 = 16 << 20;
/// More files than this are not read.
const MAX_FILES: usize = 20_000;
/// How often a scan is repeated because the directory changed meanwhile.
const MAX_ATTEMPTS: usize = 5;

/// Why a directory could not be read. The last good configuration stays in force.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// The directory cannot be listed.
    #[error("cannot list the configuration directory {dir}; make it exist and readable")]
    List {
        /// The directory.
        dir: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It holds too many files.
    #[error("the configuration directory {dir} has more than {MAX_FILES} files; split it or join files")]
    TooMany {
        /// The directory.
        dir: PathBuf,
    },
    /// It was replaced again and again while it was read.
    #[error(
        "the configuration directory {dir} changed {MAX_ATTEMPTS} times while it was read; it is read again later"
    )]
    Unsteady {
        /// The directory.
        dir: PathBuf,
    },
}

/// Reads all configuration files of `dir`. A file that cannot be read is in the result with the reason.
pub fn scan(dir: &Path) -> Result<Files, ScanError> {
    for _ in 0..MAX_ATTEMPTS {
        let before = version(dir);
        let files = read_all(dir)?;
        if version(dir) == before {
            return Ok(files);
        }
    }
    Err(ScanError::Unsteady { dir: dir.to_owned() })
}

/// Where the directory and a ConfigMap's `..data` lead to at this moment.
fn version(dir: &Path) -> (Option<PathBuf>, Option<PathBuf>) {
    (fs::canonicalize(dir).ok(), fs::read_link(dir.join("..data")).ok())
}

fn read_all(dir: &Path) -> Result<Files, ScanError> {
    let list = |source| ScanError::List { dir: dir.to_owned(), source };
    let mut files = Files::new();
    for entry in fs::read_dir(dir).map_err(list)? {
        let path = entry.map_err(list)?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
        let known = ["yaml", "yml", "json"].iter().any(|ext| path.extension().is_some_and(|e| e == *ext));
        if name.starts_with('.') || !known {
            continue;
        }
        if files.len() == MAX_FILES {
            return Err(ScanError::TooMany { dir: dir.to_owned() });
        }
        // `fs::metadata` follows links, which is how ConfigMaps show their files.
        match fs::metadata(&path) {
            Ok(meta) if meta.is_dir() => {}
            Ok(meta) if meta.len() > MAX_FILE => {
                files.insert(name.to_owned(), Err(format!("it is larger than {} MiB", MAX_FILE >> 20)));
            }
            Ok(_) => {
                let text = fs::read_to_string(&path).map_err(|e| format!("it cannot be read: {e}"));
                files.insert(name.to_owned(), text);
            }
            // Removed between listing and reading.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => {
                files.insert(name.to_owned(), Err(format!("it cannot be read: {e}")));
            }
        }
    }
    Ok(files)
}
