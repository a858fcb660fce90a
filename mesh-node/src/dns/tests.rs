use super::{
    cache::{Cache, Key},
    names::{Asked, Reply, Zone},
    query::{self, Incoming, Query},
    reply, upstream,
};
use crate::{
    plan::NodeView,
    state::{
        Batch, Store, World,
        testing::{backs, pod, service},
    },
};
use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query as Question, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata},
};
use mesh_xds::model::{Health, Protocol};
use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

/// `cart`: dual-stack with named ports. `db`: headless with db-0 (host name) and one without; a third is not ready.
/// Outside of the cluster's domain: `api.example.com`, `*.wild.example.com`.
fn world() -> Arc<World> {
    let mut cart = service("cart", "shop", "10.96.0.1", &[(80, 8080), (81, 8081)]);
    cart.addresses
        .push(mesh_xds::model::ServiceAddress { network: String::new(), ip: "fd00:96::1".parse().unwrap() });
    cart.port_names = [((80, Protocol::Tcp), "http".to_owned())].into();
    let mut db = service("db", "shop", "10.96.0.2", &[(5432, 5433)]);
    db.addresses.clear();
    db.port_names = [((5432, Protocol::Tcp), "sql".to_owned())].into();
    let mut empty = service("empty", "shop", "10.96.0.3", &[(80, 80)]);
    empty.addresses.clear();
    let mut api = service("api", "shop", "10.96.0.4", &[(443, 443)]);
    api.hostname = "api.Example.com".into();
    let mut wild = service("wild", "shop", "10.96.0.5", &[(443, 443)]);
    wild.hostname = "*.wild.example.com".into();
    let mut other = service("api", "aaa", "10.96.0.6", &[(443, 443)]);
    other.hostname = "api.example.com".into();

    let mut named = backs(pod("db-0", "shop", "10.0.0.1"), &db);
    named.addresses.push("fd00::1".parse().unwrap());
    named.services.get_mut(&db.key()).unwrap().hostname = "DB-0".into();
    let mut unready = backs(pod("db-2", "shop", "10.0.0.3"), &db);
    unready.health = Health::Unhealthy;
    let workloads = vec![named, backs(pod("db-1", "shop", "10.0.0.2"), &db), unready];
    let services = vec![cart, db, empty, api, wild, other];
    Store::default().stage(Batch { workloads, services, ..Batch::default() }).complete
}

fn name(text: &str) -> Name {
    let mut name = Name::from_ascii(text).unwrap();
    name.set_fqdn(true);
    name
}

fn zone() -> Zone {
    Zone::new("cluster.local").unwrap()
}

fn ask(text: &str, kind: RecordType) -> Reply {
    let (world, node) = (world(), NodeView::default());
    let lower = text.to_ascii_lowercase();
    let name = name(text);
    let asked = Asked {
        world: &world,
        node: &node,
        zone: &zone(),
        namespace: "shop",
        name: &name,
        lower: &lower,
        kind,
    };
    asked.answer()
}

/// The answers' data in text, sorted; `None` for "no such name".
fn data(text: &str, kind: RecordType) -> Option<Vec<String>> {
    match ask(text, kind) {
        Reply::Records { answers, .. } => {
            let owner = name(text);
            assert!(answers.iter().all(|r| r.name.eq_case(&owner)), "{answers:?}");
            let mut all: Vec<_> = answers.iter().map(|r| r.data.to_string()).collect();
            all.sort();
            Some(all)
        }
        Reply::NoName => None,
        elsewhere @ Reply::Elsewhere { .. } => panic!("{text}: {elsewhere:?}"),
    }
}

