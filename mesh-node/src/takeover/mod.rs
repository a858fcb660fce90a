//! What a daemon and its successor say to each other during a takeover, over `RUN_DIR/takeover.sock`.
//!
//! ```text
//! successor                      predecessor
//! Hello          ->
//!                <- Welcome      with the lock of the pins; or Refused, and nothing has happened
//!   loads its programs on the pinned maps, gets its configuration
//! Freeze         ->              changes nothing any more; its connections go on
//!                <- Frozen       with the sockets of its servers
//!                <- Certificate  one for each identity
//!                <- Pod          one for each pod, with its network namespace and its listening sockets
//!   captures the pods on these sockets, serves
//! Commit         ->              accepts nothing any more, drains
//!                <- Done
//! ```
//!
//! Until Commit the predecessor serves; if the stream ends before, it goes on as if nothing had been. Each message is a
//! JSON text after its length, with descriptors where the table says so. Deliberately absent: what the two do with all
//! this, which is `role::handover` and `role::succession`.

use crate::{enroll::PodInfo, identity::Exported, net::fdpass};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde::{Deserialize, Serialize};
use std::{
    io::{self, Read as _, Write as _},
    net::IpAddr,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::Duration,
};

/// The version of the protocol. A predecessor that speaks another one refuses.
pub const PROTOCOL: u32 = 1;

/// The name of the socket in the run directory.
pub const SOCKET: &str = "takeover.sock";

/// Longest message.
const MAX_MESSAGE: usize = 1 << 20;

/// How long the other side may take for one message, unless it is waited for otherwise.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// One message; see the module's head.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Message {
    /// The successor presents itself.
    Hello {
        /// [`PROTOCOL`].
        protocol: u32,
        /// `ABI_VERSION` of its programs.
        abi: u32,
        /// Its version, for the log.
        version: String,
        /// The node that it is for.
        node: String,
    },
    /// The predecessor does not hand over.
    Refused {
        /// Why.
        reason: String,
    },
    /// The predecessor is willing.
    Welcome {
        /// Its version, for the log.
        version: String,
    },
    /// Nothing is to change any more.
    Freeze,
    /// Nothing changes any more.
    Frozen {
        /// How many certificates follow.
        certificates: usize,
        /// How many pods follow then.
        pods: usize,
        /// What the sockets are that come with this.
        servers: Vec<Server>,
    },
    /// A certificate with its key.
    Certificate {
        /// The certificate.
        certificate: Exported,
    },
    /// A pod.
    Pod {
        /// The pod.
        pod: Pod,
    },
    /// The successor serves.
    Commit,
    /// The predecessor accepts nothing any more.
    Done,
}

/// A server's listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Server {
    /// Metrics and health.
    Metrics,
    /// The admin interface over TCP.
    Admin,
    /// The admin interface's Unix socket.
    AdminSocket,
    /// The CNI plugin's.
    Cni,
    /// The one for takeovers.
    Takeover,
}

/// A pod. Its network namespace comes first among the descriptors, then the listeners of each kind, in this order.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pod {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Kubernetes name.
    pub name: String,
    /// Kubernetes UID.
    pub uid: String,
    /// The sandbox's container ID.
    pub container_id: String,
    /// Its addresses.
    pub addrs: Vec<IpAddr>,
    /// Outbound listeners.
    pub outbound: usize,
    /// Listeners on 15006.
    pub inbound_plain: usize,
    /// Listeners on 15008.
    pub inbound_hbone: usize,
    /// UDP sockets on 15053.
    #[serde(default)]
    pub dns: usize,
}

impl Pod {
    /// Without listeners.
    pub fn new(info: &PodInfo) -> Self {
        Self {
            namespace: info.namespace.clone(),
            name: info.name.clone(),
            uid: info.uid.clone(),
            container_id: info.container_id.clone(),
            addrs: info.addrs.clone(),
            outbound: 0,
            inbound_plain: 0,
            inbound_hbone: 0,
            dns: 0,
        }
    }

    /// The pod as enrolment knows it.
    pub fn info(&self) -> PodInfo {
        PodInfo {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            uid: self.uid.clone(),
            container_id: self.container_id.clone(),
            addrs: self.addrs.clone(),
        }
    }
}

/// Why a takeover does not come about. The predecessor serves on.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// The stream failed.
    #[error("the connection to the other mesh-node failed while {doing}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The predecessor does not want to.
    #[error("the running mesh-node does not hand over: {0}; stop it and start this one instead")]
    Refused(String),
    /// The other side says something else than it should.
    #[error(
        "the other mesh-node said {got} where {wanted} was due; stop it and start this one instead of taking over"
    )]
    Unexpected {
        /// What came.
        got: String,
        /// What was due.
        wanted: &'static str,
    },
    /// The other side is somebody else.
    #[error("user {0} may not take part in a takeover; mesh-node runs as root")]
    Peer(u32),
}

/// One end of the stream. Blocking: each side uses it from a thread that may wait.
#[derive(Debug)]
pub struct Channel(UnixStream);

