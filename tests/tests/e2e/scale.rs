//! Many pods on one node, and live pods that enter and leave the mesh over and over.
//!
//! Times, memory and descriptors are printed; bounded here is only what must not grow without notice.
//! `NODEMESH_CYCLES` sets how often the pods enter and leave (100 for the full proof).

use crate::support::{OPENED, PROPAGATION, assert_right, mesh, vip};
use anyhow::{Context, Result, ensure};
use mesh_tests::{
    app::{ConnectsReport, ports},
    cluster::{Cluster, Pod},
    daemons::NodeOptions,
    fixture::{Fixture, NodeSpec, PodSpec},
    wait,
};
use std::{
    fmt::Write as _,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Instant,
};

/// Pods of one node, more than kubelet's default of 110.
const PODS: u8 = 250;
/// Descriptors and memory that one pod may cost the daemon (a dev build), and what the daemon may have beside.
const DESCRIPTORS: (u64, u64) = (8, 400);
const MEMORY: (u64, u64) = (128 << 10, 64 << 20);

const SERVICE: &str = "10.96.1.1";

fn big_node() -> Fixture {
    let nodes = [("node-a", 1), ("node-b", 2)].map(|(name, number)| NodeSpec { name: name.into(), number });
    let pod = |name: String, node: &NodeSpec, host: u8, args: &[&str]| PodSpec {
        namespace: "shop".to_owned(),
        uid: format!("5a3c0de0-0000-4000-a000-{:06}{host:06}", node.number),
        node: node.name.clone(),
        v4: node.pod_v4(host),
        v6: node.pod_v6(host),
        args: args.iter().map(ToString::to_string).collect(),
        name,
    };
    let mut pods = vec![pod("server".into(), &nodes[1], 2, &["serve", "--name", "server", "--who", "9000"])];
    pods.extend((0..PODS).map(|n| pod(format!("client-{n}"), &nodes[0], n + 2, &["idle"])));
    Fixture { nodes: nodes.to_vec(), pods }
}

