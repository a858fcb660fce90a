//! Model values as resources that a server can serve: encoded, named, with aliases and a content hash.

use super::{
    ADDRESS_TYPE, AUTHORIZATION_TYPE, WORKLOAD_TYPE, encode_authorization, encode_service, encode_workload,
    pack, service_aliases, workload_aliases,
};
use crate::delta::{Audience, Resource};
use crate::model::{Authorization, Service, Workload};
use crate::wire::{Any, workload as pb};
use prost::Message;

/// A workload in its two forms, as [`ADDRESS_TYPE`] and as [`WORKLOAD_TYPE`]; both share one buffer.
///
/// A workload without an address is of use to the node it is bound to, which decides about its enrolment, and to
/// nobody else: it is for nodemesh's own clients only.
pub fn workload_resources(w: &Workload) -> (Resource, Resource) {
    let inner = encode_workload(w);
    let len = inner.encoded_len();
    let address = pack(ADDRESS_TYPE, &pb::Address { r#type: Some(pb::address::Type::Workload(inner)) });
    // The Address has the workload as its only field, so its encoding ends with the workload's.
    let bare = address.value.slice(address.value.len().saturating_sub(len)..);
    let bare = Any { type_url: WORKLOAD_TYPE.to_owned(), value: bare };
    let audience = if w.addresses.is_empty() { Audience::Nodemesh } else { Audience::Everyone };
    (
        Resource::new(&w.uid, workload_aliases(w), address).for_audience(audience),
        Resource::new(&w.uid, workload_aliases(w), bare).for_audience(audience),
    )
}

/// A service, as [`ADDRESS_TYPE`].
pub fn service_resource(s: &Service) -> Resource {
    let address = pb::Address { r#type: Some(pb::address::Type::Service(encode_service(s))) };
    Resource::new(&s.key(), service_aliases(s), pack(ADDRESS_TYPE, &address))
}

/// A policy, as [`AUTHORIZATION_TYPE`].
pub fn authorization_resource(a: &Authorization) -> Resource {
    Resource::new(&a.key(), Vec::new(), pack(AUTHORIZATION_TYPE, &encode_authorization(a)))
}
