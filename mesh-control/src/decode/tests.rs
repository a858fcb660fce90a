//! Broken input, policies on L4, and what stands for a broken policy.

use super::*;
use crate::object::{AuthorizationPolicy, Effect, MtlsMode, PolicyAction, PolicyTarget};
use mesh_xds::model::{Clause, IpBlock, LbAlgorithm, Match, Rule, StringMatch};

fn decode_text(yaml: &str) -> Decoded {
    decode(&serde_yaml_ng::from_str(yaml).unwrap())
}

fn good(yaml: &str) -> (Object, Vec<Issue>) {
    match decode_text(yaml) {
        Decoded::Good { object, warnings } => (*object, warnings),
        other => panic!("{yaml}\n{other:?}"),
    }
}

/// The whole text of one issue, as it ends up in a report.
fn said(issue: &Issue) -> String {
    format!("{} {}: {}; {}", issue.severity, issue.field, issue.message, issue.remedy)
}

#[test]
fn every_mistake_names_its_field_and_remedy() {
    let service =
        |spec: &str| format!("apiVersion: v1\nkind: Service\nmetadata: {{name: s}}\nspec: {{{spec}}}");
    let pod = |spec: &str, status: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nspec: {{containers: [], {spec}}}\nstatus: {{{status}}}"
        )
    };
    let slice = |rest: &str| {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: e, labels: {{kubernetes.io/service-name: s}}}}\n{rest}"
        )
    };
    let authorization = |spec: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: a}}\nspec: {{{spec}}}"
        )
    };
    let peer = |spec: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: a}}\nspec: {{{spec}}}"
        )
    };
    let rule = |rule: &str| authorization(&format!("rules: [{{{rule}}}]"));
    let source = |source: &str| rule(&format!("from: [{{source: {{{source}}}}}]"));
    let cases = [
        // Any object.
        ("apiVersion: v1\nmetadata: {name: x}".to_owned(), "kind", "there is no kind"),
        ("kind: Pod\nmetadata: {name: x}".to_owned(), "apiVersion", "there is no apiVersion"),
        ("apiVersion: v1\nkind: Pod".to_owned(), "metadata.name", "has no name"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: 7}".to_owned(), "metadata.name", "quote it"),
        (
            "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: Web}".to_owned(),
            "metadata.name",
            "lower-case letters",
        ),
        (
            "apiVersion: security.istio.io/v2\nkind: PeerAuthentication\nmetadata: {name: x}".to_owned(),
            "apiVersion",
            "use security.istio.io/v1 or security.istio.io/v1beta1",
        ),
        // Service.
        (service("ports: [{port: 80}]"), "spec.clusterIP", "or clusterIP: None"),
        (service("clusterIP: 10.0.0.0/8, ports: [{port: 80}]"), "spec.clusterIP", "without a prefix length"),
        (service("clusterIP: 10.0.0.1"), "spec.ports", "add at least one port"),
        (service("clusterIP: 10.0.0.1, ports: [{port: 0}]"), "spec.ports[0].port", "from 1 to 65535"),
        (service("clusterIP: 10.0.0.1, ports: [{port: eighty}]"), "spec.ports[0].port", "expected i32"),
        (
            service("clusterIP: 10.0.0.1, ports: [{port: 80, targetPort: 70000}]"),
            "spec.ports[0].targetPort",
            "70000 is not a port",
        ),
        (
            service("clusterIP: 10.0.0.1, ports: [{port: 80}, {port: 81, name: b}]"),
            "spec.ports[0].name",
            "add a name",
        ),
        (
            service("clusterIP: 10.0.0.1, ports: [{port: 80, name: a}, {port: 80, name: b}]"),
            "spec.ports[1].port",
            "twice",
        ),
        (
            service("clusterIP: 10.0.0.1, ports: [{port: 80, name: a}, {port: 81, name: a}]"),
            "spec.ports[1].name",
            "names that differ",
        ),
        (
            service("clusterIP: 10.0.0.1, ports: [{port: 80, protocol: tcp}]"),
            "spec.ports[0].protocol",
            "use TCP or UDP, in upper case",
        ),
        (
            service("clusterIP: 10.0.0.1, clusterIPs: [10.0.0.2], ports: [{port: 80}]"),
            "spec.clusterIP",
            "make them equal",
        ),
        (
            service("clusterIPs: [10.0.0.1, 10.0.0.2], ports: [{port: 80}]"),
            "spec.clusterIPs[1]",
            "at most one IPv4 and one IPv6",
        ),
        (service("type: Magic, clusterIP: None"), "spec.type", "use ClusterIP"),
        (service("clusterIP: None, sessionAffinity: Cookie"), "spec.sessionAffinity", "use ClientIP or None"),
        (
            service(
                "clusterIP: None, sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 0}}",
            ),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            "1 to 86400",
        ),
        (
            service("clusterIP: None, internalTrafficPolicy: Near"),
            "spec.internalTrafficPolicy",
            "Cluster or Local",
        ),
        (service("clusterIP: None, trafficDistribution: Near"), "spec.trafficDistribution", "PreferSameZone"),
        // Pod.
        (pod("", "podIP: here"), "status.podIP", "write an IPv4 or IPv6 address"),
        (pod("", "podIPs: [{ip: 1.1.1.1}, {ip: 224.0.0.1}]"), "status.podIPs[1].ip", "unicast"),
        (pod("serviceAccountName: a b", ""), "spec.serviceAccountName", "name of a ServiceAccount"),
        (pod("initContainers: 5", ""), "spec.initContainers", "invalid type"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: p}".to_owned(), "spec", "no spec"),
        // EndpointSlice.
        (
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: e}\naddressType: IPv4"
                .to_owned(),
            "metadata.labels[\"kubernetes.io/service-name\"]",
            "add the label",
        ),
        (slice("addressType: FQDN"), "addressType", "list their addresses"),
        (
            slice("addressType: IPv4\nendpoints: [{addresses: [\"::1\"]}]"),
            "endpoints[0].addresses[0]",
            "slices of their own",
        ),
        (
            slice("addressType: IPv4\nendpoints: [{addresses: []}]"),
            "endpoints[0].addresses",
            "add its address",
        ),
        (slice("addressType: IPv4\nports: [{port: -1}]"), "ports[0].port", "-1 is not a port"),
        // PeerAuthentication.
        (peer("mtls: {mode: STRIKT}"), "spec.mtls.mode", "use STRICT, PERMISSIVE or UNSET"),
        (peer("mtls: {modus: STRICT}"), "spec.mtls.modus", "unknown field"),
        (peer("portLevelMtls: {80: {mode: STRICT}}"), "spec.portLevelMtls", "add spec.selector.matchLabels"),
        (
            peer("selector: {matchLabels: {a: b}}, portLevelMtls: {http: {mode: STRICT}}"),
            "spec.portLevelMtls.http",
            "use the number of a port",
        ),
        (
            peer("selector: {matchLabels: {a: b}}, portLevelMtls: {80: {mode: ON}}"),
            "spec.portLevelMtls.80.mode",
            "is not an mTLS mode",
        ),
        (peer("selector: {matchLabels: {a: b*}}"), "spec.selector.matchLabels.a", "exact value"),
        // AuthorizationPolicy.
        (authorization("acton: DENY"), "spec.acton", "correct the spelling"),
        (authorization("action: deny"), "spec.action", "use ALLOW or DENY"),
        (authorization("provider: {name: x}"), "spec.provider", "remove the provider"),
        (rule("form: []"), "spec.rules[0].form", "unknown field"),
        (rule("from: [{}]"), "spec.rules[0].from[0].source", "give at least one attribute"),
        (source(""), "spec.rules[0].from[0].source", "give at least one attribute"),
        (source("namespaces: [\"\"]"), "spec.rules[0].from[0].source.namespaces[0]", "the value is empty"),
        (
            source("namespaces: [a*b]"),
            "spec.rules[0].from[0].source.namespaces[0]",
            "one * at the beginning or at the end",
        ),
        (
            source("principals: [\"spiffe://td/ns/a/sa/b\"]"),
            "spec.rules[0].from[0].source.principals[0]",
            "write \"td/ns/a/sa/b\"",
        ),
        (
            source("ipBlocks: [10.0.0.0/33]"),
            "spec.rules[0].from[0].source.ipBlocks[0]",
            "a block like 10.0.0.0/8",
        ),
        (source("notIpBlocks: [somewhere]"), "spec.rules[0].from[0].source.notIpBlocks[0]", "address block"),
        (
            source("serviceAccounts: [a/b/c]"),
            "spec.rules[0].from[0].source.serviceAccounts[0]",
            "NAMESPACE/NAME",
        ),
        (
            source("serviceAccounts: [a], namespaces: [b]"),
            "spec.rules[0].from[0].source.serviceAccounts",
            "cannot be combined",
        ),
        (rule("to: [{operation: {ports: [\"0\"]}}]"), "spec.rules[0].to[0].operation.ports[0]", "1 to 65535"),
        (
            rule("to: [{operation: {ports: [http]}}]"),
            "spec.rules[0].to[0].operation.ports[0]",
            "is not a port",
        ),
        (
            rule("to: [{operation: {ports: [80]}}]"),
            "spec.rules[0].to[0].operation.ports[0]",
            "expected a string",
        ),
        (
            rule("when: [{key: source.colour, values: [red]}]"),
            "spec.rules[0].when[0].key",
            "is not an attribute",
        ),
        (rule("when: [{key: source.ip}]"), "spec.rules[0].when[0]", "it says nothing"),
        (
            authorization("selector: {matchLabels: {a: b}}, targetRefs: [{kind: Service, name: s}]"),
            "spec.targetRefs[0]",
            "remove one of the two",
        ),
        (
            authorization("targetRefs: [{kind: Gateway, name: g}]"),
            "spec.targetRefs[0].kind",
            "bind it to a Service",
        ),
    ];
    for (yaml, field, words) in cases {
        let Decoded::Broken { issues, .. } = decode_text(&yaml) else { panic!("accepted: {yaml}") };
        let hit = issues
            .iter()
            .filter(|i| i.is_error())
            .any(|i| i.field.to_string() == field && said(i).contains(words) && !i.remedy.is_empty());
        assert!(
            hit,
            "{yaml}\nwanted {field}: {words}\ngot {:#?}",
            issues.iter().map(said).collect::<Vec<_>>()
        );
    }
}

