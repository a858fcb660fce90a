//! The lines of the table. Each sends traffic, looks at what both ends and the daemons saw, and fails unless all agree.

use crate::table::Table;
use anyhow::{Context, Result, bail, ensure};
use mesh_tests::{
    app::{ConnectsReport, ports},
    cluster::{Cluster, Pod},
    metrics::Scrape,
    wait,
};
use std::time::{Duration, Instant};

/// Virtual addresses of the quickstart services.
const CART: &str = "10.96.0.10:80";
const QUOTES_V6: &str = "[fd00:10:96::b]:5300";
const DB: &str = "10.96.0.12:80";
const PAY: &str = "10.96.0.13:80";
const PAY_ECHO: &str = "10.96.0.13:9001";
const LEDGER: &str = "10.96.0.20:80";

const WEB_ID: &str = "spiffe://cluster.local/ns/shop/sa/web";
const PAY_ID: &str = "spiffe://cluster.local/ns/shop/sa/pay";

const OPENED: &str = "istio_tcp_connections_opened_total";

const OUTCOMES: &str = "nodemesh_kernel_outcomes_total";

/// Runs every check in order; a failed one does not stop the rest.
pub(crate) fn run_all(cluster: &mut Cluster, table: &mut Table) {
    let cluster = &*cluster;
    table.line("balanced in the kernel, no proxy", || direct(cluster));
    table.line("UDP over IPv6, in the kernel", || udp(cluster));
    table.line("same node, through the daemon", || same_node(cluster));
    table.line("across nodes, mutual TLS", || cross_node(cluster));
    table.line("identities that each side saw", || identities(cluster));
    table.line("spread over a VIP's backends", || spread(cluster));
    table.line("no payload on the wire", || wire(cluster));
    table.line("a pod that opted out", || opted_out(cluster));
    table.line("plaintext to a STRICT pod", || strict(cluster));
    table.line("a client that policy denies", || denied(cluster));
    table.line("a policy change takes effect", || policy_change(cluster));
}

fn right(report: &ConnectsReport, n: u64) -> Result<()> {
    ensure!(report.all_right(n), "of {n} exchanges not all were right: {}", serde_json::to_string(report)?);
    Ok(())
}

fn shares(report: &ConnectsReport) -> String {
    report.by_backend.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
}

fn rate(report: &ConnectsReport) -> String {
    format!("{:.0}/s", report.ok as f64 * 1000.0 / report.millis.max(1) as f64)
}

/// Waits until a sum in the metrics of `node` has grown by at least `by` since `before`.
fn grown(cluster: &Cluster, node: &str, before: &Scrape, labels: &[(&str, &str)], by: f64) -> Result<Scrape> {
    let old = before.sum(OPENED, labels);
    cluster.node(node)?.until_metrics(&format!("{OPENED}{labels:?} on {node} to grow by {by}"), |now| {
        now.sum(OPENED, labels) >= old + by
    })
}

fn direct(cluster: &Cluster) -> Result<String> {
    let before = cluster.node("node-a")?.scrape()?;
    let report = cluster.pod("shop/web-0")?.connects(&format!("--to {LEDGER} --n 400 --threads 4"))?;
    right(&report, 400)?;
    ensure!(report.by_backend.len() == 2, "not both backends answered: {}", shares(&report));
    let after = grown(
        cluster,
        "node-a",
        &before,
        &[
            ("reporter", "source"),
            ("destination_service_name", "ledger"),
            ("source_workload_namespace", "shop"),
        ],
        400.0,
    )?;
    let outcome = |name| {
        let labels = [("outcome", name)];
        after.sum(OUTCOMES, &labels) - before.sum(OUTCOMES, &labels)
    };
    let (direct, proxied) = (outcome("connect_direct"), outcome("connect_proxy"));
    ensure!(
        direct == 400.0 && proxied == 0.0,
        "the kernel counts {direct} direct and {proxied} proxied connects"
    );
    Ok(format!("400 connects to {LEDGER}: {}; 0 proxied ({})", shares(&report), rate(&report)))
}

