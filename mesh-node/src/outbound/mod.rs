//! Connections of local pods that the kernel redirected to the daemon.
//!
//! Accept, original destination, plan (pure), dial, copy, one record. A destination that cannot be reached is replaced
//! by another endpoint of the same service as long as nothing was forwarded. A yes for a pod of this node is told to the
//! kernel, which carries the next connections by itself. Deliberately absent: policy (it is the receiving side's) and L7.

mod affinity;

pub use affinity::Affinity;

use crate::{
    bpf::{OriginalDst, SocketMeta, Verdicts},
    drain::Drain,
    hbone::{
        Baggage, Connect, Dialer, Forwarded, HboneError, HboneStream, Pool, PoolKey, Target as HboneTarget,
    },
    inbound::{Denied, Inbound, Permit},
    l4::{ByteCounters, Endpoint, HboneEnd, Stop, TcpEnd, copy},
    local::{Buffered, Limit, LocalPod, SettingUp, SharedLocals},
    metrics::{Direction, Metrics, Security},
    net,
    outcome::{Connection, End, Ends, chain},
    plan::{NodeView, Plan, PlanError, PlanInput, Target, outbound},
    state::Store,
};
use arc_swap::ArcSwap;
use mesh_xds::model::{SpiffeId, Workload, WorkloadKind};
use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::net::TcpStream;

/// Endpoints tried for one connection.
const ATTEMPTS: usize = 3;
/// How long a plain connection may take to be established.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection waits for the first certificate of its pod.
const CERT_TIMEOUT: Duration = Duration::from_secs(10);

/// What serving outbound connections needs.
#[derive(Clone)]
pub struct Outbound {
    /// The world.
    pub store: Arc<Store>,
    /// The captured pods.
    pub locals: SharedLocals,
    /// Where this node is.
    pub node: Arc<ArcSwap<NodeView>>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Reads original destinations.
    pub meta: SocketMeta,
    /// Where verdicts for the same-node fast path go; `None` switches it off.
    pub verdicts: Option<Verdicts>,
    /// Session affinity.
    pub affinity: Arc<Affinity>,
    /// For destinations on this node.
    pub inbound: Inbound,
    /// The end of the daemon.
    pub drain: Drain,
}

/// Why an outbound connection was refused.
#[derive(Debug, thiserror::Error)]
enum OutboundError {
    #[error("the kernel knows no original destination: somebody dialled the mesh's own port")]
    NoOriginalDestination(#[source] Option<io::Error>),
    #[error("the limit on {} of the pod is reached", .0.label())]
    Overloaded(Limit),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("cannot connect to {to}")]
    Dial {
        to: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("this pod has no valid certificate; see `mesh-node status`")]
    NoCertificate,
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error(transparent)]
    Hbone(#[from] HboneError),
}

impl OutboundError {
    fn retryable(&self) -> bool {
        match self {
            Self::Dial { .. } => true,
            Self::Hbone(error) => error.retryable(),
            _ => false,
        }
    }

    fn end(&self) -> End {
        let (flags, reason) = match self {
            Self::NoOriginalDestination(_) => ("DPE", "no_original_destination"),
            Self::Overloaded(_) => ("UO", "overloaded"),
            Self::Plan(PlanError::NoEndpoint { .. }) => ("UH", "no_endpoints"),
            Self::Plan(PlanError::NoSuchPort { .. }) => ("NR", "no_such_port"),
            Self::Plan(PlanError::Identity { .. }) => ("NR", "bad_identity"),
            Self::Dial { .. } => ("UF", "dial"),
            Self::NoCertificate => ("UF", "no_certificate"),
            Self::Denied(_) => ("RBAC", "denied"),
            Self::Hbone(error @ HboneError::Status { status: 401, .. }) => ("RBAC", error.label()),
            Self::Hbone(error) => ("UF", error.label()),
        };
        End::refused(flags, reason, chain(self))
    }
}

/// An upstream that is ready to be spliced.
enum Upstream {
    Plain(TcpStream),
    /// With the receiving side's record.
    Local(TcpStream, Permit, Box<Connection>),
    Hbone(HboneStream),
}

/// Dials from inside the source pod's network namespace, so that network policies and the peer see the pod.
#[derive(Clone)]
struct PodDialer {
    pod: Arc<LocalPod>,
    bind: Option<IpAddr>,
}

impl Dialer for PodDialer {
    async fn dial(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.pod.netns.dial(self.bind, to, |_| Ok(()))?.await
    }

    fn share(&self) -> u64 {
        self.pod.cookie
    }

    fn connections(&self) -> usize {
        self.pod.limits.connections()
    }
}

impl Outbound {
    /// What the application dialled, of an accepted connection.
    pub fn original_dst(&self, stream: &TcpStream) -> io::Result<Option<OriginalDst>> {
        use std::os::fd::AsFd;
        self.meta.original_dst(stream.as_fd())
    }