#[test]
fn names_of_services_endpoints_ports_and_addresses() {
    use RecordType as T;
    let none: &[&str] = &[];
    let cases: &[(&str, T, Option<&[&str]>)] = &[
        ("cart.shop.svc.cluster.local", T::A, Some(&["10.96.0.1"])),
        ("CART.Shop.svc.cluster.local", T::A, Some(&["10.96.0.1"])),
        ("cart.shop.svc.cluster.local", T::AAAA, Some(&["fd00:96::1"])),
        ("cart.shop.svc.cluster.local", T::ANY, Some(&["10.96.0.1", "fd00:96::1"])),
        ("cart.shop.svc.cluster.local", T::MX, Some(none)),
        (
            "cart.shop.svc.cluster.local",
            T::SRV,
            Some(&["0 100 80 cart.shop.svc.cluster.local.", "0 100 81 cart.shop.svc.cluster.local."]),
        ),
        ("_http._tcp.cart.shop.svc.cluster.local", T::SRV, Some(&["0 100 80 cart.shop.svc.cluster.local."])),
        ("_http._tcp.cart.shop.svc.cluster.local", T::A, Some(none)),
        ("_tcp.cart.shop.svc.cluster.local", T::SRV, Some(none)),
        ("_udp.cart.shop.svc.cluster.local", T::SRV, None),
        ("_http._udp.cart.shop.svc.cluster.local", T::SRV, None),
        ("_ftp._tcp.cart.shop.svc.cluster.local", T::SRV, None),
        ("nobody.cart.shop.svc.cluster.local", T::A, None),
        ("a.b.cart.shop.svc.cluster.local", T::A, None),
        ("db.shop.svc.cluster.local", T::A, Some(&["10.0.0.1", "10.0.0.2"])),
        ("db.shop.svc.cluster.local", T::AAAA, Some(&["fd00::1"])),
        ("db-0.db.shop.svc.cluster.local", T::A, Some(&["10.0.0.1"])),
        ("db-0.db.shop.svc.cluster.local", T::AAAA, Some(&["fd00::1"])),
        ("10-0-0-1.db.shop.svc.cluster.local", T::A, None),
        ("10-0-0-2.db.shop.svc.cluster.local", T::A, Some(&["10.0.0.2"])),
        ("10-0-0-2.db.shop.svc.cluster.local", T::AAAA, Some(none)),
        ("10-0-0-3.db.shop.svc.cluster.local", T::A, None),
        (
            "_sql._tcp.db.shop.svc.cluster.local",
            T::SRV,
            Some(&[
                "0 100 5433 10-0-0-2.db.shop.svc.cluster.local.",
                "0 100 5433 db-0.db.shop.svc.cluster.local.",
            ]),
        ),
        ("empty.shop.svc.cluster.local", T::A, None),
        ("10-0-0-1.shop.pod.cluster.local", T::A, Some(&["10.0.0.1"])),
        ("10-0-0-1.shop.pod.cluster.local", T::AAAA, Some(none)),
        ("fd00--1.shop.pod.cluster.local", T::AAAA, Some(&["fd00::1"])),
        ("1.0.96.10.in-addr.arpa", T::PTR, Some(&["cart.shop.svc.cluster.local."])),
        ("1.0.96.10.in-addr.arpa", T::A, Some(none)),
        ("1.0.0.10.in-addr.arpa", T::PTR, Some(&["DB-0.db.shop.svc.cluster.local."])),
        ("2.0.0.10.in-addr.arpa", T::PTR, Some(&["10-0-0-2.db.shop.svc.cluster.local."])),
        (
            "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.0.d.f.ip6.arpa",
            T::PTR,
            Some(&["cart.shop.svc.cluster.local."]),
        ),
        ("api.example.com", T::A, Some(&["10.96.0.4"])),
        ("api.example.com", T::AAAA, Some(none)),
        ("api.example.com", T::HTTPS, Some(none)),
        ("a.b.wild.example.com", T::A, Some(&["10.96.0.5"])),
    ];
    for (name, kind, expected) in cases {
        let expected = expected.map(|all| all.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>());
        assert_eq!(data(name, *kind), expected, "{name} {kind}");
    }
    for (name, kind, in_cluster) in [
        ("example.com", T::A, false),
        ("wild.example.com", T::A, false),
        ("api.example.com", T::MX, false),
        ("cluster.local", T::SOA, false),
        ("example.com.shop.svc.cluster.local", T::A, true),
        ("unknown.shop.svc.cluster.local", T::A, true),
        ("10-0-0-1.other.pod.cluster.local", T::A, true),
        ("10-0-0-9.shop.pod.cluster.local", T::A, true),
        ("9.0.0.10.in-addr.arpa", T::PTR, false),
        ("3.0.0.10.in-addr.arpa", T::PTR, false),
        ("0.10.in-addr.arpa", T::PTR, false),
        ("x.in-addr.arpa", T::PTR, false),
    ] {
        assert_eq!(ask(name, kind), Reply::Elsewhere { cluster: in_cluster }, "{name} {kind}");
    }
}

