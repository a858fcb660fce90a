//! The client side: pooled connections, streams on them, and who may share which.
//!
//! One pool belongs to one worker. The lock is held only for bookkeeping, never while something is awaited. A dial
//! runs as its own task, so that it outlives a caller who gives up, and all who wait for it share its result.

mod dial;
mod table;

pub(super) use table::{Closed, ConnShared, StreamSlot};

use super::{
    CLIENT_STREAMS, IDLE_TIMEOUT, SPARE_IDLE_TIMEOUT, error::HboneError, headers::Connect,
    stream::HboneStream,
};
use crate::{
    fair::Share,
    tls::{HANDSHAKE_TIMEOUT, LocalIdentity},
};
use h2::Reason;
use http::Request;
use mesh_xds::model::SpiffeId;
use std::{
    collections::BTreeSet,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};
use table::{Inner, Lease, Step};
use tokio::{net::TcpStream, time::timeout};

/// How often a request may meet a connection that is already going away before the caller hears of it.
const ATTEMPTS: usize = 4;

/// Which streams may share a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// The workload that the connection speaks for.
    pub source: SpiffeId,
    /// Its address: the peer sees it, and policies match on it, so two pods of one account do not share.
    pub source_ip: IpAddr,
    /// The identities of which the peer must prove one.
    pub expected: Arc<BTreeSet<SpiffeId>>,
    /// Where to dial, port 15008 included.
    pub to: SocketAddr,
}

/// Opens TCP connections from the source pod's network namespace.
pub trait Dialer: Clone + Send + Sync + 'static {
    /// Connects to `to`. The pool sets the deadline.
    fn dial(&self, to: SocketAddr) -> impl Future<Output = io::Result<TcpStream>> + Send;

    /// Under which key the connection takes part in the shares of its worker (`crate::fair`).
    fn share(&self) -> u64 {
        0
    }

    /// Connections that the source has in all; their number decides about the windows.
    fn connections(&self) -> usize {
        1
    }
}

/// Bounds and deadlines of a pool.
#[derive(Clone, Copy, Debug)]
pub struct PoolLimits {
    /// Streams on one connection.
    pub streams_per_connection: usize,
    /// Connections with one key.
    pub connections_per_key: usize,
    /// Connections from one source address.
    pub connections_per_source: usize,
    /// Connections altogether.
    pub connections: usize,
    /// How long a connection without streams stays.
    pub idle: Duration,
    /// How long it stays when there is another one to the same place.
    pub spare_idle: Duration,
    /// For the TCP connection.
    pub dial_timeout: Duration,
    /// For the TLS handshake.
    pub handshake_timeout: Duration,
    /// For the answer to a CONNECT; the peer connects to its workload meanwhile.
    pub response_timeout: Duration,
}

impl Default for PoolLimits {
    fn default() -> Self {
        Self {
            streams_per_connection: CLIENT_STREAMS,
            connections_per_key: 128,
            connections_per_source: 1024,
            connections: 8192,
            idle: IDLE_TIMEOUT,
            spare_idle: SPARE_IDLE_TIMEOUT,
            dial_timeout: Duration::from_secs(10),
            handshake_timeout: HANDSHAKE_TIMEOUT,
            response_timeout: Duration::from_secs(15),
        }
    }
}

/// Gauges and counters of a pool, for metrics. The counters only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Connections that take new streams.
    pub connections: u64,
    /// Open streams, those on draining connections included.
    pub streams: u64,
    /// Dials in progress.
    pub dialing: u64,
    /// Connections opened.
    pub opened: u64,
    /// Dials that failed.
    pub failed: u64,
    /// Requests that met a connection on its way out and were moved to another.
    pub retried: u64,
    /// Connections let go because they were idle.
    pub evicted: u64,
}

/// A pool of connections to peers. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Pool {
    inner: Arc<Inner>,
}

/// How a lease did not lead to a stream.
enum OpenError {
    /// The peer cannot have acted on the request: it may go over another connection.
    Unprocessed(HboneError),
    /// Final.
    Final(HboneError),
}

impl Pool {
    /// An empty pool.
    pub fn new(limits: PoolLimits) -> Self {
        Self { inner: Arc::new(Inner::new(limits)) }
    }

    /// Opens a tunnel as `local` (whose identity is the key's source), over a pooled connection or a new one.
    ///
    /// A request that the peer provably did not process (refused stream, GOAWAY, a pooled connection found dead) goes
    /// over another connection; everything else is the caller's to decide.
    pub async fn connect<D: Dialer>(
        &self,
        key: &PoolKey,
        local: &Arc<LocalIdentity>,
        request: &Connect,
        dialer: &D,
    ) -> Result<HboneStream, HboneError> {
        let http = request.to_request()?;
        let mut attempt = 1;
        loop {
            let lease = self.lease(key, local, dialer).await?;
            match self.open(key.to, lease, http.clone()).await {
                Ok(stream) => return Ok(stream),
                Err(OpenError::Unprocessed(_)) if attempt < ATTEMPTS => {
                    attempt += 1;
                    self.inner.retried.fetch_add(1, Relaxed);
                }
                Err(OpenError::Unprocessed(error) | OpenError::Final(error)) => return Err(error),
            }
        }
    }

    /// Takes no new streams on connections of this source address: its pod is gone, or its network namespace changed.
    /// Streams that are open finish.
    pub fn forget_source(&self, source_ip: IpAddr) {
        self.retain(|key| key.source_ip != source_ip);
    }

    /// Takes no new streams on any present connection.
    pub fn drain(&self) {
        self.retain(|_| false);
    }

