//! The client of the admin interface, over the Unix socket.

use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Method, Request, StatusCode, body::Bytes};
use hyper_util::rt::TokioIo;
use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::net::UnixStream;

/// Longest that a request may take.
const TIMEOUT: Duration = Duration::from_secs(15);
/// Longest answer that is read; a dump of a large mesh has a few megabytes.
const MAX_ANSWER: usize = 256 * 1024 * 1024;

/// Why a request to the daemon failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no mesh-node answers on {}; is it running, and are you root? (--admin-socket gives another path)", .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The exchange broke.
    #[error("the exchange with mesh-node on {} failed", .path.display())]
    Http {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No answer in time.
    #[error("mesh-node on {} did not answer within {} s", .path.display(), TIMEOUT.as_secs())]
    Timeout {
        /// The socket.
        path: PathBuf,
    },
    /// The daemon answered with an error.
    #[error("mesh-node answered {status}: {message}")]
    Status {
        /// The HTTP status.
        status: StatusCode,
        /// Its explanation.
        message: String,
    },
}

/// `GET path` from the daemon behind `socket`: the body of a successful answer.
pub async fn get(socket: &Path, path: &str) -> Result<Bytes, ClientError> {
    request(socket, Method::GET, path).await
}

/// `POST path`, without a body.
pub async fn post(socket: &Path, path: &str) -> Result<Bytes, ClientError> {
    request(socket, Method::POST, path).await
}

async fn request(socket: &Path, method: Method, path: &str) -> Result<Bytes, ClientError> {
    tokio::time::timeout(TIMEOUT, exchange(socket, method, path))
        .await
        .unwrap_or_else(|_| Err(ClientError::Timeout { path: socket.into() }))
}

async fn exchange(socket: &Path, method: Method, path: &str) -> Result<Bytes, ClientError> {
    let http =
        |e: Box<dyn std::error::Error + Send + Sync>| ClientError::Http { path: socket.into(), source: e };
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|source| ClientError::Connect { path: socket.into(), source })?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| http(e.into()))?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(hyper::header::HOST, "localhost")
        .body(Empty::<Bytes>::new())
        .map_err(|e| http(e.into()))?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(|e| http(e.into()))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(http)?.to_bytes();
        if status.is_success() {
            Ok(body)
        } else {
            Err(ClientError::Status { status, message: String::from_utf8_lossy(&body).trim().to_owned() })
        }
    };
    tokio::pin!(answer);
    // The connection is driven beside the request; when it ends first, the request knows more about the
    // reason.
    tokio::select! {
        answer = &mut answer => answer,
        _ = connection => answer.await,
    }
}
