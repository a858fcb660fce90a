//! YAML in, model out; and the property that history does not matter.

use super::*;
use crate::{
    decode::{self, Decoded},
    report::Severity,
};
use mesh_xds::model::{
    Action, AppProtocol, Health, LbMode, LbScope, Protocol, Scope, StringMatch, TargetPort, Workload,
    WorkloadKind,
};
use std::time::Duration;

/// Reads a multi-document text; every object has to be good.
fn objects(yaml: &str) -> Vec<Object> {
    yaml.split("\n---\n")
        .filter(|text| !text.trim().is_empty())
        .map(|text| match decode::decode(&serde_yaml_ng::from_str(text).unwrap()) {
            Decoded::Good { object, .. } => *object,
            other => panic!("{text}\n{other:?}"),
        })
        .collect()
}

fn index(yaml: &str) -> Index {
    let mut index = Index::new(Settings::default());
    for object in objects(yaml) {
        index.apply(Event::Put(object));
    }
    index
}

fn workload(snapshot: &Snapshot, name: &str) -> Workload {
    let uid = format!("Kubernetes//Pod/{name}");
    (**snapshot.workloads().get(uid.as_str()).unwrap_or_else(|| panic!("no {uid}"))).clone()
}

fn tcp(workload: &Workload, service: &str) -> Vec<(u16, u16)> {
    let key = format!("shop/{service}.shop.svc.cluster.local");
    let member = workload.services.get(&key);
    member.map(|m| m.tcp.iter().map(|p| (p.service_port, p.target_port)).collect()).unwrap_or_default()
}

const SHOP: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {nodemesh.io/enabled: "true"}}
---
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {topology.kubernetes.io/region: r, topology.kubernetes.io/zone: z1}}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec:
  clusterIPs: [10.96.0.1, "fd00::1"]
  selector: {app: cart}
  sessionAffinity: ClientIP
  trafficDistribution: PreferSameNode
  ports:
  - {name: http, port: 80, targetPort: web}
  - {name: grpc-admin, port: 81, targetPort: 9000}
  - {name: dns, port: 53, protocol: UDP, targetPort: 5353}
  - {name: odd, port: 82, appProtocol: kubernetes.io/h2c}
---
apiVersion: v1
kind: Pod
metadata:
  name: cart-7d4-x
  namespace: shop
  labels: {app: cart, version: v2, pod-template-hash: 7d4}
  ownerReferences:
  - {apiVersion: apps/v1, kind: ReplicaSet, name: cart-7d4, uid: u, controller: true}
spec:
  nodeName: n1
  serviceAccountName: cart
  containers:
  - {name: c, ports: [{name: web, containerPort: 8080}]}
status:
  podIP: 10.244.1.5
  podIPs: [{ip: 10.244.1.5}, {ip: "fd00:244::5"}]
  conditions: [{type: Ready, status: "True"}]
---
apiVersion: v1
kind: Pod
metadata: {name: cart-old, namespace: shop, labels: {app: cart}}
spec: {nodeName: n2, containers: [{name: c, ports: [{name: web, containerPort: 8081}]}]}
status: {podIP: 10.244.1.6, conditions: [{type: Ready, status: "True"}]}
"#;

