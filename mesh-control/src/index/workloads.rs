//! Workloads: pods, and endpoints of slices that are no pods.

use super::{Index, of_namespace};
use crate::object::{Endpoint, Enrol, Labels, Pod, Service, SlicePort, TargetRef, has_all};
use mesh_xds::model::{
    Health, Locality, NamespacedName, Protocol, ServiceMembership, TargetPort, TunnelProtocol, Workload,
    WorkloadKind,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// The services behind which a workload stands.
#[derive(Default)]
pub(super) struct Backing {
    /// With ports, for those that send it traffic; by `NAMESPACE/HOSTNAME`.
    members: BTreeMap<String, ServiceMembership>,
    /// All of them by name, ready or not: a policy bound to a service does not come and go with readiness.
    pub(super) services: BTreeSet<String>,
}

impl Index {
    pub(super) fn pod_uid(&self, name: &NamespacedName) -> String {
        format!("{}//Pod/{}/{}", self.settings.cluster_id, name.namespace, name.name)
    }

    pub(super) fn external_uid(&self, namespace: &str, ip: IpAddr) -> String {
        format!("{}/discovery.k8s.io/EndpointSlice/{namespace}/{ip}", self.settings.cluster_id)
    }

    /// Whether a pod is to be captured by its node.
    fn enrolled(&self, pod: &Pod) -> bool {
        if pod.host_network || pod.sidecar {
            return false;
        }
        match pod.enrol {
            Enrol::In => true,
            Enrol::Out => false,
            Enrol::Unset => self.namespaces.get(&pod.name.namespace).is_some_and(|ns| ns.enrol == Enrol::In),
        }
    }

    pub(super) fn build_pod(&self, name: &NamespacedName) -> Option<Workload> {
        let pod = self.pods.get(name).filter(|p| !p.finished)?;
        let owned = |ip: &&IpAddr| pod.host_network || self.pod_ip_owner(**ip) == Some(name);
        let addresses: Vec<IpAddr> = pod.addresses.iter().filter(owned).copied().collect();
        if addresses.is_empty() && pod.node.is_empty() {
            return None;
        }
        let backing = self.backing(pod, &addresses);
        let enrolled = self.enrolled(pod);
        let in_mesh = enrolled || (pod.native_tunnel && !pod.host_network);
        let policies = if in_mesh { self.policies_of(pod, &backing) } else { Vec::new() };
        let (workload_name, kind) = owner(pod);
        let label = |names: &[&str]| names.iter().find_map(|n| pod.labels.get(*n)).cloned();
        Some(Workload {
            uid: self.pod_uid(name),
            name: name.clone(),
            addresses,
            network: String::new(),
            tunnel: if in_mesh { TunnelProtocol::Hbone } else { TunnelProtocol::None },
            trust_domain: self.settings.trust_domain.clone(),
            service_account: pod.service_account.clone(),
            node: pod.node.clone(),
            cluster_id: self.settings.cluster_id.clone(),
            locality: self.locality(&pod.node),
            health: if pod.ready && !pod.terminating { Health::Healthy } else { Health::Unhealthy },
            canonical_name: label(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
                .unwrap_or_else(|| workload_name.clone()),
            canonical_revision: label(&[
                "service.istio.io/canonical-revision",
                "app.kubernetes.io/version",
                "version",
            ])
            .unwrap_or_else(|| "latest".to_owned()),
            workload_name,
            kind,
            services: backing.members,
            policies,
            weight: 1,
            native_tunnel: pod.native_tunnel,
            host_network: pod.host_network,
        })
    }

    /// Of several pods with one address, the one that is not going away has it, then the oldest, then the first by name.
    pub(super) fn pod_ip_owner(&self, ip: IpAddr) -> Option<&NamespacedName> {
        let claims = self.pods_by_ip.get(&ip)?.iter();
        claims.min_by_key(|name| {
            let pod = self.pods.get(*name);
            (pod.is_none_or(|p| p.terminating), pod.and_then(|p| p.created).unwrap_or(i64::MAX), *name)
        })
    }

    fn locality(&self, node: &str) -> Locality {
        self.nodes.get(node).map(|n| n.locality.clone()).unwrap_or_default()
    }

    fn backing(&self, pod: &Pod, addresses: &[IpAddr]) -> Backing {
        let namespace = &pod.name.namespace;
        let mut backing = Backing::default();
        // By label, for services without slices.
        for (name, service) in of_namespace(&self.services, namespace) {
            if self.slices_by_service.contains_key(name) || !selects(service, &pod.labels) {
                continue;
            }
            backing.services.insert(name.name.clone());
            let ports = service.ports.iter().filter_map(|p| {
                let target = match &p.target {
                    TargetRef::Number(n) => *n,
                    TargetRef::Name(wanted) => {
                        pod.ports.iter().find(|c| c.name == *wanted && c.protocol == p.protocol)?.port
                    }
                };
                Some((p.protocol, TargetPort { service_port: p.port, target_port: target }))
            });
            // What the slices of the API server would say.
            let named = pod.hostname.as_ref().filter(|h| h.subdomain == name.name);
            let hostname = named.map_or("", |h| h.hostname.as_str());
            self.join(&mut backing, name, service, hostname, ports);
        }
        // By slice.
        let by_name = self.slices_by_pod.get(&pod.name).into_iter().flatten();
        let by_ip = addresses
            .iter()
            .filter(|_| !pod.host_network)
            .filter_map(|ip| self.slices_by_ip.get(&(namespace.clone(), *ip)))
            .flatten();
        for slice in by_name.chain(by_ip).collect::<BTreeSet<_>>() {
            let here = |e: &&Endpoint| match &e.pod {
                Some(target) => *target == pod.name.name,
                None => !pod.host_network && e.addresses.iter().any(|ip| addresses.contains(ip)),
            };
            self.join_slice(&mut backing, slice, here);
        }
        backing
    }

    fn join_slice(&self, backing: &mut Backing, slice: &NamespacedName, here: impl Fn(&&Endpoint) -> bool) {
        let Some(slice) = self.slices.get(slice) else { return };
        let name = NamespacedName::new(&slice.name.namespace, &slice.service);
        let Some(service) = self.services.get(&name).filter(|s| !s.external_name) else { return };
        for endpoint in slice.endpoints.iter().filter(here) {
            backing.services.insert(name.name.clone());
            if (endpoint.ready && !endpoint.terminating) || service.publish_not_ready {
                let ports = slice_ports(service, &slice.ports);
                self.join(backing, &name, service, &endpoint.hostname, ports);
            }
        }
    }

    fn join(
        &self,
        backing: &mut Backing,
        name: &NamespacedName,
        service: &Service,
        hostname: &str,
        ports: impl Iterator<Item = (Protocol, TargetPort)>,
    ) {
        let mut ports = ports.peekable();
        // None of the service's ports leads to this workload (a headless service may have no ports at all).
        if ports.peek().is_none() && !service.ports.is_empty() {
            return;
        }
        let member = backing.members.entry(self.service_key(name)).or_default();
        if member.hostname.is_empty() {
            hostname.clone_into(&mut member.hostname);
        }
        for (protocol, port) in ports {
            let list = match protocol {
                Protocol::Tcp => &mut member.tcp,
                Protocol::Udp => &mut member.udp,
            };
            // Slices of both families repeat the ports. Sorted, so that their order does not matter.
            if let Err(at) = list.binary_search(&port) {
                list.insert(at, port);
            }
        }
    }

    /// An endpoint that is no pod of the namespace: reached in plaintext.
    pub(super) fn build_external(&self, namespace: &str, ip: IpAddr) -> Option<Workload> {
        let slices = self.slices_by_ip.get(&(namespace.to_owned(), ip))?;
        if self.pod_ip_owner(ip).is_some_and(|pod| pod.namespace == namespace) {
            return None;
        }
        let here = |e: &&Endpoint| e.pod.is_none() && e.addresses.contains(&ip);
        let mut backing = Backing::default();
        for slice in slices {
            self.join_slice(&mut backing, slice, here);
        }
        let first = slices.iter().find_map(|name| {
            let slice = self.slices.get(name)?;
            Some((slice, slice.endpoints.iter().find(here)?))
        });
        let (slice, endpoint) = first?;
        let mut locality = self.locality(&endpoint.node);
        if locality.zone.is_empty() {
            locality.zone.clone_from(&endpoint.zone);
        }
        Some(Workload {
            uid: self.external_uid(namespace, ip),
            name: slice.name.clone(),
            addresses: vec![ip],
            network: String::new(),
            tunnel: TunnelProtocol::None,
            trust_domain: self.settings.trust_domain.clone(),
            service_account: String::new(),
            node: endpoint.node.clone(),
            cluster_id: self.settings.cluster_id.clone(),
            locality,
            health: Health::Healthy,
            canonical_name: slice.service.clone(),
            canonical_revision: "latest".to_owned(),
            workload_name: slice.name.name.clone(),
            kind: WorkloadKind::Pod,
            services: backing.members,
            policies: Vec::new(),
            weight: 1,
            native_tunnel: false,
            host_network: false,
        })
    }
}

/// A service without a selector has only the endpoints that its slices give it.
pub(super) fn selects(service: &Service, labels: &Labels) -> bool {
    !service.external_name && !service.selector.is_empty() && has_all(labels, &service.selector)
}

/// A slice's ports belong to the service's ports of the same name.
fn slice_ports<'a>(
    service: &'a Service,
    ports: &'a [SlicePort],
) -> impl Iterator<Item = (Protocol, TargetPort)> + 'a {
    service.ports.iter().filter_map(move |p| {
        let target = ports.iter().find(|s| s.name == p.name && s.protocol == p.protocol)?.port;
        Some((p.protocol, TargetPort { service_port: p.port, target_port: target }))
    })
}

