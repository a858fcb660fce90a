//! What becomes of balanced connections when backends go, and which services are balanced at all.

use crate::support::{Held, OUTCOMES, PROPAGATION, assert_right, growth, mesh, vip};
use anyhow::{Context, Result};
use mesh_tests::{app::ports, cluster::Cluster, daemons::Control, proc::binary, wait};

/// UDP service of ledger-0 and ledger-1.
const LEDGER_UDP: &str = "10.96.0.21";

fn control(cluster: &Cluster) -> Result<&Control> {
    cluster.control.as_ref().context("no control plane")
}

/// The manifests of `legacy` with a ledger pod's readiness changed, or without the pod.
fn ledgers(yaml: &str, ready: [Option<bool>; 2]) -> Result<String> {
    let mut kept = vec![];
    for document in yaml.split("\n---\n") {
        let which = (0..2).find(|n| document.contains(&format!("  name: ledger-{n}\n")));
        match which.map(|n| ready[n]) {
            Some(None) => {}
            Some(Some(false)) => {
                let unready = document.replace("status: \"True\"", "status: \"False\"");
                anyhow::ensure!(unready != document, "no condition in {document}");
                kept.push(unready);
            }
            _ => kept.push(document.to_owned()),
        }
    }
    Ok(kept.join("\n---\n"))
}

#[test]
fn sockets_to_a_removed_backend_end_and_all_others_go_on() -> Result<()> {
    let cluster = mesh()?;
    let file = "20-legacy.yaml";
    let all = std::fs::read_to_string(control(&cluster)?.config_dir.join(file))?;
    let client = cluster.pod("shop/web-0")?;
    let set = |ready, only: &str| {
        control(&cluster)?.write_config(file, &ledgers(&all, ready)?)?;
        wait::until_true(&format!("only {only} to answer"), PROPAGATION, || {
            Ok(client.connects(&format!("--to {}:80 --n 20 --expect {only}", vip::LEDGER))?.all_right(20))
        })
    };
    let service = format!("--to {}:{}", vip::LEDGER, ports::ECHO);
    let datagrams = format!("--udp --to {LEDGER_UDP}:5300 --timeout 5");
    let address = cluster.pod("legacy/ledger-1")?.spec.v4;

    set([Some(false), Some(true)], "ledger-1")?;
    let mut leaving = Held::open(&cluster, "shop/web-0", "tcp-to-1", &service)?;
    let mut leaving_udp = Held::open(&cluster, "shop/web-0", "udp-to-1", &datagrams)?;
    let mapped = format!("--to [{}]:{}", "fd00:10:96::14", ports::ECHO);
    let mut leaving_v6 = Held::open(&cluster, "shop/guest-0", "tcp6-to-1", &mapped)?;
    let own_choice =
        Held::open(&cluster, "shop/web-0", "tcp-to-address", &format!("--to {address}:{}", ports::ECHO))?;
    let own_udp = format!("--udp --to {address}:{} --timeout 5", ports::UDP);
    let own_choice_udp = Held::open(&cluster, "shop/web-0", "udp-to-address", &own_udp)?;

    // Unready is not gone.
    set([Some(true), Some(false)], "ledger-0")?;
    let staying = Held::open(&cluster, "shop/web-0", "tcp-to-0", &service)?;
    let staying_udp = Held::open(&cluster, "shop/web-0", "udp-to-0", &datagrams)?;
    assert!(leaving.lives()? && leaving_udp.lives()? && leaving_v6.lives()?, "unready is not gone");

    // The pod still runs: without the mesh's doing its connections would go on for ever.
    set([Some(true), None], "ledger-0")?;
    for (held, what) in [
        (&mut leaving, "the TCP connection to the removed backend to end"),
        (&mut leaving_v6, "the IPv6 one to end"),
        (&mut leaving_udp, "the UDP socket to end"),
    ] {
        let said = held.broken(what)?;
        // ECONNABORTED; a UDP socket that was sending finds itself without a peer (EDESTADDRREQ).
        assert!(said.contains("os error 103") || said.contains("os error 89"), "not by the mesh: {said}");
    }
    own_choice.finish("dialled by its own address")?;
    own_choice_udp.finish("dialled by its own address, UDP")?;
    staying.finish("the other backend's connection")?;
    staying_udp.finish("the other backend's UDP socket")?;
    let after = cluster.node("node-a")?.scrape()?;
    let ended = |protocol| after.sum("nodemesh_backend_sockets_ended_total", &[("protocol", protocol)]);
    assert_eq!((ended("tcp"), ended("udp")), (2.0, 1.0));
    Ok(())
}

