//! Joins objects into what the nodes need: services, workloads and policies.
//!
//! There is one writer: `apply` takes an event and marks what depends on the object, `snapshot` computes exactly that
//! again and returns an immutable value. No I/O and no clock, so tests call the two and look. An index that saw any
//! history of events equals one that was given the final objects in any order; a property test holds it to that, and
//! it is why every choice between rivals (two owners of one address) is made by their contents and not by arrival.
//! Deliberately absent: files, gRPC, protobuf.

mod check;
mod peer_auth;
mod policies;
mod services;
mod workloads;

use crate::{
    object::{
        AuthorizationPolicy, EndpointSlice, Kind, Labels, Namespace, Node, Object, ObjectKey,
        PeerAuthentication, Pod, PolicyTarget, Service, has_all,
    },
    report::Issue,
    snapshot::Snapshot,
    source::Event,
};
use mesh_xds::model::NamespacedName;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    ops::Bound,
    sync::Arc,
};

/// What an index is told once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The cluster's id in workload uids, for example `Kubernetes`.
    pub cluster_id: String,
    /// The trust domain of all identities, for example `cluster.local`.
    pub trust_domain: String,
    /// The suffix of service host names, for example `cluster.local`.
    pub cluster_domain: String,
    /// The namespace of mesh-wide policies, for example `istio-system`.
    pub root_namespace: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            cluster_id: "Kubernetes".into(),
            trust_domain: "cluster.local".into(),
            cluster_domain: "cluster.local".into(),
            root_namespace: "istio-system".into(),
        }
    }
}

type Named<T> = BTreeMap<NamespacedName, T>;

/// What has to be computed again.
#[derive(Debug, Default)]
struct Dirty {
    pods: BTreeSet<NamespacedName>,
    services: BTreeSet<NamespacedName>,
    /// Endpoints that are no pods, by namespace and address.
    external: BTreeSet<(String, IpAddr)>,
    authorization: BTreeSet<NamespacedName>,
    peer_authentication: BTreeSet<NamespacedName>,
}

/// The joined objects.
#[derive(Debug)]
pub struct Index {
    settings: Settings,
    // The objects as they came.
    namespaces: BTreeMap<String, Namespace>,
    nodes: BTreeMap<String, Node>,
    service_accounts: BTreeSet<NamespacedName>,
    services: Named<Service>,
    slices: Named<EndpointSlice>,
    pods: Named<Pod>,
    peer_authentications: Named<PeerAuthentication>,
    authorization_policies: Named<AuthorizationPolicy>,
    // Ways to find them.
    pods_by_node: BTreeMap<String, BTreeSet<NamespacedName>>,
    pods_by_ip: BTreeMap<IpAddr, BTreeSet<NamespacedName>>,
    services_by_ip: BTreeMap<IpAddr, BTreeSet<NamespacedName>>,
    slices_by_service: Named<BTreeSet<NamespacedName>>,
    slices_by_pod: Named<BTreeSet<NamespacedName>>,
    slices_by_ip: BTreeMap<(String, IpAddr), BTreeSet<NamespacedName>>,
    // The result.
    dirty: Dirty,
    current: Snapshot,
    published: Arc<Snapshot>,
}

impl Index {
    /// An index without objects.
    pub fn new(settings: Settings) -> Self {
        let mut index = Self {
            settings,
            namespaces: BTreeMap::new(),
            nodes: BTreeMap::new(),
            service_accounts: BTreeSet::new(),
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            pods: BTreeMap::new(),
            peer_authentications: BTreeMap::new(),
            authorization_policies: BTreeMap::new(),
            pods_by_node: BTreeMap::new(),
            pods_by_ip: BTreeMap::new(),
            services_by_ip: BTreeMap::new(),
            slices_by_service: BTreeMap::new(),
            slices_by_pod: BTreeMap::new(),
            slices_by_ip: BTreeMap::new(),
            dirty: Dirty::default(),
            current: Snapshot::default(),
            published: Arc::default(),
        };
        let strict = peer_auth::static_strict(&index.settings.root_namespace);
        index.current.put_policy(&strict.key(), Some(strict.clone()));
        index.current.seal();
        index.published = Arc::new(index.current.clone());
        index
    }

