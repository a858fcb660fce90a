//! Client and server against each other, over a simulated stream and clock.

use super::*;
use crate::wire::Any;
use crate::wire::core::Node;
use crate::wire::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use proptest::prelude::*;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

const T: &str = "t";

fn resource(name: &str, content: &str, alias: Option<&str>) -> Arc<Resource> {
    let body = Any { type_url: T.into(), value: content.as_bytes().to_vec().into() };
    Arc::new(Resource::new(name, alias.map(str::to_owned).into_iter().collect(), body))
}

/// Two ends, the messages between them, and what the client applied.
struct Sim {
    snapshot: Snapshot,
    limits: ServerLimits,
    server: Option<DeltaServer<Snapshot>>,
    client: DeltaClient,
    to_server: VecDeque<DeltaDiscoveryRequest>,
    to_client: VecDeque<DeltaDiscoveryResponse>,
    applied: BTreeMap<String, String>,
    now: Instant,
    /// Names that came in responses since the last `take`.
    delivered: Vec<String>,
    responses: usize,
    answers: Vec<Answer>,
}

impl Sim {
    fn new(subscription: Subscription) -> Self {
        let limits = ServerLimits { response_resources: 3, ..ServerLimits::default() };
        Self {
            snapshot: Snapshot::default(),
            limits,
            server: None,
            client: DeltaClient::new(Node::default(), ClientLimits::default(), vec![subscription]),
            to_server: VecDeque::new(),
            to_client: VecDeque::new(),
            applied: BTreeMap::new(),
            now: Instant::now(),
            delivered: Vec::new(),
            responses: 0,
            answers: Vec::new(),
        }
    }

    fn connect(&mut self) {
        self.server = Some(DeltaServer::new(self.limits.clone(), Arc::new(self.snapshot.clone()), "test"));
        self.to_server = self.client.connected().into();
    }

    fn disconnect(&mut self) {
        self.client.disconnected();
        self.server = None;
        self.to_server.clear();
        self.to_client.clear();
    }

    fn edit(&mut self, f: impl FnOnce(&mut SnapshotEdit)) {
        let mut edit = self.snapshot.edit();
        f(&mut edit);
        self.snapshot = edit.finish();
        if let Some(server) = &mut self.server {
            server.update(Arc::new(self.snapshot.clone()), self.now);
        }
    }

    fn put(&mut self, name: &str, content: &str) {
        self.edit(|e| _ = e.put(T, resource(name, content, None)));
    }

    /// One message each way, if there is one. True if something happened.
    fn step(&mut self) -> bool {
        let Some(server) = &mut self.server else { return false };
        let mut busy = false;
        if let Some(request) = self.to_server.pop_front() {
            self.answers.push(server.request(&request, self.now).unwrap());
            busy = true;
        }
        if let Some(response) = server.poll(self.now) {
            self.to_client.push_back(response);
            busy = true;
        }
        if let Some(response) = self.to_client.pop_front() {
            let update = self.client.response(response).unwrap();
            self.responses += 1;
            let mut rejections = Vec::new();
            for r in update.changes.resources {
                self.delivered.push(r.name.clone());
                let content = String::from_utf8(r.body.value.to_vec()).unwrap();
                if content.starts_with("bad") {
                    rejections.push(Rejection { name: r.name, reason: "it is bad".into() });
                } else {
                    self.applied.insert(r.name, content);
                }
            }
            for name in update.changes.removed {
                self.applied.remove(&name);
            }
            self.to_server.extend(self.client.applied(update.ticket, rejections, self.now));
            busy = true;
        }
        let due = self.client.tick(self.now);
        busy |= !due.is_empty();
        self.to_server.extend(due);
        busy
    }

