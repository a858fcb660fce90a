//! What can go wrong with a tunnel, seen from each side.

use crate::tls::TlsReject;
use http::StatusCode;
use std::{io, net::SocketAddr, sync::Arc, time::Duration};

/// Who has to act on an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Blame {
    /// This node: its limits or its certificate.
    Local,
    /// The path between the nodes.
    Network,
    /// The node or the workload at the other end.
    Peer,
    /// A policy: nothing is broken.
    Policy,
}

/// Why a tunnel could not be opened. Cheap to clone: all who waited for one dial get the same.
#[derive(Clone, Debug, thiserror::Error)]
pub enum HboneError {
    /// No TCP connection to the peer.
    #[error("cannot connect to {to}")]
    Dial {
        /// The address dialled.
        to: SocketAddr,
        /// The system's error.
        #[source]
        source: Arc<io::Error>,
    },
    /// The TCP connection took too long.
    #[error("no connection to {to} within {} ms", .after.as_millis())]
    DialTimeout {
        /// The address dialled.
        to: SocketAddr,
        /// The limit.
        after: Duration,
    },
    /// The handshake failed, on our side or by the peer's alert.
    #[error("no secure connection to {to}")]
    Tls {
        /// The address dialled.
        to: SocketAddr,
        /// Why.
        #[source]
        reject: TlsReject,
    },
    /// The peer answered the CONNECT with something else than 200.
    #[error("{to} refused the tunnel with status {status}{}", status_hint(*.status))]
    Status {
        /// The address dialled.
        to: SocketAddr,
        /// 400 bad request, 401 policy, 503 the backend cannot be reached.
        status: u16,
    },
    /// The peer reset the stream before it answered.
    #[error("{to} reset the tunnel: {reason}")]
    Reset {
        /// The address dialled.
        to: SocketAddr,
        /// HTTP/2's word for it.
        reason: String,
    },
    /// The connection broke before the answer.
    #[error("the connection to {to} was lost: {detail}")]
    Lost {
        /// The address dialled.
        to: SocketAddr,
        /// What ended it.
        detail: String,
    },
    /// No answer to the CONNECT in time.
    #[error("{to} did not answer within {} ms", .after.as_millis())]
    Timeout {
        /// The address dialled.
        to: SocketAddr,
        /// The limit.
        after: Duration,
    },
    /// The pool is at its bound.
    #[error("the tunnel pool is full: {what}")]
    Full {
        /// Which bound.
        what: &'static str,
    },
    /// A header of the request is not valid HTTP.
    #[error("the CONNECT request cannot be built: {0}")]
    Request(String),
}

fn status_hint(status: u16) -> &'static str {
    match status {
        400 => " (bad request)",
        401 => " (denied by policy)",
        503 => " (the workload cannot be reached)",
        _ => "",
    }
}

impl HboneError {
    /// Who has to act.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Dial { .. } | Self::DialTimeout { .. } | Self::Lost { .. } | Self::Timeout { .. } => {
                Blame::Network
            }
            Self::Tls { reject, .. } if reject.reason == crate::tls::RejectReason::OwnCertificate => {
                Blame::Local
            }
            Self::Status { status: 401, .. } => Blame::Policy,
            Self::Tls { .. } | Self::Status { .. } | Self::Reset { .. } => Blame::Peer,
            Self::Full { .. } | Self::Request(_) => Blame::Local,
        }
    }

    /// Whether another endpoint of the same service may be tried: nothing has been forwarded, and the failure is one
    /// of this endpoint.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Dial { .. } | Self::DialTimeout { .. } | Self::Lost { .. } | Self::Reset { .. } => true,
            Self::Tls { reject, .. } => reject.reason != crate::tls::RejectReason::OwnCertificate,
            Self::Status { status, .. } => *status == 503,
            Self::Timeout { .. } | Self::Full { .. } | Self::Request(_) => false,
        }
    }

    /// A stable word for metric labels and logs; TLS failures give their own reason.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Dial { .. } => "dial",
            Self::DialTimeout { .. } => "dial_timeout",
            Self::Tls { reject, .. } => reject.reason.label(),
            Self::Status { status: 400, .. } => "bad_request",
            Self::Status { status: 401, .. } => "denied",
            Self::Status { status: 503, .. } => "unavailable",
            Self::Status { .. } => "status",
            Self::Reset { .. } => "reset",
            Self::Lost { .. } => "connection_lost",
            Self::Timeout { .. } => "timeout",
            Self::Full { .. } => "pool_full",
            Self::Request(_) => "request",
        }
    }
}

/// Why a server does not open a tunnel. Decides about the status that the client gets.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Not a CONNECT.
    #[error("the method is {0}, not CONNECT")]
    Method(String),
    /// The authority is not `IP:PORT` or `HOST:PORT`.
    #[error("the authority {0:?} is not ADDRESS:PORT")]
    Authority(String),
    /// The authority names another address than the one that the connection came to.
    #[error("the authority {authority} is not on the address {local} that was dialled")]
    AddressMismatch {
        /// What was asked for.
        authority: String,
        /// Where the connection came to.
        local: std::net::IpAddr,
    },
    /// A policy says no.
    #[error("denied by {by}")]
    Denied {
        /// The policy's key, or what else denied it.
        by: String,
    },
    /// The workload does not accept the connection.
    #[error("cannot connect to the workload at {to}")]
    Unavailable {
        /// The workload's address.
        to: SocketAddr,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// This node cannot take it now.
    #[error("not now: the limit on {0} of the pod is reached")]
    Overloaded(&'static str),
}

impl Refusal {
    /// The status for the client.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Method(_) | Self::Authority(_) | Self::AddressMismatch { .. } => StatusCode::BAD_REQUEST,
            Self::Denied { .. } => StatusCode::UNAUTHORIZED,
            Self::Unavailable { .. } | Self::Overloaded(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// A stable word for metric labels and logs.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Method(_) => "bad_method",
            Self::Authority(_) => "bad_authority",
            Self::AddressMismatch { .. } => "address_mismatch",
            Self::Denied { .. } => "denied",
            Self::Unavailable { .. } => "unavailable",
            Self::Overloaded(_) => "overloaded",
        }
    }
}
