//! Beside others: BPF programs of other software on the same hooks, hostPort, hostNetwork, pods with rules of their own,
//! pods of one family, addresses that are used again.

use crate::support::{PROPAGATION, assert_right, bare, growth, mesh, quickstart, vip};
use anyhow::{Context, Result, ensure};
use mesh_tests::{
    app::{ConnectsReport, ports},
    cluster::Cluster,
    daemons::NodeOptions,
    foreign::{Foreign, Way},
    proc::{Place, binary},
    wait,
};
use std::{
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

/// Addresses that only the foreign programs know.
const FOREIGN: Ipv4Addr = Ipv4Addr::new(10, 96, 200, 1);
const FORBIDDEN: Ipv4Addr = Ipv4Addr::new(10, 96, 200, 2);

/// The programs of another socket-level load balancer, on one cgroup.
fn others(cluster: &Cluster, way: Way, cgroup: &mesh_tests::cgroup::Cgroup) -> Result<[Foreign; 3]> {
    let db = cluster.pod("shop/db-0")?.spec.v4;
    let (from, to) = (SocketAddrV4::new(FOREIGN, 80), SocketAddrV4::new(db, ports::WHO));
    Ok([
        Foreign::rewrite(cgroup, way, from, to)?,
        Foreign::forbid(cgroup, way, FORBIDDEN)?,
        Foreign::watch(cgroup, way)?,
    ])
}

/// The mesh and the foreign programs each do their part.
fn assert_both_work(cluster: &Cluster, what: &str) -> Result<()> {
    let web = cluster.pod("shop/web-0")?;
    let node = cluster.node("node-a")?;
    let before = node.scrape()?;
    for service in [vip::PAY, vip::DB, vip::LEDGER] {
        let report = web.connects(&format!("--to {service}:80 --n 200 --threads 4"))?;
        assert_right(&format!("{what}: {service}"), &report, 200);
    }
    let report = web.udp(&format!("--to {}:5300 --n 50 --fresh", vip::QUOTES))?;
    assert_right(&format!("{what}: UDP"), &report, 50);
    let dialled = web.dial(&format!("--to {FOREIGN}:80 --send hello --shutdown"))?;
    assert!(dialled.received.starts_with("hello db-0 "), "{what}: the other balancer's service: {dialled:?}");
    let dialled = web.dial(&format!("--to {FORBIDDEN}:80"))?;
    assert!(dialled.end.starts_with("connect:"), "{what}: the other program's refusal: {dialled:?}");
    let refused = cluster.pod("shop/guest-0")?.dial(&format!("--to {}:80 --send x --shutdown", vip::PAY))?;
    assert_eq!(refused.received, "", "{what}: a policy");
    // Statistics of direct connections come from the end of each: nobody took our callbacks away.
    let labels = [("destination_service_name", "ledger")];
    node.until_metrics("closed direct connections", |now| {
        growth(&before, now, "istio_tcp_connections_closed_total", &labels) >= 200.0
    })?;
    Ok(())
}

#[test]
fn other_cgroup_programs_run_before_and_after() -> Result<()> {
    for way in [Way::Link, Way::Attach] {
        let mut cluster = bare()?;
        cluster.start_control(&quickstart())?;
        // Attached to the daemon's own cgroup before it starts.
        let first = others(&cluster, way, &cluster.node("node-a")?.cgroup)?;
        for node in ["node-a", "node-b"] {
            cluster.start_node(node, &NodeOptions::default())?;
        }
        cluster.enrol_all()?;
        cluster.start_apps()?;
        assert_both_work(&cluster, &format!("{way:?}, before the daemon"))?;
        drop(first);
        let after = others(&cluster, way, &cluster.node("node-a")?.cgroup)?;
        assert_both_work(&cluster, &format!("{way:?}, after the daemon"))?;
        drop(after);
        // A pod's own cgroup comes before that of the node, whenever it is attached.
        let inner = others(&cluster, way, &cluster.pod("shop/web-0")?.cgroup)?;
        assert_both_work(&cluster, &format!("{way:?}, on the pod's cgroup"))?;
        drop(inner);
    }
    Ok(())
}

/// The order that the documentation promises: what a program of the pod's cgroup (or an older one of the node's) makes of
/// a destination is what the mesh sees; a younger one of the node's sees what the mesh made of it.
#[test]
fn the_mesh_sees_what_earlier_programs_made_of_a_destination() -> Result<()> {
    let cluster = mesh()?;
    let web = cluster.pod("shop/web-0")?;
    let ledger: Ipv4Addr = vip::LEDGER.parse()?;
    let (from, to) = (SocketAddrV4::new(FOREIGN, 80), SocketAddrV4::new(ledger, 80));
    let inner = Foreign::rewrite(&web.cgroup, Way::Link, from, to)?;
    let dialled = web.dial(&format!("--to {FOREIGN}:80 --send hello --shutdown"))?;
    assert!(dialled.received.starts_with("hello ledger-"), "before: balanced by the mesh: {dialled:?}");
    drop(inner);
    let _younger = Foreign::rewrite(&cluster.node("node-a")?.cgroup, Way::Link, from, to)?;
    let dialled = web.dial(&format!("--to {FOREIGN}:80 --send hello --shutdown --timeout 1"))?;
    assert_eq!(dialled.received, "", "after: the mesh did not see its service: {dialled:?}");
    Ok(())
}

#[test]
fn another_sk_lookup_program_of_a_pod_runs_too() -> Result<()> {
    const CLOSED: u16 = ports::BANNER;
    let mut cluster = bare()?;
    cluster.start_control(&quickstart())?;
    for node in ["node-a", "node-b"] {
        cluster.start_node(node, &NodeOptions::default())?;
    }
    cluster.start_apps()?;
    // One pod has it before it enters the mesh, the other gets it afterwards.
    let _before = Foreign::close_port(&cluster.pod("shop/pay-0")?.netns, CLOSED)?;
    cluster.enrol_all()?;
    let _after = Foreign::close_port(&cluster.pod("shop/cart-1")?.netns, CLOSED)?;
    let (web, outside) = (cluster.pod("shop/web-0")?, cluster.pod("shop/batch-0")?);
    let report = web.connects(&format!("--to {}:80 --n 100 --threads 4", vip::PAY))?;
    assert_right("HBONE to a pod with another program", &report, 100);
    let (pay, cart) = (cluster.pod("shop/pay-0")?.spec.v4, cluster.pod("shop/cart-1")?.spec.v4);
    // Plaintext: steered where it may come in, refused where it may not, and closed where the other program says so.
    let node = cluster.node("node-b")?;
    let before = node.scrape()?;
    let report = outside.connects(&format!("--to {cart}:{} --n 100 --threads 4", ports::WHO))?;
    assert_right("plaintext through the daemon", &report, 100);
    let after = node.scrape()?;
    let steered = [("outcome", "inbound_steer")];
    ensure!(growth(&before, &after, crate::support::OUTCOMES, &steered) >= 100.0, "not steered");
    let refused = outside.dial(&format!("--to {pay}:{} --send x --shutdown", ports::WHO))?;
    assert_eq!(refused.received, "", "plaintext to a STRICT pod");
    // Both selections run; a refusal of the other holds unless the mesh selects its listener.
    for pod in [pay, cart] {
        for port in [9, 15006] {
            let dialled = outside.dial(&format!("--to {pod}:{port} --send x --timeout 2"))?;
            assert_eq!(dialled.received, "", "{pod}:{port}");
        }
    }
    Ok(())
}

#[test]
fn a_host_port_leads_to_a_captured_pod() -> Result<()> {
    let cluster = mesh()?;
    let node = cluster.node("node-b")?;
    let (cart, pay) = (cluster.pod("shop/cart-1")?.spec.v4, cluster.pod("shop/pay-0")?.spec.v4);
    // As the portmap plugin of the CNI project does it.
    node.netns.nft(&format!(
        "table ip hostport {{\n chain prerouting {{\n type nat hook prerouting priority dstnat;\n\
         ip daddr {host} tcp dport 8080 dnat to {cart}:{who}\n\
         ip daddr {host} tcp dport 8081 dnat to {pay}:{who}\n }}\n}}\n",
        host = node.spec.v4(),
        who = ports::WHO,
    ))?;
    let outside = cluster.pod("legacy/report-0")?;
    let to = format!("{}:8080", node.spec.v4());
    let report = outside.connects(&format!("--to {to} --n 100 --threads 4 --expect cart-1"))?;
    assert_right("from outside the mesh", &report, 100);
    let strict = outside.dial(&format!("--to {}:8081 --send x --shutdown --timeout 2", node.spec.v4()))?;
    assert_eq!(strict.received, "", "a STRICT pod's hostPort takes no plaintext: {strict:?}");
    // A captured pod does not know the node's address as a destination of the mesh: it comes in as plaintext.
    let web = cluster.pod("shop/web-0")?;
    let report = web.connects(&format!("--to {to} --n 100 --threads 4 --expect cart-1"))?;
    assert_right("from a pod of the mesh", &report, 100);
    Ok(())
}

/// A pod of the host's network is in the pods' cgroup and in the node's namespace.
#[test]
fn host_network_pods_are_left_alone() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_control(&quickstart())?;
    let uid = "5a3c0de0-0000-4000-8000-0000000000aa";
    let control = cluster.control.as_ref().context("control")?;
    control.write_config("50-host.yaml", &host_pod(uid))?;
    let program = binary("pod-app")?;
    let group = cluster.node("node-a")?.pods_cgroup.child(&format!("pod{uid}"))?;
    let log = cluster.run.dir().join("host-pod.log");
    let args = ["serve", "--name", "agent-0", "--who", "9100"];
    // Running before the daemon, so that the scan comes across it.
    let agent = {
        let node = cluster.node("node-a")?;
        Place { cgroup: &group, netns: Some(&node.netns) }.spawn("agent", &program, &args, &log)?
    };
    for node in ["node-a", "node-b"] {
        cluster.start_node(node, &NodeOptions::default())?;
    }
    cluster.enrol_all()?;
    cluster.start_apps()?;
    let node = cluster.node("node-a")?;
    for port in [15006, 15008] {
        let dialled = cluster.pod("shop/web-0")?.dial(&format!("--to {}:{port}", node.spec.v4()))?;
        assert_eq!(dialled.end, "connect: refused", "the node's namespace was captured: port {port}");
    }
    let place = Place { cgroup: &group, netns: Some(&node.netns) };
    let connects = |args: &str| -> Result<ConnectsReport> {
        let args: Vec<&str> = std::iter::once("connects").chain(args.split(' ')).collect();
        let output = place.run(&program, &args, &[], &[], Duration::from_secs(30))?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    };
    // Outbound: as without a mesh, and as plaintext where it goes to a pod of the mesh.
    let before = node.scrape()?;
    let report =
        connects(&format!("--to {}:{} --n 100", cluster.pod("legacy/ledger-1")?.spec.v4, ports::WHO))?;
    assert_right("to a pod outside the mesh", &report, 100);
    let report = connects(&format!("--to {}:{} --n 100", cluster.pod("shop/db-0")?.spec.v4, ports::WHO))?;
    assert_right("to a pod of the mesh", &report, 100);
    let strict = connects(&format!("--to {}:{} --n 5", cluster.pod("shop/pay-0")?.spec.v4, ports::WHO))?;
    assert_eq!((strict.ok, strict.lost), (0, 5), "a STRICT pod: {strict:?}");
    let after = node.scrape()?;
    for outcome in ["connect_direct", "connect_proxy"] {
        let grown = growth(&before, &after, crate::support::OUTCOMES, &[("outcome", outcome)]);
        assert_eq!(grown, 0.0, "{outcome}: it was captured");
    }
    // Inbound, from a pod of the mesh: its own address is no mesh destination.
    let report =
        cluster.pod("shop/web-0")?.connects(&format!("--to {}:9100 --n 100 --threads 2", node.spec.v4()))?;
    assert_right("to a host-network pod", &report, 100);
    drop(agent);
    Ok(())
}

