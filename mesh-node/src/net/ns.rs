//! A handle on a network namespace.
//!
//! Only the creation of a socket depends on the namespace of the calling thread; a socket stays in its
//! namespace for life. So the daemon enters a namespace for the length of one closure (about 1 us for both
//! ways) and never across an await point, which the closure form makes impossible.
//!
//! Deliberately absent: a thread per namespace, and changing any other namespace than the network's.

use super::sys;
use nix::sched::{CloneFlags, setns};
use std::{
    cell::OnceCell,
    fmt,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Names a namespace while anything keeps it alive: the device and inode of its nsfs file. A number may be
/// used again after the namespace is gone, so hold a [`NetNs`] for as long as the identity matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NsId {
    /// Device of nsfs.
    pub dev: u64,
    /// Inode, the number in `net:[4026531840]`.
    pub ino: u64,
}

impl fmt::Display for NsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "net:[{}]", self.ino)
    }
}

/// Why a network namespace cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NetNsError {
    /// The file cannot be opened.
    #[error("cannot open the network namespace {}; is its process or its bind mount gone?", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is something else.
    #[error("{what} is not a network namespace; give a file such as /var/run/netns/NAME or /proc/PID/ns/net")]
    NotNetNs {
        /// Path or description.
        what: String,
    },
    /// The thread could not move into the namespace.
    #[error("cannot enter the network namespace {id}; the daemon needs CAP_SYS_ADMIN")]
    Enter {
        /// Which.
        id: NsId,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The cookie, by which BPF knows the namespace, cannot be read.
    #[error("cannot read the cookie of the network namespace {id}; SO_NETNS_COOKIE needs Linux 5.14")]
    Cookie {
        /// Which.
        id: NsId,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// [`NetNs::run`] was called by a closure that already runs in a namespace.
    #[error("already inside another network namespace; leave it first")]
    Nested,
}

impl From<NetNsError> for io::Error {
    fn from(e: NetNsError) -> Self {
        let kind = match &e {
            NetNsError::Open { source, .. }
            | NetNsError::Enter { source, .. }
            | NetNsError::Cookie { source, .. } => source.kind(),
            NetNsError::NotNetNs { .. } | NetNsError::Nested => io::ErrorKind::InvalidInput,
        };
        io::Error::new(kind, e)
    }
}

/// An open network namespace. Holding it keeps the namespace alive.
#[derive(Debug)]
pub struct NetNs {
    fd: OwnedFd,
    id: NsId,
    cookie: u64,
}

impl NetNs {
    /// Opens a namespace by a file: `/proc/PID/ns/net` or a bind mount such as `/var/run/netns/NAME`.
    pub fn open(path: &Path) -> Result<Self, NetNsError> {
        let file = File::open(path).map_err(|source| NetNsError::Open { path: path.into(), source })?;
        Self::new(file.into(), || path.display().to_string())
    }

    /// Takes a descriptor that came from elsewhere (SCM_RIGHTS) and checks that it is a network namespace.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, NetNsError> {
        Self::new(fd, || "the received descriptor".to_owned())
    }

    /// The namespace of the calling thread.
    pub fn current() -> Result<Self, NetNsError> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    fn new(fd: OwnedFd, what: impl Fn() -> String) -> Result<Self, NetNsError> {
        let not = || NetNsError::NotNetNs { what: what() };
        if sys::ns_type(fd.as_fd()).map_err(|_| not())? != libc::CLONE_NEWNET {
            return Err(not());
        }
        let file = File::from(fd);
        let meta = file.metadata().map_err(|_| not())?;
        let id = NsId { dev: meta.dev(), ino: meta.ino() };
        let mut ns = Self { fd: file.into(), id, cookie: 0 };
        ns.cookie = ns
            .run(|| {
                let probe = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::DGRAM, None)?;
                sys::netns_cookie(probe.as_fd())
            })?
            .map_err(|source| NetNsError::Cookie { id, source })?;
        Ok(ns)
    }

    /// Device and inode.
    pub fn id(&self) -> NsId {
        self.id
    }

    /// What `bpf_get_netns_cookie` returns for sockets of this namespace. Never reused until the next boot.
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Runs `f` with the calling thread inside the namespace, and returns to the thread's own namespace after
    /// that, also when `f` panics. The process is aborted if there is no way back: a thread in the wrong
    /// namespace would open sockets of one pod for another.
    ///
    /// A thread's own namespace is the one it is in when it first calls this. For the namespace the thread is
    /// already in, `f` runs without any system call.
    pub fn run<T>(&self, f: impl FnOnce() -> T) -> Result<T, NetNsError> {
        HOME.with(|home| {
            let home = match home.get() {
                Some(home) => home,
                None => {
                    let opened = Home::open()?;
                    home.get_or_init(|| opened)
                }
            };
            if home.away.get() {
                return Err(NetNsError::Nested);
            }
            if home.id == self.id {
                return Ok(f());
            }
            let source_of = |e: nix::Error| NetNsError::Enter { id: self.id, source: e.into() };
            setns(&self.fd, CloneFlags::CLONE_NEWNET).map_err(source_of)?;
            home.away.set(true);
            let _back = WayBack(home);
            Ok(f())
        })
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The namespace that a thread belongs to.
struct Home {
    file: File,
    id: NsId,
    away: std::cell::Cell<bool>,
}

impl Home {
    fn open() -> Result<Self, NetNsError> {
        let path = Path::new("/proc/thread-self/ns/net");
        let failed = |source| NetNsError::Open { path: path.into(), source };
        let file = File::open(path).map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        Ok(Self { id: NsId { dev: meta.dev(), ino: meta.ino() }, file, away: false.into() })
    }
}

thread_local! {
    static HOME: OnceCell<Home> = const { OnceCell::new() };
}

/// Brings the thread home when dropped.
struct WayBack<'a>(&'a Home);