#[test]
fn srv_answers_bring_the_addresses_of_their_targets() {
    let Reply::Records { additionals, .. } = ask("_sql._tcp.db.shop.svc.cluster.local", RecordType::SRV)
    else {
        panic!()
    };
    let mut found: Vec<_> = additionals.iter().map(|r| format!("{} {}", r.name, r.data)).collect();
    found.sort();
    assert_eq!(
        found,
        [
            "10-0-0-2.db.shop.svc.cluster.local. 10.0.0.2",
            "db-0.db.shop.svc.cluster.local. 10.0.0.1",
            "db-0.db.shop.svc.cluster.local. fd00::1"
        ]
    );
}

/// A query as bytes.
fn wire(text: &str, kind: RecordType, size: Option<u16>) -> Vec<u8> {
    let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Question::query(name(text), kind));
    if let Some(size) = size {
        let mut edns = Edns::new();
        edns.set_max_payload(size);
        message.set_edns(edns);
    }
    message.to_vec().unwrap()
}

fn read(message: &[u8]) -> Box<Query> {
    match query::read(message) {
        Incoming::Question(query) => query,
        other => panic!("{other:?}"),
    }
}

#[test]
fn answers_keep_id_and_spelling_and_say_who_answers() {
    let message = wire("CaRt.shop.svc.cluster.local", RecordType::A, Some(1400));
    let query = read(&message);
    let reply = ask("CaRt.shop.svc.cluster.local", RecordType::A);
    let answer = Message::from_vec(&reply::mesh(&query, reply, &zone().name, 1400).unwrap()).unwrap();
    assert_eq!((answer.metadata.id, answer.metadata.response_code), (0x1234, ResponseCode::NoError));
    assert!(answer.metadata.authoritative && answer.metadata.recursion_desired);
    assert!(answer.queries[0].name.eq_case(&name("CaRt.shop.svc.cluster.local")));
    assert!(answer.answers[0].name.eq_case(&name("CaRt.shop.svc.cluster.local")));
    assert!(answer.edns.is_some(), "a client with EDNS gets EDNS");

    let classic = read(&wire("nobody.cart.shop.svc.cluster.local", RecordType::A, None));
    let answer =
        Message::from_vec(&reply::mesh(&classic, Reply::NoName, &zone().name, 512).unwrap()).unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    assert!(answer.edns.is_none());
    let soa = &answer.authorities[0];
    assert_eq!((soa.record_type(), soa.name.to_string()), (RecordType::SOA, "cluster.local.".to_owned()));
}

