//! Making a connection: TCP by the caller's dialler, TLS, HTTP/2, and the task that drives it.

use super::{
    Dialer, PoolKey,
    table::{ConnShared, Inner},
};
use crate::{
    fair::Share,
    hbone::{
        CONNECTION_WINDOW, HboneError, MAX_FRAME, MAX_HEADER_LIST, SEND_BUFFER, driver, fault::Watched,
        gather::Gather,
    },
    tls::{self, LocalIdentity, Peer},
};
use bytes::Bytes;
use h2::client::SendRequest;
use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::time::timeout;

/// A connection that has just been made.
pub(super) struct Dialed {
    pub(super) send: SendRequest<Bytes>,
    pub(super) shared: Arc<ConnShared>,
    pub(super) peer: Arc<Peer>,
    pub(super) expires: SystemTime,
    pub(super) driver: Pin<Box<dyn Future<Output = ()> + Send>>,
    pub(super) id: u64,
}

/// Connects for `key` as `local`. The driver is to be spawned once the connection is in the books.
pub(super) async fn dial<D: Dialer>(
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
        .initial_window_size(driver::stream_window_for(dialer.connections()))
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEADER_LIST)
        .max_send_buffer_size(SEND_BUFFER)
        .initial_max_send_streams(limits.streams_per_connection)
        .enable_push(false)
        .handshake(Gather::new(stream))
        .await
        .map_err(|e| HboneError::Lost { to, detail: e.to_string() })?;
    let id = inner.next_id();
    let (share, source) = (dialer.share(), dialer.clone());
    let shared = Arc::new(ConnShared::new(inner));
    let driver = {
        let (shared, pool) = (shared.clone(), Arc::downgrade(inner));
        let sweep = {
            let (shared, pool) = (shared.clone(), pool.clone());
            move || {
                if let Some(pool) = pool.upgrade() {
                    pool.evict_if_idle(id, &shared);
                }
            }
        };
        let sweep_every = (limits.idle.min(limits.spare_idle) / 4).max(Duration::from_millis(10));
        let connections = move || source.connections();
        Share::new(share, async move {
            let closed =
                driver::drive(connection, fault, shared.clone(), connections, sweep_every, sweep).await;
            tracing::debug!(%to, detail = closed.detail, "tunnel connection ended");
            if let Some(pool) = pool.upgrade() {
                pool.remove(id);
            }
            shared.closed.send_replace(Some(closed));
        })
    };
    let expires = own.not_after().min(peer.not_after);
    Ok(Dialed { send, shared, peer: Arc::new(peer), expires, driver: Box::pin(driver), id })
}
