use super::*;
use mesh_xds::model::{Clause, IpBlock, Match, NamespacedName, Rule, StringMatch};

const TD: &str = "cluster.local";

fn conn(source: Option<&str>, source_ip: &str, port: u16) -> ConnMeta {
    ConnMeta {
        source: source.map(|id| id.parse().unwrap()),
        source_ip: source_ip.parse().unwrap(),
        destination_ip: "10.0.0.9".parse().unwrap(),
        destination_port: port,
    }
}

fn web(port: u16) -> ConnMeta {
    conn(Some("spiffe://cluster.local/ns/shop/sa/web"), "10.0.0.1", port)
}

fn plaintext(port: u16) -> ConnMeta {
    conn(None, "10.0.0.1", port)
}

fn rule(matches: Vec<Match>) -> Rule {
    Rule { clauses: vec![Clause { matches }] }
}

fn policy(name: &str, action: Action, rules: Vec<Rule>) -> Arc<Authorization> {
    Arc::new(Authorization {
        name: NamespacedName::new("shop", name),
        scope: Scope::Namespace,
        action,
        rules,
    })
}

fn set(policies: &[Arc<Authorization>]) -> PolicySet {
    PolicySet::of(TD, policies.iter().cloned())
}

fn exact(s: &str) -> Vec<StringMatch> {
    vec![StringMatch::Exact(s.into())]
}

/// What istiod and mesh-control make of a PeerAuthentication: a DENY for peers without a principal.
fn strict() -> Match {
    Match { not_principals: vec![StringMatch::Presence], ..Match::default() }
}

fn denied(set: &PolicySet, conn: &ConnMeta) -> Option<String> {
    match set.check(conn) {
        Verdict::Allow { .. } => None,
        Verdict::Deny { by } => Some(by.to_string()),
    }
}

#[test]
fn without_policies_everybody_passes() {
    let set = set(&[]);
    assert_eq!(set.check(&plaintext(80)), Verdict::Allow { by: None });
    assert_eq!(set.strictness(), Strictness::default());
}

#[test]
fn deny_goes_before_allow_and_names_itself() {
    let from_shop = Match { namespaces: exact("shop"), ..Match::default() };
    let on_9090 = Match { destination_ports: vec![9090], ..Match::default() };
    let set = set(&[
        policy("allow-shop", Action::Allow, vec![rule(vec![from_shop])]),
        policy("deny-admin", Action::Deny, vec![rule(vec![on_9090])]),
    ]);
    assert_eq!(set.check(&web(80)), Verdict::Allow { by: Some("shop/allow-shop".into()) });
    assert_eq!(denied(&set, &web(9090)).as_deref(), Some("policy shop/deny-admin"));
    assert_eq!(denied(&set, &plaintext(80)).as_deref(), Some("no ALLOW policy matched"));
}

#[test]
fn allow_nothing_and_allow_all() {
    let nothing = policy("nothing", Action::Allow, vec![]);
    assert_eq!(
        denied(&set(std::slice::from_ref(&nothing)), &web(80)).as_deref(),
        Some("no ALLOW policy matched")
    );
    // A rule without clauses, and one with a clause without matches, hold for everybody.
    for rules in [vec![Rule::default()], vec![rule(vec![])]] {
        let all = policy("all", Action::Allow, rules);
        assert!(set(&[nothing.clone(), all]).check(&plaintext(80)).is_allow());
    }
    // A match that says nothing matches nothing, as in ztunnel.
    let empty = policy("empty", Action::Allow, vec![rule(vec![Match::default()])]);
    assert!(!set(&[empty]).check(&web(80)).is_allow());
    // A DENY without rules denies nothing.
    assert!(set(&[policy("none", Action::Deny, vec![])]).check(&web(80)).is_allow());
}