#[test]
fn a_load_balancer_is_an_annotation_and_an_unknown_one_a_warning() {
    let service = |value: &str| {
        good(&format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: s, annotations: {{nodemesh.io/load-balancer: {value}}}}}\n\
             spec: {{clusterIP: None}}"
        ))
    };
    for (value, algorithm, warnings) in [
        ("maglev", LbAlgorithm::Maglev, 0),
        ("random", LbAlgorithm::Random, 0),
        ("Maglev", LbAlgorithm::Random, 1),
        ("round-robin", LbAlgorithm::Random, 1),
    ] {
        let (object, issues) = service(value);
        let Object::Service(object) = object else { panic!("{object:?}") };
        assert_eq!((object.algorithm, issues.len()), (algorithm, warnings), "{value}");
        for issue in issues {
            let text = said(&issue);
            assert!(
                text.starts_with("warning metadata.annotations[\"nodemesh.io/load-balancer\"]: "),
                "{text}"
            );
            assert!(text.contains(value) && text.contains("use maglev or random"), "{text}");
        }
    }
}

#[test]
fn other_kinds_are_ignored_with_a_warning() {
    for yaml in [
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}",
        "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: x}",
    ] {
        let Decoded::Ignored(issue) = decode_text(yaml) else { panic!("{yaml}") };
        assert_eq!(issue.severity, crate::report::Severity::Warning);
    }
}

