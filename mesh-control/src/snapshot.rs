//! What the nodes are served at one moment: an immutable value, shared by every stream.
//!
//! Versions of resources are hashes of their content (see `mesh_xds::delta`), so a change of one endpoint is a change
//! of one resource, whatever was computed again on the way. Deliberately absent: where any of it came from.

use mesh_xds::{
    convert::{
        ADDRESS_TYPE, AUTHORIZATION_TYPE, WORKLOAD_TYPE, authorization_resource, service_resource,
        workload_resources,
    },
    delta,
    model::{Authorization, Service, SpiffeId, Workload},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

type Table<T> = BTreeMap<Arc<str>, Arc<T>>;

/// All resources. Equality is that of the contents.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    services: Table<Service>,
    workloads: Table<Workload>,
    policies: Table<Authorization>,
    /// Workload uids by node.
    by_node: BTreeMap<Arc<str>, BTreeSet<Arc<str>>>,
    /// The same as resources, encoded once and shared by all streams.
    resources: Arc<delta::Snapshot>,
    changed: BTreeSet<Changed>,
}

/// What has to be encoded again.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Changed {
    Service(Arc<str>),
    Workload(Arc<str>),
    Policy(Arc<str>),
}

impl PartialEq for Snapshot {
    fn eq(&self, other: &Self) -> bool {
        self.services == other.services
            && self.workloads == other.workloads
            && self.policies == other.policies
            && self.by_node == other.by_node
    }
}

impl Snapshot {
    /// Services by `NAMESPACE/HOSTNAME`.
    pub fn services(&self) -> &Table<Service> {
        &self.services
    }

    /// Workloads by uid.
    pub fn workloads(&self) -> &Table<Workload> {
        &self.workloads
    }

    /// Policies by `NAMESPACE/NAME`.
    pub fn policies(&self) -> &Table<Authorization> {
        &self.policies
    }

    /// Everything in the form in which it is served.
    pub fn resources(&self) -> &Arc<delta::Snapshot> {
        &self.resources
    }

    /// Whether a pod of the mesh with this identity runs on (or is bound to) the node. This is what limits a node to
    /// the certificates of its own pods.
    pub fn runs_on(&self, node: &str, identity: &SpiffeId) -> bool {
        let uids = self.by_node.get(node).into_iter().flatten();
        uids.filter_map(|uid| self.workloads.get(uid))
            .any(|w| w.in_mesh() && !w.host_network && w.identity().is_ok_and(|own| own == *identity))
    }

    pub(crate) fn put_service(&mut self, key: &str, service: Option<Service>) {
        if put(&mut self.services, key, service).0 {
            self.changed.insert(Changed::Service(key.into()));
        }
    }

    pub(crate) fn put_policy(&mut self, key: &str, policy: Option<Authorization>) {
        if put(&mut self.policies, key, policy).0 {
            self.changed.insert(Changed::Policy(key.into()));
        }
    }

    pub(crate) fn put_workload(&mut self, uid: &str, workload: Option<Workload>) {
        let node = workload.as_ref().map(|w| w.node.clone()).filter(|n| !n.is_empty());
        let (changed, old) = put(&mut self.workloads, uid, workload);
        if changed {
            self.changed.insert(Changed::Workload(uid.into()));
        }
        let old_node = old.as_ref().map(|w| w.node.as_str()).filter(|n| !n.is_empty());
        if !changed || old_node == node.as_deref() {
            return;
        }
        if let Some(old_node) = old_node
            && let Some(uids) = self.by_node.get_mut(old_node)
        {
            uids.remove(uid);
            if uids.is_empty() {
                self.by_node.remove(old_node);
            }
        }
        if let Some(node) = node {
            self.by_node.entry(node.into()).or_default().insert(uid.into());
        }
    }

    /// Encodes what has changed since the last call; false if nothing has.
    pub(crate) fn seal(&mut self) -> bool {
        let mut edit = self.resources.edit();
        for changed in std::mem::take(&mut self.changed) {
            match changed {
                Changed::Service(key) => match self.services.get(&key) {
                    Some(service) => edit.put(ADDRESS_TYPE, Arc::new(service_resource(service))),
                    None => edit.remove(ADDRESS_TYPE, &key),
                },
                Changed::Policy(key) => match self.policies.get(&key) {
                    Some(policy) => edit.put(AUTHORIZATION_TYPE, Arc::new(authorization_resource(policy))),
                    None => edit.remove(AUTHORIZATION_TYPE, &key),
                },
                Changed::Workload(uid) => match self.workloads.get(&uid) {
                    Some(workload) => {
                        let (address, bare) = workload_resources(workload);
                        edit.put(WORKLOAD_TYPE, Arc::new(bare));
                        edit.put(ADDRESS_TYPE, Arc::new(address))
                    }
                    None => {
                        edit.remove(WORKLOAD_TYPE, &uid);
                        edit.remove(ADDRESS_TYPE, &uid)
                    }
                },
            };
        }
        if !edit.changed() {
            return false;
        }
        self.resources = Arc::new(edit.finish());
        true
    }
}

/// Sets or removes an entry; says whether that made a difference, and what was there before.
fn put<T: PartialEq>(table: &mut Table<T>, key: &str, value: Option<T>) -> (bool, Option<Arc<T>>) {
    match value {
        Some(value) => match table.get(key) {
            Some(old) if **old == value => (false, Some(old.clone())),
            _ => (true, table.insert(key.into(), Arc::new(value))),
        },
        None => {
            let old = table.remove(key);
            (old.is_some(), old)
        }
    }
}