#[test]
fn attributes() {
    let ip = |s: &str| {
        let (address, len) = s.split_once('/').unwrap();
        vec![IpBlock { address: address.parse().unwrap(), prefix_len: len.parse().unwrap() }]
    };
    let p = |s: &str| exact(s);
    let base = Match::default;
    let prefix = |s: &str| vec![StringMatch::Prefix(s.into())];
    let suffix = |s: &str| vec![StringMatch::Suffix(s.into())];
    let presence = || vec![StringMatch::Presence];
    // (name, match, does an authenticated web on port 80 match, does plaintext)
    let cases = [
        ("namespace", Match { namespaces: p("shop"), ..base() }, true, false),
        ("namespace other", Match { namespaces: p("bank"), ..base() }, false, false),
        ("namespace prefix", Match { namespaces: prefix("sh"), ..base() }, true, false),
        ("namespace suffix", Match { namespaces: suffix("op"), ..base() }, true, false),
        ("namespace presence", Match { namespaces: presence(), ..base() }, true, false),
        ("namespace empty prefix", Match { namespaces: prefix(""), ..base() }, true, false),
        ("not namespace", Match { not_namespaces: p("shop"), ..base() }, false, true),
        ("not namespace other", Match { not_namespaces: p("bank"), ..base() }, true, true),
        ("not namespace presence", Match { not_namespaces: presence(), ..base() }, false, true),
        ("principal", Match { principals: p("cluster.local/ns/shop/sa/web"), ..base() }, true, false),
        (
            "principal with scheme",
            Match { principals: p("spiffe://cluster.local/ns/shop/sa/web"), ..base() },
            false,
            false,
        ),
        ("principal prefix", Match { principals: prefix("cluster.local/ns/shop/"), ..base() }, true, false),
        ("principal suffix", Match { principals: suffix("/sa/web"), ..base() }, true, false),
        ("principal presence", Match { principals: presence(), ..base() }, true, false),
        ("principal case", Match { principals: p("cluster.local/ns/SHOP/sa/web"), ..base() }, false, false),
        ("not principal", Match { not_principals: p("cluster.local/ns/shop/sa/web"), ..base() }, false, true),
        (
            "not principal other",
            Match { not_principals: p("cluster.local/ns/shop/sa/x"), ..base() },
            true,
            true,
        ),
        ("not principal presence", strict(), false, true),
        ("source", Match { source_ips: ip("10.0.0.0/24"), ..base() }, true, true),
        ("source other", Match { source_ips: ip("10.0.1.0/24"), ..base() }, false, false),
        ("not source", Match { not_source_ips: ip("10.0.0.0/24"), ..base() }, false, false),
        ("destination", Match { destination_ips: ip("10.0.0.9/32"), ..base() }, true, true),
        ("not destination", Match { not_destination_ips: ip("10.0.0.9/32"), ..base() }, false, false),
        ("port", Match { destination_ports: vec![443, 80], ..base() }, true, true),
        ("port other", Match { destination_ports: vec![443], ..base() }, false, false),
        ("not port", Match { not_destination_ports: vec![80], ..base() }, false, false),
        (
            "and: one fails",
            Match { namespaces: p("shop"), destination_ports: vec![443], ..base() },
            false,
            false,
        ),
        (
            "and: both hold",
            Match { namespaces: p("shop"), destination_ports: vec![80], ..base() },
            true,
            false,
        ),
        (
            "positive and negative of one attribute",
            Match { namespaces: presence(), not_namespaces: p("shop"), ..base() },
            false,
            false,
        ),
    ];
    for (name, m, authenticated, anonymous) in cases {
        let set = set(&[policy("p", Action::Allow, vec![rule(vec![m])])]);
        assert_eq!(set.check(&web(80)).is_allow(), authenticated, "{name}, authenticated");
        assert_eq!(set.check(&plaintext(80)).is_allow(), anonymous, "{name}, plaintext");
    }
}

#[test]
fn rules_are_ored_clauses_anded_matches_ored() {
    let ns = |s: &str| Match { namespaces: exact(s), ..Match::default() };
    let port = |p: u16| Match { destination_ports: vec![p], ..Match::default() };
    let both = Rule {
        clauses: vec![
            Clause { matches: vec![ns("bank"), ns("shop")] },
            Clause { matches: vec![port(80), port(81)] },
        ],
    };
    let set = set(&[policy("p", Action::Allow, vec![both, rule(vec![port(90)])])]);
    for (conn, allowed) in [
        (web(80), true),
        (web(81), true),
        (web(82), false),
        (web(90), true),
        (plaintext(80), false),
        (plaintext(90), true),
    ] {
        assert_eq!(set.check(&conn).is_allow(), allowed, "{conn:?}");
    }
}

