//! The daemon's HTTP faces: metrics and health for the cluster ([`server::stats_router`], port 15020), and
//! the admin interface for this node's root ([`server::admin_router`], loopback and a Unix socket), with the
//! client and the text form that `mesh-node status` uses.
//!
//! Deliberately absent: TLS and tokens (the admin interface never leaves the node), secrets in any answer,
//! and knowledge of where the data comes from: that is behind [`AdminState`].

pub mod client;
pub mod render;
pub mod server;
mod status;

pub use status::{
    BpfStatus, CertificateStatus, Counter, EnrolledPod, OtherPod, RejectedResource, Status, WorldStatus,
    XdsStatus,
};

use serde_json::Value;

/// Where the admin interface listens unless it is told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/nodemesh/admin.sock";

/// What a health check says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// All is well.
    Good,
    /// Well enough to serve, and something that an operator should know.
    GoodBut(String),
    /// Not (yet) well, with every reason in a line of its own.
    Bad(Vec<String>),
}

/// A request to the admin interface that makes no sense; the message names what is accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadRequest(pub String);

/// The rest of the daemon, as the admin interface sees it. No method may wait for the data path: they run on
/// the admin runtime and read snapshots.
pub trait AdminState: Send + Sync + 'static {
    /// Whether the daemon should be kept running.
    fn live(&self) -> Health;
    /// Whether configuration and BPF are in step and pods can be served.
    fn ready(&self) -> Health;
    /// The overview.
    fn status(&self) -> Status;
    /// Everything: pods, workloads, services, policies, certificates (never keys), BPF counters, and the
    /// desired next to the actual BPF state.
    fn dump(&self) -> Value;
    /// Sets the daemon's log filter (the syntax of `RUST_LOG`).
    fn set_log_level(&self, filter: &str) -> Result<(), BadRequest>;
    /// Sets the level of the BPF programs' log (`off`, `error`, `warn`, `info`, `debug`, `trace`).
    fn set_bpf_log_level(&self, level: &str) -> Result<(), BadRequest>;
    /// All metrics as OpenMetrics text; normally [`crate::metrics::Metrics::render`].
    fn metrics(&self) -> Result<String, std::fmt::Error>;
}
