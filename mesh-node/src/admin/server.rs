//! The HTTP servers. Plain HTTP/1.1, with bounds on connections and on the time that a request may take.

use super::{AdminState, BadRequest, Health};
use crate::{metrics, net};
use axum::{
    Json, Router,
    extract::{Query, Request, State},
    http::{StatusCode, header},
    middleware::{Next, from_fn},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use std::{collections::HashMap, io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Most connections that a server holds at a time; more wait in the accept queue.
const MAX_CONNECTIONS: usize = 64;
/// Longest that a client may take to send a request's head.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest life of a connection. Prometheus keeps one open between scrapes and simply makes a new one.
const CONNECTION_LIFE: Duration = Duration::from_secs(300);

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A Unix socket, made with mode 0600; what was at the path before goes.
    Unix(PathBuf),
}

/// Why a server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("cannot serve {what} on {at}; is another mesh-node running?")]
    Listen {
        /// Metrics or admin.
        what: &'static str,
        /// Address or path.
        at: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// `/metrics`, `/healthz/live` and `/healthz/ready`.
pub fn stats_router<S: AdminState>(state: Arc<S>) -> Router {
    Router::new()
        .route("/metrics", get(serve_metrics::<S>))
        .route("/stats/prometheus", get(serve_metrics::<S>))
        .route("/healthz/live", get(|State(s): State<Arc<S>>| async move { health(s.live()) }))
        .route("/healthz/ready", get(|State(s): State<Arc<S>>| async move { health(s.ready()) }))
        .with_state(state)
}

/// `GET /status`, `GET /dump`, `POST /logging?level=` and `POST /bpf/logging?level=`, and what
/// [`stats_router`] has. Answers only to a loopback name in `Host`, so that no web page can reach it by a name of
/// its own that resolves to 127.0.0.1.
pub fn admin_router<S: AdminState>(state: Arc<S>) -> Router {
    Router::new()
        .route("/status", get(|State(s): State<Arc<S>>| async move { Json(s.status()) }))
        .route("/dump", get(|State(s): State<Arc<S>>| async move { Json(s.dump()) }))
        .route(
            "/logging",
            post(|State(s): State<Arc<S>>, q: Level| async move { level(&q, |l| s.set_log_level(l)) }),
        )
        .route(
            "/bpf/logging",
            post(|State(s): State<Arc<S>>, q: Level| async move { level(&q, |l| s.set_bpf_log_level(l)) }),
        )
        .with_state(Arc::clone(&state))
        .merge(stats_router(state))
        .layer(from_fn(only_local_host))
}

type Level = Query<HashMap<String, String>>;

fn level(query: &Level, set: impl FnOnce(&str) -> Result<(), BadRequest>) -> Response {
    let Some(level) = query.get("level") else {
        return (StatusCode::BAD_REQUEST, "say which, for example ?level=info\n").into_response();
    };
    match set(level) {
        Ok(()) => "ok\n".into_response(),
        Err(e) => (StatusCode::BAD_REQUEST, format!("{e}\n")).into_response(),
    }
}

fn health(health: Health) -> Response {
    match health {
        Health::Good => "ok\n".into_response(),
        Health::Bad(reasons) => (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n").into_response(),
    }
}

async fn serve_metrics<S: AdminState>(State(state): State<Arc<S>>) -> Response {
    match state.metrics() {
        Ok(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(e) => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("cannot write the metrics: {e}\n")).into_response()
        }
    }
}

async fn only_local_host(request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or_default();
    if is_local_host(host) {
        next.run(request).await
    } else {
        (StatusCode::FORBIDDEN, "the admin interface answers to localhost only\n").into_response()
    }
}

/// Whether a `Host` value names this machine's loopback.
fn is_local_host(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let ip = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || ip.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Serves `router` on `endpoint` until `stop`. Returns once it listens; the future inside the result runs the
/// server and ends after the last connection has.
pub fn bind(
    what: &'static str,
    endpoint: &Endpoint,
    router: Router,
    stop: CancellationToken,
) -> Result<impl Future<Output = ()> + Send + use<>, ServeError> {
    let failed = |at: String| move |source| ServeError::Listen { what, at, source };
    let listener = match endpoint {
        Endpoint::Tcp(addr) => Listener::Tcp(listen_tcp(*addr).map_err(failed(addr.to_string()))?),
        Endpoint::Unix(path) => {
            Listener::Unix(net::unix::listen(path).map_err(failed(path.display().to_string()))?)
        }
    };
    Ok(serve(listener, router, stop))
}

fn listen_tcp(addr: SocketAddr) -> io::Result<TcpListener> {
    let listener = std::net::TcpListener::bind(addr)?;
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

async fn serve(listener: Listener, router: Router, stop: CancellationToken) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let tasks = TaskTracker::new();
    loop {
        let permit = tokio::select! {
            permit = Arc::clone(&permits).acquire_owned() => permit,
            () = stop.cancelled() => break,
        };
        let Ok(permit) = permit else { break };
        let accepted = tokio::select! {
            accepted = accept(&listener) => accepted,
            () = stop.cancelled() => break,
        };
        match accepted {
            Ok(io) => {
                let connection = serve_connection(io, router.clone(), stop.clone());
                tasks.spawn(async move {
                    connection.await;
                    drop(permit);
                });
            }
            Err(e) => {
                tracing::warn!(error = %e, "cannot accept an admin connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    tasks.close();
    tasks.wait().await;
}

/// A connection of either kind.
trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

async fn accept(listener: &Listener) -> io::Result<Box<dyn Io>> {
    Ok(match listener {
        Listener::Tcp(l) => Box::new(l.accept().await?.0),
        Listener::Unix(l) => Box::new(l.accept().await?.0),
    })
}

async fn serve_connection(io: Box<dyn Io>, router: Router, stop: CancellationToken) {
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(io), TowerToHyperService::new(router));
    tokio::pin!(connection);
    let life = tokio::time::sleep(CONNECTION_LIFE);
    tokio::pin!(life);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = stop.cancelled() => finish(connection.as_mut()).await,
        () = &mut life => finish(connection.as_mut()).await,
    };
    if let Err(e) = ended {
        tracing::debug!(error = %e, "an admin connection ended early");
    }
}

type Connection = hyper::server::conn::http1::Connection<TokioIo<Box<dyn Io>>, TowerToHyperService<Router>>;

/// Lets the request in progress end, for a while.
async fn finish(mut connection: std::pin::Pin<&mut Connection>) -> hyper::Result<()> {
    connection.as_mut().graceful_shutdown();
    tokio::time::timeout(HEADER_TIMEOUT, connection).await.unwrap_or(Ok(()))
}