#[test]
fn cluster_local_stands_for_the_meshs_own_trust_domain() {
    let by_alias = Match { principals: exact("cluster.local/ns/shop/sa/web"), ..Match::default() };
    let not_alias = Match { not_principals: exact("cluster.local/ns/shop/sa/web"), ..Match::default() };
    let own = conn(Some("spiffe://prod.example/ns/shop/sa/web"), "10.0.0.1", 80);
    let foreign = conn(Some("spiffe://other.example/ns/shop/sa/web"), "10.0.0.1", 80);
    let of =
        |m: &Match| PolicySet::of("prod.example", [policy("p", Action::Allow, vec![rule(vec![m.clone()])])]);
    assert!(of(&by_alias).check(&own).is_allow());
    assert!(!of(&by_alias).check(&foreign).is_allow());
    assert!(!of(&not_alias).check(&own).is_allow());
    assert!(of(&not_alias).check(&foreign).is_allow());
    // And the real name still works.
    let by_name = Match { principals: exact("prod.example/ns/shop/sa/web"), ..Match::default() };
    assert!(of(&by_name).check(&own).is_allow());
}

fn workload(policies: &[&str]) -> Workload {
    Workload {
        uid: "Kubernetes//Pod/shop/cart".into(),
        name: NamespacedName::new("shop", "cart"),
        addresses: vec!["10.0.0.9".parse().unwrap()],
        network: String::new(),
        tunnel: Default::default(),
        trust_domain: TD.into(),
        service_account: "cart".into(),
        node: "n1".into(),
        cluster_id: "Kubernetes".into(),
        locality: Default::default(),
        health: Default::default(),
        canonical_name: "cart".into(),
        canonical_revision: "latest".into(),
        workload_name: "cart".into(),
        kind: Default::default(),
        services: Default::default(),
        policies: policies.iter().map(|p| (*p).to_owned()).collect(),
        weight: 1,
        native_tunnel: false,
        host_network: false,
    }
}

#[test]
fn selection_by_scope() {
    let make = |ns: &str, name: &str, scope| {
        Arc::new(Authorization {
            name: NamespacedName::new(ns, name),
            scope,
            action: Action::Deny,
            rules: vec![],
        })
    };
    let all = [
        make("root", "global", Scope::Global),
        make("shop", "of-shop", Scope::Namespace),
        make("bank", "of-bank", Scope::Namespace),
        make("shop", "named", Scope::WorkloadSelector),
        make("shop", "not-named", Scope::WorkloadSelector),
    ];
    let picked = |w: &Workload| -> Vec<String> {
        PolicySet::for_workload(w, &all).keys().map(ToString::to_string).collect()
    };
    assert_eq!(picked(&workload(&["shop/named"])), ["root/global", "shop/named", "shop/of-shop"]);
    assert_eq!(picked(&workload(&[])), ["root/global", "shop/of-shop"]);
    assert!(PolicySet::for_workload(&workload(&["shop/of-shop"]), &all).check(&web(80)).is_allow());
    // A policy that is named but not there denies everything until it is.
    let set = PolicySet::for_workload(&workload(&["shop/later"]), &all);
    assert_eq!(denied(&set, &web(80)).as_deref(), Some("policy shop/later is not known yet"));
    assert!(set.strictness().all);
}

#[test]
fn peer_authentication_in_its_converted_forms() {
    // (name, matches of the DENY policy, ports on which plaintext is refused of 80, 8080, 9090, strictness)
    let all =
        |ports: &[u16], all: bool| Strictness { all, ports: ports.iter().map(|p| (*p, !all)).collect() };
    let cases = [
        ("STRICT", vec![rule(vec![strict()])], vec![80, 8080, 9090], all(&[], true)),
        (
            "STRICT but 8080 PERMISSIVE",
            vec![rule(vec![Match { not_destination_ports: vec![8080], ..strict() }])],
            vec![80, 9090],
            all(&[8080], true),
        ),
        (
            "PERMISSIVE but 9090 STRICT",
            vec![rule(vec![Match { destination_ports: vec![9090], ..strict() }])],
            vec![9090],
            all(&[9090], false),
        ),
        (
            // istiod writes the port and the principal as two clauses of one rule.
            "9090 STRICT in two clauses",
            vec![Rule {
                clauses: vec![
                    Clause { matches: vec![strict()] },
                    Clause { matches: vec![Match { destination_ports: vec![9090], ..Match::default() }] },
                ],
            }],
            vec![9090],
            all(&[9090], false),
        ),
        ("PERMISSIVE", vec![], vec![], all(&[], false)),
    ];
    for (name, rules, refused, strictness) in cases {
        let set = set(&[policy("converted_peer_authentication_default", Action::Deny, rules)]);
        for port in [80, 8080, 9090] {
            assert!(set.check(&web(port)).is_allow(), "{name}: mutual TLS was refused on {port}");
            assert_eq!(set.check(&plaintext(port)).is_allow(), !refused.contains(&port), "{name}: {port}");
        }
        assert_eq!(set.strictness(), strictness, "{name}");
    }
}

