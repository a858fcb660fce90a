//! The harness of the end-to-end tests and of the demo: a cluster of network namespaces and cgroups on one kernel,
//! with the real daemons, the real CNI plugin and a small traffic program in the place of the users' applications.
//!
//! A node is a network namespace with a bridge for its pods and a veth to a common fabric, plus a cgroup that
//! stands for the node's cgroup root. A pod is a network namespace plus a cgroup. Nothing is created in the
//! machine's own network namespace, everything carries a run id, and what a crashed run leaves behind is removed
//! by the next one.
//!
//! Deliberately absent: traffic shaping by the kernel (netem is not everywhere), any knowledge of how the daemons work
//! inside, and any use of their crates. The daemons are driven through their command lines, files, sockets and metrics
//! only, and the peers in `peer.rs` are written against the wire format.

pub mod app;
pub mod cgroup;
pub mod cluster;
pub mod daemons;
pub mod faults;
pub mod fixture;
pub mod foreign;
pub mod hostile;
pub mod metrics;
pub mod nameserver;
pub mod netns;
pub mod peer;
pub mod pki;
pub mod proc;
pub mod relay;
pub mod run;
pub mod sniff;
mod sys;
pub mod wait;
