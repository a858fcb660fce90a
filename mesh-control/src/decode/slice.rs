//! EndpointSlice.

use super::{address, port, protocol};
use crate::{
    object::{Endpoint, EndpointSlice, Object, ObjectKey, SlicePort},
    report::{FieldPath, Issue},
};
use k8s_openapi::api::discovery::v1;

/// The label by which a slice belongs to a service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

pub(super) fn endpoint_slice(
    key: &ObjectKey,
    raw: v1::EndpointSlice,
    issues: &mut Vec<Issue>,
) -> Option<Object> {
    let service = raw.metadata.labels.as_ref().and_then(|l| l.get(SERVICE_NAME)).cloned();
    if service.is_none() {
        issues.push(Issue::error(
            FieldPath::from("metadata.labels").key(SERVICE_NAME),
            "the slice belongs to no service",
            format!("add the label {SERVICE_NAME} with the name of its Service"),
        ));
    }
    let v4 = match raw.address_type.as_str() {
        "IPv4" => true,
        "IPv6" => false,
        "FQDN" => {
            issues.push(Issue::error(
                "addressType",
                "endpoints by DNS name are not supported",
                "list their addresses in slices of type IPv4 or IPv6",
            ));
            return None;
        }
        other => {
            issues.push(Issue::error(
                "addressType",
                format!("{other:?} is not an address type"),
                "use IPv4 or IPv6",
            ));
            return None;
        }
    };
    let mut ports: Vec<SlicePort> = Vec::new();
    for (i, p) in raw.ports.iter().flatten().enumerate() {
        let at = FieldPath::from("ports").index(i);
        let Some(protocol) = protocol(p.protocol.as_deref(), at.key("protocol"), issues) else { continue };
        let Some(number) = p.port else {
            issues.push(Issue::warning(
                at.key("port"),
                "a port without a number (all ports) is not supported; it was left out",
                "give the number",
            ));
            continue;
        };
        let Some(number) = port(number.into(), at.key("port"), issues) else { continue };
        ports.push(SlicePort { name: p.name.clone().unwrap_or_default(), port: number, protocol });
    }
    let endpoints = raw
        .endpoints
        .unwrap_or_default()
        .into_iter()
        .enumerate()
        .map(|(i, e)| endpoint(e, v4, &FieldPath::from("endpoints").index(i), issues))
        .collect();
    Some(Object::EndpointSlice(EndpointSlice { name: key.name.clone(), service: service?, endpoints, ports }))
}

fn endpoint(raw: v1::Endpoint, v4: bool, at: &FieldPath, issues: &mut Vec<Issue>) -> Endpoint {
    let mut addresses = Vec::new();
    for (i, text) in raw.addresses.iter().enumerate() {
        let at = at.key("addresses").index(i);
        let Some(ip) = address(text, at.clone(), issues) else { continue };
        if ip.is_ipv4() == v4 {
            addresses.push(ip);
        } else {
            issues.push(Issue::error(
                at,
                format!("{ip} is not of the slice's addressType"),
                "put IPv4 and IPv6 endpoints into slices of their own",
            ));
        }
    }
    if raw.addresses.is_empty() {
        issues.push(Issue::error(at.key("addresses"), "the endpoint has no address", "add its address"));
    }
    let conditions = raw.conditions.unwrap_or_default();
    Endpoint {
        addresses,
        hostname: raw.hostname.unwrap_or_default(),
        pod: raw.target_ref.filter(|t| t.kind.as_deref() == Some("Pod")).and_then(|t| t.name),
        node: raw.node_name.unwrap_or_default(),
        zone: raw.zone.unwrap_or_default(),
        // "nil should be interpreted as true": EndpointConditions.ready.
        ready: conditions.ready.unwrap_or(true),
        terminating: conditions.terminating.unwrap_or(false),
    }
}
