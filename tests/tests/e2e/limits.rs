//! Storms from one pod: they neither kill the daemon nor starve another pod, and what they took comes back.
//!
//! The victim is always web-0, whose round trips are counted, never timed.

use crate::support::{PROPAGATION, assert_right, bare, growth, mesh, quickstart, vip};
use anyhow::{Context, Result};
use mesh_tests::{
    app::{ConnectsReport, ports},
    cluster::{Cluster, Pod},
    daemons::NodeOptions,
    hostile::{Silent, Until, half_open},
    metrics::Scrape,
    peer::{Tunnel, open_tunnel, open_tunnel_with},
    pki::Ca,
    proc::{Proc, binary},
    wait,
};
use std::{net::SocketAddr, time::Duration};

const HITS: &str = "nodemesh_limit_hits_total";
const CURRENT: &str = "nodemesh_limit_current";
const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

/// What the debug build of a daemon may keep after a storm, beyond what it had before. The allocator gives pages back
/// after seconds, not all of them are free, and the programs' own pages have come in meanwhile.
const KEPT: u64 = 24 << 20;

/// The mesh with a log filter and more flags for the daemons.
fn mesh_with(log: &str, extra: &[&str]) -> Result<Cluster> {
    let mut cluster = bare()?;
    cluster.start_control(&quickstart())?;
    let options =
        NodeOptions { log: log.to_owned(), extra: extra.iter().map(|&flag| flag.to_owned()).collect() };
    for node in ["node-a", "node-b"] {
        cluster.start_node(node, &options)?;
    }
    cluster.enrol_all()?;
    cluster.start_apps()?;
    Ok(cluster)
}

fn hit(before: &Scrape, after: &Scrape, limit: &str) -> f64 {
    growth(before, after, HITS, &[("limit", limit)])
}

fn resident(cluster: &Cluster, node: &str) -> Result<u64> {
    cluster.node(node)?.daemon()?.proc.resident_bytes()
}

/// Waits until a node's daemon is back at what it had, more or less.
fn await_memory(cluster: &Cluster, node: &str, before: u64) -> Result<()> {
    let what = format!("the memory of {node} to come back to {before} + {KEPT}");
    wait::until_true(&what, Duration::from_secs(30), || {
        let now = resident(cluster, node)?;
        anyhow::ensure!(now <= before + KEPT, "{now} bytes are resident");
        Ok(true)
    })
}

/// Round trips of the victim across the nodes, all of which must be right.
fn victim(cluster: &Cluster, n: u64) -> Result<()> {
    let report = cluster.pod("shop/web-0")?.connects(&format!("--to {}:80 --n {n} --threads 2", vip::PAY))?;
    assert_right("the victim", &report, n);
    Ok(())
}

/// Runs `storm` on a thread of its own, and round trips of the victim until it has ended.
fn during<T: Send>(cluster: &Cluster, storm: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let storm = scope.spawn(storm);
        let mut rounds = 0;
        while !storm.is_finished() || rounds == 0 {
            victim(cluster, 50)?;
            rounds += 1;
        }
        storm.join().map_err(|_| anyhow::anyhow!("the storm panicked"))?
    })
}

fn start(cluster: &Cluster, pod: &Pod, what: &str, args: &str) -> Result<Proc> {
    let words: Vec<&str> = args.split_whitespace().collect();
    let log = cluster.run.dir().join(format!("{}-{what}.log", pod.spec.name));
    Ok(pod.place().spawn(what, &binary("pod-app")?, &words, &log)?.quiet())
}

#[derive(Debug, serde::Deserialize)]
struct Held {
    open: u64,
    failed: u64,
    taken: u64,
}

/// Starts `pod-app crowd` and waits for what it says.
fn hold(cluster: &Cluster, pod: &Pod, what: &str, args: &str) -> Result<(Proc, Held)> {
    let mut proc = start(cluster, pod, what, &format!("crowd {args}"))?;
    let mut held = None;
    proc.until(what, Duration::from_secs(300), |proc| {
        held = proc.log().lines().find_map(|line| serde_json::from_str(line).ok());
        Ok(held.is_some())
    })?;
    Ok((proc, held.context("no report")?))
}

