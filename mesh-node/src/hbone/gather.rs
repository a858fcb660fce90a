//! Gathers small writes below HTTP/2. h2 flushes every DATA frame of 256 bytes or more before it takes the next one, so
//! that frames which are ready together would leave in a TLS record and a system call each.
//!
//! A flush is put off until the connection is polled again, which it asks for at once: the streams that are ready by
//! then have their frames in the same record. Large frames pass through. Deliberately absent: any timer; nothing waits
//! longer than the tasks that are ready already take.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is gathered at most: the payload of one TLS record.
const CAPACITY: usize = 16 << 10;

/// Writes of at least this size are not worth a copy.
const LARGE: usize = 8 << 10;

/// A stream whose small writes are gathered.
#[derive(Debug)]
pub(super) struct Gather<IO> {
    io: IO,
    held: Vec<u8>,
    /// Bytes at the front of `held` that were written.
    written: usize,
    /// Something was written that was not flushed.
    dirty: bool,
    /// A flush was asked for and put off.
    put_off: bool,
}

impl<IO: AsyncWrite + Unpin> Gather<IO> {
    pub(super) fn new(io: IO) -> Self {
        Self { io, held: Vec::new(), written: 0, dirty: false, put_off: false }
    }

    /// Hands what is held to the stream below.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.held.len() {
            let n = ready!(Pin::new(&mut self.io).poll_write(cx, &self.held[self.written..]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += n;
            self.dirty = true;
        }
        // An idle connection holds no memory.
        (self.held, self.written) = (Vec::new(), 0);
        Poll::Ready(Ok(()))
    }

    fn poll_flush_now(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        if self.dirty {
            ready!(Pin::new(&mut self.io).poll_flush(cx))?;
            self.dirty = false;
        }
        self.put_off = false;
        Poll::Ready(Ok(()))
    }

    /// Whether `len` more bytes are to be held.
    fn gathers(&self, len: usize) -> bool {
        len < LARGE && self.held.len() + len <= CAPACITY
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for Gather<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        // h2 reads in every poll of a connection: the place for what the last one put off. A stream below that takes
        // no more has the waker, and is no reason not to read.
        if this.put_off
            && let Poll::Ready(Err(error)) = this.poll_flush_now(cx)
        {
            return Poll::Ready(Err(error));
        }
        Pin::new(&mut this.io).poll_read(cx, buf)
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Gather<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if !self.gathers(buf.len()) {
            ready!(self.poll_drain(cx))?;
            if buf.len() >= LARGE {
                self.dirty = true;
                return Pin::new(&mut self.io).poll_write(cx, buf);
            }
        }
        self.held.extend_from_slice(buf);
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let len = bufs.iter().map(|buf| buf.len()).sum();
        if !self.gathers(len) {
            ready!(self.poll_drain(cx))?;
            if len >= LARGE {
                self.dirty = true;
                return Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
            }
        }
        for buf in bufs {
            self.held.extend_from_slice(buf);
        }
        Poll::Ready(Ok(len))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.held.is_empty() {
            // Large frames are on their way already; what TLS still holds has to follow.
            return self.poll_flush_now(cx);
        }
        if !self.put_off {
            self.put_off = true;
            cx.waker().wake_by_ref();
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_flush_now(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    #[tokio::test]
    async fn small_writes_leave_together_at_the_next_read_and_in_order() {
        let (near, mut far) = duplex(1 << 20);
        let mut near = Gather::new(near);
        for n in 0..10u8 {
            near.write_all(&[n; 100]).await.unwrap();
            near.flush().await.unwrap();
        }
        assert_eq!(near.held.len(), 1000);
        let mut buf = [0; 1];
        let waiting = tokio::time::timeout(std::time::Duration::from_millis(1), near.read(&mut buf));
        assert!(waiting.await.is_err());
        assert_eq!((near.held.capacity(), near.put_off, near.dirty), (0, false, false));
        // A large one passes everything by, but not what came before it.
        near.write_all(&[10; 100]).await.unwrap();
        near.write_all(&[11; LARGE]).await.unwrap();
        assert!(near.held.is_empty());
        let mut got = vec![0; 1100 + LARGE];
        far.read_exact(&mut got).await.unwrap();
        let want: Vec<u8> = (0..=10u8).flat_map(|n| [n; 100]).chain([11; LARGE]).collect();
        assert_eq!(got, want);
    }

    #[tokio::test]
    async fn what_is_held_is_bounded_and_leaves_before_the_end() {
        let (near, mut far) = duplex(64);
        let mut near = Gather::new(near);
        let sent = vec![7; 3 * CAPACITY];
        let writing = async {
            for piece in sent.chunks(1000) {
                near.write_all(piece).await.unwrap();
                assert!(near.held.len() <= CAPACITY);
            }
            poll_fn(|cx| Pin::new(&mut near).poll_shutdown(cx)).await.unwrap();
        };
        let mut got = vec![];
        let (_, read) = tokio::join!(writing, far.read_to_end(&mut got));
        assert_eq!((read.unwrap(), got == sent), (sent.len(), true));
    }
}
