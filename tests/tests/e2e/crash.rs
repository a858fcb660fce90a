//! The daemon dies under load: what it carried ends, what it did not carry does not notice, and nothing hangs.

use crate::{
    support::{PROPAGATION, assert_right, mesh, vip},
    upgrade::{Stop, load, take},
};
use anyhow::{Context, Result};
use mesh_tests::{app::ports, daemons::NodeOptions, proc::binary, wait};
use std::{fs, sync::atomic::AtomicBool, thread, time::Duration};

/// How often the daemon is killed, and connections that are made at least to each service; more by hand.
fn scale() -> (usize, u64) {
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse().ok());
    (number("NODEMESH_KILLS").map_or(3, |n: u64| n as usize), number("NODEMESH_CONNECTS").unwrap_or(1_000))
}

#[test]
fn a_killed_daemon_is_missed_only_by_what_it_carries() -> Result<()> {
    let (kills, least) = scale();
    let mut cluster = mesh()?;
    let client = take(&mut cluster, "shop/web-0")?;
    let strict = cluster.pod("shop/pay-0")?.spec.v4;
    let plain = cluster.capture()?;
    let stop = AtomicBool::new(false);
    let reports = thread::scope(|scope| -> Result<_> {
        let ended = Stop(&stop);
        let services = [("direct", vip::LEDGER), ("permissive", vip::CART), ("strict", vip::PAY)];
        let clients = services.map(|(kind, service)| (kind, load(scope, &client, service, &stop)));
        let mut made = 0;
        while made < kills {
            cluster.node_mut("node-a")?.daemon.as_mut().context("daemon")?.proc.kill()?;
            made += 1;
            // New connections that need the daemon end at once while it is away.
            let dialled = client.dial(&format!("--to {strict}:{} --send x --timeout 2", ports::WHO))?;
            assert_eq!(dialled.end, "connect: refused", "strict, with no daemon: {dialled:?}");
            cluster.node_mut("node-a")?.daemon = None;
            cluster.start_node("node-a", &NodeOptions::default())?;
            wait::until_true("the pods to be captured again", PROPAGATION * 2, || {
                Ok(client.connects(&format!("--to {}:80 --n 1 --timeout 2", vip::PAY))?.all_right(1))
            })?;
        }
        let more = client.connects(&format!("--to {}:80 --n {least} --threads 4", vip::PAY))?;
        assert_right("strict, after the last start", &more, least);
        drop(ended);
        let mut reports = Vec::new();
        for (kind, handle) in clients {
            let (n, report) = handle.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
            println!("{kind}: {n} connections, {} right, {:?}", report.ok, report.errors);
            reports.push((kind, n, report));
        }
        Ok(reports)
    })?;
    for (kind, n, report) in reports {
        assert_eq!(report.wrong_backend + report.wrong_client, 0, "{kind}: {report:#?}");
        assert!(report.errors.keys().all(|error| !error.contains("timed out")), "{kind} hangs: {report:#?}");
        if kind == "direct" {
            assert_right(kind, &report, n);
        }
    }
    // Nothing of the strict service ever crossed the wire in the clear: its answers begin with the client's payload.
    let packets = plain.finish()?;
    assert_eq!(packets.containing(b" pay-0 "), 0, "plaintext of a strict pod on the wire");
    assert!(packets.containing(b" ledger-1 ") > 0, "the capture sees plaintext where there is some");
    Ok(())
}

#[test]
fn damaged_pins_are_replaced_and_unload_takes_the_mesh_off() -> Result<()> {
    let mut cluster = mesh()?;
    let pins = cluster.node("node-a")?.pin_dir.clone();
    let current = pins.join(format!("v{}", mesh_common::ABI_VERSION));
    let inode = |path: &std::path::Path| -> Result<u64> {
        use std::os::unix::fs::MetadataExt as _;
        Ok(fs::metadata(path)?.ino())
    };
    for damage in ["none", "a link is gone", "a map in the place of a link", "a map is gone"] {
        let before = inode(&current.join("PODS"))?;
        cluster.node_mut("node-a")?.daemon.as_mut().context("daemon")?.proc.kill()?;
        match damage {
            "a link is gone" => fs::remove_file(current.join("connect4"))?,
            "a map in the place of a link" => {
                fs::remove_file(current.join("sock_ops"))?;
                fs::hard_link(current.join("PODS"), current.join("sock_ops"))
                    .or_else(|_| fs::remove_file(current.join("sendmsg4")))?;
            }
            "a map is gone" => fs::remove_file(current.join("BACKENDS"))?,
            _ => {}
        }
        cluster.node_mut("node-a")?.daemon = None;
        cluster.start_node("node-a", &NodeOptions::default())?;
        let adopted = inode(&current.join("PODS"))? == before;
        assert_eq!(adopted, damage != "a map is gone", "{damage}");
        let client = cluster.pod("shop/web-0")?;
        for service in [vip::PAY, vip::DB, vip::LEDGER] {
            wait::until_true(&format!("{service} after: {damage}"), PROPAGATION * 2, || {
                Ok(client.connects(&format!("--to {service}:80 --n 1 --timeout 2"))?.all_right(1))
            })?;
            let report = client.connects(&format!("--to {service}:80 --n 100 --threads 2"))?;
            assert_right(&format!("{service} after: {damage}"), &report, 100);
        }
    }

    let unload = |cluster: &mesh_tests::cluster::Cluster| {
        let args = ["unload".into(), "--pin-dir".into(), pins.clone().into_os_string()];
        let place = cluster.node("node-a")?.host_place();
        place.run(&binary("mesh-node")?, &args, &[], &[], Duration::from_secs(20))
    };
    let busy = unload(&cluster)?;
    assert!(!busy.status.success(), "a daemon runs");
    assert!(String::from_utf8_lossy(&busy.stderr).contains("stop it"), "{busy:?}");
    cluster.node_mut("node-a")?.daemon.as_mut().context("daemon")?.proc.stop(PROPAGATION * 2)?;
    let done = unload(&cluster)?;
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success() && said.starts_with("removed 9 programs"), "{done:?}");
    assert!(!current.exists());
    // Without the mesh nobody captures the address of a service, and a pod's own is reached directly.
    let client = cluster.pod("shop/web-0")?;
    let direct = cluster.pod("shop/db-0")?.spec.v4;
    let report = client.connects(&format!("--to {direct}:{} --n 20", ports::WHO))?;
    assert_right("plain, after unload", &report, 20);
    let nothing = unload(&cluster)?;
    assert!(String::from_utf8_lossy(&nothing.stdout).starts_with("nothing is pinned"), "{nothing:?}");
    Ok(())
}
