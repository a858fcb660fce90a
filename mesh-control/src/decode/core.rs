//! Namespace, Node and Pod.

use super::{address, created, port, protocol};
use crate::{
    object::{ContainerPort, Enrol, Labels, Namespace, Node, Object, ObjectKey, Pod, PodHostname},
    report::{FieldPath, Issue},
};
use k8s_openapi::api::core::v1;
use mesh_xds::model::Locality;

/// Our label, on namespaces and pods.
const ENABLED: &str = "nodemesh.io/enabled";
/// Istio's label, honoured as an alias.
const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";

pub(super) fn namespace(key: &ObjectKey, raw: v1::Namespace, issues: &mut Vec<Issue>) -> Option<Object> {
    let labels = raw.metadata.labels.unwrap_or_default();
    Some(Object::Namespace(Namespace { name: key.name.name.clone(), enrol: enrol(&labels, issues) }))
}

pub(super) fn node(key: &ObjectKey, raw: &v1::Node) -> Option<Object> {
    let label = |name: &str| {
        raw.metadata.labels.as_ref().and_then(|labels| labels.get(name)).cloned().unwrap_or_default()
    };
    Some(Object::Node(Node {
        name: key.name.name.clone(),
        locality: Locality {
            region: label("topology.kubernetes.io/region"),
            zone: label("topology.kubernetes.io/zone"),
            subzone: label("topology.istio.io/subzone"),
        },
    }))
}

/// Our own label decides; where it is absent, Istio's does.
fn enrol(labels: &Labels, issues: &mut Vec<Issue>) -> Enrol {
    let mut warn = |label: &str, value: &str, remedy: &str| {
        issues.push(Issue::warning(
            FieldPath::from("metadata.labels").key(label),
            format!("{value:?} says nothing about the mesh and was ignored"),
            remedy,
        ));
    };
    match labels.get(ENABLED).map(String::as_str) {
        Some("true") => return Enrol::In,
        Some("false") => return Enrol::Out,
        Some(other) => warn(ENABLED, other, "use \"true\" or \"false\", in quotes"),
        None => {}
    }
    match labels.get(DATAPLANE_MODE).map(String::as_str) {
        Some("ambient") => Enrol::In,
        Some("none") => Enrol::Out,
        Some(other) => {
            warn(DATAPLANE_MODE, other, "use ambient or none");
            Enrol::Unset
        }
        None => Enrol::Unset,
    }
}

pub(super) fn pod(key: &ObjectKey, raw: v1::Pod, issues: &mut Vec<Issue>) -> Option<Object> {
    let meta = raw.metadata;
    let created = created(&meta);
    let Some(spec) = raw.spec else {
        issues.push(Issue::error("spec", "the pod has no spec", "add spec.nodeName and spec.containers"));
        return None;
    };
    let status = raw.status.unwrap_or_default();
    let labels = meta.labels.unwrap_or_default();
    let annotations = meta.annotations.unwrap_or_default();

    let host_network = spec.host_network == Some(true);
    let node = spec.node_name.clone().unwrap_or_default();
    let service_account = spec
        .service_account_name
        .clone()
        .or_else(|| spec.service_account.clone())
        .filter(|s| !s.is_empty())
        .unwrap_or_else(|| "default".to_owned());
    if mesh_xds::model::SpiffeId::new("trust.domain", &key.name.namespace, &service_account).is_err() {
        issues.push(Issue::error(
            "spec.serviceAccountName",
            format!("{service_account:?} cannot be part of an identity"),
            "use the name of a ServiceAccount",
        ));
    }

    let addresses = pod_addresses(&status, issues);
    if node.is_empty() && !addresses.is_empty() {
        issues.push(Issue::warning(
            "spec.nodeName",
            "the pod has an address but runs on no node, so no node will capture it",
            "set spec.nodeName to the name of a Node",
        ));
    }
    let phase = status.phase.as_deref().unwrap_or_default();
    let finished = matches!(phase, "Succeeded" | "Failed");
    let ready = status.conditions.iter().flatten().find(|c| c.type_ == "Ready");
    if ready.is_none() && !addresses.is_empty() && !finished {
        issues.push(Issue::warning(
            "status.conditions",
            "the pod has an address but no Ready condition, so it gets no traffic from services",
            "add a condition with type: Ready and status: \"True\"",
        ));
    }
    let owner = meta
        .owner_references
        .iter()
        .flatten()
        .find(|o| o.controller == Some(true))
        .map(|o| (o.kind.clone(), o.name.clone()));

    Some(Object::Pod(Pod {
        name: key.name.clone(),
        owner,
        created,
        node,
        service_account,
        hostname: match (spec.hostname.clone(), spec.subdomain.clone()) {
            (Some(hostname), Some(subdomain)) => Some(Box::new(PodHostname { hostname, subdomain })),
            _ => None,
        },
        host_network,
        ready: ready.is_some_and(|c| c.status == "True"),
        terminating: meta.deletion_timestamp.is_some(),
        finished,
        ports: container_ports(&spec, issues),
        addresses,
        enrol: enrol(&labels, issues),
        sidecar: annotations.contains_key("sidecar.istio.io/status"),
        native_tunnel: labels.get("networking.istio.io/tunnel").is_some_and(|v| v == "http"),
        labels,
    }))
}

fn pod_addresses(status: &v1::PodStatus, issues: &mut Vec<Issue>) -> Vec<std::net::IpAddr> {
    let mut addresses = Vec::new();
    let single = status.pod_ip.iter().map(|ip| (FieldPath::from("status.podIP"), ip));
    let many = status
        .pod_ips
        .iter()
        .flatten()
        .enumerate()
        .map(|(i, ip)| (FieldPath::from("status.podIPs").index(i).key("ip"), &ip.ip));
    for (field, text) in single.chain(many).filter(|(_, text)| !text.is_empty()) {
        let Some(ip) = address(text, field, issues) else { continue };
        if !addresses.contains(&ip) {
            addresses.push(ip);
        }
    }
    addresses
}

/// Named ports of containers and of restartable init containers, which is where a service's named port may lead.
fn container_ports(spec: &v1::PodSpec, issues: &mut Vec<Issue>) -> Vec<ContainerPort> {
    let mut found = Vec::new();
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars
        .enumerate()
        .filter(|(_, c)| c.restart_policy.as_deref() == Some("Always"))
        .map(|(i, c)| ("spec.initContainers", i, c));
    let containers = spec.containers.iter().enumerate().map(|(i, c)| ("spec.containers", i, c));
    for (list, i, container) in containers.chain(sidecars) {
        for (j, p) in container.ports.iter().flatten().enumerate() {
            let Some(name) = p.name.clone().filter(|n| !n.is_empty()) else { continue };
            let at = FieldPath::from(list).index(i).key("ports").index(j);
            let Some(protocol) = protocol(p.protocol.as_deref(), at.key("protocol"), issues) else {
                continue;
            };
            let Some(number) = port(p.container_port.into(), at.key("containerPort"), issues) else {
                continue;
            };
            found.push(ContainerPort { name, port: number, protocol });
        }
    }
    found
}
