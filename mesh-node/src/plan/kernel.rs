//! What the kernel should hold: every service port with its verdict and endpoints, every mesh pod's address.

use super::{NodeView, Plaintext, endpoints};
use crate::{
    bpf::{Away, Backend, Balancing, CapturedPod, DenyReason, Destination, Frontend, Intent, Verdict},
    state::World,
};
use mesh_xds::model::{LbAlgorithm, Protocol, Service, ServicePort};
use std::net::IpAddr;

/// Computes the intent. Pure: equal inputs give equal intents, in the same order; `plaintext` only remembers.
pub fn intent(world: &World, node: &NodeView, pods: Vec<CapturedPod>, plaintext: &mut Plaintext) -> Intent {
    let mut services: Vec<_> = world.services().collect();
    services.sort_by_cached_key(|s| s.key());
    let mut frontends = vec![];
    for service in services {
        for address in service.addresses.iter().filter(|a| a.network == node.network) {
            for port in &service.ports {
                // A virtual address claimed twice belongs to the service that user space would find.
                let owner = world.service_port(&address.ip, port.port, port.protocol);
                if owner.is_some_and(|o| o.service.key() == service.key()) {
                    frontends.push(frontend(world, node, service, port, address.ip, plaintext));
                }
            }
        }
    }
    let mut destinations: Vec<Destination> = world
        .workloads()
        .filter(|w| w.in_mesh() && !w.host_network && w.network == node.network)
        .flat_map(|w| {
            // One row stands for all ports of the pod.
            let away = away(plaintext.every_port(world, w));
            w.addresses.iter().map(move |addr| Destination { addr: *addr, verdict: Verdict::Proxy, away })
        })
        .collect();
    // Of two pods that claim an address for a moment the stricter one counts.
    destinations.sort_by_key(|d| (d.addr, d.away == Away::Direct));
    destinations.dedup_by_key(|d| d.addr);
    Intent { frontends, destinations, pods }
}

fn away(takes_plaintext: bool) -> Away {
    if takes_plaintext { Away::Direct } else { Away::Deny }
}

fn frontend(
    world: &World,
    node: &NodeView,
    service: &Service,
    port: &ServicePort,
    vip: IpAddr,
    plaintext: &mut Plaintext,
) -> Frontend {
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
    let open = proxied && chosen.iter().all(|e| plaintext.port(world, &e.workload, e.addr.port()));
    Frontend {
        addr: vip,
        port: port.port,
        proto: port.protocol,
        verdict,
        away: away(open),
        balancing: match service.algorithm {
            LbAlgorithm::Random => Balancing::Random,
            LbAlgorithm::Maglev => Balancing::Maglev,
        },
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
    use mesh_xds::model::{
        Action, Authorization, Clause, Health, Match, NamespacedName, Rule, Scope, StringMatch, TargetPort,
        TunnelProtocol, Workload,
    };
    use std::sync::Arc;

    fn outside(mut w: Workload) -> Workload {
        w.tunnel = TunnelProtocol::None;
        w
    }

    fn verdicts(world: &Arc<World>) -> Vec<(String, u16, Verdict, usize)> {
        let node = NodeView { name: "n1".into(), ..NodeView::default() };
        let found = intent(world, &node, vec![], &mut Plaintext::default());
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
    fn without_the_daemon_only_what_takes_plaintext_is_reached() {
        let open = service("open", "shop", "10.96.0.1", &[(80, 8080)]);
        let mut mixed = service("mixed", "shop", "10.96.0.2", &[(80, 8080), (81, 8081)]);
        mixed.algorithm = LbAlgorithm::Maglev;
        let mut strict = backs(pod("b", "shop", "10.0.1.2"), &mixed);
        strict.policies = vec!["shop/no-plaintext".into()];
        let stranger = Match {
            not_principals: vec![StringMatch::Presence],
            destination_ports: vec![8080],
            ..Match::default()
        };
        let policy = Authorization {
            name: NamespacedName::new("shop", "no-plaintext"),
            scope: Scope::WorkloadSelector,
            action: Action::Deny,
            rules: vec![Rule { clauses: vec![Clause { matches: vec![stranger] }] }],
        };
        let workloads = vec![
            backs(pod("a", "shop", "10.0.1.1"), &open),
            strict,
            outside(backs(pod("c", "legacy", "10.0.1.3"), &mixed)),
        ];
        let batch =
            Batch { workloads, services: vec![open, mixed], policies: vec![policy], ..Batch::default() };
        let world = Store::default().stage(batch).complete;
        let node = NodeView { name: "n1".into(), ..NodeView::default() };
        let found = intent(&world, &node, vec![], &mut Plaintext::default());
        let frontends: Vec<_> =
            found.frontends.iter().map(|f| (f.addr.to_string(), f.port, f.away, f.balancing)).collect();
        let of = |vip: &str| -> Vec<_> { frontends.iter().filter(|f| f.0 == vip).cloned().collect() };
        assert_eq!(of("10.96.0.1"), [("10.96.0.1".into(), 80, Away::Direct, Balancing::Random)]);
        assert_eq!(
            of("10.96.0.2"),
            [
                ("10.96.0.2".into(), 80, Away::Deny, Balancing::Maglev),
                ("10.96.0.2".into(), 81, Away::Direct, Balancing::Maglev)
            ]
        );
        let destinations: Vec<_> = found.destinations.iter().map(|d| (d.addr.to_string(), d.away)).collect();
        assert_eq!(destinations, [("10.0.1.1".into(), Away::Direct), ("10.0.1.2".into(), Away::Deny)]);
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
        let node = NodeView { name: "n1".into(), ..NodeView::default() };
        let found = intent(&world, &node, vec![], &mut Plaintext::default());
        let addrs: Vec<String> = found.destinations.iter().map(|d| d.addr.to_string()).collect();
        assert_eq!(addrs, ["10.0.1.1"]);
    }
}