#[test]
fn a_service_and_its_pods() {
    let snapshot = index(SHOP).snapshot();
    let service = &snapshot.services()["shop/cart.shop.svc.cluster.local"];
    assert_eq!(service.hostname, "cart.shop.svc.cluster.local");
    let vips: Vec<String> = service.addresses.iter().map(|a| a.ip.to_string()).collect();
    assert_eq!(vips, ["10.96.0.1", "fd00::1"]);
    assert_eq!(service.session_affinity.unwrap().timeout, Duration::from_secs(10_800));
    let ports: Vec<_> =
        service.ports.iter().map(|p| (p.port, p.target_port, p.protocol, p.app_protocol)).collect();
    assert_eq!(
        ports,
        [
            (80, 0, Protocol::Tcp, AppProtocol::Http1),
            (81, 9000, Protocol::Tcp, AppProtocol::Grpc),
            (53, 5353, Protocol::Udp, AppProtocol::Unknown),
            (82, 82, Protocol::Tcp, AppProtocol::Http2),
        ]
    );
    assert_eq!(service.load_balancing.mode, LbMode::Failover);
    assert_eq!(service.load_balancing.routing_preference.last(), Some(&LbScope::Node));

    let pod = workload(&snapshot, "shop/cart-7d4-x");
    assert_eq!(pod.identity().unwrap().to_string(), "spiffe://cluster.local/ns/shop/sa/cart");
    assert_eq!(pod.addresses.len(), 2);
    assert_eq!((pod.locality.region.as_str(), pod.locality.zone.as_str()), ("r", "z1"));
    assert_eq!((pod.workload_name.as_str(), pod.kind), ("cart", WorkloadKind::Deployment));
    assert_eq!((pod.canonical_name.as_str(), pod.canonical_revision.as_str()), ("cart", "v2"));
    assert!(pod.in_mesh());
    assert_eq!(pod.health, Health::Healthy);
    assert_eq!(tcp(&pod, "cart"), [(80, 8080), (81, 9000), (82, 82)]);
    let udp = &pod.services["shop/cart.shop.svc.cluster.local"].udp;
    assert_eq!(udp, &[TargetPort { service_port: 53, target_port: 5353 }]);
    // A named port is the number that each pod gives it.
    assert_eq!(tcp(&workload(&snapshot, "shop/cart-old"), "cart")[0], (80, 8081));
}

/// A pod of namespace shop with more metadata, spec and status.
fn pod(name: &str, metadata: &str, spec: &str, status: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, {metadata}}}\n\
         spec: {{nodeName: n1, containers: [], {spec}}}\nstatus: {{{status}}}\n"
    )
}

const READY: &str = r#"conditions: [{type: Ready, status: "True"}]"#;

#[test]
fn who_is_in_the_mesh() {
    for (labels, spec, wanted) in [
        ("", "", true),
        ("nodemesh.io/enabled: \"false\"", "", false),
        ("istio.io/dataplane-mode: none", "", false),
        ("nodemesh.io/enabled: \"true\", istio.io/dataplane-mode: none", "", true),
        ("", "hostNetwork: true", false),
        ("nodemesh.io/enabled: \"true\"", "hostNetwork: true", false),
        ("networking.istio.io/tunnel: http, nodemesh.io/enabled: \"false\"", "", true),
    ] {
        let text = pod("p", &format!("labels: {{{labels}}}"), spec, "podIP: 10.244.1.9");
        let snapshot = index(&format!("{SHOP}\n---\n{text}")).snapshot();
        assert_eq!(workload(&snapshot, "shop/p").in_mesh(), wanted, "{labels} {spec}");
    }
    // The alias on the namespace; a namespace that says nothing; one that does not exist.
    for (labels, wanted) in [
        ("istio.io/dataplane-mode: ambient", true),
        ("nodemesh.io/enabled: \"false\"", false),
        ("a: b", false),
    ] {
        let ns = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{{labels}}}}}\n");
        let snapshot = index(&format!("{ns}\n---\n{}", pod("p", "", "", "podIP: 10.244.1.9"))).snapshot();
        assert_eq!(workload(&snapshot, "shop/p").in_mesh(), wanted, "{labels}");
    }
    let with_sidecar = pod("p", "annotations: {sidecar.istio.io/status: x}", "", "podIP: 10.244.1.9");
    assert!(!workload(&index(&format!("{SHOP}\n---\n{with_sidecar}")).snapshot(), "shop/p").in_mesh());
}

