//! A node that starts while the control plane is away: it serves from what its predecessor kept, and is told only what
//! changed when the control plane is back.

use crate::support::{PROPAGATION, assert_right, mesh, vip};
use anyhow::{Context, Result};
use mesh_tests::{cluster::Cluster, daemons::NodeOptions, metrics::Scrape, proc::binary, wait};
use std::{path::PathBuf, time::Duration};

const RESOURCES: &str = "nodemesh_xds_resources_total";

fn kept_config(cluster: &Cluster, node: &str) -> Result<PathBuf> {
    Ok(cluster.node(node)?.dir.join("state/config"))
}

fn kept_certificates(cluster: &Cluster, node: &str) -> Result<PathBuf> {
    Ok(cluster.node(node)?.dir.join("certificates/current"))
}

/// Waits until a node has on disk what it holds.
fn until_kept(cluster: &Cluster, node: &str, identities: &[&str]) -> Result<()> {
    cluster.node(node)?.until_metrics("the configuration to be on disk", |m| {
        m.sum("nodemesh_config_file_bytes", &[]) > 0.0
    })?;
    wait::until_true("the certificates to be kept", PROPAGATION, || {
        let text = std::fs::read_to_string(kept_certificates(cluster, node)?)?;
        Ok(identities.iter().all(|id| text.contains(id)))
    })
}

fn age(metrics: &Scrape, source: &str) -> Option<f64> {
    metrics.matching("nodemesh_config_age_seconds", &[("source", source)]).next().map(|sample| sample.value)
}

fn resources(metrics: &Scrape, resource: &str, outcome: &str) -> f64 {
    metrics.sum(RESOURCES, &[("resource", resource), ("outcome", outcome)])
}

fn kill(cluster: &mut Cluster, node: &str) -> Result<()> {
    let daemon = cluster.node_mut(node)?.daemon.take();
    daemon.context("daemon")?.proc.kill()
}

#[test]
fn a_daemon_that_starts_without_the_control_plane_serves_from_disk() -> Result<()> {
    let mut cluster = mesh()?;
    until_kept(&cluster, "node-a", &["sa/web", "sa/db"])?;
    until_kept(&cluster, "node-b", &["sa/pay"])?;
    cluster.control.as_mut().context("control")?.proc.kill()?;
    for (node, signal) in [("node-a", "term"), ("node-b", "kill")] {
        if signal == "term" {
            let mut daemon = cluster.node_mut(node)?.daemon.take().context("daemon")?;
            daemon.proc.stop(PROPAGATION * 2)?;
        } else {
            kill(&mut cluster, node)?;
        }
        cluster.start_node(node, &NodeOptions::default())?;
        let (status, body) = cluster.node(node)?.http("/healthz/ready")?;
        assert!(status == 200 && body.contains("configuration from disk, age "), "{status} {body}");
        let metrics = cluster.node(node)?.scrape()?;
        assert!(
            age(&metrics, "disk").is_some_and(|age| age > 0.0 && age < 600.0),
            "{:?}",
            age(&metrics, "disk")
        );
        let counts = |outcome| ["address", "authorization"].map(|kind| resources(&metrics, kind, outcome));
        assert!(counts("restored").iter().all(|n| *n >= 1.0), "{:?}", counts("restored"));
        assert_eq!(counts("accepted"), [0.0, 0.0]);
        let host = cluster.node(node)?.host_place();
        let dir = cluster.node(node)?.dir.display().to_string();
        let shown = host.run(
            &binary("mesh-node")?,
            &["status", "--run-dir", &dir],
            &[],
            &[],
            Duration::from_secs(10),
        )?;
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        assert!(shown.contains("  - configuration from disk, age "), "{shown}");
    }

    // The pods are captured again, with the identities and the policies that they had.
    let pay = format!("--to {}:80", vip::PAY);
    wait::until_true("web to reach pay over mutual TLS", PROPAGATION, || {
        Ok(cluster.pod("shop/web-0")?.connects(&format!("{pay} --n 1 --timeout 2"))?.all_right(1))
    })?;
    for service in [vip::PAY, vip::DB, vip::CART, vip::LEDGER] {
        let report =
            cluster.pod("shop/web-0")?.connects(&format!("--to {service}:80 --n 100 --threads 4"))?;
        assert_right(&format!("{service} from disk"), &report, 100);
    }
    let metrics = cluster.node("node-b")?.scrape()?;
    let mutual = [("connection_security_policy", "mutual_tls"), ("destination_app", "pay")];
    assert!(metrics.sum("istio_tcp_connections_opened_total", &mutual) >= 100.0);
    let refused = |cluster: &Cluster| -> Result<bool> {
        let to = format!("{pay} --send hello --shutdown --timeout 2");
        Ok(cluster.pod("shop/guest-0")?.dial(&to)?.received.is_empty())
    };
    assert!(refused(&cluster)?, "the policy is on disk too");

    // One policy changes while the control plane is away, and nothing else is sent when it is back.
    let control = cluster.control.as_ref().context("control")?;
    let file = "30-policy.yaml";
    let old = std::fs::read_to_string(control.config_dir.join(file))?;
    let new = old.replace("sa/web\"", "sa/web\", \"cluster.local/ns/shop/sa/guest\"");
    assert_ne!(old, new);
    control.write_config(file, &new)?;
    cluster.restart_control()?;
    wait::until_true("the new policy to be in force", PROPAGATION * 3, || Ok(!refused(&cluster)?))?;
    for node in ["node-a", "node-b"] {
        let metrics =
            cluster.node(node)?.until_metrics("the configuration to be the control plane's", |m| {
                age(m, "control-plane") == Some(0.0)
            })?;
        assert_eq!(resources(&metrics, "authorization", "accepted"), 1.0, "{node}");
        assert_eq!(resources(&metrics, "address", "accepted"), 0.0, "{node}");
        assert_eq!(metrics.sum(RESOURCES, &[("outcome", "removed")]), 0.0, "{node}");
        let (status, body) = cluster.node(node)?.http("/healthz/ready")?;
        assert_eq!((status, body.as_str()), (200, "ok\n"));
    }

    // And that change is on disk for the next time.
    cluster.node("node-b")?.until_metrics("the change to be on disk", |m| {
        m.sum("nodemesh_config_writes_total", &[("outcome", "ok")]) >= 1.0
    })?;
    cluster.control.as_mut().context("control")?.proc.kill()?;
    kill(&mut cluster, "node-b")?;
    cluster.start_node("node-b", &NodeOptions::default())?;
    wait::until_true("guest to reach pay from disk", PROPAGATION, || Ok(!refused(&cluster)?))
}