fn host_pod(uid: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: agent-0, namespace: shop, uid: {uid}}}\n\
         spec:\n  nodeName: node-a\n  hostNetwork: true\n  serviceAccountName: guest\n\
         \x20 containers: [{{name: app, image: agent}}]\n\
         status:\n  phase: Running\n  podIP: 10.0.0.1\n  podIPs: [{{ip: 10.0.0.1}}, {{ip: 'fd00:10::1'}}]\n"
    )
}

#[test]
fn pods_with_rules_of_their_own() -> Result<()> {
    let cluster = mesh()?;
    let (web, cart) = (cluster.pod("shop/web-0")?, cluster.pod("shop/cart-1")?);
    // A client that redirects a port of its own to a helper beside it, and lets out what it knows only.
    web.netns.nft(&format!(
        "table ip own {{\n chain output {{\n type nat hook output priority -100;\n\
         ip daddr 192.0.2.1 tcp dport 80 dnat to {}:{}\n }}\n}}\n",
        cart.spec.v4,
        ports::WHO
    ))?;
    // A server that accepts its own port and the mesh's, and drops the rest.
    cart.netns.nft(&format!(
        "table inet own {{\n chain input {{\n type filter hook input priority 0; policy drop;\n\
         iif lo accept\n ct state established,related accept\n meta l4proto ipv6-icmp accept\n\
         tcp dport {{ {}, 15008 }} accept\n }}\n}}\n",
        ports::WHO
    ))?;
    let report =
        web.connects(&format!("--to {}:{} --n 200 --threads 4 --expect cart-1", cart.spec.v4, ports::WHO))?;
    assert_right("over mutual TLS", &report, 200);
    let outside = cluster.pod("shop/batch-0")?;
    let report = outside.connects(&format!(
        "--to {}:{} --n 200 --threads 4 --expect cart-1",
        cart.spec.v4,
        ports::WHO
    ))?;
    assert_right("plaintext", &report, 200);
    let dropped = outside.dial(&format!("--to {}:{} --timeout 1", cart.spec.v4, ports::ECHO))?;
    assert!(dropped.end.starts_with("connect:"), "its own rule holds: {dropped:?}");
    let own = web.dial("--to 192.0.2.1:80 --send hello --shutdown")?;
    assert!(own.received.starts_with("hello cart-1 "), "its own redirection holds: {own:?}");
    let report = web.connects(&format!("--to {}:80 --n 200 --threads 4", vip::PAY))?;
    assert_right("the mesh beside its own rules", &report, 200);
    Ok(())
}

