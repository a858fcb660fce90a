//! A TCP connection as one side of a copy.

use super::endpoint::{Endpoint, EndpointError, Queue};
use bytes::{Bytes, BytesMut};
use socket2::SockRef;
use std::{
    fmt,
    future::Future,
    io,
    io::IoSlice,
    net::Shutdown,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::{io::Interest, net::TcpStream};

/// Smallest and largest read buffer, in bytes. A connection that fills its buffer gets a larger one, since one read
/// then moves more and one DATA frame carries it; one that does not falls back.
const MIN_BUFFER: usize = 4 << 10;
const MAX_BUFFER: usize = 256 << 10;

/// Pieces handed to one write.
const MAX_SLICES: usize = 16;

/// A TCP connection in a copy.
pub struct TcpEnd {
    stream: Arc<TcpStream>,
    buffer: BytesMut,
    /// Size of the next buffer.
    size: usize,
    /// Bytes that were read before the copy began (by a sniffer).
    prefix: Option<Bytes>,
    /// Ends when the socket reports an error; made on first use.
    errored: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    complete: bool,
}

impl fmt::Debug for TcpEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpEnd").field("stream", &self.stream).finish_non_exhaustive()
    }
}

impl TcpEnd {
    /// Takes a connection over.
    pub fn new(stream: TcpStream) -> Self {
        Self {
            stream: Arc::new(stream),
            buffer: BytesMut::new(),
            size: 2 * MIN_BUFFER,
            prefix: None,
            errored: None,
            complete: false,
        }
    }

    /// Takes a connection over from which `prefix` was read already.
    pub fn with_prefix(stream: TcpStream, prefix: Bytes) -> Self {
        let mut end = Self::new(stream);
        end.prefix = Some(prefix).filter(|p| !p.is_empty());
        end
    }

    /// One read into the buffer. `None` when there is nothing to read yet.
    fn read(&mut self) -> io::Result<Option<usize>> {
        self.buffer.reserve(self.size);
        let room = self.buffer.capacity() - self.buffer.len();
        let (stream, buffer) = (&self.stream, &mut self.buffer);
        let mut got = None;
        // A read that does not fill the buffer has emptied the socket. Saying so to tokio (as WouldBlock) spares the
        // system call that would find out; readiness that came later than the read is not lost.
        let result = stream.try_io(Interest::READABLE, || match stream.try_read_buf(buffer) {
            Ok(n) => {
                got = Some(n);
                if 0 < n && n < room { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
            }
            Err(error) => Err(error),
        });
        match (got, result) {
            (Some(n), _) => {
                if n == room {
                    self.size = (self.size * 2).min(MAX_BUFFER);
                } else if n < self.size / 4 {
                    self.size = (self.size / 2).max(MIN_BUFFER);
                }
                Ok(Some(n))
            }
            (None, Err(error)) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(None),
        }
    }
}

fn classify(error: io::Error) -> EndpointError {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
    match error.kind() {
        ConnectionReset | ConnectionAborted | BrokenPipe => EndpointError::Reset,
        _ => EndpointError::Broken(error),
    }
}

impl Endpoint for TcpEnd {
    const READ_AHEAD: usize = 0;

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, EndpointError>> {
        if let Some(prefix) = self.prefix.take() {
            return Poll::Ready(Ok(Some(prefix)));
        }
        loop {
            match self.stream.poll_read_ready(cx) {
                Poll::Ready(result) => result.map_err(classify)?,
                Poll::Pending => {
                    // Idle connections hold no memory.
                    self.buffer = BytesMut::new();
                    return Poll::Pending;
                }
            }
            match self.read().map_err(classify)? {
                None => {}
                Some(0) => {
                    self.buffer = BytesMut::new();
                    return Poll::Ready(Ok(None));
                }
                Some(_) => return Poll::Ready(Ok(Some(self.buffer.split().freeze()))),
            }
        }
    }

    fn consumed(&mut self, _n: usize) {}

    fn poll_write(&mut self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<usize, EndpointError>> {
        loop {
            ready!(self.stream.poll_write_ready(cx)).map_err(classify)?;
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let mut used = 0;
            for (slice, chunk) in slices.iter_mut().zip(queue.chunks()) {
                *slice = IoSlice::new(chunk);
                used += 1;
            }
            match self.stream.try_write_vectored(&slices[..used]) {
                Ok(n) => {
                    queue.advance(n);
                    return Poll::Ready(Ok(n));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(classify(error))),
            }
        }
    }

    fn finish(&mut self) -> Result<(), EndpointError> {
        match SockRef::from(&*self.stream).shutdown(Shutdown::Write) {
            // Reset before we got here: the reading side tells.
            Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(classify(error)),
            _ => Ok(()),
        }
    }

    fn poll_failed(&mut self, cx: &mut Context<'_>) -> Poll<EndpointError> {
        let stream = &self.stream;
        let errored = self.errored.get_or_insert_with(|| {
            let stream = stream.clone();
            Box::pin(async move {
                // An error here means that the runtime is shutting down.
                let _ = stream.ready(Interest::ERROR).await;
            })
        });
        ready!(errored.as_mut().poll(cx));
        self.errored = None;
        match self.stream.take_error() {
            Ok(Some(error)) | Err(error) => Poll::Ready(classify(error)),
            // The error was taken by a read or a write, which reports it.
            Ok(None) => Poll::Ready(EndpointError::Reset),
        }
    }

    fn completed(&mut self) {
        self.complete = true;
    }

    fn reset(&mut self) {
        self.complete = false;
    }
}

impl Drop for TcpEnd {
    fn drop(&mut self) {
        if !self.complete {
            // Closing with zero linger sends RST. An error means that there is nothing left to reset.
            let _ = self.stream.set_zero_linger();
        }
    }
}