#[test]
fn a_storm_of_connections_starves_nobody() -> Result<()> {
    let cluster = mesh()?;
    let before = [resident(&cluster, "node-a")?, resident(&cluster, "node-b")?];
    let (guest, cart) = (cluster.pod("shop/guest-0")?, cluster.pod("shop/cart-1")?.spec.v4);
    let storm = format!("connects --to {cart}:{} --n 6000 --threads 48", ports::WHO);
    let report: ConnectsReport = during(&cluster, || guest.app_json(&storm))?;
    // The storm is within its bounds, so its own connections are right as well.
    assert_right("the storm itself", &report, 6000);
    for (node, before) in ["node-a", "node-b"].into_iter().zip(before) {
        await_memory(&cluster, node, before)?;
    }
    let now = cluster.node("node-a")?.scrape()?;
    assert_eq!(now.sum(CURRENT, &[("pod", "shop/guest-0"), ("limit", "setting_up")]), 0.0);
    assert!(now.sum("nodemesh_memory_bytes", &[("state", "resident")]) > 0.0);
    Ok(())
}

#[test]
fn idle_connections_are_bounded_per_pod_and_cost_little() -> Result<()> {
    let cluster = mesh_with("info", &["--max-connections-per-pod=1500"])?;
    let before = cluster.node("node-a")?.scrape()?;
    let had = resident(&cluster, "node-a")?;
    let (guest, cart) = (cluster.pod("shop/guest-0")?, cluster.pod("shop/cart-1")?);
    let server = start(&cluster, cart, "many", "serve-many --port 9100")?;
    wait::until_true("the server", PROPAGATION, || Ok(server.log().contains("ready")))?;
    let args = format!("--to {}:9100 --n 1600", cart.spec.v4);
    let (proc, held) = during(&cluster, || hold(&cluster, guest, "hold", &args))?;
    assert_eq!((held.open, held.failed), (1500, 100), "{held:?}");
    let now = cluster.node("node-a")?.scrape()?;
    assert_eq!(hit(&before, &now, "connections"), 100.0);
    assert_eq!(now.sum(CURRENT, &[("pod", "shop/guest-0"), ("limit", "connections")]), 1500.0);
    victim(&cluster, 50)?;
    // The debug build's futures are larger than the release's, and the allocator keeps some of what the handshakes took.
    let each = resident(&cluster, "node-a")?.saturating_sub(had) / 1500;
    assert!(each < 32 << 10, "{each} bytes for each idle connection");
    drop(proc);
    cluster.node("node-a")?.until_metrics("the connections to be gone", |now| {
        now.sum(CURRENT, &[("pod", "shop/guest-0"), ("limit", "connections")]) == 0.0
    })?;
    await_memory(&cluster, "node-a", had)
}