#[test]
fn a_long_answer_is_cut_to_what_the_client_takes() {
    let owner = name("db.shop.svc.cluster.local");
    let records = |count: u32| {
        let record = |n: u32| Record::from_rdata(owner.clone(), 5, RData::A(rdata::A(n.into())));
        Reply::Records { answers: (1..=count).map(record).collect(), additionals: vec![] }
    };
    for (size, count, cut) in
        [(None, 20, false), (None, 40, true), (Some(4096), 40, false), (Some(600), 60, true)]
    {
        let query = read(&wire("db.shop.svc.cluster.local", RecordType::A, size));
        let bytes = reply::mesh(&query, records(count), &zone().name, query.udp_size()).unwrap();
        assert!(bytes.len() <= query.udp_size(), "{} > {}", bytes.len(), query.udp_size());
        let answer = Message::from_vec(&bytes).unwrap();
        assert_eq!(answer.metadata.truncation, cut, "{size:?} {count}");
        let got = u32::try_from(answer.answers.len()).unwrap();
        assert!(if cut { got > 15 && got < count } else { got == count }, "{got} of {count}");
        assert_eq!(answer.edns.is_some(), size.is_some());
    }
    // The order changes, so that not every client takes the first.
    let query = read(&wire("db.shop.svc.cluster.local", RecordType::A, None));
    let first = |_| {
        let bytes = reply::mesh(&query, records(10), &zone().name, 512).unwrap();
        Message::from_vec(&bytes).unwrap().answers[0].data.to_string()
    };
    let firsts: std::collections::BTreeSet<String> = (0..200).map(first).collect();
    assert!(firsts.len() > 5, "{firsts:?}");
}

#[test]
fn bad_messages() {
    let good = wire("cart.shop.svc.cluster.local", RecordType::A, Some(1232));
    let with = |at: usize, byte: u8| {
        let mut message = good.clone();
        message[at] = byte;
        message
    };
    // A name that points to itself, and one that points past the end.
    let looping = [&good[..12], &[0xc0, 12, 0, 1, 0, 1]].concat();
    let beyond = [&good[..12], &[0xc0, 0xff, 0, 1, 0, 1]].concat();
    let into_header = [&good[..12], &[0xc0, 4, 0, 1, 0, 1]].concat();
    let long_label = [&good[..12], &[0x80, 1, 0, 0, 1, 0, 1]].concat();
    let long_name = [&good[..12], &[[63; 64]; 5].concat(), &[0, 0, 1, 0, 1]].concat();
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", vec![], "Ignored"),
        ("short", good[..11].to_vec(), "Ignored"),
        ("an answer", with(2, 0x81), "Ignored"),
        ("a notification", with(2, 0x20), "Other"),
        ("an update", with(2, 0x28), "Other"),
        ("no question", with(5, 0), "Malformed"),
        ("two questions", with(5, 2), "Malformed"),
        ("65,281 questions", with(4, 255), "Malformed"),
        ("cut in the name", good[..20].to_vec(), "Malformed"),
        ("cut in the type", good[..12 + 29 + 2].to_vec(), "Malformed"),
        ("a loop", looping, "Malformed"),
        ("past the end", beyond, "Malformed"),
        ("into the header", into_header, "Malformed"),
        ("a reserved label", long_label, "Malformed"),
        ("a name of 320 bytes", long_name, "Malformed"),
        ("cut in the options", good[..good.len() - 3].to_vec(), "Question"),
        ("garbage", vec![0x41; 600], "Other"),
        ("zeros", vec![0; 600], "Malformed"),
    ];
    for (what, message, expected) in cases {
        let incoming = query::read(&message);
        assert!(format!("{incoming:?}").starts_with(expected), "{what}: {incoming:?}");
        if expected == "Malformed" {
            let answer = Message::from_vec(&reply::malformed(&message).unwrap()).unwrap();
            assert_eq!(answer.metadata.response_code, ResponseCode::FormErr, "{what}");
            assert_eq!(answer.metadata.id.to_be_bytes(), message[..2], "{what}");
        }
    }
    // Whatever comes, nothing panics and nothing is answered with more than was sent, but for the header.
    let mut state = 1_u64;
    for round in 0..20_000 {
        let mut message = good.clone();
        for _ in 0..=round % 4 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let at = (state >> 33) as usize % message.len();
            message[at] = (state >> 24) as u8;
        }
        message.truncate((state >> 40) as usize % (good.len() + 1));
        let _ = query::read(&message);
        let _ = upstream::answers(&good, Some(good.len()), &message);
    }
}

