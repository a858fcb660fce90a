//! DNS of captured pods: the mesh's names are answered here, everything else by the nameserver that was asked.
//!
//! The kernel sends queries over UDP to a socket of the daemon in the pod, and connections to TCP port 53 to the outbound
//! listener. [`names`] says what the world knows about a name (pure), [`reply`] writes the answer, [`upstream`] passes
//! queries on, [`cache`] keeps what came back. The only state of a query is its place in [`udp`]'s table.
//!
//! Deliberately absent: recursion, DNSSEC validation, DNS over TLS or HTTPS (other ports, not captured), and answers to
//! anybody but the pod itself.

mod cache;
mod names;
mod query;
mod reply;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;
mod upstream;

use crate::{
    bpf::Nameservers,
    drain::Drain,
    local::LocalPod,
    metrics::{Metrics, Sample},
    plan::{NodeView, endpoints},
    state::{Store, World},
};
use arc_swap::ArcSwap;
use cache::{Cache, Key};
use hickory_proto::op::ResponseCode;
use mesh_xds::model::Protocol;
use names::{Asked, Reply, Zone};
use query::Query;
use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::sync::Semaphore;

/// The port that is DNS.
pub const PORT: u16 = 53;
/// Queries of one pod that may wait for nameservers.
const QUERIES_PER_POD: usize = 256;
/// The same for all pods of the node: each has a descriptor.
const QUERIES: usize = 4096;
/// TCP connections of one pod that may speak DNS.
const STREAMS_PER_POD: usize = 64;
/// How long a nameserver may take to say that a service of the cluster is not there, before the mesh, which has not heard
/// of it either, says so itself.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a nameserver that did not answer is not waited for in that case.
const SILENT: Duration = Duration::from_secs(10);
/// Nameservers whose silence is remembered.
const SILENT_SERVERS: usize = 1024;

/// What answering needs.
pub struct Parts {
    /// The world.
    pub store: Arc<Store>,
    /// Where this node is.
    pub node: Arc<ArcSwap<NodeView>>,
    /// Whom the pods asked.
    pub nameservers: Nameservers,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// The end of the daemon.
    pub drain: Drain,
    /// The cluster's domain, such as `cluster.local`.
    pub domain: String,
}

/// The DNS of this node's pods. Cheap to clone.
#[derive(Clone)]
pub struct Dns(Arc<Shared>);

struct Shared {
    parts: Parts,
    zone: Zone,
    cache: Mutex<Cache>,
    /// Nameservers that did not answer, and when.
    silent: Mutex<HashMap<SocketAddr, Instant>>,
    queries: Arc<Semaphore>,
    /// Limits of TCP by pod (netns cookie), for pods with a socket.
    streams: Mutex<HashMap<u64, Arc<Semaphore>>>,
    stats: Stats,
}

/// What became of queries.
#[derive(Debug, Default)]
struct Stats {
    mesh: AtomicU64,
    cached: AtomicU64,
    forwarded: AtomicU64,
    error: AtomicU64,
    ignored: AtomicU64,
}

impl Stats {
    fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Relaxed);
    }
}

/// What to do with a question.
enum Step {
    /// Send this.
    Answer(Vec<u8>),
    /// Ask the nameserver. `cluster`: only a service or a pod of the cluster can have the name, and the mesh, which
    /// has heard of the cluster, does not know it.
    Forward { cluster: bool },
}

impl Dns {
    /// `None` when the domain is no domain name.
    pub fn new(parts: Parts) -> Option<Self> {
        let zone = Zone::new(&parts.domain)?;
        Some(Self(Arc::new(Shared {
            parts,
            zone,
            cache: Mutex::default(),
            silent: Mutex::default(),
            queries: Arc::new(Semaphore::new(QUERIES)),
            streams: Mutex::default(),
            stats: Stats::default(),
        })))
    }

    /// Whether a connection of the pod to `to` is spoken DNS with. One to a nameserver inside the mesh is carried like any
    /// other, with the mesh's protection.
    pub fn takes(&self, pod: &LocalPod, to: SocketAddr) -> bool {
        to.port() == PORT && lock(&self.0.streams).contains_key(&pod.cookie) && !self.in_mesh(to)
    }

    fn in_mesh(&self, to: SocketAddr) -> bool {
        let (world, node) = (self.0.parts.store.world(), self.0.parts.node.load());
        match world.service_port(&to.ip(), to.port(), Protocol::Tcp) {
            Some(found) => {
                let all = endpoints(&world, &node, &found.service, &found.port, &to.ip());
                all.iter().any(|endpoint| endpoint.workload.in_mesh())
            }
            None => world.workload_by_addr(&to.ip()).is_some_and(|w| w.in_mesh() && !w.host_network),
        }
    }

