//! Workloads. Addresses, ports and identity are checked; labels for metrics are taken as they are.

use super::{
    ConvertError, DEFAULT_TRUST_DOMAIN, EXTENSION_NAME, Note, WORKLOAD_EXTENSION_TYPE, extension,
    ip_from_wire, ip_to_wire, pack, port, required,
};
use crate::model::{
    Health, Locality, NamespacedName, ServiceMembership, TargetPort, TunnelProtocol, Workload, WorkloadKind,
};
use crate::wire::{nodemesh as ext, workload as pb};
use std::collections::BTreeMap;

/// The wire form of a workload.
pub fn encode_workload(w: &Workload) -> pb::Workload {
    // A service that the workload backs over UDP alone is left out of Istio's map, where it would look like an
    // endpoint without ports.
    let services = w
        .services
        .iter()
        .filter(|(_, m)| !m.tcp.is_empty() || m.udp.is_empty())
        .map(|(key, m)| (key.clone(), pb::PortList { ports: m.tcp.iter().map(tcp_port).collect() }))
        .collect();
    let udp_services: BTreeMap<_, _> = w
        .services
        .iter()
        .filter(|(_, m)| !m.udp.is_empty())
        .map(|(key, m)| (key.clone(), ext::UdpPortList { ports: m.udp.iter().map(udp_port).collect() }))
        .collect();
    let hostnames: BTreeMap<_, _> = w
        .services
        .iter()
        .filter(|(_, m)| !m.hostname.is_empty())
        .map(|(key, m)| (key.clone(), m.hostname.clone()))
        .collect();
    let extensions = if udp_services.is_empty() && hostnames.is_empty() {
        Vec::new()
    } else {
        let config = pack(WORKLOAD_EXTENSION_TYPE, &ext::WorkloadExtension { udp_services, hostnames });
        vec![pb::Extension { name: EXTENSION_NAME.to_owned(), config: Some(config) }]
    };
    let l = &w.locality;
    pb::Workload {
        uid: w.uid.clone(),
        name: w.name.name.clone(),
        namespace: w.name.namespace.clone(),
        trust_domain: w.trust_domain.clone(),
        service_account: w.service_account.clone(),
        addresses: w.addresses.iter().copied().map(ip_to_wire).collect(),
        network: w.network.clone(),
        network_mode: if w.host_network { pb::NetworkMode::HostNetwork } else { pb::NetworkMode::Standard }
            .into(),
        cluster_id: w.cluster_id.clone(),
        node: w.node.clone(),
        locality: (*l != Locality::default()).then(|| pb::Locality {
            region: l.region.clone(),
            zone: l.zone.clone(),
            subzone: l.subzone.clone(),
        }),
        tunnel_protocol: match w.tunnel {
            TunnelProtocol::None => pb::TunnelProtocol::None,
            TunnelProtocol::Hbone => pb::TunnelProtocol::Hbone,
        }
        .into(),
        native_tunnel: w.native_tunnel,
        services,
        authorization_policies: w.policies.clone(),
        status: match w.health {
            Health::Healthy => pb::WorkloadStatus::Healthy,
            Health::Unhealthy => pb::WorkloadStatus::Unhealthy,
        }
        .into(),
        capacity: (w.weight != 1).then_some(w.weight),
        canonical_name: w.canonical_name.clone(),
        canonical_revision: w.canonical_revision.clone(),
        workload_type: match w.kind {
            WorkloadKind::Deployment => pb::WorkloadType::Deployment,
            WorkloadKind::CronJob => pb::WorkloadType::Cronjob,
            WorkloadKind::Pod => pb::WorkloadType::Pod,
            WorkloadKind::Job => pb::WorkloadType::Job,
        }
        .into(),
        workload_name: w.workload_name.clone(),
        extensions,
        ..pb::Workload::default()
    }
}

fn tcp_port(p: &TargetPort) -> pb::Port {
    pb::Port { service_port: p.service_port.into(), target_port: p.target_port.into() }
}

fn udp_port(p: &TargetPort) -> ext::UdpPort {
    ext::UdpPort { service_port: p.service_port.into(), target_port: p.target_port.into() }
}

