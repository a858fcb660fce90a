//! `AggregatedDiscoveryService` over [`DeltaServer`].
//!
//! One stream is one future that is polled when the transport can take a response: there is no task and no queue
//! per stream, so a client that does not read costs its own snapshot and nothing else.

use crate::delta::{Answer, Audience, DeltaServer, FilteredView, ServerLimits, Snapshot};
use crate::wire::core::Node;
use crate::wire::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use crate::wire::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use futures::stream::{BoxStream, StreamExt, unfold};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

/// Largest request that is read: the versions of a few hundred thousand resources.
const MAX_REQUEST: usize = 64 << 20;
/// Largest response that is written; what ztunnel reads.
const MAX_RESPONSE: usize = 200 << 20;

/// Longest node id, since it is logged.
const MAX_NODE_ID: usize = 1_024;

/// What a client is allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    /// Which resources it sees.
    pub audience: Audience,
    /// For log lines.
    pub label: String,
}

/// Decides who may have a stream.
pub trait Admit: Send + Sync + 'static {
    /// Looks at the call's credentials before anything of it is read, so that a stranger cannot make the server read
    /// a large request. The default leaves everything to [`admit`](Self::admit).
    fn authenticate(&self, _metadata: &MetadataMap) -> impl Future<Output = Result<(), Status>> + Send {
        std::future::ready(Ok(()))
    }

    /// Looks at the call's metadata (credentials) and at what the client says about itself. The status of a refusal
    /// goes to the client.
    fn admit(
        &self,
        metadata: &MetadataMap,
        node: &Node,
    ) -> impl Future<Output = Result<Admission, Status>> + Send;
}

/// Bounds of the service.
#[derive(Clone, Debug)]
pub struct AdsServerConfig {
    /// Name and version of the server, for people.
    pub identifier: String,
    /// Bounds of each stream.
    pub limits: ServerLimits,
    /// Streams at a time.
    pub streams: u64,
    /// How long a client may take to say who it is.
    pub first_request: Duration,
    /// When a stream is ended, so that credentials are looked at again; up to a tenth more, so that the clients do
    /// not all return at once. They resume where they were.
    pub stream_age: Duration,
}

impl Default for AdsServerConfig {
    fn default() -> Self {
        Self {
            identifier: concat!("nodemesh/", env!("CARGO_PKG_VERSION")).to_owned(),
            limits: ServerLimits::default(),
            streams: 10_000,
            first_request: Duration::from_secs(10),
            stream_age: Duration::from_mins(30),
        }
    }
}

