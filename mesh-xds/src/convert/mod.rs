//! Conversions between [`crate::model`] and the wire, both ways.
//!
//! Towards the wire nothing can fail: the model is valid. From the wire everything is checked, and three things can
//! happen. A value is fine. A value is usable, but something in it is unknown or unsupported here: it is read in the
//! way that is safe, and a [`Note`] says so. A value is wrong: a [`ConvertError`] names the resource, the field and
//! the remedy, and the resource is rejected (NACK) while its last good version stays in force.
//!
//! Authorization policies are never rejected for being unknown: see [`authorization`](decode_authorization).
//! Deliberately absent: looking one resource up from another. A workload may name a service that is not there (yet).

mod authorization;
mod resource;
mod service;
mod unknown;
mod workload;

#[cfg(test)]
mod tests;

pub use authorization::{decode_authorization, encode_authorization};
pub use resource::{authorization_resource, service_resource, workload_resources};
pub use service::encode_service;
pub use workload::encode_workload;

use crate::model::{Service, Workload};
use crate::wire::{self, Any};
use bytes::Bytes;
use prost::Message;
use std::net::IpAddr;

/// Type URL of workloads and services.
pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// Type URL of policies.
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";
/// Type URL of workloads alone, for clients that ask for them (sidecars).
pub const WORKLOAD_TYPE: &str = "type.googleapis.com/istio.workload.Workload";

/// Name of the [`Extension`](wire::workload::Extension) that carries what Istio's fields cannot.
pub const EXTENSION_NAME: &str = "nodemesh";
const SERVICE_EXTENSION_TYPE: &str = "type.googleapis.com/nodemesh.v1.ServiceExtension";
const WORKLOAD_EXTENSION_TYPE: &str = "type.googleapis.com/nodemesh.v1.WorkloadExtension";

/// What an empty trust domain stands for in Istio's API.
pub const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";

/// Why a resource cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// Not the bytes of the announced type.
    #[error("{resource}: not a valid {type_url}; sender and receiver disagree about the type")]
    Decode {
        /// The resource's name.
        resource: String,
        /// The announced type.
        type_url: String,
        /// Where decoding stopped.
        source: prost::DecodeError,
    },
    /// A resource of another type than its response.
    #[error("{resource}: is a {found:?} in a response for {expected:?}; send it under its own type URL")]
    Type {
        /// The resource's name.
        resource: String,
        /// Its type.
        found: String,
        /// The type of the response.
        expected: &'static str,
    },
    /// An `Address` that is neither a workload nor a service that this version knows.
    #[error("{resource}: has neither workload nor service; set one of the two")]
    NoType {
        /// The resource's name.
        resource: String,
    },
    /// The name on the envelope is not the name of what is in it, so that a later removal would miss it.
    #[error("{resource}: contains {content:?}; the resource name must be the content's own key")]
    Name {
        /// The resource's name on the envelope.
        resource: String,
        /// The key of its content.
        content: String,
    },
    /// A field that is needed is empty.
    #[error("{resource}: {field} is empty; set it")]
    Empty {
        /// The resource's name.
        resource: String,
        /// The field, in the notation of the proto.
        field: &'static str,
    },
    /// An address that is neither IPv4 nor IPv6.
    #[error("{resource}: {field} has {len} bytes; an address has 4 or 16")]
    AddressLength {
        /// The resource's name.
        resource: String,
        /// The field.
        field: &'static str,
        /// Bytes found.
        len: usize,
    },
    /// Not a port.
    #[error("{resource}: {field} is {value}; a port is {min} to 65535")]
    Port {
        /// The resource's name.
        resource: String,
        /// The field.
        field: &'static str,
        /// The number found.
        value: u32,
        /// 0 where a zero means "not set", otherwise 1.
        min: u32,
    },
    /// A value from a newer API that decides how bytes travel: guessing could send them in the clear.
    #[error(
        "{resource}: {field} has the unknown value {value}; upgrade this node or do not use that feature"
    )]
    Unknown {
        /// The resource's name.
        resource: String,
        /// The field.
        field: &'static str,
        /// The number found.
        value: i32,
    },
    /// A duration that is negative or out of range.
    #[error("{resource}: {field} is not a duration of zero or more; set it to whole seconds")]
    Duration {
        /// The resource's name.
        resource: String,
        /// The field.
        field: &'static str,
    },
    /// A part of the identity that cannot be in a SPIFFE ID.
    #[error("{resource}: its identity is not valid; correct trust_domain, namespace or service_account")]
    Identity {
        /// The resource's name.
        resource: String,
        /// Which part, and why.
        source: crate::model::SpiffeError,
    },
}

/// Something in a usable resource that is not known or not supported here, and how it was read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Note {
    /// An enum value of a newer API.
    #[error("{field} has the unknown value {value}: read as {read_as}")]
    UnknownValue {
        /// The field.
        field: &'static str,
        /// The number found.
        value: i32,
        /// What it is taken for.
        read_as: &'static str,
    },
    /// A field that is understood and has no effect here.
    #[error("{field} is not supported: {effect}")]
    Unsupported {
        /// The field.
        field: &'static str,
        /// What happens instead.
        effect: &'static str,
    },
    /// A whole policy that is not understood.
    #[error("{field} is not understood: the policy denies every connection in its scope")]
    PolicyClosed {
        /// The field.
        field: &'static str,
    },
    /// A rule that is not understood.
    #[error("rules[{rule}] uses {field}, which is not understood: {effect}")]
    RuleClosed {
        /// Its index.
        rule: usize,
        /// The field.
        field: &'static str,
        /// What the rule does instead.
        effect: &'static str,
    },
}

