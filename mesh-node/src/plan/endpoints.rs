//! The endpoints of a service port as seen from one node: ready, of the right address family, of the best locality.

use crate::state::World;
use mesh_xds::model::{Health, LbMode, LbScope, Locality, Protocol, Service, ServicePort, Workload};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

/// Where this node is, for locality preference.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeView {
    /// The node's name.
    pub name: String,
    /// The network it is in; empty for the one network of a simple cluster.
    pub network: String,
    /// The cluster it is in.
    pub cluster_id: String,
    /// Its region, zone and subzone.
    pub locality: Locality,
}

impl NodeView {
    /// Derives the node's place from any workload that runs on it; without one only the name is known, and
    /// no wider scope matches.
    pub fn of(world: &World, node: &str) -> Self {
        let on_node = world.workloads().find(|w| w.node == node);
        Self {
            name: node.to_owned(),
            network: on_node.map(|w| w.network.clone()).unwrap_or_default(),
            cluster_id: on_node.map(|w| w.cluster_id.clone()).unwrap_or_default(),
            locality: on_node.map(|w| w.locality.clone()).unwrap_or_default(),
        }
    }

    fn matches(&self, scope: LbScope, w: &Workload) -> bool {
        let (here, there) = (&self.locality, &w.locality);
        let region = !here.region.is_empty() && here.region == there.region;
        let zone = region && !here.zone.is_empty() && here.zone == there.zone;
        match scope {
            LbScope::Region => region,
            LbScope::Zone => zone,
            LbScope::Subzone => zone && !here.subzone.is_empty() && here.subzone == there.subzone,
            LbScope::Node => !self.name.is_empty() && self.name == w.node,
            LbScope::Cluster => self.cluster_id == w.cluster_id,
            LbScope::Network => self.network == w.network,
        }
    }
}

/// One endpoint that a load balancer may pick.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The workload behind it.
    pub workload: Arc<Workload>,
    /// Its address and target port.
    pub addr: SocketAddr,
    /// Relative weight, at least 1.
    pub weight: u32,
}

/// The endpoints of a service's port for a client on `node`, in a stable order.
///
/// Unready and terminating workloads are left out unless the service publishes them. With a locality preference only
/// the best group is returned: those that match the most leading scopes (`Failover`), or all scopes (`Strict`).
pub fn endpoints(
    world: &World,
    node: &NodeView,
    service: &Service,
    port: &ServicePort,
    vip: &IpAddr,
) -> Vec<Endpoint> {
    let key = service.key();
    let ready = world.members(&key).filter(|w| usable(node, service, w));
    let all = ready.filter_map(|w| {
        let ip = w.addresses.iter().find(|a| a.is_ipv4() == vip.is_ipv4())?;
        Some(Endpoint {
            workload: w.clone(),
            addr: SocketAddr::new(*ip, target_port(w, &key, port)?),
            weight: w.weight.max(1),
        })
    });
    prefer(node, service, all.collect())
}

/// The endpoint that the kernel chose, if it is one that may still be picked. Constant time: the kernel chose among
/// the best group, which is not looked at again.
pub(super) fn confirm(
    world: &World,
    node: &NodeView,
    service: &Service,
    port: &ServicePort,
    chosen: SocketAddr,
) -> Option<Endpoint> {
    let key = service.key();
    let behind = world.workloads_at(&chosen.ip()).iter().rev();
    let mut found = behind.filter(|w| usable(node, service, w));
    found.find(|w| target_port(w, &key, port) == Some(chosen.port())).map(|w| Endpoint {
        workload: w.clone(),
        addr: chosen,
        weight: w.weight.max(1),
    })
}

/// Whether an endpoint still belongs to a service port, ready or not.
pub fn still_backs(world: &World, service: &Service, port: &ServicePort, endpoint: SocketAddr) -> bool {
    let key = service.key();
    let behind = world.workloads_at(&endpoint.ip());
    behind.iter().any(|w| target_port(w, &key, port) == Some(endpoint.port()))
}

fn usable(node: &NodeView, service: &Service, w: &Workload) -> bool {
    (service.load_balancing.allow_unhealthy || w.health == Health::Healthy) && w.network == node.network
}

/// The port of a workload that a service port leads to, if the workload backs the service there.
fn target_port(w: &Workload, service_key: &str, port: &ServicePort) -> Option<u16> {
    let membership = w.services.get(service_key)?;
    let ports = match port.protocol {
        Protocol::Tcp => &membership.tcp,
        Protocol::Udp => &membership.udp,
    };
    let target =
        ports.iter().find(|p| p.service_port == port.port).map_or(port.target_port, |p| p.target_port);
    (target != 0).then_some(target)
}

