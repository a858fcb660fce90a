//! Enrolment: which pods of this node are in the mesh, and taking them into it.
//!
//! A pod comes in by `mesh-cni` ([`server`]), by the scan of running pods at start ([`scan`]), or because its
//! membership changes later. [`pods::Enroller`] keeps one record per network namespace, makes the pod's
//! listeners in it, and hands them to the capturer behind [`Mesh`]. A pod leaves when CNI says so, when its
//! membership ends, or when nothing but the daemon holds its namespace any more ([`alive`]).
//!
//! Deliberately absent: BPF, what is done with a connection, and Kubernetes objects; the control plane
//! decides about membership and [`Mesh`] relays it.

pub mod alive;
mod error;
mod listeners;
pub mod pods;
pub mod protocol;
pub mod scan;
pub mod server;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use error::{CaptureError, EnrollError};
pub use listeners::Listeners;
pub use pods::{Added, Enroller, Limits, Phase, PodStatus};

use crate::net::NetNs;
use mesh_xds::model::NamespacedName;
use std::{
    fmt,
    future::Future,
    net::{IpAddr, TcpListener, UdpSocket},
    sync::Arc,
};
use tokio::sync::watch;

/// The port of a pod that plaintext connections are steered to.
pub const INBOUND_PLAINTEXT_PORT: u16 = 15006;
/// The port of a pod that takes HBONE.
pub const INBOUND_HBONE_PORT: u16 = 15008;

/// The UDP port of a pod that its DNS queries are sent to.
pub const DNS_PORT: u16 = mesh_common::code::port::DNS;

/// A pod as the node knows it. Strings are empty while unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodInfo {
    /// Kubernetes namespace. Known at the latest once the pod is enrolled.
    pub namespace: String,
    /// Kubernetes name. Known at the latest once the pod is enrolled.
    pub name: String,
    /// Kubernetes UID, from CNI_ARGS or the pod's cgroup.
    pub uid: String,
    /// The sandbox's container ID, from CNI; empty for a pod found by the scan.
    pub container_id: String,
    /// The pod's own addresses.
    pub addrs: Vec<IpAddr>,
}

impl PodInfo {
    /// Namespace and name, if known.
    pub fn full_name(&self) -> Option<NamespacedName> {
        let known = !self.namespace.is_empty() && !self.name.is_empty();
        known.then(|| NamespacedName::new(self.namespace.as_str(), self.name.as_str()))
    }
}

impl fmt::Display for PodInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.name.is_empty(), self.uid.is_empty(), self.container_id.is_empty()) {
            (false, ..) => write!(f, "{}/{}", self.namespace, self.name),
            (true, false, _) => write!(f, "with UID {}", self.uid),
            (true, true, false) => write!(f, "of container {}", self.container_id),
            (true, true, true) => write!(f, "with addresses {:?}", self.addrs),
        }
    }
}

/// What the mesh says about a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Membership {
    /// It is in the mesh, under this name.
    Enrol(NamespacedName),
    /// It is not to be captured.
    Leave(LeaveReason),
    /// The control plane has not told yet, or does not know the pod yet.
    Unknown,
}

/// Why a pod is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LeaveReason {
    /// Its namespace is not enrolled, or the pod opted out by its label.
    NotInMesh,
    /// It speaks HBONE by itself (a sidecar or a waypoint).
    NativeTunnel,
    /// It runs in the host's network namespace.
    HostNetwork,
}

impl LeaveReason {
    /// The reason as a metric label and in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotInMesh => "not_in_mesh",
            Self::NativeTunnel => "native_tunnel",
            Self::HostNetwork => "host_network",
        }
    }
}

impl fmt::Display for LeaveReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotInMesh => "its namespace is not enrolled or the pod has opted out",
            Self::NativeTunnel => "it speaks HBONE by itself",
            Self::HostNetwork => "it uses the host's network",
        })
    }
}

/// A pod whose listeners exist, ready to be captured. The capturer owns the listeners from here on; all are
/// non-blocking, one per pod address, in the order of `info.addrs`.
#[derive(Debug)]
pub struct LocalPod {
    /// Who it is; namespace, name and addresses are known.
    pub info: PodInfo,
    /// The cookie of its network namespace.
    pub cookie: u64,
    /// Its network namespace.
    pub netns: Arc<NetNs>,
    /// On the pod's address and a free port: what `connect` is redirected to.
    pub outbound: Vec<TcpListener>,
    /// On 15006: what sk_lookup steers plaintext connections to.
    pub inbound_plain: Vec<TcpListener>,
    /// On 15008: HBONE.
    pub inbound_hbone: Vec<TcpListener>,
    /// UDP on 15053: DNS. Empty when the pod's queries are left alone.
    pub dns: Vec<UdpSocket>,
}

/// The rest of the daemon, as enrolment sees it.
pub trait Mesh: Send + Sync + 'static {
    /// Whether `pod` is in the mesh, by its name if that is known, else by its addresses. A look-up in the
    /// current snapshot: it does not wait.
    fn membership(&self, pod: &PodInfo) -> Membership;

    /// Changes whenever the answer of [`Mesh::membership`] may have changed for any pod.
    fn changes(&self) -> watch::Receiver<u64>;

    /// Why the daemon cannot take pods at the moment; `None` when it can. The CNI STATUS answer.
    fn not_ready(&self) -> Option<String>;

    /// Captures the pod; resolves once the kernel does it. On an error nothing of the pod may be left behind.
    /// It may be cancelled by dropping it, and is followed by [`Mesh::release`] then.
    fn capture(&self, pod: LocalPod) -> impl Future<Output = Result<(), CaptureError>> + Send;

    /// Stops capturing the namespace with this cookie and closes its listeners; resolves when new connections
    /// of the pod are no longer touched. Does nothing for a namespace that is not captured.
    fn release(&self, cookie: u64) -> impl Future<Output = ()> + Send;

    /// Whether the kernel captures the namespace with this cookie now (CNI CHECK).
    fn is_captured(&self, cookie: u64) -> impl Future<Output = bool> + Send;
}
