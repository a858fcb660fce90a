//! The only writer of the [`World`]: stages a batch of changes and publishes it in two steps.
//!
//! Two steps because kernel and daemon change at different moments. What is new must be known to the daemon before
//! the kernel redirects connections to it; what is gone must leave the kernel before the daemon forgets it. So a
//! batch is first published with its additions only, then the kernel is brought in step, then the removals follow.

use super::World;
use arc_swap::ArcSwap;
use mesh_xds::model::{Authorization, Service, Workload};
use std::{collections::HashSet, sync::Arc};
use tokio::sync::watch;

/// Changes of one xDS response, already validated.
#[derive(Debug, Default)]
pub struct Batch {
    /// New or changed workloads.
    pub workloads: Vec<Workload>,
    /// New or changed services.
    pub services: Vec<Service>,
    /// New or changed policies.
    pub policies: Vec<Authorization>,
    /// Resource names of workloads (uid) or services (`NAMESPACE/HOSTNAME`) that are gone: one xDS type carries both.
    pub removed_addresses: Vec<String>,
    /// Keys of policies that are gone.
    pub removed_policies: Vec<String>,
}

impl Batch {
    /// Adds a later batch, so that both can be applied as one.
    pub fn merge(&mut self, later: Batch) {
        let names: HashSet<&str> = later.removed_addresses.iter().map(String::as_str).collect();
        self.workloads.retain(|w| !names.contains(w.uid.as_str()));
        self.services.retain(|s| !names.contains(s.key().as_str()));
        let workloads: HashSet<&str> = later.workloads.iter().map(|w| w.uid.as_str()).collect();
        let services: HashSet<String> = later.services.iter().map(Service::key).collect();
        self.removed_addresses.retain(|name| !workloads.contains(name.as_str()) && !services.contains(name));
        let names: HashSet<&str> = later.removed_policies.iter().map(String::as_str).collect();
        self.policies.retain(|p| !names.contains(p.key().as_str()));
        let policies: HashSet<String> = later.policies.iter().map(Authorization::key).collect();
        self.removed_policies.retain(|key| !policies.contains(key));
        self.workloads.extend(later.workloads);
        self.services.extend(later.services);
        self.policies.extend(later.policies);
        self.removed_addresses.extend(later.removed_addresses);
        self.removed_policies.extend(later.removed_policies);
    }

    /// Resource names of the workloads that change or go.
    pub fn changed_addresses(&self) -> Vec<String> {
        self.workloads.iter().map(|w| &w.uid).chain(&self.removed_addresses).cloned().collect()
    }

    /// Whether policies change.
    pub fn touches_policies(&self) -> bool {
        !self.policies.is_empty() || !self.removed_policies.is_empty()
    }
}

/// A batch that was put onto the current world, ready to be published.
#[derive(Debug)]
pub struct Staged {
    /// With the additions, but what was removed still there.
    pub additions: Arc<World>,
    /// The final state.
    pub complete: Arc<World>,
}

/// Holds the current world. One writer (the reconcile task), any number of readers.
#[derive(Debug)]
pub struct Store {
    current: ArcSwap<World>,
    changed: watch::Sender<u64>,
}

impl Default for Store {
    fn default() -> Self {
        Self { current: ArcSwap::from_pointee(World::default()), changed: watch::channel(0).0 }
    }
}

impl Store {
    /// The current world.
    pub fn world(&self) -> Arc<World> {
        self.current.load_full()
    }

    /// Told the generation of every published world.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Computes the worlds that follow from the current one and a batch; publishes nothing.
    pub fn stage(&self, batch: Batch) -> Staged {
        let mut world = World::clone(&self.current.load());
        world.bump();
        for workload in batch.workloads {
            world.upsert_workload(Arc::new(workload));
        }
        for service in batch.services {
            world.upsert_service(Arc::new(service));
        }
        for policy in batch.policies {
            world.upsert_policy(Arc::new(policy));
        }
        let additions = Arc::new(world.clone());
        world.bump();
        for name in &batch.removed_addresses {
            if !world.remove_workload(name) {
                world.remove_service(name);
            }
        }
        for key in &batch.removed_policies {
            world.remove_policy(key);
        }
        Staged { additions, complete: Arc::new(world) }
    }

    /// Wakes the subscribers although nothing was published: something else that they look at has changed.
    pub fn wake(&self) {
        self.changed.send_modify(|_| ());
    }