#[test]
fn health_and_life_of_pods() {
    let app = "labels: {app: cart}";
    let cases = [
        (pod("p", app, "", &format!("podIP: 10.244.1.9, {READY}")), Some(Health::Healthy)),
        (pod("p", app, "", "podIP: 10.244.1.9"), Some(Health::Unhealthy)),
        (
            pod(
                "p",
                &format!("{app}, deletionTimestamp: \"2026-01-01T00:00:00Z\""),
                "",
                &format!("podIP: 10.244.1.9, {READY}"),
            ),
            Some(Health::Unhealthy),
        ),
        (pod("p", app, "", &format!("phase: Succeeded, podIP: 10.244.1.9, {READY}")), None),
        // Without an address it is there for its node, and only for clients that can read it.
        (pod("p", app, "", ""), Some(Health::Unhealthy)),
    ];
    for (text, wanted) in cases {
        let snapshot = index(&format!("{SHOP}\n---\n{text}")).snapshot();
        let found = snapshot.workloads().get("Kubernetes//Pod/shop/p").map(|w| w.health);
        assert_eq!(found, wanted, "{text}");
    }
}

const SLICED: &str = r#"
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: cart-1, namespace: shop, labels: {kubernetes.io/service-name: cart}}
addressType: IPv4
ports:
- {name: http, port: 7000}
- {name: dns, port: 7053, protocol: UDP}
endpoints:
- {addresses: [10.244.1.5], targetRef: {kind: Pod, name: cart-7d4-x}}
- {addresses: [10.244.1.6], conditions: {ready: false}}
- {addresses: [192.0.2.7], zone: z9}
- {addresses: [192.0.2.8], conditions: {ready: true, terminating: true}}
"#;

#[test]
fn slices_take_the_place_of_labels() {
    let mut index = index(&format!("{SHOP}\n---\n{SLICED}"));
    let snapshot = index.snapshot();
    assert_eq!(tcp(&workload(&snapshot, "shop/cart-7d4-x"), "cart"), [(80, 7000)]);
    // Found by its address, but not ready there.
    assert_eq!(tcp(&workload(&snapshot, "shop/cart-old"), "cart"), []);
    let external = &snapshot.workloads()["Kubernetes/discovery.k8s.io/EndpointSlice/shop/192.0.2.7"];
    assert!(!external.in_mesh());
    assert_eq!((tcp(external, "cart"), external.locality.zone.as_str()), (vec![(80, 7000)], "z9"));
    let leaving = &snapshot.workloads()["Kubernetes/discovery.k8s.io/EndpointSlice/shop/192.0.2.8"];
    assert_eq!(tcp(leaving, "cart"), []);
    // Without the last slice the labels count again, and endpoints that are no pods are gone.
    index.apply(Event::Delete(ObjectKey::new(Kind::EndpointSlice, "shop", "cart-1")));
    let snapshot = index.snapshot();
    assert_eq!(tcp(&workload(&snapshot, "shop/cart-old"), "cart")[0], (80, 8081));
    assert!(snapshot.workloads().keys().all(|uid| uid.contains("//Pod/")));
}

#[test]
fn unready_endpoints_of_a_service_that_wants_them() {
    let yaml = format!("{SHOP}\n---\n{SLICED}")
        .replace("sessionAffinity: ClientIP", "publishNotReadyAddresses: true");
    let snapshot = index(&yaml).snapshot();
    assert!(snapshot.services()["shop/cart.shop.svc.cluster.local"].load_balancing.allow_unhealthy);
    assert_eq!(tcp(&workload(&snapshot, "shop/cart-old"), "cart"), [(80, 7000)]);
}

#[test]
fn claims_to_one_address() {
    let rival = "apiVersion: v1\nkind: Service\nmetadata: {name: a-rival, namespace: shop}\n\
                 spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n";
    let mut by_name = index(&format!("{SHOP}\n---\n{rival}"));
    let snapshot = by_name.snapshot();
    assert_eq!(snapshot.services()["shop/a-rival.shop.svc.cluster.local"].addresses.len(), 1);
    assert_eq!(snapshot.services()["shop/cart.shop.svc.cluster.local"].addresses.len(), 1);
    let problems = by_name.problems();
    let clash: Vec<_> = problems.iter().filter(|(_, i)| i.message.contains("10.96.0.1 belongs to")).collect();
    assert_eq!(clash.len(), 1);
    assert_eq!(clash[0].0.to_string(), "Service shop/cart");
    assert_eq!(clash[0].1.severity, Severity::Error);
    // When the winner goes, the other one gets its address back.
    by_name.apply(Event::Delete(ObjectKey::new(Kind::Service, "shop", "a-rival")));
    assert_eq!(by_name.snapshot().services()["shop/cart.shop.svc.cluster.local"].addresses.len(), 2);
}