    /// The answer to a question, if the mesh has it; `limit` is the largest message.
    fn step(&self, pod: &LocalPod, query: &Query, limit: usize) -> Step {
        let world = self.0.parts.store.world();
        let reply = if query.internet() {
            self.reply(&world, pod, query)
        } else {
            Reply::Elsewhere { cluster: false }
        };
        if let Reply::Elsewhere { cluster } = reply {
            // Before the first configuration nobody can say what the cluster does not have.
            return Step::Forward { cluster: cluster && world.counts().1 > 0 };
        }
        match reply::mesh(query, reply, &self.0.zone.name, limit) {
            Some(answer) => {
                Stats::add(&self.0.stats.mesh);
                Step::Answer(answer)
            }
            None => Step::Forward { cluster: false },
        }
    }

    fn reply(&self, world: &World, pod: &LocalPod, query: &Query) -> Reply {
        let node = self.0.parts.node.load();
        let asked = Asked {
            world,
            node: &node,
            zone: &self.0.zone,
            namespace: &pod.name.namespace,
            name: &query.question.name,
            lower: &query.name,
            kind: query.kind(),
        };
        asked.answer()
    }

    /// An answer that is still good, cut to `limit`.
    fn cached(&self, server: SocketAddr, query: &Query, message: &[u8], limit: usize) -> Option<Vec<u8>> {
        let key = Key::new(server, query)?;
        let found = lock(&self.0.cache).get(&key, query, message, Instant::now())?;
        Stats::add(&self.0.stats.cached);
        if found.len() <= limit { Some(found) } else { reply::truncated(query) }
    }

    /// A nameserver has answered.
    fn answered(&self, server: SocketAddr, query: Option<&Query>, answer: &[u8], took: Duration) {
        Stats::add(&self.0.stats.forwarded);
        self.0.parts.metrics.dns_forwarded(took);
        lock(&self.0.silent).remove(&server);
        if let Some(key) = query.and_then(|query| Key::new(server, query)) {
            lock(&self.0.cache).put(key, answer, Instant::now());
        }
    }

    /// A nameserver has not answered. Returns what the client is told: where the mesh knows better, that there is no such
    /// name, so that it goes on with its search domains; else that it failed.
    fn unanswered(&self, server: SocketAddr, query: Option<&Query>, cluster: bool) -> Option<Vec<u8>> {
        Stats::add(&self.0.stats.error);
        self.silent_now(server);
        self.told(query?, cluster)
    }

    fn told(&self, query: &Query, cluster: bool) -> Option<Vec<u8>> {
        if cluster {
            reply::failure(query, ResponseCode::NXDomain, Some(&self.0.zone.name))
        } else {
            reply::failure(query, ResponseCode::ServFail, None)
        }
    }

    fn silent_now(&self, server: SocketAddr) {
        let mut silent = lock(&self.0.silent);
        if silent.len() >= SILENT_SERVERS {
            silent.retain(|_, since| since.elapsed() < SILENT);
        }
        if silent.len() < SILENT_SERVERS {
            silent.insert(server, Instant::now());
        }
    }

    /// How long to wait for a nameserver before the mesh answers in its place.
    fn patience(&self, server: SocketAddr) -> Duration {
        let since = lock(&self.0.silent).get(&server).copied();
        if since.is_some_and(|since| since.elapsed() < SILENT) { Duration::ZERO } else { PATIENCE }
    }

    /// Queries by what became of them.
    pub fn outcomes(&self) -> Vec<Sample<u64>> {
        let stats = &self.0.stats;
        let all = [
            ("mesh", &stats.mesh),
            ("cached", &stats.cached),
            ("forwarded", &stats.forwarded),
            ("error", &stats.error),
            ("ignored", &stats.ignored),
        ];
        all.map(|(outcome, count)| Sample::new([("outcome", outcome)], count.load(Relaxed))).into()
    }

    /// Answers in the cache, its bytes, and queries that wait for nameservers.
    #[expect(clippy::cast_precision_loss, reason = "bounded above")]
    pub fn sizes(&self) -> [f64; 3] {
        let (entries, bytes) = lock(&self.0.cache).size();
        let waiting = QUERIES - self.0.queries.available_permits();
        [entries as f64, bytes as f64, waiting as f64]
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
