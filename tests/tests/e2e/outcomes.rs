//! Every outcome of a connect, 20,000 times on 4 threads: nothing lost, the dialled address shown to the client, the
//! client's address shown to the server; in each of the ways in which programs open connections.

use crate::support::{OPENED, OUTCOMES, assert_right, growth, mesh, vip};
use anyhow::Result;
use mesh_tests::cluster::Cluster;

const N: u64 = 20_000;

/// Ways to open a connection: flags of `pod-app connects`, and whether they apply to IPv4 targets only.
const WAYS: [(&str, bool); 5] = [
    ("--mode plain", false),
    ("--mode nonblock", false),
    ("--mode tfo", false),
    ("--mode tfo-connect", false),
    ("--mode plain --mapped", true),
];

fn in_every_way(cluster: &Cluster, what: &str, v4: &str, v6: &str, expect: &[&str]) -> Result<u64> {
    let client = cluster.pod("shop/web-0")?;
    let expect: String = expect.iter().map(|name| format!(" --expect {name}")).collect();
    let mut total = 0;
    for (way, v4_only) in WAYS {
        for target in [v4, v6] {
            if v4_only && target == v6 {
                continue;
            }
            // All of them over IPv4; a quarter over IPv6, whose hooks differ only in the address's width.
            let n = if target == v4 { N } else { N / 4 };
            let early = client.netns.tcp_counter("TCPFastOpenActive")?;
            let report = client.connects(&format!("--to {target}:80 --n {n} --threads 4 {way}{expect}"))?;
            assert_right(&format!("{what} {target} {way}"), &report, n);
            assert_eq!(report.by_backend.values().sum::<u64>(), n);
            // Or the case would prove nothing: the data must have gone with the SYN, but for the first few cookies.
            if way.contains("tfo") {
                let early = client.netns.tcp_counter("TCPFastOpenActive")? - early;
                assert!(early >= n * 9 / 10, "{what} {target} {way}: {early} of {n} were Fast Open");
            }
            total += n;
        }
    }
    Ok(total)
}

#[test]
fn direct_connects_are_right_in_every_way() -> Result<()> {
    let cluster = mesh()?;
    let node = cluster.node("node-a")?;
    let before = node.scrape()?;
    let total = in_every_way(&cluster, "direct", vip::LEDGER, vip::LEDGER_V6, &["ledger-0", "ledger-1"])?;
    let labels = [("reporter", "source"), ("destination_service_name", "ledger")];
    let after = node.until_metrics("all direct connections in the metrics", |now| {
        growth(&before, now, OPENED, &labels) >= total as f64
    })?;
    assert_eq!(growth(&before, &after, OPENED, &labels), total as f64);
    assert_eq!(growth(&before, &after, OUTCOMES, &[("outcome", "connect_direct")]), total as f64);
    assert_eq!(growth(&before, &after, OUTCOMES, &[("outcome", "connect_proxy")]), 0.0);
    Ok(())
}

#[test]
fn proxied_connects_on_one_node_are_right_in_every_way() -> Result<()> {
    let cluster = mesh()?;
    in_every_way(&cluster, "same node", vip::DB, vip::DB_V6, &["db-0"])?;
    Ok(())
}

#[test]
fn proxied_connects_across_nodes_are_right_in_every_way() -> Result<()> {
    let cluster = mesh()?;
    let node = cluster.node("node-b")?;
    let before = node.scrape()?;
    let total = in_every_way(&cluster, "across nodes", vip::PAY, vip::PAY_V6, &["pay-0"])?;
    let labels = [
        ("reporter", "destination"),
        ("connection_security_policy", "mutual_tls"),
        ("source_principal", "spiffe://cluster.local/ns/shop/sa/web"),
        ("destination_principal", "spiffe://cluster.local/ns/shop/sa/pay"),
        ("destination_workload_namespace", "shop"),
    ];
    node.until_metrics("all connections in the metrics of the destination", |now| {
        growth(&before, now, OPENED, &labels) >= total as f64
    })?;
    Ok(())
}