    /// Serves one accepted connection of `pod` to what was `dialled`; `pool` is the worker's.
    /// Until it is joined to its destination it counts as `begun`.
    pub async fn serve(
        &self,
        pool: &Pool,
        pod: Arc<LocalPod>,
        stream: TcpStream,
        client: SocketAddr,
        dialled: io::Result<Option<OriginalDst>>,
        begun: SettingUp,
    ) {
        let world = self.store.world();
        let ends = Ends {
            client: Some(client),
            source: world.workload_by_pod(&pod.name).cloned(),
            source_id: Some(pod.identity.clone()),
            ..Ends::default()
        };
        drop(world);
        let mut record = Connection::begin(self.metrics.clone(), Direction::Outbound, ends);
        let mut slot = pod.limits.slot(1);
        let upstream = match &mut slot {
            // In a box, so that a connection that idles does not hold the room that its beginning needed.
            Ok(slot) => {
                Box::pin(self.upstream(&mut record, pool, &pod, dialled, client)).await.and_then(|up| {
                    // A tunnel is shared by many; every other connection has a socket of its own.
                    let own = usize::from(!matches!(up, Upstream::Hbone(_)));
                    slot.more(own).map(|()| up).map_err(OutboundError::Overloaded)
                })
            }
            Err(limit) => Err(OutboundError::Overloaded(*limit)),
        };
        drop(begun);
        match upstream {
            Ok(upstream) => {
                record.opened();
                let (end, sent, received) = self.splice(&pod, TcpEnd::new(stream), upstream).await;
                record.finish(&end, sent, received);
            }
            Err(error) => {
                net::reset_on_close(&stream);
                record.finish(&error.end(), 0, 0);
            }
        }
    }

    async fn upstream(
        &self,
        record: &mut Connection,
        pool: &Pool,
        pod: &Arc<LocalPod>,
        dialled: io::Result<Option<OriginalDst>>,
        client: SocketAddr,
    ) -> Result<Upstream, OutboundError> {
        let dst = match dialled {
            Ok(Some(found)) => found,
            Ok(None) => return Err(OutboundError::NoOriginalDestination(None)),
            Err(error) => return Err(OutboundError::NoOriginalDestination(Some(error))),
        };
        let (dst, chosen) = (dst.dialled, dst.chosen);
        record.ends.server = Some(dst);
        let mut failed = vec![];
        loop {
            let target = self.plan(pod, dst, chosen, &failed)?;
            record.ends.server = Some(target.addr);
            record.ends.service.clone_from(&target.service);
            record.ends.destination.clone_from(&target.workload);
            match self.reach(record, pool, pod, client, &target).await {
                Err(error)
                    if error.retryable() && target.service.is_some() && failed.len() + 1 < ATTEMPTS =>
                {
                    tracing::debug!(to = %target.addr, error = %chain(&error), "trying another endpoint");
                    failed.push(target.addr);
                }
                other => return other,
            }
        }
    }

    fn plan(
        &self,
        pod: &LocalPod,
        dst: SocketAddr,
        chosen: Option<SocketAddr>,
        excluded: &[SocketAddr],
    ) -> Result<Target, PlanError> {
        let (world, node, locals) = (self.store.world(), self.node.load(), self.locals.load());
        let input = PlanInput {
            world: &world,
            node: &node,
            dst,
            is_local: &|ip| locals.by_addr(ip).is_some(),
            chosen,
            excluded,
        };
        let now = Instant::now();
        outbound(&input, |service, all| self.affinity.pick(pod.cookie, service, dst.port(), all, now))
    }

    async fn reach(
        &self,
        record: &mut Connection,
        pool: &Pool,
        pod: &Arc<LocalPod>,
        client: SocketAddr,
        target: &Target,
    ) -> Result<Upstream, OutboundError> {
        record.ends.destination_id = None;
        match &target.plan {
            Plan::Plain => {
                record.ends.security = Security::None;
                let dialler = PodDialer { pod: pod.clone(), bind: source_ip(client, target.addr) };
                let dial = tokio::time::timeout(DIAL_TIMEOUT, dialler.dial(target.addr)).await;
                let dialled = dial.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
                dialled.map(Upstream::Plain).map_err(|source| OutboundError::Dial { to: target.addr, source })
            }
            Plan::Local { .. } => self.reach_local(record, pod, client, target).await,
            Plan::Hbone { addr, identities, workload } => {
                record.ends.security = Security::MutualTls;
                record.ends.destination_id = workload.identity().ok();
                let stream =
                    self.reach_hbone(record, pool, pod, client, target, *addr, identities.clone()).await?;
                record.ends.destination_id = Some(stream.peer.id.clone());
                Ok(Upstream::Hbone(stream))
            }
        }
    }

