//! The same-node fast path: pod to pod in the kernel once the daemon has said yes, and never after it would say no.

use crate::support::{
    Held, OPENED, OUTCOMES, PROPAGATION, assert_right, bare, growth, mesh, quickstart, vip,
};
use anyhow::{Context, Result};
use mesh_tests::{
    app::ports,
    cluster::{Cluster, Node},
    daemons::{Control, NodeOptions},
    metrics::Scrape,
    wait,
};

const GENERATIONS: &str = "nodemesh_verdict_generations_total";

fn control(cluster: &Cluster) -> Result<&Control> {
    cluster.control.as_ref().context("no control plane")
}

fn local(before: &Scrape, after: &Scrape) -> f64 {
    growth(before, after, OUTCOMES, &[("outcome", "connect_local")])
}

fn policy(name: &str, app: &str, action: &str, rules: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec:\n  selector: {{matchLabels: {{app: {app}}}}}\n  action: {action}\n  rules: {rules}\n"
    )
}

/// Makes the kernel know the verdict for `client` -> `to`, and returns the metrics of then. A change that is still on
/// its way through the daemon may end the first ones.
fn warm(cluster: &Cluster, node: &Node, client: &str, to: &str) -> Result<Scrape> {
    wait::until(&format!("{client} -> {to} to go without the daemon"), PROPAGATION, || {
        let before = node.scrape()?;
        let report = cluster.pod(client)?.connects(&format!("--to {to} --n 2 --timeout 3"))?;
        anyhow::ensure!(report.all_right(2), "{report:?}");
        let after = node.scrape()?;
        Ok((local(&before, &after) > 0.0).then_some(after))
    })
}

#[test]
fn the_second_connect_needs_no_daemon_and_both_sides_count_it() -> Result<()> {
    let cluster = mesh()?;
    let node = cluster.node("node-a")?;
    for to in [format!("{}:80", vip::DB), format!("{}:80", vip::DB_V6), {
        format!("{}:{}", cluster.pod("shop/db-0")?.spec.v4, ports::WHO)
    }] {
        let before = warm(&cluster, node, "shop/web-0", &to)?;
        let args = format!("--to {to} --n 300 --threads 4 --expect db-0");
        assert_right(&to, &cluster.pod("shop/web-0")?.connects(&args)?, 300);
        let after = node.until_metrics("the connections to be counted", |now| {
            growth(&before, now, "istio_tcp_connections_closed_total", &[("reporter", "source")]) >= 300.0
        })?;
        assert_eq!(local(&before, &after), 300.0, "{to}");
        assert_eq!(growth(&before, &after, OUTCOMES, &[("outcome", "connect_proxy")]), 0.0, "{to}");
        for reporter in ["source", "destination"] {
            let labels = [
                ("reporter", reporter),
                ("connection_security_policy", "node_local"),
                ("source_principal", "spiffe://cluster.local/ns/shop/sa/web"),
                ("destination_principal", "spiffe://cluster.local/ns/shop/sa/db"),
                ("destination_workload_namespace", "shop"),
            ];
            assert_eq!(growth(&before, &after, OPENED, &labels), 300.0, "{to} {reporter}");
            let bytes = growth(&before, &after, "istio_tcp_received_bytes_total", &labels);
            assert!(bytes > 300.0, "{to} {reporter}: {bytes}");
            let samples = growth(&before, &after, "nodemesh_direct_rtt_samples_total", &labels);
            assert_eq!(samples, 300.0, "{to} {reporter}");
        }
    }
    // Another client has a verdict of its own.
    let before = warm(&cluster, node, "shop/guest-0", &format!("{}:80", vip::DB))?;
    assert!(before.sum("nodemesh_verdicts_total", &[]) >= 2.0);

    // Half-closed, and more bytes than one segment.
    let report =
        cluster.pod("shop/web-0")?.bulk(&format!("--to {}:9002 --up 5000000 --down 5000000", vip::DB))?;
    assert_eq!((report.server_verified, report.received), (5_000_000, 5_000_000));

    // Endpoints that come and go elsewhere end no verdict.
    let generations = node.scrape()?.sum(GENERATIONS, &[]);
    let file = "20-legacy.yaml";
    let old = std::fs::read_to_string(control(&cluster)?.config_dir.join(file))?;
    control(&cluster)?.write_config(file, &old.replace("status: \"True\"", "status: \"False\""))?;
    let client = cluster.pod("shop/web-0")?;
    wait::until_true("the unready pods to be out", PROPAGATION, || {
        Ok(client.dial(&format!("--to {}:80 --timeout 2", vip::LEDGER))?.end == "connect: refused")
    })?;
    let before = node.scrape()?;
    assert_right("after it", &client.connects(&format!("--to {}:80 --n 100", vip::DB))?, 100);
    let after = node.scrape()?;
    assert_eq!(local(&before, &after), 100.0);
    assert_eq!(after.sum(GENERATIONS, &[]), generations);
    Ok(())
}