#[test]
fn denied_connects_are_refused_at_once_and_counted() -> Result<()> {
    let cluster = mesh()?;
    let control = cluster.control.as_ref().expect("started");
    control.write_config(
        "90-empty.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: empty, namespace: shop}\nspec:\n  clusterIP: 10.96.0.90\n  \
         clusterIPs: [10.96.0.90, \"fd00:10:96::5a\"]\n  ipFamilies: [IPv4, IPv6]\n  selector: {app: nobody}\n  \
         ports: [{name: tcp, port: 80}]\n",
    )?;
    let client = cluster.pod("shop/web-0")?;
    mesh_tests::wait::until_true(
        "the service without endpoints to refuse",
        crate::support::PROPAGATION,
        || Ok(client.dial("--to 10.96.0.90:80 --timeout 1")?.end == "connect: refused"),
    )?;
    let before = cluster.node("node-a")?.scrape()?;
    for to in ["10.96.0.90:80", "[fd00:10:96::5a]:80"] {
        for way in ["plain", "nonblock", "tfo"] {
            let report = client.connects(&format!("--to {to} --n {N} --threads 4 --mode {way}"))?;
            assert_eq!((report.ok, report.lost), (0, N), "{to} {way}: {report:?}");
            let refused: u64 = report
                .errors
                .iter()
                .filter(|(text, _)| text.contains("refused"))
                .map(|(_, count)| count)
                .sum();
            assert_eq!(refused, N, "{to} {way}: {report:?}");
        }
    }
    let labels = [("outcome", "connect_deny")];
    let after = cluster.node("node-a")?.scrape()?;
    assert_eq!(growth(&before, &after, OUTCOMES, &labels), 6.0 * N as f64);
    // Each is counted in the kernel; the events that name the reason may be dropped under this load, not all of them.
    crate::support::await_refusal(&cluster, "node-a", &before, "no_endpoints")?;
    Ok(())
}

#[test]
fn a_vip_spreads_over_local_and_remote_backends() -> Result<()> {
    let cluster = mesh()?;
    for client in ["shop/web-0", "shop/web-1"] {
        let report = cluster.pod(client)?.connects(&format!("--to {}:80 --n 3000 --threads 4", vip::CART))?;
        assert_right(client, &report, 3000);
        assert_eq!(report.by_backend.len(), 3, "{report:?}");
        // A fair share is 1000 with a standard deviation of 26.
        assert!(report.by_backend.values().all(|count| (850..=1150).contains(count)), "{report:?}");
    }
    Ok(())
}

#[test]
fn affinity_keeps_a_client_on_its_backend() -> Result<()> {
    let cluster = mesh()?;
    for client in ["shop/web-0", "shop/web-1", "shop/guest-0"] {
        let report =
            cluster.pod(client)?.connects(&format!("--to {}:80 --n 500 --threads 4", vip::LEDGER_STICKY))?;
        assert_right(client, &report, 500);
        assert_eq!(report.by_backend.len(), 1, "{client}: {report:?}");
    }
    Ok(())
}

#[test]
fn udp_is_balanced_connected_and_unconnected() -> Result<()> {
    let cluster = mesh()?;
    let client = cluster.pod("shop/web-0")?;
    for target in [vip::QUOTES, vip::QUOTES_V6] {
        for kind in ["", "--fresh", "--connected", "--connected --fresh"] {
            let report = client.udp(&format!("--to {target}:5300 --n 2000 --threads 4 {kind}"))?;
            assert_right(&format!("{target} {kind}"), &report, 2000);
            if kind.contains("fresh") {
                assert_eq!(report.by_backend.len(), 3, "{target} {kind}: {report:?}");
            }
        }
    }
    for kind in ["", "--fresh", "--connected", "--connected --fresh"] {
        let report =
            client.udp(&format!("--to {}:5300 --n 1000 --threads 4 --mapped {kind}", vip::QUOTES))?;
        assert_right(&format!("mapped {kind}"), &report, 1000);
    }
    Ok(())
}

#[test]
fn unknown_destinations_pass_untouched() -> Result<()> {
    let cluster = mesh()?;
    let client = cluster.pod("shop/web-0")?;
    // A pod outside the mesh, by its own address: no proxy, no rewriting.
    let to = cluster.pod("legacy/ledger-1")?.spec.v4;
    let report = client.connects(&format!("--to {to}:9000 --n 500 --threads 4 --expect ledger-1"))?;
    assert_right("a pod address outside the mesh", &report, 500);
    assert_eq!(client.dial(&format!("--to {to}:9"))?.end, "connect: refused");
    // A mesh pod by its own address goes through the mesh like its service.
    let to = cluster.pod("shop/cart-1")?.spec.v4;
    let before = cluster.node("node-b")?.scrape()?;
    let report = client.connects(&format!("--to {to}:9000 --n 500 --threads 4 --expect cart-1"))?;
    assert_right("a pod address in the mesh", &report, 500);
    let labels = [("reporter", "destination"), ("connection_security_policy", "mutual_tls")];
    cluster.node("node-b")?.until_metrics("500 connections over mutual TLS", |now| {
        growth(&before, now, OPENED, &labels) >= 500.0
    })?;
    Ok(())
}
