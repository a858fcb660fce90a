//! Peers that must be refused, each counted with its reason and logged with both addresses; and a right one, written
//! against the wire format alone, that must be served.

use crate::support::{PROPAGATION, await_refusal, mesh, vip};
use anyhow::{Context, Result};
use mesh_tests::{
    app::ports,
    cluster::Cluster,
    peer::{TlsServer, Tunnel, open_tunnel},
    pki::{Ca, Identity},
    wait,
};
use std::net::SocketAddr;

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const GUEST: &str = "spiffe://cluster.local/ns/shop/sa/guest";

fn mesh_ca(cluster: &Cluster) -> Result<Ca> {
    Ca::of_mesh(cluster.control.as_ref().context("no control plane")?)
}

/// Dials pay-0's HBONE port from a pod outside the mesh.
fn tunnel_to_pay(cluster: &Cluster, identity: Option<Identity>, authority: Option<&str>) -> Result<Tunnel> {
    let pay = cluster.pod("shop/pay-0")?.spec.v4;
    let authority = authority.map_or_else(|| format!("{pay}:{}", ports::WHO), str::to_owned);
    let from = &cluster.pod("shop/batch-0")?.netns;
    open_tunnel(from, identity, SocketAddr::from((pay, 15008)), &authority, "ping")
}

/// Whether the daemon's log has a line about a refusal for `reason` that names both addresses.
fn logged(cluster: &Cluster, node: &str, reason: &str, a: &str, b: &str) -> Result<()> {
    wait::until_true(&format!("a log line with {reason}, {a} and {b} on {node}"), PROPAGATION, || {
        let log = cluster.node(node)?.daemon()?.proc.log();
        Ok(log.lines().any(|line| [reason, a, b].iter().all(|part| line.contains(part))))
    })
}

#[test]
fn a_right_peer_is_served_and_its_identity_is_authorized() -> Result<()> {
    let cluster = mesh()?;
    let ca = mesh_ca(&cluster)?;
    let Tunnel::Answered(answer) = tunnel_to_pay(&cluster, Some(ca.issue(WEB)?), None)? else {
        panic!("the tunnel did not open");
    };
    assert!(answer.starts_with("ping pay-0 "), "{answer}");
    let before = cluster.node("node-b")?.scrape()?;
    assert_eq!(tunnel_to_pay(&cluster, Some(ca.issue(GUEST)?), None)?, Tunnel::Status(401));
    await_refusal(&cluster, "node-b", &before, "denied")?;
    Ok(())
}

#[test]
fn bad_requests_of_a_right_peer_get_their_status() -> Result<()> {
    let cluster = mesh()?;
    let ca = mesh_ca(&cluster)?;
    let pay = cluster.pod("shop/pay-0")?.spec.v4;
    let cart = cluster.pod("shop/cart-1")?.spec.v4;
    // An address that is not the connection's destination.
    let status = tunnel_to_pay(&cluster, Some(ca.issue(WEB)?), Some(&format!("{cart}:9000")))?;
    assert_eq!(status, Tunnel::Status(400));
    // A port on which nothing listens.
    let status = tunnel_to_pay(&cluster, Some(ca.issue(WEB)?), Some(&format!("{pay}:9")))?;
    assert_eq!(status, Tunnel::Status(503));
    Ok(())
}

#[test]
fn wrong_clients_are_refused_counted_and_logged() -> Result<()> {
    let cluster = mesh()?;
    let ca = mesh_ca(&cluster)?;
    let from = cluster.pod("shop/batch-0")?.spec.v4.to_string();
    let pay = cluster.pod("shop/pay-0")?.spec.v4.to_string();
    let cases: [(&str, Option<Identity>); 4] = [
        ("no_certificate", None),
        ("expired", Some(ca.issue_expired(WEB)?)),
        ("wrong_trust_domain", Some(ca.issue("spiffe://elsewhere.example/ns/shop/sa/web")?)),
        ("unknown_ca", Some(Ca::stranger()?.issue(WEB)?)),
    ];
    for (reason, identity) in cases {
        let before = cluster.node("node-b")?.scrape()?;
        let outcome = tunnel_to_pay(&cluster, identity, None)?;
        assert!(matches!(outcome, Tunnel::Refused(_)), "{reason}: {outcome:?}");
        await_refusal(&cluster, "node-b", &before, reason)?;
        logged(&cluster, "node-b", reason, &from, &pay)?;
    }
    Ok(())
}

