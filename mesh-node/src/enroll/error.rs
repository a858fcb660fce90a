//! Why a pod could not be enrolled.

use super::{PodInfo, protocol::ErrorKind};
use crate::net::NetNsError;
use std::{error::Error, io, net::SocketAddr, time::Duration};

/// Why [`super::Mesh::capture`] failed.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The kernel or the data path did not take it.
    #[error("the data path refused the pod")]
    Datapath(#[source] Box<dyn Error + Send + Sync>),
    /// The daemon is about to end.
    #[error("the daemon is shutting down")]
    ShuttingDown,
}

/// Why a pod is not enrolled. Names the pod, what failed, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// The request came without the descriptor of the pod's namespace.
    #[error("no network namespace came with the request for pod {pod}")]
    NoNetNs {
        /// The pod.
        pod: Box<PodInfo>,
    },
    /// The namespace cannot be used.
    #[error("the network namespace of pod {pod} cannot be used")]
    NetNs {
        /// The pod.
        pod: Box<PodInfo>,
        /// Why.
        #[source]
        source: NetNsError,
    },
    /// The namespace is the daemon's own.
    #[error("pod {pod} is in the host's network namespace")]
    HostNetwork {
        /// The pod.
        pod: Box<PodInfo>,
    },
    /// The pod has no address to listen on.
    #[error("pod {pod} has no address besides loopback and link-local ones")]
    NoAddress {
        /// The pod.
        pod: Box<PodInfo>,
    },
    /// A port that the daemon needs in the pod is taken.
    #[error("{addr} is in use inside pod {pod}")]
    PortBusy {
        /// The pod.
        pod: Box<PodInfo>,
        /// The address.
        addr: SocketAddr,
    },
    /// Any other reason why the daemon cannot listen in the pod.
    #[error("cannot listen on {addr} inside pod {pod}")]
    Listen {
        /// The pod.
        pod: Box<PodInfo>,
        /// The address.
        addr: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The control plane did not say in time whether the pod is in the mesh.
    #[error("the control plane has not said within {} ms whether pod {pod} is in the mesh", .waited.as_millis())]
    Undecided {
        /// The pod.
        pod: Box<PodInfo>,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The capturer said no.
    #[error("pod {pod} cannot be captured")]
    Capture {
        /// The pod.
        pod: Box<PodInfo>,
        /// Why.
        #[source]
        source: CaptureError,
    },
    /// The capturer did not answer in time.
    #[error("pod {pod} was not captured within {} ms", .after.as_millis())]
    CaptureTimeout {
        /// The pod.
        pod: Box<PodInfo>,
        /// The limit.
        after: Duration,
    },
    /// The pod was removed while it was being added.
    #[error("pod {pod} was removed while it was being enrolled")]
    Removed {
        /// The pod.
        pod: Box<PodInfo>,
    },
    /// The node has as many pods as the daemon takes.
    #[error("pod {pod} is one too many: this node's limit is {limit}")]
    TooManyPods {
        /// The pod.
        pod: Box<PodInfo>,
        /// The limit.
        limit: usize,
    },
    /// STATUS: no pod can be taken at the moment.
    #[error("mesh-node cannot take pods: {why}")]
    NotReady {
        /// Why.
        why: String,
    },
    /// CHECK found that a pod of the mesh is not captured.
    #[error("pod {pod} is in the mesh but not captured: {why}")]
    NotCaptured {
        /// The pod.
        pod: Box<PodInfo>,
        /// What is known about the reason.
        why: String,
    },
}

impl EnrollError {
    /// What kind of failure it is for the caller.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Undecided { .. } | Self::CaptureTimeout { .. } | Self::TooManyPods { .. } => {
                ErrorKind::TryAgain
            }
            Self::Capture { .. } => ErrorKind::TryAgain,
            Self::NotReady { .. } => ErrorKind::NotReady,
            Self::NoNetNs { .. } | Self::NetNs { .. } | Self::HostNetwork { .. } => ErrorKind::Invalid,
            Self::NoAddress { .. }
            | Self::PortBusy { .. }
            | Self::Listen { .. }
            | Self::Removed { .. }
            | Self::NotCaptured { .. } => ErrorKind::Failed,
        }
    }

    /// What to do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NoNetNs { .. } => "use the mesh-cni that belongs to this mesh-node",
            Self::NetNs { .. } => {
                "see that the pod's sandbox still exists; the runtime makes a new one if not"
            }
            Self::HostNetwork { .. } => {
                "pods with hostNetwork cannot be in the mesh; CNI is not called for them"
            }
            Self::NoAddress { .. } => "put mesh-cni after the plugin that gives the pod its address",
            Self::PortBusy { .. } => {
                "free the port (a sidecar or another mesh may hold it), or opt the pod out with the label \
                 nodemesh.io/enabled=false"
            }
            Self::Listen { .. } => "see the daemon's log; it needs CAP_SYS_ADMIN and CAP_NET_ADMIN",
            Self::Undecided { .. } => {
                "see whether mesh-node reaches mesh-control (mesh-node status); the runtime tries again by itself"
            }
            Self::Capture { .. } | Self::CaptureTimeout { .. } => {
                "see mesh-node status and the daemon's log; the runtime tries again by itself"
            }
            Self::Removed { .. } => "nothing to do",
            Self::NotReady { .. } => "see mesh-node status and the daemon's log",
            Self::TooManyPods { .. } => "raise the limit of pods in mesh-node's configuration",
            Self::NotCaptured { .. } => "see mesh-node status; deleting the pod makes a new one",
        }
    }

    /// A label for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::NoNetNs { .. } => "no_netns",
            Self::NetNs { .. } => "netns",
            Self::HostNetwork { .. } => "host_network",
            Self::NoAddress { .. } => "no_address",
            Self::PortBusy { .. } => "port_busy",
            Self::Listen { .. } => "listen",
            Self::Undecided { .. } => "undecided",
            Self::Capture { .. } => "capture",
            Self::CaptureTimeout { .. } => "capture_timeout",
            Self::Removed { .. } => "removed",
            Self::TooManyPods { .. } => "too_many_pods",
            Self::NotReady { .. } => "not_ready",
            Self::NotCaptured { .. } => "not_captured",
        }
    }

    /// The message with its causes, for people who see nothing else (CNI).
    pub fn full_message(&self) -> String {
        let mut out = self.to_string();
        let mut cause = self.source();
        while let Some(e) = cause {
            out.push_str(": ");
            out.push_str(&e.to_string());
            cause = e.source();
        }
        out
    }
}
