//! The client's streams: connect, apply, answer, and connect again.

use crate::delta::{Backoff, Changes, ClientLimits, DeltaClient, Rejection, Retry, Subscription};
use crate::wire::core::Node;
use crate::wire::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use crate::wire::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use bytes::Bytes;
use std::collections::HashSet;
use std::future::Future;
use std::time::{Duration, SystemTime};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::codegen::{Body as HttpBody, StdError};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Endpoint;
use tonic::{Request, Status, Streaming};

/// Requests that wait for the transport.
const OUTBOUND: usize = 64;
/// Places of those that are kept for answers, of which there is one per type at most. So an answer never waits for
/// a place while the server waits for it to be read.
const ANSWERS: usize = 32;
/// Names asked for on demand that wait for the client.
const DEMANDS: usize = 1_024;

/// What goes wrong before a stream is there.
pub type TransportError = Box<dyn std::error::Error + Send + Sync>;

/// Where streams come from: the caller's addresses, TLS and credentials.
pub trait Transport: Send + 'static {
    /// What calls are made on, for example a tonic `Channel`.
    type Service: GrpcService<
            Body,
            Future: Send,
            Error: Into<StdError>,
            ResponseBody: HttpBody<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
        > + Send
        + Sync;

    /// Opens a connection.
    fn connect(&mut self) -> impl Future<Output = Result<Self::Service, TransportError>> + Send;

    /// The bearer token for the next stream. Asked for each time, since tokens are rotated.
    fn token(&mut self) -> impl Future<Output = Result<Option<String>, TransportError>> + Send;
}

/// Applies what comes.
pub trait Handler: Send + 'static {
    /// Applies changes as one unit and names what could not be applied; for those the last good version stays in
    /// force. The answer to the server waits for this.
    fn apply(&mut self, changes: Changes) -> impl Future<Output = Vec<Rejection>> + Send;
}

/// Settings of a client.
#[derive(Clone, Debug)]
pub struct AdsConfig {
    /// Who we are.
    pub node: Node,
    /// Sent as the header `clusterid`, if not empty.
    pub cluster_id: String,
    /// What to follow.
    pub subscriptions: Vec<Subscription>,
    /// Bounds.
    pub limits: ClientLimits,
    /// Between attempts, with jitter.
    pub backoff: Backoff,
    /// How long a stream has to live, and to have given something, until earlier failures are forgotten.
    pub stable: Duration,
    /// For connecting, and again for the server to accept the call.
    pub connect_timeout: Duration,
    /// Largest response that is read.
    pub max_message: usize,
}

impl AdsConfig {
    /// With everything but the first two as usual.
    pub fn new(node: Node, subscriptions: Vec<Subscription>) -> Self {
        Self {
            node,
            cluster_id: String::new(),
            subscriptions,
            limits: ClientLimits::default(),
            backoff: Backoff { initial: Duration::from_millis(200), max: Duration::from_secs(15) },
            stable: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(10),
            max_message: 200 << 20,
        }
    }
}

/// How the client is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdsStatus {
    /// A stream is open.
    pub connected: bool,
    /// Everything that the server had at first was applied. Stays true when the connection is lost.
    pub synced: bool,
    /// What is in force is what the server has: everything that it had when this stream began was applied, and the
    /// stream is still open.
    pub current: bool,
    /// When that was so last, if it is not so now. A stream that only connects is no contact.
    pub last_contact: Option<SystemTime>,
    /// When changes were applied last.
    pub last_update: Option<SystemTime>,
    /// Responses applied.
    pub updates: u64,
    /// Responses refused, in full or in part.
    pub nacks: u64,
    /// Attempts to connect.
    pub attempts: u64,
    /// Why the last stream ended or could not be had; cleared by the next update.
    pub last_error: Option<String>,
}

#[derive(Debug)]
struct Demand {
    type_url: String,
    name: String,
    wanted: bool,
}

/// Follows single names of a running client.
#[derive(Clone, Debug)]
pub struct AdsHandle(mpsc::Sender<Demand>);

impl AdsHandle {
    /// Follows a name or alias; the handler is told what it is, or that it does not exist. False if the client has
    /// ended.
    pub async fn subscribe(&self, type_url: &str, name: &str) -> bool {
        self.send(type_url, name, true).await
    }