    /// What the index was told.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Takes in one change.
    pub fn apply(&mut self, event: Event) {
        match event {
            Event::Put(object) => self.put(object),
            Event::Delete(key) => self.delete(&key),
        }
    }

    fn put(&mut self, object: Object) {
        match object {
            Object::Namespace(o) => {
                self.touch_namespace_pods(&o.name);
                self.namespaces.insert(o.name.clone(), o);
            }
            Object::Node(o) => {
                self.touch_node(&o.name);
                self.nodes.insert(o.name.clone(), o);
            }
            Object::ServiceAccount(name) => {
                self.service_accounts.insert(name);
            }
            Object::Service(o) => self.set_service(o.name.clone(), Some(o)),
            Object::EndpointSlice(o) => self.set_slice(o.name.clone(), Some(o)),
            Object::Pod(o) => self.set_pod(o.name.clone(), Some(o)),
            Object::PeerAuthentication(o) => {
                self.touch_peer_authentication(&o.name.namespace);
                self.peer_authentications.insert(o.name.clone(), o);
                self.touch_peer_authentication_policies();
            }
            Object::AuthorizationPolicy(o) => self.set_authorization(o.name.clone(), Some(o)),
        }
    }

    fn delete(&mut self, key: &ObjectKey) {
        let name = &key.name;
        match key.kind {
            Kind::Namespace => {
                self.touch_namespace_pods(&name.name);
                self.namespaces.remove(&name.name);
            }
            Kind::Node => {
                self.touch_node(&name.name);
                self.nodes.remove(&name.name);
            }
            Kind::ServiceAccount => {
                self.service_accounts.remove(name);
            }
            Kind::Service => self.set_service(name.clone(), None),
            Kind::EndpointSlice => self.set_slice(name.clone(), None),
            Kind::Pod => self.set_pod(name.clone(), None),
            Kind::PeerAuthentication => {
                self.touch_peer_authentication(&name.namespace);
                self.touch_peer_authentication_policies();
                self.peer_authentications.remove(name);
            }
            Kind::AuthorizationPolicy => self.set_authorization(name.clone(), None),
        }
    }

    /// Computes what has changed and returns the new state. Equal states are the same allocation.
    pub fn snapshot(&mut self) -> Arc<Snapshot> {
        let dirty = std::mem::take(&mut self.dirty);
        for name in &dirty.services {
            let service = self.build_service(name);
            self.current.put_service(&self.service_key(name), service);
        }
        for name in &dirty.pods {
            let workload = self.build_pod(name);
            self.current.put_workload(&self.pod_uid(name), workload);
        }
        for (namespace, ip) in &dirty.external {
            let workload = self.build_external(namespace, *ip);
            self.current.put_workload(&self.external_uid(namespace, *ip), workload);
        }
        for name in &dirty.authorization {
            let policy = self.build_authorization(name);
            self.current.put_policy(&name.to_string(), policy);
        }
        for name in &dirty.peer_authentication {
            let policy = self.build_peer_authentication(name);
            self.current.put_policy(&peer_auth::converted_name(name).to_string(), policy);
        }
        if self.current.seal() {
            self.published = Arc::new(self.current.clone());
        }
        self.published.clone()
    }

    /// What is wrong between objects that are each right by themselves.
    pub fn problems(&self) -> Vec<(ObjectKey, Issue)> {
        self.check()
    }

    /// How many objects of a kind there are.
    pub fn count(&self, kind: Kind) -> usize {
        match kind {
            Kind::Namespace => self.namespaces.len(),
            Kind::Node => self.nodes.len(),
            Kind::ServiceAccount => self.service_accounts.len(),
            Kind::Service => self.services.len(),
            Kind::EndpointSlice => self.slices.len(),
            Kind::Pod => self.pods.len(),
            Kind::PeerAuthentication => self.peer_authentications.len(),
            Kind::AuthorizationPolicy => self.authorization_policies.len(),
        }
    }