/// The name and kind under which a pod shows up in metrics: what a person deployed, not the controller in between.
fn owner(pod: &Pod) -> (String, WorkloadKind) {
    let bare = || (pod.name.name.clone(), WorkloadKind::Pod);
    let Some((kind, name)) = &pod.owner else { return bare() };
    match kind.as_str() {
        "ReplicaSet" => {
            let hash = pod.labels.get("pod-template-hash");
            match hash.and_then(|hash| name.strip_suffix(hash.as_str())?.strip_suffix('-')) {
                Some(deployment) => (deployment.to_owned(), WorkloadKind::Deployment),
                None => (name.clone(), WorkloadKind::Pod),
            }
        }
        "Deployment" => (name.clone(), WorkloadKind::Deployment),
        "CronJob" => (name.clone(), WorkloadKind::CronJob),
        // A CronJob names its Jobs after itself and the minute since 1970 (ten digits, eight before 1.21).
        "Job" => match name.rsplit_once('-') {
            Some((cron, minute))
                if (8..=10).contains(&minute.len()) && minute.bytes().all(|b| b.is_ascii_digit()) =>
            {
                (cron.to_owned(), WorkloadKind::CronJob)
            }
            _ => (name.clone(), WorkloadKind::Job),
        },
        _ => (name.clone(), WorkloadKind::Pod),
    }
}