fn prefer(node: &NodeView, service: &Service, all: Vec<Endpoint>) -> Vec<Endpoint> {
    let scopes = &service.load_balancing.routing_preference;
    if service.load_balancing.mode == LbMode::Any || scopes.is_empty() {
        return all;
    }
    let rank = |e: &Endpoint| scopes.iter().take_while(|s| node.matches(**s, &e.workload)).count();
    let best = match service.load_balancing.mode {
        LbMode::Strict => scopes.len(),
        _ => all.iter().map(rank).max().unwrap_or(0),
    };
    all.into_iter().filter(|e| rank(e) == best).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{
        Batch, Store,
        testing::{backs, pod, service},
    };
    use mesh_xds::model::LoadBalancing;

    fn here() -> NodeView {
        let locality = Locality { region: "r1".into(), zone: "z1".into(), subzone: String::new() };
        NodeView { name: "n1".into(), network: String::new(), cluster_id: "c1".into(), locality }
    }

    fn at(mut w: Workload, node: &str, zone: &str, region: &str) -> Workload {
        w.node = node.into();
        w.locality = Locality { region: region.into(), zone: zone.into(), subzone: String::new() };
        w
    }

    fn names(mode: LbMode, pods: Vec<Workload>) -> Vec<String> {
        let mut svc = service("cart", "shop", "10.96.0.1", &[(80, 8080)]);
        svc.load_balancing = LoadBalancing {
            routing_preference: vec![LbScope::Region, LbScope::Zone, LbScope::Node],
            mode,
            allow_unhealthy: false,
        };
        let store = Store::default();
        let workloads = pods.into_iter().map(|p| backs(p, &svc)).collect();
        let world =
            store.stage(Batch { workloads, services: vec![svc.clone()], ..Batch::default() }).complete;
        let found = endpoints(&world, &here(), &svc, &svc.ports[0], &svc.addresses[0].ip);
        found.into_iter().map(|e| e.workload.name.name.clone()).collect()
    }

    #[test]
    fn locality_fails_over_from_node_to_zone_to_region_to_anywhere() {
        let node = at(pod("node", "shop", "10.0.0.1"), "n1", "z1", "r1");
        let zone = at(pod("zone", "shop", "10.0.0.2"), "n2", "z1", "r1");
        let region = at(pod("region", "shop", "10.0.0.3"), "n3", "z2", "r1");
        let far = at(pod("far", "shop", "10.0.0.4"), "n4", "z1", "r2");
        let all = vec![node.clone(), zone.clone(), region.clone(), far.clone()];
        assert_eq!(names(LbMode::Failover, all.clone()), ["node"]);
        assert_eq!(names(LbMode::Failover, vec![zone, region.clone(), far.clone()]), ["zone"]);
        assert_eq!(names(LbMode::Failover, vec![region.clone(), far.clone()]), ["region"]);
        assert_eq!(names(LbMode::Failover, vec![far.clone()]), ["far"]);
        assert_eq!(names(LbMode::Strict, vec![region, far]), [""; 0]);
        assert_eq!(names(LbMode::Any, all).len(), 4);
        let mut unready = node;
        unready.health = Health::Unhealthy;
        assert_eq!(
            names(LbMode::Failover, vec![unready, at(pod("zone", "shop", "10.0.0.2"), "n2", "z1", "r1")]),
            ["zone"]
        );
    }

    #[test]
    fn family_and_target_port_follow_the_address_and_the_workload() {
        let svc = service("cart", "shop", "10.96.0.1", &[(80, 8080)]);
        let mut dual = backs(pod("dual", "shop", "10.0.0.1"), &svc);
        dual.addresses.push("fd00::1".parse().unwrap());
        dual.services.get_mut(&svc.key()).unwrap().tcp[0].target_port = 9090;
        let v6_only = backs(pod("six", "shop", "fd00::2"), &svc);
        let world = Store::default()
            .stage(Batch { workloads: vec![dual, v6_only], services: vec![svc.clone()], ..Batch::default() })
            .complete;
        let addrs = |vip: &str| -> Vec<String> {
            let found = endpoints(&world, &here(), &svc, &svc.ports[0], &vip.parse().unwrap());
            found.iter().map(|e| e.addr.to_string()).collect()
        };
        assert_eq!(addrs("10.96.0.1"), ["10.0.0.1:9090"]);
        assert_eq!(addrs("fd00:96::1"), ["[fd00::1]:9090", "[fd00::2]:8080"]);
    }
}
