//! What an outbound connection of a local pod leads to. Decides everything and dials nothing.

use super::{Endpoint, NodeView, endpoints, endpoints::confirm};
use crate::state::World;
use mesh_xds::model::{Protocol, Service, SpiffeError, SpiffeId, Workload};
use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

/// The port on which workloads take HBONE.
pub const HBONE_PORT: u16 = 15008;

/// What is known of a connection when it is planned.
pub struct PlanInput<'a> {
    /// The current world.
    pub world: &'a World,
    /// Where this node is.
    pub node: &'a NodeView,
    /// The address that the application dialled.
    pub dst: SocketAddr,
    /// Whether an address is a pod's that this daemon captured.
    pub is_local: &'a dyn Fn(&IpAddr) -> bool,
    /// The endpoint that the kernel chose for it, if it did.
    pub chosen: Option<SocketAddr>,
    /// Endpoints that failed for this connection already.
    pub excluded: &'a [SocketAddr],
}

/// How to carry the connection.
#[derive(Clone, Debug)]
pub enum Plan {
    /// As it is, to an address outside of the mesh.
    Plain,
    /// To a pod of this very node: policy is checked and the pod dialled in the same process.
    Local {
        /// The pod's workload.
        workload: Arc<Workload>,
    },
    /// Over mutual TLS to the workload's node.
    Hbone {
        /// `podIP:15008`.
        addr: SocketAddr,
        /// Who may answer: the workload's identity and the service's extra ones.
        identities: BTreeSet<SpiffeId>,
        /// The workload.
        workload: Arc<Workload>,
    },
}

/// A decision: where the bytes go in the end, through which service, and how.
#[derive(Clone, Debug)]
pub struct Target {
    /// The final address (the endpoint's, after load balancing).
    pub addr: SocketAddr,
    /// The service that was dialled, if any.
    pub service: Option<Arc<Service>>,
    /// The workload at that address, if the mesh knows one.
    pub workload: Option<Arc<Workload>>,
    /// How.
    pub plan: Plan,
}

/// Why there is nowhere to send a connection.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The service has no endpoint that may be picked.
    #[error("service {service} has no ready endpoint for port {port}; check the readiness of its pods")]
    NoEndpoint {
        /// The service's key.
        service: String,
        /// The port dialled.
        port: u16,
    },
    /// The address is a service's, the port is not.
    #[error("{dst} is a service address, but no service has that port")]
    NoSuchPort {
        /// What was dialled.
        dst: SocketAddr,
    },
    /// The destination's identity is not one.
    #[error("workload {workload} cannot be identified, so it is not contacted")]
    Identity {
        /// The workload's uid.
        workload: String,
        /// What is wrong with it.
        #[source]
        source: SpiffeError,
    },
}

/// Decides about one connection. The kernel's choice of an endpoint stands if it is still one; else `pick` chooses among endpoints (never called with none) and returns an index;
/// it gets the service so that it can honour session affinity.
pub fn outbound(
    input: &PlanInput<'_>,
    pick: impl FnOnce(&Service, &[Endpoint]) -> usize,
) -> Result<Target, PlanError> {
    let dst = input.dst;
    if let Some(found) = input.world.service_port(&dst.ip(), dst.port(), Protocol::Tcp) {
        let chosen = input.chosen.filter(|addr| !input.excluded.contains(addr));
        let confirmed =
            chosen.and_then(|addr| confirm(input.world, input.node, &found.service, &found.port, addr));
        if let Some(endpoint) = confirmed {
            return to_workload(input, endpoint.addr, endpoint.workload, Some(found.service));
        }
        let mut all = endpoints(input.world, input.node, &found.service, &found.port, &dst.ip());
        if all.iter().any(|e| !input.excluded.contains(&e.addr)) {
            all.retain(|e| !input.excluded.contains(&e.addr));
        }
        if all.is_empty() {
            return Err(PlanError::NoEndpoint { service: found.service.key(), port: dst.port() });
        }
        let chosen = all.swap_remove(pick(&found.service, &all).min(all.len() - 1));
        return to_workload(input, chosen.addr, chosen.workload, Some(found.service));
    }
    if input.world.is_vip(&dst.ip()) {
        return Err(PlanError::NoSuchPort { dst });
    }
    match input.world.workload_by_addr(&dst.ip()) {
        Some(workload) => to_workload(input, dst, workload.clone(), None),
        None => Ok(Target { addr: dst, service: None, workload: None, plan: Plan::Plain }),
    }
}

