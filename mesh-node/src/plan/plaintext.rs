//! Which ports of a workload may be reached in plaintext: what the kernel may do on its own while the daemon is away.
//!
//! The answer follows from the policies that apply, and many workloads have the same ones. So it is computed once for
//! each such group and kept until any policy changes: a change of endpoints costs one look-up per workload, however
//! many policies there are. Deliberately absent: who the client is, which nobody can tell while the daemon is away.

use crate::{
    policy::{PolicySet, Strictness},
    state::World,
};
use mesh_xds::model::{Authorization, Scope, Workload};
use std::{collections::HashMap, sync::Arc};

/// Most groups that are kept.
const MAX_GROUPS: usize = 65_536;

/// The ports that take plaintext, by group of workloads that the same policies apply to.
#[derive(Debug, Default)]
pub struct Plaintext {
    /// The world's count of policy changes that `scoped` and `known` are of.
    policies: Option<u64>,
    /// The policies that apply by scope, those of all namespaces under an empty name.
    scoped: HashMap<String, Vec<Arc<Authorization>>>,
    /// By namespace, then by the policies that the workload names.
    known: HashMap<String, HashMap<Vec<String>, Arc<Strictness>>>,
    groups: usize,
}

impl Plaintext {
    /// Whether no connection to this port of a workload could be refused.
    pub fn port(&mut self, world: &World, workload: &Workload, port: u16) -> bool {
        !protected(workload) || !self.strictness(world, workload).of(port)
    }

    /// Whether no connection to any port of a workload could be refused.
    pub fn every_port(&mut self, world: &World, workload: &Workload) -> bool {
        if !protected(workload) {
            return true;
        }
        let strictness = self.strictness(world, workload);
        !strictness.all && strictness.ports.values().all(|strict| !strict)
    }

    fn strictness(&mut self, world: &World, workload: &Workload) -> Arc<Strictness> {
        if self.policies != Some(world.policy_changes()) || self.groups > MAX_GROUPS {
            self.index(world);
        }
        let namespace = workload.name.namespace.as_str();
        let known = self.known.get(namespace).and_then(|group| group.get(&workload.policies));
        if let Some(known) = known {
            return known.clone();
        }
        let scoped = ["", namespace].into_iter().filter_map(|scope| self.scoped.get(scope)).flatten();
        // A policy that is not bound by selector applies by its scope only, also if the workload still names it.
        let named = workload.policies.iter().filter_map(|key| world.policy(key));
        let named = named.filter(|policy| policy.scope == Scope::WorkloadSelector);
        let computed = Arc::new(PolicySet::for_workload(workload, scoped.chain(named)).strictness());
        let group = self.known.entry(namespace.to_owned()).or_default();
        group.insert(workload.policies.clone(), computed.clone());
        self.groups += 1;
        computed
    }

    fn index(&mut self, world: &World) {
        *self = Self { policies: Some(world.policy_changes()), ..Self::default() };
        for policy in world.policies() {
            let namespace = match policy.scope {
                Scope::Global => "",
                Scope::Namespace => policy.name.namespace.as_str(),
                Scope::WorkloadSelector => continue,
            };
            self.scoped.entry(namespace.to_owned()).or_default().push(policy.clone());
        }
    }
}

/// Whether policies protect a workload at all.
fn protected(workload: &Workload) -> bool {
    workload.in_mesh() && !workload.host_network
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Batch, Store, testing::pod};
    use mesh_xds::model::{Action, Clause, Match, NamespacedName, Rule, StringMatch, TunnelProtocol};
    use std::time::Instant;

    /// What STRICT becomes: deny whoever has no identity, on this port or on all.
    fn strict(namespace: &str, name: &str, scope: Scope, port: Option<u16>) -> Authorization {
        let stranger = Match {
            not_principals: vec![StringMatch::Presence],
            destination_ports: port.into_iter().collect(),
            ..Match::default()
        };
        Authorization {
            name: NamespacedName::new(namespace, name),
            scope,
            action: Action::Deny,
            rules: vec![Rule { clauses: vec![Clause { matches: vec![stranger] }] }],
        }
    }

    #[test]
    fn ports_follow_the_policies_of_every_scope() {
        let store = Store::default();
        let mut named = pod("named", "shop", "10.0.0.1");
        named.policies = vec!["shop/one-port".into()];
        let mut missing = pod("missing", "shop", "10.0.0.2");
        missing.policies = vec!["shop/not-there-yet".into()];
        let free = pod("free", "shop", "10.0.0.3");
        let bank = pod("bank", "bank", "10.0.0.4");
        let mut outside = pod("outside", "bank", "10.0.0.5");
        outside.tunnel = TunnelProtocol::None;
        let mut plaintext = Plaintext::default();
        let policies = vec![
            strict("shop", "one-port", Scope::WorkloadSelector, Some(8080)),
            strict("bank", "default", Scope::Namespace, None),
        ];
        let world = store.stage(Batch { policies, ..Batch::default() }).complete;
        store.publish(world.clone());
        let mut ask = |world: &World, w: &Workload| {
            (plaintext.port(world, w, 80), plaintext.port(world, w, 8080), plaintext.every_port(world, w))
        };
        assert_eq!(ask(&world, &free), (true, true, true));
        assert_eq!(ask(&world, &named), (true, false, false));
        assert_eq!(ask(&world, &missing), (false, false, false));
        assert_eq!(ask(&world, &bank), (false, false, false));
        assert_eq!(ask(&world, &outside), (true, true, true));
        let policies = vec![strict("root", "default", Scope::Global, None)];
        let world = store.stage(Batch { policies, ..Batch::default() }).complete;
        store.publish(world.clone());
        assert_eq!(ask(&world, &free), (false, false, false), "a new policy is seen");
        let removed_policies = vec!["root/default".into(), "bank/default".into()];
        let world = store.stage(Batch { removed_policies, ..Batch::default() }).complete;
        assert_eq!(ask(&world, &free), (true, true, true), "and its end");
        assert_eq!(ask(&world, &bank), (true, true, true));
    }

    /// Run by hand: `cargo test --release -p mesh-node --lib plaintext -- --ignored --nocapture`.
    #[test]
    #[ignore = "a measurement"]
    fn a_hundred_thousand_workloads() {
        let workloads = (0..100_000_u32).map(|n| {
            let addr = std::net::Ipv4Addr::from(0x0a00_0000 + n).to_string();
            pod(&format!("p{n}"), &format!("ns{}", n % 500), &addr)
        });
        let policies = (0..2000).map(|n| {
            strict(&format!("ns{}", n % 500), &format!("policy{n}"), Scope::Namespace, Some(9000 + n % 7))
        });
        let batch =
            Batch { workloads: workloads.collect(), policies: policies.collect(), ..Batch::default() };
        let world = Store::default().stage(batch).complete;
        let mut plaintext = Plaintext::default();
        for round in ["first", "second", "third"] {
            let start = Instant::now();
            let open = world.workloads().filter(|w| plaintext.every_port(&world, w)).count();
            println!("{round}: {:?}, {open} open", start.elapsed());
            let start = Instant::now();
            let node = crate::plan::NodeView::default();
            let intent = crate::plan::intent(&world, &node, vec![], &mut plaintext);
            println!("{round}: the whole intent: {:?}, {}", start.elapsed(), intent.destinations.len());
        }
    }
}
