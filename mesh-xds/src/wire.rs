//! The wire types: generated protobuf code and the few names that go with it.
//!
//! Written by `examples/codegen.rs` from `proto/`; do not edit `gen/`. Deliberately absent: validation. Code outside
//! this crate uses [`crate::model`] and [`crate::convert`].

use bytes::Bytes;

#[allow(missing_docs, unreachable_pub, rust_2018_idioms, clippy::all, clippy::pedantic, clippy::needless_pass_by_value)]
#[rustfmt::skip]
#[path = "gen/mod.rs"]
pub mod proto;

pub use proto::envoy::config::core::v3 as core;
pub use proto::envoy::service::discovery::v3 as discovery;
pub use proto::google::rpc;
pub use proto::istio::{security, v1::auth as ca, workload};
pub use proto::nodemesh::v1 as nodemesh;

/// `google.protobuf.Any` whose payload is shared and not copied when it is cloned.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Any {
    /// `type.googleapis.com/PACKAGE.MESSAGE`.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// The encoded message.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}