fn udp(cluster: &Cluster) -> Result<String> {
    let pod = cluster.pod("shop/web-0")?;
    let report = pod.udp(&format!("--to {QUOTES_V6} --n 300 --threads 2 --fresh"))?;
    right(&report, 300)?;
    right(&pod.udp(&format!("--to {QUOTES_V6} --n 50 --connected"))?, 50)?;
    ensure!(report.by_backend.len() == 3, "not all backends answered: {}", shares(&report));
    Ok(format!("350 datagrams to {QUOTES_V6}: {}", shares(&report)))
}

fn same_node(cluster: &Cluster) -> Result<String> {
    let before = cluster.node("node-a")?.scrape()?;
    let report =
        cluster.pod("shop/web-0")?.connects(&format!("--to {DB} --n 200 --threads 4 --expect db-0"))?;
    right(&report, 200)?;
    let labels = [("source_principal", WEB_ID), ("destination_service_name", "db")];
    grown(cluster, "node-a", &before, &[("reporter", "destination"), labels[0], labels[1]], 200.0)?;
    Ok(format!("200 connects to {DB}: all to db-0, which saw its real client ({})", rate(&report)))
}

fn cross_node(cluster: &Cluster) -> Result<String> {
    let before = cluster.node("node-b")?.scrape()?;
    let report =
        cluster.pod("shop/web-0")?.connects(&format!("--to {PAY} --n 200 --threads 4 --expect pay-0"))?;
    right(&report, 200)?;
    grown(
        cluster,
        "node-b",
        &before,
        &[
            ("reporter", "destination"),
            ("connection_security_policy", "mutual_tls"),
            ("destination_service_name", "pay"),
        ],
        200.0,
    )?;
    Ok(format!("200 connects to {PAY}: all to pay-0 on node-b, mutual_tls ({})", rate(&report)))
}

fn identities(cluster: &Cluster) -> Result<String> {
    let mut seen = Vec::new();
    for (node, reporter) in [("node-a", "source"), ("node-b", "destination")] {
        let scrape = cluster.node(node)?.scrape()?;
        let labels = [
            ("reporter", reporter),
            ("destination_service_name", "pay"),
            ("source_principal", WEB_ID),
            ("destination_principal", PAY_ID),
        ];
        let count = scrape.sum(OPENED, &labels);
        ensure!(count >= 200.0, "{node} counts {count} connections with {labels:?}");
        seen.push(format!("{node} ({reporter}): {} -> {}", short(WEB_ID), short(PAY_ID)));
    }
    Ok(seen.join("\n"))
}

fn short(id: &str) -> &str {
    id.strip_prefix("spiffe://").unwrap_or(id)
}

fn spread(cluster: &Cluster) -> Result<String> {
    let report = cluster.pod("shop/web-0")?.connects(&format!("--to {CART} --n 600 --threads 4"))?;
    right(&report, 600)?;
    ensure!(report.by_backend.len() == 3, "not all backends answered: {}", shares(&report));
    let fewest = report.by_backend.values().min().copied().unwrap_or(0);
    // A fair share is 200; with 600 random picks less than 120 is as good as impossible.
    ensure!(fewest >= 120, "the spread is not even: {}", shares(&report));
    Ok(format!("600 connects to {CART}: {}", shares(&report)))
}

fn wire(cluster: &Cluster) -> Result<String> {
    let marker = format!("payload-marker-{}", cluster.run.id());
    let capture = cluster.capture()?;
    let dialled = cluster.pod("shop/web-0")?.dial(&format!("--to {PAY_ECHO} --send {marker} --shutdown"))?;
    let packets = capture.finish()?;
    ensure!(dialled.received.starts_with(&marker), "the echo did not come back: {dialled:?}");
    let tunnel = packets.tcp_port(15008);
    ensure!(tunnel > 0, "not one of {} frames between the nodes belongs to port 15008", packets.len());
    ensure!(!packets.truncated, "the capture is not complete");
    let leaked = packets.containing(marker.as_bytes());
    ensure!(leaked == 0, "{leaked} frames between the nodes contain the payload");
    Ok(format!("{} frames captured, {tunnel} on port 15008, 0 with the payload", packets.len()))
}

