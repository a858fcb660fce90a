//! From a YAML value to a checked [`Object`], with every mistake named by its field.
//!
//! Kubernetes' own kinds are read leniently, as its API server's clients do: fields that do not matter here are not
//! looked at. Istio's kinds are read strictly, because a misspelt field in a policy is a hole: an unknown field is an
//! error. A security object that cannot be understood yields a *fallback* that refuses connections, for the case
//! that no earlier good version of it is known. Deliberately absent: files and lines; see `crate::source`.

mod authorization;
mod core;
mod peer_authentication;
mod service;
mod slice;

use crate::{
    object::{Kind, Object, ObjectKey, Selector},
    report::{FieldPath, Issue, Step},
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use mesh_xds::model::Protocol;
use serde::de::DeserializeOwned;
use serde_yaml_ng::Value;
use std::net::IpAddr;

/// What became of one YAML value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// A good object, perhaps with warnings.
    Good {
        /// The object.
        object: Box<Object>,
        /// What does not do what it may look like.
        warnings: Vec<Issue>,
    },
    /// An object of a known kind with at least one error.
    Broken {
        /// Which object, if its name could be read.
        key: Option<ObjectKey>,
        /// What stands for it when there is no earlier good version; only security objects have one.
        fallback: Option<Box<Object>>,
        /// All errors and warnings.
        issues: Vec<Issue>,
    },
    /// Something that is not used here.
    Ignored(Issue),
}

/// Reads one object (not a List).
pub fn decode(value: &Value) -> Decoded {
    let text = |name: &str| value.get(name).and_then(Value::as_str);
    let Some(kind) = text("kind") else {
        return broken(None, Issue::error("kind", "there is no kind", "add apiVersion and kind"));
    };
    let Some(api_version) = text("apiVersion") else {
        return broken(None, Issue::error("apiVersion", "there is no apiVersion", "add the apiVersion"));
    };
    let Some((kind, versions)) = known_kind(kind) else {
        return Decoded::Ignored(Issue::warning(
            "kind",
            format!("{api_version} {kind} is not used by the mesh and was ignored"),
            "remove it from this directory if it was meant to have an effect",
        ));
    };
    let key = match object_key(kind, value) {
        Ok(key) => key,
        Err(issue) => return broken(None, issue),
    };
    if !versions.contains(&api_version) {
        // The group tells apart kinds of the same name (a Service of another API group is not ours).
        if api_version.split('/').next() != versions[0].split('/').next() || !versions[0].contains('/') {
            return Decoded::Ignored(Issue::warning(
                "apiVersion",
                format!("{api_version} {kind} is not used by the mesh and was ignored"),
                format!("use apiVersion {} if {kind} was meant", versions.join(" or ")),
            ));
        }
        let issue = Issue::error(
            "apiVersion",
            format!("version {api_version} of {kind} is not known"),
            format!("use {}", versions.join(" or ")),
        );
        return finish(key.clone(), None, fallback(&key, value), vec![issue]);
    }
    let mut issues = Vec::new();
    check_name(&key, &mut issues);
    let object = decode_kind(&key, value, &mut issues);
    let fallback = fallback(&key, value);
    finish(key, object, fallback, issues)
}

/// What stands for a broken security object when no good version of it was ever seen.
fn fallback(key: &ObjectKey, value: &Value) -> Option<Object> {
    match key.kind {
        Kind::PeerAuthentication => Some(peer_authentication::fallback(key, value)),
        Kind::AuthorizationPolicy => Some(authorization::fallback(key, value)),
        _ => None,
    }
}

fn decode_kind(key: &ObjectKey, value: &Value, issues: &mut Vec<Issue>) -> Option<Object> {
    match key.kind {
        Kind::Namespace => core::namespace(key, typed(value, issues)?, issues),
        Kind::Node => core::node(key, &typed(value, issues)?),
        Kind::ServiceAccount => Some(Object::ServiceAccount(key.name.clone())),
        Kind::Pod => core::pod(key, typed(value, issues)?, issues),
        Kind::Service => service::service(key, typed(value, issues)?, issues),
        Kind::EndpointSlice => slice::endpoint_slice(key, typed(value, issues)?, issues),
        Kind::PeerAuthentication => peer_authentication::decode(key, &typed(value, issues)?, issues),
        Kind::AuthorizationPolicy => authorization::decode(key, &typed(value, issues)?, issues),
    }
}

fn finish(
    key: ObjectKey,
    object: Option<Object>,
    fallback: Option<Object>,
    mut issues: Vec<Issue>,
) -> Decoded {
    let failed = issues.iter().any(Issue::is_error);
    match object {
        Some(object) if !failed => Decoded::Good { object: Box::new(object), warnings: issues },
        _ => {
            if !failed {
                issues.push(Issue::error(
                    FieldPath::default(),
                    "it could not be read",
                    "compare it with the reference",
                ));
            }
            Decoded::Broken { key: Some(key), fallback: fallback.map(Box::new), issues }
        }
    }
}

fn broken(key: Option<ObjectKey>, issue: Issue) -> Decoded {
    Decoded::Broken { key, fallback: None, issues: vec![issue] }
}

