//! The overview that `GET /status` returns.

use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// The overview of one daemon. Times are in whole seconds; a missing time means "never" or "not known".
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    /// The node's name.
    pub node: String,
    /// The daemon's version.
    pub version: String,
    /// Since the daemon's start.
    pub uptime_seconds: u64,
    /// Why the daemon is not ready; empty when it is.
    pub not_ready: Vec<String>,
    /// The control plane.
    pub xds: XdsStatus,
    /// What the control plane has told.
    pub world: WorldStatus,
    /// The kernel's side.
    pub bpf: BpfStatus,
    /// Pods that are captured.
    pub enrolled: Vec<EnrolledPod>,
    /// Pods of this node that are not captured.
    pub others: Vec<OtherPod>,
    /// Refused connections by reason since the start.
    pub refusals: Vec<Counter>,
}

/// The connection to the control plane.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct XdsStatus {
    /// Its address.
    pub address: String,
    /// Whether it is connected.
    pub connected: bool,
    /// Since the last resource was applied.
    pub last_update_seconds: Option<u64>,
    /// Where the configuration in force is from and how old it is; empty while it is the control plane's.
    pub note: String,
    /// Resources that are refused, of which the last good version is in force.
    pub rejected: Vec<RejectedResource>,
    /// The last connection error, if not connected.
    pub error: String,
}

/// A resource that the daemon refused.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RejectedResource {
    /// The resource's name.
    pub name: String,
    /// Why.
    pub error: String,
}

/// Sizes of the current snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WorldStatus {
    /// Workloads known.
    pub workloads: usize,
    /// Services known.
    pub services: usize,
    /// Authorization policies known.
    pub policies: usize,
}

/// The kernel's side.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BpfStatus {
    /// Whether the maps hold what they should.
    pub in_step: bool,
    /// The last error of the reconciler; empty if none is pending.
    pub error: String,
    /// Connects and datagrams by outcome.
    pub counters: Vec<Counter>,
}

/// A named count.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Counter {
    /// What is counted.
    pub name: String,
    /// How many.
    pub value: u64,
}

/// A captured pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EnrolledPod {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Kubernetes name.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// The cookie of its network namespace.
    pub cookie: u64,
    /// Its SPIFFE URI; empty if it has none.
    pub identity: String,
    /// Its certificate.
    pub certificate: Option<CertificateStatus>,
    /// Connections that the daemon carries for it now.
    pub connections: u64,
}

/// A pod that is not captured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct OtherPod {
    /// `NAMESPACE/NAME`, or what else is known of it.
    pub pod: String,
    /// Why it is not captured.
    pub reason: String,
    /// Whether that is an error rather than somebody's choice.
    pub error: bool,
}

/// A certificate; never its key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CertificateStatus {
    /// Until it expires; negative if it has.
    pub expires_in_seconds: i64,
    /// The last error in renewing it; empty if none.
    pub error: String,
}
