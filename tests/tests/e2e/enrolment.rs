//! Pods entering and leaving the mesh: the CNI plugin, the scan at start, opting out.

use crate::support::{bare, mesh, quickstart, vip};
use anyhow::{Context, Result};
use mesh_tests::{app::ports, daemons::NodeOptions, wait};
use std::time::Duration;

#[test]
fn add_returns_the_previous_result_and_the_pod_is_captured_at_once() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_control(&quickstart())?;
    for node in ["node-a", "node-b"] {
        cluster.start_node(node, &NodeOptions::default())?;
    }
    cluster.start_apps()?;
    cluster.node("node-b")?.cni("ADD", cluster.pod("shop/pay-0")?)?;
    let web = cluster.pod("shop/web-0")?;
    let node = cluster.node("node-a")?;
    let output: serde_json::Value = serde_json::from_str(&node.cni("ADD", web)?)?;
    assert_eq!(output["ips"][0]["address"], format!("{}/24", web.spec.v4));
    // The very first connection goes through the mesh: only `web` over mutual TLS gets an answer.
    let dialled = web.dial(&format!("--to {}:80 --send hello --shutdown", vip::PAY))?;
    assert!(dialled.received.starts_with("hello pay-0 "), "{dialled:?}");

    node.cni("CHECK", web)?;
    node.cni("ADD", web).context("ADD twice is one ADD")?;
    node.cni("DEL", web)?;
    node.cni("DEL", web).context("DEL twice is one DEL")?;
    assert!(node.cni("CHECK", web).is_err(), "CHECK of a pod that left");
    Ok(())
}

#[test]
fn an_opted_out_pod_stays_outside() -> Result<()> {
    let cluster = mesh()?;
    let batch = cluster.pod("shop/batch-0")?;
    // It has no balancing of virtual addresses, since nothing of it is captured ...
    assert!(batch.dial(&format!("--to {}:80 --send x --timeout 2", vip::DB))?.end.starts_with("connect:"));
    // ... and nothing listens in its name.
    for port in [15006, 15008] {
        let to = format!("{}:{port}", batch.spec.v4);
        assert_eq!(cluster.pod("shop/db-0")?.dial(&format!("--to {to}"))?.end, "connect: refused");
    }
    Ok(())
}

#[test]
fn running_pods_are_found_when_the_daemon_starts() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_control(&quickstart())?;
    // The pods run before any daemon, and no CNI plugin is called.
    cluster.start_apps()?;
    for node in ["node-a", "node-b"] {
        cluster.start_node(node, &NodeOptions::default())?;
    }
    let web = cluster.pod("shop/web-0")?;
    wait::until_true("the pods to be captured", Duration::from_secs(20), || {
        let dialled = web.dial(&format!("--to {}:80 --send hello --shutdown --timeout 2", vip::PAY))?;
        Ok(dialled.received.starts_with("hello pay-0 "))
    })?;
    // Listeners that are older than the capture are reachable in plaintext where that is allowed.
    let cart = cluster.pod("shop/cart-1")?.spec.v4;
    let report = cluster
        .pod("shop/batch-0")?
        .connects(&format!("--to {cart}:{} --n 50 --expect cart-1", ports::WHO))?;
    assert!(report.all_right(50), "{report:?}");
    Ok(())
}

#[test]
fn a_closed_port_stays_closed() -> Result<()> {
    let cluster = mesh()?;
    for target in ["shop/cart-1", "shop/pay-0"] {
        let to = cluster.pod(target)?.spec.v4;
        for client in ["shop/batch-0", "legacy/report-0"] {
            let dialled = cluster.pod(client)?.dial(&format!("--to {to}:9 --timeout 2"))?;
            assert_eq!(dialled.end, "connect: refused", "{client} -> {target}");
        }
        // The daemon's own plaintext port is not for anybody.
        let dialled = cluster.pod("shop/batch-0")?.dial(&format!("--to {to}:15006 --send x --timeout 2"))?;
        assert_eq!(dialled.received, "");
    }
    Ok(())
}

#[test]
fn probes_of_the_host_reach_strict_pods() -> Result<()> {
    let cluster = mesh()?;
    let node = cluster.node("node-b")?;
    let pay = cluster.pod("shop/pay-0")?.spec.v4;
    let program = mesh_tests::proc::binary("pod-app")?;
    let to = format!("{pay}:{}", ports::WHO);
    let args = ["dial", "--to", &to, "--send", "probe", "--shutdown"];
    let output = node.host_place().run(&program, &args, &[], &[], Duration::from_secs(10))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("probe pay-0"), "a probe from the pod's own node: {text}");
    Ok(())
}

#[test]
fn without_a_daemon_add_fails_with_a_remedy_and_del_succeeds() -> Result<()> {
    let cluster = bare()?;
    let node = cluster.node("node-a")?;
    let web = cluster.pod("shop/web-0")?;
    let error = node.cni("ADD", web).expect_err("no daemon is there").to_string();
    assert!(error.contains("\"code\"") && error.contains("cni.sock"), "{error}");
    node.cni("DEL", web)?;
    Ok(())
}
