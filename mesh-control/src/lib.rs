//! The control plane: Kubernetes objects in, xDS and certificates out.
//!
//! `source` reads objects, `decode` checks them, `index` joins them (single writer, no I/O), `snapshot` is the
//! immutable result, `serve` hands it to the nodes. Deliberately absent: anything that a node does with it.

pub mod admin;
pub mod auth;
pub mod ca;
pub mod config;
pub mod decode;
pub mod engine;
pub mod index;
pub mod object;
pub mod report;
pub mod run;
pub mod serve;
pub mod snapshot;
pub mod source;