fn opted_out(cluster: &Cluster) -> Result<String> {
    let marker = format!("outside-marker-{}", cluster.run.id());
    let to = cluster.pod("shop/cart-1")?.spec.v4;
    let capture = cluster.capture()?;
    let dialled = cluster
        .pod("shop/batch-0")?
        .dial(&format!("--to {to}:{} --send {marker} --shutdown", ports::ECHO))?;
    let packets = capture.finish()?;
    ensure!(dialled.received.starts_with(&marker), "the echo did not come back: {dialled:?}");
    let plain = packets.containing(marker.as_bytes());
    ensure!(plain >= 2, "its payload is on the wire in {plain} frames; expected it to be sent plain");
    Ok(format!("batch-0 reaches cart-1 in plaintext ({plain} frames show it); cart is PERMISSIVE"))
}

/// A connection that must not carry anything: either it is refused, or it ends without an answer.
fn refused(pod: &Pod, to: &str) -> Result<String> {
    let dialled = pod.dial(&format!("--to {to} --send hello --timeout 5"))?;
    ensure!(dialled.received.is_empty(), "it got an answer: {dialled:?}");
    ensure!(!dialled.end.contains("timeout"), "it hung instead of being refused: {dialled:?}");
    Ok(dialled.end)
}

/// Waits for a refusal to be counted on `node` and returns its reason.
fn reason(cluster: &Cluster, node: &str, before: &Scrape) -> Result<String> {
    wait::until(&format!("a refusal in the metrics of {node}"), Duration::from_secs(10), || {
        let now = cluster.node(node)?.scrape()?;
        Ok(new_refusal(before, &now))
    })
}

fn new_refusal(before: &Scrape, now: &Scrape) -> Option<String> {
    let family = "nodemesh_refusals_total";
    now.matching(family, &[]).find_map(|sample| {
        let labels: Vec<(&str, &str)> =
            sample.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        (sample.value > before.sum(family, &labels)).then(|| sample.labels.get("reason").cloned())?
    })
}

fn strict(cluster: &Cluster) -> Result<String> {
    let before = cluster.node("node-b")?.scrape()?;
    let to = format!("{}:{}", cluster.pod("shop/pay-0")?.spec.v4, ports::WHO);
    let end = refused(cluster.pod("shop/batch-0")?, &to)?;
    let reason = reason(cluster, "node-b", &before)?;
    Ok(format!("batch-0 -> pay-0: {end}; node-b counts reason {reason:?}"))
}

fn denied(cluster: &Cluster) -> Result<String> {
    let before = cluster.node("node-b")?.scrape()?;
    let end = refused(cluster.pod("shop/guest-0")?, PAY)?;
    let reason = reason(cluster, "node-b", &before)?;
    Ok(format!("guest-0 -> pay: {end}; node-b counts reason {reason:?}"))
}

fn policy_change(cluster: &Cluster) -> Result<String> {
    let control = cluster.control.as_ref().context("no control plane")?;
    let file = "30-policy.yaml";
    let old = std::fs::read_to_string(control.config_dir.join(file))?;
    let web = "\"cluster.local/ns/shop/sa/web\"";
    let new = old.replace(web, &format!("{web}, \"cluster.local/ns/shop/sa/guest\""));
    if new == old {
        bail!("{file} does not name {web}");
    }
    let guest = cluster.pod("shop/guest-0")?;
    let mut took = Vec::new();
    for (text, wanted) in [(&new, true), (&old, false)] {
        control.write_config(file, text)?;
        let started = Instant::now();
        let what = if wanted { "guest-0 to be allowed" } else { "guest-0 to be denied again" };
        wait::until_true(what, Duration::from_secs(10), || {
            let dialled = guest.dial(&format!("--to {PAY} --send hello --shutdown"))?;
            Ok(dialled.received.starts_with("hello pay-0") == wanted)
        })?;
        took.push(started.elapsed().as_millis());
    }
    Ok(format!(
        "guest-0 allowed {} ms after the edit, denied again {} ms after its undoing",
        took[0], took[1]
    ))
}
