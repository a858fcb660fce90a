//! The harness itself: pods reach each other without any mesh, in both families, and nothing stays behind.

use crate::support::{bare, quickstart};
use anyhow::{Context, Result};
use mesh_tests::{app::ports, cgroup, netns, run, wait};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    process::{Command, Stdio},
    time::Duration,
};

#[test]
fn pods_reach_each_other_without_a_mesh() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_apps()?;
    let client = cluster.pod("shop/web-0")?;
    for server in ["shop/db-0", "shop/pay-0"] {
        let server = cluster.pod(server)?;
        for address in [server.spec.v4.to_string(), format!("[{}]", server.spec.v6)] {
            for mode in ["plain", "nonblock", "tfo", "tfo-connect"] {
                let report = client.connects(&format!(
                    "--to {address}:{} --n 50 --threads 2 --mode {mode} --expect {}",
                    ports::WHO,
                    server.spec.name
                ))?;
                assert!(report.all_right(50), "{address} {mode}: {report:?}");
            }
            for kind in ["", "--connected", "--fresh"] {
                let report = client.udp(&format!("--to {address}:{} --n 20 {kind}", ports::UDP))?;
                assert!(report.all_right(20), "{address} udp {kind}: {report:?}");
            }
        }
        let to = format!("{}:{}", server.spec.v4, ports::WHO);
        let report = client.connects(&format!("--to {to} --n 20 --mapped"))?;
        assert!(report.all_right(20), "mapped: {report:?}");

        let mib = 1 << 20;
        let bulk = client.bulk(&format!(
            "--to {}:{} --up {} --down {}",
            server.spec.v4,
            ports::BULK,
            64 * mib,
            48 * mib
        ))?;
        assert_eq!((bulk.server_verified, bulk.received), (64 * mib, 48 * mib));
        assert_eq!(bulk.up_checksums.0, bulk.up_checksums.1);
        assert_eq!(bulk.down_checksums.0, bulk.down_checksums.1);

        let v4 = server.spec.v4;
        let echoed = client.dial(&format!("--to {v4}:{} --send hello --shutdown", ports::ECHO))?;
        assert_eq!((echoed.received.as_str(), echoed.end.as_str()), ("hello\nbye\n", "eof"));
        let reset = client.dial(&format!("--to {v4}:{} --send x", ports::RESET))?;
        assert_eq!(reset.end, "read: reset");
        let refused = client.dial(&format!("--to {v4}:9"))?;
        assert_eq!(refused.end, "connect: refused");
        let asleep = client.dial(&format!("--to {v4}:{} --fill 1073741824 --timeout 1", ports::SLEEP))?;
        assert_eq!(asleep.end, "write: timeout");
        assert!(asleep.taken < 64 * mib, "a sleeping reader took {} bytes", asleep.taken);
    }
    Ok(())
}

#[test]
fn capture_sees_the_plaintext_between_nodes() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_apps()?;
    let capture = cluster.capture()?;
    let server = cluster.pod("shop/pay-0")?.spec.v4;
    let answer =
        cluster.pod("shop/web-0")?.dial(&format!("--to {server}:9001 --send marker-4711 --shutdown"))?;
    assert_eq!(answer.end, "eof");
    let packets = capture.finish()?;
    assert!(packets.containing(b"marker-4711") >= 2, "{} frames", packets.len());
    assert!(packets.tcp_port(ports::ECHO) > 0);
    assert_eq!(packets.containing(b"marker-4712"), 0);
    Ok(())
}

#[test]
fn a_dropped_cluster_leaves_nothing_behind() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_apps()?;
    let (prefix, cgroup, dir) =
        (cluster.run.name(""), cluster.run.cgroup()?.path().to_owned(), cluster.run.dir());
    assert!(!netns::list(&prefix)?.is_empty());
    drop(cluster);
    assert_eq!(netns::list(&prefix)?, Vec::<String>::new());
    assert!(!cgroup.exists());
    assert!(!dir.exists());
    Ok(())
}

/// Starts a run in another process, sends it a signal in the middle, and returns its id.
fn interrupted_run(signal: Signal) -> Result<String> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_nodemesh-demo"))
        .arg("--config")
        .arg(quickstart())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let id = wait::until("the other run to have namespaces and processes", Duration::from_secs(20), || {
        let Some(dir) = run::dir_of(child.id())? else { return Ok(None) };
        let id = dir.file_name().and_then(|name| name.to_str()).context("id")?.to_owned();
        Ok(dir.join("control/mesh-control.log").exists().then_some(id))
    })?;
    kill(Pid::from_raw(child.id().cast_signed()), signal)?;
    child.wait()?;
    Ok(id)
}

/// Namespaces and cgroup of a run that still exist.
fn traces(id: &str) -> Result<Vec<String>> {
    let mut traces = netns::list(&format!("nodemesh-{id}-"))?;
    let cgroup = cgroup::mount_point()?.join(format!("nodemesh-{id}"));
    if cgroup.exists() {
        traces.push(cgroup.display().to_string());
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    traces.extend(mounts.lines().filter(|line| line.contains(id)).map(str::to_owned));
    Ok(traces)
}

#[test]
fn a_crashed_run_is_removed_by_the_next_one() -> Result<()> {
    let id = interrupted_run(Signal::SIGKILL)?;
    assert!(!traces(&id)?.is_empty(), "a killed process cannot clean up");
    drop(run::Run::begin()?);
    assert_eq!(traces(&id)?, Vec::<String>::new());
    Ok(())
}

#[test]
fn an_interrupted_run_cleans_up_itself() -> Result<()> {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let id = interrupted_run(signal)?;
        assert_eq!(traces(&id)?, Vec::<String>::new(), "{signal}");
    }
    Ok(())
}
