//! The CNI plugin `mesh-cni`: chained after the plugin that makes a pod's network, it has the daemon enrol
//! the pod before the pod's first container runs. CNI specification 1.1.0 (also 1.0.0, 0.4.0 and 0.3.1).
//!
//! [`plugin::run`] is the whole plugin, as a function of environment and standard input, so that it is tested
//! without a container runtime. Deliberately absent: any change to the pod's network, asynchronous code, and
//! the decision whether a pod is in the mesh.

pub mod client;
pub mod conf;
pub mod env;
pub mod error;
pub mod plugin;
#[cfg(test)]
mod tests;

pub use error::CniError;
pub use plugin::{Outcome, run};

/// The CNI versions that the plugin speaks, oldest first.
pub const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", LATEST];
/// The newest of them.
pub const LATEST: &str = "1.1.0";
