//! Both ends together, called in memory: no sockets.

use super::*;
use crate::convert::ADDRESS_TYPE;
use crate::delta::{Audience, Backoff, Changes, Received, Rejection, Resource, Snapshot, Subscription};
use crate::wire::Any;
use crate::wire::core::Node;
use crate::wire::discovery::DeltaDiscoveryRequest;
use crate::wire::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use crate::wire::discovery::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Status};

const WAIT: Duration = Duration::from_secs(20);

/// Knows one token, and takes the audience from the cluster name.
struct Gate;

impl Admit for Gate {
    async fn authenticate(&self, metadata: &MetadataMap) -> Result<(), Status> {
        if metadata.get("authorization").is_none_or(|t| t != "Bearer right") {
            return Err(Status::unauthenticated("the token is not known here"));
        }
        Ok(())
    }

    async fn admit(&self, _: &MetadataMap, node: &Node) -> Result<Admission, Status> {
        let audience = if node.cluster == "ours" { Audience::Nodemesh } else { Audience::Everyone };
        Ok(Admission { audience, label: node.id.clone() })
    }
}

struct InMemory {
    service: AdsService<Gate>,
    token: watch::Receiver<&'static str>,
}

impl Transport for InMemory {
    type Service = AggregatedDiscoveryServiceServer<AdsService<Gate>>;

    async fn connect(&mut self) -> Result<Self::Service, TransportError> {
        Ok(self.service.clone().into_server())
    }

    async fn token(&mut self) -> Result<Option<String>, TransportError> {
        Ok(Some((*self.token.borrow()).to_owned()))
    }
}

#[derive(Default)]
struct Applied {
    now: BTreeMap<String, String>,
    /// Names in the order they came; removals with a minus.
    log: Vec<String>,
    received: Vec<Received>,
}

#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Applied>>);

impl Handler for Recorder {
    async fn apply(&mut self, changes: Changes) -> Vec<Rejection> {
        let mut applied = self.0.lock().unwrap();
        let mut rejections = Vec::new();
        for r in changes.resources {
            applied.log.push(r.name.clone());
            applied.received.push(r.clone());
            let content = String::from_utf8(r.body.value.to_vec()).unwrap();
            if content == "bad" {
                rejections.push(Rejection { name: r.name, reason: "it is bad".into() });
            } else {
                applied.now.insert(r.name, content);
            }
        }
        for name in changes.removed {
            applied.log.push(format!("-{name}"));
            applied.now.remove(&name);
        }
        rejections
    }
}

struct World {
    snapshots: watch::Sender<Arc<Snapshot>>,
    service: AdsService<Gate>,
    token: watch::Sender<&'static str>,
}

struct Running {
    recorder: Recorder,
    handle: AdsHandle,
    status: watch::Receiver<AdsStatus>,
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

impl World {
    fn new(config: AdsServerConfig) -> Self {
        let snapshots = watch::Sender::new(Arc::new(Snapshot::default()));
        let service = AdsService::new(config, Gate, snapshots.subscribe());
        Self { snapshots, service, token: watch::Sender::new("right") }
    }

    fn put(&self, name: &str, content: &str, audience: Audience) {
        let mut edit = self.snapshots.borrow().edit();
        let body = Any { type_url: ADDRESS_TYPE.into(), value: content.as_bytes().to_vec().into() };
        edit.put(ADDRESS_TYPE, Resource::new(name, vec![format!("n/{name}")], body).for_audience(audience));
        self.snapshots.send_replace(Arc::new(edit.finish()));
    }

    fn client(
        &self,
        cluster: &str,
        subscription: Subscription,
    ) -> (AdsClient<InMemory, Recorder>, Recorder, watch::Receiver<AdsStatus>) {
        let (client, recorder, _, status) = self.parts(cluster, subscription);
        (client, recorder, status)
    }

    fn run(&self, cluster: &str, subscription: Subscription) -> Running {
        let (client, recorder, handle, status) = self.parts(cluster, subscription);
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(client.run(async { _ = stopped.await }));
        Running { recorder, handle, status, stop, task }
    }

    fn parts(
        &self,
        cluster: &str,
        subscription: Subscription,
    ) -> (AdsClient<InMemory, Recorder>, Recorder, AdsHandle, watch::Receiver<AdsStatus>) {
        let node = Node { id: "me".into(), cluster: cluster.into(), ..Node::default() };
        let config = AdsConfig {
            backoff: Backoff { initial: Duration::from_millis(5), max: Duration::from_millis(20) },
            ..AdsConfig::new(node, vec![subscription])
        };
        let recorder = Recorder::default();
        let transport = InMemory { service: self.service.clone(), token: self.token.subscribe() };
        let (client, handle, status) = AdsClient::new(config, transport, recorder.clone());
        (client, recorder, handle, status)
    }
}

impl Running {
    async fn until(&mut self, what: &str, f: impl FnMut(&AdsStatus) -> bool) -> AdsStatus {
        match tokio::time::timeout(WAIT, self.status.wait_for(f)).await {
            Ok(Ok(status)) => status.clone(),
            other => panic!("never: {what}; {:?}", other.map(|r| r.map(|s| s.clone()))),
        }
    }

