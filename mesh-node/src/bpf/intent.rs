//! What the kernel should do, in domain terms: the input of the lowering, built by `plan`.
//!
//! No ABI types but the reason codes, no kernel objects; comparing two intents tells whether anything changed.

pub use mesh_common::code::DenyReason;
use mesh_xds::model::Protocol;
use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

/// What happens to a connection to a known destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Balanced in the kernel, straight to a backend.
    Direct,
    /// Through this node's daemon.
    Proxy,
    /// Refused with ECONNREFUSED and an event.
    Deny(DenyReason),
}

/// What stands in for [`Verdict::Proxy`] while the daemon is away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Away {
    /// Refused: some endpoint takes no plaintext.
    #[default]
    Deny,
    /// Straight to an endpoint, in plaintext.
    Direct,
}

/// How the kernel chooses among backends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Balancing {
    /// At random, by weight.
    #[default]
    Random,
    /// By Maglev's consistent hash of the client pod's address, by weight.
    Maglev,
}

/// One port of a service at one of its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// The virtual address.
    pub addr: IpAddr,
    /// The service's port.
    pub port: u16,
    /// TCP or UDP.
    pub proto: Protocol,
    /// Direct, proxied or denied. Proxied UDP is denied, since the proxy carries TCP only.
    pub verdict: Verdict,
    /// While the daemon is away, if the verdict is [`Verdict::Proxy`].
    pub away: Away,
    /// How a backend is chosen.
    pub balancing: Balancing,
    /// ClientIP affinity: how long after its last connection a client pod keeps its backend.
    pub affinity: Option<Duration>,
    /// Used when the verdict is [`Verdict::Direct`] or [`Verdict::Proxy`]; filtered by the caller (ready, best locality). Empty: refused
    /// with [`DenyReason::NoEndpoints`]. Backends of another address family than `addr` cannot be reached by the
    /// client's socket and are refused by the lowering.
    pub backends: Vec<Backend>,
}

/// An endpoint of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Backend {
    /// Where it listens.
    pub addr: SocketAddr,
    /// Relative weight; 0 leaves the backend out of balancing.
    pub weight: u32,
}

/// A mesh pod dialled by its own address, on any TCP port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The pod's address.
    pub addr: IpAddr,
    /// [`Verdict::Direct`] means untouched.
    pub verdict: Verdict,
    /// While the daemon is away, if the verdict is [`Verdict::Proxy`].
    pub away: Away,
}

/// A pod of this node whose connections are captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CapturedPod {
    /// Cookie of its network namespace.
    pub cookie: u64,
    /// All of its addresses.
    pub addrs: Vec<IpAddr>,
    /// Port of the daemon's outbound listener on the pod's first IPv4 address.
    pub outbound_v4: Option<u16>,
    /// The same for IPv6.
    pub outbound_v6: Option<u16>,
    /// Whether its DNS queries go to the daemon.
    pub dns: bool,
    /// Whether inbound plaintext is refused.
    pub strict: bool,
    /// Ports (the pod's own) whose mode differs: true for STRICT.
    pub port_strict: BTreeMap<u16, bool>,
}

/// Everything the kernel should do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Intent {
    /// Service ports.
    pub frontends: Vec<Frontend>,
    /// Pods by their own address.
    pub destinations: Vec<Destination>,
    /// Captured pods.
    pub pods: Vec<CapturedPod>,
}
