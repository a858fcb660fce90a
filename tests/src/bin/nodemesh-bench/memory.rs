//! Memory: the daemon with 50 pods and nothing to do, and what an idle connection costs on each side of a tunnel. On a
//! cluster of its own, so that no load has been there before.

use crate::{
    layout::{self, VIP_REMOTE},
    measure::{at, service},
    peers::{self, PROXY_PORT},
    report::Row,
};
use anyhow::{Context, Result};
use mesh_tests::{cluster::Cluster, daemons::NodeOptions, proc::Proc, wait};
use std::{net::Ipv4Addr, net::SocketAddr, path::Path, time::Duration};

/// Pods of the mesh on node-a.
const PODS: u8 = 50;

/// Of which the layout has these itself.
const OWN_PODS: u8 = 2;

/// Numbers of idle connections.
const CONNECTIONS: [usize; 2] = [1_000, 10_000];

/// How long the connections are held at most.
const HOLD: Duration = Duration::from_secs(300);

/// A pair of processes that carries connections.
struct Carrier<'a> {
    name: &'static str,
    client: &'static str,
    to: SocketAddr,
    /// Client's side, server's side.
    procs: [&'a Proc; 2],
}

/// Measures on a new cluster.
pub(crate) fn run(dir: &Path, options: &NodeOptions, envoy: &Result<std::path::PathBuf>) -> Result<Vec<Row>> {
    println!("memory: {PODS} pods, then idle connections");
    let cluster = layout::bring_up(dir, PODS - OWN_PODS, options)?;
    let mut rows = Vec::new();
    let daemons = [&cluster.node("node-a")?.daemon()?.proc, &cluster.node("node-b")?.daemon()?.proc];
    let pods = settled(daemons[0])?;
    rows.push(Row::new("mesh-node", "rss_50_pods", "MiB", &[Some(pods / 1024.0)], None));
    let mesh = Carrier { name: "mtls", client: "bench/client", to: service(VIP_REMOTE), procs: daemons };
    rows.extend(idle(&cluster, &mesh)?);
    let envoys = match envoy {
        Ok(program) => peers::start_envoy(&cluster, program),
        Err(error) => Err(anyhow::anyhow!("{error:#}")),
    };
    for (name, client, pair) in [
        ("envoy", "plain/envoy-client", envoys),
        ("haproxy", "plain/haproxy-client", peers::start_haproxy(&cluster)),
    ] {
        // The whole run's table says already that a peer is missing.
        let Ok(pair) = pair else { continue };
        let [first, second] = pair.procs.as_slice() else { continue };
        let to = at(Ipv4Addr::LOCALHOST, PROXY_PORT);
        rows.extend(idle(&cluster, &Carrier { name, client, to, procs: [first, second] })?);
    }
    Ok(with_ratios(&rows))
}

/// Resident memory in KiB once it has stopped changing.
fn settled(proc: &Proc) -> Result<f64> {
    let read = || -> Result<f64> {
        #[expect(clippy::cast_precision_loss, reason = "bytes of a process")]
        let kib = proc.resident_bytes()? as f64 / 1024.0;
        Ok(kib)
    };
    let (mut last, mut same) = (read()?, 0);
    wait::until("resident memory to settle", Duration::from_secs(30), || {
        std::thread::sleep(Duration::from_millis(100));
        let now = read()?;
        same = if (now - last).abs() <= 64.0 { same + 1 } else { 0 };
        last = now;
        Ok((same >= 10).then_some(now))
    })
}

fn idle(cluster: &Cluster, carrier: &Carrier<'_>) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let before = [settled(carrier.procs[0])?, settled(carrier.procs[1])?];
    let pod = cluster.pod(carrier.client)?;
    let program = std::env::current_exe()?;
    let mut clients = Vec::new();
    let mut open = 0;
    for wanted in CONNECTIONS {
        // A proxy has two descriptors for a connection; the limit of this process is the one of all.
        let count = wanted.min(descriptors()? / 2 - 500);
        let log = cluster.run.dir().join(format!("idle-{}-{wanted}.log", carrier.name));
        let to = carrier.to.to_string();
        let more = (count - open).to_string();
        let hold = HOLD.as_millis().to_string();
        let args = ["client", "idle", "--to", &to, "--connections", &more, "--millis", &hold];
        let mut client = pod.place().spawn("idle client", &program, &args, &log)?.quiet();
        let what = format!("{count} connections over {}", carrier.name);
        client.until(&what, Duration::from_secs(60), |client| Ok(client.log().contains("open")))?;
        open = count;
        clients.push(client);
        for (side, (proc, before)) in ["client", "server"].iter().zip(carrier.procs.iter().zip(before)) {
            #[expect(clippy::cast_precision_loss, reason = "at most 10,000")]
            let each = (settled(proc)? - before) / count as f64;
            let metric = format!("idle_{wanted}_{side}_side");
            rows.push(Row::new(carrier.name, &metric, "KiB/connection", &[Some(each)], None));
        }
    }
    Ok(rows)
}

/// Sets the mesh's rows against Envoy's.
fn with_ratios(rows: &[Row]) -> Vec<Row> {
    let value = |scenario: &str, metric: &str| {
        rows.iter().find(|r| r.scenario == scenario && r.metric == metric).and_then(|r| r.median)
    };
    let mut out: Vec<Row> = rows
        .iter()
        .map(|row| match value("envoy", &row.metric) {
            Some(base) if row.scenario == "mtls" => {
                Row::new("mtls", &row.metric, &row.unit, &[row.median], Some(("envoy", &[Some(base)])))
            }
            _ => row.clone(),
        })
        .collect();
    let order: Vec<String> = rows.iter().map(|row| row.metric.clone()).collect();
    out.sort_by_key(|row| order.iter().position(|metric| *metric == row.metric));
    out
}

/// Descriptors that a process started from here may have.
fn descriptors() -> Result<usize> {
    let limits = std::fs::read_to_string("/proc/self/limits")?;
    let line = limits.lines().find(|line| line.starts_with("Max open files")).context("no limit")?;
    let word = line.split_whitespace().nth(3).context("no soft limit")?;
    Ok(if word == "unlimited" { 1 << 20 } else { word.parse()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_a_limit() {
        assert!(descriptors().unwrap() > 100);
    }

    #[test]
    fn the_mesh_is_set_against_envoy() {
        let row = |scenario: &str, value| Row::new(scenario, "idle", "KiB", &[Some(value)], None);
        let rows = with_ratios(&[row("mtls", 5.0), row("envoy", 10.0)]);
        assert_eq!(rows[0].ratio, Some(0.5));
        assert_eq!(rows[1].ratio, None);
    }
}
