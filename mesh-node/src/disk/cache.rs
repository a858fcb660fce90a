//! The configuration on disk: loaded at the start, appended to, rewritten when it has grown to twice what it holds.
//!
//! So one changed resource costs its own bytes, and everything together is written at most twice. Deliberately absent:
//! when to write, see `writer`; and the world, which is built from what is loaded as if it had come over xDS.

use super::{
    format::{FormatError, Frames, HEADER, seal, write_frame, write_header},
    open_private, private_dir, replace,
};
use mesh_xds::delta::{Changes, Received, RecordError};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    fs::{File, OpenOptions},
    io::{self, BufReader, BufWriter, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// The largest file that is written or read. A resource has some 300 bytes, so it is far above a million of them.
const MAX_BYTES: u64 = 1 << 30;
/// Records of a snapshot are gathered up to about this many bytes.
const CHUNK: usize = 256 << 10;
/// Appended bytes that never cause a rewrite.
const SMALL: u64 = 1 << 20;

/// Whose configuration it is: another node's is not used, however good it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The node's name.
    pub node: String,
    /// The cluster's name.
    pub cluster: String,
    /// The trust domain.
    pub trust_domain: String,
}

/// Why a configuration on disk is not used, or not written.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The system refuses.
    #[error("the configuration in {path:?} cannot be {verb}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was to be done with it.
        verb: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Its form is wrong.
    #[error("the configuration in {path:?} is not used: {detail}; the control plane sends it anew")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// It is another node's.
    #[error(
        "the configuration in {path:?} is not used: it is of node {found:?}, and this is {own:?}; give each node a --state-dir of its own"
    )]
    Owner {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        found: Box<Owner>,
        /// Who we are.
        own: Box<Owner>,
    },
    /// Another daemon writes there.
    #[error("another daemon writes to {path:?}; its configuration is kept, not ours")]
    Locked {
        /// The lock.
        path: PathBuf,
    },
    /// It would be too large.
    #[error(
        "the configuration has more than {MAX_BYTES} bytes and is not kept in {path:?}; a restart needs the control plane"
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
}

impl CacheError {
    /// Whether trying again is of use.
    pub fn retryable(&self) -> bool {
        matches!(self, Self::Io { .. } | Self::Locked { .. })
    }
}

/// What was on disk.
#[derive(Debug)]
pub struct Loaded {
    /// The resources by type, in the order in which the types were first written.
    pub changes: Vec<Changes>,
    /// When the control plane was last heard of.
    pub last_contact: SystemTime,
    /// Bytes of a change that was cut off by a crash and left out.
    pub torn: u64,
}

/// The latest word on resources: `None` for one that is gone. By type URL and name.
pub(super) type Latest = BTreeMap<(String, String), Option<Received>>;

/// The file, and where it is to be appended to.
#[derive(Debug)]
pub struct ConfigCache {
    path: PathBuf,
    owner: Owner,
    /// Held for as long as this process may write.
    lock: Option<File>,
    /// Open for appending at `end`; `None` until the first rewrite.
    file: Option<File>,
    snapshot_end: u64,
    end: u64,
}

