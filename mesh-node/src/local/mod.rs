//! The pods that this daemon captured, as the traffic path sees them.
//!
//! An immutable snapshot behind an `ArcSwap`: the reconcile task replaces it, connections read it. What a pod's
//! listeners and kernel entries are is `capture`'s; here is only what a connection needs.

mod limits;

pub use limits::{
    Buffered, Handshake, Limit, MAX_BUFFERED, MAX_HANDSHAKES, MAX_HANDSHAKES_OF_NODE, MAX_SETTING_UP,
    MAX_TUNNELS, NodeLimits, PodLimits, SettingUp, Slot, Tunnel,
};

use crate::{identity::IdentityHandle, net::NetNs, policy::PolicySet, tls::LocalIdentity};
use arc_swap::ArcSwap;
use mesh_xds::model::{NamespacedName, SpiffeId};
use std::{collections::HashMap, net::IpAddr, sync::Arc};
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
    /// What it holds of this node, and how much it may.
    pub limits: Arc<PodLimits>,
}

impl LocalPod {
    /// A pod with no connections yet.
    pub fn new(
        name: NamespacedName,
        addrs: Vec<IpAddr>,
        netns: Arc<NetNs>,
        certificate: IdentityHandle,
        policies: Arc<PolicySet>,
        limits: Arc<NodeLimits>,
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
            limits: Arc::new(PodLimits::new(limits)),
        }
    }

    /// The TLS side of its identity.
    pub fn tls(&self) -> &Arc<LocalIdentity> {
        self.certificate.identity()
    }

    /// Live connections, both directions.
    pub fn connections(&self) -> usize {
        self.limits.connections()
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
