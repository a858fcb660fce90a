//! Services. TCP ports travel in Istio's fields, UDP ports and everything else of ours in an extension.

use super::{
    ConvertError, EXTENSION_NAME, Note, SERVICE_EXTENSION_TYPE, extension, ip_from_wire, ip_to_wire, pack,
    port, required,
};
use crate::model::{
    AppProtocol, LbAlgorithm, LbMode, LbScope, LoadBalancing, NamespacedName, Protocol, Service,
    ServiceAddress, ServicePort, SessionAffinity,
};
use crate::wire::workload::load_balancing as lb;
use crate::wire::{nodemesh as ext, workload as pb};
use std::{collections::BTreeMap, time::Duration};

/// The wire form of a service.
pub fn encode_service(s: &Service) -> pb::Service {
    let ports = s
        .ports
        .iter()
        .filter(|p| p.protocol == Protocol::Tcp)
        .map(|p| pb::Port { service_port: p.port.into(), target_port: p.target_port.into() })
        .collect();
    let ours = ext::ServiceExtension {
        ports: s
            .ports
            .iter()
            .filter(|p| {
                p.protocol == Protocol::Udp
                    || p.app_protocol != AppProtocol::Unknown
                    || s.port_names.contains_key(&(p.port, p.protocol))
            })
            .map(|p| extension_port(s, p))
            .collect(),
        session_affinity_timeout: s.session_affinity.map(|a| prost_types::Duration {
            seconds: i64::try_from(a.timeout.as_secs()).unwrap_or(i64::MAX),
            nanos: a.timeout.subsec_nanos().cast_signed(),
        }),
        load_balancer: match s.algorithm {
            LbAlgorithm::Random => ext::LoadBalancer::Random,
            LbAlgorithm::Maglev => ext::LoadBalancer::Maglev,
        }
        .into(),
    };
    let extensions = if ours == ext::ServiceExtension::default() {
        Vec::new()
    } else {
        vec![pb::Extension {
            name: EXTENSION_NAME.to_owned(),
            config: Some(pack(SERVICE_EXTENSION_TYPE, &ours)),
        }]
    };
    let has_v4 = s.addresses.iter().any(|a| a.ip.is_ipv4());
    let has_v6 = s.addresses.iter().any(|a| a.ip.is_ipv6());
    pb::Service {
        name: s.name.name.clone(),
        namespace: s.name.namespace.clone(),
        hostname: s.hostname.clone(),
        addresses: s
            .addresses
            .iter()
            .map(|a| pb::NetworkAddress { network: a.network.clone(), address: ip_to_wire(a.ip) })
            .collect(),
        ports,
        subject_alt_names: s.subject_alt_names.clone(),
        waypoint: None,
        load_balancing: load_balancing_to_wire(&s.load_balancing),
        ip_families: match (has_v4, has_v6) {
            (true, true) => pb::IpFamilies::Dual,
            (true, false) => pb::IpFamilies::Ipv4Only,
            (false, true) => pb::IpFamilies::Ipv6Only,
            (false, false) => pb::IpFamilies::Automatic,
        }
        .into(),
        extensions,
    }
}

fn extension_port(s: &Service, p: &ServicePort) -> ext::ServicePort {
    ext::ServicePort {
        port: p.port.into(),
        target_port: if p.protocol == Protocol::Udp { p.target_port.into() } else { 0 },
        transport: match p.protocol {
            Protocol::Tcp => ext::Transport::Tcp,
            Protocol::Udp => ext::Transport::Udp,
        }
        .into(),
        app_protocol: match p.app_protocol {
            AppProtocol::Unknown => ext::AppProtocol::Unknown,
            AppProtocol::Http1 => ext::AppProtocol::Http1,
            AppProtocol::Http2 => ext::AppProtocol::Http2,
            AppProtocol::Grpc => ext::AppProtocol::Grpc,
            AppProtocol::Tls => ext::AppProtocol::Tls,
            AppProtocol::Tcp => ext::AppProtocol::OpaqueTcp,
        }
        .into(),
        name: s.port_names.get(&(p.port, p.protocol)).cloned().unwrap_or_default(),
    }
}