/// Client and server have IPv6 alone, in a cluster of both families.
#[test]
fn pods_of_ipv6_alone() -> Result<()> {
    const ALONE: [&str; 2] = ["shop/web-0", "shop/pay-0"];
    let mut cluster = bare()?;
    cluster.start_control(&quickstart())?;
    let mut shop = std::fs::read_to_string(quickstart().join("10-shop.yaml"))?;
    for key in ALONE {
        let pod = cluster.pod(key)?;
        let (v4, v6) = (pod.spec.v4, pod.spec.v6);
        pod.netns.ip(&format!("addr del {v4}/24 dev eth0\n"))?;
        ensure!(shop.contains(&format!("    - {{ip: {v4}}}\n")), "{key} is written in another way");
        shop = shop
            .replace(&format!("    - {{ip: {v4}}}\n"), "")
            .replace(&format!("podIP: {v4}\n"), &format!("podIP: \"{v6}\"\n"));
    }
    cluster.control.as_ref().context("control")?.write_config("10-shop.yaml", &shop)?;
    for node in ["node-a", "node-b"] {
        cluster.start_node(node, &NodeOptions::default())?;
    }
    for pod in &cluster.pods {
        let node = cluster.node(&pod.spec.node)?;
        if ALONE.contains(&pod.key().as_str()) {
            node.cni_with("ADD", pod, &[format!("{}/64", pod.spec.v6)])?;
        } else {
            node.cni("ADD", pod)?;
        }
    }
    cluster.start_apps()?;
    let (web, pay) = (cluster.pod("shop/web-0")?, cluster.pod("shop/pay-0")?);
    let before = cluster.node("node-a")?.scrape()?;
    for to in [format!("{}:80", vip::PAY_V6), format!("[{}]:{}", pay.spec.v6, ports::WHO)] {
        let report = web.connects(&format!("--to {to} --n 100 --threads 4 --expect pay-0"))?;
        assert_right(&format!("{to}, over mutual TLS"), &report, 100);
    }
    let labels = [("reporter", "source"), ("connection_security_policy", "mutual_tls")];
    let after = cluster.node("node-a")?.scrape()?;
    ensure!(growth(&before, &after, crate::support::OPENED, &labels) >= 200.0, "not over mutual TLS");
    for (what, to) in [("on the same node", vip::DB_V6), ("in the kernel", vip::LEDGER_V6)] {
        let report = web.connects(&format!("--to {to}:80 --n 100 --threads 4"))?;
        assert_right(what, &report, 100);
    }
    let report = web.udp(&format!("--to {}:5300 --n 50 --fresh", vip::QUOTES_V6))?;
    assert_right("UDP", &report, 50);
    // What only the other family has is refused and does not hang, in both directions.
    for (from, to) in [("shop/web-0", vip::DB), ("shop/web-1", vip::PAY)] {
        let dialled = cluster.pod(from)?.dial(&format!("--to {to}:80 --send x --timeout 2"))?;
        assert!(
            dialled.end.starts_with("connect:") && !dialled.end.contains("timeout"),
            "{from}: {dialled:?}"
        );
    }
    // From outside to its plain address: shut as ever.
    let outside = cluster.pod("legacy/report-0")?;
    let refused = outside.dial(&format!("--to [{}]:{} --send x --shutdown", pay.spec.v6, ports::WHO))?;
    assert_eq!(refused.received, "", "plaintext to a STRICT pod");
    Ok(())
}

