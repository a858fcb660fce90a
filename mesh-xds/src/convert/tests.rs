//! Round trips of everything that can be written, and tables of what must be refused, closed or noted. Deliberately
//! absent: how policies are evaluated.

use super::*;
use crate::model::*;
use crate::wire::{nodemesh as ext, security as sec, workload as pb};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::time::Duration;

fn name() -> impl Strategy<Value = String> {
    "[a-z][a-z0-9-]{0,8}[a-z0-9]"
}

fn text() -> impl Strategy<Value = String> + Clone {
    "[a-z0-9./-]{0,6}"
}

fn ip() -> impl Strategy<Value = IpAddr> + Clone {
    prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)]
}

fn target_ports() -> impl Strategy<Value = Vec<TargetPort>> {
    let port = (1u16.., any::<u16>())
        .prop_map(|(service_port, target_port)| TargetPort { service_port, target_port });
    prop::collection::vec(port, 0..3)
}

fn workload() -> impl Strategy<Value = Workload> {
    let place = (prop::collection::vec(ip(), 0..3), text(), text(), text(), (text(), text(), text()));
    let membership = (target_ports(), target_ports(), text())
        .prop_map(|(tcp, udp, hostname)| ServiceMembership { tcp, udp, hostname });
    let services = prop::collection::btree_map("[a-z]{1,3}/[a-z.]{1,6}", membership, 0..4);
    let labels = (text(), text(), text(), 0usize..4);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), 1u32..9);
    (name(), name(), name(), place, services, labels, flags, prop::collection::vec(text(), 0..3)).prop_map(
        |(
            n,
            ns,
            sa,
            (addresses, network, cluster_id, node, l),
            services,
            (a, b, c, kind),
            flags,
            policies,
        )| {
            let (hbone, healthy, native_tunnel, host_network, weight) = flags;
            Workload {
                uid: format!("c1//Pod/{ns}/{n}"),
                name: NamespacedName::new(ns, n),
                addresses,
                network,
                tunnel: if hbone { TunnelProtocol::Hbone } else { TunnelProtocol::None },
                trust_domain: "td.example".into(),
                service_account: sa,
                node,
                cluster_id,
                locality: Locality { region: l.0, zone: l.1, subzone: l.2 },
                health: if healthy { Health::Healthy } else { Health::Unhealthy },
                canonical_name: a,
                canonical_revision: b,
                workload_name: c,
                kind: [WorkloadKind::Deployment, WorkloadKind::CronJob, WorkloadKind::Pod, WorkloadKind::Job]
                    [kind],
                services,
                policies,
                weight,
                native_tunnel,
                host_network,
            }
        },
    )
}

fn service() -> impl Strategy<Value = Service> {
    const APPS: [AppProtocol; 6] = [
        AppProtocol::Unknown,
        AppProtocol::Http1,
        AppProtocol::Http2,
        AppProtocol::Grpc,
        AppProtocol::Tls,
        AppProtocol::Tcp,
    ];
    const SCOPES: [LbScope; 6] =
        [LbScope::Region, LbScope::Zone, LbScope::Subzone, LbScope::Node, LbScope::Cluster, LbScope::Network];
    let ports = prop::collection::btree_map((any::<bool>(), 1u16..), (any::<u16>(), 0usize..6), 0..5)
        .prop_map(|ports: BTreeMap<(bool, u16), (u16, usize)>| -> Vec<ServicePort> {
            ports
                .into_iter()
                .map(|((udp, port), (target_port, app))| ServicePort {
                    port,
                    target_port,
                    protocol: if udp { Protocol::Udp } else { Protocol::Tcp },
                    app_protocol: APPS[app],
                })
                .collect()
        });
    let lb =
        (prop::collection::vec(0usize..6, 0..4), 0usize..3, any::<bool>()).prop_map(|(scopes, mode, all)| {
            LoadBalancing {
                routing_preference: scopes.into_iter().map(|s| SCOPES[s]).collect(),
                mode: [LbMode::Any, LbMode::Strict, LbMode::Failover][mode],
                allow_unhealthy: all,
            }
        });
    let affinity = prop::option::of((0u32..90_000, 0u32..1_000_000_000));
    (
        name(),
        name(),
        prop::collection::vec((text(), ip()), 0..3),
        ports,
        lb,
        affinity,
        prop::collection::vec(text(), 0..2),
        any::<bool>(),
    )
        .prop_map(|(n, ns, addresses, ports, load_balancing, affinity, subject_alt_names, maglev)| {
            Service {
                // Every other port has a name.
                port_names: (ports.iter().step_by(2))
                    .map(|p| ((p.port, p.protocol), format!("p{}", p.port)))
                    .collect(),
                hostname: format!("{n}.{ns}.svc.cluster.local"),
                name: NamespacedName::new(ns, n),
                addresses: addresses
                    .into_iter()
                    .map(|(network, ip)| ServiceAddress { network, ip })
                    .collect(),
                ports,
                subject_alt_names,
                load_balancing,
                session_affinity: affinity
                    .map(|(s, n)| SessionAffinity { timeout: Duration::new(s.into(), n) }),
                algorithm: if maglev { LbAlgorithm::Maglev } else { LbAlgorithm::Random },
            }
        })
}

