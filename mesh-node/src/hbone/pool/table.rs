//! The pool's books: which connections there are, who may use them, and what is being dialled.
//!
//! Everything here runs under one short lock and awaits nothing.

use super::{PoolKey, PoolLimits, dial::Dialed};
use crate::{
    hbone::HboneError,
    tls::{Peer, TlsReject},
};
use bytes::Bytes;
use h2::client::SendRequest;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::SystemTime,
};
use tokio::{sync::watch, time::Instant};
use tokio_util::task::TaskTracker;

/// The result of a dial, once it is there.
pub(super) type DialResult = Option<Result<(), HboneError>>;

/// What ended a connection.
#[derive(Clone, Debug)]
pub(in crate::hbone) struct Closed {
    pub(in crate::hbone) detail: String,
    pub(in crate::hbone) tls: Option<TlsReject>,
}

/// What a connection's driver, its streams and the pool share.
#[derive(Debug)]
pub(in crate::hbone) struct ConnShared {
    active: AtomicUsize,
    /// When the last stream ended.
    last_used: Mutex<Instant>,
    pub(super) closed: watch::Sender<Option<Closed>>,
    pool: Weak<Inner>,
}

impl ConnShared {
    pub(super) fn new(pool: &Arc<Inner>) -> Self {
        Self {
            active: AtomicUsize::new(0),
            last_used: Mutex::new(Instant::now()),
            closed: watch::Sender::new(None),
            pool: Arc::downgrade(pool),
        }
    }

    /// Streams open on the connection.
    pub(in crate::hbone) fn streams(&self) -> usize {
        self.active.load(Relaxed)
    }
}

/// Counts one stream of a connection until it is dropped.
#[derive(Debug)]
pub(in crate::hbone) struct StreamSlot(Arc<ConnShared>);

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

pub(super) struct Conn {
    id: u64,
    send: SendRequest<Bytes>,
    shared: Arc<ConnShared>,
    peer: Arc<Peer>,
    /// No new streams after the first of the two certificates has expired: what they proved has ended.
    expires: SystemTime,
}

pub(super) struct Dial {
    id: u64,
    waiters: usize,
    done: watch::Receiver<DialResult>,
}

#[derive(Default)]
pub(super) struct Entry {
    pub(super) conns: Vec<Conn>,
    pub(super) dials: Vec<Dial>,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) entries: HashMap<PoolKey, Entry>,
    pub(super) connections: usize,
    pub(super) dialing: usize,
    pub(super) next_id: u64,
}

pub(super) struct Inner {
    pub(super) limits: PoolLimits,
    pub(super) state: Mutex<State>,
    pub(super) tasks: TaskTracker,
    pub(super) streams: AtomicU64,
    pub(super) opened: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) retried: AtomicU64,
    pub(super) evicted: AtomicU64,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("limits", &self.limits).finish_non_exhaustive()
    }
}

/// A place on a connection.
pub(super) struct Lease {
    pub(super) conn_id: u64,
    pub(super) send: SendRequest<Bytes>,
    pub(super) shared: Arc<ConnShared>,
    pub(super) peer: Arc<Peer>,
    pub(super) slot: StreamSlot,
}

/// What to do about a key right now.
pub(super) enum Step {
    Use(Box<Lease>),
    Wait(watch::Receiver<DialResult>),
    Dial(u64, watch::Sender<DialResult>),
}

impl Inner {
    pub(super) fn new(limits: PoolLimits) -> Self {
        Self {
            limits,
            state: Mutex::default(),
            tasks: TaskTracker::new(),
            streams: AtomicU64::new(0),
            opened: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            retried: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn next_id(&self) -> u64 {
        let mut state = self.lock();
        state.next_id += 1;
        state.next_id
    }

    /// Decides under the lock what to do for one caller.
    pub(super) fn step(&self, key: &PoolKey) -> Result<Step, HboneError> {
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
        // A walk over all, but only where a connection is about to be made.
        let of_source = |entries: &HashMap<PoolKey, Entry>| {
            let same = entries.iter().filter(|(other, _)| other.source_ip == key.source_ip);
            same.map(|(_, entry)| entry.conns.len() + entry.dials.len()).sum::<usize>()
        };
        if of_source(&state.entries) >= self.limits.connections_per_source {
            state.forget_if_empty(key);
            if !self.evict_one_idle(state, |other| other.source_ip == key.source_ip) {
                return Err(HboneError::Full { what: "connections of this pod" });
            }
        }
        if state.connections + state.dialing >= self.limits.connections {
            state.forget_if_empty(key);
            if !self.evict_one_idle(state, |_| true) {
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
    pub(super) fn finish_dial(
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

    /// Takes a connection out: no new streams. False when it was out already.
    pub(super) fn remove(&self, id: u64) -> bool {
        let mut state = self.lock();
        let Some((key, at)) = state
            .entries
            .iter()
            .find_map(|(key, entry)| entry.conns.iter().position(|c| c.id == id).map(|at| (key.clone(), at)))
        else {
            return false;
        };
        if let Some(entry) = state.entries.get_mut(&key) {
            entry.conns.swap_remove(at);
            state.connections -= 1;
        }
        state.forget_if_empty(&key);
        true
    }

    pub(super) fn evict_if_idle(&self, id: u64, shared: &ConnShared) {
        let idle_for = shared.last_used.lock().unwrap_or_else(PoisonError::into_inner).elapsed();
        if shared.streams() > 0 || idle_for < self.limits.idle.min(self.limits.spare_idle) {
            return;
        }
        let spare = {
            let state = self.lock();
            let entry = state.entries.values().find(|entry| entry.conns.iter().any(|conn| conn.id == id));
            entry.is_some_and(|entry| entry.conns.len() > 1)
        };
        let patience = if spare { self.limits.idle.min(self.limits.spare_idle) } else { self.limits.idle };
        // A stream that starts between the test and the removal keeps its connection: only the pool forgets it.
        if idle_for >= patience && self.remove(id) {
            self.evicted.fetch_add(1, Relaxed);
        }
    }

    /// Makes room for a new connection at the cost of the one among `which` that has been idle for longest.
    fn evict_one_idle(&self, state: &mut State, which: impl Fn(&PoolKey) -> bool) -> bool {
        let oldest = state
            .entries
            .iter()
            .flat_map(|(key, entry)| entry.conns.iter().map(move |conn| (key, conn)))
            .filter(|(key, conn)| which(key) && conn.shared.streams() == 0)
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
