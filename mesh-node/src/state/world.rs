//! One immutable view of workloads, services and policies, with the indexes that decisions need.

use imbl::{GenericHashMap, shared_ptr::ArcK};
use mesh_xds::model::{Authorization, NamespacedName, Protocol, Service, ServicePort, Workload};
use std::{hash::RandomState, net::IpAddr, sync::Arc};

/// A persistent map: a clone shares structure, so that a change of one endpoint costs the same in a mesh of ten
/// and of a hundred thousand.
type Map<K, V> = GenericHashMap<K, V, RandomState, ArcK>;

/// Everything the control plane said, indexed. Cloning is cheap and shares all that did not change.
#[derive(Clone, Debug, Default)]
pub struct World {
    generation: u64,
    workloads: Map<Arc<str>, Arc<Workload>>,
    services: Map<Arc<str>, Arc<Service>>,
    policies: Map<Arc<str>, Arc<Authorization>>,
    policy_changes: u64,
    /// Several workloads may share an address (host-network pods; a reused address before the removal arrives);
    /// the newest is last.
    by_address: Map<IpAddr, Vec<Arc<Workload>>>,
    by_pod: Map<NamespacedName, Arc<Workload>>,
    by_vip: Map<IpAddr, Vec<Arc<Service>>>,
    /// By host name in lower case. Several namespaces may claim one outside of the cluster's domain.
    by_host: Map<Arc<str>, Vec<Arc<Service>>>,
    /// Workload uids by the service key they back, sorted.
    members: Map<Arc<str>, Vec<Arc<str>>>,
}

/// A service's port that an address led to.
#[derive(Clone, Debug)]
pub struct ServicePortRef {
    /// The service.
    pub service: Arc<Service>,
    /// Its port.
    pub port: ServicePort,
}

impl World {
    /// Grows by one with every published change.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// How many workloads, services and policies there are.
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.workloads.len(), self.services.len(), self.policies.len())
    }

    /// The workload behind an address. Host-network pods come last: their address is the node's.
    pub fn workload_by_addr(&self, addr: &IpAddr) -> Option<&Arc<Workload>> {
        let all = self.by_address.get(addr)?;
        all.iter().rev().find(|w| !w.host_network).or_else(|| all.last())
    }

    /// Everything behind an address, in no order.
    pub fn workloads_at(&self, addr: &IpAddr) -> &[Arc<Workload>] {
        self.by_address.get(addr).map_or(&[], Vec::as_slice)
    }

    /// The workload of a pod.
    pub fn workload_by_pod(&self, pod: &NamespacedName) -> Option<&Arc<Workload>> {
        self.by_pod.get(pod)
    }

    /// The workload with a uid.
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The service with a key (`NAMESPACE/HOSTNAME`).
    pub fn service(&self, key: &str) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    /// The service port that a virtual address and port lead to.
    pub fn service_port(&self, vip: &IpAddr, port: u16, protocol: Protocol) -> Option<ServicePortRef> {
        self.by_vip.get(vip)?.iter().find_map(|service| {
            let port = service.ports.iter().find(|p| p.port == port && p.protocol == protocol)?;
            Some(ServicePortRef { service: service.clone(), port: *port })
        })
    }

    /// The services at a virtual address, on any port, in key order.
    pub fn services_at(&self, vip: &IpAddr) -> &[Arc<Service>] {
        self.by_vip.get(vip).map_or(&[], Vec::as_slice)
    }

    /// The services with a host name (in lower case; `*.example.com` for a wildcard), in key order.
    pub fn services_by_host(&self, host: &str) -> &[Arc<Service>] {
        self.by_host.get(host).map_or(&[], Vec::as_slice)
    }

    /// Whether an address is a service's, on any port.
    pub fn is_vip(&self, addr: &IpAddr) -> bool {
        self.by_vip.contains_key(addr)
    }

    /// The workloads that back a service, in uid order.
    pub fn members<'a>(&'a self, service_key: &str) -> impl Iterator<Item = &'a Arc<Workload>> + 'a {
        let uids = self.members.get(service_key).map_or(&[][..], Vec::as_slice);
        uids.iter().filter_map(|uid| self.workloads.get(uid))
    }

    /// The policy with a key (`NAMESPACE/NAME`).
    pub fn policy(&self, key: &str) -> Option<&Arc<Authorization>> {
        self.policies.get(key)
    }

    /// The generation in which a policy last changed: worlds with the same number have the same policies.
    pub fn policy_changes(&self) -> u64 {
        self.policy_changes
    }

    /// All workloads, in no order.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// All services, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// All policies, in no order.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Authorization>> {
        self.policies.values()
    }

    pub(super) fn bump(&mut self) {
        self.generation += 1;
    }

    pub(super) fn upsert_workload(&mut self, workload: Arc<Workload>) {
        self.remove_workload(&workload.uid);
        let uid: Arc<str> = workload.uid.as_str().into();
        for addr in &workload.addresses {
            self.by_address.entry(*addr).or_default().push(workload.clone());
        }
        for key in workload.services.keys() {
            let list = self.members.entry(key.as_str().into()).or_default();
            if let Err(at) = list.binary_search(&uid) {
                list.insert(at, uid.clone());
            }
        }
        self.by_pod.insert(workload.name.clone(), workload.clone());
        self.workloads.insert(uid, workload);
    }

    pub(super) fn remove_workload(&mut self, uid: &str) -> bool {
        let Some(old) = self.workloads.remove(uid) else { return false };
        for addr in &old.addresses {
            remove_from(&mut self.by_address, addr, |w| w.uid == uid);
        }
        for key in old.services.keys() {
            remove_from(&mut self.members, &Arc::from(key.as_str()), |u: &Arc<str>| &**u == uid);
        }
        if self.by_pod.get(&old.name).is_some_and(|w| w.uid == uid) {
            self.by_pod.remove(&old.name);
        }
        true
    }

    pub(super) fn upsert_service(&mut self, service: Arc<Service>) {
        let key = service.key();
        self.remove_service(&key);
        for address in &service.addresses {
            let list = self.by_vip.entry(address.ip).or_default();
            // Sorted by key, so that a virtual address claimed twice leads to the same service on every node.
            let at = list.partition_point(|s| s.key() < key);
            list.insert(at, service.clone());
        }
        let list = self.by_host.entry(host_key(&service)).or_default();
        let at = list.partition_point(|s| s.key() < key);
        list.insert(at, service.clone());
        self.services.insert(key.into(), service);
    }

    pub(super) fn remove_service(&mut self, key: &str) -> bool {
        let Some(old) = self.services.remove(key) else { return false };
        for address in &old.addresses {
            remove_from(&mut self.by_vip, &address.ip, |s| s.key() == key);
        }
        remove_from(&mut self.by_host, &host_key(&old), |s| s.key() == key);
        true
    }

    pub(super) fn upsert_policy(&mut self, policy: Arc<Authorization>) {
        self.policy_changes = self.generation;
        self.policies.insert(policy.key().into(), policy);
    }

    pub(super) fn remove_policy(&mut self, key: &str) -> bool {
        self.policy_changes = self.generation;
        self.policies.remove(key).is_some()
    }
}

fn host_key(service: &Service) -> Arc<str> {
    service.hostname.to_ascii_lowercase().into()
}

fn remove_from<K: Clone + Eq + std::hash::Hash, V: Clone>(
    map: &mut Map<K, Vec<V>>,
    key: &K,
    gone: impl Fn(&V) -> bool,
) {
    if let Some(list) = map.get_mut(key) {
        list.retain(|v| !gone(v));
        if list.is_empty() {
            map.remove(key);
        }
    }
}