/// Objects that are good alone and not together: who is told, in which field, and what to do. The rest is served.
#[test]
fn objects_that_do_not_fit_together_are_told_so() {
    let service = |name: &str, spec: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{{spec}, ports: [{{port: 80}}]}}\n"
        )
    };
    let pod = |name: &str, ip: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{nodeName: n1, containers: [{{name: c}}]}}\nstatus: {{podIP: {ip}}}\n"
        )
    };
    let slice = |name: &str, service: &str, endpoints: &str| {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
             metadata: {{name: {name}, namespace: shop, labels: {{kubernetes.io/service-name: {service}}}}}\n\
             endpoints: [{endpoints}]\n"
        )
    };
    let cases: [(&str, String, &str, &str, &str, &str); 9] = [
        (
            "one VIP twice",
            service("z", "clusterIP: 10.96.0.1"),
            "Service shop/z",
            "spec.clusterIP",
            "10.96.0.1 belongs to Service shop/cart",
            "another address",
        ),
        (
            "one IPv6 VIP twice",
            service("z", "clusterIP: \"fd00::1\""),
            "Service shop/z",
            "spec.clusterIP",
            "fd00::1 belongs to Service shop/cart",
            "another address",
        ),
        (
            "a VIP that is a pod's",
            service("z", "clusterIP: 10.244.1.5"),
            "Service shop/z",
            "spec.clusterIP",
            "10.244.1.5 belongs to Pod shop/cart-7d4-x as well",
            "another address",
        ),
        (
            "one pod address twice",
            pod("z", "10.244.1.5"),
            "Pod shop/",
            "status.podIP",
            "10.244.1.5 belongs to Pod shop/",
            "another address",
        ),
        (
            "no pod with its labels",
            service("z", "clusterIP: 10.96.0.9, selector: {app: nobody}"),
            "Service shop/z",
            "spec.selector",
            "has no endpoints",
            "correct the selector",
        ),
        (
            "a port that no pod names",
            service("z", "clusterIP: 10.96.0.9, selector: {app: cart}")
                .replace("port: 80", "port: 80, targetPort: none"),
            "Service shop/z",
            "spec.ports[0].targetPort",
            "no pod of the service has a container port named \"none\"",
            "give the number",
        ),
        (
            "a slice of no service",
            slice("z", "nothing", "{addresses: [10.244.1.5]}"),
            "EndpointSlice shop/z",
            "metadata.labels[\"kubernetes.io/service-name\"]",
            "there is no Service shop/nothing",
            "add the Service",
        ),
        (
            "an endpoint of no pod",
            slice("z", "cart", "{addresses: [10.9.9.9], targetRef: {kind: Pod, name: gone}}"),
            "EndpointSlice shop/z",
            "endpoints[0].targetRef",
            "there is no Pod shop/gone",
            "add the Pod",
        ),
        (
            "a pod of no namespace",
            pod("z", "10.244.9.9").replace("namespace: shop", "namespace: nowhere"),
            "Pod nowhere/z",
            "metadata.namespace",
            "there is no Namespace nowhere",
            "add the Namespace",
        ),
    ];
    for (name, more, object, field, message, remedy) in cases {
        let mut index = index(&format!("{SHOP}\n---\n{more}"));
        let snapshot = index.snapshot();
        assert!(!snapshot.services()["shop/cart.shop.svc.cluster.local"].addresses.is_empty(), "{name}");
        let problems = index.problems();
        let hit = problems.iter().any(|(key, issue)| {
            key.to_string().starts_with(object)
                && issue.field.to_string() == field
                && issue.message.contains(message)
                && issue.remedy.contains(remedy)
        });
        assert!(hit, "{name}: {problems:#?}");
    }
}