fn policy() -> impl Strategy<Value = Authorization> {
    let string = prop_oneof![
        text().prop_map(StringMatch::Exact),
        text().prop_map(StringMatch::Prefix),
        text().prop_map(StringMatch::Suffix),
        Just(StringMatch::Presence)
    ];
    let strings = prop::collection::vec(string, 0..3);
    let block = (ip(), any::<u8>()).prop_map(|(address, len)| IpBlock {
        address,
        prefix_len: len % if address.is_ipv4() { 33 } else { 129 },
    });
    let blocks = prop::collection::vec(block, 0..2);
    let ports = prop::collection::vec(1u16.., 0..3);
    let one = (
        (strings.clone(), strings.clone(), strings.clone(), strings),
        (blocks.clone(), blocks.clone(), blocks.clone(), blocks),
        (ports.clone(), ports),
    )
        .prop_map(|(s, b, p)| Match {
            namespaces: s.0,
            not_namespaces: s.1,
            principals: s.2,
            not_principals: s.3,
            source_ips: b.0,
            not_source_ips: b.1,
            destination_ips: b.2,
            not_destination_ips: b.3,
            destination_ports: p.0,
            not_destination_ports: p.1,
        });
    let clause = prop::collection::vec(one, 0..3).prop_map(|matches| Clause { matches });
    let rule = prop::collection::vec(clause, 0..3).prop_map(|clauses| Rule { clauses });
    (name(), name(), 0usize..3, any::<bool>(), prop::collection::vec(rule, 0..3)).prop_map(
        |(n, ns, scope, deny, rules)| Authorization {
            name: NamespacedName::new(ns, n),
            scope: [Scope::Global, Scope::Namespace, Scope::WorkloadSelector][scope],
            action: if deny { Action::Deny } else { Action::Allow },
            rules,
        },
    )
}

fn address(t: pb::address::Type) -> Any {
    pack(ADDRESS_TYPE, &pb::Address { r#type: Some(t) })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn workloads_round_trip(w in workload()) {
        let got = decode_address(&w.uid, &address(pb::address::Type::Workload(encode_workload(&w)))).unwrap();
        prop_assert_eq!(got.notes, vec![]);
        prop_assert_eq!(got.value, Address::Workload(Box::new(w.clone())));
        let got = decode_workload(&w.uid, &pack(WORKLOAD_TYPE, &encode_workload(&w))).unwrap();
        prop_assert_eq!(got.value, w);
    }

    #[test]
    fn services_round_trip(s in service()) {
        let got = decode_address(&s.key(), &address(pb::address::Type::Service(encode_service(&s)))).unwrap();
        prop_assert_eq!(got.notes, vec![]);
        prop_assert_eq!(got.value, Address::Service(Box::new(s)));
    }

    #[test]
    fn policies_round_trip(a in policy()) {
        let got = decode_authorization(&a.key(), &pack(AUTHORIZATION_TYPE, &encode_authorization(&a))).unwrap();
        prop_assert_eq!(got.notes, vec![]);
        prop_assert_eq!(got.value, a);
    }

    #[test]
    fn any_bytes_are_an_error_or_a_value_and_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        for type_url in [ADDRESS_TYPE, AUTHORIZATION_TYPE, WORKLOAD_TYPE] {
            let any = Any { type_url: type_url.into(), value: bytes.clone().into() };
            let _ = decode_address("a", &any);
            let _ = decode_authorization("a/b", &any);
            let _ = decode_workload("a", &any);
        }
        let _ = unknown::scan(&bytes);
    }
}