macro_rules! stats {
    ($($(#[$doc:meta])+ $name:ident,)+) => {
        /// Counters of a service. All but `streams_open` only grow.
        #[derive(Debug, Default)]
        pub struct ServerStats { $($name: AtomicU64,)+ }

        /// The counters at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct StatsReading { $($(#[$doc])+ pub $name: u64,)+ }

        impl ServerStats {
            /// Reads all counters.
            pub fn read(&self) -> StatsReading {
                StatsReading { $($name: self.$name.load(Ordering::Relaxed),)+ }
            }
        }
    };
}

stats! {
    /// Streams now.
    streams_open,
    /// Streams ever.
    streams,
    /// Streams refused: too many, or not admitted.
    streams_refused,
    /// Streams that ended because the client broke the protocol or one of its bounds.
    protocol_errors,
    /// Requests read.
    requests,
    /// Responses written.
    responses,
    /// Resources in them.
    resources,
    /// Removals in them.
    removals,
    /// Responses that were applied in full.
    acks,
    /// Responses that were refused, in full or in part.
    nacks,
    /// Resources that were refused.
    resources_refused,
}

fn add(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}

/// The discovery service. Clones share everything.
pub struct AdsService<A> {
    shared: Arc<Shared<A>>,
}

impl<A> Clone for AdsService<A> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

struct Shared<A> {
    config: AdsServerConfig,
    admit: A,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    stats: Arc<ServerStats>,
}

impl<A: Admit> AdsService<A> {
    /// Serves whatever is the latest snapshot. When its sender is dropped all streams end.
    pub fn new(config: AdsServerConfig, admit: A, snapshots: watch::Receiver<Arc<Snapshot>>) -> Self {
        Self { shared: Arc::new(Shared { config, admit, snapshots, stats: Arc::default() }) }
    }

    /// The counters.
    pub fn stats(&self) -> Arc<ServerStats> {
        self.shared.stats.clone()
    }

    /// The tonic service, with the message sizes that discovery needs.
    pub fn into_server(self) -> AggregatedDiscoveryServiceServer<Self> {
        AggregatedDiscoveryServiceServer::new(self)
            .max_decoding_message_size(MAX_REQUEST)
            .max_encoding_message_size(MAX_RESPONSE)
    }
}

/// Counts an open stream for as long as it lives.
struct Open(Arc<ServerStats>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.streams_open.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Stream {
    server: DeltaServer<FilteredView>,
    inbound: Streaming<DeltaDiscoveryRequest>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    admission: Admission,
    end: Instant,
    open: Open,
}

impl Stream {
    /// The next response, an error that ends the stream, or its end.
    async fn next(&mut self) -> Option<Result<DeltaDiscoveryResponse, Status>> {
        loop {
            let now = Instant::now();
            if let Some(response) = self.server.poll(now.into_std()) {
                let stats = &self.open.0;
                add(&stats.responses, 1);
                add(&stats.resources, response.resources.len());
                add(&stats.removals, response.removed_resources.len());
                return Some(Ok(response));
            }
            let wakeup = self.server.next_wakeup().map_or(self.end, Instant::from_std).min(self.end);
            tokio::select! {
                message = self.inbound.message() => match message {
                    Ok(Some(request)) => {
                        if let Err(status) = self.request(&request) {
                            return Some(Err(status));
                        }
                    }
                    Ok(None) => return None,
                    Err(status) => {
                        tracing::debug!(client = %self.admission.label, %status, "discovery stream broke");
                        return None;
                    }
                },
                changed = self.snapshots.changed() => {
                    if changed.is_err() {
                        return None;
                    }
                    let snapshot = self.snapshots.borrow_and_update().clone();
                    let view = FilteredView::new(snapshot, self.admission.audience);
                    self.server.update(Arc::new(view), now.into_std());
                }
                () = sleep_until(wakeup) => if self.end <= Instant::now() {
                    tracing::debug!(client = %self.admission.label, "discovery stream reached its age; the client resumes");
                    return None;
                },
            }
        }
    }

    fn request(&mut self, request: &DeltaDiscoveryRequest) -> Result<(), Status> {
        let stats = &self.open.0;
        add(&stats.requests, 1);
        let client = &self.admission.label;
        match self.server.request(request, Instant::now().into_std()) {
            Ok(Answer::Ack) => add(&stats.acks, 1),
            Ok(Answer::Nack { message, names }) => {
                add(&stats.nacks, 1);
                add(&stats.resources_refused, names.len());
                let some: Vec<_> = names.iter().take(10).collect();
                tracing::warn!(%client, type_url = request.type_url, refused = names.len(), ?some, message, "client refused configuration");
            }
            Ok(Answer::None | Answer::Stale) => {}
            Err(error) => {
                add(&stats.protocol_errors, 1);
                tracing::warn!(%client, %error, "discovery stream ended");
                return Err(Status::invalid_argument(error.to_string()));
            }
        }
        Ok(())
    }
}

impl<A: Admit> Shared<A> {
    async fn open(&self, request: Request<Streaming<DeltaDiscoveryRequest>>) -> Result<Stream, Status> {
        let open = Open(self.stats.clone());
        let others = self.stats.streams_open.fetch_add(1, Ordering::Relaxed);
        if others >= self.config.streams {
            return Err(Status::resource_exhausted(format!(
                "this server has {others} discovery streams, which is its limit; try another or later"
            )));
        }
        let (metadata, _, mut inbound) = request.into_parts();
        self.admit.authenticate(&metadata).await?;
        let first = timeout(self.config.first_request, inbound.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no request came; the first one has to name the node"))??
            .ok_or_else(|| Status::invalid_argument("the stream ended before its first request"))?;
        let node = first.node.clone().unwrap_or_default();
        if node.id.len() > MAX_NODE_ID {
            return Err(Status::invalid_argument(format!(
                "node.id has {} bytes; at most {MAX_NODE_ID} are read",
                node.id.len()
            )));
        }
        let admission = self.admit.admit(&metadata, &node).await?;
        let mut snapshots = self.snapshots.clone();
        let view = FilteredView::new(snapshots.borrow_and_update().clone(), admission.audience);
        let server = DeltaServer::new(self.config.limits.clone(), Arc::new(view), &self.config.identifier);
        let age = self.config.stream_age.mul_f64(rand::random_range(1.0..1.1));
        add(&self.stats.streams, 1);
        tracing::info!(client = %admission.label, node = node.id, "discovery stream opened");
        let mut stream = Stream { server, inbound, snapshots, admission, end: Instant::now() + age, open };
        stream.request(&first)?;
        Ok(stream)
    }
}

#[tonic::async_trait]
impl<A: Admit> AggregatedDiscoveryService for AdsService<A> {
    type StreamAggregatedResourcesStream = BoxStream<'static, Result<DiscoveryResponse, Status>>;
    type DeltaAggregatedResourcesStream = BoxStream<'static, Result<DeltaDiscoveryResponse, Status>>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        add(&self.shared.stats.streams_refused, 1);
        Err(Status::unimplemented(
            "istio.workload and istio.security resources are served incrementally only; use DeltaAggregatedResources",
        ))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        match self.shared.open(request).await {
            Ok(stream) => Ok(Response::new(responses(stream))),
            Err(status) => {
                add(&self.shared.stats.streams_refused, 1);
                tracing::warn!(%status, "discovery stream refused");
                Err(status)
            }
        }
    }
}

/// Turns a stream into its responses; an error is the last of them.
fn responses(stream: Stream) -> BoxStream<'static, Result<DeltaDiscoveryResponse, Status>> {
    unfold(Some(stream), |stream| async move {
        let mut stream = stream?;
        let next = stream.next().await?;
        let rest = next.is_ok().then_some(stream);
        Some((next, rest))
    })
    .boxed()
}