fn service(name: &str, app: &str, vip: &str, spec: &str) -> String {
    let namespace = if app == "ledger" { "legacy" } else { "shop" };
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n  \
         selector: {{app: {app}}}\n  clusterIP: {vip}\n  clusterIPs: [{vip}]\n{spec}  ports:\n    \
         - {{name: tcp-who, port: 80, targetPort: tcp-who}}\n---\n"
    )
}

#[test]
fn node_local_services_stay_on_the_node() -> Result<()> {
    let cluster = mesh()?;
    let local = "  internalTrafficPolicy: Local\n";
    let yaml = [
        service("cart-local", "cart", "10.96.0.40", local),
        service("ledger-local", "ledger", "10.96.0.41", local),
        service("db-local", "db", "10.96.0.42", local),
    ];
    control(&cluster)?.write_config("90-local.yaml", &yaml.concat())?;
    let web = |n: usize| cluster.pod(&format!("shop/web-{n}"));
    wait::until_true("the services to be there", PROPAGATION, || {
        let here = web(0)?.connects("--to 10.96.0.42:80 --n 1 --timeout 2")?.all_right(1);
        let there = web(1)?.dial("--to 10.96.0.41:80 --send x --shutdown --timeout 2")?;
        Ok(here && there.end == "eof")
    })?;
    for (client, vip, expect) in [
        (0, "10.96.0.40", "--expect cart-0"),
        (1, "10.96.0.40", "--expect cart-1 --expect cart-2"),
        (0, "10.96.0.41", "--expect ledger-0"),
        (1, "10.96.0.41", "--expect ledger-1"),
        (0, "10.96.0.42", "--expect db-0"),
    ] {
        let report = web(client)?.connects(&format!("--to {vip}:80 --n 60 --threads 2 {expect}"))?;
        assert_right(&format!("web-{client} to {vip}"), &report, 60);
    }
    // No endpoint on this node is no endpoint at all.
    assert_eq!(web(1)?.dial("--to 10.96.0.42:80 --timeout 3")?.end, "connect: refused");
    Ok(())
}

#[test]
fn node_ports_external_and_load_balancer_addresses_are_left_to_the_cluster() -> Result<()> {
    let cluster = mesh()?;
    let node = cluster.node("node-a")?;
    // What kube-proxy would do: somebody on the node answers on these addresses.
    node.netns.ip("addr add 192.0.2.50/32 dev lo\naddr add 192.0.2.51/32 dev lo\n")?;
    let args = ["serve", "--name", "cluster", "--who", "80", "--who", "30080"];
    let log = cluster.run.dir().join("cluster-lb.log");
    let mut proxy = node.host_place().spawn("kube-proxy's stand-in", &binary("pod-app")?, &args, &log)?;
    proxy.until("the stand-in to listen", PROPAGATION, |proxy| Ok(proxy.log().contains("ready")))?;

    let spec = "  type: LoadBalancer\n  externalIPs: [192.0.2.50]\n";
    let yaml = service("public", "cart", "10.96.0.43", spec)
        .replace("targetPort: tcp-who}", "targetPort: tcp-who, nodePort: 30080}")
        .replace("\n---\n", "\nstatus: {loadBalancer: {ingress: [{ip: 192.0.2.51}]}}\n---\n");
    control(&cluster)?.write_config("90-public.yaml", &yaml)?;
    let client = cluster.pod("shop/web-0")?;
    wait::until_true("the service to be there", PROPAGATION, || {
        Ok(client.connects("--to 10.96.0.43:80 --n 1 --timeout 2")?.all_right(1))
    })?;
    let before = node.scrape()?;
    for to in ["192.0.2.50:80", "192.0.2.51:80", "10.0.0.1:30080"] {
        let report = client.connects(&format!("--to {to} --n 20 --expect cluster"))?;
        assert_right(to, &report, 20);
    }
    let after = node.scrape()?;
    assert_eq!(growth(&before, &after, OUTCOMES, &[("outcome", "connect_pass")]), 60.0);
    let report =
        client.connects("--to 10.96.0.43:80 --n 50 --expect cart-0 --expect cart-1 --expect cart-2")?;
    assert_right("the cluster address", &report, 50);
    Ok(())
}
