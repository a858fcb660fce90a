//! Service.

use super::{address, created, port, protocol};
use crate::{
    object::{Distribution, Object, ObjectKey, Service, ServicePort, TargetRef},
    report::{FieldPath, Issue},
};
use k8s_openapi::{api::core::v1, apimachinery::pkg::util::intstr::IntOrString};
use mesh_xds::model::{AppProtocol, LbAlgorithm, Protocol};
use std::{net::IpAddr, time::Duration};

/// Kubernetes' default for `sessionAffinityConfig.clientIP.timeoutSeconds`.
const DEFAULT_AFFINITY: i32 = 10_800;
/// The annotation of topology aware routing, and its older name.
const TOPOLOGY_MODE: [&str; 2] =
    ["service.kubernetes.io/topology-mode", "service.kubernetes.io/topology-aware-hints"];

/// Chooses the algorithm that picks among endpoints.
const LOAD_BALANCER: &str = "nodemesh.io/load-balancer";

pub(super) fn service(key: &ObjectKey, raw: v1::Service, issues: &mut Vec<Issue>) -> Option<Object> {
    let created = created(&raw.metadata);
    let annotations = raw.metadata.annotations.unwrap_or_default();
    let Some(spec) = raw.spec else {
        issues.push(Issue::error("spec", "the service has no spec", "add spec.ports and spec.clusterIP"));
        return None;
    };
    let external_name = match spec.type_.as_deref() {
        None | Some("ClusterIP" | "NodePort" | "LoadBalancer") => false,
        Some("ExternalName") => true,
        Some(other) => {
            issues.push(Issue::error(
                "spec.type",
                format!("{other:?} is not a type of service"),
                "use ClusterIP, NodePort, LoadBalancer or ExternalName",
            ));
            false
        }
    };
    let cluster_ips = cluster_ips(&spec, external_name, issues);
    let ports = ports(&spec, external_name, issues);
    let distribution = distribution(&spec, &annotations, issues);
    let affinity = affinity(&spec, issues);
    let algorithm = algorithm(&annotations, issues);
    Some(Object::Service(Service {
        name: key.name.clone(),
        created,
        cluster_ips,
        ports,
        affinity,
        distribution,
        algorithm,
        publish_not_ready: spec.publish_not_ready_addresses == Some(true),
        selector: spec.selector.unwrap_or_default(),
        external_name,
    }))
}

/// `None` in `clusterIP` makes the service headless. A service with no address at all was never accepted by an API
/// server, which allocates them; from files it would silently have no virtual address.
fn cluster_ips(spec: &v1::ServiceSpec, external_name: bool, issues: &mut Vec<Issue>) -> Vec<IpAddr> {
    let single = spec.cluster_ip.as_deref().unwrap_or_default();
    let many: Vec<&str> = spec.cluster_ips.iter().flatten().map(String::as_str).collect();
    if external_name {
        return Vec::new();
    }
    if single == "None" || many == ["None"] {
        return Vec::new();
    }
    if let (false, Some(first)) = (single.is_empty(), many.first())
        && single != *first
    {
        issues.push(Issue::error(
            "spec.clusterIP",
            format!("{single} is not the first of clusterIPs, which is {first}"),
            "make them equal, or leave clusterIP out",
        ));
    }
    let mut found = Vec::new();
    if many.is_empty() {
        if single.is_empty() {
            issues.push(Issue::error(
                "spec.clusterIP",
                "the service has no address, and there is no API server here to allocate one",
                "set clusterIP (or clusterIPs), or clusterIP: None for a headless service",
            ));
        } else {
            found.extend(address(single, "spec.clusterIP".into(), issues));
        }
    }
    for (i, text) in many.iter().enumerate() {
        let at = FieldPath::from("spec.clusterIPs").index(i);
        let Some(ip) = address(text, at.clone(), issues) else { continue };
        if found.iter().any(|other: &IpAddr| other.is_ipv4() == ip.is_ipv4()) {
            issues.push(Issue::error(
                at,
                format!("{ip} is a second address of the same family"),
                "give at most one IPv4 and one IPv6 address",
            ));
        } else {
            found.push(ip);
        }
    }
    found
}

