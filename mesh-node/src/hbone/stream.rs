//! One tunnelled connection: an HTTP/2 stream as two halves that carry `Bytes`.

use crate::tls::Peer;
use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use std::{
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll, ready},
};

/// How a stream ended before its time.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The peer reset the stream: its application's connection was reset, or a policy ended it.
    #[error("the peer reset the stream: {0}")]
    Reset(Reason),
    /// The connection under it broke.
    #[error("the tunnel broke")]
    Broken(#[source] h2::Error),
}

impl From<h2::Error> for StreamError {
    fn from(error: h2::Error) -> Self {
        match error.reason() {
            // A reset that we ourselves sent (for a violation of the protocol) is the tunnel's fault, not the peer's.
            Some(reason) if error.is_reset() && error.is_remote() => Self::Reset(reason),
            _ => Self::Broken(error),
        }
    }
}

/// A tunnelled connection. Dropping it before both directions have ended resets the stream.
#[derive(Debug)]
pub struct HboneStream {
    /// Towards the peer.
    pub send: SendHalf,
    /// From the peer.
    pub recv: RecvHalf,
    /// The authenticated other end.
    pub peer: Arc<Peer>,
}

impl HboneStream {
    pub(super) fn new(
        send: SendStream<Bytes>,
        recv: RecvStream,
        peer: Arc<Peer>,
        guard: Option<super::pool::StreamSlot>,
    ) -> Self {
        Self {
            send: SendHalf { inner: send, finished: false, _guard: guard },
            recv: RecvHalf { inner: recv },
            peer,
        }
    }
}

/// The sending half.
#[derive(Debug)]
pub struct SendHalf {
    inner: SendStream<Bytes>,
    finished: bool,
    /// Counts as a stream of its pooled connection for as long as it lives.
    _guard: Option<super::pool::StreamSlot>,
}

impl SendHalf {
    /// Queues as much of `data` as the peer's window and our send buffer take, waits for room otherwise, and is ready
    /// when something was taken. Returns the number of bytes taken from the front of `data`.
    pub fn poll_send(&mut self, cx: &mut Context<'_>, data: &mut Bytes) -> Poll<Result<usize, StreamError>> {
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        self.inner.reserve_capacity(data.len());
        loop {
            let room = self.inner.capacity().min(data.len());
            if room > 0 {
                self.inner.send_data(data.split_to(room), false)?;
                return Poll::Ready(Ok(room));
            }
            match ready!(self.inner.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(error.into())),
                None => return Poll::Ready(Err(self.why_closed(cx))),
            }
        }
    }

    /// Sends all of `data`.
    pub async fn send(&mut self, mut data: Bytes) -> Result<(), StreamError> {
        while !data.is_empty() {
            poll_fn(|cx| self.poll_send(cx, &mut data)).await?;
        }
        Ok(())
    }

    /// Half-close: END_STREAM after everything queued.
    pub fn finish(&mut self) -> Result<(), StreamError> {
        if !self.finished {
            self.finished = true;
            self.inner.send_data(Bytes::new(), true)?;
        }
        Ok(())
    }

    /// Gives the whole stream up: RST_STREAM with CANCEL.
    pub fn reset(&mut self) {
        self.finished = true;
        self.inner.send_reset(Reason::CANCEL);
    }

    /// Ready when the peer has reset the stream. `NO_ERROR` means that it only has no use for more data.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        self.inner.poll_reset(cx).map(|r| r.map_or_else(StreamError::from, StreamError::Reset))
    }

    /// The reason behind a send side that is not streaming any more.
    fn why_closed(&mut self, cx: &mut Context<'_>) -> StreamError {
        match self.poll_reset(cx) {
            Poll::Ready(error) => error,
            Poll::Pending => StreamError::Reset(Reason::CANCEL),
        }
    }
}

/// The receiving half. Bytes count against the stream's window until [`RecvHalf::release`] gives them back.
#[derive(Debug)]
pub struct RecvHalf {
    inner: RecvStream,
}

impl RecvHalf {
    /// The next piece, as the peer framed it and never empty; `None` after END_STREAM.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>> {
        loop {
            return Poll::Ready(match ready!(self.inner.poll_data(cx)) {
                // A bare END_STREAM comes as an empty piece before the end.
                Some(Ok(data)) if data.is_empty() => continue,
                Some(Ok(data)) => Ok(Some(data)),
                Some(Err(error)) => Err(error.into()),
                None => Ok(None),
            });
        }
    }

    /// The next piece; `None` after END_STREAM. Cancel-safe.
    pub async fn data(&mut self) -> Result<Option<Bytes>, StreamError> {
        poll_fn(|cx| self.poll_data(cx)).await
    }

    /// Gives `n` bytes of window back, once they have gone on to where they belong.
    pub fn release(&mut self, n: usize) {
        // An error means that the stream is gone, which the next poll tells with its reason.
        let _ = self.inner.flow_control().release_capacity(n);
    }

    /// Whether END_STREAM has arrived and everything was taken.
    pub fn is_finished(&self) -> bool {
        self.inner.is_end_stream()
    }
}