impl Drop for WayBack<'_> {
    fn drop(&mut self) {
        if let Err(e) = setns(&self.0.file, CloneFlags::CLONE_NEWNET) {
            // Not through tracing: its writer may be what is broken, and nothing may run on this thread any
            // more.
            eprintln!("fatal: cannot return to the daemon's network namespace ({e}); aborting");
            std::process::abort();
        }
        self.0.away.set(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::testing;
    use std::{panic, thread};

    fn here() -> NsId {
        let meta = File::open("/proc/thread-self/ns/net").unwrap().metadata().unwrap();
        NsId { dev: meta.dev(), ino: meta.ino() }
    }

    #[test]
    fn entering_and_coming_back() {
        let ns = testing::fresh();
        let home = here();
        assert_ne!(home, ns.id());
        assert_eq!(ns.run(here).unwrap(), ns.id());
        assert_eq!(here(), home);

        let panicked = panic::catch_unwind(panic::AssertUnwindSafe(|| ns.run(|| panic!("inside"))));
        assert!(panicked.is_err());
        assert_eq!(here(), home, "the way back was lost in a panic");
        assert_eq!(ns.run(here).unwrap(), ns.id(), "the thread cannot enter again after a panic");

        let nested = ns.run(|| ns.run(here)).unwrap();
        assert!(matches!(nested, Err(NetNsError::Nested)), "{nested:?}");
        assert_eq!(NetNs::current().unwrap().run(here).unwrap(), home);
    }

    #[test]
    fn identity_is_that_of_the_namespace_and_not_of_the_handle() {
        let (a, b) = (testing::fresh(), testing::fresh());
        assert_ne!(a.cookie(), b.cookie());
        let again = NetNs::from_fd(a.as_fd().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!((again.id(), again.cookie()), (a.id(), a.cookie()));
        assert_ne!(a.cookie(), 0);
    }

    #[test]
    fn threads_do_not_disturb_each_other() {
        let (a, b) = (testing::fresh(), testing::fresh());
        let home = here();
        thread::scope(|scope| {
            for ns in [&a, &b, &a, &b] {
                scope.spawn(move || {
                    for _ in 0..500 {
                        assert_eq!(ns.run(here).unwrap(), ns.id());
                        assert_eq!(here(), home);
                    }
                });
            }
        });
    }

    #[test]
    fn other_files_are_refused() {
        for path in ["/proc/self/ns/mnt", "/proc/self/stat", "/"] {
            let e = NetNs::open(Path::new(path)).unwrap_err();
            assert!(matches!(&e, NetNsError::NotNetNs { what } if what == path), "{e:?}");
        }
        let gone = NetNs::open(Path::new("/proc/self/ns/nothing")).unwrap_err();
        assert!(matches!(gone, NetNsError::Open { .. }));
        assert_eq!(io::Error::from(gone).kind(), io::ErrorKind::NotFound);
    }
}