    /// Lets messages and time go on until nothing happens any more.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            if self.step() {
                continue;
            }
            let server = self.server.as_ref().and_then(DeltaServer::next_wakeup);
            match [server, self.client.next_tick()].into_iter().flatten().min() {
                Some(at) => self.now = self.now.max(at),
                None => return,
            }
        }
        panic!("the two never come to rest");
    }

    fn take(&mut self) -> Vec<String> {
        let mut names = std::mem::take(&mut self.delivered);
        names.sort();
        names
    }

    /// What the client must have in the end: everything that is good, in its last version.
    fn check(&self, follows: impl Fn(&Resource) -> bool) {
        let mut left = self.applied.clone();
        self.snapshot.for_each(T, &mut |r| {
            let want = std::str::from_utf8(&r.body.value).unwrap();
            let got = left.remove(&*r.name);
            if !follows(r) {
                assert_eq!(got, None, "{} is kept though nobody follows it", r.name);
            } else if want.starts_with("bad") {
                assert!(got.is_none_or(|g| !g.starts_with("bad")));
            } else {
                assert_eq!(got.as_deref(), Some(want), "{}", r.name);
            }
        });
        assert!(left.is_empty(), "kept though removed: {left:?}");
        let held: BTreeMap<_, _> = self.client.held(T).collect();
        assert_eq!(held.len(), self.applied.len(), "{held:?} against {:?}", self.applied);
        for (name, version) in held {
            let applied = resource(name, &self.applied[name], None);
            assert_eq!(*applied.version, *version, "a version is reported that was not applied");
        }
    }
}

fn all() -> Sim {
    Sim::new(Subscription::all(T))
}

#[test]
fn an_empty_server_still_tells_that_it_is_empty() {
    let mut sim = all();
    sim.connect();
    assert!(!sim.client.synced());
    sim.settle();
    assert!(sim.client.synced());
    assert_eq!((sim.responses, sim.answers.pop()), (1, Some(Answer::Ack)));
}

#[test]
fn a_big_answer_comes_in_parts_and_synced_waits_for_the_last() {
    let mut sim = all();
    for i in 0..8 {
        sim.put(&format!("r{i}"), "good");
    }
    sim.connect();
    while sim.responses < 2 {
        sim.step();
    }
    assert!(!sim.client.synced(), "6 of 8 is not all");
    sim.settle();
    assert!(sim.client.synced());
    assert_eq!((sim.responses, sim.applied.len()), (3, 8));
}

#[test]
fn a_response_is_bounded_in_bytes_but_never_stuck() {
    let mut sim = all();
    sim.limits.response_bytes = 10;
    sim.put("a", &"x".repeat(1_000));
    sim.put("b", &"y".repeat(1_000));
    sim.connect();
    sim.settle();
    assert_eq!((sim.responses, sim.applied.len()), (2, 2));
}

#[test]
fn a_reconnect_sends_what_changed_and_nothing_else() {
    let mut sim = all();
    for i in 0..50 {
        sim.put(&format!("r{i}"), "1");
    }
    sim.connect();
    sim.settle();
    assert_eq!(sim.take().len(), 50);
    sim.disconnect();
    sim.put("r7", "2");
    sim.put("new", "1");
    sim.edit(|e| assert!(e.remove(T, "r9")));
    sim.connect();
    sim.settle();
    assert_eq!(sim.take(), ["new", "r7"]);
    sim.check(|_| true);
    sim.disconnect();
    sim.connect();
    sim.settle();
    assert!(sim.take().is_empty(), "nothing changed");
}

#[test]
fn a_new_process_resumes_from_what_the_former_one_kept() {
    let mut sim = all();
    for i in 0..50 {
        sim.put(&format!("r{i}"), "1");
    }
    sim.connect();
    sim.settle();
    sim.take();
    // As from disk: the resources and their versions, and nothing else.
    let kept: Vec<(String, String)> = sim.client.held(T).map(|(n, v)| (n.into(), v.into())).collect();
    sim.disconnect();
    sim.client = DeltaClient::new(Node::default(), ClientLimits::default(), vec![Subscription::all(T)]);
    sim.client.restored(T, kept);
    assert!(!sim.client.synced() && !sim.client.current(), "the server has said nothing yet");
    sim.put("r7", "2");
    sim.edit(|e| assert!(e.remove(T, "r9")));
    sim.connect();
    sim.settle();
    assert!(sim.client.synced() && sim.client.current());
    assert_eq!(sim.take(), ["r7"]);
    assert!(!sim.applied.contains_key("r9"));
    sim.check(|_| true);
    sim.disconnect();
    assert!(sim.client.synced() && !sim.client.current(), "in force, but of an earlier time");
}