    // Changes of single kinds, with what depends on them.

    fn set_service(&mut self, name: NamespacedName, new: Option<Service>) {
        let old = self.services.remove(&name);
        for service in old.iter().chain(&new) {
            // Rivals for an address change when one comes or goes.
            for ip in &service.cluster_ips {
                self.dirty.services.extend(self.services_by_ip.get(ip).into_iter().flatten().cloned());
            }
            let selector = service.selector.clone();
            self.touch_service_pods(&name, &selector);
        }
        let ips = |s: &Option<Service>| s.iter().flat_map(|s| s.cluster_ips.clone()).collect::<Vec<_>>();
        relink(&mut self.services_by_ip, &name, ips(&old), ips(&new));
        self.dirty.services.insert(name.clone());
        self.services.extend(new.map(|s| (name, s)));
    }

    fn set_slice(&mut self, name: NamespacedName, new: Option<EndpointSlice>) {
        let old = self.slices.remove(&name);
        let service = |s: &Option<EndpointSlice>| -> Vec<_> {
            s.iter().map(|s| NamespacedName::new(&s.name.namespace, &s.service)).collect()
        };
        let (before, after) = (service(&old), service(&new));
        let had: BTreeSet<_> =
            before.iter().chain(&after).filter(|s| self.slices_by_service.contains_key(s)).cloned().collect();
        relink(&mut self.slices_by_service, &name, before.clone(), after.clone());
        for service in before.iter().chain(&after) {
            // With its first slice a service stops taking endpoints from pods' labels, with its last one it begins.
            if had.contains(service) != self.slices_by_service.contains_key(service) {
                let selector = self.services.get(service).map(|s| s.selector.clone());
                self.touch_service_pods(service, &selector.unwrap_or_default());
            }
        }
        let pods = |s: &Option<EndpointSlice>| -> Vec<NamespacedName> {
            let s = s.iter().flat_map(|s| s.endpoints.iter().map(move |e| (s, e)));
            s.filter_map(|(s, e)| Some(NamespacedName::new(&s.name.namespace, e.pod.as_ref()?))).collect()
        };
        let ips = |s: &Option<EndpointSlice>| -> Vec<(String, IpAddr)> {
            let s = s.iter().flat_map(|s| s.endpoints.iter().map(move |e| (s, e)));
            s.filter(|(_, e)| e.pod.is_none())
                .flat_map(|(s, e)| e.addresses.iter().map(|ip| (s.name.namespace.clone(), *ip)))
                .collect()
        };
        for (namespace, ip) in ips(&old).into_iter().chain(ips(&new)) {
            self.dirty.pods.extend(self.pods_by_ip.get(&ip).into_iter().flatten().cloned());
            self.dirty.external.insert((namespace, ip));
        }
        self.dirty.pods.extend(pods(&old).into_iter().chain(pods(&new)));
        relink(&mut self.slices_by_pod, &name, pods(&old), pods(&new));
        relink(&mut self.slices_by_ip, &name, ips(&old), ips(&new));
        self.slices.extend(new.map(|s| (name, s)));
    }

    fn set_pod(&mut self, name: NamespacedName, new: Option<Pod>) {
        let old = self.pods.remove(&name);
        // Pods of the host's network share its address, and finished pods have given theirs back.
        let ips = |p: &Option<Pod>| -> Vec<IpAddr> {
            p.iter().filter(|p| !p.host_network && !p.finished).flat_map(|p| p.addresses.clone()).collect()
        };
        for ip in ips(&old).into_iter().chain(ips(&new)) {
            self.dirty.pods.extend(self.pods_by_ip.get(&ip).into_iter().flatten().cloned());
            let namespaces: BTreeSet<_> =
                self.pods_by_ip.get(&ip).into_iter().flatten().map(|p| p.namespace.clone()).collect();
            let namespaces = namespaces.into_iter().chain([name.namespace.clone()]);
            self.dirty.external.extend(namespaces.map(|ns| (ns, ip)));
        }
        relink(&mut self.pods_by_ip, &name, ips(&old), ips(&new));
        let node = |p: &Option<Pod>| p.iter().map(|p| p.node.clone()).collect::<Vec<_>>();
        relink(&mut self.pods_by_node, &name, node(&old), node(&new));
        self.dirty.pods.insert(name.clone());
        self.pods.extend(new.map(|p| (name, p)));
    }

