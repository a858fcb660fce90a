//! The server side of one connection: requests in, tunnels out.

use super::{
    CONNECTION_WINDOW, MAX_FRAME, MAX_HEADER_LIST, PING_TIMEOUT, SEND_BUFFER, SERVER_STREAMS,
    driver::{KeepAlive, stream_window_for, window_for},
    error::Refusal,
    gather::Gather,
    headers::ConnectRequest,
    stream::HboneStream,
};
use crate::{fair::Share, tls::Peer};
use bytes::Bytes;
use h2::{
    RecvStream,
    server::{Builder, SendResponse},
};
use http::{Request, Response, StatusCode};
use std::{
    future::{Future, poll_fn},
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::JoinSet,
    time::{Instant, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// How long a client may take for its half of the HTTP/2 preface.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(10);

/// What becomes of the requests on one connection. Made by the caller for one accepted connection, so that it can hold
/// what is known about it: the workload, the source address.
pub trait Handler: Send + Sync + 'static {
    /// A connection to the workload that is ready to be spliced.
    type Upstream: Send + 'static;

    /// Decides about a request and connects to the workload. Nothing has been answered yet. Dropped when the client
    /// gives up.
    fn connect(
        &self,
        peer: &Arc<Peer>,
        request: ConnectRequest,
    ) -> impl Future<Output = Result<Self::Upstream, Refusal>> + Send;

    /// Carries the tunnel to its end; the client has its 200.
    fn splice(&self, upstream: Self::Upstream, stream: HboneStream) -> impl Future<Output = ()> + Send;

    /// Under which key the connection takes part in the shares of its worker (`crate::fair`).
    fn share(&self) -> u64 {
        0
    }

    /// Connections that the workload has in all; their number decides about the windows.
    fn connections(&self) -> usize {
        1
    }

    /// Whether connections without streams should make room soon.
    fn crowded(&self) -> bool {
        false
    }

    /// Told when the connection is ended because it carried nothing.
    fn idled(&self) {}

    /// Told of every request that gets no tunnel, for metrics and logs; those too that [`Handler::connect`] never saw.
    fn refused(&self, peer: &Arc<Peer>, refusal: &Refusal);
}

/// What a server needs to know about a connection.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// The address that the client dialled. An authority that is an address has to be on it.
    pub local_ip: Option<IpAddr>,
    /// How long it may be without streams.
    pub idle: Duration,
    /// The same when [`Handler::crowded`].
    pub crowded_idle: Duration,
    /// When cancelled: GOAWAY, no new streams, and the connection ends with its last stream.
    pub drain: CancellationToken,
}

/// How a connection ended.
#[derive(Debug)]
pub enum ServeEnd {
    /// The client closed it, or it was drained.
    Closed,
    /// It broke.
    Broken(h2::Error),
    /// The client did not answer a PING.
    Dead,
    /// It carried nothing for too long.
    Idle,
    /// The client did not begin to speak HTTP/2 in time.
    NoPreface,
}

/// Serves one authenticated connection until it ends and all of its tunnels have ended. Dropping the future resets the
/// tunnels.
pub async fn serve<IO, H>(io: IO, peer: Peer, handler: Arc<H>, options: ServeOptions) -> ServeEnd
where
    IO: AsyncRead + AsyncWrite + Unpin,
    H: Handler,
{
    let mut stream_window = stream_window_for(handler.connections());
    let handshake = Builder::new()
        .initial_window_size(stream_window)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEADER_LIST)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_streams(SERVER_STREAMS)
        // Clients that connect and go at once (probes, scanners) are no attack at this rate.
        .max_pending_accept_reset_streams(SERVER_STREAMS as usize)
        .handshake::<_, Bytes>(Gather::new(io));
    let mut connection = match timeout(PREFACE_TIMEOUT, handshake).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return ServeEnd::Broken(error),
        Err(_) => return ServeEnd::NoPreface,
    };
    let mut alive = KeepAlive::new(connection.ping_pong());
    // The peer's identity is proven until its certificate ends; then it has to prove it again on a new connection.
    let proven_for = peer.not_after.duration_since(SystemTime::now()).unwrap_or(Duration::ZERO);
    let mut proof_ends = std::pin::pin!(sleep(proven_for));
    let peer = Arc::new(peer);
    let mut streams = JoinSet::new();
    let mut draining = false;
    let mut window = CONNECTION_WINDOW;
    let mut idle_check = interval(options.crowded_idle);
    let mut idle_since = Instant::now();
    let end = loop {
        let wanted = stream_window_for(handler.connections());
        // Refused while the peer has not acknowledged the last change; then it is tried again.
        if wanted != stream_window && connection.set_initial_window_size(wanted).is_ok() {
            stream_window = wanted;
        }
        tokio::select! {
            biased;
            () = options.drain.cancelled(), if !draining => {
                draining = true;
                connection.graceful_shutdown();
            }
            () = &mut proof_ends, if !draining => {
                draining = true;
                connection.graceful_shutdown();
            }
            () = poll_fn(|cx| alive.poll_dead(cx)) => {
                tracing::debug!(peer = %peer.id, after = ?PING_TIMEOUT, "no answer to a PING");
                break ServeEnd::Dead;
            }
            Some(_) = streams.join_next() => idle_since = Instant::now(),
            _ = idle_check.tick() => {
                let patience = if handler.crowded() { options.crowded_idle } else { options.idle };
                if streams.is_empty() && idle_since.elapsed() >= patience {
                    handler.idled();
                    break ServeEnd::Idle;
                }
            }
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    let (handler, peer) = (handler.clone(), peer.clone());
                    let key = handler.share();
                    streams.spawn(Share::new(key, stream(handler, peer, request, respond, options.local_ip)));
                    let wanted = window_for(streams.len());
                    if wanted > window {
                        window = wanted;
                        connection.set_target_window_size(window);
                    }
                }
                Some(Err(error)) => break ServeEnd::Broken(error),
                None => break ServeEnd::Closed,
            },
        }
    };
    // The tunnels must hear that the connection is gone before we wait for them.
    drop(connection);
    while streams.join_next().await.is_some() {}
    end
}

async fn stream<H: Handler>(
    handler: Arc<H>,
    peer: Arc<Peer>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    local_ip: Option<IpAddr>,
) {
    let connecting = async {
        let connect = ConnectRequest::from_request(&request, local_ip)?;
        handler.connect(&peer, connect).await
    };
    let result = tokio::select! {
        result = connecting => result,
        // The client gave up while we were connecting.
        _ = poll_fn(|cx| respond.poll_reset(cx)) => return,
    };
    let upstream = match result {
        Ok(upstream) => upstream,
        Err(refusal) => {
            handler.refused(&peer, &refusal);
            // An error means that the client is gone; it needs no answer then.
            let _ = respond.send_response(status(refusal.status()), true);
            return;
        }
    };
    let Ok(send) = respond.send_response(status(StatusCode::OK), false) else { return };
    handler.splice(upstream, HboneStream::new(send, request.into_body(), peer, None)).await;
}

fn status(status: StatusCode) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = status;
    response
}