#[test]
fn only_the_latest_version_of_what_changes_while_an_answer_is_open_is_sent() {
    let mut sim = all();
    sim.connect();
    sim.settle();
    sim.put("a", "1");
    let server = sim.server.as_mut().unwrap();
    let open = server.poll(sim.now).unwrap();
    for i in 2..50 {
        sim.put("a", &i.to_string());
    }
    assert!(sim.server.as_mut().unwrap().poll(sim.now).is_none(), "one response in flight");
    sim.to_client.push_back(open);
    sim.settle();
    assert_eq!(sim.take(), ["a", "a"]);
    assert_eq!(sim.applied["a"], "49");
}

#[test]
fn a_refused_resource_harms_no_other_and_is_not_sent_again_until_it_changes() {
    let mut sim = all();
    sim.put("a", "1");
    sim.connect();
    sim.settle();
    sim.edit(|e| {
        e.put(T, resource("a", "bad", None));
        e.put(T, resource("b", "1", None));
    });
    sim.take();
    sim.settle();
    assert_eq!(sim.take(), ["a", "b"]);
    assert_eq!((sim.applied["a"].as_str(), sim.applied["b"].as_str()), ("1", "1"));
    let Some(Answer::Nack { message, names }) = sim.answers.pop() else { panic!("{:?}", sim.answers) };
    assert_eq!(names, [Arc::from("a")], "the good one is not blamed");
    assert_eq!(message, "1 of 2 resources refused: a: it is bad");
    sim.put("c", "1");
    sim.settle();
    assert_eq!(sim.take(), ["c"]);
    sim.check(|_| true);
    // Good again: after its back-off.
    let before = sim.now;
    sim.put("a", "2");
    sim.settle();
    assert_eq!(sim.applied["a"], "2");
    assert!(sim.now > before, "it had to wait");
}

#[test]
fn a_refused_version_that_comes_back_is_still_refused() {
    let mut sim = all();
    sim.put("a", "bad");
    sim.connect();
    sim.settle();
    assert_eq!(sim.take(), ["a"]);
    // Replaced, which has to wait, and put back before the wait is over.
    sim.put("a", "good");
    sim.step();
    sim.put("a", "bad");
    sim.settle();
    assert!(sim.take().is_empty());
    assert!(sim.server.as_ref().unwrap().next_wakeup().is_none());
}

#[test]
fn what_changes_while_a_refusal_is_on_its_way_waits_or_stays_away_too() {
    for (meanwhile, want) in [(["bad 2", "bad 3"], 1), (["good", "bad"], 0)] {
        let mut sim = all();
        sim.connect();
        sim.settle();
        sim.put("a", "bad");
        let open = sim.server.as_mut().unwrap().poll(sim.now).unwrap();
        meanwhile.iter().for_each(|content| sim.put("a", content));
        sim.to_client.push_back(open);
        let before = sim.now;
        while sim.step() {}
        assert_eq!(sim.take(), ["a"], "{meanwhile:?}: nothing more at once");
        sim.settle();
        assert_eq!(sim.take().len(), want, "{meanwhile:?}");
        assert_eq!(sim.now > before, want > 0);
    }
}

#[test]
fn a_removal_is_not_held_back_by_a_refusal() {
    let mut sim = all();
    sim.put("a", "good");
    sim.connect();
    sim.settle();
    sim.put("a", "bad");
    let open = sim.server.as_mut().unwrap().poll(sim.now).unwrap();
    sim.edit(|e| assert!(e.remove(T, "a")));
    sim.to_client.push_back(open);
    while sim.step() {}
    sim.check(|_| true);
}

