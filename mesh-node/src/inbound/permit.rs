//! Authorization of an inbound connection, for its whole life.
//!
//! Nothing is forwarded to a pod without a [`Permit`]. A permit remembers on what it was given, and is revoked when
//! the pod's policies change so that the connection would no longer be allowed.

use crate::{
    local::LocalPod,
    policy::{ConnMeta, DeniedBy, PolicySet, Verdict},
};
use mesh_xds::model::SpiffeId;
use std::{net::SocketAddr, sync::Arc};
use tokio::sync::watch;

/// The right to forward one connection to one pod.
#[derive(Debug)]
pub struct Permit {
    /// The pod.
    pub pod: Arc<LocalPod>,
    /// Where in the pod.
    pub to: SocketAddr,
    /// The client's address, as the application will see it.
    pub client: SocketAddr,
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
        Ok(Self { pod: pod.clone(), to, client, conn, policies })
    }

    /// Resolves when a policy change forbids the connection, and never otherwise.
    pub async fn revoked(&mut self) -> Denied {
        loop {
            if self.policies.changed().await.is_err() {
                // Not possible while `pod` is held; an un-enrolled pod keeps its established connections.
                std::future::pending::<()>().await;
            }
            let set = self.policies.borrow_and_update().clone();
            if let Err(denied) = verdict(&self.conn, &set) {
                return denied;
            }
        }
    }
}

fn verdict(conn: &ConnMeta, set: &PolicySet) -> Result<(), Denied> {
    match set.check(conn) {
        Verdict::Allow { .. } => Ok(()),
        Verdict::Deny { by } => {
            Err(Denied { by: by.to_string(), plaintext: matches!(by, DeniedBy::Strict(_)) })
        }
    }
}