fn good_workload() -> pb::Workload {
    pb::Workload {
        uid: "c1//Pod/shop/cart".into(),
        name: "cart".into(),
        namespace: "shop".into(),
        addresses: vec![vec![10, 0, 0, 1].into()],
        ..pb::Workload::default()
    }
}

fn good_service() -> pb::Service {
    pb::Service {
        name: "cart".into(),
        namespace: "shop".into(),
        hostname: "cart.shop".into(),
        ports: vec![pb::Port { service_port: 80, target_port: 8080 }],
        ..pb::Service::default()
    }
}

#[test]
fn what_istio_leaves_out_has_its_defaults() {
    let w = pb::Workload { name: String::new(), ..good_workload() };
    let any = address(pb::address::Type::Workload(w));
    let Address::Workload(w) = decode_address("c1//Pod/shop/cart", &any).unwrap().value else {
        panic!("a service")
    };
    assert_eq!(w.identity().unwrap().to_string(), "spiffe://cluster.local/ns/shop/sa/default");
    assert_eq!((w.name.name.as_str(), w.weight, w.tunnel), ("c1//Pod/shop/cart", 1, TunnelProtocol::None));
}

/// The uint32 number of a wrong field, and words that the message must have.
type BadWorkload = (fn(&mut pb::Workload), &'static str);

#[test]
fn malformed_workloads_are_refused_with_field_and_remedy() {
    fn port(service_port: u32, target_port: u32) -> BTreeMap<String, pb::PortList> {
        let ports = vec![pb::Port { service_port, target_port }];
        BTreeMap::from([("shop/cart.shop".to_owned(), pb::PortList { ports })])
    }
    fn extension(type_url: &str, value: &'static [u8]) -> Vec<pb::Extension> {
        let config = Some(Any { type_url: type_url.into(), value: value.into() });
        vec![pb::Extension { name: EXTENSION_NAME.into(), config }]
    }
    let table: [BadWorkload; 12] = [
        (
            |w| w.addresses = vec![vec![10, 0, 0].into()],
            "workload.addresses has 3 bytes; an address has 4 or 16",
        ),
        (|w| w.addresses = vec![vec![].into()], "workload.addresses has 0 bytes"),
        (|w| w.namespace.clear(), "workload.namespace is empty; set it"),
        (|w| w.uid.clear(), "workload.uid is empty; set it"),
        (|w| w.services = port(0, 80), "workload.services is 0; a port is 1 to 65535"),
        (|w| w.services = port(80, 65_536), "workload.services is 65536; a port is 0 to 65535"),
        (|w| w.tunnel_protocol = 7, "workload.tunnel_protocol has the unknown value 7; upgrade"),
        (|w| w.network_mode = 7, "workload.network_mode has the unknown value 7; upgrade"),
        (|w| w.service_account = "a/b".into(), "its identity is not valid; correct"),
        (|w| w.extensions = extension("x", b""), "is a \"x\" in a response for"),
        (
            |w| w.extensions = extension(WORKLOAD_EXTENSION_TYPE, b"\xff"),
            "not a valid type.googleapis.com/nodemesh",
        ),
        (|w| w.uid = "other".into(), "contains \"other\"; the resource name must be"),
    ];
    for (spoil, words) in table {
        let mut w = good_workload();
        spoil(&mut w);
        let error =
            decode_address("c1//Pod/shop/cart", &address(pb::address::Type::Workload(w))).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("c1//Pod/shop/cart: ") && text.contains(words), "{text:?} lacks {words:?}");
    }
}