fn policy(spec: &str) -> (AuthorizationPolicy, Vec<Issue>) {
    let yaml = format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\nspec: {{{spec}}}"
    );
    match good(&yaml) {
        (Object::AuthorizationPolicy(policy), warnings) => (policy, warnings),
        other => panic!("{other:?}"),
    }
}

fn clause(m: Match) -> Clause {
    Clause { matches: vec![m] }
}

#[test]
fn rules_become_clauses() {
    let exact = |s: &str| StringMatch::Exact(s.to_owned());
    let (found, warnings) = policy(
        "rules: [{from: [{source: {principals: [td/ns/a/sa/b, \"*\", \"td/*\", \"*/sa/x\"], notNamespaces: [bad]}}, \
         {source: {ipBlocks: [10.0.0.0/8, 192.0.2.1], serviceAccounts: [web, a/b]}}], \
         to: [{operation: {ports: [\"80\"], notPorts: [\"81\"]}}], \
         when: [{key: destination.ip, values: [\"fd00::/64\"], notValues: [\"fd00::1\"]}, \
                {key: source.namespace, notValues: [x]}]}]",
    );
    assert_eq!(warnings, []);
    let suffix = |s: &str| StringMatch::Suffix(s.to_owned());
    let block = |address: &str, prefix_len| IpBlock { address: address.parse().unwrap(), prefix_len };
    let from = Clause {
        matches: vec![
            Match {
                principals: vec![
                    exact("td/ns/a/sa/b"),
                    StringMatch::Presence,
                    StringMatch::Prefix("td/".into()),
                    suffix("/sa/x"),
                ],
                not_namespaces: vec![exact("bad")],
                ..Match::default()
            },
            Match {
                source_ips: vec![block("10.0.0.0", 8), block("192.0.2.1", 32)],
                principals: vec![suffix("/ns/shop/sa/web"), suffix("/ns/a/sa/b")],
                ..Match::default()
            },
        ],
    };
    let to =
        clause(Match { destination_ports: vec![80], not_destination_ports: vec![81], ..Match::default() });
    let when = [
        clause(Match { destination_ips: vec![block("fd00::", 64)], ..Match::default() }),
        clause(Match { not_destination_ips: vec![block("fd00::1", 128)], ..Match::default() }),
        clause(Match { not_namespaces: vec![exact("x")], ..Match::default() }),
    ];
    let clauses = [from, to].into_iter().chain(when).collect();
    assert_eq!(found.rules, [Rule { clauses }]);
    assert_eq!((found.action, found.effect), (PolicyAction::Allow, Effect::Enforced));
}