fn ports(spec: &v1::ServiceSpec, external_name: bool, issues: &mut Vec<Issue>) -> Vec<ServicePort> {
    let raw = spec.ports.as_deref().unwrap_or_default();
    let headless = spec.cluster_ip.as_deref() == Some("None");
    if raw.is_empty() && !headless && !external_name {
        issues.push(Issue::error("spec.ports", "the service has no ports", "add at least one port"));
    }
    let mut found: Vec<ServicePort> = Vec::new();
    for (i, p) in raw.iter().enumerate() {
        let at = FieldPath::from("spec.ports").index(i);
        let Some(protocol) = protocol(p.protocol.as_deref(), at.key("protocol"), issues) else { continue };
        let Some(number) = port(p.port.into(), at.key("port"), issues) else { continue };
        let target = match &p.target_port {
            None => TargetRef::Number(number),
            Some(IntOrString::Int(n)) => match port((*n).into(), at.key("targetPort"), issues) {
                Some(n) => TargetRef::Number(n),
                None => continue,
            },
            Some(IntOrString::String(s)) if s.is_empty() => {
                issues.push(Issue::error(
                    at.key("targetPort"),
                    "the name of the target port is empty",
                    "give the name or the number of a container port",
                ));
                continue;
            }
            Some(IntOrString::String(s)) => TargetRef::Name(s.clone()),
        };
        let name = p.name.clone().unwrap_or_default();
        if name.is_empty() && raw.len() > 1 {
            issues.push(Issue::error(
                at.key("name"),
                "a service with several ports needs a name for each",
                "add a name, for example http or tcp-db",
            ));
        }
        if found.iter().any(|other| other.name == name) && !name.is_empty() {
            issues.push(Issue::error(
                at.key("name"),
                format!("another port is named {name:?} too"),
                "choose names that differ",
            ));
        }
        if found.iter().any(|other| (other.port, other.protocol) == (number, protocol)) {
            issues.push(Issue::error(
                at.key("port"),
                format!("{number} is there twice for the same protocol"),
                "remove one of the two",
            ));
        }
        let app_protocol = app_protocol(p.app_protocol.as_deref(), &name, protocol);
        found.push(ServicePort { name, port: number, protocol, target, app_protocol });
    }
    found
}

/// `appProtocol` decides; where it is absent, the port name up to its first dash does.
fn app_protocol(declared: Option<&str>, name: &str, protocol: Protocol) -> AppProtocol {
    if protocol == Protocol::Udp {
        return AppProtocol::Unknown;
    }
    let word = match declared {
        Some(declared) => declared.to_ascii_lowercase(),
        None if name == "grpc-web" || name.starts_with("grpc-web-") => "grpc-web".to_owned(),
        None => name.split('-').next().unwrap_or_default().to_owned(),
    };
    match word.as_str() {
        "http" | "grpc-web" | "kubernetes.io/ws" => AppProtocol::Http1,
        "http2" | "h2c" | "kubernetes.io/h2c" => AppProtocol::Http2,
        "grpc" => AppProtocol::Grpc,
        "https" | "tls" | "kubernetes.io/wss" => AppProtocol::Tls,
        "tcp" | "mongo" | "mysql" | "redis" => AppProtocol::Tcp,
        _ => AppProtocol::Unknown,
    }
}

fn distribution(
    spec: &v1::ServiceSpec,
    annotations: &crate::object::Labels,
    issues: &mut Vec<Issue>,
) -> Distribution {
    match spec.internal_traffic_policy.as_deref() {
        None | Some("Cluster") => {}
        Some("Local") => return Distribution::LocalOnly,
        Some(other) => issues.push(Issue::error(
            "spec.internalTrafficPolicy",
            format!("{other:?} is not a traffic policy"),
            "use Cluster or Local",
        )),
    }
    match spec.traffic_distribution.as_deref() {
        Some("PreferClose" | "PreferSameZone") => return Distribution::PreferSameZone,
        Some("PreferSameNode") => return Distribution::PreferSameNode,
        Some(other) => issues.push(Issue::error(
            "spec.trafficDistribution",
            format!("{other:?} is not a traffic distribution"),
            "use PreferSameZone, PreferSameNode or PreferClose",
        )),
        None => {}
    }
    let auto = |name: &str| annotations.get(name).is_some_and(|v| v.eq_ignore_ascii_case("auto"));
    if TOPOLOGY_MODE.iter().any(|name| auto(name)) { Distribution::PreferSameZone } else { Distribution::Any }
}

/// Without effect on what is reachable, so that an unknown value does not keep the service out.
fn algorithm(annotations: &crate::object::Labels, issues: &mut Vec<Issue>) -> LbAlgorithm {
    match annotations.get(LOAD_BALANCER).map(String::as_str) {
        None | Some("random") => LbAlgorithm::Random,
        Some("maglev") => LbAlgorithm::Maglev,
        Some(other) => {
            issues.push(Issue::warning(
                FieldPath::from("metadata.annotations").key(LOAD_BALANCER),
                format!("{other:?} is not a way to choose an endpoint, so it is done at random"),
                "use maglev or random",
            ));
            LbAlgorithm::Random
        }
    }
}

fn affinity(spec: &v1::ServiceSpec, issues: &mut Vec<Issue>) -> Option<Duration> {
    match spec.session_affinity.as_deref() {
        None | Some("None") => return None,
        Some("ClientIP") => {}
        Some(other) => {
            issues.push(Issue::error(
                "spec.sessionAffinity",
                format!("{other:?} is not a session affinity"),
                "use ClientIP or None",
            ));
            return None;
        }
    }
    let seconds = spec
        .session_affinity_config
        .as_ref()
        .and_then(|c| c.client_ip.as_ref())
        .and_then(|c| c.timeout_seconds)
        .unwrap_or(DEFAULT_AFFINITY);
    match u64::try_from(seconds) {
        Ok(s) if (1..=86_400).contains(&s) => Some(Duration::from_secs(s)),
        _ => {
            issues.push(Issue::error(
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                format!("{seconds} is out of range"),
                "use 1 to 86400 seconds",
            ));
            None
        }
    }
}
