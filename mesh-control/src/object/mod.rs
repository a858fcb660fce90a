//! The objects that the index understands: the part of a Kubernetes or Istio object that matters here, already checked.
//!
//! Every source makes these (`crate::decode` does it from YAML), so the index never sees a missing name, an address
//! that does not parse or a port 0. Deliberately absent: anything about where an object came from.

mod policy;

pub use policy::{
    AuthorizationPolicy, Effect, MtlsMode, PeerAuthentication, PolicyAction, PolicyTarget, Selector, has_all,
};

use mesh_xds::model::{AppProtocol, LbAlgorithm, NamespacedName, Protocol};
use serde::{Serialize, Serializer};
use std::{collections::BTreeMap, fmt, net::IpAddr, time::Duration};

/// Labels or annotations.
pub type Labels = BTreeMap<String, String>;

/// The kinds that are understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// v1 Namespace.
    Namespace,
    /// v1 Node.
    Node,
    /// v1 ServiceAccount.
    ServiceAccount,
    /// v1 Service.
    Service,
    /// discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice,
    /// v1 Pod.
    Pod,
    /// security.istio.io PeerAuthentication.
    PeerAuthentication,
    /// security.istio.io AuthorizationPolicy.
    AuthorizationPolicy,
}

impl Kind {
    /// Every kind, in the order in which reports list them.
    pub const ALL: [Self; 8] = [
        Self::Namespace,
        Self::Node,
        Self::ServiceAccount,
        Self::Service,
        Self::EndpointSlice,
        Self::Pod,
        Self::PeerAuthentication,
        Self::AuthorizationPolicy,
    ];

    /// The `kind` as it is written in YAML.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::ServiceAccount => "ServiceAccount",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Pod => "Pod",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
        }
    }

    /// Whether objects of this kind live in a namespace.
    pub fn namespaced(self) -> bool {
        !matches!(self, Self::Namespace | Self::Node)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What an object is called. The namespace is empty for cluster-scoped kinds.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Its kind.
    pub kind: Kind,
    /// Namespace and name.
    pub name: NamespacedName,
}

impl ObjectKey {
    /// A key from its parts.
    pub fn new(kind: Kind, namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { kind, name: NamespacedName::new(namespace, name) }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.name.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name.name)
        } else {
            write!(f, "{} {}", self.kind, self.name)
        }
    }
}

impl Serialize for ObjectKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A checked object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A namespace.
    Namespace(Namespace),
    /// A node.
    Node(Node),
    /// A service account.
    ServiceAccount(NamespacedName),
    /// A service.
    Service(Service),
    /// An endpoint slice.
    EndpointSlice(EndpointSlice),
    /// A pod.
    Pod(Pod),
    /// Who has to use mTLS.
    PeerAuthentication(PeerAuthentication),
    /// Who may connect.
    AuthorizationPolicy(AuthorizationPolicy),
}

impl Object {
    /// The object's key.
    pub fn key(&self) -> ObjectKey {
        let (kind, name) = match self {
            Self::Namespace(o) => return ObjectKey::new(Kind::Namespace, "", &o.name),
            Self::Node(o) => return ObjectKey::new(Kind::Node, "", &o.name),
            Self::ServiceAccount(name) => (Kind::ServiceAccount, name),
            Self::Service(o) => (Kind::Service, &o.name),
            Self::EndpointSlice(o) => (Kind::EndpointSlice, &o.name),
            Self::Pod(o) => (Kind::Pod, &o.name),
            Self::PeerAuthentication(o) => (Kind::PeerAuthentication, &o.name),
            Self::AuthorizationPolicy(o) => (Kind::AuthorizationPolicy, &o.name),
        };
        ObjectKey { kind, name: name.clone() }
    }
}

/// Whether labels ask for the mesh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Enrol {
    /// They say nothing.
    #[default]
    Unset,
    /// In.
    In,
    /// Out.
    Out,
}

/// A namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its name.
    pub name: String,
    /// What its labels say about the mesh.
    pub enrol: Enrol,
}

