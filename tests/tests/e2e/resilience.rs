//! Parts that go away and come back: the control plane, the daemon, certificates.

use crate::support::{PROPAGATION, assert_right, bare, mesh, quickstart, vip};
use anyhow::{Context, Result};
use mesh_tests::{app::ports, cluster::Cluster, daemons::NodeOptions, wait};

#[test]
fn traffic_goes_on_without_the_control_plane_and_changes_arrive_after_it_is_back() -> Result<()> {
    let mut cluster = mesh()?;
    cluster.control.as_mut().context("control")?.proc.kill()?;
    for service in [vip::PAY, vip::DB, vip::LEDGER, vip::CART] {
        let report =
            cluster.pod("shop/web-0")?.connects(&format!("--to {service}:80 --n 200 --threads 4"))?;
        assert_right(&format!("{service} without a control plane"), &report, 200);
    }
    let control = cluster.control.as_ref().context("control")?;
    control.write_config(
        "90-deny.yaml",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no-db, namespace: shop}\nspec:\n  \
         selector: {matchLabels: {app: db}}\n  action: DENY\n  rules: [{}]\n",
    )?;
    cluster.restart_control()?;
    let client = cluster.pod("shop/web-0")?;
    wait::until_true("the change to arrive after the restart", PROPAGATION * 3, || {
        let dialled = client.dial(&format!("--to {}:80 --send x --shutdown --timeout 2", vip::DB))?;
        Ok(dialled.received.is_empty())
    })?;
    let report = client.connects(&format!("--to {}:80 --n 200", vip::PAY))?;
    assert_right("the rest stays as it was", &report, 200);
    Ok(())
}

#[test]
fn a_restarted_daemon_takes_its_pods_over() -> Result<()> {
    let mut cluster = mesh()?;
    for signal in ["term", "kill"] {
        let daemon = cluster.node_mut("node-a")?.daemon.as_mut().context("daemon")?;
        if signal == "term" {
            daemon.proc.stop(PROPAGATION * 2)?;
        } else {
            daemon.proc.kill()?;
        }
        cluster.node_mut("node-a")?.daemon = None;
        cluster.start_node("node-a", &NodeOptions::default())?;
        let client = cluster.pod("shop/web-0")?;
        for service in [vip::PAY, vip::DB, vip::LEDGER] {
            wait::until_true(&format!("{service} after {signal}"), PROPAGATION, || {
                Ok(client.connects(&format!("--to {service}:80 --n 1 --timeout 2"))?.all_right(1))
            })?;
            let report = client.connects(&format!("--to {service}:80 --n 500 --threads 4"))?;
            assert_right(&format!("{service} after {signal}"), &report, 500);
        }
    }
    Ok(())
}

#[test]
fn a_stopped_daemon_leaves_strict_pods_shut_and_the_others_open() -> Result<()> {
    let mut cluster = mesh()?;
    let [strict, permissive] = ["shop/pay-0", "shop/cart-1"].map(|pod| cluster.pod(pod).map(|p| p.spec.v4));
    let (strict, permissive) = (strict?, permissive?);
    let outsider = "shop/batch-0";
    let answers = |cluster: &Cluster, from: &str, to| -> Result<bool> {
        let to = format!("--to {to}:{} --send x --shutdown --timeout 2", ports::ECHO);
        Ok(!cluster.pod(from)?.dial(&to)?.received.is_empty())
    };
    assert!(!answers(&cluster, outsider, strict)?, "pay is STRICT");
    assert!(answers(&cluster, outsider, permissive)?, "cart is PERMISSIVE");
    cluster.node_mut("node-b")?.daemon.as_mut().context("daemon")?.proc.stop(PROPAGATION * 2)?;
    assert!(!answers(&cluster, outsider, strict)?, "nobody is there to check, so nobody gets in");
    assert!(answers(&cluster, outsider, permissive)?);
    // What the daemon would have carried ends at once, one way or the other; the rest goes on as before.
    let dialled =
        cluster.pod("shop/pay-0")?.dial(&format!("--to {permissive}:{} --send x --shutdown", ports::ECHO))?;
    assert!(!dialled.received.is_empty() || dialled.end == "connect: refused", "{dialled:?}");
    let report = cluster.pod("shop/pay-0")?.connects(&format!("--to {}:80 --n 200", vip::LEDGER))?;
    assert_right("direct connections without the daemon", &report, 200);
    cluster.node_mut("node-b")?.daemon = None;
    cluster.start_node("node-b", &NodeOptions::default())?;
    let client = cluster.pod("shop/web-0")?;
    wait::until_true("pay to be back", PROPAGATION, || {
        Ok(client.connects(&format!("--to {}:80 --n 1 --timeout 2", vip::PAY))?.all_right(1))
    })?;
    assert!(!answers(&cluster, outsider, strict)?);
    Ok(())
}