#[test]
fn a_service_without_endpoints_is_served_without_any() {
    for more in ["selector: {app: nobody}, ", ""] {
        let yaml = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: z, namespace: shop}}\n\
             spec: {{clusterIP: 10.96.0.9, {more}ports: [{{port: 80}}]}}\n"
        );
        let snapshot = index(&format!("{SHOP}\n---\n{yaml}")).snapshot();
        assert_eq!(
            snapshot.services()["shop/z.shop.svc.cluster.local"].addresses.len(),
            1,
            "nodes refuse at once"
        );
        let backs = |w: &Workload| w.services.contains_key("shop/z.shop.svc.cluster.local");
        assert!(!snapshot.workloads().values().any(|w| backs(w)));
    }
}

#[test]
fn a_change_of_one_endpoint_is_a_change_of_one_resource() {
    use mesh_xds::{convert::ADDRESS_TYPE, delta::View};
    let mut index = index(SHOP);
    let before = index.snapshot();
    let text = SHOP.split("\n---\n").last().unwrap().replace("status: \"True\"", "status: \"False\"");
    index.apply(Event::Put(objects(&text).remove(0)));
    let after = index.snapshot();
    let mut changed = Vec::new();
    after.resources().changed_since(before.resources(), ADDRESS_TYPE, &mut |n| changed.push(n.to_string()));
    assert_eq!(changed, ["Kubernetes//Pod/shop/cart-old"]);
    // An event without a difference publishes nothing.
    index.apply(Event::Put(objects(&text).remove(0)));
    assert!(Arc::ptr_eq(&index.snapshot(), &after));
}

#[test]
fn pods_without_an_address_are_for_nodes_that_understand_them() {
    use mesh_xds::{
        convert::ADDRESS_TYPE,
        delta::{Audience, FilteredView, View},
    };
    let snapshot =
        index(&format!("{SHOP}\n---\n{}", pod("new", "", "serviceAccountName: new", ""))).snapshot();
    let sees = |audience| {
        let view = FilteredView::new(snapshot.resources().clone(), audience);
        view.get(ADDRESS_TYPE, "Kubernetes//Pod/shop/new").is_some()
    };
    assert!(sees(Audience::Nodemesh));
    assert!(!sees(Audience::Everyone));
    assert!(snapshot.runs_on("n1", &"spiffe://cluster.local/ns/shop/sa/new".parse().unwrap()));
    assert!(!snapshot.runs_on("n2", &"spiffe://cluster.local/ns/shop/sa/new".parse().unwrap()));
}

fn peer_authentication(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
         metadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n"
    )
}

#[test]
fn mtls_modes_and_their_inheritance() {
    const STRICT: &str = "istio-system/istio_converted_static_strict";
    const OWN: &str = "shop/converted_peer_authentication_own";
    let mode = |m: &str| format!("mtls: {{mode: {m}}}");
    let own = |mode: &str, ports: &str| {
        format!(
            "selector: {{matchLabels: {{app: cart}}}}, mtls: {{mode: {mode}}}, portLevelMtls: {{{ports}}}"
        )
    };
    let (strict, permissive, unset) = ("{mode: STRICT}", "{mode: PERMISSIVE}", "{mode: UNSET}");
    let port = |mode: &str| format!("8080: {mode}");
    // mesh, namespace, workload -> policies
    for (mesh, namespace, workload_spec, wanted) in [
        ("UNSET", "UNSET", None, None),
        ("STRICT", "UNSET", None, Some(STRICT)),
        ("STRICT", "PERMISSIVE", None, None),
        ("PERMISSIVE", "STRICT", None, Some(STRICT)),
        ("STRICT", "STRICT", Some(own("PERMISSIVE", "")), None),
        ("UNSET", "UNSET", Some(own("STRICT", "")), Some(STRICT)),
        ("UNSET", "DISABLE", Some(own("STRICT", "")), Some(STRICT)),
        ("UNSET", "UNSET", Some(own("STRICT", &port(strict))), Some(STRICT)),
        ("UNSET", "UNSET", Some(own("STRICT", &port(permissive))), Some(OWN)),
        ("STRICT", "UNSET", Some(own("UNSET", &port(permissive))), Some(OWN)),
        ("STRICT", "UNSET", Some(own("UNSET", &port(unset))), Some(STRICT)),
        ("STRICT", "PERMISSIVE", Some(own("UNSET", &port(permissive))), None),
        ("UNSET", "UNSET", Some(own("PERMISSIVE", &port(strict))), Some(OWN)),
        ("UNSET", "UNSET", Some(own("UNSET", &port(strict))), Some(OWN)),
    ] {
        let mut text = [
            SHOP.to_owned(),
            peer_authentication("istio-system", "default", &mode(mesh)),
            peer_authentication("shop", "default", &mode(namespace)),
        ]
        .join("\n---\n");
        if let Some(spec) = &workload_spec {
            text = format!("{text}\n---\n{}", peer_authentication("shop", "own", spec));
        }
        let snapshot = index(&text).snapshot();
        let found = workload(&snapshot, "shop/cart-7d4-x").policies;
        let case = format!("{mesh} {namespace} {workload_spec:?}");
        assert_eq!(found, wanted.into_iter().collect::<Vec<_>>(), "{case}");
        assert!(found.iter().all(|p| snapshot.policies().contains_key(p.as_str())), "{case}");
        // A converted form exists exactly when a workload needs it.
        assert_eq!(snapshot.policies().contains_key(OWN), wanted == Some(OWN), "{case}");
    }
}