fn known_kind(kind: &str) -> Option<(Kind, &'static [&'static str])> {
    let core: &[&str] = &["v1"];
    let security: &[&str] = &["security.istio.io/v1", "security.istio.io/v1beta1"];
    Some(match kind {
        "Namespace" => (Kind::Namespace, core),
        "Node" => (Kind::Node, core),
        "ServiceAccount" => (Kind::ServiceAccount, core),
        "Service" => (Kind::Service, core),
        "Pod" => (Kind::Pod, core),
        "EndpointSlice" => (Kind::EndpointSlice, &["discovery.k8s.io/v1"]),
        "PeerAuthentication" => (Kind::PeerAuthentication, security),
        "AuthorizationPolicy" => (Kind::AuthorizationPolicy, security),
        _ => return None,
    })
}

/// Kind, namespace and name. A namespaced object without a namespace is in `default`, as with kubectl.
fn object_key(kind: Kind, value: &Value) -> Result<ObjectKey, Issue> {
    let meta = value.get("metadata");
    let text = |name: &str| match meta.and_then(|m| m.get(name)) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(s)) if !s.is_empty() => Ok(Some(s.as_str())),
        Some(_) => Err(Issue::error(
            FieldPath::from("metadata").key(name),
            format!("the {name} is not a non-empty string"),
            "quote it if it looks like a number or a truth value",
        )),
    };
    let name = text("name")?
        .ok_or_else(|| Issue::error("metadata.name", "the object has no name", "add metadata.name"))?;
    let namespace = if kind.namespaced() { text("namespace")?.unwrap_or("default") } else { "" };
    Ok(ObjectKey::new(kind, namespace, name))
}

fn check_name(key: &ObjectKey, issues: &mut Vec<Issue>) {
    for (field, value) in [("metadata.name", &key.name.name), ("metadata.namespace", &key.name.namespace)] {
        let empty_ok = field.ends_with("namespace") && !key.kind.namespaced();
        let fits = |s: &str| {
            s.len() <= 253
                && s.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
                && s.ends_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
                && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.'))
        };
        if !(empty_ok || fits(value)) {
            issues.push(Issue::error(
                field,
                format!("{value:?} is not a Kubernetes name"),
                "use lower-case letters, digits, '-' and '.', at most 253 of them",
            ));
        }
    }
}

/// Deserialises a typed object and names the field when that fails.
fn typed<T: DeserializeOwned>(value: &Value, issues: &mut Vec<Issue>) -> Option<T> {
    match serde_path_to_error::deserialize(value) {
        Ok(typed) => Some(typed),
        Err(error) => {
            let field = field_path(error.path());
            let inner = error.into_inner().to_string();
            // serde_yaml_ng repeats the path at the front of some messages.
            let message = inner.strip_prefix(&format!("{field}: ")).unwrap_or(&inner).to_owned();
            let remedy = if message.starts_with("unknown field") {
                "correct the spelling or remove the field"
            } else {
                "give the field a value of the type that its API defines"
            };
            issues.push(Issue::error(field, message, remedy));
            None
        }
    }
}

fn field_path(path: &serde_path_to_error::Path) -> FieldPath {
    use serde_path_to_error::Segment;
    FieldPath(
        path.iter()
            .filter_map(|segment| match segment {
                Segment::Seq { index } => Some(Step::Index(*index)),
                Segment::Map { key } => Some(Step::Key(key.clone())),
                Segment::Enum { variant } => Some(Step::Key(variant.clone())),
                Segment::Unknown => None,
            })
            .collect(),
    )
}

fn created(meta: &ObjectMeta) -> Option<i64> {
    meta.creation_timestamp.as_ref().map(|t| t.0.as_second())
}

/// Parses an address and reports it when it is none.
fn address(text: &str, field: FieldPath, issues: &mut Vec<Issue>) -> Option<IpAddr> {
    match text.parse::<IpAddr>() {
        Ok(ip) if ip.is_unspecified() || ip.is_multicast() => {
            issues.push(Issue::error(
                field,
                format!("{text} is not the address of one endpoint"),
                "use a unicast address",
            ));
            None
        }
        Ok(ip) => Some(ip.to_canonical()),
        Err(_) => {
            issues.push(Issue::error(
                field,
                format!("{text:?} is not an IP address"),
                "write an IPv4 or IPv6 address without a prefix length",
            ));
            None
        }
    }
}

/// Checks a port number.
fn port(number: i64, field: FieldPath, issues: &mut Vec<Issue>) -> Option<u16> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Some(port),
        _ => {
            issues.push(Issue::error(
                field,
                format!("{number} is not a port"),
                "use a number from 1 to 65535",
            ));
            None
        }
    }
}

/// Reads a transport protocol. SCTP is known to Kubernetes but not carried by the mesh.
fn protocol(text: Option<&str>, field: FieldPath, issues: &mut Vec<Issue>) -> Option<Protocol> {
    match text {
        None | Some("TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => {
            issues.push(Issue::warning(
                field,
                "SCTP is not carried by the mesh; the port was left out",
                "nothing to do if it is reached without the mesh",
            ));
            None
        }
        Some(other) => {
            issues.push(Issue::error(
                field,
                format!("{other:?} is not a protocol"),
                "use TCP or UDP, in upper case",
            ));
            None
        }
    }
}

/// Reads `spec.selector.matchLabels` of a security object as far as it can be read, for fallbacks.
fn loose_selector(value: &Value) -> Option<Selector> {
    let labels = value.get("spec")?.get("selector")?.get("matchLabels")?.as_mapping()?;
    let pairs: Option<_> =
        labels.iter().map(|(k, v)| Some((k.as_str()?.to_owned(), v.as_str()?.to_owned()))).collect();
    pairs.map(Selector)
}

#[cfg(test)]
mod tests;