    /// Stops following a name. False if the client has ended.
    pub async fn unsubscribe(&self, type_url: &str, name: &str) -> bool {
        self.send(type_url, name, false).await
    }

    async fn send(&self, type_url: &str, name: &str, wanted: bool) -> bool {
        let demand = Demand { type_url: type_url.to_owned(), name: name.to_owned(), wanted };
        self.0.send(demand).await.is_ok()
    }
}

/// Keep-alive and windows for a discovery connection: a dead server is noticed within 40 seconds, and a large first
/// response is not slowed down by flow control.
pub fn tune(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(Duration::from_secs(10))
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true)
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(8 << 20)
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error("cannot connect to the control plane")]
    Connect(#[source] TransportError),
    #[error("no answer from the control plane in {0:?}")]
    Timeout(Duration),
    #[error("no token for the control plane")]
    Token(#[source] TransportError),
    #[error("the token for the control plane has characters that a header cannot carry")]
    TokenForm,
    #[error("the control plane ended the stream with {:?}: {}", .0.code(), .0.message())]
    Status(Box<Status>),
    #[error("the control plane ended the stream")]
    End,
}

/// A discovery client. [`run`](Self::run) does everything.
pub struct AdsClient<T, H> {
    config: AdsConfig,
    transport: T,
    handler: H,
    delta: DeltaClient,
    status: watch::Sender<AdsStatus>,
    demands: mpsc::Receiver<Demand>,
    demands_open: bool,
}

type Outbound = mpsc::Sender<DeltaDiscoveryRequest>;

impl<T: Transport, H: Handler> AdsClient<T, H> {
    /// A client that is not running yet, a handle for names on demand, and its status.
    pub fn new(config: AdsConfig, transport: T, handler: H) -> (Self, AdsHandle, watch::Receiver<AdsStatus>) {
        let (status, watch) = watch::channel(AdsStatus::default());
        let (tx, demands) = mpsc::channel(DEMANDS);
        let delta =
            DeltaClient::new(config.node.clone(), config.limits.clone(), config.subscriptions.clone());
        let client = Self { config, transport, handler, delta, status, demands, demands_open: true };
        (client, AdsHandle(tx), watch)
    }

    /// Applies what a former process kept, before the first stream. What is refused is not counted as held, so that the
    /// server sends it again.
    pub async fn restore(&mut self, changes: Changes) -> Vec<Rejection> {
        let type_url = changes.type_url.clone();
        let versions: Vec<_> =
            changes.resources.iter().map(|r| (r.name.clone(), r.version.clone())).collect();
        let rejections = self.handler.apply(changes).await;
        let bad: HashSet<&str> = rejections.iter().map(|r| r.name.as_str()).collect();
        let good = versions.into_iter().filter(|(name, _)| !bad.contains(name.as_str()));
        self.delta.restored(&type_url, good);
        rejections
    }

    /// Keeps a stream open until `shutdown` resolves. Changes that are being applied at that moment are abandoned.
    pub async fn run(mut self, shutdown: impl Future<Output = ()> + Send) {
        tokio::pin!(shutdown);
        let mut retry = Retry::default();
        loop {
            let (updates, began) = (self.status.borrow().updates, Instant::now());
            let error = tokio::select! {
                () = &mut shutdown => break,
                error = self.stream() => error,
            };
            self.ended();
            let stable = self.status.borrow().updates > updates && began.elapsed() >= self.config.stable;
            let delay = retry.after(self.config.backoff, stable, rand::random());
            let failures = retry.failures();
            let text = with_causes(&error);
            match error {
                StreamError::End => tracing::debug!(?delay, "{text}; connecting again"),
                _ => tracing::warn!(
                    error = text,
                    failures,
                    ?delay,
                    "discovery: the last good configuration stays"
                ),
            }
            self.status.send_modify(|s| s.last_error = Some(text));
            tokio::select! {
                () = &mut shutdown => break,
                () = sleep(delay) => {}
            }
        }
        self.ended();
    }

    fn ended(&mut self) {
        self.delta.disconnected();
        self.status.send_modify(|s| {
            if s.current {
                s.last_contact = Some(SystemTime::now());
            }
            s.connected = false;
            s.current = false;
        });
    }

    async fn stream(&mut self) -> StreamError {
        match self.open().await {
            Ok((inbound, outbound)) => self.converse(inbound, outbound).await,
            Err(error) => error,
        }
    }

    async fn open(&mut self) -> Result<(Streaming<DeltaDiscoveryResponse>, Outbound), StreamError> {
        self.status.send_modify(|s| s.attempts += 1);
        let limit = self.config.connect_timeout;
        let service = timeout(limit, self.transport.connect())
            .await
            .map_err(|_| StreamError::Timeout(limit))?
            .map_err(StreamError::Connect)?;
        let token = self.transport.token().await.map_err(StreamError::Token)?;
        let first = self.delta.connected();
        let (outbound, requests) = mpsc::channel(OUTBOUND.max(first.len() + ANSWERS));
        for request in first {
            // There is room for all of them, and the receiver is right here.
            let _ = outbound.try_send(request);
        }
        let mut request = Request::new(ReceiverStream::new(requests));
        if let Some(token) = token {
            let mut value: MetadataValue<Ascii> =
                format!("Bearer {}", token.trim()).parse().map_err(|_| StreamError::TokenForm)?;
            value.set_sensitive(true);
            request.metadata_mut().insert("authorization", value);
        }
        if let Ok(value) = self.config.cluster_id.parse()
            && !self.config.cluster_id.is_empty()
        {
            request.metadata_mut().insert("clusterid", value);
        }
        let mut client = AggregatedDiscoveryServiceClient::new(service)
            .max_decoding_message_size(self.config.max_message)
            .max_encoding_message_size(self.config.max_message);
        let inbound = timeout(limit, client.delta_aggregated_resources(request))
            .await
            .map_err(|_| StreamError::Timeout(limit))?
            .map_err(|status| StreamError::Status(Box::new(status)))?
            .into_inner();
        Ok((inbound, outbound))
    }

    async fn converse(
        &mut self,
        mut inbound: Streaming<DeltaDiscoveryResponse>,
        outbound: Outbound,
    ) -> StreamError {
        self.status.send_modify(|s| s.connected = true);
        loop {
            let tick = self.delta.next_tick().map(Instant::from_std);
            let requests = tokio::select! {
                message = inbound.message() => match message {
                    Ok(Some(response)) => self.response(response).await.into_iter().collect(),
                    Ok(None) => return StreamError::End,
                    Err(status) => return StreamError::Status(Box::new(status)),
                },
                demand = self.demands.recv(), if self.demands_open && outbound.capacity() > ANSWERS => match demand {
                    Some(d) if d.wanted => self.delta.subscribe(&d.type_url, &[d.name]).into_iter().collect(),
                    Some(d) => self.delta.unsubscribe(&d.type_url, &[d.name]).into_iter().collect(),
                    None => {
                        self.demands_open = false;
                        Vec::new()
                    }
                },
                () = sleep_until(tick.unwrap_or_else(Instant::now)), if tick.is_some() => {
                    self.delta.tick(Instant::now().into_std())
                }
            };
            for request in requests {
                if outbound.send(request).await.is_err() {
                    return StreamError::End;
                }
            }
        }
    }

    async fn response(&mut self, response: DeltaDiscoveryResponse) -> Option<DeltaDiscoveryRequest> {
        let update = match self.delta.response(response) {
            Ok(update) => update,
            Err(error) => {
                tracing::warn!(%error, "discovery");
                return None;
            }
        };
        let rejections = self.handler.apply(update.changes).await;
        for r in rejections.iter().take(10) {
            tracing::warn!(
                resource = r.name,
                reason = r.reason,
                "discovery: refused; the last good version stays"
            );
        }
        let answer = self.delta.applied(update.ticket, rejections, Instant::now().into_std());
        self.status.send_modify(|s| {
            s.synced = self.delta.synced();
            s.current = self.delta.current();
            s.last_update = Some(SystemTime::now());
            s.updates += 1;
            s.nacks = self.delta.nacks();
            s.last_error = None;
        });
        answer
    }
}

/// An error with its causes, for a log line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(c) = cause {
        text.push_str(": ");
        text.push_str(&c.to_string());
        cause = c.source();
    }
    text
}