pub(super) fn from_wire(
    resource: &str,
    w: pb::Workload,
    notes: &mut Vec<Note>,
) -> Result<Workload, ConvertError> {
    let uid = required(resource, "workload.uid", w.uid)?;
    let namespace = required(resource, "workload.namespace", w.namespace)?;
    // Istio leaves the name out where only people would read it.
    let name = if w.name.is_empty() { uid.clone() } else { w.name };
    let addresses = w
        .addresses
        .iter()
        .map(|b| ip_from_wire(resource, "workload.addresses", b))
        .collect::<Result<Vec<_>, _>>()?;
    if addresses.is_empty() && !w.hostname.is_empty() {
        notes.push(Note::Unsupported {
            field: "workload.hostname",
            effect: "the workload has no address and takes no traffic",
        });
    }
    if w.waypoint.is_some() {
        notes.push(Note::Unsupported {
            field: "workload.waypoint",
            effect: "traffic goes to the workload directly",
        });
    }
    if w.network_gateway.is_some() {
        notes.push(Note::Unsupported {
            field: "workload.network_gateway",
            effect: "the workload is dialled directly",
        });
    }
    if w.application_tunnel.is_some_and(|t| t.protocol != pb::application_tunnel::Protocol::None as i32) {
        notes.push(Note::Unsupported {
            field: "workload.application_tunnel",
            effect: "the workload gets plain bytes, without a PROXY header",
        });
    }
    let services = services(resource, w.services, &w.extensions)?;
    let (health, weight) = health(w.status, w.capacity, notes);
    let workload = Workload {
        uid,
        name: NamespacedName { namespace, name },
        addresses,
        network: w.network,
        tunnel: tunnel(resource, w.tunnel_protocol)?,
        trust_domain: or_default(w.trust_domain, DEFAULT_TRUST_DOMAIN),
        service_account: or_default(w.service_account, "default"),
        node: w.node,
        cluster_id: w.cluster_id,
        locality: w
            .locality
            .map(|l| Locality { region: l.region, zone: l.zone, subzone: l.subzone })
            .unwrap_or_default(),
        health,
        canonical_name: w.canonical_name,
        canonical_revision: w.canonical_revision,
        workload_name: w.workload_name,
        kind: kind(w.workload_type, notes),
        services,
        policies: w.authorization_policies,
        weight,
        native_tunnel: w.native_tunnel,
        host_network: host_network(resource, w.network_mode)?,
    };
    workload.identity().map_err(|source| ConvertError::Identity { resource: resource.to_owned(), source })?;
    Ok(workload)
}

fn or_default(value: String, default: &str) -> String {
    if value.is_empty() { default.to_owned() } else { value }
}

fn tunnel(resource: &str, value: i32) -> Result<TunnelProtocol, ConvertError> {
    match pb::TunnelProtocol::try_from(value) {
        Ok(pb::TunnelProtocol::None) => Ok(TunnelProtocol::None),
        Ok(pb::TunnelProtocol::Hbone) => Ok(TunnelProtocol::Hbone),
        Err(_) => Err(unknown(resource, "workload.tunnel_protocol", value)),
    }
}

fn host_network(resource: &str, value: i32) -> Result<bool, ConvertError> {
    match pb::NetworkMode::try_from(value) {
        Ok(pb::NetworkMode::Standard) => Ok(false),
        Ok(pb::NetworkMode::HostNetwork) => Ok(true),
        Err(_) => Err(unknown(resource, "workload.network_mode", value)),
    }
}

fn unknown(resource: &str, field: &'static str, value: i32) -> ConvertError {
    ConvertError::Unknown { resource: resource.to_owned(), field, value }
}

fn kind(value: i32, notes: &mut Vec<Note>) -> WorkloadKind {
    match pb::WorkloadType::try_from(value) {
        Ok(pb::WorkloadType::Deployment) => WorkloadKind::Deployment,
        Ok(pb::WorkloadType::Cronjob) => WorkloadKind::CronJob,
        Ok(pb::WorkloadType::Pod) => WorkloadKind::Pod,
        Ok(pb::WorkloadType::Job) => WorkloadKind::Job,
        Err(_) => {
            notes.push(Note::UnknownValue { field: "workload.workload_type", value, read_as: "POD" });
            WorkloadKind::Pod
        }
    }
}

fn health(status: i32, capacity: Option<u32>, notes: &mut Vec<Note>) -> (Health, u32) {
    let health = match pb::WorkloadStatus::try_from(status) {
        Ok(pb::WorkloadStatus::Healthy) => Health::Healthy,
        Ok(pb::WorkloadStatus::Unhealthy) => Health::Unhealthy,
        Err(_) => {
            notes.push(Note::UnknownValue { field: "workload.status", value: status, read_as: "UNHEALTHY" });
            Health::Unhealthy
        }
    };
    match capacity {
        // A share of zero is a wish for no traffic.
        Some(0) => (Health::Unhealthy, 1),
        Some(weight) => (health, weight),
        None => (health, 1),
    }
}

fn services(
    resource: &str,
    tcp: BTreeMap<String, pb::PortList>,
    extensions: &[pb::Extension],
) -> Result<BTreeMap<String, ServiceMembership>, ConvertError> {
    let mut services: BTreeMap<String, ServiceMembership> = BTreeMap::new();
    for (key, list) in tcp {
        let key = required(resource, "workload.services", key)?;
        services.entry(key).or_default().tcp = list
            .ports
            .iter()
            .map(|p| target_port(resource, "workload.services", p.service_port, p.target_port))
            .collect::<Result<_, _>>()?;
    }
    let ours: Option<ext::WorkloadExtension> = extension(resource, extensions, WORKLOAD_EXTENSION_TYPE)?;
    let ours = ours.unwrap_or_default();
    for (key, list) in ours.udp_services {
        let key = required(resource, "nodemesh.udp_services", key)?;
        services.entry(key).or_default().udp = list
            .ports
            .iter()
            .map(|p| target_port(resource, "nodemesh.udp_services", p.service_port, p.target_port))
            .collect::<Result<_, _>>()?;
    }
    for (key, hostname) in ours.hostnames {
        // A name within a service that it does not back means nothing.
        if let Some(membership) = services.get_mut(&key) {
            membership.hostname = hostname;
        }
    }
    Ok(services)
}

fn target_port(
    resource: &str,
    field: &'static str,
    service_port: u32,
    target_port: u32,
) -> Result<TargetPort, ConvertError> {
    Ok(TargetPort {
        service_port: port(resource, field, service_port, 1)?,
        // ztunnel's form for "the service's own target port".
        target_port: port(resource, field, target_port, 0)?,
    })
}
