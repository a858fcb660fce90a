//! Messages with file descriptors over a Unix stream socket (SCM_RIGHTS).

use super::sys;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

/// `SCM_MAX_FD`: with room for this many nothing can be cut off, so no descriptor is ever installed and
/// forgotten.
pub const MAX_FDS: usize = 253;

/// Sends the beginning of `data`, with `fd` if given, and returns how many bytes went out.
pub fn send(socket: impl AsFd, data: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    send_all(socket, data, fd.as_slice())
}

/// Sends the beginning of `data` with all of `fds`, at most [`MAX_FDS`], and returns how many bytes went out.
pub fn send_all(socket: impl AsFd, data: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
    let sent = sendmsg::<()>(
        socket.as_fd().as_raw_fd(),
        &[IoSlice::new(data)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(sent)
}

/// Receives into `buf`: the number of bytes (0 at the end of the stream) and the descriptor that came with
/// them. More than one descriptor is an error, and all of them are closed.
pub fn recv(socket: impl AsFd, buf: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let (n, mut received) = recv_all(socket, buf)?;
    if received.len() > 1 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "more than one descriptor in one message"));
    }
    Ok((n, received.pop()))
}

/// Receives into `buf`: the number of bytes (0 at the end of the stream) and all descriptors that came with them.
pub fn recv_all(socket: impl AsFd, buf: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut iov = [IoSliceMut::new(buf)];
    let message =
        recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut received = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            received.extend(sys::own_received(&fds));
        }
    }
    Ok((message.bytes, received))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::File, io::Read, os::unix::net::UnixStream};

    #[test]
    fn a_descriptor_arrives_with_its_message() {
        let (a, b) = UnixStream::pair().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "content").unwrap();
        let file = File::open(&path).unwrap();
        assert_eq!(send(&a, b"hello", Some(file.as_fd())).unwrap(), 5);
        assert_eq!(send(&a, b"plain", None).unwrap(), 5);
        let mut buf = [0; 5];
        let (n, fd) = recv(&b, &mut buf).unwrap();
        assert_eq!((n, &buf), (5, b"hello"));
        let mut text = String::new();
        File::from(fd.unwrap()).read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
        let (n, fd) = recv(&b, &mut buf).unwrap();
        assert_eq!((n, &buf, fd.is_none()), (5, b"plain", true));
        drop(a);
        assert_eq!(recv(&b, &mut buf).unwrap().0, 0);
    }

    #[test]
    fn two_descriptors_are_refused_and_closed() {
        let (a, b) = UnixStream::pair().unwrap();
        let (probe, kept) = UnixStream::pair().unwrap();
        let other = probe.try_clone().unwrap();
        let fds = [probe.as_raw_fd(), other.as_raw_fd()];
        sendmsg::<()>(
            a.as_raw_fd(),
            &[IoSlice::new(b"x")],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        drop((probe, other));
        assert_eq!(recv(&b, &mut [0; 1]).unwrap_err().kind(), io::ErrorKind::InvalidData);
        // Every copy of the far end is closed: the near end sees the end of its stream.
        let mut kept = kept;
        assert_eq!(kept.read(&mut [0; 1]).unwrap(), 0);
    }
}
