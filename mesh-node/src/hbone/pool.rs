//! The client side: pooled connections, streams on them, and who may share which.
//!
//! One pool belongs to one worker. The lock is held only for bookkeeping, never while something is awaited. A dial
//! runs as its own task, so that it outlives a caller who gives up, and all who wait for it share its result.

use super::{
    CLIENT_STREAMS, CONNECTION_WINDOW, IDLE_TIMEOUT, MAX_FRAME, MAX_HEADER_LIST, SEND_BUFFER, STREAM_WINDOW,
    driver, error::HboneError, fault::Watched, headers::Connect, stream::HboneStream,
};
use crate::tls::{self, HANDSHAKE_TIMEOUT, LocalIdentity, Peer, TlsReject};
use bytes::Bytes;
use h2::{Reason, client::SendRequest};
use http::Request;
use mesh_xds::model::SpiffeId;
use std::{
    collections::{BTreeSet, HashMap},
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};
use tokio::{
    net::TcpStream,
    sync::watch,
    time::{Instant, timeout},
};
use tokio_util::task::TaskTracker;

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
}

/// Bounds and deadlines of a pool.
#[derive(Clone, Copy, Debug)]
pub struct PoolLimits {
    /// Streams on one connection.
    pub streams_per_connection: usize,
    /// Connections with one key.
    pub connections_per_key: usize,
    /// Connections altogether.
    pub connections: usize,
    /// How long a connection without streams stays.
    pub idle: Duration,
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
            connections: 8192,
            idle: IDLE_TIMEOUT,
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

/// What ended a connection.
#[derive(Clone, Debug)]
pub(super) struct Closed {
    pub(super) detail: String,
    pub(super) tls: Option<TlsReject>,
}

/// What a connection's driver, its streams and the pool share.
#[derive(Debug)]
pub(super) struct ConnShared {
    active: AtomicUsize,
    /// When the last stream ended.
    last_used: Mutex<Instant>,
    closed: watch::Sender<Option<Closed>>,
    pool: Weak<Inner>,
}

impl ConnShared {
    /// Streams open on the connection.
    pub(super) fn streams(&self) -> usize {
        self.active.load(Relaxed)
    }
}

/// Counts one stream of a connection until it is dropped.
#[derive(Debug)]
pub(super) struct StreamSlot(Arc<ConnShared>);

impl StreamSlot {
    fn take(shared: &Arc<ConnShared>, inner: &Inner) -> Self {
        shared.active.fetch_add(1, Relaxed);
        inner.streams.fetch_add(1, Relaxed);
        Self(shared.clone())
    }
}

impl Drop for StreamSlot {
    fn drop(&mut self) {
        *self.0.last_used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        self.0.active.fetch_sub(1, Relaxed);
        if let Some(pool) = self.0.pool.upgrade() {
            pool.streams.fetch_sub(1, Relaxed);
        }
    }
}

struct Conn {
    id: u64,
    send: SendRequest<Bytes>,
    shared: Arc<ConnShared>,
    peer: Arc<Peer>,
    /// No new streams after the first of the two certificates has expired: what they proved has ended.
    expires: SystemTime,
}

struct Dial {
    id: u64,
    waiters: usize,
    done: watch::Receiver<Option<Result<(), HboneError>>>,
}

#[derive(Default)]
struct Entry {
    conns: Vec<Conn>,
    dials: Vec<Dial>,
}

#[derive(Default)]
struct State {
    entries: HashMap<PoolKey, Entry>,
    connections: usize,
    dialing: usize,
    next_id: u64,
}

struct Inner {
    limits: PoolLimits,
    state: Mutex<State>,
    tasks: TaskTracker,
    streams: AtomicU64,
    opened: AtomicU64,
    failed: AtomicU64,
    retried: AtomicU64,
    evicted: AtomicU64,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("limits", &self.limits).finish_non_exhaustive()
    }
}

/// A pool of connections to peers. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Pool {
    inner: Arc<Inner>,
}

/// A place on a connection.
struct Lease {
    conn_id: u64,
    send: SendRequest<Bytes>,
    shared: Arc<ConnShared>,
    peer: Arc<Peer>,
    slot: StreamSlot,
}

/// How a lease did not lead to a stream.
enum OpenError {
    /// The peer cannot have acted on the request: it may go over another connection.
    Unprocessed(HboneError),
    /// Final.
    Final(HboneError),
}