#[test]
fn a_policy_change_denies_new_connections_and_cuts_those_that_it_forbids() -> Result<()> {
    let cluster = mesh()?;
    let node = cluster.node("node-a")?;
    let (who, echo) = (format!("{}:80", vip::DB), format!("{}:{}", vip::DB, ports::ECHO));
    let mut live = vec![];
    for client in ["shop/web-0", "shop/guest-0"] {
        warm(&cluster, node, client, &who)?;
        // The first one goes through the daemon, the second one does not.
        Held::open(&cluster, client, &format!("first-{}", &client[5..]), &format!("--to {echo}"))?
            .finish("the first connection")?;
        let before = node.scrape()?;
        live.push(Held::open(&cluster, client, &client[5..], &format!("--to {echo}"))?);
        assert_eq!(local(&before, &node.scrape()?), 1.0, "{client} holds a connection past the daemon");
    }
    let mut guest = live.pop().context("guest")?;
    let web = live.pop().context("web")?;

    let file = "90-db.yaml";
    let no_guest = "[{from: [{source: {principals: [\"cluster.local/ns/shop/sa/guest\"]}}]}]";
    control(&cluster)?.write_config(file, &policy("no-guest", "db", "DENY", no_guest))?;
    let said = guest.broken("the guest's live connection to be cut")?;
    assert!(said.contains("os error 103") || said.contains("os error 104"), "{said}");
    let denied = cluster.pod("shop/guest-0")?.dial(&format!("--to {who} --send x --shutdown --timeout 3"))?;
    assert_eq!(denied.received, "");
    let now = node.scrape()?;
    assert_eq!(now.sum("nodemesh_local_flows_destroyed_total", &[]), 1.0);

    // STRICT is met on one node: the kernel vouches for the client.
    let strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: db, namespace: shop}\n\
                  spec:\n  selector: {matchLabels: {app: db}}\n  mtls: {mode: STRICT}\n";
    control(&cluster)?.write_config(file, strict)?;
    let batch = cluster.pod("shop/batch-0")?;
    let address = format!("{}:{}", cluster.pod("shop/db-0")?.spec.v4, ports::WHO);
    wait::until_true("STRICT to be in force", PROPAGATION, || {
        Ok(batch.dial(&format!("--to {address} --send x --shutdown --timeout 3"))?.received.is_empty())
    })?;
    let before = warm(&cluster, node, "shop/guest-0", &who)?;
    assert_right("STRICT", &cluster.pod("shop/guest-0")?.connects(&format!("--to {who} --n 200"))?, 200);
    assert_eq!(local(&before, &node.scrape()?), 200.0);
    assert!(batch.dial(&format!("--to {address} --send x --shutdown --timeout 3"))?.received.is_empty());

    // A policy on addresses is asked for every connection.
    let from_pods = "[{from: [{source: {ipBlocks: [10.244.0.0/16]}}]}]";
    control(&cluster)?.write_config(file, &policy("by-address", "db", "ALLOW", from_pods))?;
    wait::until_true("plaintext to be allowed again", PROPAGATION, || {
        Ok(!batch.dial(&format!("--to {address} --send x --shutdown --timeout 3"))?.received.is_empty())
    })?;
    let before = node.scrape()?;
    assert_right("by address", &cluster.pod("shop/web-0")?.connects(&format!("--to {who} --n 50"))?, 50);
    assert_eq!(local(&before, &node.scrape()?), 0.0);
    web.finish("the permitted live connection through all of this")?;
    Ok(())
}

