//! The pods that this daemon captured, as the traffic path sees them.
//!
//! An immutable snapshot behind an `ArcSwap`: the reconcile task replaces it, connections read it. What a pod's
//! listeners and kernel entries are is `capture`'s; here is only what a connection needs.

use crate::{identity::IdentityHandle, net::NetNs, policy::PolicySet, tls::LocalIdentity};
use arc_swap::ArcSwap;
use mesh_xds::model::{NamespacedName, SpiffeId};
use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
use tokio::sync::watch;

/// A captured pod.
#[derive(Debug)]
pub struct LocalPod {
    /// Namespace and name.
    pub name: NamespacedName,
    /// The netns cookie: the kernel's proof of who a connection comes from.
    pub cookie: u64,
    /// Its addresses.
    pub addrs: Vec<IpAddr>,
    /// Its network namespace, in which the daemon dials for it.
    pub netns: Arc<NetNs>,
    /// The identity it runs under.
    pub identity: SpiffeId,
    /// Its certificate, kept as long as the pod or a connection of it lives.
    certificate: IdentityHandle,
    /// The policies for its inbound connections; a change is seen by every live connection.
    pub policies: watch::Sender<Arc<PolicySet>>,
    connections: Arc<AtomicUsize>,
    limit: usize,
}

/// A place among a pod's connections, given back when dropped.
#[derive(Debug)]
pub struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl LocalPod {
    /// A pod with no connections yet; `limit` is the most it may have at a time.
    pub fn new(
        name: NamespacedName,
        addrs: Vec<IpAddr>,
        netns: Arc<NetNs>,
        certificate: IdentityHandle,
        policies: Arc<PolicySet>,
        limit: usize,
    ) -> Self {
        let policies = watch::channel(policies).0;
        Self {
            name,
            cookie: netns.cookie(),
            addrs,
            netns,
            identity: certificate.identity().id().clone(),
            certificate,
            policies,
            connections: Arc::default(),
            limit,
        }
    }

    /// The TLS side of its identity.
    pub fn tls(&self) -> &Arc<LocalIdentity> {
        self.certificate.identity()
    }

    /// Takes a place for one more connection; `None` when the pod has as many as it may.
    pub fn slot(&self) -> Option<Slot> {
        let taken = self.connections.fetch_add(1, Ordering::Relaxed);
        let slot = Slot(self.connections.clone());
        (taken < self.limit).then_some(slot)
    }

    /// Live connections, both directions.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

/// All captured pods, by address and by cookie.
#[derive(Clone, Debug, Default)]
pub struct Locals {
    by_addr: HashMap<IpAddr, Arc<LocalPod>>,
    by_cookie: HashMap<u64, Arc<LocalPod>>,
}

impl Locals {
    /// The captured pod with an address.
    pub fn by_addr(&self, addr: &IpAddr) -> Option<&Arc<LocalPod>> {
        self.by_addr.get(addr)
    }

    /// The captured pod with a netns cookie.
    pub fn by_cookie(&self, cookie: u64) -> Option<&Arc<LocalPod>> {
        self.by_cookie.get(&cookie)
    }

    /// All of them, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<LocalPod>> {
        self.by_cookie.values()
    }

    /// Adds a pod; one with the same cookie is replaced, an address moves to the newest pod that has it.
    pub fn insert(&mut self, pod: Arc<LocalPod>) {
        self.remove(pod.cookie);
        for addr in &pod.addrs {
            self.by_addr.insert(*addr, pod.clone());
        }
        self.by_cookie.insert(pod.cookie, pod);
    }

    /// Removes a pod, and its addresses unless another pod has taken them over.
    pub fn remove(&mut self, cookie: u64) -> Option<Arc<LocalPod>> {
        let pod = self.by_cookie.remove(&cookie)?;
        for addr in &pod.addrs {
            if self.by_addr.get(addr).is_some_and(|p| p.cookie == cookie) {
                self.by_addr.remove(addr);
            }
        }
        Some(pod)
    }
}

/// The current [`Locals`]; one writer.
pub type SharedLocals = Arc<ArcSwap<Locals>>;
