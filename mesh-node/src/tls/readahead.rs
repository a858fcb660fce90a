//! Large reads below TLS. rustls asks for 4 KiB at a time, a quarter of a record, so that a stream of full records
//! costs four system calls for each of them.
//!
//! Deliberately absent: memory of an idle connection. What fits into the caller's buffer goes there directly, and the
//! large buffer exists only while it holds something.

use bytes::{Buf, BytesMut};
use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

/// Bytes of one large read: four full records.
const AHEAD: usize = 64 << 10;

/// A stream that is read in large pieces while there is much to read.
#[derive(Debug)]
pub struct ReadAhead<IO> {
    io: IO,
    held: BytesMut,
    /// The last read filled what it was given: there is probably more.
    busy: bool,
}

impl<IO> ReadAhead<IO> {
    pub(super) fn new(io: IO) -> Self {
        Self { io, held: BytesMut::new(), busy: false }
    }

    /// The stream below; nothing may be read from it.
    pub fn get_ref(&self) -> &IO {
        &self.io
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for ReadAhead<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.held.is_empty() {
            let room = buf.remaining();
            if !this.busy {
                let before = buf.filled().len();
                ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
                this.busy = room > 0 && buf.filled().len() - before == room;
                return Poll::Ready(Ok(()));
            }
            this.held.reserve(AHEAD);
            match poll_read_buf(Pin::new(&mut this.io), cx, &mut this.held) {
                Poll::Ready(Ok(n)) => this.busy = n > room,
                other => {
                    (this.held, this.busy) = (BytesMut::new(), false);
                    return other.map_ok(|_| ());
                }
            }
        }
        let n = this.held.len().min(buf.remaining());
        buf.put_slice(&this.held[..n]);
        this.held.advance(n);
        if this.held.is_empty() && !this.busy {
            this.held = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for ReadAhead<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;
    use tokio::io::AsyncReadExt;

    /// Gives the pieces out, one for each read, then waits for ever; notes how large each read might have been.
    struct Pieces(VecDeque<Vec<u8>>, Vec<usize>);

    impl AsyncRead for Pieces {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let Some(mut piece) = self.0.pop_front() else { return Poll::Pending };
            self.1.push(buf.remaining());
            let rest = piece.split_off(piece.len().min(buf.remaining()));
            buf.put_slice(&piece);
            if !rest.is_empty() {
                self.0.push_front(rest);
            }
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn a_stream_is_read_in_large_pieces_and_in_order() {
        let sent: Vec<u8> = (0..300_000u32).map(|n| (n / 7) as u8).collect();
        let mut io = ReadAhead::new(Pieces(VecDeque::from([sent.clone(), vec![]]), vec![]));
        let mut got = vec![];
        let mut buf = [0; 4096];
        loop {
            match io.read(&mut buf).await.unwrap() {
                0 => break,
                n => got.extend_from_slice(&buf[..n]),
            }
        }
        assert_eq!(got, sent);
        assert_eq!(io.io.1[0], 4096);
        assert!(io.io.1.len() <= 8, "{:?}", io.io.1);
        assert_eq!(io.held.capacity(), 0, "memory is held at the end");
    }

    #[tokio::test]
    async fn small_messages_go_straight_to_the_caller() {
        let mut io =
            ReadAhead::new(Pieces(VecDeque::from([vec![1; 100], vec![2; 4096], vec![3; 10]]), vec![]));
        let mut buf = [0; 4096];
        for (want, first) in [(100, 1), (4096, 2), (10, 3)] {
            assert_eq!((io.read(&mut buf).await.unwrap(), buf[0]), (want, first));
        }
        assert_eq!(io.io.1[..2], [4096, 4096]);
        assert!(!io.busy && io.held.capacity() == 0);
        // Waiting holds nothing either.
        let waiting = tokio::time::timeout(std::time::Duration::from_millis(1), io.read(&mut buf));
        assert!(waiting.await.is_err() && io.held.capacity() == 0);
    }
}