    async fn until_has(&mut self, name: &str, content: &str) {
        let recorder = self.recorder.clone();
        let has = move |_: &AdsStatus| recorder.0.lock().unwrap().now.get(name).is_some_and(|c| c == content);
        self.until(name, has).await;
    }

    fn log(&self) -> Vec<String> {
        self.recorder.0.lock().unwrap().log.clone()
    }

    async fn stop(self) {
        self.stop.send(()).unwrap();
        tokio::time::timeout(WAIT, self.task).await.unwrap().unwrap();
        assert!(!self.status.borrow().connected);
    }
}

#[tokio::test]
async fn changes_arrive_and_bad_ones_are_refused_alone() {
    let world = World::new(AdsServerConfig::default());
    world.put("a", "1", Audience::Everyone);
    let mut client = world.run("", Subscription::all(ADDRESS_TYPE));
    let status = client.until("synced", |s| s.synced).await;
    assert!(status.connected && status.last_update.is_some() && status.last_error.is_none());
    world.put("a", "bad", Audience::Everyone);
    client.until("a NACK", |s| s.nacks == 1).await;
    world.put("b", "1", Audience::Everyone);
    client.until_has("b", "1").await;
    assert_eq!(client.recorder.0.lock().unwrap().now["a"], "1", "the last good version stays");
    assert_eq!(client.log(), ["a", "a", "b"]);
    let stats = world.service.stats();
    client.stop().await;
    let read = stats.read();
    assert_eq!((read.streams, read.nacks, read.resources_refused, read.resources), (1, 1, 1, 3));
    let deadline = std::time::Instant::now() + WAIT;
    while stats.read().streams_open != 0 {
        assert!(std::time::Instant::now() < deadline, "the stream of a client that is gone stays open");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn streams_that_grow_old_are_resumed_without_sending_anything_again() {
    let config = AdsServerConfig { stream_age: Duration::from_millis(30), ..AdsServerConfig::default() };
    let world = World::new(config);
    world.put("a", "1", Audience::Everyone);
    let mut client = world.run("", Subscription::all(ADDRESS_TYPE));
    client.until("four streams", |s| s.attempts >= 4).await;
    world.put("b", "1", Audience::Everyone);
    client.until_has("b", "1").await;
    assert_eq!(client.log(), ["a", "b"]);
    client.stop().await;
}

#[tokio::test]
async fn what_a_former_process_kept_is_not_sent_again_but_for_what_is_refused_now() {
    let world = World::new(AdsServerConfig::default());
    for name in ["a", "b", "c"] {
        world.put(name, "1", Audience::Everyone);
    }
    let kept: Vec<Received> = {
        let mut client = world.run("", Subscription::all(ADDRESS_TYPE));
        client.until("synced", |s| s.synced && s.current).await;
        let mut kept = client.recorder.0.lock().unwrap().received.clone();
        client.stop().await;
        // The new process does not take what the former one took.
        kept[1].body.value = b"bad".to_vec().into();
        kept.push(Received { name: "gone".into(), ..kept[0].clone() });
        kept
    };
    let sent = world.service.stats().read().resources;
    let (mut client, recorder, mut status) = world.client("", Subscription::all(ADDRESS_TYPE));
    let changes = Changes { type_url: ADDRESS_TYPE.into(), resources: kept, removed: vec![], partial: false };
    assert_eq!(client.restore(changes).await.len(), 1);
    assert_eq!(recorder.0.lock().unwrap().now.len(), 3, "in force before there is a server");
    assert!(!status.borrow().synced && status.borrow().last_contact.is_none());
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(client.run(async { _ = stopped.await }));
    let synced = tokio::time::timeout(WAIT, status.wait_for(|s| s.synced && s.current)).await;
    assert!(synced.unwrap().unwrap().last_contact.is_none(), "the contact lasts");
    assert_eq!(world.service.stats().read().resources - sent, 1, "resources that were sent again");
    let now = recorder.0.lock().unwrap().now.clone();
    assert_eq!(now.keys().collect::<Vec<_>>(), ["a", "b", "c"]);
    stop.send(()).unwrap();
    task.await.unwrap();
    assert!(!status.borrow().current && status.borrow().last_contact.is_some());
}

#[tokio::test]
async fn a_refused_token_is_told_and_a_new_one_is_used() {
    let world = World::new(AdsServerConfig::default());
    world.token.send_replace("wrong");
    let mut client = world.run("", Subscription::all(ADDRESS_TYPE));
    let status = client.until("an error", |s| s.attempts > 2 && s.last_error.is_some()).await;
    let error = status.last_error.unwrap();
    assert!(error.contains("Unauthenticated") && error.contains("not known here"), "{error}");
    assert!(!status.synced && !status.connected);
    world.token.send_replace("right");
    client.until("synced", |s| s.synced && s.connected && s.last_error.is_none()).await;
    assert!(world.service.stats().read().streams_refused > 0);
    client.stop().await;
}

#[tokio::test]
async fn each_client_sees_what_is_for_it() {
    let world = World::new(AdsServerConfig::default());
    world.put("ours", "1", Audience::Nodemesh);
    world.put("all", "1", Audience::Everyone);
    let (mut ours, mut stock) = (
        world.run("ours", Subscription::all(ADDRESS_TYPE)),
        world.run("stock", Subscription::all(ADDRESS_TYPE)),
    );
    ours.until("synced", |s| s.synced).await;
    stock.until("synced", |s| s.synced).await;
    assert_eq!((ours.log().len(), stock.log()), (2, vec!["all".to_owned()]));
    // A resource that becomes visible, or invisible, is a change.
    world.put("ours", "1", Audience::Everyone);
    stock.until_has("ours", "1").await;
    world.put("all", "1", Audience::Nodemesh);
    let gone = stock.recorder.clone();
    stock.until("removal", move |_| !gone.0.lock().unwrap().now.contains_key("all")).await;
    ours.stop().await;
    stock.stop().await;
}

#[tokio::test]
async fn names_are_followed_on_demand() {
    let world = World::new(AdsServerConfig::default());
    world.put("a", "1", Audience::Everyone);
    world.put("b", "1", Audience::Everyone);
    let mut client = world.run("", Subscription::on_demand(ADDRESS_TYPE));
    client.until("synced", |s| s.synced).await;
    assert!(client.log().is_empty());
    assert!(client.handle.subscribe(ADDRESS_TYPE, "n/a").await);
    client.until_has("a", "1").await;
    assert!(client.handle.subscribe(ADDRESS_TYPE, "none").await);
    let log = client.recorder.clone();
    client
        .until("an answer for what is not there", move |_| {
            log.0.lock().unwrap().log.contains(&"-none".to_owned())
        })
        .await;
    assert!(client.handle.unsubscribe(ADDRESS_TYPE, "none").await);
    assert_eq!(client.log(), ["a", "-none"]);
    let handle = client.handle.clone();
    client.stop().await;
    assert!(!handle.subscribe(ADDRESS_TYPE, "b").await, "nobody is there to do it");
}

#[tokio::test]
async fn a_server_that_goes_away_leaves_the_configuration_in_force() {
    let world = World::new(AdsServerConfig::default());
    world.put("a", "1", Audience::Everyone);
    let mut client = world.run("", Subscription::all(ADDRESS_TYPE));
    client.until("synced", |s| s.synced).await;
    let World { snapshots, service, token } = world;
    drop(snapshots);
    let status = client.until("lost", |s| !s.connected && s.last_error.is_some()).await;
    assert!(status.synced, "an old configuration is better than none");
    assert_eq!(client.recorder.0.lock().unwrap().now.len(), 1);
    client.stop().await;
    drop((service, token));
}

#[tokio::test]
async fn bounds_and_the_other_variant_are_refused_with_a_reason() {
    let world = World::new(AdsServerConfig { streams: 0, ..AdsServerConfig::default() });
    let mut client = world.run("", Subscription::all(ADDRESS_TYPE));
    let status = client.until("an error", |s| s.last_error.is_some()).await;
    assert!(status.last_error.unwrap().contains("ResourceExhausted"));
    client.stop().await;

    let mut raw = AggregatedDiscoveryServiceClient::new(world.service.clone().into_server());
    let status = raw.stream_aggregated_resources(tokio_stream::empty()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    assert!(status.message().contains("use DeltaAggregatedResources"));
    let world = World::new(AdsServerConfig::default());
    let mut raw = AggregatedDiscoveryServiceClient::new(world.service.clone().into_server());
    let status = raw.delta_aggregated_resources(tokio_stream::empty()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated, "nothing is read of a stranger");
    let call = |requests: Vec<DeltaDiscoveryRequest>| {
        let mut call = Request::new(tokio_stream::iter(requests));
        call.metadata_mut().insert("authorization", "Bearer right".parse().unwrap());
        call
    };
    let status = raw.delta_aggregated_resources(call(vec![])).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let node = Some(Node { id: "x".repeat(2_000), ..Node::default() });
    let first = DeltaDiscoveryRequest { node, type_url: ADDRESS_TYPE.into(), ..Default::default() };
    let status = raw.delta_aggregated_resources(call(vec![first])).await.unwrap_err();
    assert!(status.message().contains("node.id has 2000 bytes"));
}