fn answer_to(asked: &[u8], ttl: u32, kind: ResponseCode) -> Vec<u8> {
    let query = Message::from_vec(asked).unwrap();
    let mut answer = Message::response(query.metadata.id, OpCode::Query);
    answer.metadata.response_code = kind;
    answer.add_query(query.queries[0].clone());
    let owner = query.queries[0].name.clone();
    if kind == ResponseCode::NoError {
        answer.add_answer(Record::from_rdata(owner, ttl, RData::A(rdata::A([192, 0, 2, 1].into()))));
    } else if ttl > 0 {
        let soa = rdata::SOA::new(Name::root(), Name::root(), 1, 2, 3, 4, ttl);
        answer.add_authority(Record::from_rdata(name("example.com"), 900, RData::SOA(soa)));
    }
    if query.edns.is_some() {
        answer.set_edns(Edns::new());
    }
    answer.to_vec().unwrap()
}

#[test]
fn an_upstream_answer_has_to_fit_its_query() {
    let asked = wire("example.com", RecordType::A, None);
    let length = read(&asked).question_end;
    let end = Some(length);
    let good = answer_to(&asked, 60, ResponseCode::NoError);
    let with = |at: usize, byte: u8| {
        let mut message = good.clone();
        message[at] = byte;
        message
    };
    assert!(upstream::answers(&asked, end, &good));
    assert!(upstream::answers(&asked, end, &with(13, b'E')), "a server may change the spelling");
    for (what, bad) in [
        ("another id", with(0, 0)),
        ("a query", with(2, 1)),
        ("another operation", with(2, 0xa0)),
        ("another name", with(13, b'f')),
        ("another type", with(length - 3, 28)),
        ("two questions", with(5, 2)),
        ("no question and no error", with(5, 0)),
        ("cut off", good[..11].to_vec()),
    ] {
        assert!(!upstream::answers(&asked, end, &bad), "{what}");
    }
    let mut refused = good[..12].to_vec();
    (refused[3], refused[5]) = (0x85, 0);
    assert!(upstream::answers(&asked, end, &refused), "a server that refuses may leave the question out");
}

#[test]
fn the_cache_counts_down_and_gives_each_client_its_own_id_and_spelling() {
    let server: SocketAddr = "10.96.0.10:53".parse().unwrap();
    let mut cache = Cache::default();
    let (now, later) = (Instant::now(), |s| Instant::now() + Duration::from_secs(s));
    let asked = wire("example.com", RecordType::A, None);
    let query = read(&asked);
    let key = |q: &Query| Key::new(server, q).unwrap();
    cache.put(key(&query), &answer_to(&asked, 60, ResponseCode::NoError), now);

    let mut again = wire("eXample.COM", RecordType::A, None);
    again[0] = 0x77;
    let other = read(&again);
    let found = cache.get(&key(&other), &other, &again, later(10)).unwrap();
    let message = Message::from_vec(&found).unwrap();
    assert_eq!(message.metadata.id, 0x7734);
    assert!(message.queries[0].name.eq_case(&name("eXample.COM")));
    assert!((49..=50).contains(&message.answers[0].ttl), "{}", message.answers[0].ttl);
    assert!(cache.get(&key(&other), &other, &again, later(61)).is_none(), "no longer than the time to live");

    for (what, different) in [
        ("EDNS", wire("example.com", RecordType::A, Some(1232))),
        ("type", wire("example.com", RecordType::AAAA, None)),
        ("name", wire("example.org", RecordType::A, None)),
    ] {
        let query = read(&different);
        assert!(cache.get(&key(&query), &query, &different, now).is_none(), "{what}");
    }
    let elsewhere = Key::new("10.96.0.11:53".parse().unwrap(), &query).unwrap();
    assert!(cache.get(&elsewhere, &query, &asked, now).is_none(), "another nameserver");
}

