//! Configuration on the wire: protos, generated code, the validated model, conversions between the two, and the
//! sans-IO delta xDS client and server.
//!
//! Deliberately absent: sockets (but for the thin tonic adapters), Kubernetes objects, and any knowledge of BPF.

pub mod convert;
pub mod delta;
pub mod grpc;
pub mod model;
pub mod node;
pub mod wire;
