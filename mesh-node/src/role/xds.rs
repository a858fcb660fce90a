//! Configuration from the control plane: xDS resources on their way into the store.

use super::{kept::Restoring, reconcile::Command};
use crate::{
    config::Config, disk::CacheWriter, identity::TokenFile, metrics::Metrics, outcome::chain, state::Batch,
    tls::ControlPlane,
};
use arc_swap::ArcSwap;
use mesh_xds::{
    convert::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Address, Note, decode_address, decode_authorization},
    delta::{Changes, Received, Rejection, Subscription},
    grpc::{AdsConfig, Handler, Transport, TransportError},
    model::Locality,
    node::{NodeId, NodeInfo},
};
use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    sync::{Arc, atomic::Ordering, mpsc::SyncSender},
};
use tokio::sync::oneshot;
use tonic::transport::Channel;

/// What is followed. Policies come first: a workload must not be served a moment without the ones that bind it.
pub const TYPES: [&str; 2] = [AUTHORIZATION_TYPE, ADDRESS_TYPE];

/// Resources that are refused now, by name, with the reason.
pub type Rejected = Arc<ArcSwap<BTreeMap<String, String>>>;

/// A TLS connection of its own and a fresh token for each stream.
pub struct Secured {
    /// Where and with what roots.
    pub plane: ControlPlane,
    /// This node's token.
    pub token: TokenFile,
}

impl Transport for Secured {
    type Service = Channel;

    async fn connect(&mut self) -> Result<Channel, TransportError> {
        Ok(self.plane.connect().await?)
    }

    async fn token(&mut self) -> Result<Option<String>, TransportError> {
        let bearer = self.token.bearer().await?;
        let text = bearer.to_str()?;
        Ok(Some(text.strip_prefix("Bearer ").unwrap_or(text).to_owned()))
    }
}

/// What this node asks for: all workloads, services and policies, as an ambient node does in Istio.
pub fn ads_config(config: &Config, node_ip: IpAddr) -> AdsConfig {
    let info = NodeInfo {
        id: NodeId {
            kind: "ztunnel".to_owned(),
            ip: node_ip,
            pod: config.pod_name(),
            namespace: config.args.namespace.clone(),
            domain: "cluster.local".to_owned(),
        },
        node_name: config.args.node_name.clone(),
        cluster_id: config.args.cluster_id.clone(),
        locality: Locality::default(),
        extensions: true,
    };
    let subscriptions = TYPES.map(Subscription::all).into();
    AdsConfig { cluster_id: config.args.cluster_id.clone(), ..AdsConfig::new(info.to_wire(), subscriptions) }
}

/// Decodes resources and passes them to the reconcile thread.
pub struct IntoStore {
    /// The reconcile thread's queue.
    pub commands: SyncSender<Command>,
    /// What is refused now.
    pub rejected: Rejected,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Takes what was applied, to be kept on disk.
    pub kept: Option<CacheWriter>,
    /// What comes is from disk.
    pub restoring: Restoring,
}

impl IntoStore {
    fn note(name: &str, notes: &[Note]) {
        for note in notes {
            tracing::warn!(resource = name, %note, "a resource says something that is not understood");
        }
    }

    fn decode(&self, batch: &mut Batch, type_url: &str, resource: &Received) -> Result<(), String> {
        let name = resource.name.as_str();
        match type_url {
            ADDRESS_TYPE => {
                let decoded = decode_address(name, &resource.body).map_err(|e| chain(&e))?;
                Self::note(name, &decoded.notes);
                match decoded.value {
                    Address::Workload(workload) => batch.workloads.push(*workload),
                    Address::Service(service) => batch.services.push(*service),
                }
            }
            AUTHORIZATION_TYPE => {
                let decoded = decode_authorization(name, &resource.body).map_err(|e| chain(&e))?;
                Self::note(name, &decoded.notes);
                batch.policies.push(decoded.value);
            }
            other => return Err(format!("type {other} was not asked for")),
        }
        Ok(())
    }

    fn remember(&self, changes: &Changes, rejections: &[Rejection]) {
        let mut rejected = BTreeMap::clone(&self.rejected.load());
        let before = rejected.len();
        for resource in &changes.resources {
            rejected.remove(&resource.name);
        }
        for name in &changes.removed {
            rejected.remove(name);
        }
        for rejection in rejections {
            tracing::warn!(resource = rejection.name, reason = rejection.reason, "refused a resource");
            rejected.insert(rejection.name.clone(), rejection.reason.clone());
        }
        if before != 0 || !rejections.is_empty() {
            self.rejected.store(Arc::new(rejected));
        }
    }
}

impl Handler for IntoStore {
    async fn apply(&mut self, mut changes: Changes) -> Vec<Rejection> {
        let mut batch = Batch::default();
        let mut rejections = vec![];
        for resource in &changes.resources {
            if let Err(reason) = self.decode(&mut batch, &changes.type_url, resource) {
                rejections.push(Rejection { name: resource.name.clone(), reason });
            }
        }
        let kind = if changes.type_url == ADDRESS_TYPE { "address" } else { "authorization" };
        let removed = match kind {
            "address" => &mut batch.removed_addresses,
            _ => &mut batch.removed_policies,
        };
        removed.clone_from(&changes.removed);
        let accepted = changes.resources.len() - rejections.len();
        let restoring = self.restoring.load(Ordering::Relaxed);
        let outcome = if restoring { "restored" } else { "accepted" };
        self.metrics.xds_resources(kind, outcome, accepted as u64);
        self.metrics.xds_resources(kind, "rejected", rejections.len() as u64);
        self.metrics.xds_resources(kind, "removed", changes.removed.len() as u64);
        self.remember(&changes, &rejections);
        let (done, applied) = oneshot::channel();
        let commands = self.commands.clone();
        let sent =
            tokio::task::spawn_blocking(move || commands.send(Command::Batch(batch, done)).is_ok()).await;
        if matches!(sent, Ok(true)) {
            // An error means that the daemon is ending; the answer does not matter any more.
            let applied = applied.await;
            if let (Some(kept), false, Ok(())) = (&self.kept, restoring, applied) {
                let bad: HashSet<&str> = rejections.iter().map(|r| r.name.as_str()).collect();
                changes.resources.retain(|r| !bad.contains(r.name.as_str()));
                kept.record(changes);
            }
        }
        rejections
    }
}