impl Channel {
    /// Calls the running daemon; `None` when there is none.
    pub fn call(path: &Path) -> Result<Option<Self>, TakeoverError> {
        match UnixStream::connect(path) {
            Ok(stream) => Self::new(stream).map(Some),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                Ok(None)
            }
            Err(source) => Err(TakeoverError::Io { doing: "connecting", source }),
        }
    }

    /// Takes a connected stream, if the peer is root (or this process's own user).
    pub fn new(stream: UnixStream) -> Result<Self, TakeoverError> {
        let io = |source| TakeoverError::Io { doing: "looking at the peer", source };
        let uid = getsockopt(&stream, PeerCredentials).map_err(|e| io(e.into()))?.uid();
        if uid != 0 && uid != nix::unistd::geteuid().as_raw() {
            return Err(TakeoverError::Peer(uid));
        }
        stream.set_nonblocking(false).map_err(io)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(io)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(io)?;
        Ok(Self(stream))
    }

    /// How long the next messages may take.
    pub fn wait_up_to(&self, patience: Duration) -> Result<(), TakeoverError> {
        let io = |source| TakeoverError::Io { doing: "waiting", source };
        self.0.set_read_timeout(Some(patience)).map_err(io)
    }

    /// Sends a message with descriptors.
    pub fn send(&mut self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<(), TakeoverError> {
        let io = |source| TakeoverError::Io { doing: "sending", source };
        let json = serde_json::to_vec(message).map_err(|e| io(e.into()))?;
        let too_long = || io(io::Error::new(io::ErrorKind::InvalidInput, "the message is too long"));
        let length =
            u32::try_from(json.len()).ok().filter(|n| *n as usize <= MAX_MESSAGE).ok_or_else(too_long)?;
        let mut bytes = length.to_be_bytes().to_vec();
        bytes.extend(json);
        let sent = fdpass::send_all(&self.0, &bytes, fds).map_err(io)?;
        self.0.write_all(&bytes[sent..]).map_err(io)
    }

    /// The next message and its descriptors.
    pub fn recv(&mut self) -> Result<(Message, Vec<OwnedFd>), TakeoverError> {
        let io = |source| TakeoverError::Io { doing: "receiving", source };
        let mut prefix = [0; 4];
        let (n, fds) = fdpass::recv_all(&self.0, &mut prefix).map_err(io)?;
        if n == 0 {
            return Err(io(io::ErrorKind::UnexpectedEof.into()));
        }
        self.0.read_exact(&mut prefix[n..]).map_err(io)?;
        let length = u32::from_be_bytes(prefix) as usize;
        if length > MAX_MESSAGE {
            return Err(io(io::Error::new(io::ErrorKind::InvalidData, "the message is too long")));
        }
        let mut json = vec![0; length];
        self.0.read_exact(&mut json).map_err(io)?;
        let message = serde_json::from_slice(&json).map_err(|error| TakeoverError::Unexpected {
            got: format!("something that this version does not know ({error})"),
            wanted: "a message of the takeover",
        })?;
        Ok((message, fds))
    }
}

/// The error for a message that is not the one that was due.
pub fn unexpected(got: &Message, wanted: &'static str) -> TakeoverError {
    match got {
        Message::Refused { reason } => TakeoverError::Refused(reason.clone()),
        other => {
            // Not the content: it may be a key.
            let text = format!("{other:?}");
            let got = text.split([' ', '{']).next().unwrap_or_default().to_owned();
            TakeoverError::Unexpected { got, wanted }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{net::TcpListener, os::fd::AsFd as _};

    #[test]
    fn messages_keep_their_descriptors_and_their_order() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (Channel::new(a).unwrap(), Channel::new(b).unwrap());
        let listeners: Vec<_> = (0..49).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let sender = {
            let listeners: Vec<_> = listeners.iter().map(|l| l.try_clone().unwrap()).collect();
            std::thread::spawn(move || {
                for n in 0..300 {
                    let info = PodInfo { name: format!("p{n}"), uid: "u".repeat(2000), ..PodInfo::default() };
                    let pod = Pod { outbound: listeners.len(), ..Pod::new(&info) };
                    let fds: Vec<_> = listeners.iter().map(|l| l.as_fd()).collect();
                    a.send(&Message::Pod { pod }, &fds).unwrap();
                }
            })
        };
        let addrs: Vec<_> = listeners.iter().map(|l| l.local_addr().unwrap()).collect();
        for n in 0..300 {
            let (message, fds) = b.recv().unwrap();
            let Message::Pod { pod } = message else { panic!("{message:?}") };
            assert_eq!((pod.name, pod.outbound), (format!("p{n}"), 49));
            let received: Vec<_> =
                fds.into_iter().map(|fd| TcpListener::from(fd).local_addr().unwrap()).collect();
            assert_eq!(received, addrs);
        }
        sender.join().unwrap();
        assert!(matches!(b.recv(), Err(TakeoverError::Io { .. })), "the end is an error");
    }

    #[test]
    fn garbage_is_an_error_with_a_remedy() {
        let too_long = u32::MAX.to_be_bytes().to_vec();
        let unknown = [&7_u32.to_be_bytes()[..], b"{\"a\":1}"].concat();
        let not_json = [&3_u32.to_be_bytes()[..], b"abc"].concat();
        for bytes in [too_long, unknown, not_json, vec![1, 2]] {
            let (mut a, b) = UnixStream::pair().unwrap();
            a.write_all(&bytes).unwrap();
            drop(a);
            assert!(Channel::new(b).unwrap().recv().is_err(), "{bytes:?}");
        }
        let error = unexpected(&Message::Refused { reason: "no".into() }, "welcome");
        assert!(error.to_string().contains("stop it and start this one"), "{error}");
    }
}