/// A node. Empty strings mean that the label is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Region, zone, subzone.
    pub locality: mesh_xds::model::Locality,
}

/// Where a service port leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetRef {
    /// A port number of the pod.
    Number(u16),
    /// The name of a container port.
    Name(String),
}

/// A service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name; may be empty when it is the only one.
    pub name: String,
    /// The service's port.
    pub port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The pod's port.
    pub target: TargetRef,
    /// What is spoken on it.
    pub app_protocol: AppProtocol,
}

/// How far traffic to a service may go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Distribution {
    /// Anywhere.
    #[default]
    Any,
    /// `trafficDistribution: PreferClose` or `PreferSameZone`.
    PreferSameZone,
    /// `trafficDistribution: PreferSameNode`.
    PreferSameNode,
    /// `internalTrafficPolicy: Local`: this node or nowhere.
    LocalOnly,
}

/// A service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: NamespacedName,
    /// Creation time in seconds since 1970; the older of two services keeps an address that both claim.
    pub created: Option<i64>,
    /// Cluster addresses; empty when headless.
    pub cluster_ips: Vec<IpAddr>,
    /// Labels of its pods; empty when it has no selector.
    pub selector: Labels,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// ClientIP affinity and its timeout.
    pub affinity: Option<Duration>,
    /// How far its traffic may go.
    pub distribution: Distribution,
    /// How an endpoint is chosen.
    pub algorithm: LbAlgorithm,
    /// Endpoints count even when they are not ready.
    pub publish_not_ready: bool,
    /// An alias for a DNS name: it has no endpoints.
    pub external_name: bool,
}

/// One endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its addresses (of one family).
    pub addresses: Vec<IpAddr>,
    /// Its host name within the service; empty for none.
    pub hostname: String,
    /// The pod behind it, in the slice's namespace.
    pub pod: Option<String>,
    /// The node it runs on; empty when not said.
    pub node: String,
    /// The zone it is in; empty when not said.
    pub zone: String,
    /// Condition `ready` (true when not said).
    pub ready: bool,
    /// Condition `terminating`.
    pub terminating: bool,
}

/// A port of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// The service port's name.
    pub name: String,
    /// The endpoint's port.
    pub port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
}

/// An endpoint slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Its name.
    pub name: NamespacedName,
    /// The name of its service, in the same namespace.
    pub service: String,
    /// The endpoints.
    pub endpoints: Vec<Endpoint>,
    /// The ports, the same for all endpoints.
    pub ports: Vec<SlicePort>,
}

/// A declared port of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerPort {
    /// Its name.
    pub name: String,
    /// Its number.
    pub port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
}

/// By which name a pod is found below a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodHostname {
    /// `spec.hostname`.
    pub hostname: String,
    /// `spec.subdomain`: the service.
    pub subdomain: String,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its name.
    pub name: NamespacedName,
    /// Its labels, for selectors and metric labels.
    pub labels: Labels,
    /// Kind and name of the controlling owner.
    pub owner: Option<(String, String)>,
    /// Creation time in seconds since 1970.
    pub created: Option<i64>,
    /// The node it is bound to; empty while it is not scheduled.
    pub node: String,
    /// Its service account.
    pub service_account: String,
    /// Its host name within a service, if it says both. Rare, so in a box.
    pub hostname: Option<Box<PodHostname>>,
    /// Shares the node's network namespace.
    pub host_network: bool,
    /// Its addresses; empty until it has one.
    pub addresses: Vec<IpAddr>,
    /// Named container ports.
    pub ports: Vec<ContainerPort>,
    /// Condition `Ready`.
    pub ready: bool,
    /// It is being deleted.
    pub terminating: bool,
    /// It has run to its end (phase Succeeded or Failed) and owns no address any more.
    pub finished: bool,
    /// What its labels say about the mesh.
    pub enrol: Enrol,
    /// A sidecar proxy runs in it, so that the node must not capture it.
    pub sidecar: bool,
    /// It accepts HBONE by itself (label `networking.istio.io/tunnel=http`).
    pub native_tunnel: bool,
}