/// A new sandbox under the same name and address, as after a node's runtime restarted it: with and without a DEL.
#[test]
fn a_pod_comes_again_with_its_address() -> Result<()> {
    let mut cluster = mesh()?;
    for (round, says_goodbye) in [true, false, true].into_iter().enumerate() {
        let node = cluster.node("node-b")?;
        if says_goodbye {
            node.cni("DEL", cluster.pod("shop/pay-0")?)?;
        }
        let mut spec = cluster.remove_pod("shop/pay-0")?;
        spec.uid = format!("5a3c0de0-0000-4000-8000-0000000001{round:02}");
        let old = std::fs::read_to_string(quickstart().join("10-shop.yaml"))?;
        let control = cluster.control.as_ref().context("control")?;
        control
            .write_config("10-shop.yaml", &old.replace("5a3c0de0-0000-4000-8000-000000000008", &spec.uid))?;
        cluster.add_pod(&spec)?;
        cluster.node("node-b")?.cni("ADD", cluster.pod("shop/pay-0")?)?;
        cluster.start_apps()?;
        let what = format!("round {round}, DEL: {says_goodbye}");
        let report = cluster
            .pod("shop/web-0")?
            .connects(&format!("--to {}:80 --n 100 --threads 4 --expect pay-0", vip::PAY))?;
        assert_right(&what, &report, 100);
        // It is as shut as before, and the policy applies.
        let to = format!("{}:{}", cluster.pod("shop/pay-0")?.spec.v4, ports::WHO);
        for other in ["shop/batch-0", "shop/guest-0"] {
            let refused = cluster.pod(other)?.dial(&format!("--to {to} --send x --shutdown"))?;
            assert_eq!(refused.received, "", "{what}: {other}");
        }
    }
    Ok(())
}

