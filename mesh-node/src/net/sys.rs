//! The system calls that need `unsafe` and that neither nix nor socket2 wraps. Nothing else lives here.
#![allow(unsafe_code)]

use std::{
    io,
    mem::{MaybeUninit, size_of},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

/// `_IO(0xb7, 0x3)` of `linux/nsfs.h`: the kind of a namespace fd, as its `CLONE_NEW*` flag.
const NS_GET_NSTYPE: libc::Ioctl = 0xb703;

/// The kernel's cookie of the network namespace that `socket` belongs to (`SO_NETNS_COOKIE`, Linux 5.14).
pub(super) fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = MaybeUninit::<u64>::uninit();
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` (8) bytes to `cookie`, which has room for exactly that many,
    // and both pointers live until the call returns.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            cookie.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    if len as usize != size_of::<u64>() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "SO_NETNS_COOKIE gave a value of the wrong size",
        ));
    }
    // SAFETY: the call succeeded and reported that it wrote all 8 bytes; any bit pattern is a valid u64.
    Ok(unsafe { cookie.assume_init() })
}

/// The `CLONE_NEW*` flag that says what kind of namespace `fd` is; `ENOTTY` when it is none.
pub(super) fn ns_type(fd: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    // SAFETY: NS_GET_NSTYPE takes no argument and touches no memory of this process.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(rc) }
}

/// Takes ownership of descriptors that `recvmsg` has just installed in this process.
pub(super) fn own_received(fds: &[RawFd]) -> Vec<OwnedFd> {
    // SAFETY: SCM_RIGHTS installs fresh descriptors for the receiver; nothing else in the process knows their
    // numbers, and the caller passes each received list here once.
    fds.iter().map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect()
}

/// Raises the number of descriptors that this process may have to its hard limit, and returns it.
pub(super) fn raise_descriptor_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one `rlimit` to where the pointer points, which is one.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the kernel reads one `rlimit` from where the pointer points, which is one.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(limit.rlim_cur)
}
