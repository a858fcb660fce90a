//! What the copy loop needs from one side of a connection.

use bytes::Bytes;
use std::{
    collections::VecDeque,
    io,
    task::{Context, Poll},
};

/// Pieces shorter than this are put together while they wait: each has an overhead of its own.
const COALESCE: usize = 4096;

/// How one side of a connection failed.
#[derive(Debug)]
pub enum EndpointError {
    /// The other end of this side reset it.
    Reset,
    /// The other end of this side has closed without taking what we still had for it.
    Closed,
    /// It broke: the system's error, or the tunnel's.
    Broken(io::Error),
}

/// One side of a proxied connection: bytes in, bytes out, half-close and reset.
///
/// Dropping an endpoint that has not seen both directions end resets the connection behind it, so that a cancelled
/// copy can never look like a complete one.
pub trait Endpoint: Send {
    /// How many bytes may be read ahead of what the other side has taken. 0 means: read only when there is nothing
    /// left to write. A side whose own flow control bounds it may say more.
    const READ_AHEAD: usize;

    /// The next bytes from this side, `None` after its half-close. Not called again after that.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, EndpointError>>;

    /// Told how many bytes that were read here have been taken by the other side.
    fn consumed(&mut self, n: usize);

    /// Writes some of the queue to this side, takes what was written off it, and returns how much that was.
    /// The queue is not empty.
    fn poll_write(&mut self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<usize, EndpointError>>;

    /// Half-closes this side.
    fn finish(&mut self) -> Result<(), EndpointError>;

    /// Ready when this side is found reset while nothing is being read from it or written to it.
    fn poll_failed(&mut self, cx: &mut Context<'_>) -> Poll<EndpointError>;

    /// Both directions have ended in order: dropping it now closes it normally.
    fn completed(&mut self);

    /// Gives the connection up with a reset.
    fn reset(&mut self);
}

/// Bytes that one side has read and the other has not taken yet.
#[derive(Debug, Default)]
pub struct Queue {
    chunks: VecDeque<Bytes>,
    len: usize,
}

impl Queue {
    /// Bytes in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces, in order.
    pub fn chunks(&self) -> impl Iterator<Item = &Bytes> {
        self.chunks.iter()
    }

    /// The first piece, to take from its front; call [`Queue::taken`] afterwards.
    pub(super) fn front_mut(&mut self) -> Option<&mut Bytes> {
        self.chunks.front_mut()
    }

    /// Appends a piece. Small pieces behind a piece that waits already are put together.
    pub(super) fn push(&mut self, chunk: Bytes) {
        self.len += chunk.len();
        // A peer may send millions of one-byte frames to a reader that sleeps. Only the last piece grows, and only to
        // a size at which its overhead no longer matters, so each byte is moved a bounded number of times.
        if self.chunks.len() > 1
            && chunk.len() < COALESCE
            && let Some(last) = self.chunks.back_mut()
            && last.len() < COALESCE
        {
            let mut joined = match std::mem::take(last).try_into_mut() {
                Ok(own) => own,
                Err(shared) => {
                    let mut own = bytes::BytesMut::with_capacity(2 * COALESCE);
                    own.extend_from_slice(&shared);
                    own
                }
            };
            joined.extend_from_slice(&chunk);
            *last = joined.freeze();
            return;
        }
        if !chunk.is_empty() {
            self.chunks.push_back(chunk);
        }
    }

    /// Takes `n` bytes off the front.
    pub(super) fn advance(&mut self, mut n: usize) {
        self.len -= n;
        while n > 0 {
            let Some(front) = self.chunks.front_mut() else { return };
            let step = n.min(front.len());
            // Not `split_to`, which would allocate to share the piece.
            bytes::Buf::advance(front, step);
            n -= step;
            if front.is_empty() {
                self.chunks.pop_front();
            }
        }
    }

    /// Books `n` bytes that were taken through [`Queue::front_mut`].
    pub(super) fn taken(&mut self, n: usize) {
        self.len -= n;
        if self.chunks.front().is_some_and(Bytes::is_empty) {
            self.chunks.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_pieces_are_put_together_in_order() {
        let mut queue = Queue::default();
        let sent: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
        for byte in &sent {
            queue.push(Bytes::copy_from_slice(&[*byte]));
        }
        assert_eq!(queue.len(), sent.len());
        assert!(queue.chunks.len() <= 2 + sent.len() / COALESCE, "{} pieces", queue.chunks.len());
        let joined: Vec<u8> = queue.chunks().flat_map(|c| c.iter().copied()).collect();
        assert_eq!(joined, sent);
        queue.advance(99_999);
        assert_eq!((queue.len(), queue.chunks().next().unwrap().as_ref()), (1, &sent[99_999..]));
        queue.advance(1);
        assert!(queue.is_empty() && queue.chunks.is_empty());
    }
}