    fn retain(&self, keep: impl Fn(&PoolKey) -> bool) {
        let mut state = self.inner.lock();
        let mut dropped = 0;
        state.entries.retain(|key, entry| {
            if keep(key) {
                return true;
            }
            dropped += entry.conns.len();
            entry.conns.clear();
            !entry.dials.is_empty()
        });
        state.connections -= dropped;
    }

    /// Gauges and counters.
    pub fn stats(&self) -> PoolStats {
        let (connections, dialing) = {
            let state = self.inner.lock();
            (state.connections as u64, state.dialing as u64)
        };
        let inner = &self.inner;
        PoolStats {
            connections,
            dialing,
            streams: inner.streams.load(Relaxed),
            opened: inner.opened.load(Relaxed),
            failed: inner.failed.load(Relaxed),
            retried: inner.retried.load(Relaxed),
            evicted: inner.evicted.load(Relaxed),
        }
    }

    /// Finds or makes room on a connection.
    async fn lease<D: Dialer>(
        &self,
        key: &PoolKey,
        local: &Arc<LocalIdentity>,
        dialer: &D,
    ) -> Result<Lease, HboneError> {
        loop {
            let mut done = match self.inner.step(key)? {
                Step::Use(lease) => return Ok(*lease),
                Step::Wait(done) => done,
                Step::Dial(id, report) => {
                    let done = report.subscribe();
                    let (inner, key, local, dialer) =
                        (self.inner.clone(), key.clone(), local.clone(), dialer.clone());
                    self.inner.tasks.spawn(Share::new(dialer.share(), async move {
                        let result = dial::dial(&inner, &key, &local, &dialer).await;
                        let result = inner.finish_dial(&key, id, result);
                        report.send_replace(Some(result));
                    }));
                    done
                }
            };
            let finished = done.wait_for(Option::is_some).await.map(|result| result.clone());
            match finished {
                Ok(Some(Err(error))) => return Err(error),
                Ok(_) => {}
                // The task died with its runtime.
                Err(_) => {
                    return Err(HboneError::Lost { to: key.to, detail: "the dial was abandoned".into() });
                }
            }
        }
    }

    /// Sends the request and waits for the answer.
    async fn open(
        &self,
        to: SocketAddr,
        lease: Lease,
        request: Request<()>,
    ) -> Result<HboneStream, OpenError> {
        let Lease { conn_id, send, shared, peer, slot } = lease;
        let gone = |error: &h2::Error| HboneError::Lost { to, detail: error.to_string() };
        let mut send = match send.ready().await {
            Ok(send) => send,
            Err(error) => {
                // GOAWAY, or the connection ended: nothing was sent.
                let error = closed_cause(&shared, to).await.unwrap_or_else(|| gone(&error));
                self.inner.remove(conn_id);
                return Err(if is_tls(&error) {
                    OpenError::Final(error)
                } else {
                    OpenError::Unprocessed(error)
                });
            }
        };
        let (response, body) = send.send_request(request, false).map_err(|error| {
            self.inner.remove(conn_id);
            OpenError::Unprocessed(gone(&error))
        })?;
        drop(send);
        let after = self.inner.limits.response_timeout;
        let response = match timeout(after, response).await {
            Err(_) => return Err(OpenError::Final(HboneError::Timeout { to, after })),
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(self.failed(to, conn_id, &shared, &error).await),
        };
        let status = response.status();
        if status != http::StatusCode::OK {
            return Err(OpenError::Final(HboneError::Status { to, status: status.as_u16() }));
        }
        Ok(HboneStream::new(body, response.into_body(), peer, Some(slot)))
    }

    /// Sorts out why a request got no answer.
    async fn failed(
        &self,
        to: SocketAddr,
        conn_id: u64,
        shared: &Arc<ConnShared>,
        error: &h2::Error,
    ) -> OpenError {
        if error.is_reset() {
            let reason = error.reason().unwrap_or(Reason::INTERNAL_ERROR);
            let reset = HboneError::Reset { to, reason: reason.to_string() };
            // RFC 9113, 8.7: a refused stream was not processed.
            return if reason == Reason::REFUSED_STREAM {
                self.inner.remove(conn_id);
                OpenError::Unprocessed(reset)
            } else {
                OpenError::Final(reset)
            };
        }
        self.inner.remove(conn_id);
        if error.is_go_away() {
            // h2 fails a stream with GOAWAY only when its number is above the last one that the peer processed.
            return OpenError::Unprocessed(HboneError::Lost { to, detail: error.to_string() });
        }
        let cause = closed_cause(shared, to).await;
        let cause = cause.unwrap_or_else(|| HboneError::Lost { to, detail: error.to_string() });
        // The peer died, or restarted while the connection was idle. At most an empty connection has reached the
        // workload, since no payload was sent; but a refusal by TLS will not get better.
        if is_tls(&cause) { OpenError::Final(cause) } else { OpenError::Unprocessed(cause) }
    }
}

fn is_tls(error: &HboneError) -> bool {
    matches!(error, HboneError::Tls { .. })
}

/// The driver's word on why a connection ended. Streams hear of the end in the same poll of the driver, so it is about
/// to be known when a stream asks.
async fn closed_cause(shared: &ConnShared, to: SocketAddr) -> Option<HboneError> {
    let mut closed = shared.closed.subscribe();
    let known =
        timeout(Duration::from_secs(1), closed.wait_for(Option::is_some)).await.ok()?.ok()?.clone()?;
    Some(match known.tls {
        Some(reject) => HboneError::Tls { to, reject },
        None => HboneError::Lost { to, detail: known.detail },
    })
}