#[test]
fn a_resource_that_is_asked_for_by_name_and_alias_comes_once() {
    let mut sim = Sim::new(Subscription::on_demand(T));
    sim.edit(|e| _ = e.put(T, resource("a", "1", Some("n/1"))));
    sim.connect();
    sim.settle();
    sim.to_server.extend(sim.client.subscribe(T, &["a".to_owned(), "n/1".to_owned()]));
    sim.settle();
    assert_eq!((sim.take(), sim.client.nacks()), (vec!["a".to_owned()], 0));
}

#[test]
fn a_resource_that_is_refused_again_and_again_is_sent_ever_less_often() {
    let mut sim = all();
    sim.put("a", "bad 0");
    sim.connect();
    sim.settle();
    let start = sim.now;
    for i in 1..=6 {
        sim.put("a", &format!("bad {i}"));
        sim.settle();
    }
    assert_eq!(sim.now - start, Duration::from_secs(1 + 2 + 4 + 8 + 16 + 32));
}

#[test]
fn a_server_that_repeats_a_refused_version_waits_ever_longer_for_its_answer() {
    let mut client = DeltaClient::new(Node::default(), ClientLimits::default(), vec![Subscription::all(T)]);
    client.connected();
    let mut now = Instant::now();
    let mut waits = Vec::new();
    for i in 0..10 {
        let bad = crate::wire::discovery::Resource {
            version: "v2".into(),
            name: "a".into(),
            resource: Some(Any::default()),
            ..Default::default()
        };
        let response = DeltaDiscoveryResponse {
            type_url: T.into(),
            nonce: i.to_string(),
            resources: vec![bad],
            ..Default::default()
        };
        let update = client.response(response).unwrap();
        let rejection = Rejection { name: "a".into(), reason: "no".into() };
        let answer = client.applied(update.ticket, vec![rejection], now);
        assert_eq!(answer.is_some(), i == 0, "the first NACK is sent at once");
        if let Some(at) = client.next_tick() {
            assert!(client.tick(now).is_empty());
            waits.push((at - now).as_millis());
            now = at;
            assert_eq!(client.tick(now).len(), 1);
        }
    }
    assert_eq!(waits, [200, 400, 800, 1_600, 3_200, 6_400, 10_000, 10_000, 10_000]);
    assert_eq!(client.held(T).count(), 0, "a refused version is not reported as held");
    client.disconnected();
    assert!(client.connected()[0].initial_resource_versions.is_empty());
}

#[test]
fn a_foreign_client_that_names_nothing_in_its_nack_gets_no_copy_either() {
    let mut sim = all();
    sim.put("a", "1");
    sim.connect();
    let server = sim.server.as_mut().unwrap();
    server.request(&sim.to_server[0], sim.now).unwrap();
    let response = server.poll(sim.now).unwrap();
    let nack = DeltaDiscoveryRequest {
        type_url: T.into(),
        response_nonce: response.nonce,
        error_detail: Some(crate::wire::rpc::Status { code: 3, message: "no".into(), details: vec![] }),
        ..Default::default()
    };
    let Answer::Nack { names, .. } = server.request(&nack, sim.now).unwrap() else { panic!("not a NACK") };
    assert_eq!(names.len(), 1);
    assert_eq!(server.request(&nack, sim.now).unwrap(), Answer::Stale, "an answer counts once");
    assert!(server.poll(sim.now).is_none());
    assert!(server.next_wakeup().is_none());
}