#[test]
fn a_daemon_that_starts_without_a_control_plane_keeps_strict_pods_shut() -> Result<()> {
    let mut cluster = mesh()?;
    let strict = cluster.pod("shop/pay-0")?.spec.v4;
    let answers = |cluster: &Cluster| -> Result<bool> {
        let to = format!("--to {strict}:{} --send x --shutdown --timeout 2", ports::ECHO);
        Ok(!cluster.pod("shop/batch-0")?.dial(&to)?.received.is_empty())
    };
    cluster.control.as_mut().context("control")?.proc.kill()?;
    for signal in ["kill", "term"] {
        let daemon = cluster.node_mut("node-b")?.daemon.as_mut().context("daemon")?;
        match signal {
            "kill" => daemon.proc.kill()?,
            _ => drop(daemon.proc.stop(PROPAGATION * 2)?),
        }
        assert!(!answers(&cluster)?, "after {signal}, nobody there");
        cluster.node_mut("node-b")?.daemon = None;
        // Nor does it find anything of its predecessor's on disk.
        std::fs::remove_file(cluster.node("node-b")?.dir.join("state/config")).ok();
        cluster.launch_node("node-b", &NodeOptions::default())?;
        // It serves its health check once its programs have taken the place of the old ones.
        wait::until_true("the new daemon to be up and not ready", PROPAGATION, || {
            let up = cluster.node("node-b")?.scrape();
            Ok(up.is_ok_and(|metrics| metrics.sum("nodemesh_ready", &[]) == 0.0))
        })?;
        assert!(!answers(&cluster)?, "after {signal}, with a daemon that knows nothing yet");
    }
    cluster.restart_control()?;
    cluster.wait_node_ready("node-b")?;
    let client = cluster.pod("shop/web-0")?;
    wait::until_true("pay to be back", PROPAGATION * 3, || {
        Ok(client.connects(&format!("--to {}:80 --n 1 --timeout 2", vip::PAY))?.all_right(1))
    })?;
    let held = cluster.node("node-b")?.pin_dir.join("held");
    wait::until_true("the old programs to be gone", PROPAGATION, || Ok(!held.exists()))?;
    assert!(!answers(&cluster)?);
    Ok(())
}

#[test]
fn connections_outlive_the_rotation_of_their_certificates() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_control(&quickstart())?;
    // The shortest lifetime that the daemon takes; it renews at half of it.
    let options = NodeOptions { extra: vec!["--cert-ttl-seconds=60".to_owned()], ..NodeOptions::default() };
    for node in ["node-a", "node-b"] {
        cluster.start_node(node, &options)?;
    }
    cluster.enrol_all()?;
    cluster.start_apps()?;
    let client = cluster.pod("shop/web-0")?;
    // 70 seconds at this rate: longer than any certificate of its beginning is valid.
    let (rate, bytes) = (1 << 20, 70 << 20);
    let report =
        client.bulk(&format!("--to {}:{} --down {bytes} --read-rate {rate}", vip::PAY, ports::BULK))?;
    assert_eq!(report.received, bytes);
    assert_eq!(report.down_checksums.0, report.down_checksums.1);
    assert!(report.millis > 65_000);
    let report = client.connects(&format!("--to {}:80 --n 200 --threads 4", vip::PAY))?;
    assert_right("new connections under new certificates", &report, 200);
    Ok(())
}
