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
use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};
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
/// [`stats_router`] has. Answers only to a loopback name in `Host`, so that no web page can reach it by a
/// name of its own that resolves to 127.0.0.1.
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
        Health::GoodBut(note) => format!("ok\n{note}\n").into_response(),
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
    Ok(serve(Listener::bind(what, endpoint)?, router, stop))
}

/// A listening socket of either kind.
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix socket.
    Unix(UnixListener),
}

impl Listener {
    /// Listens.
    pub fn bind(what: &'static str, endpoint: &Endpoint) -> Result<Self, ServeError> {
        let failed = |at: String| move |source| ServeError::Listen { what, at, source };
        Ok(match endpoint {
            Endpoint::Tcp(addr) => Self::Tcp(listen_tcp(*addr).map_err(failed(addr.to_string()))?),
            Endpoint::Unix(path) => {
                Self::Unix(net::unix::listen(path).map_err(failed(path.display().to_string()))?)
            }
        })
    }

    /// Goes on with a predecessor's socket. An error if it is not for this endpoint.
    pub fn adopt(endpoint: &Endpoint, socket: OwnedFd) -> io::Result<Self> {
        let Endpoint::Tcp(addr) = endpoint else {
            return Ok(Self::Unix(net::unix::adopt(socket)?));
        };
        let listener = std::net::TcpListener::from(socket);
        if listener.local_addr()? != *addr {
            return Err(io::Error::new(io::ErrorKind::AddrNotAvailable, "it listens elsewhere"));
        }
        listener.set_nonblocking(true)?;
        Ok(Self::Tcp(TcpListener::from_std(listener)?))
    }

    /// The same socket once more, for a successor.
    pub fn share(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Tcp(listener) => listener.as_fd().try_clone_to_owned(),
            Self::Unix(listener) => listener.as_fd().try_clone_to_owned(),
        }
    }
}

fn listen_tcp(addr: SocketAddr) -> io::Result<TcpListener> {
    let listener = std::net::TcpListener::bind(addr)?;
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// Serves until `stop`; ends after the last connection has.
pub async fn serve(listener: Listener, router: Router, stop: CancellationToken) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::{Status, client};
    use serde_json::{Value, json};
    use std::sync::Mutex;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    #[derive(Default)]
    struct Fake {
        level: Mutex<String>,
    }

    impl AdminState for Fake {
        fn live(&self) -> Health {
            Health::GoodBut("configuration from disk, age 7 s".into())
        }
        fn ready(&self) -> Health {
            Health::Bad(vec!["BPF is not in step".into(), "no configuration".into()])
        }
        fn status(&self) -> Status {
            Status { node: "node-a".into(), ..Status::default() }
        }
        fn dump(&self) -> Value {
            json!({ "workloads": [] })
        }
        fn set_log_level(&self, filter: &str) -> Result<(), BadRequest> {
            if filter == "loud" {
                return Err(BadRequest(
                    "\"loud\" is no level; use off, error, warn, info, debug or trace".into(),
                ));
            }
            *self.level.lock().unwrap() = filter.to_owned();
            Ok(())
        }
        fn set_bpf_log_level(&self, level: &str) -> Result<(), BadRequest> {
            *self.level.lock().unwrap() = format!("bpf {level}");
            Ok(())
        }
        fn metrics(&self) -> Result<String, std::fmt::Error> {
            Ok("# EOF\n".into())
        }
    }

    async fn text(result: Result<hyper::body::Bytes, client::ClientError>) -> String {
        match result {
            Ok(body) => String::from_utf8(body.to_vec()).unwrap(),
            Err(e) => format!("error: {e}"),
        }
    }

    #[tokio::test]
    async fn the_admin_interface_over_its_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let state = Arc::new(Fake::default());
        let stop = CancellationToken::new();
        let endpoint = Endpoint::Unix(path.clone());
        let running =
            tokio::spawn(bind("admin", &endpoint, admin_router(Arc::clone(&state)), stop.clone()).unwrap());

        let status: Status = serde_json::from_str(&text(client::get(&path, "/status").await).await).unwrap();
        assert_eq!(status.node, "node-a");
        assert_eq!(text(client::get(&path, "/dump").await).await, "{\"workloads\":[]}");
        assert_eq!(
            text(client::get(&path, "/healthz/live").await).await,
            "ok\nconfiguration from disk, age 7 s\n"
        );
        assert_eq!(
            text(client::get(&path, "/healthz/ready").await).await,
            "error: mesh-node answered 503 Service Unavailable: BPF is not in step\nno configuration"
        );
        assert_eq!(text(client::get(&path, "/metrics").await).await, "# EOF\n");
        assert_eq!(text(client::post(&path, "/logging?level=debug").await).await, "ok\n");
        assert_eq!(*state.level.lock().unwrap(), "debug");
        assert_eq!(text(client::post(&path, "/bpf/logging?level=info").await).await, "ok\n");
        assert_eq!(*state.level.lock().unwrap(), "bpf info");
        for (request, part) in [("/logging", "400"), ("/logging?level=loud", "is no level"), ("/x", "404")] {
            let answer = text(client::post(&path, request).await).await;
            assert!(answer.contains(part), "{request}: {answer}");
        }
        assert!(text(client::get(&path, "/logging?level=off").await).await.contains("405"));

        let second = bind("admin", &endpoint, admin_router(state), stop.clone());
        assert!(second.is_err(), "two daemons share a socket");
        stop.cancel();
        running.await.unwrap();
        let away = text(client::get(&path, "/status").await).await;
        assert!(away.contains("no mesh-node answers on"), "{away}");
    }

    #[tokio::test]
    async fn metrics_over_tcp_and_no_admin_by_a_foreign_name() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let router = admin_router(Arc::new(Fake::default()));
        let stop = CancellationToken::new();
        let running = tokio::spawn(serve(Listener::Tcp(listener), router, stop.clone()));
        for (host, path, status) in [
            ("localhost:15000", "/status", "200"),
            ("127.0.0.1:15000", "/status", "200"),
            ("[::1]:15000", "/status", "200"),
            ("rebound.example:15000", "/status", "403"),
            ("rebound.example:15000", "/metrics", "403"),
            ("127.0.0.1.rebound.example", "/status", "403"),
        ] {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{host}: {answer}");
        }
        stop.cancel();
        running.await.unwrap();
    }
}
