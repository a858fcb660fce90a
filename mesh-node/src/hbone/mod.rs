//! HBONE: TCP connections inside HTTP/2 CONNECT streams over mutual TLS, wire-compatible with Istio.
//!
//! [`Pool`] is the client side: it keeps connections per (source identity, source address, expected identities,
//! destination address) and opens streams on them. [`serve`] is the server side of one connection. Both hand out
//! [`HboneStream`]s: two halves that carry [`bytes::Bytes`], so that the copy loop moves payload without copying it.
//!
//! Flow control is the memory bound: a stream never has more than its window in memory unread, and a receiver gives
//! the window back only when the bytes have gone to the other side.
//!
//! Absent on purpose: retries of a request that a server may have acted upon, TLS details (`crate::tls`), policy
//! (`crate::policy`), and any knowledge of pods: the caller brings the dialler and the handler.

mod driver;
mod error;
mod fault;
mod gather;
mod headers;
mod pool;
mod server;
mod stream;
#[cfg(test)]
pub(crate) mod tests;

pub use error::{Blame, HboneError, Refusal};
pub use headers::{Baggage, Connect, ConnectRequest, Forwarded, Target};
pub use pool::{Dialer, Pool, PoolKey, PoolLimits, PoolStats};
pub use server::{Handler, ServeEnd, ServeOptions, serve};
pub use stream::{HboneStream, RecvHalf, SendHalf, StreamError};

use std::time::Duration;

/// The port on which a workload's node takes HBONE, on the pod's address.
pub const HBONE_PORT: u16 = 15008;

/// Largest flow-control window of a stream, in bytes: what a reader that does not read costs at most.
pub const STREAM_WINDOW: u32 = 4 << 20;

/// Smallest flow-control window of a stream, in bytes.
pub const MIN_STREAM_WINDOW: u32 = 32 << 10;

/// What the windows of all streams of one pod may add up to, in bytes, as long as [`MIN_STREAM_WINDOW`] lets them: the
/// more connections a pod has, the less each may have in flight.
pub const POD_WINDOW: u32 = 256 << 20;

/// Flow-control window of a connection with few streams, in bytes.
pub const CONNECTION_WINDOW: u32 = 16 << 20;

/// What the connection window may grow to when many streams are open. Readers that sleep hold on to their stream's
/// window; with a fixed connection window four of them would stop all the others.
pub const MAX_CONNECTION_WINDOW: u32 = 128 << 20;

/// Largest DATA frame that we accept, in bytes.
pub const MAX_FRAME: u32 = 1 << 20;

/// Payload that one stream may have queued towards the peer, in bytes.
pub const SEND_BUFFER: usize = 512 << 10;

/// Largest header list that we accept, in bytes. A CONNECT needs a few hundred.
pub const MAX_HEADER_LIST: u32 = 16 << 10;

/// Streams that a client puts on one connection.
pub const CLIENT_STREAMS: usize = 100;

/// Streams that a server accepts on one connection.
pub const SERVER_STREAMS: u32 = 200;

/// How often either side asks whether the other is still there.
pub const PING_INTERVAL: Duration = Duration::from_secs(10);

/// How long the answer may take before the connection counts as dead.
pub const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a connection without streams stays in the pool.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(300);

/// The same for a connection beside others to the same place: a burst needed it, and it holds some 200 KiB.
pub const SPARE_IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a server keeps a connection without streams: longer than the client, which knows better.
pub const SERVER_IDLE_TIMEOUT: Duration = Duration::from_secs(360);

/// The same when the pod has many of them.
pub const CROWDED_IDLE_TIMEOUT: Duration = Duration::from_secs(5);