#[test]
fn mtls_policies_in_istios_form() {
    let own = |mode: &str, ports: &str| {
        let spec = format!(
            "selector: {{matchLabels: {{app: cart}}}}, mtls: {{mode: {mode}}}, portLevelMtls: {{{ports}}}"
        );
        let text = format!("{SHOP}\n---\n{}", peer_authentication("shop", "own", &spec));
        let snapshot = index(&text).snapshot();
        (*snapshot.policies()["shop/converted_peer_authentication_own"]).clone()
    };
    let policy = own("STRICT", "8080: {mode: PERMISSIVE}, 9090: {mode: DISABLE}");
    assert_eq!((policy.scope, policy.action), (Scope::WorkloadSelector, Action::Deny));
    let clauses = &policy.rules[0].clauses;
    assert_eq!((policy.rules.len(), clauses.len()), (1, 2));
    assert_eq!(clauses[0].matches[0].not_principals, [StringMatch::Presence]);
    assert_eq!(clauses[1].matches[0].not_destination_ports, [8080, 9090]);

    let policy = own("PERMISSIVE", "\"8080\": {mode: STRICT}, 9090: {mode: STRICT}");
    let matches = &policy.rules[0].clauses[0].matches;
    assert_eq!((policy.rules[0].clauses.len(), matches.len()), (1, 1));
    assert_eq!(matches[0].not_principals, [StringMatch::Presence]);
    assert_eq!(matches[0].destination_ports, [8080, 9090]);
}

fn authorization(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1beta1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n"
    )
}

#[test]
fn scopes_of_authorization_policies() {
    let select = "selector: {matchLabels: {app: cart}}";
    let text = [
        SHOP.to_owned(),
        authorization("shop", "wide", ""),
        authorization("shop", "chosen", select),
        authorization("shop", "other", "selector: {matchLabels: {app: other}}"),
        authorization("shop", "service", "targetRefs: [{group: \"\", kind: Service, name: cart}]"),
        authorization("istio-system", "mesh", "action: DENY, rules: [{}]"),
        authorization("istio-system", "mesh-chosen", select),
        authorization("elsewhere", "chosen", select),
        authorization("shop", "audit", &format!("action: AUDIT, {select}")),
    ]
    .join("\n---\n");
    let mut index = index(&text);
    let snapshot = index.snapshot();
    let listed = workload(&snapshot, "shop/cart-7d4-x").policies;
    assert_eq!(listed, ["istio-system/mesh-chosen", "shop/chosen", "shop/service"]);
    let scope = |name: &str| snapshot.policies().get(name).map(|p| p.scope);
    assert_eq!(scope("shop/wide"), Some(Scope::Namespace));
    assert_eq!(scope("shop/chosen"), Some(Scope::WorkloadSelector));
    assert_eq!(scope("istio-system/mesh"), Some(Scope::Global));
    assert_eq!(scope("shop/audit"), None);
    assert_eq!(snapshot.policies()["shop/wide"].rules, []);
    // A pod that stops being ready keeps the policies of its service.
    let text = SHOP.split("\n---\n").nth(3).unwrap().replace("\"True\"", "\"False\"");
    index.apply(Event::Put(objects(&text).remove(0)));
    assert_eq!(workload(&index.snapshot(), "shop/cart-7d4-x").policies, listed);
}