#[test]
fn failures_are_not_kept_and_nothing_only_as_long_as_the_zone_says() {
    let server: SocketAddr = "[fd00::53]:53".parse().unwrap();
    let asked = wire("nothing.example.com", RecordType::A, Some(1232));
    let query = read(&asked);
    for (answer, kept) in [
        (answer_to(&asked, 30, ResponseCode::NXDomain), Some(30)),
        (answer_to(&asked, 4000, ResponseCode::NXDomain), Some(60)),
        (answer_to(&asked, 0, ResponseCode::NXDomain), None),
        (answer_to(&asked, 30, ResponseCode::ServFail), None),
        (answer_to(&asked, 0, ResponseCode::NoError), None),
        (answer_to(&asked, u32::MAX, ResponseCode::NoError), None),
        (answer_to(&asked, 86_400, ResponseCode::NoError), Some(3600)),
        (answer_to(&asked, 30, ResponseCode::NoError)[..40].to_vec(), None),
    ] {
        let mut cache = Cache::default();
        let now = Instant::now();
        cache.put(Key::new(server, &query).unwrap(), &answer, now);
        let at = |s| {
            let key = Key::new(server, &query).unwrap();
            cache.get(&key, &query, &asked, now + Duration::from_secs(s)).is_some()
        };
        assert_eq!(at(0), kept.is_some(), "{answer:?}");
        if let Some(kept) = kept {
            assert!(at(kept - 1) && !at(kept), "{kept}");
        }
    }
}

#[test]
fn the_cache_is_bounded() {
    let server: SocketAddr = "10.96.0.10:53".parse().unwrap();
    let mut cache = Cache::default();
    let now = Instant::now();
    let key = |n: u32| {
        let asked = wire(&format!("n{n}.example.com"), RecordType::A, None);
        let query = read(&asked);
        (Key::new(server, &query).unwrap(), query, asked)
    };
    for n in 0..9000 {
        let (key, _, asked) = key(n);
        cache.put(key, &answer_to(&asked, 60, ResponseCode::NoError), now);
    }
    let (entries, bytes) = cache.size();
    assert!(entries <= 8192 && bytes <= 4 << 20, "{entries} {bytes}");
    let has = |n| {
        let (key, query, asked) = key(n);
        cache.get(&key, &query, &asked, now).is_some()
    };
    assert!(has(8999) && !has(0), "the oldest go first");
    // Nor does a name that is fetched again and again grow the queue.
    for _ in 0..50_000 {
        let (key, _, asked) = key(8999);
        cache.put(key, &answer_to(&asked, 60, ResponseCode::NoError), now);
    }
    let (entries, bytes) = cache.size();
    assert!(entries >= 1 && bytes <= 4 << 20, "{entries} {bytes}");
}

#[test]
fn a_nameserver_behind_a_service_is_asked_directly() {
    let mut kube = service("kube-dns", "kube-system", "10.96.0.10", &[(53, 5353)]);
    kube.ports[0].protocol = Protocol::Udp;
    let mut server = pod("coredns", "kube-system", "10.0.0.9");
    let ports = vec![mesh_xds::model::TargetPort { service_port: 53, target_port: 5353 }];
    server.services.entry(kube.key()).or_default().udp = ports;
    let world = Store::default()
        .stage(Batch { workloads: vec![server], services: vec![kube], ..Batch::default() })
        .complete;
    let locate = |server: &str, protocol| {
        upstream::locate(&world, &NodeView::default(), server.parse().unwrap(), protocol).to_string()
    };
    assert_eq!(locate("10.96.0.10:53", Protocol::Udp), "10.0.0.9:5353");
    assert_eq!(locate("10.96.0.10:53", Protocol::Tcp), "10.96.0.10:53", "no such port");
    assert_eq!(locate("192.0.2.53:53", Protocol::Udp), "192.0.2.53:53");
}
