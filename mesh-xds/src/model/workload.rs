//! Workloads: pods (and later external machines), with what is needed to reach and to identify them.

use super::{NamespacedName, SpiffeError, SpiffeId};
use std::{collections::BTreeMap, net::IpAddr};

/// How a workload takes mesh traffic (`istio.workload.TunnelProtocol`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TunnelProtocol {
    /// Plain TCP: the workload is not in the mesh.
    #[default]
    None,
    /// HBONE on podIP:15008.
    Hbone,
}

/// Whether a workload may be picked by a load balancer (`istio.workload.WorkloadStatus`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Health {
    /// Ready.
    #[default]
    Healthy,
    /// Not ready or terminating: left out of load balancing.
    Unhealthy,
}

/// The kind of the owner, for metric labels (`istio.workload.WorkloadType`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WorkloadKind {
    /// A Deployment (also the default in Istio's dashboards).
    #[default]
    Deployment,
    /// A CronJob.
    CronJob,
    /// A bare pod.
    Pod,
    /// A Job.
    Job,
}

/// Where a workload runs; empty strings mean unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Locality {
    /// `topology.kubernetes.io/region`.
    pub region: String,
    /// `topology.kubernetes.io/zone`.
    pub zone: String,
    /// `topology.istio.io/subzone`.
    pub subzone: String,
}

/// One port of a service as this workload serves it. Both are host-order port numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TargetPort {
    /// The service's port.
    pub service_port: u16,
    /// The workload's port that it leads to.
    pub target_port: u16,
}

/// The ports through which a workload belongs to one service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceMembership {
    /// TCP ports (on the wire: Istio's `PortList`).
    pub tcp: Vec<TargetPort>,
    /// UDP ports (on the wire: a nodemesh extension, since Istio's form is TCP only).
    pub udp: Vec<TargetPort>,
    /// The workload's host name within the service (`HOSTNAME.SERVICE.NAMESPACE.svc...`); empty for none.
    pub hostname: String,
}

/// A workload as the mesh knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Unique and stable: `CLUSTER//Pod/NAMESPACE/NAME`. The xDS resource name.
    pub uid: String,
    /// The pod's name and namespace.
    pub name: NamespacedName,
    /// All of its addresses. Empty for a pod that has none yet; the node it is bound to still needs to know it.
    pub addresses: Vec<IpAddr>,
    /// The network name; empty for the one network of a simple cluster.
    pub network: String,
    /// How it takes mesh traffic.
    pub tunnel: TunnelProtocol,
    /// The trust domain of its identity.
    pub trust_domain: String,
    /// The service account of its identity.
    pub service_account: String,
    /// The node it runs on; empty when unknown.
    pub node: String,
    /// The cluster it belongs to, for example `Kubernetes`.
    pub cluster_id: String,
    /// Where it runs.
    pub locality: Locality,
    /// Ready to take traffic or not.
    pub health: Health,
    /// Value of `app.kubernetes.io/name` or `app`, for metric labels.
    pub canonical_name: String,
    /// Value of `app.kubernetes.io/version` or `version`, for metric labels.
    pub canonical_revision: String,
    /// The owner's name (for example the Deployment), for metric labels.
    pub workload_name: String,
    /// The owner's kind.
    pub kind: WorkloadKind,
    /// Services that it backs, by `NAMESPACE/HOSTNAME`.
    pub services: BTreeMap<String, ServiceMembership>,
    /// Names (`NAMESPACE/NAME`) of the selector-bound policies that apply to it; namespace and global
    /// policies are found by scope instead.
    pub policies: Vec<String>,
    /// Relative load-balancing weight, at least 1.
    pub weight: u32,
    /// True when the workload itself speaks HBONE (a sidecar or a waypoint) and must not be captured.
    pub native_tunnel: bool,
    /// True for a pod in its host's network namespace: never captured.
    pub host_network: bool,
}

impl Workload {
    /// The identity this workload runs under.
    pub fn identity(&self) -> Result<SpiffeId, SpiffeError> {
        let sa = if self.service_account.is_empty() { "default" } else { &self.service_account };
        SpiffeId::new(&self.trust_domain, &self.name.namespace, sa)
    }

    /// Whether this workload takes mesh traffic over HBONE.
    pub fn in_mesh(&self) -> bool {
        self.tunnel == TunnelProtocol::Hbone
    }
}
