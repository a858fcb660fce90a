//! The validated model: what the mesh knows after the wire form was checked.
//!
//! Both ends share it. mesh-control builds these values from Kubernetes objects and encodes them
//! (`crate::convert`), mesh-node decodes them from xDS resources and never sees a protobuf type after that.
//! Every value here is already valid: addresses have a length of 4 or 16, ports are not zero where a zero
//! makes no sense, names are not empty. Deliberately absent: Envoy's L7 resources, which have a model of their own.

mod authorization;
mod identity;
mod service;
mod workload;

pub use authorization::{Action, Authorization, Clause, IpBlock, Match, Rule, Scope, StringMatch};
pub use identity::{SpiffeError, SpiffeId};
pub use service::{
    AppProtocol, LbAlgorithm, LbMode, LbScope, LoadBalancing, Protocol, Service, ServiceAddress, ServicePort,
    SessionAffinity,
};
pub use workload::{Health, Locality, ServiceMembership, TargetPort, TunnelProtocol, Workload, WorkloadKind};

use std::fmt;

/// `namespace/name` of a Kubernetes object; orders by namespace first.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespacedName {
    /// The namespace, never empty.
    pub namespace: String,
    /// The object's name, never empty.
    pub name: String,
}

impl NamespacedName {
    /// Puts the two parts together.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}
