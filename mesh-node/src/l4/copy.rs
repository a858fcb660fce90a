//! The copy loop: one future, both directions.

use super::endpoint::{Endpoint, EndpointError, Queue};
use crate::local::Buffered;
use std::{
    fmt,
    future::{Future, poll_fn},
    io,
    pin::pin,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    task::{Context, Poll},
};

/// Bytes that one poll moves per direction before other connections of the worker get their turn.
const TURN: usize = 1 << 20;

/// Payload bytes of one connection, counted as they move: readable while it lives.
#[derive(Debug, Default)]
pub struct ByteCounters {
    /// From the client to the server.
    pub sent: AtomicU64,
    /// From the server to the client.
    pub received: AtomicU64,
}

impl ByteCounters {
    /// Both, sent first.
    pub fn get(&self) -> (u64, u64) {
        (self.sent.load(Relaxed), self.received.load(Relaxed))
    }
}

/// Why a copy is to be stopped from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stop {
    /// A policy that allowed the connection does not any more.
    Revoked,
    /// The time for draining is over.
    Deadline,
}

/// How a copy ended.
#[derive(Debug)]
pub enum CopyEnd {
    /// Both sides closed in order.
    Clean,
    /// The client's side was reset.
    ResetByClient,
    /// The server's side was reset.
    ResetByServer,
    /// The client's side broke.
    ClientError(io::Error),
    /// The server's side broke.
    ServerError(io::Error),
    /// A policy ended it.
    Revoked,
    /// Draining ended it.
    Deadline,
    /// Its pod holds too much for readers that do not read, and it would have held more.
    Overloaded,
}

impl CopyEnd {
    /// A stable word for metric labels and logs.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::ResetByClient => "reset_by_client",
            Self::ResetByServer => "reset_by_server",
            Self::ClientError(_) => "client_error",
            Self::ServerError(_) => "server_error",
            Self::Revoked => "revoked",
            Self::Deadline => "deadline",
            Self::Overloaded => "overloaded",
        }
    }
}

impl fmt::Display for CopyEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())?;
        match self {
            Self::ClientError(error) | Self::ServerError(error) => write!(f, ": {error}"),
            _ => Ok(()),
        }
    }
}

/// What a copy moved and how it ended.
#[derive(Debug)]
pub struct CopyOutcome {
    /// Payload bytes from the client that the server's side took.
    pub sent: u64,
    /// Payload bytes from the server that the client's side took.
    pub received: u64,
    /// How it ended.
    pub end: CopyEnd,
}

/// Which side of a direction failed.
enum Side {
    Reader,
    Writer,
}

/// One direction of a connection.
#[derive(Default)]
struct Direction {
    queue: Queue,
    ended: bool,
    done: bool,
}

impl Direction {
    /// Moves what can be moved. Ready when the direction has ended in order.
    fn poll<R: Endpoint, W: Endpoint>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        counter: &AtomicU64,
    ) -> Poll<Result<(), (Side, EndpointError)>> {
        let mut moved = 0;
        while !self.done {
            let mut blocked = true;
            while !self.ended && (self.queue.is_empty() || self.queue.len() < R::READ_AHEAD) {
                match reader.poll_read(cx) {
                    Poll::Ready(Ok(Some(chunk))) => {
                        self.queue.push(chunk);
                        blocked = false;
                        if self.queue.len() >= TURN {
                            break;
                        }
                    }
                    // Closed: its data is all here, and it was told that ours is not wanted any more.
                    Poll::Ready(Ok(None) | Err(EndpointError::Closed)) => {
                        self.ended = true;
                        blocked = false;
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(Err((Side::Reader, error))),
                    Poll::Pending => break,
                }
            }
            if !self.queue.is_empty() {
                match writer.poll_write(cx, &mut self.queue) {
                    Poll::Ready(Ok(n)) => {
                        counter.fetch_add(n as u64, Relaxed);
                        reader.consumed(n);
                        moved += n;
                        blocked = false;
                    }
                    // The other end closed in order and has no use for the rest. Drop it, as its kernel would.
                    Poll::Ready(Err(EndpointError::Closed)) => {
                        self.done = true;
                        return Poll::Ready(Ok(()));
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(Err((Side::Writer, error))),
                    Poll::Pending => {}
                }
            } else if self.ended {
                self.done = true;
                match writer.finish() {
                    Ok(()) | Err(EndpointError::Closed) => {}
                    Err(error) => return Poll::Ready(Err((Side::Writer, error))),
                }
                break;
            }
            if blocked {
                return Poll::Pending;
            }
            if moved >= TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// Copies both ways until the connection has ended on both sides, or `stop` says so.
///
/// What waits for a slow side is counted by `buffered`, which may end the connection.
///
/// A reset or an error on one side resets the other; `stop` resets both. Dropping the future resets both as well.
pub async fn copy<C: Endpoint, S: Endpoint>(
    mut client: C,
    mut server: S,
    counters: &ByteCounters,
    mut buffered: Buffered,
    stop: impl Future<Output = Stop>,
) -> CopyOutcome {
    let mut stop = pin!(stop);
    let mut up = Direction::default();
    let mut down = Direction::default();
    let end = poll_fn(|cx| {
        if let Poll::Ready(stop) = stop.as_mut().poll(cx) {
            return Poll::Ready(match stop {
                Stop::Revoked => CopyEnd::Revoked,
                Stop::Deadline => CopyEnd::Deadline,
            });
        }
        let up_done = match up.poll(cx, &mut client, &mut server, &counters.sent) {
            Poll::Ready(Err((Side::Reader, error))) => return Poll::Ready(client_failed(error)),
            Poll::Ready(Err((Side::Writer, error))) => return Poll::Ready(server_failed(error)),
            Poll::Ready(Ok(())) => true,
            Poll::Pending => false,
        };
        let down_done = match down.poll(cx, &mut server, &mut client, &counters.received) {
            Poll::Ready(Err((Side::Reader, error))) => return Poll::Ready(server_failed(error)),
            Poll::Ready(Err((Side::Writer, error))) => return Poll::Ready(client_failed(error)),
            Poll::Ready(Ok(())) => true,
            Poll::Pending => false,
        };
        if up_done && down_done {
            return Poll::Ready(CopyEnd::Clean);
        }
        if !buffered.set(up.queue.len() + down.queue.len()) {
            return Poll::Ready(CopyEnd::Overloaded);
        }
        // A reset that neither direction can notice: the side is not being read because the other does not take more,
        // or because its half-close was read already.
        if let Poll::Ready(error) = client.poll_failed(cx) {
            return Poll::Ready(client_failed(error));
        }
        if let Poll::Ready(error) = server.poll_failed(cx) {
            return Poll::Ready(server_failed(error));
        }
        Poll::Pending
    })
    .await;
    if matches!(end, CopyEnd::Clean) {
        client.completed();
        server.completed();
    } else {
        client.reset();
        server.reset();
    }
    let (sent, received) = counters.get();
    CopyOutcome { sent, received, end }
}

fn client_failed(error: EndpointError) -> CopyEnd {
    match error {
        EndpointError::Reset | EndpointError::Closed => CopyEnd::ResetByClient,
        EndpointError::Broken(error) => CopyEnd::ClientError(error),
    }
}

fn server_failed(error: EndpointError) -> CopyEnd {
    match error {
        EndpointError::Reset | EndpointError::Closed => CopyEnd::ResetByServer,
        EndpointError::Broken(error) => CopyEnd::ServerError(error),
    }
}
