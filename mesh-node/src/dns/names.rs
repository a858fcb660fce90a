//! The mesh's names: what the world says about a name. Pure.
//!
//! Kubernetes' DNS-based service discovery (specification 1.1): services, headless services with their endpoints, named
//! ports, addresses; and host names of services outside of the cluster's domain, wildcards included. A name that the
//! world does not know is not refused here, since the nameserver may know it ([`Reply::Elsewhere`]).

use crate::{plan::NodeView, state::World};
use hickory_proto::rr::{
    Name, RData, Record, RecordType,
    rdata::{A, AAAA, SRV},
};
use mesh_xds::model::{Health, Protocol, Service, ServicePort, Workload};
use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

/// How long a virtual address may be remembered.
const SERVICE_TTL: u32 = 30;
/// How long an endpoint's address may be remembered: it goes when the pod does.
const ENDPOINT_TTL: u32 = 5;

/// What the world says about a question.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Reply {
    /// The name exists; without answers it has no records of the type.
    Records {
        /// The records asked for.
        answers: Vec<Record>,
        /// Addresses of the targets.
        additionals: Vec<Record>,
    },
    /// There is no such name below a service that the mesh knows.
    NoName,
    /// Nothing: ask the nameserver.
    Elsewhere {
        /// Whether the name could only be a service's or a pod's of this cluster.
        cluster: bool,
    },
}

impl Reply {
    fn records(answers: Vec<Record>) -> Self {
        Self::Records { answers, additionals: vec![] }
    }
}

/// The cluster's domain.
#[derive(Clone, Debug)]
pub(super) struct Zone {
    /// As a name.
    pub(super) name: Name,
    /// `.svc.DOMAIN`.
    services: String,
    /// `.pod.DOMAIN`.
    pods: String,
}

impl Zone {
    /// The zone of a domain such as `cluster.local`; `None` when that is no domain name.
    pub(super) fn new(domain: &str) -> Option<Self> {
        let domain = domain.trim_end_matches('.').to_ascii_lowercase();
        let mut name = Name::from_ascii(&domain).ok().filter(|name| !name.is_root())?;
        name.set_fqdn(true);
        Some(Self { name, services: format!(".svc.{domain}"), pods: format!(".pod.{domain}") })
    }
}

/// Everything that an answer depends on.
pub(super) struct Asked<'a> {
    /// The world.
    pub(super) world: &'a World,
    /// Where this node is.
    pub(super) node: &'a NodeView,
    /// The cluster's domain.
    pub(super) zone: &'a Zone,
    /// The namespace of the pod that asks.
    pub(super) namespace: &'a str,
    /// The name in the pod's spelling.
    pub(super) name: &'a Name,
    /// The name in lower case, without the final dot.
    pub(super) lower: &'a str,
    /// The type.
    pub(super) kind: RecordType,
}