mod history {
    //! An index that saw any history equals one that was given the final objects only.

    use super::*;
    use proptest::prelude::*;

    fn choice(names: &'static [&'static str]) -> impl Strategy<Value = String> {
        proptest::sample::select(names).prop_map(str::to_owned)
    }

    /// Few names and addresses, so that objects meet, clash and replace each other.
    fn object() -> impl Strategy<Value = String> {
        let ns = || choice(&["shop", "shop", "shop", "istio-system"]);
        let name = || choice(&["a", "b"]);
        let app = || choice(&["x", "y"]);
        let ip = || choice(&["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
        let yes = || any::<bool>();
        prop_oneof![
            (ns(), choice(&["\"true\"", "\"false\"", "maybe"])).prop_map(|(n, v)| format!(
                "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {n}, labels: {{nodemesh.io/enabled: {v}}}}}"
            )),
            (name(), name()).prop_map(|(n, z)| format!(
                "apiVersion: v1\nkind: Node\nmetadata: {{name: {n}, labels: {{topology.kubernetes.io/zone: {z}}}}}"
            )),
            (ns(), name(), app(), ip(), yes(), yes()).prop_map(|(ns, n, app, ip, selector, old)| format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: {n}, namespace: {ns}{}}}\nspec: {{clusterIP: {ip}, {}ports: [{{port: 80, targetPort: web}}]}}",
                if old { ", creationTimestamp: \"2020-01-01T00:00:00Z\"" } else { "" },
                if selector { format!("selector: {{app: {app}}}, ") } else { String::new() },
            )),
            (ns(), name(), name(), ip(), proptest::option::of(name()), yes(), yes()).prop_map(
                |(ns, n, service, ip, target, ready, v6)| format!(
                    "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {n}, namespace: {ns}, labels: {{kubernetes.io/service-name: {service}}}}}\naddressType: {}\nports: [{{port: 8000}}]\nendpoints: [{{addresses: [\"{}\"], nodeName: {n}, conditions: {{ready: {ready}}}{}}}]",
                    if v6 { "IPv6" } else { "IPv4" },
                    if v6 { "fd00::1" } else { &ip },
                    target.map(|t| format!(", targetRef: {{kind: Pod, name: {t}}}")).unwrap_or_default(),
                )
            ),
            (ns(), name(), app(), proptest::option::of(ip()), name(), yes(), yes(), 0..6u8).prop_map(
                |(ns, n, app, ip, node, ready, mesh, odd)| format!(
                    "apiVersion: v1\nkind: Pod\nmetadata: {{name: {n}, namespace: {ns}, labels: {{app: {app}{}}}{}}}\nspec: {{nodeName: {node}, hostNetwork: {}, containers: [{{name: c, ports: [{{name: web, containerPort: 8080}}]}}]}}\nstatus: {{{}phase: {}, conditions: [{{type: Ready, status: \"{}\"}}]}}",
                    if mesh { ", nodemesh.io/enabled: \"true\"" } else { "" },
                    if odd == 1 { ", deletionTimestamp: \"2026-01-01T00:00:00Z\"" } else { "" },
                    odd == 2,
                    ip.map(|ip| format!("podIP: {ip}, ")).unwrap_or_default(),
                    if odd == 3 { "Succeeded" } else { "Running" },
                    if ready { "True" } else { "False" },
                )
            ),
            (ns(), name(), app(), choice(&["STRICT", "PERMISSIVE", "UNSET"]), choice(&["STRICT", "PERMISSIVE"]), yes()).prop_map(
                |(ns, n, app, mode, port, selector)| peer_authentication(
                    &ns,
                    &n,
                    &if selector {
                        format!("selector: {{matchLabels: {{app: {app}}}}}, mtls: {{mode: {mode}}}, portLevelMtls: {{80: {{mode: {port}}}}}")
                    } else {
                        format!("mtls: {{mode: {mode}}}")
                    }
                )
            ),
            (ns(), name(), app(), name(), 0..3u8).prop_map(|(ns, n, app, service, target)| authorization(
                &ns,
                &n,
                &match target {
                    0 => "rules: [{}]".to_owned(),
                    1 => format!("selector: {{matchLabels: {{app: {app}}}}}"),
                    _ => format!("targetRefs: [{{kind: Service, name: {service}}}]"),
                }
            )),
        ]
    }

    fn sorted_problems(index: &Index) -> Vec<String> {
        let mut all: Vec<_> = index.problems().iter().map(|p| format!("{p:?}")).collect();
        all.sort();
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn does_not_matter(steps in proptest::collection::vec((object(), any::<bool>(), any::<bool>()), 1..60)) {
            let mut incremental = Index::new(Settings::default());
            let mut present = BTreeMap::new();
            for (text, delete, publish) in steps {
                let object = objects(&text).remove(0);
                let key = object.key();
                if delete {
                    present.remove(&key);
                    incremental.apply(Event::Delete(key));
                } else {
                    present.insert(key, object.clone());
                    incremental.apply(Event::Put(object));
                }
                if publish {
                    incremental.snapshot();
                }
            }
            let mut fresh = Index::new(Settings::default());
            for object in present.into_values().rev() {
                fresh.apply(Event::Put(object));
            }
            let (a, b) = (incremental.snapshot(), fresh.snapshot());
            prop_assert_eq!(a.services(), b.services());
            prop_assert_eq!(a.workloads(), b.workloads());
            prop_assert_eq!(a.policies(), b.policies());
            prop_assert!(*a == *b);
            prop_assert_eq!(sorted_problems(&incremental), sorted_problems(&fresh));
            prop_assert_eq!(versions(&a), versions(&b));
        }
    }

    fn versions(snapshot: &Snapshot) -> BTreeMap<(Arc<str>, &'static str), Arc<str>> {
        use mesh_xds::{
            convert::{ADDRESS_TYPE, AUTHORIZATION_TYPE, WORKLOAD_TYPE},
            delta::View,
        };
        let mut all = BTreeMap::new();
        for type_url in [ADDRESS_TYPE, AUTHORIZATION_TYPE, WORKLOAD_TYPE] {
            snapshot.resources().for_each(type_url, &mut |r| {
                all.insert((r.name.clone(), type_url), r.version.clone());
            });
        }
        all
    }
}