#[test]
fn on_demand_names_and_aliases_are_answered_and_followed() {
    let mut sim = Sim::new(Subscription::on_demand(T));
    sim.edit(|e| {
        e.put(T, resource("a", "1", Some("n/10.0.0.1")));
        e.put(T, resource("b", "1", Some("n/10.0.0.2")));
    });
    sim.connect();
    sim.settle();
    assert!(sim.client.synced() && sim.take().is_empty(), "nothing was asked for");
    for name in ["n/10.0.0.1", "none"] {
        sim.to_server.extend(sim.client.subscribe(T, &[name.to_owned()]));
    }
    sim.settle();
    assert_eq!(sim.take(), ["a"]);
    let answered = sim.responses;
    // The address moves to b; a is no longer what was asked for.
    sim.edit(|e| {
        e.put(T, resource("a", "1", None));
        e.put(T, resource("b", "1", Some("n/10.0.0.1")));
    });
    sim.settle();
    assert_eq!(sim.applied.keys().collect::<Vec<_>>(), ["b"]);
    assert!(sim.responses > answered);
    // Asked for again, a name is answered again.
    sim.take();
    sim.to_server.extend(sim.client.subscribe(T, &["n/10.0.0.1".to_owned()]));
    sim.settle();
    assert_eq!(sim.take(), ["b"]);
    // A reconnect takes the names along.
    sim.disconnect();
    sim.edit(|e| _ = e.put(T, resource("none", "1", None)));
    sim.connect();
    sim.settle();
    assert_eq!(sim.take(), ["none"]);
}

#[test]
fn leaving_the_wildcard_keeps_the_names() {
    let mut names = Subscription::all(T);
    names.names.insert("a".into());
    let mut sim = Sim::new(names);
    sim.put("a", "1");
    sim.put("b", "1");
    sim.connect();
    sim.settle();
    assert_eq!(sim.take(), ["a", "b"]);
    let request = |unsubscribe: &str| DeltaDiscoveryRequest {
        type_url: T.into(),
        resource_names_unsubscribe: vec![unsubscribe.into()],
        ..Default::default()
    };
    // Dropped by name, it comes back through the wildcard.
    sim.to_server.push_back(request("a"));
    sim.settle();
    assert_eq!(sim.take(), ["a"]);
    sim.to_server.push_back(request(WILDCARD));
    sim.settle();
    sim.put("b", "2");
    sim.put("a", "2");
    sim.settle();
    assert!(sim.take().is_empty());
}

#[test]
fn responses_that_cannot_be_used_are_errors_and_change_nothing() {
    let mut client = DeltaClient::new(Node::default(), ClientLimits::default(), vec![Subscription::all(T)]);
    let response = |type_url: &str, nonce: &str| DeltaDiscoveryResponse {
        type_url: type_url.into(),
        nonce: nonce.into(),
        ..Default::default()
    };
    assert!(matches!(client.response(response(T, "1")), Err(ClientError::NotConnected { .. })));
    client.connected();
    assert!(matches!(client.response(response("u", "1")), Err(ClientError::UnknownType { .. })));
    assert!(matches!(client.response(response(T, "")), Err(ClientError::NoNonce { .. })));
    let old = client.response(response(T, "1")).unwrap();
    assert!(matches!(client.response(response(T, "1")), Err(ClientError::Repeated { .. })));
    client.disconnected();
    client.connected();
    let late = client.applied(old.ticket, vec![], Instant::now());
    assert_eq!(late, None, "a nonce of an older stream is not acknowledged on a newer one");
}