fn load_balancing_to_wire(l: &LoadBalancing) -> Option<pb::LoadBalancing> {
    (*l != LoadBalancing::default()).then(|| pb::LoadBalancing {
        routing_preference: l
            .routing_preference
            .iter()
            .map(|s| {
                match s {
                    LbScope::Region => lb::Scope::Region,
                    LbScope::Zone => lb::Scope::Zone,
                    LbScope::Subzone => lb::Scope::Subzone,
                    LbScope::Node => lb::Scope::Node,
                    LbScope::Cluster => lb::Scope::Cluster,
                    LbScope::Network => lb::Scope::Network,
                }
                .into()
            })
            .collect(),
        mode: match l.mode {
            LbMode::Any => lb::Mode::UnspecifiedMode,
            LbMode::Strict => lb::Mode::Strict,
            LbMode::Failover => lb::Mode::Failover,
        }
        .into(),
        health_policy: if l.allow_unhealthy {
            lb::HealthPolicy::AllowAll
        } else {
            lb::HealthPolicy::OnlyHealthy
        }
        .into(),
        dns_connect_strategy: 0,
    })
}

pub(super) fn from_wire(
    resource: &str,
    s: pb::Service,
    notes: &mut Vec<Note>,
) -> Result<Service, ConvertError> {
    let namespace = required(resource, "service.namespace", s.namespace)?;
    let hostname = required(resource, "service.hostname", s.hostname)?;
    let name = if s.name.is_empty() { hostname.clone() } else { s.name };
    let addresses = s
        .addresses
        .into_iter()
        .map(|a| {
            let ip = ip_from_wire(resource, "service.addresses", &a.address)?;
            Ok(ServiceAddress { network: a.network, ip })
        })
        .collect::<Result<_, ConvertError>>()?;
    if s.waypoint.is_some() {
        notes.push(Note::Unsupported {
            field: "service.waypoint",
            effect: "traffic goes to the endpoints directly",
        });
    }
    let ours: ext::ServiceExtension =
        extension(resource, &s.extensions, SERVICE_EXTENSION_TYPE)?.unwrap_or_default();
    let ports = ports(resource, &s.ports, &ours.ports, notes)?;
    let port_names = port_names(&ports, &ours.ports);
    let session_affinity = ours
        .session_affinity_timeout
        .map(|d| {
            let bad = || ConvertError::Duration {
                resource: resource.to_owned(),
                field: "nodemesh.session_affinity_timeout",
            };
            Duration::try_from(d).map(|timeout| SessionAffinity { timeout }).map_err(|_| bad())
        })
        .transpose()?;
    let algorithm = match ext::LoadBalancer::try_from(ours.load_balancer) {
        Ok(ext::LoadBalancer::Random) => LbAlgorithm::Random,
        Ok(ext::LoadBalancer::Maglev) => LbAlgorithm::Maglev,
        Err(_) => {
            let value = ours.load_balancer;
            notes.push(Note::UnknownValue { field: "nodemesh.load_balancer", value, read_as: "RANDOM" });
            LbAlgorithm::Random
        }
    };
    Ok(Service {
        name: NamespacedName { namespace, name },
        hostname,
        addresses,
        ports,
        port_names,
        subject_alt_names: s.subject_alt_names,
        load_balancing: s.load_balancing.map(|l| load_balancing(&l, notes)).unwrap_or_default(),
        session_affinity,
        algorithm,
    })
}

/// TCP ports first, in Istio's order, then UDP ports.
fn ports(
    resource: &str,
    tcp: &[pb::Port],
    ours: &[ext::ServicePort],
    notes: &mut Vec<Note>,
) -> Result<Vec<ServicePort>, ConvertError> {
    let mut ports = Vec::with_capacity(tcp.len() + ours.len());
    for p in tcp {
        ports.push(ServicePort {
            port: port(resource, "service.ports.service_port", p.service_port, 1)?,
            target_port: port(resource, "service.ports.target_port", p.target_port, 0)?,
            protocol: Protocol::Tcp,
            app_protocol: AppProtocol::Unknown,
        });
    }
    let tcp_count = ports.len();
    for p in ours {
        let number = port(resource, "nodemesh.ports.port", p.port, 1)?;
        let app_protocol = app_protocol(p.app_protocol, notes);
        match ext::Transport::try_from(p.transport) {
            Ok(ext::Transport::Tcp) => {
                // Says more about a port that is there; it does not add one.
                for tcp in ports[..tcp_count].iter_mut().filter(|t| t.port == number) {
                    tcp.app_protocol = app_protocol;
                }
            }
            Ok(ext::Transport::Udp) => ports.push(ServicePort {
                port: number,
                target_port: port(resource, "nodemesh.ports.target_port", p.target_port, 0)?,
                protocol: Protocol::Udp,
                app_protocol,
            }),
            Err(_) => notes.push(Note::UnknownValue {
                field: "nodemesh.ports.transport",
                value: p.transport,
                read_as: "a port that is not there",
            }),
        }
    }
    Ok(ports)
}