/// A usable value, and what was notable about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded<T> {
    /// The value.
    pub value: T,
    /// Empty in the normal case. To be logged once per version.
    pub notes: Vec<Note>,
}

/// The content of an `istio.workload.Address`. Boxed, since the two differ much in size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A workload, named by its uid.
    Workload(Box<Workload>),
    /// A service, named `NAMESPACE/HOSTNAME`.
    Service(Box<Service>),
}

/// The `NETWORK/IP` under which an address is found on demand.
pub fn address_alias(network: &str, ip: IpAddr) -> String {
    format!("{network}/{ip}")
}

/// Other names of a workload: one for each address, none for a pod that shares its host's.
pub fn workload_aliases(w: &Workload) -> Vec<String> {
    if w.host_network {
        return Vec::new();
    }
    w.addresses.iter().map(|ip| address_alias(&w.network, *ip)).collect()
}

/// Other names of a service: one for each virtual address.
pub fn service_aliases(s: &Service) -> Vec<String> {
    s.addresses.iter().map(|a| address_alias(&a.network, a.ip)).collect()
}

/// Reads a resource of type [`ADDRESS_TYPE`].
pub fn decode_address(name: &str, any: &Any) -> Result<Decoded<Address>, ConvertError> {
    use wire::workload::address::Type;
    let address: wire::workload::Address = decode(name, any, ADDRESS_TYPE)?;
    let mut notes = Vec::new();
    let (value, key) = match address.r#type {
        Some(Type::Workload(w)) => {
            let w = workload::from_wire(name, w, &mut notes)?;
            let key = w.uid.clone();
            (Address::Workload(Box::new(w)), key)
        }
        Some(Type::Service(s)) => {
            let s = service::from_wire(name, s, &mut notes)?;
            let key = s.key();
            (Address::Service(Box::new(s)), key)
        }
        None => return Err(ConvertError::NoType { resource: name.to_owned() }),
    };
    check_name(name, key)?;
    Ok(Decoded { value, notes })
}

/// Reads a resource of type [`WORKLOAD_TYPE`].
pub fn decode_workload(name: &str, any: &Any) -> Result<Decoded<Workload>, ConvertError> {
    let mut notes = Vec::new();
    let value = workload::from_wire(name, decode(name, any, WORKLOAD_TYPE)?, &mut notes)?;
    check_name(name, value.uid.clone())?;
    Ok(Decoded { value, notes })
}

/// Packs a message. The encoding is deterministic: maps are ordered.
pub(crate) fn pack(type_url: &str, message: &impl Message) -> Any {
    Any { type_url: type_url.to_owned(), value: message.encode_to_vec().into() }
}

fn check_name(name: &str, content: String) -> Result<(), ConvertError> {
    if name == content { Ok(()) } else { Err(ConvertError::Name { resource: name.to_owned(), content }) }
}

fn decode<M: Message + Default>(name: &str, any: &Any, expected: &'static str) -> Result<M, ConvertError> {
    check_type(name, any, expected)?;
    M::decode(any.value.clone()).map_err(|source| ConvertError::Decode {
        resource: name.to_owned(),
        type_url: any.type_url.clone(),
        source,
    })
}

fn check_type(name: &str, any: &Any, expected: &'static str) -> Result<(), ConvertError> {
    if any.type_url == expected {
        return Ok(());
    }
    Err(ConvertError::Type { resource: name.to_owned(), found: any.type_url.clone(), expected })
}

/// Finds our extension among those of a resource. One that cannot be decoded is an error: it carries what to do
/// with UDP and must not vanish silently.
fn extension<M: Message + Default>(
    resource: &str,
    extensions: &[wire::workload::Extension],
    type_url: &'static str,
) -> Result<Option<M>, ConvertError> {
    let ours = extensions.iter().filter(|e| e.name == EXTENSION_NAME).find_map(|e| e.config.as_ref());
    ours.map(|any| decode(resource, any, type_url)).transpose()
}

fn ip_to_wire(ip: IpAddr) -> Bytes {
    match ip {
        IpAddr::V4(ip) => Bytes::copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => Bytes::copy_from_slice(&ip.octets()),
    }
}

fn ip_from_bytes(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::from(v4));
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

fn ip_from_wire(resource: &str, field: &'static str, bytes: &[u8]) -> Result<IpAddr, ConvertError> {
    ip_from_bytes(bytes).ok_or_else(|| ConvertError::AddressLength {
        resource: resource.to_owned(),
        field,
        len: bytes.len(),
    })
}

/// A port number; `min` 0 where a zero means "not set".
fn port(resource: &str, field: &'static str, value: u32, min: u32) -> Result<u16, ConvertError> {
    u16::try_from(value).ok().filter(|p| u32::from(*p) >= min).ok_or_else(|| ConvertError::Port {
        resource: resource.to_owned(),
        field,
        value,
        min,
    })
}

fn required(resource: &str, field: &'static str, value: String) -> Result<String, ConvertError> {
    if value.is_empty() {
        return Err(ConvertError::Empty { resource: resource.to_owned(), field });
    }
    Ok(value)
}