#[test]
fn bounds_are_kept_on_both_sides() {
    let limits = ClientLimits { resources: 2, name_bytes: 4, ..ClientLimits::default() };
    let mut client = DeltaClient::new(Node::default(), limits, vec![Subscription::all(T)]);
    client.connected();
    let resources = ["a", "b", "c", "too long", "", "a"]
        .map(|name| crate::wire::discovery::Resource {
            name: name.into(),
            resource: Some(Any::default()),
            ..Default::default()
        })
        .into();
    let response =
        DeltaDiscoveryResponse { type_url: T.into(), nonce: "1".into(), resources, ..Default::default() };
    let update = client.response(response).unwrap();
    assert_eq!(update.changes.resources.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    let nack = client.applied(update.ticket, vec![], Instant::now()).unwrap().error_detail.unwrap();
    assert!(nack.message.starts_with("4 of 6 resources refused"), "{}", nack.message);

    let limits = ServerLimits { subscriptions: 1, name_bytes: 4, types: 1, ..ServerLimits::default() };
    let mut server = DeltaServer::new(limits, Arc::new(Snapshot::default()), "test");
    let request = |type_url: &str, names: &[&str]| DeltaDiscoveryRequest {
        type_url: type_url.into(),
        resource_names_subscribe: names.iter().map(ToString::to_string).collect(),
        ..Default::default()
    };
    let now = Instant::now();
    assert_eq!(server.request(&request("", &[]), now), Err(ProtocolError::NoType));
    assert_eq!(server.request(&request(T, &["a"]), now), Ok(Answer::None));
    assert!(matches!(server.request(&request("u", &[]), now), Err(ProtocolError::Types { .. })));
    assert!(matches!(server.request(&request(T, &["too long"]), now), Err(ProtocolError::Name { .. })));
    assert!(matches!(server.request(&request(T, &["b"]), now), Err(ProtocolError::Subscriptions { .. })));
}

#[derive(Clone, Debug)]
enum Op {
    Put(u8, u8),
    Remove(u8),
    Steps(u8),
    Disconnect,
    Connect,
    Wait(u16),
    Subscribe(u8),
    Unsubscribe(u8),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => (0u8..12, 0u8..6).prop_map(|(n, c)| Op::Put(n, c)),
        3 => (0u8..12).prop_map(Op::Remove),
        6 => (1u8..6).prop_map(Op::Steps),
        1 => Just(Op::Disconnect),
        1 => Just(Op::Connect),
        1 => (0u16..3_000).prop_map(Op::Wait),
        2 => (0u8..12).prop_map(Op::Subscribe),
        2 => (0u8..12).prop_map(Op::Unsubscribe),
    ];
    prop::collection::vec(op, 1..120)
}

fn play(sim: &mut Sim, ops: Vec<Op>, by_name: bool) {
    let name = |n: u8| format!("r{n}");
    for op in ops {
        match op {
            // One in three contents is refused.
            Op::Put(n, c) => sim.put(&name(n), &format!("{}{c}", if c % 3 == 0 { "bad" } else { "good" })),
            Op::Remove(n) => sim.edit(|e| _ = e.remove(T, &name(n))),
            Op::Steps(n) => (0..n).for_each(|_| _ = sim.step()),
            Op::Disconnect => sim.disconnect(),
            Op::Connect => {
                sim.disconnect();
                sim.connect();
            }
            Op::Wait(ms) => sim.now += Duration::from_millis(ms.into()),
            Op::Subscribe(n) if by_name => sim.to_server.extend(sim.client.subscribe(T, &[name(n)])),
            Op::Unsubscribe(n) if by_name => {
                // Who unsubscribes drops the resource.
                sim.to_server.extend(sim.client.unsubscribe(T, &[name(n)]));
                sim.applied.remove(&name(n));
            }
            Op::Subscribe(_) | Op::Unsubscribe(_) => {}
        }
    }
    if sim.server.is_none() {
        sim.connect();
    }
    sim.settle();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_both_ends_agree_in_the_end(ops in ops()) {
        let mut sim = all();
        play(&mut sim, ops, false);
        sim.check(|_| true);
        prop_assert!(sim.client.synced());
        // And then a reconnect has nothing to say, but for what was refused.
        sim.take();
        sim.disconnect();
        sim.connect();
        sim.settle();
        for name in sim.take() {
            let now = sim.snapshot.get(T, &name).unwrap();
            prop_assert!(now.body.value.starts_with(b"bad"), "{} was sent again", name);
        }
        sim.check(|_| true);
    }

    #[test]
    fn with_names_too(ops in ops()) {
        let mut sim = Sim::new(Subscription::on_demand(T));
        play(&mut sim, ops, true);
        let names = sim.client.names(T);
        sim.check(|r| names.contains(&*r.name));
    }
}
