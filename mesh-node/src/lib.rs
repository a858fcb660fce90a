//! The node daemon of nodemesh: captures pods through BPF, carries their connections over mutual TLS, and takes
//! its configuration from the control plane.
//!
//! Arrows inside the crate: role -> outbound | inbound -> l4 | hbone -> plan | policy | tls | identity -> state.
//! `bpf` is the only user of aya, `net` the only door to setns and raw socket options.

pub mod admin;
pub mod bpf;
pub mod check;
pub mod cni;
pub mod config;
pub mod disk;
pub mod dns;
pub mod drain;
pub mod enroll;
pub mod fair;
pub mod hbone;
pub mod identity;
pub mod inbound;
pub mod l4;
pub mod local;
pub mod memory;
pub mod metrics;
pub mod net;
pub mod outbound;
pub mod outcome;
pub mod plan;
pub mod policy;
pub mod pulse;
pub mod role;
pub mod state;
pub mod takeover;
pub mod tls;