/// The names of the ports that are there.
fn port_names(ports: &[ServicePort], ours: &[ext::ServicePort]) -> BTreeMap<(u16, Protocol), String> {
    let named = ours.iter().filter(|p| !p.name.is_empty()).filter_map(|p| {
        let protocol = match ext::Transport::try_from(p.transport).ok()? {
            ext::Transport::Tcp => Protocol::Tcp,
            ext::Transport::Udp => Protocol::Udp,
        };
        let port =
            ports.iter().find(|known| u32::from(known.port) == p.port && known.protocol == protocol)?;
        Some(((port.port, protocol), p.name.clone()))
    });
    named.collect()
}

fn app_protocol(value: i32, notes: &mut Vec<Note>) -> AppProtocol {
    match ext::AppProtocol::try_from(value) {
        Ok(ext::AppProtocol::Unknown) => AppProtocol::Unknown,
        Ok(ext::AppProtocol::Http1) => AppProtocol::Http1,
        Ok(ext::AppProtocol::Http2) => AppProtocol::Http2,
        Ok(ext::AppProtocol::Grpc) => AppProtocol::Grpc,
        Ok(ext::AppProtocol::Tls) => AppProtocol::Tls,
        Ok(ext::AppProtocol::OpaqueTcp) => AppProtocol::Tcp,
        Err(_) => {
            notes.push(Note::UnknownValue {
                field: "nodemesh.ports.app_protocol",
                value,
                read_as: "UNKNOWN",
            });
            AppProtocol::Unknown
        }
    }
}

fn load_balancing(l: &pb::LoadBalancing, notes: &mut Vec<Note>) -> LoadBalancing {
    let mut routing_preference = Vec::new();
    for &value in &l.routing_preference {
        routing_preference.push(match lb::Scope::try_from(value) {
            Ok(lb::Scope::UnspecifiedScope) => continue,
            Ok(lb::Scope::Region) => LbScope::Region,
            Ok(lb::Scope::Zone) => LbScope::Zone,
            Ok(lb::Scope::Subzone) => LbScope::Subzone,
            Ok(lb::Scope::Node) => LbScope::Node,
            Ok(lb::Scope::Cluster) => LbScope::Cluster,
            Ok(lb::Scope::Network) => LbScope::Network,
            Err(_) => {
                // Endpoints rank by how many leading scopes they match: what follows cannot be ranked.
                notes.push(Note::UnknownValue {
                    field: "load_balancing.routing_preference",
                    value,
                    read_as: "the end of the list",
                });
                break;
            }
        });
    }
    let mode = match lb::Mode::try_from(l.mode) {
        Ok(lb::Mode::UnspecifiedMode) => LbMode::Any,
        Ok(lb::Mode::Strict) => LbMode::Strict,
        Ok(lb::Mode::Failover) => LbMode::Failover,
        Ok(lb::Mode::Passthrough) => {
            notes.push(Note::Unsupported {
                field: "load_balancing.mode PASSTHROUGH",
                effect: "an endpoint is chosen",
            });
            LbMode::Any
        }
        Err(_) => {
            let value = l.mode;
            notes.push(Note::UnknownValue { field: "load_balancing.mode", value, read_as: "no preference" });
            LbMode::Any
        }
    };
    let allow_unhealthy = match lb::HealthPolicy::try_from(l.health_policy) {
        Ok(lb::HealthPolicy::OnlyHealthy) => false,
        Ok(lb::HealthPolicy::AllowAll) => true,
        Err(_) => {
            let value = l.health_policy;
            notes.push(Note::UnknownValue {
                field: "load_balancing.health_policy",
                value,
                read_as: "ONLY_HEALTHY",
            });
            false
        }
    };
    LoadBalancing { routing_preference, mode, allow_unhealthy }
}
