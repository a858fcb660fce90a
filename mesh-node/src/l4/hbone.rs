//! A tunnelled stream as one side of a copy.

use super::endpoint::{Endpoint, EndpointError, Queue};
use crate::hbone::{HboneStream, STREAM_WINDOW, StreamError};
use bytes::Bytes;
use h2::Reason;
use std::{
    io,
    task::{Context, Poll, ready},
};

/// An HBONE stream in a copy.
#[derive(Debug)]
pub struct HboneEnd {
    stream: HboneStream,
    received_all: bool,
    complete: bool,
}

impl HboneEnd {
    /// Takes a stream over.
    pub fn new(stream: HboneStream) -> Self {
        Self { stream, received_all: false, complete: false }
    }
}

fn classify(error: StreamError) -> EndpointError {
    match error {
        // The peer's workload has closed for good and takes no more; it did so in order.
        StreamError::Reset(Reason::NO_ERROR) => EndpointError::Closed,
        StreamError::Reset(_) => EndpointError::Reset,
        StreamError::Broken(error) => EndpointError::Broken(io::Error::other(error)),
    }
}

impl Endpoint for HboneEnd {
    // Frames are taken off h2 as they come, so that small ones can be put together; the window bounds them.
    const READ_AHEAD: usize = STREAM_WINDOW as usize;

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, EndpointError>> {
        let read = ready!(self.stream.recv.poll_data(cx)).map_err(classify);
        self.received_all |= matches!(read, Ok(None));
        Poll::Ready(read)
    }

    fn consumed(&mut self, n: usize) {
        self.stream.recv.release(n);
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<usize, EndpointError>> {
        let Some(front) = queue.front_mut() else { return Poll::Ready(Ok(0)) };
        let sent = ready!(self.stream.send.poll_send(cx, front)).map_err(classify)?;
        queue.taken(sent);
        Poll::Ready(Ok(sent))
    }

    fn finish(&mut self) -> Result<(), EndpointError> {
        self.stream.send.finish().map_err(classify)
    }

    fn poll_failed(&mut self, cx: &mut Context<'_>) -> Poll<EndpointError> {
        // Before END_STREAM the reading side hears of a reset, behind the data that came before it.
        if !self.received_all {
            return Poll::Pending;
        }
        self.stream.send.poll_reset(cx).map(classify)
    }

    fn completed(&mut self) {
        self.complete = true;
    }

    fn reset(&mut self) {
        if !self.complete {
            self.complete = true;
            self.stream.send.reset();
        }
    }
}

impl Drop for HboneEnd {
    fn drop(&mut self) {
        self.reset();
    }
}