    /// A pod of this node: the same gate as for a tunnel, without one. Both identities are the kernel's word (the
    /// netns cookie), which is at least as good as a certificate.
    async fn reach_local(
        &self,
        record: &mut Connection,
        pod: &LocalPod,
        client: SocketAddr,
        target: &Target,
    ) -> Result<Upstream, OutboundError> {
        // Read before anything that the verdict follows from: a change after this ends the verdict.
        let generation = self.verdicts.as_ref().map(|verdicts| (verdicts, verdicts.generation()));
        let unreachable = |source| OutboundError::Dial { to: target.addr, source };
        let destination = self.locals.load().by_addr(&target.addr.ip()).cloned();
        let Some(destination) = destination else {
            return Err(unreachable(io::ErrorKind::HostUnreachable.into()));
        };
        record.ends.security = Security::NodeLocal;
        record.ends.destination_id = Some(destination.identity.clone());
        // The receiving side reports for itself, on this path as on any other.
        let theirs = Connection::begin(self.metrics.clone(), Direction::Inbound, record.ends.clone());
        let permit = match Permit::check(&destination, record.ends.source_id.as_ref(), client, target.addr) {
            Ok(permit) => permit,
            Err(denied) => {
                theirs.finish(&End::refused("RBAC", "denied", denied.to_string()), 0, 0);
                return Err(denied.into());
            }
        };
        let server = match self.inbound.dial(&permit).await {
            Ok(server) => server,
            Err(source) => {
                theirs.finish(&End::refused("UF", "unavailable", chain(&source)), 0, 0);
                return Err(unreachable(source));
            }
        };
        theirs.opened();
        if let Some((verdicts, generation)) = generation
            && may_go_without_us(&permit)
            // One that drains may not know the latest policies.
            && !self.drain.begin.is_cancelled()
        {
            let told = generation.and_then(|generation| verdicts.allow(pod.cookie, target.addr, generation));
            match told {
                Ok(()) => {
                    self.metrics.fast_path.given.inc();
                }
                // The next connection comes to the daemon as well.
                Err(error) => tracing::warn!(%error, "the kernel did not take a verdict"),
            }
        }
        Ok(Upstream::Local(server, permit, Box::new(theirs)))
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "each is one fact of the connection; a struct would be used once"
    )]
    async fn reach_hbone(
        &self,
        record: &Connection,
        pool: &Pool,
        pod: &Arc<LocalPod>,
        client: SocketAddr,
        target: &Target,
        to: SocketAddr,
        identities: BTreeSet<SpiffeId>,
    ) -> Result<HboneStream, OutboundError> {
        let local = pod.tls();
        let ready = tokio::time::timeout(CERT_TIMEOUT, local.cell().ready()).await;
        ready.map_err(|_| OutboundError::NoCertificate)?;
        // The client's address as the peer will see it: the same family as the destination's.
        let bind = source_ip(client, to);
        let key = PoolKey {
            source: pod.identity.clone(),
            source_ip: bind.unwrap_or(client.ip()),
            expected: Arc::new(identities),
            to,
        };
        let request = Connect {
            target: HboneTarget::Addr(target.addr),
            forwarded: Some(Forwarded { client, host: target.service.as_ref().map(|s| s.hostname.clone()) }),
            baggage: record.ends.source.as_deref().map(baggage),
            traceparent: None,
        };
        let dialer = PodDialer { pod: pod.clone(), bind };
        Ok(pool.connect(&key, local, &request, &dialer).await?)
    }

    /// Copies to the end. Returns it with the bytes from the server and from the client.
    async fn splice(&self, pod: &LocalPod, client: impl Endpoint, upstream: Upstream) -> (End, u64, u64) {
        let (counters, buffered) = (ByteCounters::default(), Buffered::of(&pod.limits));
        let stop = async {
            self.drain.force.cancelled().await;
            Stop::Deadline
        };
        let (outcome, end) = match upstream {
            Upstream::Local(server, permit, theirs) => {
                let (outcome, end) = self.inbound.splice(client, server, permit).await;
                theirs.finish(&end, outcome.received, outcome.sent);
                (outcome, end)
            }
            Upstream::Plain(server) => {
                let outcome = copy(client, TcpEnd::new(server), &counters, buffered, stop).await;
                let end = End::of_copy(&outcome.end);
                (outcome, end)
            }
            Upstream::Hbone(stream) => {
                let outcome = copy(client, HboneEnd::new(stream), &counters, buffered, stop).await;
                let end = End::of_copy(&outcome.end);
                (outcome, end)
            }
        };
        (end, outcome.received, outcome.sent)
    }
}

/// Whether the kernel may carry the client's next connections to the same port by itself. What has to be looked at per
/// connection or per request must be excluded here, and nowhere else.
fn may_go_without_us(permit: &Permit) -> bool {
    permit.lasting
}

/// The address to dial from: the one that the client itself used, unless the families differ.
fn source_ip(client: SocketAddr, to: SocketAddr) -> Option<IpAddr> {
    (client.is_ipv4() == to.is_ipv4()).then(|| client.ip())
}

fn baggage(w: &Workload) -> Baggage {
    let kind = match w.kind {
        WorkloadKind::Deployment => "deployment",
        WorkloadKind::CronJob => "cronjob",
        WorkloadKind::Pod => "pod",
        WorkloadKind::Job => "job",
    };
    Baggage {
        cluster: w.cluster_id.clone(),
        namespace: w.name.namespace.clone(),
        workload_kind: kind.to_owned(),
        workload: w.workload_name.clone(),
        service: w.canonical_name.clone(),
        revision: w.canonical_revision.clone(),
        region: w.locality.region.clone(),
        zone: w.locality.zone.clone(),
    }
}