#[test]
fn a_reused_address_gets_the_new_pods_policy_and_no_old_verdict() -> Result<()> {
    let mut cluster = mesh()?;
    let file = "10-shop.yaml";
    let old = std::fs::read_to_string(control(&cluster)?.config_dir.join(file))?;
    let address = format!("{}:{}", cluster.pod("shop/db-0")?.spec.v4, ports::WHO);
    control(&cluster)?.write_config("90-vault.yaml", &policy("vault", "vault", "ALLOW", "[]"))?;
    warm(&cluster, cluster.node("node-a")?, "shop/web-0", &address)?;

    // The old pod ends, and a pod of another workload starts with its address, as fast as a node can do it.
    let at = cluster.pods.iter().position(|pod| pod.key() == "shop/db-0").context("db-0")?;
    let gone = cluster.pods.remove(at);
    let documents = old.split("\n---\n").map(|document| {
        if document.contains("kind: Pod") && document.contains("  name: db-0\n") {
            document
                .replace("name: db-0", "name: vault-0")
                .replace("app: db", "app: vault")
                .replace(&gone.spec.uid, "5a3c0de0-0000-4000-8000-0000000000aa")
        } else {
            document.to_owned()
        }
    });
    let new: Vec<String> = documents.collect();
    let mut spec = gone.spec.clone();
    spec.name = "vault-0".to_owned();
    spec.uid = "5a3c0de0-0000-4000-8000-0000000000aa".to_owned();
    control(&cluster)?.write_config(file, &new.join("\n---\n"))?;
    cluster.node("node-a")?.cni("DEL", &gone)?;
    gone.netns.ip("link del eth0\n")?;
    drop(gone);
    cluster.add_pod(&spec)?;
    let added = cluster.pod("shop/vault-0")?;
    wait::until_true("the new pod to be enrolled", PROPAGATION, || {
        cluster.node("node-a")?.cni("ADD", added).map(|_| true)
    })?;
    cluster.start_apps()?;

    let client = cluster.pod("shop/web-0")?;
    for _ in 0..20 {
        let dialled = client.dial(&format!("--to {address} --send x --shutdown --timeout 5"))?;
        assert_eq!(dialled.received, "", "the new pod lets nobody in");
    }
    control(&cluster)?.write_config("90-vault.yaml", &policy("vault", "vault", "ALLOW", "[{}]"))?;
    // No gratuitous ARP was sent for the new pod, unlike by a real CNI plugin.
    client.netns.ip("neigh flush all\n")?;
    let before = warm(&cluster, cluster.node("node-a")?, "shop/web-0", &address)?;
    let report = client.connects(&format!("--to {address} --n 50"))?;
    assert_right("the new pod, now open", &report, 50);
    let node = cluster.node("node-a")?;
    let labels =
        [("destination_principal", "spiffe://cluster.local/ns/shop/sa/db"), ("reporter", "destination")];
    let after = node.until_metrics("the connections to be counted", |now| {
        growth(&before, now, OPENED, &[("reporter", "destination"), ("destination_workload", "vault-0")])
            >= 50.0
    })?;
    assert_eq!(growth(&before, &after, OPENED, &labels), 50.0);
    Ok(())
}

#[test]
fn it_can_be_switched_off() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_control(&quickstart())?;
    let options =
        NodeOptions { extra: vec!["--same-node-fast-path=false".to_owned()], ..NodeOptions::default() };
    cluster.start_node("node-a", &options)?;
    for key in ["shop/web-0", "shop/db-0"] {
        let pod = cluster.pod(key)?;
        cluster.node("node-a")?.cni("ADD", pod)?;
    }
    cluster.start_apps()?;
    let client = cluster.pod("shop/web-0")?;
    assert_right("through the daemon", &client.connects(&format!("--to {}:80 --n 50", vip::DB))?, 50);
    let after = cluster.node("node-a")?.scrape()?;
    assert_eq!(after.sum(OUTCOMES, &[("outcome", "connect_local")]), 0.0);
    assert_eq!(after.sum(OUTCOMES, &[("outcome", "connect_proxy")]), 50.0);
    assert_eq!(after.sum("nodemesh_verdicts_total", &[]), 0.0);
    Ok(())
}
