//! Connections that arrive at a local pod: over HBONE, in plaintext, or from another pod of this node.
//!
//! All three meet the same gate, a [`Permit`], and end in the same place: a socket dialled inside the pod's network
//! namespace, which shows the application its real client. Deliberately absent: choosing endpoints (`outbound`) and
//! L7.

mod hbone;
mod permit;
mod plain;

pub use permit::{Denied, POLICY_ON_ITS_WAY, Permit};

use crate::{
    bpf::{SocketMeta, Verdicts},
    drain::Drain,
    l4::{ByteCounters, CopyOutcome, Endpoint, Stop, TcpEnd, copy},
    local::{Buffered, LocalPod, SharedLocals},
    metrics::Metrics,
    outcome::End,
    state::Store,
};
use mesh_xds::model::{Service, Workload};
use std::{io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::net::TcpStream;

/// Ports that lead back into the daemon; a connection to them would loop.
const OWN_PORTS: [u16; 3] = [15001, crate::enroll::INBOUND_PLAINTEXT_PORT, crate::enroll::INBOUND_HBONE_PORT];

/// How long connecting to a pod of this node may take. Its kernel answers at once, unless its accept queue is full.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// What serving inbound connections needs.
#[derive(Clone)]
pub struct Inbound {
    /// The world, for names and labels.
    pub store: Arc<Store>,
    /// The captured pods.
    pub locals: SharedLocals,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Knows the clients of connections that were on the fast path when their verdict ended.
    pub verdicts: Option<Verdicts>,
    /// Announces the real client to the kernel.
    pub meta: SocketMeta,
    /// The end of the daemon.
    pub drain: Drain,
}

impl Inbound {
    /// Connects to the pod for a permitted connection. The application sees [`Permit::client`] as its peer.
    pub async fn dial(&self, permit: &Permit) -> io::Result<TcpStream> {
        let (meta, client) = (&self.meta, permit.client);
        // From the pod's own address: traffic of a pod with itself is what the kernel never captures.
        let dialling =
            permit.pod.netns.dial(Some(permit.to.ip()), permit.to, |fd| meta.announce_client(fd, client))?;
        tokio::time::timeout(DIAL_TIMEOUT, dialling).await?
    }

    /// Copies until the end, a revoked permit, or the end of the daemon.
    pub async fn splice(
        &self,
        client: impl Endpoint,
        server: TcpStream,
        mut permit: Permit,
    ) -> (CopyOutcome, End) {
        let counters = ByteCounters::default();
        let buffered = Buffered::of(&permit.pod.limits);
        let mut by = None;
        let stop = async {
            tokio::select! {
                denied = permit.revoked() => {
                    by = Some(denied);
                    Stop::Revoked
                }
                () = self.drain.force.cancelled() => Stop::Deadline,
            }
        };
        let outcome = copy(client, TcpEnd::new(server), &counters, buffered, stop).await;
        let mut end = End::of_copy(&outcome.end);
        if let Some(denied) = by {
            end.error = denied.to_string();
        }
        (outcome, end)
    }

    /// The workload of a captured pod, as the world knows it now.
    fn workload(&self, pod: &LocalPod) -> Option<Arc<Workload>> {
        self.store.world().workload_by_pod(&pod.name).cloned()
    }

    /// The workload behind a client's address.
    fn client_workload(&self, client: SocketAddr) -> Option<Arc<Workload>> {
        self.store.world().workload_by_addr(&client.ip()).cloned()
    }

    /// The captured pod of this node whose connection this is, if the kernel vouches for it: the verdict that let it go
    /// without the daemon ended while its SYN was on the way.
    fn local_client(&self, client: SocketAddr, server: SocketAddr) -> Option<Arc<LocalPod>> {
        let flow = self.verdicts.as_ref()?.flow(client, server).ok()??;
        // Both must say so: the address may have passed to another pod, the flow be left from the one before.
        let locals = self.locals.load();
        locals.by_addr(&client.ip()).filter(|pod| pod.cookie == flow.cookie).cloned()
    }

    /// The service with a host name, if the workload backs it: what a client says it dialled is only believed where
    /// it makes sense.
    fn service_of(&self, workload: Option<&Workload>, host: &str) -> Option<Arc<Service>> {
        let key =
            workload?.services.keys().find(|key| key.split_once('/').is_some_and(|(_, h)| h == host))?;
        self.store.world().service(key).cloned()
    }
}

fn leads_back(to: SocketAddr) -> bool {
    OWN_PORTS.contains(&to.port())
}