/// The address goes to another workload at once: its identity and its policies apply, and nothing of the old one's.
#[test]
fn an_address_goes_to_another_workload() -> Result<()> {
    let mut cluster = mesh()?;
    let to = format!("{}:{}", cluster.pod("shop/pay-0")?.spec.v4, ports::WHO);
    // Tunnels and verdicts to the old one are warm.
    let report = cluster.pod("shop/web-0")?.connects(&format!("--to {to} --n 50 --threads 4"))?;
    assert_right("the old one", &report, 50);
    let guest = cluster.pod("shop/guest-0")?.dial(&format!("--to {to} --send x --shutdown"))?;
    assert_eq!(guest.received, "", "the old one's policy is for web only");

    cluster.node("node-b")?.cni("DEL", cluster.pod("shop/pay-0")?)?;
    let mut spec = cluster.remove_pod("shop/pay-0")?;
    let (old_uid, old_name) = (spec.uid.clone(), spec.name.clone());
    spec.name = "newcomer-0".to_owned();
    spec.uid = "5a3c0de0-0000-4000-8000-0000000000bb".to_owned();
    spec.args = ["serve", "--name", "newcomer-0", "--who", "9000"].map(str::to_owned).to_vec();
    let control = cluster.control.as_ref().context("control")?;
    let shop = std::fs::read_to_string(quickstart().join("10-shop.yaml"))?;
    let (before, pod, after) = cut_document(&shop, &format!("uid: {old_uid}"))?;
    let pod = pod
        .replace(&old_uid, &spec.uid)
        .replace(&format!("name: {old_name}"), &format!("name: {}", spec.name))
        .replace("app: pay", "app: newcomer")
        .replace("serviceAccountName: pay", "serviceAccountName: db");
    control.write_config("10-shop.yaml", &format!("{before}{pod}{after}"))?;
    // The new one takes calls of guests only.
    control.write_config(
        "60-newcomer.yaml",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {name: newcomer, namespace: shop}\nspec:\n  selector: {matchLabels: {app: newcomer}}\n\
         \x20 action: ALLOW\n  rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/guest]}}]}]\n",
    )?;
    cluster.add_pod(&spec)?;
    cluster.node("node-b")?.cni("ADD", cluster.pod("shop/newcomer-0")?)?;
    cluster.start_apps()?;

    let guest = cluster.pod("shop/guest-0")?;
    wait::until_true("the newcomer to be known everywhere", PROPAGATION, || {
        let dialled = guest.dial(&format!("--to {to} --send hello --shutdown --timeout 2"))?;
        Ok(dialled.received.starts_with("hello newcomer-0 "))
    })?;
    let report = guest.connects(&format!("--to {to} --n 100 --threads 4 --expect newcomer-0"))?;
    assert_right("whom its policy lets in", &report, 100);
    let web = cluster.pod("shop/web-0")?.dial(&format!("--to {to} --send x --shutdown"))?;
    assert_eq!(web.received, "", "the old one's client is not the new one's");
    // The client's daemon spoke with the new identity.
    let labels = [("reporter", "source"), ("destination_principal", "spiffe://cluster.local/ns/shop/sa/db")];
    let scrape = cluster.node(&guest.spec.node)?.scrape()?;
    ensure!(
        scrape.sum(crate::support::OPENED, &labels) >= 100.0,
        "connections to the new identity: {:?}",
        scrape.matching(crate::support::OPENED, &[("reporter", "source")]).collect::<Vec<_>>()
    );
    Ok(())
}

/// Splits YAML around the document that contains `mark`.
fn cut_document<'a>(yaml: &'a str, mark: &str) -> Result<(&'a str, &'a str, &'a str)> {
    let at = yaml.find(mark).with_context(|| format!("no {mark}"))?;
    let begin = yaml[..at].rfind("\n---\n").map_or(0, |at| at + 5);
    let end = yaml[at..].find("\n---\n").map_or(yaml.len(), |end| at + end + 1);
    Ok((&yaml[..begin], &yaml[begin..end], &yaml[end..]))
}