fn to_workload(
    input: &PlanInput<'_>,
    addr: SocketAddr,
    workload: Arc<Workload>,
    service: Option<Arc<Service>>,
) -> Result<Target, PlanError> {
    let plan = if !workload.in_mesh() || workload.host_network {
        Plan::Plain
    } else if (input.is_local)(&addr.ip()) {
        Plan::Local { workload: workload.clone() }
    } else {
        let own = workload
            .identity()
            .map_err(|source| PlanError::Identity { workload: workload.uid.clone(), source })?;
        let mut identities = BTreeSet::from([own]);
        // Extra names that are not workload identities cannot be matched exactly, so they admit nobody.
        let extra = service.iter().flat_map(|s| &s.subject_alt_names);
        identities.extend(extra.filter_map(|san| san.parse().ok()));
        Plan::Hbone { addr: SocketAddr::new(addr.ip(), HBONE_PORT), identities, workload: workload.clone() }
    };
    Ok(Target { addr, service, workload: Some(workload), plan })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{
        Batch, Store,
        testing::{backs, pod, service},
    };
    use mesh_xds::model::{Health, TunnelProtocol};

    fn world() -> Arc<World> {
        let mut svc = service("cart", "shop", "10.96.0.1", &[(80, 8080)]);
        svc.subject_alt_names =
            vec!["spiffe://cluster.local/ns/shop/sa/extra".into(), "not-an-identity".into()];
        let plain_svc = service("old", "legacy", "10.96.0.2", &[(80, 8080)]);
        let empty = service("empty", "shop", "10.96.0.3", &[(80, 8080)]);
        let mut outside = backs(pod("old", "legacy", "10.0.1.9"), &plain_svc);
        outside.tunnel = TunnelProtocol::None;
        let mut unready = backs(pod("c", "shop", "10.0.1.3"), &empty);
        unready.health = Health::Unhealthy;
        let workloads = vec![
            backs(pod("a", "shop", "10.0.1.1"), &svc),
            backs(pod("b", "shop", "10.0.2.1"), &svc),
            unready,
            outside,
        ];
        let services = vec![svc, plain_svc, empty];
        Store::default().stage(Batch { workloads, services, ..Batch::default() }).complete
    }

    fn decide(dst: &str, excluded: &[SocketAddr], index: usize) -> Result<Target, PlanError> {
        decide_with(dst, None, excluded, index)
    }

    fn decide_with(
        dst: &str,
        chosen: Option<&str>,
        excluded: &[SocketAddr],
        index: usize,
    ) -> Result<Target, PlanError> {
        let (world, node) = (world(), NodeView { name: "n1".into(), ..NodeView::default() });
        let is_local = |ip: &IpAddr| *ip == "10.0.1.1".parse::<IpAddr>().unwrap();
        let input = PlanInput {
            world: &world,
            node: &node,
            dst: dst.parse().unwrap(),
            is_local: &is_local,
            chosen: chosen.map(|c| c.parse().unwrap()),
            excluded,
        };
        outbound(&input, |_, _| index)
    }

    #[test]
    fn a_service_leads_to_its_endpoints_local_or_over_hbone() {
        let local = decide("10.96.0.1:80", &[], 0).unwrap();
        assert_eq!(local.addr.to_string(), "10.0.1.1:8080");
        assert!(matches!(local.plan, Plan::Local { .. }));
        let remote = decide("10.96.0.1:80", &[], 1).unwrap();
        let Plan::Hbone { addr, identities, .. } = remote.plan else { panic!("{:?}", remote.plan) };
        assert_eq!(addr.to_string(), "10.0.2.1:15008");
        let names: Vec<String> = identities.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["spiffe://cluster.local/ns/shop/sa/b", "spiffe://cluster.local/ns/shop/sa/extra"]);
    }

    #[test]
    fn the_kernels_choice_stands_while_it_is_an_endpoint_of_that_port() {
        let to = |chosen, excluded: &[SocketAddr]| {
            decide_with("10.96.0.1:80", Some(chosen), excluded, 0).unwrap().addr.to_string()
        };
        assert_eq!(to("10.0.2.1:8080", &[]), "10.0.2.1:8080");
        for stale in ["10.0.2.1:81", "10.0.1.3:8080", "10.0.1.9:8080", "10.0.77.1:8080", "[fd00::1]:8080"] {
            assert_eq!(to(stale, &[]), "10.0.1.1:8080", "{stale} is not one");
        }
        let failed = "10.0.2.1:8080".parse().unwrap();
        assert_eq!(to("10.0.2.1:8080", &[failed]), "10.0.1.1:8080", "it was tried");
        // Unready: nothing is chosen although the address is right.
        assert!(decide_with("10.96.0.3:80", Some("10.0.1.3:8080"), &[], 0).is_err());
    }

    #[test]
    fn what_is_not_in_the_mesh_is_reached_plainly() {
        let old = decide("10.96.0.2:80", &[], 0).unwrap();
        assert!(matches!(old.plan, Plan::Plain) && old.addr.to_string() == "10.0.1.9:8080");
        let unknown = decide("192.0.2.7:443", &[], 0).unwrap();
        assert!(matches!(unknown.plan, Plan::Plain) && unknown.workload.is_none());
    }

    #[test]
    fn a_pod_address_needs_no_service() {
        let pod = decide("10.0.2.1:9999", &[], 0).unwrap();
        assert!(matches!(pod.plan, Plan::Hbone { .. }) && pod.service.is_none());
        assert_eq!(pod.addr.to_string(), "10.0.2.1:9999");
    }

    #[test]
    fn refusals_name_service_and_port() {
        assert!(matches!(decide("10.96.0.3:80", &[], 0), Err(PlanError::NoEndpoint { port: 80, .. })));
        assert!(matches!(decide("10.96.0.1:81", &[], 0), Err(PlanError::NoSuchPort { .. })));
    }

    #[test]
    fn a_failed_endpoint_is_avoided_while_there_is_another() {
        let first: SocketAddr = "10.0.1.1:8080".parse().unwrap();
        assert_eq!(decide("10.96.0.1:80", &[first], 0).unwrap().addr.to_string(), "10.0.2.1:8080");
        let both = [first, "10.0.2.1:8080".parse().unwrap()];
        assert_eq!(decide("10.96.0.1:80", &both, 0).unwrap().addr, first, "all failed: start over");
    }
}
