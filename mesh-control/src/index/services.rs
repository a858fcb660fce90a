//! Services: host names, the addresses they own, and how their traffic is spread.

use super::Index;
use crate::object::{Distribution, Service as Object, TargetRef};
use mesh_xds::model::{
    LbMode, LbScope, LoadBalancing, NamespacedName, Service, ServiceAddress, ServicePort, SessionAffinity,
};
use std::net::IpAddr;

impl Index {
    /// The host name by which pods call the service.
    pub(super) fn hostname(&self, name: &NamespacedName) -> String {
        format!("{}.{}.svc.{}", name.name, name.namespace, self.settings.cluster_domain)
    }

    /// The resource name, as [`Service::key`] gives it.
    pub(super) fn service_key(&self, name: &NamespacedName) -> String {
        format!("{}/{}", name.namespace, self.hostname(name))
    }

    pub(super) fn build_service(&self, name: &NamespacedName) -> Option<Service> {
        let object = self.services.get(name).filter(|s| !s.external_name)?;
        let addresses = object.cluster_ips.iter().filter(|ip| self.vip_owner(**ip) == Some(name));
        let ports = object.ports.iter().map(|p| ServicePort {
            port: p.port,
            // 0 for a named port: each workload says its own.
            target_port: match p.target {
                TargetRef::Number(n) => n,
                TargetRef::Name(_) => 0,
            },
            protocol: p.protocol,
            app_protocol: p.app_protocol,
        });
        let port_names = object.ports.iter().filter(|p| !p.name.is_empty());
        Some(Service {
            name: name.clone(),
            hostname: self.hostname(name),
            addresses: addresses.map(|ip| ServiceAddress { network: String::new(), ip: *ip }).collect(),
            ports: ports.collect(),
            port_names: port_names.map(|p| ((p.port, p.protocol), p.name.clone())).collect(),
            subject_alt_names: Vec::new(),
            load_balancing: load_balancing(object),
            session_affinity: object.affinity.map(|timeout| SessionAffinity { timeout }),
            algorithm: object.algorithm,
        })
    }

    /// Of several services that claim an address the oldest has it, then the first by name.
    pub(super) fn vip_owner(&self, ip: IpAddr) -> Option<&NamespacedName> {
        let claims = self.services_by_ip.get(&ip)?.iter();
        claims.min_by_key(|name| {
            let service = self.services.get(*name);
            let external = service.is_none_or(|s| s.external_name);
            (external, service.and_then(|s| s.created).unwrap_or(i64::MAX), *name)
        })
    }
}

/// The scopes are Istio's for the same fields, so that a ztunnel spreads traffic alike.
fn load_balancing(service: &Object) -> LoadBalancing {
    use LbScope::{Network, Node, Region, Subzone, Zone};
    let (routing_preference, mode) = match service.distribution {
        Distribution::Any => (vec![], LbMode::Any),
        Distribution::PreferSameZone => (vec![Network, Region, Zone, Subzone], LbMode::Failover),
        Distribution::PreferSameNode => (vec![Network, Region, Zone, Subzone, Node], LbMode::Failover),
        Distribution::LocalOnly => (vec![Node], LbMode::Strict),
    };
    LoadBalancing { routing_preference, mode, allow_unhealthy: service.publish_not_ready }
}