/// What to do about a key right now.
enum Step {
    Use(Box<Lease>),
    Wait(watch::Receiver<Option<Result<(), HboneError>>>),
    Dial(u64, watch::Sender<Option<Result<(), HboneError>>>),
}

impl Pool {
    /// An empty pool.
    pub fn new(limits: PoolLimits) -> Self {
        Self {
            inner: Arc::new(Inner {
                limits,
                state: Mutex::default(),
                tasks: TaskTracker::new(),
                streams: AtomicU64::new(0),
                opened: AtomicU64::new(0),
                failed: AtomicU64::new(0),
                retried: AtomicU64::new(0),
                evicted: AtomicU64::new(0),
            }),
        }
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
                    self.inner.tasks.spawn(async move {
                        let result = dial(&inner, &key, &local, &dialer).await;
                        let result = inner.finish_dial(&key, id, result);
                        report.send_replace(Some(result));
                    });
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

/// A connection that has just been made.
struct Dialed {
    send: SendRequest<Bytes>,
    shared: Arc<ConnShared>,
    peer: Arc<Peer>,
    expires: SystemTime,
    driver: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>,
    id: u64,
}

async fn dial<D: Dialer>(
    inner: &Arc<Inner>,
    key: &PoolKey,
    local: &Arc<LocalIdentity>,
    dialer: &D,
) -> Result<Dialed, HboneError> {
    let (to, limits) = (key.to, &inner.limits);
    let tls_error = |reject| HboneError::Tls { to, reject };
    let own = local.valid_cert().map_err(tls_error)?;
    let tcp = timeout(limits.dial_timeout, dialer.dial(to))
        .await
        .map_err(|_| HboneError::DialTimeout { to, after: limits.dial_timeout })?
        .map_err(|source| HboneError::Dial { to, source: Arc::new(source) })?;
    // Small frames must not wait for an acknowledgement. Failing to set it costs latency only.
    let _ = tcp.set_nodelay(true);
    let (stream, peer) = tls::connect(tcp, local, &key.expected, to.ip(), limits.handshake_timeout)
        .await
        .map_err(tls_error)?;
    let (stream, fault) = Watched::new(stream);
    let (send, connection) = h2::client::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEADER_LIST)
        .max_send_buffer_size(SEND_BUFFER)
        .initial_max_send_streams(limits.streams_per_connection)
        .enable_push(false)
        .handshake(stream)
        .await
        .map_err(|e| HboneError::Lost { to, detail: e.to_string() })?;
    let id = inner.next_id();
    let shared = Arc::new(ConnShared {
        active: AtomicUsize::new(0),
        last_used: Mutex::new(Instant::now()),
        closed: watch::Sender::new(None),
        pool: Arc::downgrade(inner),
    });
    let driver = {
        let (shared, pool) = (shared.clone(), Arc::downgrade(inner));
        let idle = limits.idle;
        let sweep = {
            let (shared, pool) = (shared.clone(), pool.clone());
            move || {
                if let Some(pool) = pool.upgrade() {
                    pool.evict_if_idle(id, &shared, idle);
                }
            }
        };
        let sweep_every = (idle / 4).max(Duration::from_millis(10));
        async move {
            let closed = driver::drive(connection, fault, shared.clone(), sweep_every, sweep).await;
            tracing::debug!(%to, detail = closed.detail, "tunnel connection ended");
            if let Some(pool) = pool.upgrade() {
                pool.remove(id);
            }
            shared.closed.send_replace(Some(closed));
        }
    };
    let expires = own.not_after().min(peer.not_after);
    Ok(Dialed { send, shared, peer: Arc::new(peer), expires, driver: Box::pin(driver), id })
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_id(&self) -> u64 {
        let mut state = self.lock();
        state.next_id += 1;
        state.next_id
    }

    /// Decides under the lock what to do for one caller.
    fn step(&self, key: &PoolKey) -> Result<Step, HboneError> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let now = SystemTime::now();
        let entry = state.entries.entry(key.clone()).or_default();
        let before = entry.conns.len();
        entry.conns.retain(|conn| now < conn.expires);
        state.connections -= before - entry.conns.len();
        for conn in &entry.conns {
            let limit = self.limits.streams_per_connection.min(conn.send.current_max_send_streams());
            if conn.shared.streams() < limit {
                return Ok(Step::Use(Box::new(Lease {
                    conn_id: conn.id,
                    send: conn.send.clone(),
                    slot: StreamSlot::take(&conn.shared, self),
                    shared: conn.shared.clone(),
                    peer: conn.peer.clone(),
                })));
            }
        }
        if let Some(dial) = entry.dials.iter_mut().find(|d| d.waiters < self.limits.streams_per_connection) {
            dial.waiters += 1;
            return Ok(Step::Wait(dial.done.clone()));
        }
        if entry.conns.len() + entry.dials.len() >= self.limits.connections_per_key {
            return Err(HboneError::Full { what: "connections to this destination" });
        }
        if state.connections + state.dialing >= self.limits.connections {
            state.forget_if_empty(key);
            if !self.evict_one_idle(state) {
                return Err(HboneError::Full { what: "connections of this worker" });
            }
        }
        state.next_id += 1;
        state.dialing += 1;
        let id = state.next_id;
        let (report, done) = watch::channel(None);
        state.entries.entry(key.clone()).or_default().dials.push(Dial { id, waiters: 1, done });
        Ok(Step::Dial(id, report))
    }