#[test]
fn peers_that_stop_half_way_hold_up_nobody_else() -> Result<()> {
    let cluster = mesh()?;
    let ca = Ca::of_mesh(cluster.control.as_ref().context("no control plane")?)?;
    let outside = &cluster.pod("shop/batch-0")?.netns;
    let pay = cluster.pod("shop/pay-0")?.spec.v4;
    let (to, authority) = (SocketAddr::from((pay, 15008)), format!("{pay}:{}", ports::WHO));
    let before = cluster.node("node-b")?.scrape()?;
    // More than a pod may have under way.
    let half = half_open(outside, to, 700)?;
    let mut silent = [Until::Tls, Until::Preface, Until::HalfHeaders]
        .map(|until| ca.issue(WEB).and_then(|id| Silent::open(outside, id, to, 20, until)));
    for _ in 0..20 {
        let tunnel = open_tunnel(outside, Some(ca.issue(WEB)?), to, &authority, "ping")?;
        assert!(
            matches!(&tunnel, Tunnel::Answered(answer) if answer.starts_with("ping pay-0 ")),
            "{tunnel:?}"
        );
    }
    victim(&cluster, 50)?;
    let now = cluster.node("node-b")?.scrape()?;
    assert!(hit(&before, &now, "handshakes") >= 100.0, "{}", hit(&before, &now, "handshakes"));
    let busy = now.sum(CURRENT, &[("pod", "shop/pay-0"), ("limit", "handshakes")]);
    assert!(busy <= 512.0, "{busy} handshakes");
    // Without a preface they are ended within seconds; those that do not answer a PING later.
    let no_preface = silent[0].as_mut().map_err(|error| anyhow::anyhow!("{error:#}"))?;
    wait::until_true("the silent ones to be ended", Duration::from_secs(20), || {
        Ok(no_preface.closed() == 20)
    })?;
    drop(half);
    // Headers beyond any need are refused, and the daemon goes on.
    for padding in [20 << 10, 60 << 10] {
        let tunnel = open_tunnel_with(outside, Some(ca.issue(WEB)?), to, &authority, "ping", padding)?;
        assert!(matches!(tunnel, Tunnel::Status(431) | Tunnel::Refused(_)), "{tunnel:?}");
    }
    let tunnel = open_tunnel_with(outside, Some(ca.issue(WEB)?), to, &authority, "ping", 2 << 10)?;
    assert!(matches!(tunnel, Tunnel::Answered(_)), "{tunnel:?}");
    victim(&cluster, 50)
}

#[test]
fn readers_that_never_read_are_bounded_together() -> Result<()> {
    let cluster = mesh()?;
    let before = cluster.node("node-b")?.scrape()?;
    let had = resident(&cluster, "node-b")?;
    let (guest, cart) = (cluster.pod("shop/guest-0")?, cluster.pod("shop/cart-1")?);
    let sleeper = start(&cluster, cart, "sleeper", "serve --name sleeper --sleep 9103")?;
    wait::until_true("the server", PROPAGATION, || Ok(sleeper.log().contains("ready")))?;
    let args = format!("--to {}:9103 --n 60 --threads 60 --fill", cart.spec.v4);
    let (proc, held) = during(&cluster, || hold(&cluster, guest, "fill", &args))?;
    let now = cluster.node("node-b")?.scrape()?;
    let buffered = now.sum(CURRENT, &[("pod", "shop/cart-1"), ("limit", "buffered_bytes")]);
    assert!(buffered <= f64::from(132 << 20), "{buffered} bytes are held");
    assert!(buffered >= f64::from(64 << 20), "the test fills something: {buffered}, {held:?}");
    assert!(hit(&before, &now, "buffered_bytes") > 0.0, "{held:?}");
    let grown = resident(&cluster, "node-b")?.saturating_sub(had);
    assert!(grown < 220 << 20, "{grown} bytes more are resident");
    victim(&cluster, 50)?;
    assert!(held.taken > 0, "{held:?}");
    // The readers go as well: what was sent to them stays theirs until then.
    drop((proc, sleeper));
    await_memory(&cluster, "node-b", had)
}

