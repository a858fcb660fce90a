//! Queries over TCP: a connection to port 53 that the kernel redirected.
//!
//! Queries of a connection are answered one after the other; one connection to the nameserver is made when it is needed.
//! A zone transfer, an update or whatever else is no single answer to a single question makes the connection a plain one
//! from there on.

use super::{
    Dns, Stats, Step, lock,
    query::{self, Incoming},
    reply, upstream,
};
use crate::{
    l4::{self, ByteCounters, Stop, TcpEnd},
    local::{Buffered, LocalPod},
    net,
};
use hickory_proto::rr::RecordType;
use mesh_xds::model::Protocol;
use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{io::AsyncWriteExt, net::TcpStream, time::timeout};

/// How long a client may be silent between queries (RFC 7766, section 6.2.3, wants seconds), and how long one query
/// may take to arrive.
const IDLE: Duration = Duration::from_secs(10);
/// How long a client may take to read an answer.
const WRITE: Duration = Duration::from_secs(10);

/// How a connection goes on after a query.
enum Next {
    Answer(Option<Vec<u8>>),
    /// The bytes so far, for a plain connection.
    Plain(Vec<u8>),
}

impl Dns {
    /// Serves one connection of `pod` to the nameserver `server`.
    pub async fn stream(&self, pod: Arc<LocalPod>, client: TcpStream, from: SocketAddr, server: SocketAddr) {
        let limit = lock(&self.0.streams).get(&pod.cookie).cloned();
        // A connection to the nameserver may join it.
        let places = (limit.and_then(|limit| limit.try_acquire_owned().ok()), pod.limits.slot(2).ok());
        let (Some(_place), Some(_slot)) = places else {
            Stats::add(&self.0.stats.error);
            return net::reset_on_close(&client);
        };
        let drain = &self.0.parts.drain;
        let served = drain.force.run_until_cancelled(self.conversation(&pod, client, from, server)).await;
        if let Some(Err(error)) = served {
            tracing::debug!(pod = %pod.name, %server, %error, "a DNS connection ended early");
        }
    }

    async fn conversation(
        &self,
        pod: &Arc<LocalPod>,
        mut client: TcpStream,
        from: SocketAddr,
        server: SocketAddr,
    ) -> io::Result<()> {
        let to = {
            let (world, node) = (self.0.parts.store.world(), self.0.parts.node.load());
            upstream::locate(&world, &node, server, Protocol::Tcp)
        };
        let mut upstream = upstream::Stream::new(pod.clone(), from, to);
        loop {
            let message = tokio::select! {
                // Between two queries is a good moment to end.
                () = self.0.parts.drain.begin.cancelled() => return Ok(()),
                read = timeout(IDLE, upstream::read_frame(&mut client)) => match read? {
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                    read => read?,
                },
            };
            match self.query(pod, &mut upstream, server, message).await {
                Next::Answer(Some(answer)) => {
                    timeout(WRITE, client.write_all(&upstream::frame(&answer)?)).await??;
                }
                // There is nothing to say to such a client.
                Next::Answer(None) => return Ok(()),
                Next::Plain(message) => return self.plain(client, &upstream, &message).await,
            }
        }
    }

    async fn query(
        &self,
        pod: &LocalPod,
        upstream: &mut upstream::Stream,
        server: SocketAddr,
        message: Vec<u8>,
    ) -> Next {
        let stats = &self.0.stats;
        let query = match query::read(&message) {
            Incoming::Ignored => {
                Stats::add(&stats.ignored);
                return Next::Answer(None);
            }
            Incoming::Malformed => {
                Stats::add(&stats.error);
                return Next::Answer(reply::malformed(&message));
            }
            Incoming::Other => return Next::Plain(message),
            Incoming::Question(q) if matches!(q.kind(), RecordType::AXFR | RecordType::IXFR) => {
                return Next::Plain(message);
            }
            Incoming::Question(query) => query,
        };
        let limit = usize::from(u16::MAX);
        let cluster = match self.step(pod, &query, limit) {
            Step::Answer(answer) => return Next::Answer(Some(answer)),
            Step::Forward { cluster } => cluster,
        };
        if let Some(found) = self.cached(server, &query, &message, limit) {
            return Next::Answer(Some(found));
        }
        let started = Instant::now();
        let end = upstream::question_end(Some(&query));
        let answer = async {
            let _place = self.0.queries.acquire().await.map_err(io::Error::other)?;
            upstream.ask(&message, end).await
        };
        match answer.await {
            Ok(answer) => {
                self.answered(server, Some(&query), &answer, started.elapsed());
                Next::Answer(Some(answer))
            }
            Err(error) => {
                tracing::debug!(pod = %pod.name, %server, %error, "a nameserver does not answer over TCP");
                Next::Answer(self.unanswered(server, Some(&query), cluster))
            }
        }
    }

    /// Carries the rest of the connection as it is.
    async fn plain(&self, client: TcpStream, upstream: &upstream::Stream, first: &[u8]) -> io::Result<()> {
        let mut server = upstream.dial().await?;
        server.write_all(&upstream::frame(first)?).await?;
        Stats::add(&self.0.stats.forwarded);
        let stop = async {
            self.0.parts.drain.force.cancelled().await;
            Stop::Deadline
        };
        let (counters, buffered) = (ByteCounters::default(), Buffered::of(&upstream.pod().limits));
        l4::copy(TcpEnd::new(client), TcpEnd::new(server), &counters, buffered, stop).await;
        Ok(())
    }
}