impl Asked<'_> {
    /// The answer.
    pub(super) fn answer(&self) -> Reply {
        if self.lower.ends_with(".arpa") {
            return self.reverse();
        }
        if let Some(service) = self.service(self.lower) {
            return self.of_service(service);
        }
        let cluster = self.lower.ends_with(&self.zone.services) || self.lower.ends_with(&self.zone.pods);
        if self.lower.ends_with(&self.zone.services)
            && let Some(reply) = self.below_service()
        {
            return reply;
        }
        if let Some(rest) = self.lower.strip_suffix(&self.zone.pods)
            && let Some(ip) = self.pod(rest)
        {
            return Reply::records(self.addresses(&[ip], ENDPOINT_TTL));
        }
        let suffixes = self.lower.match_indices('.').map(|(at, _)| &self.lower[at..]);
        for suffix in suffixes {
            if let Some(service) = self.service(&format!("*{suffix}")) {
                return self.of_service(service);
            }
        }
        Reply::Elsewhere { cluster }
    }

    /// The service of a host name; of several the one in the asking pod's namespace.
    fn service(&self, host: &str) -> Option<&Arc<Service>> {
        let all = self.world.services_by_host(host);
        all.iter().find(|s| s.name.namespace == self.namespace).or_else(|| all.first())
    }

    fn wants(&self, kind: RecordType) -> bool {
        self.kind == kind || self.kind == RecordType::ANY
    }

    fn of_service(&self, service: &Service) -> Reply {
        let in_cluster = service.hostname.to_ascii_lowercase().ends_with(&self.zone.services);
        let ours = matches!(
            self.kind,
            RecordType::A | RecordType::AAAA | RecordType::ANY | RecordType::HTTPS | RecordType::SVCB
        );
        // A host of the world outside has records that only its own nameservers know.
        if !in_cluster && !ours {
            return Reply::Elsewhere { cluster: false };
        }
        let vips = self.vips(service);
        let (addresses, ttl) = if service.addresses.is_empty() {
            let endpoints = self.endpoints(service);
            let all: BTreeSet<IpAddr> = endpoints.iter().flat_map(|w| w.addresses.iter().copied()).collect();
            if all.is_empty() {
                return Reply::NoName;
            }
            (all.into_iter().collect(), ENDPOINT_TTL)
        } else {
            (vips, SERVICE_TTL)
        };
        if self.kind == RecordType::SRV {
            return self.ports(service, None);
        }
        Reply::records(self.addresses(&addresses, ttl))
    }

    /// The virtual addresses that this node reaches.
    fn vips(&self, service: &Service) -> Vec<IpAddr> {
        let here = service.addresses.iter().filter(|a| a.network == self.node.network);
        here.map(|a| a.ip).collect()
    }

    /// The workloads that a headless service shows.
    fn endpoints(&self, service: &Service) -> Vec<&Arc<Workload>> {
        let all = self.world.members(self.key(service).as_str()).filter(|w| {
            (service.load_balancing.allow_unhealthy || w.health == Health::Healthy)
                && w.network == self.node.network
        });
        all.collect()
    }

    fn key(&self, service: &Service) -> String {
        service.key()
    }

    /// `HOSTNAME.SERVICE`, `_PORT._PROTOCOL.SERVICE` and `_PROTOCOL.SERVICE`.
    fn below_service(&self) -> Option<Reply> {
        let (first, rest) = self.lower.split_once('.')?;
        if let Some(service) = self.service(rest) {
            return Some(match first.strip_prefix('_') {
                Some(protocol) => {
                    let known = service.port_names.keys().any(|(_, p)| Some(*p) == transport(protocol));
                    if known { Reply::records(vec![]) } else { Reply::NoName }
                }
                None => self.endpoint(service, first),
            });
        }
        let (second, rest) = rest.split_once('.')?;
        let service = self.service(rest)?;
        let (Some(port), Some(protocol)) = (first.strip_prefix('_'), second.strip_prefix('_')) else {
            return Some(Reply::NoName);
        };
        let named = transport(protocol).and_then(|protocol| {
            let mut names = service.port_names.iter();
            let ((number, _), _) =
                names.find(|((_, p), name)| *p == protocol && name.eq_ignore_ascii_case(port))?;
            service.ports.iter().find(|p| p.port == *number && p.protocol == protocol)
        });
        Some(match named {
            None => Reply::NoName,
            Some(port) if self.wants(RecordType::SRV) => self.ports(service, Some(port)),
            Some(_) => Reply::records(vec![]),
        })
    }

    /// One endpoint of a service by its label.
    fn endpoint(&self, service: &Service, label: &str) -> Reply {
        let mut found = vec![];
        for workload in self.endpoints(service) {
            let hostname = hostname(workload, &service.key());
            let named = hostname.is_some_and(|h| h.eq_ignore_ascii_case(label));
            let here = workload.addresses.iter();
            found.extend(here.filter(|ip| named || (hostname.is_none() && dashed(**ip) == label)));
        }
        if found.is_empty() { Reply::NoName } else { Reply::records(self.addresses(&found, ENDPOINT_TTL)) }
    }

    /// SRV records of one port, or of all.
    fn ports(&self, service: &Service, only: Option<&ServicePort>) -> Reply {
        let ports: Vec<&ServicePort> = match only {
            Some(port) => vec![port],
            None => service.ports.iter().collect(),
        };
        let (mut answers, mut additionals) = (vec![], vec![]);
        let Ok(host) = Name::from_ascii(format!("{}.", service.hostname)) else { return Reply::NoName };
        let record = |port, target, ttl| {
            Record::from_rdata(self.name.clone(), ttl, RData::SRV(SRV::new(0, 100, port, target)))
        };
        if !service.addresses.is_empty() {
            answers.extend(ports.iter().map(|p| record(p.port, host.clone(), SERVICE_TTL)));
            additionals.extend(self.vips(service).iter().map(|ip| address(&host, *ip, SERVICE_TTL)));
            return Reply::Records { answers, additionals };
        }
        for workload in self.endpoints(service) {
            let key = service.key();
            let Some(membership) = workload.services.get(&key) else { continue };
            let mut targets = BTreeSet::new();
            for ip in &workload.addresses {
                let label = hostname(workload, &key).map_or_else(|| dashed(*ip), str::to_ascii_lowercase);
                let Ok(target) = host.prepend_label(label.as_str()) else { continue };
                additionals.push(address(&target, *ip, ENDPOINT_TTL));
                targets.insert(target);
            }
            for port in &ports {
                let list = match port.protocol {
                    Protocol::Tcp => &membership.tcp,
                    Protocol::Udp => &membership.udp,
                };
                let number = list
                    .iter()
                    .find(|p| p.service_port == port.port)
                    .map_or(port.target_port, |p| p.target_port);
                if number != 0 {
                    answers.extend(targets.iter().map(|t| record(number, t.clone(), ENDPOINT_TTL)));
                }
            }
        }
        if answers.is_empty() { Reply::NoName } else { Reply::Records { answers, additionals } }
    }

    /// Records of the type that was asked for.
    fn addresses(&self, all: &[IpAddr], ttl: u32) -> Vec<Record> {
        let wanted = all.iter().filter(|ip| match ip {
            IpAddr::V4(_) => self.wants(RecordType::A),
            IpAddr::V6(_) => self.wants(RecordType::AAAA),
        });
        wanted.map(|ip| address(self.name, *ip, ttl)).collect()
    }

    /// `A-B-C-D.NAMESPACE`, without the domain: the address, if a pod of that namespace has it.
    fn pod(&self, rest: &str) -> Option<IpAddr> {
        let (label, namespace) = rest.split_once('.')?;
        let v4 = label.replace('-', ".").parse::<Ipv4Addr>().map(IpAddr::V4);
        let ip = v4.or_else(|_| label.replace('-', ":").parse::<Ipv6Addr>().map(IpAddr::V6)).ok()?;
        let workload = self.world.workload_by_addr(&ip)?;
        (workload.name.namespace == namespace && !workload.host_network).then_some(ip)
    }

    /// The name of a virtual address, or of an endpoint of a headless service.
    fn reverse(&self) -> Reply {
        let elsewhere = Reply::Elsewhere { cluster: false };
        let Ok(net) = self.name.parse_arpa_name() else { return elsewhere };
        let ip = net.addr();
        if net.prefix_len() != if ip.is_ipv4() { 32 } else { 128 } {
            return elsewhere;
        }
        let mut targets: BTreeSet<String> = self
            .world
            .services_at(&ip)
            .iter()
            .filter(|s| !s.hostname.starts_with('*'))
            .map(|s| s.hostname.clone())
            .collect();
        let ttl = if targets.is_empty() { ENDPOINT_TTL } else { SERVICE_TTL };
        if let Some(workload) = self.world.workload_by_addr(&ip).filter(|_| targets.is_empty()) {
            for key in workload.services.keys() {
                let headless = self.world.service(key).filter(|s| s.addresses.is_empty());
                let shown = headless.filter(|s| self.endpoints(s).iter().any(|w| w.uid == workload.uid));
                targets.extend(shown.map(|s| {
                    let label = hostname(workload, key).map_or_else(|| dashed(ip), str::to_owned);
                    format!("{label}.{}", s.hostname)
                }));
            }
        }
        if targets.is_empty() {
            return elsewhere;
        }
        if !self.wants(RecordType::PTR) {
            return Reply::records(vec![]);
        }
        let names = targets.iter().filter_map(|t| Name::from_ascii(format!("{t}.")).ok());
        Reply::records(
            names.map(|to| Record::from_rdata(self.name.clone(), ttl, super::reply::pointer(to))).collect(),
        )
    }
}

fn transport(label: &str) -> Option<Protocol> {
    match label {
        "tcp" => Some(Protocol::Tcp),
        "udp" => Some(Protocol::Udp),
        _ => None,
    }
}

/// The workload's host name within a service.
fn hostname<'a>(workload: &'a Workload, service: &str) -> Option<&'a str> {
    workload.services.get(service).map(|m| m.hostname.as_str()).filter(|h| !h.is_empty())
}

/// The label of an endpoint without a host name.
fn dashed(ip: IpAddr) -> String {
    ip.to_string().replace(['.', ':'], "-")
}

fn address(name: &Name, ip: IpAddr, ttl: u32) -> Record {
    let data = match ip {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    };
    Record::from_rdata(name.clone(), ttl, data)
}
