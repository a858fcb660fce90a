//! The wire between `mesh-cni` and the daemon: one request and one answer per connection, each a big-endian
//! `u32` length and that many bytes of JSON. For ADD, CHECK and DEL the first byte carries the descriptor of
//! the pod's network namespace (SCM_RIGHTS).
//!
//! Deliberately absent: I/O; the plugin does it blocking, the server with tokio.

use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// Version of this protocol. The daemon answers a request of another version with [`ErrorKind::Version`].
pub const VERSION: u32 = 1;
/// Most bytes of JSON in a message.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// Where the daemon listens unless it is told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/nodemesh/cni.sock";

/// A pod's sandbox as the container runtime names it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sandbox {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `K8S_POD_NAMESPACE`.
    pub namespace: String,
    /// `K8S_POD_NAME`.
    pub name: String,
    /// `K8S_POD_UID`; empty from runtimes that do not pass it.
    #[serde(default)]
    pub uid: String,
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`].
    pub version: u32,
    /// What to do.
    #[serde(flatten)]
    pub op: Op,
}

/// The operations; each is one of CNI's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum Op {
    /// Enrol the pod if it is in the mesh. Needs the descriptor.
    Add {
        /// The pod.
        sandbox: Sandbox,
        /// Its addresses; empty to have the daemon read them in the namespace.
        #[serde(default)]
        addresses: Vec<IpAddr>,
        /// How long the daemon may take, in milliseconds.
        #[serde(rename = "timeoutMs")]
        timeout_ms: u64,
    },
    /// Release the pod. The descriptor may be missing.
    Del {
        /// The pod.
        sandbox: Sandbox,
    },
    /// Is the pod captured if it has to be? Needs the descriptor.
    Check {
        /// The pod.
        sandbox: Sandbox,
    },
    /// Can pods be added?
    Status,
    /// Release every pod added by CNI whose container is not listed.
    Gc {
        /// Containers that exist.
        keep: Vec<String>,
    },
}

impl Op {
    /// The name for logs and metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Add { .. } => "add",
            Self::Del { .. } => "del",
            Self::Check { .. } => "check",
            Self::Status => "status",
            Self::Gc { .. } => "gc",
        }
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Response {
    /// Done.
    Ok(Done),
    /// Not done.
    Error(Failure),
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "done", rename_all = "camelCase")]
pub enum Done {
    /// The pod is captured.
    Captured,
    /// The pod is none of the mesh's.
    NotInMesh {
        /// Why.
        reason: String,
    },
    /// The operation has no result.
    Nothing,
    /// GC: how many pods were released.
    Released {
        /// The number.
        pods: usize,
    },
}

/// Why it was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind of failure.
    pub kind: ErrorKind,
    /// One line that names the pod.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
}

/// What kind of failure it is; the plugin maps it to CNI's error codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ErrorKind {
    /// May work later without anybody's help.
    TryAgain,
    /// The request makes no sense.
    Invalid,
    /// Somebody has to do something.
    Failed,
    /// The daemon cannot take pods at the moment.
    NotReady,
    /// The two speak different versions.
    Version,
}

/// Why a message cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// Too long or empty.
    #[error("a message of {0} bytes; it must have 1 to {MAX_MESSAGE}")]
    Length(usize),
    /// Not the expected JSON.
    #[error("a message that is not the expected JSON")]
    Json(#[from] serde_json::Error),
}

/// Puts the length before the JSON of `message`.
pub fn encode(message: &impl Serialize) -> Result<Vec<u8>, ProtocolError> {
    let mut out = vec![0; 4];
    serde_json::to_writer(&mut out, message)?;
    let len = length(u32::try_from(out.len() - 4).unwrap_or(u32::MAX).to_be_bytes())?;
    out[..4].copy_from_slice(&(len as u32).to_be_bytes());
    Ok(out)
}

/// The length in a message's first 4 bytes, checked.
pub fn length(prefix: [u8; 4]) -> Result<usize, ProtocolError> {
    match u32::from_be_bytes(prefix) as usize {
        len @ 1..=MAX_MESSAGE => Ok(len),
        len => Err(ProtocolError::Length(len)),
    }
}

/// Reads the version out of a request before the rest of it, which another version may write differently.
pub fn version_of(json: &[u8]) -> Result<u32, ProtocolError> {
    #[derive(Deserialize)]
    struct Head {
        version: u32,
    }
    Ok(serde_json::from_slice::<Head>(json)?.version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_round_trip() {
        let sandbox = Sandbox {
            container_id: "c1".into(),
            namespace: "shop".into(),
            name: "cart".into(),
            uid: "u-1".into(),
        };
        for op in [
            Op::Add {
                sandbox: sandbox.clone(),
                addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
                timeout_ms: 10,
            },
            Op::Del { sandbox: sandbox.clone() },
            Op::Check { sandbox },
            Op::Status,
            Op::Gc { keep: vec!["a".into()] },
        ] {
            let request = Request { version: VERSION, op };
            let wire = encode(&request).unwrap();
            let len = length(*wire.first_chunk().unwrap()).unwrap();
            assert_eq!(len, wire.len() - 4);
            assert_eq!(version_of(&wire[4..]).unwrap(), VERSION);
            assert_eq!(serde_json::from_slice::<Request>(&wire[4..]).unwrap(), request);
        }
        let answer = Response::Ok(Done::NotInMesh { reason: "opted out".into() });
        let wire = encode(&answer).unwrap();
        assert_eq!(serde_json::from_slice::<Response>(&wire[4..]).unwrap(), answer);
    }

    #[test]
    fn lengths_are_bounded() {
        assert!(length([0; 4]).is_err());
        assert_eq!(length((MAX_MESSAGE as u32).to_be_bytes()).unwrap(), MAX_MESSAGE);
        assert!(length((MAX_MESSAGE as u32 + 1).to_be_bytes()).is_err());
        let keep = vec!["x".repeat(64); 2000];
        assert!(matches!(
            encode(&Request { version: VERSION, op: Op::Gc { keep } }),
            Err(ProtocolError::Length(_))
        ));
    }

    #[test]
    fn a_later_version_is_recognised_whatever_else_it_says() {
        assert_eq!(version_of(br#"{"version":7,"op":"teleport"}"#).unwrap(), 7);
        assert!(version_of(b"[]").is_err());
    }
}