    /// Books the result of a dial and starts the connection's driver.
    fn finish_dial(
        &self,
        key: &PoolKey,
        dial_id: u64,
        result: Result<Dialed, HboneError>,
    ) -> Result<(), HboneError> {
        let mut guard = self.lock();
        let state = &mut *guard;
        state.dialing -= 1;
        if let Some(entry) = state.entries.get_mut(key) {
            entry.dials.retain(|d| d.id != dial_id);
        }
        match result {
            Ok(Dialed { send, shared, peer, expires, driver, id }) => {
                state.connections += 1;
                let entry = state.entries.entry(key.clone()).or_default();
                entry.conns.push(Conn { id, send, shared, peer, expires });
                self.opened.fetch_add(1, Relaxed);
                drop(guard);
                self.tasks.spawn(driver);
                Ok(())
            }
            Err(error) => {
                state.forget_if_empty(key);
                self.failed.fetch_add(1, Relaxed);
                Err(error)
            }
        }
    }

    /// Takes a connection out: no new streams.
    fn remove(&self, id: u64) {
        let mut state = self.lock();
        let Some((key, at)) = state
            .entries
            .iter()
            .find_map(|(key, entry)| entry.conns.iter().position(|c| c.id == id).map(|at| (key.clone(), at)))
        else {
            return;
        };
        if let Some(entry) = state.entries.get_mut(&key) {
            entry.conns.swap_remove(at);
            state.connections -= 1;
        }
        state.forget_if_empty(&key);
    }

    fn evict_if_idle(&self, id: u64, shared: &ConnShared, idle: Duration) {
        let last_used = *shared.last_used.lock().unwrap_or_else(PoisonError::into_inner);
        // A stream that starts between the test and the removal keeps its connection: only the pool forgets it.
        if shared.streams() == 0 && last_used.elapsed() >= idle {
            self.remove(id);
            self.evicted.fetch_add(1, Relaxed);
        }
    }

    /// Makes room for a new connection at the cost of the one that has been idle for longest.
    fn evict_one_idle(&self, state: &mut State) -> bool {
        let oldest = state
            .entries
            .iter()
            .flat_map(|(key, entry)| entry.conns.iter().map(move |conn| (key, conn)))
            .filter(|(_, conn)| conn.shared.streams() == 0)
            .min_by_key(|(_, conn)| *conn.shared.last_used.lock().unwrap_or_else(PoisonError::into_inner))
            .map(|(key, conn)| (key.clone(), conn.id));
        let Some((key, id)) = oldest else { return false };
        if let Some(entry) = state.entries.get_mut(&key) {
            entry.conns.retain(|c| c.id != id);
            state.connections -= 1;
            self.evicted.fetch_add(1, Relaxed);
        }
        state.forget_if_empty(&key);
        true
    }
}

impl State {
    fn forget_if_empty(&mut self, key: &PoolKey) {
        if self.entries.get(key).is_some_and(|e| e.conns.is_empty() && e.dials.is_empty()) {
            self.entries.remove(key);
        }
    }
}
