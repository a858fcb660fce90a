//! The daemon's end of the Unix socket that `mesh-cni` talks to: one request per connection.

use super::{
    Added, EnrollError, Enroller, Mesh, PodInfo,
    protocol::{self, Done, ErrorKind, Failure, Op, Request, Response, Sandbox, VERSION},
};
use crate::net::{NetNs, fdpass};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use std::{io, os::fd::OwnedFd, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Most requests in progress; a node's pods may all start at once. More wait in the accept queue.
const MAX_REQUESTS: usize = 512;
/// Longest that a client may take to send its request, and to take the answer.
const IO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the loop waits after an accept error.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why a request could not be read.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("the connection failed")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Protocol(#[from] protocol::ProtocolError),
    #[error("the request did not come in time")]
    Timeout,
    #[error("the request is of protocol version {0}, this mesh-node speaks version {VERSION}")]
    Version(u32),
    #[error("user {0} may not use this socket")]
    Peer(u32),
}

/// Serves `listener` (see [`crate::net::unix::listen`]) until `stop`, and then lets the requests in progress
/// end.
pub async fn serve<M: Mesh>(listener: UnixListener, enroller: Arc<Enroller<M>>, stop: CancellationToken) {
    let permits = Arc::new(Semaphore::new(MAX_REQUESTS));
    let tasks = TaskTracker::new();
    loop {
        let permit = tokio::select! {
            permit = Arc::clone(&permits).acquire_owned() => permit,
            () = stop.cancelled() => break,
        };
        let Ok(permit) = permit else { break };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => break,
        };
        match accepted {
            Ok((stream, _)) => {
                let enroller = Arc::clone(&enroller);
                // In a task of its own: an enrolment that has begun is not broken off when its client goes.
                tasks.spawn(async move {
                    handle(stream, &enroller).await;
                    drop(permit);
                });
            }
            Err(e) => {
                tracing::warn!(error = %e, "cannot accept a CNI request");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    tasks.close();
    tasks.wait().await;
}

async fn handle<M: Mesh>(mut stream: UnixStream, enroller: &Enroller<M>) {
    let response = match read(&mut stream).await {
        Ok((request, fd)) => {
            let op = request.op.name();
            let start = Instant::now();
            let response = match perform(request.op, fd, enroller).await {
                Ok((done, outcome)) => {
                    enroller.metrics().enrolled(op, outcome, start.elapsed());
                    Response::Ok(done)
                }
                Err(e) => {
                    enroller.metrics().enrolled(op, e.label(), start.elapsed());
                    tracing::warn!(op, error = e.full_message(), remedy = e.remedy(), "a CNI request failed");
                    Response::Error(failure(&e))
                }
            };
            tracing::debug!(op, ?response, took = ?start.elapsed(), "CNI");
            response
        }
        Err(e) => {
            tracing::warn!(error = %e, "a CNI request cannot be read");
            if matches!(e, RequestError::Io(_) | RequestError::Peer(_)) {
                return;
            }
            let kind = match e {
                RequestError::Version(_) => ErrorKind::Version,
                _ => ErrorKind::Invalid,
            };
            let remedy = "use the mesh-cni that belongs to this mesh-node".to_owned();
            Response::Error(Failure { kind, message: e.to_string(), remedy })
        }
    };
    match protocol::encode(&response) {
        Ok(bytes) => {
            // The client may have given up; what was done stays done, and CNI's DEL follows.
            let _ = timeout(IO_TIMEOUT, stream.write_all(&bytes)).await;
        }
        Err(e) => tracing::error!(error = %e, "a CNI answer cannot be encoded"),
    }
}

fn failure(e: &EnrollError) -> Failure {
    Failure { kind: e.kind(), message: e.full_message(), remedy: e.remedy().to_owned() }
}

async fn read(stream: &mut UnixStream) -> Result<(Request, Option<OwnedFd>), RequestError> {
    // The socket's mode keeps others out already; this holds even if somebody changes the mode.
    let uid = getsockopt(&*stream, PeerCredentials).map_err(io::Error::from)?.uid();
    if uid != 0 && uid != nix::unistd::geteuid().as_raw() {
        return Err(RequestError::Peer(uid));
    }
    timeout(IO_TIMEOUT, async {
        let mut prefix = [0; 4];
        let mut have = 0;
        let mut fd = None;
        while have < prefix.len() {
            let (n, received) =
                stream.async_io(Interest::READABLE, || fdpass::recv(&*stream, &mut prefix[have..])).await?;
            if n == 0 {
                return Err(RequestError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
            have += n;
            fd = fd.or(received);
        }
        let mut json = vec![0; protocol::length(prefix)?];
        stream.read_exact(&mut json).await?;
        match protocol::version_of(&json)? {
            VERSION => Ok((serde_json::from_slice(&json).map_err(protocol::ProtocolError::from)?, fd)),
            other => Err(RequestError::Version(other)),
        }
    })
    .await
    .unwrap_or(Err(RequestError::Timeout))
}

/// Does what was asked for; the string is the outcome as a metric label.
async fn perform<M: Mesh>(
    op: Op,
    fd: Option<OwnedFd>,
    enroller: &Enroller<M>,
) -> Result<(Done, &'static str), EnrollError> {
    match op {
        Op::Add { sandbox, addresses, timeout_ms } => {
            let info = PodInfo { addrs: addresses, ..pod_info(sandbox) };
            let netns =
                open(fd, &info)?.ok_or_else(|| EnrollError::NoNetNs { pod: Box::new(info.clone()) })?;
            let wait = Duration::from_millis(timeout_ms);
            Ok(match enroller.add(info, netns, wait).await? {
                Added::Captured => (Done::Captured, "captured"),
                Added::NotInMesh(reason) => (Done::NotInMesh { reason: reason.to_string() }, "not_in_mesh"),
            })
        }
        Op::Del { sandbox } => {
            let info = pod_info(sandbox);
            // A namespace that cannot be used any more does not keep the pod from being released.
            let netns = open(fd, &info).ok().flatten().map(|ns| ns.id());
            let pods = enroller.del(&info, netns).await;
            Ok((Done::Released { pods }, if pods == 0 { "unknown_pod" } else { "released" }))
        }
        Op::Check { sandbox } => {
            let info = pod_info(sandbox);
            let netns = open(fd, &info)?.map(|ns| ns.id());
            enroller.check(&info, netns).await?;
            Ok((Done::Nothing, "ok"))
        }
        Op::Status => match enroller.not_ready() {
            None => Ok((Done::Nothing, "ok")),
            Some(why) => Err(EnrollError::NotReady { why }),
        },
        Op::Gc { keep } => {
            let pods = enroller.gc(&keep).await;
            Ok((Done::Released { pods }, "ok"))
        }
    }
}

fn open(fd: Option<OwnedFd>, pod: &PodInfo) -> Result<Option<NetNs>, EnrollError> {
    fd.map(NetNs::from_fd)
        .transpose()
        .map_err(|source| EnrollError::NetNs { pod: Box::new(pod.clone()), source })
}

fn pod_info(sandbox: Sandbox) -> PodInfo {
    PodInfo {
        namespace: sandbox.namespace,
        name: sandbox.name,
        uid: sandbox.uid,
        container_id: sandbox.container_id,
        addrs: Vec::new(),
    }
}