/// More pods on a node, `n` of them, with a service account for every second one, enrolled.
fn add_pods(cluster: &mut Cluster, node: &str, n: u8) -> Result<()> {
    let spec = cluster.node(node)?.spec.clone();
    let mut yaml = String::new();
    let first = cluster.pods.len();
    for i in 0..n {
        let (host, uid) = (100 + i, format!("5a3c0de0-0000-4000-8000-{:012x}", 0x1000 + u32::from(i)));
        let pod = mesh_tests::fixture::PodSpec {
            namespace: "shop".to_owned(),
            name: format!("extra-{i}"),
            uid,
            node: node.to_owned(),
            v4: spec.pod_v4(host),
            v6: spec.pod_v6(host),
            args: Vec::new(),
        };
        yaml += &format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {}, namespace: shop, uid: {}, labels: {{app: extra}}}}\n\
             spec: {{nodeName: {node}, serviceAccountName: extra-{}, containers: [{{name: app, image: x}}]}}\n\
             status: {{phase: Running, podIP: {}, podIPs: [{{ip: {}}}, {{ip: \"{}\"}}], \
             conditions: [{{type: Ready, status: \"True\"}}]}}\n",
            pod.name,
            pod.uid,
            i / 2,
            pod.v4,
            pod.v4,
            pod.v6
        );
        cluster.add_pod(&pod)?;
    }
    cluster.control.as_ref().context("no control plane")?.write_config("91-extra.yaml", &yaml)?;
    for pod in &cluster.pods[first..] {
        cluster.node(node)?.cni("ADD", pod)?;
    }
    Ok(())
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The storms at full size, and what memory they take: prints figures. Needs minutes, so it is run by hand:
/// `cargo test -p mesh-tests --test e2e -- --ignored full_size --nocapture`.
#[test]
#[ignore = "a measurement that takes minutes"]
fn full_size() -> Result<()> {
    let (pods, idle, storm) = (number("PODS", 43), number("IDLE", 10_000), number("STORM", 72_000));
    let mut cluster = mesh_with("warn,access=off", &["--max-connections-per-pod=30000"])?;
    let show = |cluster: &Cluster, what: &str| -> Result<[u64; 2]> {
        let rss = [resident(cluster, "node-a")?, resident(cluster, "node-b")?];
        let memory = |node: &str, state: &str| -> Result<u64> {
            Ok(cluster.node(node)?.scrape()?.sum("nodemesh_memory_bytes", &[("state", state)]) as u64 >> 10)
        };
        println!(
            "{what}: RSS KiB client {} server {}; allocated KiB {} {}; resident KiB {} {}",
            rss[0] >> 10,
            rss[1] >> 10,
            memory("node-a", "allocated")?,
            memory("node-b", "allocated")?,
            memory("node-a", "resident")?,
            memory("node-b", "resident")?
        );
        Ok(rss)
    };
    show(&cluster, "started")?;
    add_pods(&mut cluster, "node-a", u8::try_from(pods)?)?;
    std::thread::sleep(Duration::from_secs(number("SETTLE", 5)));
    let base = show(&cluster, "pods enrolled")?;
    for node in ["node-a", "node-b"] {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", cluster.node(node)?.daemon()?.proc.pid()))?;
        for line in status.lines().filter(|l| l.starts_with("Rss") || l.starts_with("Threads")) {
            println!("  {node} {line}");
        }
    }
    let (guest, cart) = (cluster.pod("shop/guest-0")?, cluster.pod("shop/cart-1")?);
    let server = start(&cluster, cart, "many", "serve-many --port 9100")?;
    wait::until_true("the server", PROPAGATION, || Ok(server.log().contains("ready")))?;
    if idle > 0 {
        let args = format!("--to {}:9100 --n {idle} --threads 16", cart.spec.v4);
        let (proc, held) = hold(&cluster, guest, "hold", &args)?;
        println!("{held:?}");
        std::thread::sleep(Duration::from_secs(number("SETTLE", 5)));
        let full = show(&cluster, "idle connections")?;
        for i in 0..2 {
            println!("  per connection: {} bytes", full[i].saturating_sub(base[i]) / held.open.max(1));
        }
        victim(&cluster, 200)?;
        drop(proc);
        std::thread::sleep(Duration::from_secs(30));
        show(&cluster, "30 s after they were closed")?;
    }
    if storm > 0 {
        let args = format!("connects --to {}:{} --n {storm} --threads 48", cart.spec.v4, ports::WHO);
        let started = std::time::Instant::now();
        let report: ConnectsReport =
            during(&cluster, || guest.app_json_within(&args, Duration::from_secs(600)))?;
        println!(
            "storm: {} right, {} lost in {:?}; {:?}",
            report.ok,
            report.lost,
            started.elapsed(),
            report.errors
        );
        show(&cluster, "after the storm")?;
        std::thread::sleep(Duration::from_secs(30));
        show(&cluster, "30 s later")?;
    }
    for node in ["node-a", "node-b"] {
        let scrape = cluster.node(node)?.scrape()?;
        for sample in scrape.matching(HITS, &[]).filter(|sample| sample.value > 0.0) {
            println!("  {node} {:?} {}", sample.labels, sample.value);
        }
    }
    Ok(())
}