    /// Makes a world the current one and wakes the subscribers.
    pub fn publish(&self, world: Arc<World>) {
        let generation = world.generation();
        self.current.store(world);
        self.changed.send_replace(generation);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::testing::{pod, service};
    use mesh_xds::model::Protocol;

    fn apply(store: &Store, batch: Batch) -> Staged {
        let staged = store.stage(batch);
        store.publish(staged.additions.clone());
        store.publish(staged.complete.clone());
        staged
    }

    #[test]
    fn additions_come_before_removals() {
        let store = Store::default();
        apply(&store, Batch { workloads: vec![pod("a", "shop", "10.0.0.1")], ..Batch::default() });
        let staged = store.stage(Batch {
            workloads: vec![pod("b", "shop", "10.0.0.2")],
            removed_addresses: vec!["c1//Pod/shop/a".into()],
            ..Batch::default()
        });
        let (a, b) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        assert!(
            staged.additions.workload_by_addr(&a).is_some()
                && staged.additions.workload_by_addr(&b).is_some()
        );
        assert!(
            staged.complete.workload_by_addr(&a).is_none() && staged.complete.workload_by_addr(&b).is_some()
        );
        assert!(store.world().workload_by_addr(&b).is_none(), "staging publishes nothing");
    }

    #[test]
    fn merged_batches_equal_the_batches_one_after_the_other() {
        let remove = |name: &str| Batch { removed_addresses: vec![name.into()], ..Batch::default() };
        let add = |name: &str| Batch { workloads: vec![pod(name, "shop", "10.0.0.1")], ..Batch::default() };
        let cases: [(Vec<Batch>, usize); 4] = [
            (vec![add("a"), remove("c1//Pod/shop/a")], 0),
            (vec![remove("c1//Pod/shop/a"), add("a")], 1),
            (vec![add("a"), remove("c1//Pod/shop/a"), add("a")], 1),
            (vec![add("a"), add("b"), remove("c1//Pod/shop/a")], 1),
        ];
        for (batches, expected) in cases {
            let store = Store::default();
            let mut all = Batch::default();
            batches.into_iter().for_each(|b| all.merge(b));
            assert_eq!(apply(&store, all).complete.counts().0, expected);
        }
    }

    #[test]
    fn a_reused_address_follows_the_newest_workload() {
        let store = Store::default();
        let ip = "10.0.0.1".parse().unwrap();
        apply(&store, Batch { workloads: vec![pod("old", "shop", "10.0.0.1")], ..Batch::default() });
        apply(&store, Batch { workloads: vec![pod("new", "shop", "10.0.0.1")], ..Batch::default() });
        assert_eq!(store.world().workload_by_addr(&ip).unwrap().name.name, "new");
        apply(&store, Batch { removed_addresses: vec!["c1//Pod/shop/old".into()], ..Batch::default() });
        assert_eq!(store.world().workload_by_addr(&ip).unwrap().name.name, "new");
        apply(&store, Batch { removed_addresses: vec!["c1//Pod/shop/new".into()], ..Batch::default() });
        assert!(store.world().workload_by_addr(&ip).is_none());
    }

    #[test]
    fn a_pod_is_preferred_to_a_host_network_pod_on_the_same_address() {
        let store = Store::default();
        let mut host = pod("kubelet-like", "kube-system", "10.0.0.9");
        host.host_network = true;
        apply(&store, Batch { workloads: vec![pod("p", "shop", "10.0.0.9"), host], ..Batch::default() });
        let ip = "10.0.0.9".parse().unwrap();
        assert_eq!(store.world().workload_by_addr(&ip).unwrap().name.name, "p");
    }

    #[test]
    fn members_follow_workloads_and_services_are_found_by_port_and_protocol() {
        let store = Store::default();
        let svc = service("cart", "shop", "10.96.0.1", &[(80, 8080)]);
        let key = svc.key();
        let mut w = pod("a", "shop", "10.0.0.1");
        w.services.insert(key.clone(), Default::default());
        apply(&store, Batch { workloads: vec![w.clone()], services: vec![svc], ..Batch::default() });
        let world = store.world();
        assert_eq!(world.members(&key).count(), 1);
        let vip = "10.96.0.1".parse().unwrap();
        assert_eq!(world.service_port(&vip, 80, Protocol::Tcp).unwrap().port.target_port, 8080);
        assert!(world.service_port(&vip, 80, Protocol::Udp).is_none());
        assert!(world.service_port(&vip, 81, Protocol::Tcp).is_none());
        w.services.clear();
        apply(&store, Batch { workloads: vec![w], ..Batch::default() });
        assert_eq!(store.world().members(&key).count(), 0);
    }
}