    fn set_authorization(&mut self, name: NamespacedName, new: Option<AuthorizationPolicy>) {
        let old = self.authorization_policies.remove(&name);
        // Only policies with a target are listed on workloads; the others are found by their scope.
        if old.iter().chain(&new).any(|p| p.target != PolicyTarget::All) {
            if name.namespace == self.settings.root_namespace {
                self.dirty.pods.extend(self.pods.keys().cloned());
            } else {
                self.touch_namespace_pods(&name.namespace);
            }
        }
        self.dirty.authorization.insert(name.clone());
        self.authorization_policies.extend(new.map(|p| (name, p)));
    }

    fn touch_peer_authentication(&mut self, namespace: &str) {
        if namespace == self.settings.root_namespace {
            self.dirty.pods.extend(self.pods.keys().cloned());
        } else {
            self.touch_namespace_pods(namespace);
        }
    }

    /// The converted form depends on the modes that it inherits. There are few of these objects.
    fn touch_peer_authentication_policies(&mut self) {
        self.dirty.peer_authentication.extend(self.peer_authentications.keys().cloned());
    }

    fn touch_namespace_pods(&mut self, namespace: &str) {
        self.dirty.pods.extend(of_namespace(&self.pods, namespace).map(|(name, _)| name.clone()));
    }

    fn touch_node(&mut self, node: &str) {
        self.dirty.pods.extend(self.pods_by_node.get(node).into_iter().flatten().cloned());
        let on_node = self.slices.values().flat_map(|s| s.endpoints.iter().map(move |e| (s, e)));
        self.dirty.external.extend(
            on_node
                .filter(|(_, e)| e.pod.is_none() && e.node == node)
                .flat_map(|(s, e)| e.addresses.iter().map(|ip| (s.name.namespace.clone(), *ip))),
        );
    }

    /// Marks the pods that a service has by its labels or by its slices.
    fn touch_service_pods(&mut self, service: &NamespacedName, selector: &Labels) {
        if !selector.is_empty() {
            let chosen = of_namespace(&self.pods, &service.namespace)
                .filter(|(_, pod)| has_all(&pod.labels, selector))
                .map(|(name, _)| name.clone());
            self.dirty.pods.extend(chosen);
        }
        for slice in self.slices_by_service.get(service).into_iter().flatten() {
            for endpoint in self.slices.get(slice).iter().flat_map(|s| &s.endpoints) {
                if let Some(pod) = &endpoint.pod {
                    self.dirty.pods.insert(NamespacedName::new(&slice.namespace, pod));
                    continue;
                }
                for ip in &endpoint.addresses {
                    self.dirty.pods.extend(self.pods_by_ip.get(ip).into_iter().flatten().cloned());
                    self.dirty.external.insert((slice.namespace.clone(), *ip));
                }
            }
        }
    }
}

/// Takes `member` out of the sets under `old` and puts it into those under `new`; empty sets are removed.
fn relink<K: Ord, M: Ord + Clone>(map: &mut BTreeMap<K, BTreeSet<M>>, member: &M, old: Vec<K>, new: Vec<K>) {
    for key in old {
        if let Some(set) = map.get_mut(&key) {
            set.remove(member);
            if set.is_empty() {
                map.remove(&key);
            }
        }
    }
    for key in new {
        map.entry(key).or_default().insert(member.clone());
    }
}

/// The entries of one namespace.
fn of_namespace<'a, T>(
    map: &'a Named<T>,
    namespace: &'a str,
) -> impl Iterator<Item = (&'a NamespacedName, &'a T)> {
    let first = NamespacedName::new(namespace, "");
    map.range((Bound::Included(first), Bound::Unbounded)).take_while(move |(n, _)| n.namespace == namespace)
}

#[cfg(test)]
mod tests;
