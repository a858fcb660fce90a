//! What the kernel should hold: every service port with its verdict and endpoints, every mesh pod's address.

use super::{NodeView, endpoints};
use crate::{
    bpf::{Away, Backend, Balancing, CapturedPod, DenyReason, Destination, Frontend, Intent, Verdict},
    state::World,
};
use mesh_xds::model::{Protocol, Service, ServicePort};
use std::net::IpAddr;

/// Computes the intent. Pure: equal inputs give equal intents, in the same order.
pub fn intent(world: &World, node: &NodeView, pods: Vec<CapturedPod>) -> Intent {
    let mut services: Vec<_> = world.services().collect();
    services.sort_by_cached_key(|s| s.key());
    let mut frontends = vec![];
    for service in services {
        for address in service.addresses.iter().filter(|a| a.network == node.network) {
            for port in &service.ports {
                // A virtual address claimed twice belongs to the service that user space would find.
                let owner = world.service_port(&address.ip, port.port, port.protocol);
                if owner.is_some_and(|o| o.service.key() == service.key()) {
                    frontends.push(frontend(world, node, service, port, address.ip));
                }
            }
        }
    }
    let mut destinations: Vec<Destination> = world
        .workloads()
        .filter(|w| w.in_mesh() && !w.host_network && w.network == node.network)
        .flat_map(|w| &w.addresses)
        .map(|addr| Destination { addr: *addr, verdict: Verdict::Proxy, away: Away::Deny })
        .collect();
    destinations.sort_by_key(|d| d.addr);
    destinations.dedup_by_key(|d| d.addr);
    Intent { frontends, destinations, pods }
}

fn frontend(world: &World, node: &NodeView, service: &Service, port: &ServicePort, vip: IpAddr) -> Frontend {
    let chosen = endpoints(world, node, service, port, &vip);
    // Only a service none of whose endpoints is in the mesh needs no proxy; UDP is balanced in the kernel alone.
    let proxied = port.protocol == Protocol::Tcp && chosen.iter().any(|e| e.workload.in_mesh());
    let verdict = match () {
        () if chosen.is_empty() => Verdict::Deny(DenyReason::NoEndpoints),
        () if proxied => Verdict::Proxy,
        () => Verdict::Direct,
    };
    let backends = match verdict {
        Verdict::Direct | Verdict::Proxy => {
            chosen.iter().map(|e| Backend { addr: e.addr, weight: e.weight }).collect()
        }
        Verdict::Deny(_) => vec![],
    };
    Frontend {
        addr: vip,
        port: port.port,
        proto: port.protocol,
        verdict,
        away: Away::Deny,
        balancing: Balancing::Random,
        affinity: service.session_affinity.map(|a| a.timeout),
        backends,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{
        Batch, Store,
        testing::{backs, pod, service},
    };
    use mesh_xds::model::{Health, TargetPort, TunnelProtocol, Workload};
    use std::sync::Arc;

    fn outside(mut w: Workload) -> Workload {
        w.tunnel = TunnelProtocol::None;
        w
    }

    fn verdicts(world: &Arc<World>) -> Vec<(String, u16, Verdict, usize)> {
        let node = NodeView { name: "n1".into(), ..NodeView::default() };
        let found = intent(world, &node, vec![]);
        found.frontends.iter().map(|f| (f.addr.to_string(), f.port, f.verdict, f.backends.len())).collect()
    }

    #[test]
    fn verdicts_follow_the_endpoints() {
        let mesh = service("cart", "shop", "10.96.0.1", &[(80, 8080)]);
        let plain = service("old", "legacy", "10.96.0.2", &[(80, 8080)]);
        let empty = service("empty", "shop", "10.96.0.3", &[(80, 8080)]);
        let mut unready = backs(pod("c", "shop", "10.0.1.3"), &empty);
        unready.health = Health::Unhealthy;
        let workloads = vec![
            backs(pod("a", "shop", "10.0.1.1"), &mesh),
            outside(backs(pod("b", "shop", "10.0.1.2"), &mesh)),
            outside(backs(pod("d", "legacy", "10.0.1.4"), &plain)),
            outside(backs(pod("e", "legacy", "10.0.1.5"), &plain)),
            unready,
        ];
        let services = vec![mesh, plain, empty];
        let world = Store::default().stage(Batch { workloads, services, ..Batch::default() }).complete;
        assert_eq!(
            verdicts(&world),
            [
                ("10.96.0.2".to_owned(), 80, Verdict::Direct, 2),
                ("10.96.0.1".to_owned(), 80, Verdict::Proxy, 2),
                ("10.96.0.3".to_owned(), 80, Verdict::Deny(DenyReason::NoEndpoints), 0),
            ]
        );
    }

    #[test]
    fn udp_is_balanced_in_the_kernel_even_for_mesh_pods() {
        let mut dns = service("dns", "shop", "10.96.0.9", &[(53, 5353)]);
        dns.ports[0].protocol = Protocol::Udp;
        let mut w = backs(pod("a", "shop", "10.0.1.1"), &dns);
        let membership = w.services.get_mut(&dns.key()).unwrap();
        membership.tcp.clear();
        membership.udp = vec![TargetPort { service_port: 53, target_port: 5353 }];
        let world = Store::default()
            .stage(Batch { workloads: vec![w], services: vec![dns], ..Batch::default() })
            .complete;
        assert_eq!(verdicts(&world), [("10.96.0.9".to_owned(), 53, Verdict::Direct, 1)]);
    }

    #[test]
    fn only_mesh_pods_are_destinations() {
        let mut host = pod("h", "shop", "192.0.2.1");
        host.host_network = true;
        let workloads = vec![pod("a", "shop", "10.0.1.1"), outside(pod("b", "shop", "10.0.1.2")), host];
        let world = Store::default().stage(Batch { workloads, ..Batch::default() }).complete;
        let found = intent(&world, &NodeView { name: "n1".into(), ..NodeView::default() }, vec![]);
        let addrs: Vec<String> = found.destinations.iter().map(|d| d.addr.to_string()).collect();
        assert_eq!(addrs, ["10.0.1.1"]);
    }
}