#[test]
fn host_names_and_port_names_reach_dns() {
    let pod = |name: &str, ip: &str, extra: &str| {
        format!(
            "\n---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: db}}}}\n\
             spec: {{nodeName: n1, {extra}containers: [{{name: c}}]}}\n\
             status: {{podIP: {ip}, conditions: [{{type: Ready, status: \"True\"}}]}}\n"
        )
    };
    let yaml =
        "apiVersion: v1\nkind: Service\nmetadata: {name: db, namespace: shop}\nspec:\n  clusterIP: None\n  \
                selector: {app: db}\n  ports: [{name: sql, port: 5432}]\n"
            .to_owned()
            + &pod("db-0", "10.0.0.1", "hostname: db-0, subdomain: db, ")
            + &pod("db-1", "10.0.0.2", "hostname: db-1, subdomain: other, ")
            + &pod("db-2", "10.0.0.3", "");
    let snapshot = index(&yaml).snapshot();
    let key = "shop/db.shop.svc.cluster.local";
    let hostname = |pod: &str| workload(&snapshot, pod).services[key].hostname.clone();
    assert_eq!(["shop/db-0", "shop/db-1", "shop/db-2"].map(hostname), ["db-0", "", ""]);
    assert_eq!(snapshot.services()[key].port_names[&(5432, Protocol::Tcp)], "sql");
}