#[test]
fn malformed_services_are_refused_with_field_and_remedy() {
    fn extension(e: &ext::ServiceExtension) -> Vec<pb::Extension> {
        vec![pb::Extension { name: EXTENSION_NAME.into(), config: Some(pack(SERVICE_EXTENSION_TYPE, e)) }]
    }
    let bad_udp = ext::ServicePort { port: 70_000, transport: 1, ..Default::default() };
    let minus = prost_types::Duration { seconds: -1, nanos: 0 };
    let table: Vec<(pb::Service, &str)> = vec![
        (pb::Service { hostname: String::new(), ..good_service() }, "service.hostname is empty"),
        (pb::Service { namespace: String::new(), ..good_service() }, "service.namespace is empty"),
        (
            pb::Service {
                addresses: vec![pb::NetworkAddress { network: "n".into(), address: vec![1; 5].into() }],
                ..good_service()
            },
            "service.addresses has 5 bytes",
        ),
        (
            pb::Service { ports: vec![pb::Port { service_port: 0, target_port: 1 }], ..good_service() },
            "service.ports.service_port is 0",
        ),
        (
            pb::Service {
                extensions: extension(&ext::ServiceExtension { ports: vec![bad_udp], ..Default::default() }),
                ..good_service()
            },
            "nodemesh.ports.port is 70000; a port is 1 to 65535",
        ),
        (
            pb::Service {
                extensions: extension(&ext::ServiceExtension {
                    session_affinity_timeout: Some(minus),
                    ..Default::default()
                }),
                ..good_service()
            },
            "nodemesh.session_affinity_timeout is not a duration",
        ),
    ];
    for (s, words) in table {
        let text = decode_address("shop/cart.shop", &address(pb::address::Type::Service(s)))
            .unwrap_err()
            .to_string();
        assert!(text.starts_with("shop/cart.shop: ") && text.contains(words), "{text:?} lacks {words:?}");
    }
    let none = pack(ADDRESS_TYPE, &pb::Address { r#type: None });
    assert!(matches!(decode_address("a", &none), Err(ConvertError::NoType { .. })));
    let policy = pack(AUTHORIZATION_TYPE, &sec::Authorization::default());
    assert!(matches!(decode_address("a", &policy), Err(ConvertError::Type { .. })));
}

#[test]
fn unknown_values_that_are_harmless_are_read_safely_and_noted() {
    let w = pb::Workload { status: 9, workload_type: 9, ..good_workload() };
    let got = decode_address("c1//Pod/shop/cart", &address(pb::address::Type::Workload(w))).unwrap();
    let Address::Workload(w) = got.value else { panic!("a service") };
    assert_eq!((w.health, w.kind), (Health::Unhealthy, WorkloadKind::Pod));
    assert_eq!(got.notes.len(), 2);

    let lb = pb::LoadBalancing {
        routing_preference: vec![1, 9, 2],
        mode: 9,
        health_policy: 9,
        dns_connect_strategy: 0,
    };
    let s = pb::Service {
        load_balancing: Some(lb),
        waypoint: Some(pb::GatewayAddress::default()),
        extensions: vec![pb::Extension {
            name: EXTENSION_NAME.to_owned(),
            config: Some(pack(
                SERVICE_EXTENSION_TYPE,
                &ext::ServiceExtension { load_balancer: 9, ..Default::default() },
            )),
        }],
        ..good_service()
    };
    let got = decode_address("shop/cart.shop", &address(pb::address::Type::Service(s))).unwrap();
    let Address::Service(s) = got.value else { panic!("a workload") };
    let want = LoadBalancing {
        routing_preference: vec![LbScope::Region],
        mode: LbMode::Any,
        allow_unhealthy: false,
    };
    assert_eq!((s.load_balancing, s.algorithm), (want, LbAlgorithm::Random));
    assert_eq!(got.notes.len(), 5, "{:?}", got.notes);
}

#[test]
fn a_weight_of_zero_takes_no_traffic() {
    let w = pb::Workload { capacity: Some(0), ..good_workload() };
    let got = decode_address("c1//Pod/shop/cart", &address(pb::address::Type::Workload(w))).unwrap();
    let Address::Workload(w) = got.value else { panic!("a service") };
    assert_eq!((w.health, w.weight), (Health::Unhealthy, 1));
}

#[test]
fn field_11_of_a_service_is_skipped_whatever_it_is() {
    // Istio's releases disagree about it; see workload.proto.
    for extra in [&[0x58u8, 1][..], &[0x5a, 2, 8, 5][..]] {
        let mut bytes = good_service().encode_to_vec();
        bytes.extend_from_slice(extra);
        let mut outer = vec![0x12, u8::try_from(bytes.len()).unwrap()];
        outer.extend(bytes);
        let any = Any { type_url: ADDRESS_TYPE.into(), value: outer.into() };
        assert!(decode_address("shop/cart.shop", &any).is_ok());
    }
}

fn good_match() -> sec::Match {
    sec::Match { destination_ports: vec![80], ..sec::Match::default() }
}

fn one_rule(action: sec::Action, m: sec::Match) -> sec::Authorization {
    sec::Authorization {
        name: "p".into(),
        namespace: "shop".into(),
        scope: sec::Scope::Namespace.into(),
        action: action.into(),
        rules: vec![sec::Rule { clauses: vec![sec::Clause { matches: vec![m] }] }],
        dry_run: false,
    }
}

fn read(policy: &sec::Authorization) -> Decoded<Authorization> {
    decode_authorization("shop/p", &pack(AUTHORIZATION_TYPE, policy)).unwrap()
}

#[test]
fn a_match_that_is_not_understood_closes_its_rule() {
    let block = |len: u32, bytes: usize| sec::Address { address: vec![1; bytes].into(), length: len };
    let account = |ns: &str| sec::ServiceAccountMatch { namespace: ns.into(), service_account: "sa".into() };
    let exact = sec::StringMatch { match_type: Some(sec::string_match::MatchType::Exact("x".into())) };
    let table = [
        sec::Match { namespaces: vec![sec::StringMatch { match_type: None }], ..good_match() },
        sec::Match { not_principals: vec![sec::StringMatch { match_type: None }], ..good_match() },
        sec::Match { source_ips: vec![block(33, 4)], ..good_match() },
        sec::Match { destination_ips: vec![block(129, 16)], ..good_match() },
        sec::Match { not_source_ips: vec![block(8, 5)], ..good_match() },
        sec::Match { destination_ports: vec![0], ..good_match() },
        sec::Match { not_destination_ports: vec![65_536], ..good_match() },
        sec::Match { service_accounts: vec![account("")], ..good_match() },
        sec::Match { service_accounts: vec![account("ns")], principals: vec![exact], ..good_match() },
    ];
    for m in table {
        let deny = read(&one_rule(sec::Action::Deny, m.clone()));
        assert_eq!(deny.value.rules, [Rule::default()], "a DENY rule matches everything: {m:?}");
        assert_eq!(deny.notes.len(), 1);
        let allow = read(&one_rule(sec::Action::Allow, m.clone()));
        assert_eq!((allow.value.action, allow.value.rules.len()), (Action::Allow, 0), "{m:?}");
        assert_eq!(allow.notes.len(), 1);
    }
}

#[test]
fn a_field_from_the_future_closes_rule_or_policy() {
    // The same policy, encoded by hand with an unknown field 100 in each message that can have one.
    let message = |tag: u8, body: &[u8]| [&[tag << 3 | 2, u8::try_from(body.len()).unwrap()], body].concat();
    let future = [0xa2, 0x06, 0x00];
    let plain = [0x48, 80].as_slice();
    let text = |extra: &[u8]| [message(1, b"x").as_slice(), extra].concat();
    let rules: [(Vec<u8>, &str); 5] = [
        (message(1, &message(2, &[plain, &future].concat())), "match"),
        (message(1, &message(2, &[plain, &message(1, &text(&future))].concat())), "string match"),
        (message(1, &message(2, &[plain, &message(12, &text(&future))].concat())), "service account"),
        (message(1, &[message(2, plain).as_slice(), &future].concat()), "clause"),
        ([message(1, &message(2, plain)).as_slice(), &future].concat(), "rule"),
    ];
    let head = [message(1, b"p"), message(2, b"shop"), vec![0x18, 1]].concat();
    let decode = |bytes: Vec<u8>| {
        let any = Any { type_url: AUTHORIZATION_TYPE.into(), value: bytes.into() };
        decode_authorization("shop/p", &any).unwrap().value
    };
    for (rule, place) in rules {
        let allow =
            decode([head.clone(), message(5, &rule), message(5, &message(1, &message(2, plain)))].concat());
        assert_eq!(allow.action, Action::Allow);
        assert_eq!(allow.rules.len(), 1, "unknown field in {place}: only the other rule allows");
        let deny = decode([head.clone(), vec![0x20, 1], message(5, &rule)].concat());
        assert_eq!(deny.rules, [Rule::default()], "unknown field in {place}");
    }
    let closed = decode([head.as_slice(), &message(5, &message(1, &message(2, plain))), &future].concat());
    assert_eq!(
        (closed.action, closed.scope, closed.rules),
        (Action::Deny, Scope::Namespace, vec![Rule::default()])
    );
}

#[test]
fn unknown_action_and_scope_deny() {
    let policy = sec::Authorization { action: 2, ..one_rule(sec::Action::Allow, good_match()) };
    let got = read(&policy).value;
    assert_eq!((got.action, got.scope, got.rules), (Action::Deny, Scope::Namespace, vec![Rule::default()]));
    let policy = sec::Authorization { scope: 3, ..one_rule(sec::Action::Allow, good_match()) };
    let got = read(&policy).value;
    assert_eq!((got.action, got.scope, got.rules), (Action::Deny, Scope::Global, vec![Rule::default()]));
}

#[test]
fn empty_matches_and_clauses_are_kept_as_they_are() {
    // To the policy engine an empty match never matches and a clause without matches is always met; dropping either
    // would change the policy.
    let mut policy = one_rule(sec::Action::Deny, sec::Match::default());
    policy.rules[0].clauses.push(sec::Clause { matches: vec![] });
    let got = read(&policy);
    let want = [Clause { matches: vec![Match::default()] }, Clause { matches: vec![] }];
    assert_eq!((got.value.rules[0].clauses.as_slice(), got.notes.len()), (want.as_slice(), 0));
    assert_eq!(encode_authorization(&got.value), policy);
}

#[test]
fn service_accounts_and_dry_run() {
    let account = sec::ServiceAccountMatch { namespace: "ns".into(), service_account: "sa".into() };
    let m = sec::Match {
        service_accounts: vec![account.clone()],
        not_service_accounts: vec![account],
        ..sec::Match::default()
    };
    let got = &read(&one_rule(sec::Action::Allow, m)).value.rules[0].clauses[0].matches[0];
    assert_eq!(got.principals, [StringMatch::Suffix("/ns/ns/sa/sa".into())]);
    assert_eq!(got.not_principals, got.principals);

    let dry = sec::Authorization { dry_run: true, ..one_rule(sec::Action::Allow, good_match()) };
    let got = read(&dry);
    assert_eq!((got.value.action, got.value.rules.len(), got.notes.len()), (Action::Deny, 0, 1));
}

#[test]
fn resources_are_named_and_found_like_istios() {
    let any = address(pb::address::Type::Workload(good_workload()));
    let Address::Workload(w) = decode_address("c1//Pod/shop/cart", &any).unwrap().value else {
        panic!("a service")
    };
    let (full, bare) = workload_resources(&w);
    assert_eq!(&*full.name, "c1//Pod/shop/cart");
    assert_eq!(full.aliases, ["/10.0.0.1".into()]);
    assert_eq!((&full.name, &full.aliases, full.audience), (&bare.name, &bare.aliases, bare.audience));
    assert_eq!(full.audience, crate::delta::Audience::Everyone);
    assert_eq!(decode_address(&full.name, &full.body).unwrap().value, Address::Workload(w.clone()));
    assert_eq!(decode_workload(&bare.name, &bare.body).unwrap().value, *w);
    // A pod that has no address yet is for those who know what to do with it; one on its host's has no alias.
    let waiting = Workload { addresses: vec![], ..(*w).clone() };
    assert_eq!(workload_resources(&waiting).0.audience, crate::delta::Audience::Nodemesh);
    assert_eq!(workload_resources(&waiting).1.audience, crate::delta::Audience::Nodemesh);
    let host = Workload { host_network: true, ..*w };
    assert!(workload_resources(&host).0.aliases.is_empty());

    let any = address(pb::address::Type::Service(pb::Service {
        addresses: vec![pb::NetworkAddress { network: "n".into(), address: vec![10, 1, 0, 1].into() }],
        ..good_service()
    }));
    let Address::Service(s) = decode_address("shop/cart.shop", &any).unwrap().value else {
        panic!("a workload")
    };
    let got = service_resource(&s);
    assert_eq!((&*got.name, got.aliases.as_slice()), ("shop/cart.shop", ["n/10.1.0.1".into()].as_slice()));
    assert_eq!(decode_address(&got.name, &got.body).unwrap().value, Address::Service(s));

    let a = read(&one_rule(sec::Action::Deny, good_match())).value;
    let got = authorization_resource(&a);
    assert_eq!((&*got.name, got.aliases.len()), ("shop/p", 0));
    assert_eq!(decode_authorization(&got.name, &got.body).unwrap().value, a);
}
