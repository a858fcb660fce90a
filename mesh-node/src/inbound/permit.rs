//! Authorization of an inbound connection, for its whole life.
//!
//! Nothing is forwarded to a pod without a [`Permit`]. A permit remembers on what it was given, and is revoked when
//! the pod's policies change so that the connection would no longer be allowed.

use crate::{
    local::LocalPod,
    policy::{ConnMeta, DeniedBy, PolicySet, Verdict},
};
use mesh_xds::model::SpiffeId;
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{sync::watch, time::Instant};

/// How long live connections outlast that a policy is named and not there: the two come one after the other.
pub const POLICY_ON_ITS_WAY: Duration = Duration::from_secs(2);

/// The right to forward one connection to one pod.
#[derive(Debug)]
pub struct Permit {
    /// The pod.
    pub pod: Arc<LocalPod>,
    /// Where in the pod.
    pub to: SocketAddr,
    /// The client's address, as the application will see it.
    pub client: SocketAddr,
    /// Whether the answer holds for every connection of this client to this port, until the policies change.
    pub lasting: bool,
    conn: ConnMeta,
    policies: watch::Receiver<Arc<PolicySet>>,
}

/// Who denied a connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("denied by {by}")]
pub struct Denied {
    /// The policy's key, or words for "no ALLOW policy matched".
    pub by: String,
    /// The connection came in plaintext, and that alone was the reason.
    pub plaintext: bool,
    /// A policy is named that is not there yet. Nobody new is let in, but what is established may wait for it.
    pub unsettled: bool,
}

impl Permit {
    /// Checks the pod's policies.
    pub fn check(
        pod: &Arc<LocalPod>,
        source: Option<&SpiffeId>,
        client: SocketAddr,
        to: SocketAddr,
    ) -> Result<Self, Denied> {
        let conn = ConnMeta {
            source: source.cloned(),
            source_ip: client.ip(),
            destination_ip: to.ip(),
            destination_port: to.port(),
        };
        let mut policies = pod.policies.subscribe();
        let set = policies.borrow_and_update().clone();
        verdict(&conn, &set)?;
        Ok(Self { pod: pod.clone(), to, client, lasting: !set.asks_for_source_address(), conn, policies })
    }

    /// Resolves when a policy change forbids the connection, and never otherwise.
    pub async fn revoked(&mut self) -> Denied {
        let mut unsettled: Option<(Instant, Denied)> = None;
        loop {
            let changed = self.policies.changed();
            let changed = match &unsettled {
                None => changed.await,
                Some((until, denied)) => match tokio::time::timeout_at(*until, changed).await {
                    Ok(changed) => changed,
                    Err(_) => return denied.clone(),
                },
            };
            if changed.is_err() {
                // Not possible while `pod` is held; an un-enrolled pod keeps its established connections.
                std::future::pending::<()>().await;
            }
            let set = self.policies.borrow_and_update().clone();
            match verdict(&self.conn, &set) {
                Ok(()) => unsettled = None,
                Err(denied) if denied.unsettled => {
                    let until =
                        unsettled.map_or_else(|| Instant::now() + POLICY_ON_ITS_WAY, |(until, _)| until);
                    unsettled = Some((until, denied));
                }
                Err(denied) => return denied,
            }
        }
    }
}

fn verdict(conn: &ConnMeta, set: &PolicySet) -> Result<(), Denied> {
    match set.check(conn) {
        Verdict::Allow { .. } => Ok(()),
        Verdict::Deny { by } => Err(Denied {
            by: by.to_string(),
            plaintext: matches!(by, DeniedBy::Strict(_)),
            unsettled: matches!(by, DeniedBy::MissingPolicy(_)),
        }),
    }
}