#[test]
fn plaintext_is_refused_under_strict_and_served_under_permissive() -> Result<()> {
    let cluster = mesh()?;
    let outside = cluster.pod("shop/batch-0")?;
    let from = outside.spec.v4.to_string();
    let strict = cluster.pod("shop/pay-0")?.spec.v4;
    let before = cluster.node("node-b")?.scrape()?;
    let dialled = outside.dial(&format!("--to {strict}:{} --send hello", ports::WHO))?;
    assert_eq!(dialled.received, "", "{dialled:?}");
    assert!(!dialled.end.contains("timeout"), "{dialled:?}");
    await_refusal(&cluster, "node-b", &before, "plaintext_under_strict")?;
    logged(&cluster, "node-b", "plaintext_under_strict", &from, &strict.to_string())?;

    let permissive = cluster.pod("shop/cart-1")?.spec.v4;
    let report = outside.connects(&format!("--to {permissive}:{} --n 200 --expect cart-1", ports::WHO))?;
    crate::support::assert_right("plaintext to a PERMISSIVE pod", &report, 200);

    // Garbage on the HBONE port itself.
    let before = cluster.node("node-b")?.scrape()?;
    let dialled = outside.dial(&format!("--to {strict}:15008 --send GET"))?;
    assert_eq!(dialled.received.find("220"), None);
    await_refusal(&cluster, "node-b", &before, "not_tls")?;
    Ok(())
}

#[test]
fn wrong_servers_are_refused_by_the_client_side() -> Result<()> {
    let mut cluster = mesh()?;
    // A pod that the configuration has in the mesh, whose place a stranger takes: its real side is never enrolled.
    let yaml = "apiVersion: v1\nkind: Pod\nmetadata: {name: impostor, namespace: shop, \
                uid: 5a3c0de0-0000-4000-8000-0000000000ff, labels: {app: impostor}}\n\
                spec: {nodeName: node-b, serviceAccountName: cart, containers: [{name: app, image: x}]}\n\
                status: {phase: Running, podIP: 10.244.2.99, podIPs: [{ip: 10.244.2.99}, {ip: \"fd00:10:244:2::63\"}], \
                conditions: [{type: Ready, status: \"True\"}]}\n";
    let node = cluster.node("node-b")?.spec.clone();
    cluster.add_pod(&mesh_tests::fixture::PodSpec {
        namespace: "shop".to_owned(),
        name: "impostor".to_owned(),
        uid: "5a3c0de0-0000-4000-8000-0000000000ff".to_owned(),
        node: node.name.clone(),
        v4: node.pod_v4(99),
        v6: node.pod_v6(99),
        args: Vec::new(),
    })?;
    cluster.control.as_ref().context("no control plane")?.write_config("90-impostor.yaml", yaml)?;
    let ca = mesh_ca(&cluster)?;
    let cart = "spiffe://cluster.local/ns/shop/sa/cart";
    let impostor = cluster.pod("shop/impostor")?;
    let client = cluster.pod("shop/web-0")?;
    let cases: [(&str, Option<Identity>); 5] = [
        ("wrong_identity", Some(ca.issue(GUEST)?)),
        ("expired", Some(ca.issue_expired(cart)?)),
        ("wrong_identity", Some(ca.issue("spiffe://elsewhere.example/ns/shop/sa/cart")?)),
        ("unknown_ca", Some(Ca::stranger()?.issue(cart)?)),
        ("not_tls", None),
    ];
    for (reason, identity) in cases {
        let server = TlsServer::start(&impostor.netns, impostor.spec.v4.into(), identity)?;
        let before = cluster.node("node-a")?.scrape()?;
        // Known to the mesh as soon as the node has the new pod; before, the dial goes past the daemon.
        wait::until_true(&format!("a refusal for {reason}"), PROPAGATION, || {
            let dialled =
                client.dial(&format!("--to {}:{} --send hello --timeout 2", impostor.spec.v4, ports::WHO))?;
            assert_eq!(dialled.received, "", "{reason}: {dialled:?}");
            let now = cluster.node("node-a")?.scrape()?;
            Ok(crate::support::growth(&before, &now, "nodemesh_refusals_total", &[("reason", reason)]) > 0.0)
        })?;
        logged(&cluster, "node-a", reason, &client.spec.v4.to_string(), &impostor.spec.v4.to_string())?;
        drop(server);
    }
    // The rest of the mesh is not disturbed.
    let report = client.connects(&format!("--to {}:80 --n 100", vip::CART))?;
    crate::support::assert_right("another service", &report, 100);
    Ok(())
}
