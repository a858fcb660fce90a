//! Services: virtual addresses, ports and how their endpoints are balanced.

use super::NamespacedName;
use std::{collections::BTreeMap, net::IpAddr, time::Duration};

/// Transport protocol of a service port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// What is spoken on a port, from `appProtocol` or the port name's prefix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AppProtocol {
    /// Not said: sniffed where it matters.
    #[default]
    Unknown,
    /// HTTP/1.
    Http1,
    /// HTTP/2 without TLS.
    Http2,
    /// gRPC.
    Grpc,
    /// TLS passed through.
    Tls,
    /// Opaque TCP (also mongo, mysql, redis).
    Tcp,
}

/// A virtual address of a service in a network.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceAddress {
    /// Network name; empty for the one network of a simple cluster.
    pub network: String,
    /// The VIP.
    pub ip: IpAddr,
}

/// One port of a service. Numbers are host order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ServicePort {
    /// The service's port.
    pub port: u16,
    /// The default target port when the workload does not say its own; 0 when it always does.
    pub target_port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// What is spoken on it.
    pub app_protocol: AppProtocol,
}

/// One locality scope, from the widest to the narrowest use (`istio.workload.LoadBalancing.Scope`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LbScope {
    /// Same region.
    Region,
    /// Same zone.
    Zone,
    /// Same subzone.
    Subzone,
    /// Same node.
    Node,
    /// Same cluster.
    Cluster,
    /// Same network.
    Network,
}

/// What to do with endpoints that do not match every preferred scope.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LbMode {
    /// No preference.
    #[default]
    Any,
    /// Only endpoints that match all scopes; none means no endpoint.
    Strict,
    /// Those that match the most scopes first, the rest when there are none.
    Failover,
}

/// How one of the endpoints that may be used is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LbAlgorithm {
    /// At random, by weight.
    #[default]
    Random,
    /// By consistent hashing of the client's address (Maglev): few clients move when endpoints come and go.
    Maglev,
}

/// Locality preference of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadBalancing {
    /// The scopes in order of importance: an endpoint ranks by how many leading scopes it matches.
    pub routing_preference: Vec<LbScope>,
    /// Strict, failover or none.
    pub mode: LbMode,
    /// True to use unready endpoints as well (`publishNotReadyAddresses`).
    pub allow_unhealthy: bool,
}

/// ClientIP session affinity (`Service.spec.sessionAffinity`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionAffinity {
    /// How long a client sticks to its endpoint after its last connection.
    pub timeout: Duration,
}

/// A service as the mesh knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Kubernetes name and namespace.
    pub name: NamespacedName,
    /// Fully qualified host name, for example `cart.shop.svc.cluster.local`.
    pub hostname: String,
    /// Virtual addresses; empty for a headless service.
    pub addresses: Vec<ServiceAddress>,
    /// All ports, TCP and UDP.
    pub ports: Vec<ServicePort>,
    /// The names of those ports that have one, for SRV records; by number and protocol.
    pub port_names: BTreeMap<(u16, Protocol), String>,
    /// Extra identities that its endpoints may have, as SPIFFE URIs.
    pub subject_alt_names: Vec<String>,
    /// Locality preference.
    pub load_balancing: LoadBalancing,
    /// ClientIP affinity, if asked for.
    pub session_affinity: Option<SessionAffinity>,
    /// How an endpoint is chosen.
    pub algorithm: LbAlgorithm,
}

impl Service {
    /// The xDS resource name, `NAMESPACE/HOSTNAME`; also the key in [`super::Workload::services`].
    pub fn key(&self) -> String {
        format!("{}/{}", self.name.namespace, self.hostname)
    }
}
