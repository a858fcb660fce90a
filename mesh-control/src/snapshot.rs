//! What the nodes are served at one moment: an immutable value, shared by every stream.
//!
//! Versions of resources are hashes of their content (see `mesh_xds::delta`), so a change of one endpoint is a change
//! of one resource, whatever was computed again on the way. Deliberately absent: where any of it came from.

use mesh_xds::model::{Authorization, Service, SpiffeId, Workload};
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
    changed: bool,
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

    /// Whether a pod of the mesh with this identity runs on (or is bound to) the node. This is what limits a node to
    /// the certificates of its own pods.
    pub fn runs_on(&self, node: &str, identity: &SpiffeId) -> bool {
        let uids = self.by_node.get(node).into_iter().flatten();
        uids.filter_map(|uid| self.workloads.get(uid))
            .any(|w| w.in_mesh() && !w.host_network && w.identity().is_ok_and(|own| own == *identity))
    }

    pub(crate) fn put_service(&mut self, key: &str, service: Option<Service>) {
        self.changed |= put(&mut self.services, key, service).0;
    }

    pub(crate) fn put_policy(&mut self, key: &str, policy: Option<Authorization>) {
        self.changed |= put(&mut self.policies, key, policy).0;
    }

    pub(crate) fn put_workload(&mut self, uid: &str, workload: Option<Workload>) {
        let node = workload.as_ref().map(|w| w.node.clone()).filter(|n| !n.is_empty());
        let (changed, old) = put(&mut self.workloads, uid, workload);
        self.changed |= changed;
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

    /// Whether anything has changed since the last call.
    pub(crate) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
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
