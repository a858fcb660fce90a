//! Queries over UDP: one loop per socket in a pod, one task per query that waits for a nameserver.
//!
//! The nameserver of a query is the one that the application sent it to. A pod that has used one only needs no look-up;
//! else the client's socket is found by its address, and the kernel's table says whom that socket meant. A socket without
//! a connection may have sent the same query to several (musl does): the first copy goes to the last one meant, further
//! copies to the others that it has used. On a connected socket a further copy is a retransmission, and is sent again.

use super::{
    Dns, QUERIES_PER_POD, STREAMS_PER_POD, Stats, Step, lock,
    query::{self, Incoming, Query},
    reply, upstream,
};
use crate::local::LocalPod;
use hickory_proto::op::ResponseCode;
use mesh_xds::model::Protocol;
use socket2::SockRef;
use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Instant,
};
use tokio::{
    net::UdpSocket,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// The largest query that is read.
const LARGEST: usize = 4096;
/// Datagrams handled before others have their turn.
const BURST: usize = 32;

/// One socket and its queries under way.
struct Listener {
    dns: Dns,
    pod: Arc<LocalPod>,
    socket: Arc<UdpSocket>,
    addr: SocketAddr,
    /// By client and message, with the nameservers asked. Bounded by the places.
    waiting: Mutex<Waiting>,
    places: Arc<Semaphore>,
}

type Waiting = HashMap<(SocketAddr, Box<[u8]>), Vec<Asked>>;

struct Asked {
    server: SocketAddr,
    socket: Arc<UdpSocket>,
}

/// A query that goes to a nameserver.
struct Forward {
    client: SocketAddr,
    message: Box<[u8]>,
    query: Option<Box<Query>>,
    cluster: bool,
    server: SocketAddr,
}

impl Dns {
    /// Serves a socket of a pod until `stop`, on the runtime that the socket belongs to.
    pub async fn datagrams(self, pod: Arc<LocalPod>, socket: Arc<UdpSocket>, stop: CancellationToken) {
        let addr = match socket.local_addr() {
            Ok(addr) => addr,
            Err(error) => return tracing::error!(pod = %pod.name, %error, "cannot serve DNS"),
        };
        lock(&self.0.streams).entry(pod.cookie).or_insert_with(|| Arc::new(Semaphore::new(STREAMS_PER_POD)));
        let cookie = pod.cookie;
        let dns = self.clone();
        let places = Arc::new(Semaphore::new(QUERIES_PER_POD));
        let listener = Arc::new(Listener { dns: self, pod, socket, addr, waiting: Mutex::default(), places });
        stop.run_until_cancelled(listener.run()).await;
        lock(&dns.0.streams).remove(&cookie);
    }
}

impl Listener {
    async fn run(self: &Arc<Self>) {
        loop {
            if let Err(error) = self.socket.readable().await {
                return tracing::error!(pod = %self.pod.name, %error, "the socket for DNS broke");
            }
            for _ in 0..BURST {
                if !self.receive() {
                    break;
                }
            }
            tokio::task::yield_now().await;
        }
    }

    /// Takes one datagram; false when there is none. Not async, so that its buffer is on the stack of the thread.
    fn receive(self: &Arc<Self>) -> bool {
        let mut buffer = [0; LARGEST];
        match self.socket.try_recv_from(&mut buffer) {
            Ok((length, client)) => {
                // Nobody else may ask: this is no resolver for the network.
                if self.pod.addrs.contains(&client.ip()) {
                    self.datagram(client, &buffer[..length]);
                } else {
                    Stats::add(&self.dns.0.stats.ignored);
                }
                true
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            // A client that has gone shows as an error of the socket.
            Err(_) => true,
        }
    }

    fn datagram(self: &Arc<Self>, client: SocketAddr, message: &[u8]) {
        let stats = &self.dns.0.stats;
        // A datagram that fills the buffer was cut off.
        let incoming = if message.len() < LARGEST { query::read(message) } else { Incoming::Malformed };
        match incoming {
            Incoming::Ignored => Stats::add(&stats.ignored),
            Incoming::Malformed => {
                Stats::add(&stats.error);
                self.send(client, reply::malformed(message));
            }
            Incoming::Other => self.forward(client, message, None, false),
            Incoming::Question(query) => match self.dns.step(&self.pod, &query, query.udp_size()) {
                Step::Answer(answer) => self.send(client, Some(answer)),
                Step::Forward { cluster } => self.forward(client, message, Some(query), cluster),
            },
        }
    }

    /// A full socket buffer loses the answer, as a network does.
    fn send(&self, client: SocketAddr, message: Option<Vec<u8>>) {
        let sent = message.map(|message| self.socket.try_send_to(&message, client));
        if !matches!(sent, Some(Ok(_))) {
            tracing::debug!(pod = %self.pod.name, %client, ?sent, "no DNS answer was sent");
        }
    }

    fn refuse(&self, client: SocketAddr, query: Option<&Query>) {
        Stats::add(&self.dns.0.stats.error);
        self.send(client, query.and_then(|query| reply::failure(query, ResponseCode::ServFail, None)));
    }

    fn forward(
        self: &Arc<Self>,
        client: SocketAddr,
        message: &[u8],
        query: Option<Box<Query>>,
        cluster: bool,
    ) {
        let Some((mut server, others)) = self.server(client) else {
            return self.refuse(client, query.as_deref());
        };
        if let Some(asked) = lock(&self.waiting).get(&(client, message.into())) {
            let fresh = |s: &SocketAddr| asked.iter().all(|a| a.server != *s);
            match std::iter::once(server).chain(others).find(fresh) {
                Some(other) => server = other,
                None => {
                    for asked in asked.iter().filter(|asked| asked.server == server) {
                        // Lost like any datagram if the buffer is full; the client will come again.
                        // Not through the runtime, which may not have seen yet that the socket is writable.
                        let _ = SockRef::from(&*asked.socket).send(message);
                    }
                    return;
                }
            }
        }
        let cached = query.as_deref().and_then(|q| self.dns.cached(server, q, message, q.udp_size()));
        if cached.is_some() {
            return self.send(client, cached);
        }
        let places =
            (self.places.clone().try_acquire_owned(), self.dns.0.queries.clone().try_acquire_owned());
        let (Ok(own), Ok(shared)) = places else { return self.refuse(client, query.as_deref()) };
        let to = {
            let (world, node) = (self.dns.0.parts.store.world(), self.dns.0.parts.node.load());
            upstream::locate(&world, &node, server, Protocol::Udp)
        };
        let socket = match upstream::open(&self.pod, client, to) {
            Ok(socket) => Arc::new(socket),
            Err(error) => {
                tracing::debug!(pod = %self.pod.name, %server, %error, "cannot ask a nameserver");
                return self.refuse(client, query.as_deref());
            }
        };
        let forward = Forward { client, message: message.into(), query, cluster, server };
        lock(&self.waiting)
            .entry((client, forward.message.clone()))
            .or_default()
            .push(Asked { server, socket: socket.clone() });
        tokio::spawn(self.clone().wait(forward, socket, (own, shared)));
    }

    /// Whom the client asked, and whom else the same socket asked.
    fn server(&self, client: SocketAddr) -> Option<(SocketAddr, Vec<SocketAddr>)> {
        let nameservers = &self.dns.0.parts.nameservers;
        let mut all = nameservers.of_pod(self.pod.cookie);
        if let [only] = all[..] {
            return Some((only, vec![]));
        }
        let socket = self.pod.netns.udp_client(client, self.addr).ok().flatten();
        let last = socket.and_then(|socket| nameservers.last_of_socket(socket.cookie, self.addr));
        match (socket, last) {
            (Some(socket), Some(last)) if socket.connected => Some((last, vec![])),
            (Some(socket), Some(last)) => Some((last, nameservers.of_socket(socket.cookie))),
            // Without the socket (it is closed, or the kernel cannot say) any of the pod's is as good.
            _ => all.pop().map(|server| (server, all)),
        }
    }

    async fn wait(
        self: Arc<Self>,
        forward: Forward,
        socket: Arc<UdpSocket>,
        _places: (OwnedSemaphorePermit, OwnedSemaphorePermit),
    ) {
        let Forward { client, message, query, cluster, server } = forward;
        let started = Instant::now();
        let end = upstream::question_end(query.as_deref());
        let mut asking = Box::pin(upstream::ask(&socket, &message, end));
        let mut told = false;
        let early = if cluster { timeout(self.dns.patience(server), &mut asking).await.ok() } else { None };
        if early.is_none() && cluster {
            told = true;
            Stats::add(&self.dns.0.stats.error);
            self.send(client, query.as_deref().and_then(|query| self.dns.told(query, true)));
        }
        let result = match early {
            Some(result) => result,
            None => match timeout(upstream::TIMEOUT, asking).await {
                Ok(result) => result,
                Err(_) => Err(io::ErrorKind::TimedOut.into()),
            },
        };
        self.done(client, message.clone(), &socket);
        match result {
            Ok(answer) => {
                self.dns.answered(server, query.as_deref(), &answer, started.elapsed());
                if !told {
                    self.send(client, Some(answer));
                }
            }
            Err(error) => {
                tracing::debug!(pod = %self.pod.name, %server, %error, "a nameserver does not answer");
                if told {
                    self.dns.silent_now(server);
                } else {
                    let message = self.dns.unanswered(server, query.as_deref(), cluster);
                    self.send(client, message);
                }
            }
        }
    }

    fn done(&self, client: SocketAddr, message: Box<[u8]>, socket: &Arc<UdpSocket>) {
        let mut waiting = lock(&self.waiting);
        let key = (client, message);
        if let Some(asked) = waiting.get_mut(&key) {
            asked.retain(|asked| !Arc::ptr_eq(&asked.socket, socket));
            if asked.is_empty() {
                waiting.remove(&key);
            }
        }
    }
}