#[test]
fn a_damaged_or_foreign_configuration_is_refused_aloud() -> Result<()> {
    let mut cluster = mesh()?;
    for node in ["node-a", "node-b"] {
        until_kept(&cluster, node, &["sa/"])?;
    }
    cluster.control.as_mut().context("control")?.proc.kill()?;
    let good = std::fs::read(kept_config(&cluster, "node-b")?)?;
    let mut flipped = good.clone();
    flipped[200] ^= 1;
    let foreign = std::fs::read(kept_config(&cluster, "node-a")?)?;
    let truncated = good[..100].to_vec();
    for (bytes, words) in [(truncated, "is cut off"), (flipped, "checksum"), (foreign, "it is of node")] {
        kill(&mut cluster, "node-b")?;
        std::fs::write(kept_config(&cluster, "node-b")?, &bytes)?;
        cluster.launch_node("node-b", &NodeOptions::default())?;
        wait::until_true(&format!("the log to say {words:?}"), PROPAGATION, || {
            let log = cluster.node("node-b")?.daemon()?.proc.log();
            Ok(log.lines().any(|line| line.contains("is refused") && line.contains(words)))
        })?;
        let metrics = cluster.node("node-b")?.until_metrics("the daemon to serve", |_| true)?;
        assert_eq!(metrics.sum("nodemesh_ready", &[]), 0.0);
        assert_eq!(metrics.sum(RESOURCES, &[("outcome", "restored")]), 0.0);
        assert_eq!(age(&metrics, "disk"), None);
    }
    // Longer than a good file would have waited for the control plane: it ends as it always did.
    let up = |m: &Scrape| m.sum("nodemesh_config_age_seconds", &[]) == 0.0;
    wait::until_true("another attempt to connect", PROPAGATION, || {
        let log = cluster.node("node-b")?.daemon()?.proc.log();
        let last = log.rsplit("is refused").next().unwrap_or_default();
        Ok(last.matches("the last good configuration stays").count() >= 5)
    })?;
    assert_eq!(cluster.node("node-b")?.http("/healthz/ready")?.0, 503);

    cluster.restart_control()?;
    cluster.wait_node_ready("node-b")?;
    cluster.node("node-b")?.until_metrics("a good file in its place", |m| {
        up(m) && m.sum("nodemesh_config_file_bytes", &[]) > 0.0
    })?;
    let report = cluster.pod("shop/web-0")?.connects(&format!("--to {}:80 --n 50", vip::PAY))?;
    assert_right("as if nothing had been", &report, 50);

    // Who does not want keys on disk has none there.
    kill(&mut cluster, "node-b")?;
    let options =
        NodeOptions { extra: vec!["--keep-certificates=false".to_owned()], ..NodeOptions::default() };
    cluster.start_node("node-b", &options)?;
    assert!(!kept_certificates(&cluster, "node-b")?.exists());
    wait::until_true("pay to be back", PROPAGATION, || {
        let to = format!("--to {}:80 --n 1 --timeout 2", vip::PAY);
        Ok(cluster.pod("shop/web-0")?.connects(&to)?.all_right(1))
    })?;
    assert!(!kept_certificates(&cluster, "node-b")?.exists());
    Ok(())
}