/// What the fixture is in Kubernetes' terms.
fn manifests(fixture: &Fixture) -> String {
    let mut yaml =
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {nodemesh.io/enabled: \"true\"}}\n\
         ---\napiVersion: v1\nkind: Service\nmetadata: {name: server, namespace: shop}\n\
         spec: {selector: {app: server}, clusterIP: 10.96.1.1, clusterIPs: [10.96.1.1], \
         ports: [{name: tcp, port: 80, targetPort: 9000}]}\n"
            .to_owned();
    for node in &fixture.nodes {
        let _ = write!(
            yaml,
            "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {}}}\nstatus: {{addresses: [{{type: InternalIP, address: {}}}, \
             {{type: InternalIP, address: \"{}\"}}]}}\n",
            node.name,
            node.v4(),
            node.v6()
        );
    }
    for PodSpec { namespace, name, uid, node, v4, v6, .. } in &fixture.pods {
        let app = name.split('-').next().unwrap_or(name);
        let _ = write!(
            yaml,
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, uid: {uid}, labels: {{app: {app}}}}}\n\
             spec: {{nodeName: {node}, serviceAccountName: {app}, containers: [{{name: app, image: nodemesh/pod-app}}]}}\n\
             status: {{phase: Running, podIP: {v4}, podIPs: [{{ip: {v4}}}, {{ip: \"{v6}\"}}], \
             conditions: [{{type: Ready, status: \"True\"}}]}}\n"
        );
    }
    yaml
}

/// Descriptors and resident memory of a node's daemon.
fn cost(cluster: &Cluster, node: &str) -> Result<(u64, u64)> {
    let proc = &cluster.node(node)?.daemon()?.proc;
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", proc.pid()))?.count() as u64;
    Ok((descriptors, proc.resident_bytes()?))
}

fn captured(cluster: &Cluster, node: &str) -> Result<f64> {
    Ok(cluster.node(node)?.scrape()?.sum("nodemesh_pods", &[("state", "captured")]))
}

/// A few of the pods reach the service, each seen as itself.
fn sample(cluster: &Cluster) -> Result<()> {
    for n in (0..PODS).step_by(25) {
        let report = cluster
            .pod(&format!("shop/client-{n}"))?
            .connects(&format!("--to {SERVICE}:80 --n 10 --expect server"))?;
        assert_right(&format!("client-{n}"), &report, 10);
    }
    Ok(())
}

#[test]
fn two_hundred_and_fifty_pods_on_one_node() -> Result<()> {
    let fixture = big_node();
    let mut cluster = Cluster::new(&fixture)?;
    let config = cluster.run.dir().join("big");
    std::fs::create_dir_all(&config)?;
    std::fs::write(config.join("all.yaml"), manifests(&fixture))?;
    cluster.start_control(&config)?;
    for node in ["node-a", "node-b"] {
        cluster.start_node(node, &NodeOptions::default())?;
    }
    let before = cost(&cluster, "node-a")?;
    let started = Instant::now();
    cluster.enrol_all()?;
    let each = started.elapsed() / u32::from(PODS);
    cluster.start_apps()?;
    sample(&cluster)?;
    let after = cost(&cluster, "node-a")?;
    println!(
        "{PODS} pods by the CNI plugin: {each:?} each (one process of the plugin each), {} descriptors and {} KiB each",
        (after.0 - before.0) / u64::from(PODS),
        after.1.saturating_sub(before.1) / 1024 / u64::from(PODS)
    );
    ensure!(after.0 < DESCRIPTORS.0 * u64::from(PODS) + DESCRIPTORS.1, "{} descriptors", after.0);
    ensure!(after.1 < MEMORY.0 * u64::from(PODS) + MEMORY.1, "{} bytes of memory", after.1);

    // The same for a daemon that starts after the pods.
    cluster.node_mut("node-a")?.daemon.take().context("daemon")?.proc.kill()?;
    let started = Instant::now();
    cluster.launch_node("node-a", &NodeOptions::default())?;
    wait::until_true("all pods to be captured again", PROPAGATION * 6, || {
        Ok(captured(&cluster, "node-a")? >= f64::from(PODS))
    })?;
    println!(
        "{PODS} running pods after a start: {:?} in all, from the start of the process",
        started.elapsed()
    );
    cluster.wait_node_ready("node-a")?;
    sample(&cluster)
}

fn cycles() -> u32 {
    std::env::var("NODEMESH_CYCLES").ok().and_then(|text| text.parse().ok()).unwrap_or(10)
}

/// `10-shop.yaml` with some pods opted out.
fn opted_out(shop: &str, pods: &[&str]) -> Result<String> {
    let mut yaml = shop.to_owned();
    for pod in pods {
        let (before, after) =
            yaml.split_once(&format!("  name: {pod}\n")).with_context(|| pod.to_string())?;
        let after = after.replacen("  labels:\n", "  labels:\n    nodemesh.io/enabled: \"false\"\n", 1);
        yaml = format!("{before}  name: {pod}\n{after}");
    }
    Ok(yaml)
}

#[test]
fn live_pods_enter_and_leave_and_no_established_connection_notices() -> Result<()> {
    let cluster = mesh()?;
    let control = cluster.control.as_ref().context("control")?;
    let shop = std::fs::read_to_string(control.config_dir.join("10-shop.yaml"))?;
    // One client and one server, on two nodes; each has captured pods beside.
    let out = opted_out(&shop, &["web-0", "cart-1"])?;
    let (client, server) = (cluster.pod("shop/web-0")?, cluster.pod("shop/cart-1")?);
    let stop = AtomicBool::new(false);
    let alive = cluster.run.dir().join("alive");
    std::fs::write(&alive, "")?;
    let streams = [
        ("out of and into a pod that leaves", client.handle(), server.spec.v4.to_string()),
        ("out of a pod that leaves", client.handle(), vip::PAY.to_owned()),
        ("into a pod that leaves", cluster.pod("shop/db-0")?.handle(), server.spec.v4.to_string()),
    ];
    let (outcome, fresh, ended) = thread::scope(|scope| {
        let live: Vec<_> = streams
            .iter()
            .map(|(_, pod, to)| {
                let (to, alive) = (format!("{to}:{}", ports::ECHO), &alive);
                scope.spawn(move || pod.hold(&to, alive))
            })
            .collect();
        let connects = scope.spawn(|| fresh_connects(client, &stop));
        let outcome = (|| {
            wait::until_true("the connections to be open", PROPAGATION, || {
                Ok(cluster.node("node-b")?.scrape()?.sum(OPENED, &[("reporter", "destination")]) >= 3.0)
            })?;
            let all = [captured(&cluster, "node-a")?, captured(&cluster, "node-b")?];
            for _ in 0..cycles() {
                for (yaml, less) in [(&out, 1.0), (&shop, 0.0)] {
                    control.write_config("10-shop.yaml", yaml)?;
                    wait::until_true("the pods to leave or to enter", PROPAGATION, || {
                        let now = [captured(&cluster, "node-a")?, captured(&cluster, "node-b")?];
                        Ok(now == all.map(|n| n - less))
                    })?;
                }
            }
            Ok::<_, anyhow::Error>(())
        })();
        let early: Vec<bool> = live.iter().map(thread::ScopedJoinHandle::is_finished).collect();
        stop.store(true, Ordering::Relaxed);
        // An error would leave the clients waiting for their own deadline.
        let removed = std::fs::remove_file(&alive);
        let fresh = connects.join();
        let results: Vec<_> = live.into_iter().map(thread::ScopedJoinHandle::join).collect();
        let outcome = outcome.and(removed.map_err(Into::into));
        (outcome, fresh, early.into_iter().zip(results).collect::<Vec<_>>())
    });
    outcome?;
    let fresh = fresh.map_err(|_| anyhow::anyhow!("a client panicked"))??;
    println!("{} cycles; new connections meanwhile: {} right, {:?}", cycles(), fresh.ok, fresh.errors);
    ensure!(fresh.ok > 0 && fresh.wrong_backend == 0 && fresh.wrong_peer == 0, "{fresh:?}");
    for ((what, ..), (early, result)) in streams.iter().zip(ended) {
        let report = result.map_err(|_| anyhow::anyhow!("a client panicked"))?;
        let report = report.with_context(|| format!("the connection {what}"))?;
        ensure!(!early && report.lines > 0, "the connection {what} ended before the cycles did: {report:?}");
    }
    assert_right("afterwards", &client.connects(&format!("--to {}:80 --n 100", vip::CART))?, 100);
    Ok(())
}

/// New connections of the pod that enters and leaves, to a service with pods on both nodes.
fn fresh_connects(client: &Pod, stop: &AtomicBool) -> Result<ConnectsReport> {
    let mut total = ConnectsReport::default();
    while !stop.load(Ordering::Relaxed) {
        let args = format!(
            "--to {}:80 --n 20 --any-client --expect cart-0 --expect cart-1 --expect cart-2",
            vip::CART
        );
        total.merge(client.connects(&args)?);
    }
    Ok(total)
}