#[test]
fn edges_of_meaning() {
    // Nothing is allowed, everything is matched, nothing is refused.
    assert_eq!(policy("").0.rules, []);
    assert_eq!(policy("rules: [{}]").0.rules, [Rule::default()]);
    let (deny, warnings) = policy("action: DENY");
    assert_eq!((deny.rules.len(), warnings.len()), (0, 1));
    // A selector without labels is none.
    assert_eq!(policy("selector: {matchLabels: {}}").0.target, PolicyTarget::All);
}

#[test]
fn what_l4_cannot_check_never_widens_access() {
    let l7 = "to: [{operation: {ports: [\"80\"], methods: [GET]}}]";
    let only_l7 = "to: [{operation: {paths: [/a]}}], from: [{source: {namespaces: [x]}}]";
    let one_of_two = "from: [{source: {requestPrincipals: [\"*\"]}}, {source: {namespaces: [x]}}]";
    let when = "when: [{key: \"request.headers[x]\", values: [y]}]";
    for (rule, denied) in [
        (l7, vec![clause(Match { destination_ports: vec![80], ..Match::default() })]),
        (
            only_l7,
            vec![clause(Match { namespaces: vec![StringMatch::Exact("x".into())], ..Match::default() })],
        ),
        // Either source is enough, and nothing is known about one of them: every source.
        (one_of_two, vec![]),
        (when, vec![]),
    ] {
        let (allow, warnings) = policy(&format!("rules: [{{{rule}}}]"));
        assert_eq!(allow.rules, [], "{rule}");
        assert_eq!(warnings.len(), 1, "{rule}");
        assert!(warnings[0].message.contains("allows nothing"), "{}", warnings[0].message);
        let (deny, warnings) = policy(&format!("action: DENY, rules: [{{{rule}}}]"));
        assert_eq!(deny.rules, [Rule { clauses: denied }], "{rule}");
        assert!(warnings[0].message.contains("refuses more"), "{}", warnings[0].message);
    }
    // Another rule of the same policy is not touched.
    let (allow, _) = policy(&format!("rules: [{{{l7}}}, {{}}]"));
    assert_eq!(allow.rules, [Rule::default()]);
}

#[test]
fn actions_that_are_not_supported() {
    let (custom, warnings) = policy("action: CUSTOM, provider: {name: x}, rules: [{}]");
    assert_eq!((custom.action, custom.rules.len(), warnings.len()), (PolicyAction::Deny, 1, 1));
    let (audit, warnings) = policy("action: AUDIT, rules: [{}]");
    assert_eq!((audit.effect, warnings.len()), (Effect::None, 1));
    let dry_run = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
                   metadata: {name: p, annotations: {istio.io/dry-run: \"true\"}}\nspec: {action: DENY, rules: [{}]}";
    let (Object::AuthorizationPolicy(policy), warnings) = good(dry_run) else { panic!() };
    assert_eq!((policy.effect, warnings.len()), (Effect::None, 1));
}

#[test]
fn a_broken_policy_has_a_fallback_that_refuses() {
    let fallback = |kind: &str, spec: &str| {
        let yaml = format!(
            "apiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: p, namespace: shop}}\nspec: {{wrong: 1, {spec}}}"
        );
        match decode_text(&yaml) {
            Decoded::Broken { fallback: Some(fallback), .. } => *fallback,
            other => panic!("{other:?}"),
        }
    };
    let select = "selector: {matchLabels: {app: x}}";
    for (spec, action, rules, chosen) in [
        ("", PolicyAction::Allow, 0, false),
        ("action: ALLOW", PolicyAction::Allow, 0, false),
        (select, PolicyAction::Allow, 0, true),
        ("action: DENY", PolicyAction::Deny, 1, false),
        ("action: 5", PolicyAction::Deny, 1, false),
        ("action: CUSTOM, selector: 7", PolicyAction::Deny, 1, false),
    ] {
        let Object::AuthorizationPolicy(policy) = fallback("AuthorizationPolicy", spec) else { panic!() };
        assert_eq!(
            (policy.action, policy.rules.len(), policy.effect),
            (action, rules, Effect::Enforced),
            "{spec}"
        );
        assert_eq!(policy.target != PolicyTarget::All, chosen, "{spec}");
    }
    let Object::PeerAuthentication(peer) = fallback("PeerAuthentication", select) else { panic!() };
    assert_eq!(peer.mode, MtlsMode::Strict);
    assert!(peer.selector.is_some());
}