#[test]
fn strictness_fails_closed() {
    let ns = Match { namespaces: exact("shop"), ..Match::default() };
    let on = |ports: &[u16]| Match { destination_ports: ports.to_vec(), ..Match::default() };
    // Somebody could be refused on any port: nothing may pass unevaluated.
    let identity_deny = set(&[policy("d", Action::Deny, vec![rule(vec![ns.clone()])])]);
    assert!(identity_deny.strictness().all);
    let identity_allow = set(&[policy("a", Action::Allow, vec![rule(vec![ns])])]);
    assert!(identity_allow.strictness().all);
    // An ALLOW for everybody on some ports closes exactly the others.
    let by_port = set(&[policy("a", Action::Allow, vec![rule(vec![on(&[80])])])]);
    assert_eq!(by_port.strictness(), Strictness { all: true, ports: [(80, false)].into() });
    assert!(!by_port.strictness().of(80) && by_port.strictness().of(81));
    // A list too long to look at closes everything.
    let every: Vec<u16> = (0..=u16::MAX).collect();
    let hostile = set(&[policy("d", Action::Deny, vec![rule(vec![on(&every)])])]);
    assert!(hostile.strictness().all && hostile.strictness().ports.is_empty());
}

#[test]
fn strictness_agrees_with_the_verdicts() {
    // Whatever the policies: if a port is not strict, no connection to it is refused.
    let pool = [
        strict(),
        Match { destination_ports: vec![80], ..Match::default() },
        Match { not_destination_ports: vec![80, 81], ..Match::default() },
        Match { namespaces: exact("shop"), ..Match::default() },
        Match { destination_ports: vec![81], ..strict() },
        Match::default(),
    ];
    let subjects = [web as fn(u16) -> ConnMeta, plaintext];
    for (i, a) in pool.iter().enumerate() {
        for (j, b) in pool.iter().enumerate() {
            for (x, y) in
                [(Action::Deny, Action::Allow), (Action::Allow, Action::Allow), (Action::Deny, Action::Deny)]
            {
                let set = set(&[
                    policy("x", x, vec![rule(vec![a.clone()])]),
                    policy("y", y, vec![rule(vec![b.clone()])]),
                ]);
                let strictness = set.strictness();
                for port in [80, 81, 82] {
                    let refused = subjects.iter().any(|s| !set.check(&s(port)).is_allow());
                    assert!(
                        strictness.of(port) || !refused,
                        "port {port} with matches {i} and {j} is open to the kernel but can be refused"
                    );
                }
            }
        }
    }
}

#[test]
fn equal_policies_make_the_same_set_and_others_do_not() {
    let allow = |port| {
        policy(
            "a",
            Action::Allow,
            vec![rule(vec![Match { destination_ports: vec![port], ..Match::default() }])],
        )
    };
    let one = set(&[allow(80)]);
    assert!(one.same(&set(&[allow(80)])), "equal, though sent again");
    for other in [set(&[]), set(&[allow(81)]), set(&[allow(80), policy("b", Action::Allow, vec![])])] {
        assert!(!one.same(&other) && !other.same(&one), "{other:?}");
    }
    assert!(!one.same(&PolicySet::of("other.td", [allow(80)])));
    let missing = PolicySet { missing: Some("shop/p".into()), ..set(&[allow(80)]) };
    assert!(!one.same(&missing));
}

#[test]
fn only_source_addresses_make_an_answer_depend_on_the_connection() {
    let block = IpBlock { address: "10.0.0.0".parse().unwrap(), prefix_len: 8 };
    let asks = |m: Match| {
        let behind = rule(vec![Match { destination_ports: vec![80], ..Match::default() }]);
        set(&[policy("p", Action::Deny, vec![behind, rule(vec![m])])]).asks_for_source_address()
    };
    assert!(asks(Match { source_ips: vec![block], ..Match::default() }));
    assert!(asks(Match { not_source_ips: vec![block], ..Match::default() }));
    assert!(!asks(Match { destination_ips: vec![block], ..Match::default() }));
    assert!(!asks(Match { namespaces: exact("shop"), principals: exact("x"), ..Match::default() }));
    assert!(!set(&[]).asks_for_source_address());
}