impl ConfigCache {
    /// The cache in a directory, which is made if it is missing.
    pub fn new(state_dir: &Path, owner: Owner) -> Result<Self, CacheError> {
        private_dir(state_dir).map_err(|source| CacheError::Io {
            path: state_dir.to_owned(),
            verb: "kept",
            source,
        })?;
        let path = state_dir.join("config");
        Ok(Self { path, owner, lock: None, file: None, snapshot_end: 0, end: 0 })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes in the file.
    pub(super) fn bytes(&self) -> u64 {
        self.end
    }

    fn io(&self, verb: &'static str) -> impl Fn(io::Error) -> CacheError + use<> {
        let path = self.path.clone();
        move |source| CacheError::Io { path: path.clone(), verb, source }
    }

    fn damaged(&self, detail: String) -> CacheError {
        CacheError::Damaged { path: self.path.clone(), detail }
    }

    fn format(&self, error: FormatError) -> CacheError {
        match error {
            FormatError::Io(source) => self.io("read")(source),
            other => self.damaged(other.to_string()),
        }
    }

    /// Reads everything; `None` if there is nothing. Nothing is believed that does not check.
    pub fn load(&self) -> Result<Option<Loaded>, CacheError> {
        let Some(mut frames) = self.open()? else { return Ok(None) };
        let mut types: Vec<String> = vec![];
        let mut latest: HashMap<(usize, String), Received> = HashMap::new();
        self.each(&mut frames, |changes| {
            let known = types.iter().position(|t| *t == changes.type_url);
            let index = known.unwrap_or_else(|| {
                types.push(changes.type_url);
                types.len() - 1
            });
            for name in changes.removed {
                latest.remove(&(index, name));
            }
            for resource in changes.resources {
                latest.insert((index, resource.name.clone()), resource);
            }
        })?;
        let mut changes: Vec<Changes> = types.into_iter().map(Changes::of_type).collect();
        for ((index, _), resource) in latest {
            changes[index].resources.push(resource);
        }
        let meta = std::fs::metadata(&self.path).and_then(|meta| meta.modified());
        let last_contact = meta.map_err(self.io("read"))?;
        Ok(Some(Loaded { changes, last_contact, torn: frames.torn }))
    }

    /// The file behind its owner's frame.
    fn open(&self) -> Result<Option<Frames<BufReader<File>>>, CacheError> {
        let Some(file) = open_private(&self.path).map_err(self.io("read"))? else { return Ok(None) };
        if file.metadata().map_err(self.io("read"))?.len() > 2 * MAX_BYTES {
            return Err(self.damaged("it is larger than any that is written here".to_owned()));
        }
        let mut frames = Frames::new(BufReader::with_capacity(64 << 10, file)).map_err(|e| self.format(e))?;
        let owner = frames.next().map_err(|e| self.format(e))?;
        let found: Owner = owner
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .ok_or_else(|| self.damaged("it does not say whose it is".to_owned()))?;
        if found != self.owner {
            let own = Box::new(self.owner.clone());
            return Err(CacheError::Owner { path: self.path.clone(), found: Box::new(found), own });
        }
        Ok(Some(frames))
    }

    fn each(
        &self,
        frames: &mut Frames<BufReader<File>>,
        mut f: impl FnMut(Changes),
    ) -> Result<(), CacheError> {
        while let Some(mut payload) = frames.next().map_err(|e| self.format(e))? {
            let bad = |e: RecordError| self.damaged(e.to_string());
            while let Some(changes) = Changes::read_record(&mut payload).map_err(bad)? {
                f(changes);
            }
        }
        Ok(())
    }

    /// Writes what is new, so that it outlives a power cut. Gives the bytes that it cost. `latest` stays with the caller
    /// if it fails.
    pub(super) fn write(&mut self, latest: &Latest) -> Result<u64, CacheError> {
        self.lock()?;
        if self.file.is_none() {
            return self.rewrite(latest);
        }
        let mut payload = vec![];
        for changes in by_type(latest.iter().map(|(key, r)| (key.clone(), r.clone())), usize::MAX) {
            changes.write_record(&mut payload);
        }
        let appended = self.end - self.snapshot_end + payload.len() as u64;
        if appended > SMALL.max(self.snapshot_end) {
            return self.rewrite(latest);
        }
        let end = self.end;
        let result = self.file.as_mut().map_or(Ok(0), |file| {
            let mut frame = Vec::with_capacity(payload.len() + 8);
            let written = write_frame(&mut frame, &payload)?;
            // To where the last good frame ended, over the rest of one that failed.
            file.seek(SeekFrom::Start(end))?;
            file.write_all(&frame)?;
            file.set_len(end + written)?;
            file.sync_data()?;
            Ok(written)
        });
        let written = result.map_err(self.io("written"))?;
        self.end += written;
        Ok(written)
    }

    /// Takes the right to write. A predecessor that is still ending may have it.
    fn lock(&mut self) -> Result<(), CacheError> {
        if self.lock.is_some() {
            return Ok(());
        }
        let path = super::beside(&self.path, ".lock");
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = options.open(&path).map_err(self.io("written"))?;
        match file.try_lock() {
            Ok(()) => self.lock = Some(file),
            Err(std::fs::TryLockError::WouldBlock) => return Err(CacheError::Locked { path }),
            Err(std::fs::TryLockError::Error(source)) => return Err(self.io("written")(source)),
        }
        Ok(())
    }

    /// Writes the file anew: what it holds that is still current, and what is new.
    fn rewrite(&mut self, latest: &Latest) -> Result<u64, CacheError> {
        // What cannot be read is not carried over. It was not loaded either, so the control plane has sent everything.
        let last = match self.last_words() {
            Ok(last) => last,
            Err(error @ CacheError::Io { .. }) => return Err(error),
            Err(_) => HashMap::new(),
        };
        let owner = serde_json::to_vec(&self.owner).unwrap_or_default();
        let written = replace(&self.path, |file| {
            let mut out = BufWriter::with_capacity(64 << 10, &mut *file);
            write_header(&mut out, 0)?;
            let mut end = HEADER as u64 + write_frame(&mut out, &owner)?;
            let mut chunk = |changes: Vec<Changes>| -> io::Result<()> {
                let mut payload = vec![];
                changes.into_iter().for_each(|c| c.write_record(&mut payload));
                if !payload.is_empty() {
                    end += write_frame(&mut out, &payload)?;
                }
                if end > MAX_BYTES { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(()) }
            };
            if !last.is_empty() {
                let mut gathered = Gathered::default();
                self.old(&last, latest, |type_url, resource| match gathered.add(type_url, resource) {
                    Some(full) => chunk(full),
                    None => Ok(()),
                })?;
                chunk(gathered.take())?;
            }
            let fresh = latest.iter().filter_map(|(key, r)| Some((key.clone(), Some(r.clone()?))));
            by_type(fresh, CHUNK).try_for_each(|changes| chunk(vec![changes]))?;
            out.flush()?;
            drop(out);
            seal(file, end)?;
            Ok(end)
        });
        let (end, file) = written.map_err(|source| match source.kind() {
            io::ErrorKind::FileTooLarge => CacheError::TooLarge { path: self.path.clone() },
            _ => self.io("written")(source),
        })?;
        (self.file, self.snapshot_end, self.end) = (Some(file), end, end);
        Ok(end)
    }

    /// Which record is the last word on each name, by its number.
    fn last_words(&self) -> Result<HashMap<(String, String), u64>, CacheError> {
        let mut last = HashMap::new();
        let Some(mut frames) = self.open()? else { return Ok(last) };
        let mut number = 0u64;
        self.each(&mut frames, |changes| {
            for name in changes.removed {
                last.remove(&(changes.type_url.clone(), name));
            }
            for resource in changes.resources {
                last.insert((changes.type_url.clone(), resource.name), number);
                number += 1;
            }
        })?;
        Ok(last)
    }

    /// Everything in the file that is still current and not in `latest`.
    fn old(
        &self,
        last: &HashMap<(String, String), u64>,
        latest: &Latest,
        mut f: impl FnMut(String, Received) -> io::Result<()>,
    ) -> io::Result<()> {
        let Some(mut frames) = self.open().map_err(io::Error::other)? else { return Ok(()) };
        let (mut number, mut failed) = (0u64, None);
        let read = self.each(&mut frames, |changes| {
            for resource in changes.resources {
                let key = (changes.type_url.clone(), resource.name.clone());
                let current = last.get(&key) == Some(&number) && !latest.contains_key(&key);
                number += 1;
                if current && failed.is_none() {
                    failed = f(key.0, resource).err();
                }
            }
        });
        read.map_err(io::Error::other)?;
        failed.map_or(Ok(()), Err)
    }

    /// Notes that the control plane is there and has nothing new.
    pub(super) fn touch(&mut self) -> Result<(), CacheError> {
        self.lock()?;
        let touched = match &self.file {
            Some(file) => file.set_modified(SystemTime::now()),
            // What was loaded is still good to the last byte.
            None => match OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(&self.path) {
                Ok(file) => file.set_modified(SystemTime::now()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                Err(error) => Err(error),
            },
        };
        touched.map_err(self.io("written"))
    }

    /// Gives up: an old configuration would be taken for the last good one.
    pub(super) fn remove(&mut self) -> io::Result<()> {
        self.file = None;
        match std::fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

/// Resources on their way into a chunk.
#[derive(Default)]
struct Gathered {
    changes: Vec<Changes>,
    bytes: usize,
}

impl Gathered {
    /// Adds one; gives everything once it is enough.
    fn add(&mut self, type_url: String, resource: Received) -> Option<Vec<Changes>> {
        self.bytes += resource.size();
        match self.changes.last_mut() {
            Some(last) if last.type_url == type_url => last.resources.push(resource),
            _ => {
                let mut changes = Changes::of_type(type_url);
                changes.resources.push(resource);
                self.changes.push(changes);
            }
        }
        (self.bytes >= CHUNK).then(|| self.take())
    }

    fn take(&mut self) -> Vec<Changes> {
        self.bytes = 0;
        std::mem::take(&mut self.changes)
    }
}

/// Sorted resources and removals as changes of one type each, of about `limit` bytes at most.
fn by_type(
    all: impl Iterator<Item = ((String, String), Option<Received>)>,
    limit: usize,
) -> impl Iterator<Item = Changes> {
    let mut all = all.peekable();
    std::iter::from_fn(move || {
        let mut changes = Changes::of_type(all.peek()?.0.0.clone());
        let mut bytes = 0;
        while let Some(((_, name), resource)) = all.next_if(|((t, _), _)| *t == changes.type_url) {
            match resource {
                Some(resource) => {
                    bytes += resource.size();
                    changes.resources.push(resource);
                }
                None => changes.removed.push(name),
            }
            if bytes >= limit {
                break;
            }
        }
        Some(changes)
    })
}
