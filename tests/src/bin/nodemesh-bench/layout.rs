//! The cluster that is measured: two nodes with a daemon, and nodes without any for the plain path and the peers, so
//! that nothing of one path (programs, connection tracking, proxies) is on another.
//!
//! | node | daemon | what for |
//! |---|---|---|
//! | node-a | yes | the mesh's clients, a server of the same node |
//! | node-b | yes | the mesh's server |
//! | node-c | no | clients: plain, Envoy, HAProxy |
//! | node-d | no | servers: plain (the direct path's too), Envoy, HAProxy |
//! | node-e | no | client behind iptables DNAT |

use anyhow::Result;
use mesh_tests::{
    cluster::{Cluster, Pod},
    daemons::NodeOptions,
    fixture::{Fixture, NodeSpec},
};
use std::{
    fmt::Write,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
};

use crate::load::PORT;

/// Virtual address of the server on node-b, in the mesh.
pub(crate) const VIP_REMOTE: Ipv4Addr = Ipv4Addr::new(10, 96, 1, 1);
/// Virtual address of the server on node-a, in the mesh.
pub(crate) const VIP_SAME: Ipv4Addr = Ipv4Addr::new(10, 96, 1, 2);
/// Virtual address of the plain server on node-d, outside of the mesh.
pub(crate) const VIP_PLAIN: Ipv4Addr = Ipv4Addr::new(10, 96, 1, 3);
/// What iptables on node-e translates to the plain server.
pub(crate) const VIP_DNAT: Ipv4Addr = Ipv4Addr::new(10, 97, 1, 3);

const NODES: [&str; 5] = ["node-a", "node-b", "node-c", "node-d", "node-e"];
const MESHED: [&str; 2] = ["node-a", "node-b"];

/// Namespace, name, node, host part of the address.
const PODS: [(&str, &str, &str, u8); 11] = [
    ("bench", "client", "node-a", 10),
    ("bench", "same", "node-a", 11),
    ("bench", "server", "node-b", 10),
    ("plain", "client", "node-c", 10),
    ("plain", "same", "node-c", 11),
    ("plain", "server", "node-d", 10),
    ("plain", "envoy-client", "node-c", 12),
    ("plain", "envoy-server", "node-d", 12),
    ("plain", "haproxy-client", "node-c", 13),
    ("plain", "haproxy-server", "node-d", 13),
    ("plain", "dnat-client", "node-e", 10),
];

/// The pods that run the load server.
const SERVERS: [&str; 6] = [
    "bench/same",
    "bench/server",
    "plain/same",
    "plain/server",
    "plain/envoy-server",
    "plain/haproxy-server",
];

/// The configuration as YAML. `fillers` pods without a process are added to node-a, in the mesh.
fn manifests(fillers: u8) -> String {
    let mut yaml = String::from(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: bench, labels: {nodemesh.io/enabled: \"true\"}}\n---\n\
         apiVersion: v1\nkind: Namespace\nmetadata: {name: plain}\n",
    );
    for (n, name) in NODES.iter().enumerate() {
        let spec = NodeSpec { name: (*name).to_owned(), number: n as u8 + 1 };
        let _ = write!(
            yaml,
            "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nstatus: {{addresses: [{{type: InternalIP, \
             address: {}}}, {{type: InternalIP, address: '{}'}}]}}\n",
            spec.v4(),
            spec.v6()
        );
    }
    for (namespace, name, vip) in
        [("bench", "server", VIP_REMOTE), ("bench", "same", VIP_SAME), ("plain", "server", VIP_PLAIN)]
    {
        let _ = write!(
            yaml,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{selector: \
             {{app: {name}}}, clusterIP: {vip}, clusterIPs: [{vip}], ports: [{{name: tcp-load, port: {PORT}, \
             targetPort: {PORT}}}]}}\n"
        );
    }
    let fillers = (0..fillers).map(|n| ("bench", format!("filler-{n}"), "node-a", 100 + n));
    let pods =
        PODS.iter().map(|(namespace, name, node, host)| (*namespace, (*name).to_owned(), *node, *host));
    for (index, (namespace, name, node, host)) in pods.chain(fillers).enumerate() {
        let number = NODES.iter().position(|other| *other == node).unwrap_or_default() as u8 + 1;
        let spec = NodeSpec { name: node.to_owned(), number };
        // An account of its own for each pod: the fillers then have certificates of their own, as real workloads do.
        let _ = write!(
            yaml,
            "---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, namespace: {namespace}}}\n---\n\
             apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, uid: \
             be9c0000-0000-4000-8000-{index:012}, labels: {{app: {name}}}}}\nspec: {{nodeName: {node}, \
             serviceAccountName: {name}, containers: [{{name: app, image: load}}]}}\nstatus: {{phase: Running, podIP: \
             {v4}, podIPs: [{{ip: {v4}}}, {{ip: '{v6}'}}], conditions: [{{type: Ready, status: \"True\"}}]}}\n",
            v4 = spec.pod_v4(host),
            v6 = spec.pod_v6(host),
        );
    }
    yaml
}

/// Makes the cluster, starts control plane, daemons and load servers, and enrols the pods of the mesh.
pub(crate) fn bring_up(dir: &Path, fillers: u8, options: &NodeOptions) -> Result<Cluster> {
    fs::create_dir_all(dir)?;
    fs::write(dir.join("bench.yaml"), manifests(fillers))?;
    let mut cluster = Cluster::new(&Fixture::load(dir)?)?;
    cluster.start_control(dir)?;
    for name in MESHED {
        cluster.launch_node(name, options)?;
    }
    for name in MESHED {
        cluster.wait_node_ready(name)?;
    }
    for pod in cluster.pods.iter().filter(|pod| pod.spec.namespace == "bench") {
        cluster.node(&pod.spec.node)?.cni("ADD", pod)?;
    }
    let (program, logs) = (std::env::current_exe()?, cluster.run.dir());
    for pod in &mut cluster.pods {
        let key = pod.key();
        if !SERVERS.contains(&key.as_str()) {
            continue;
        }
        let log = logs.join(format!("load-{}-{}.log", pod.spec.namespace, pod.spec.name));
        let mut proc = pod.place().spawn(&format!("load server of {key}"), &program, &["serve"], &log)?;
        proc.until("the load server", std::time::Duration::from_secs(10), |p| Ok(p.log().contains("ready")))?;
        pod.app = Some(proc.quiet());
    }
    Ok(cluster)
}

/// The address of a pod's load server.
pub(crate) fn address(pod: &Pod) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(pod.spec.v4), PORT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifests_are_a_fixture() {
        let dir = std::env::temp_dir().join(format!("nodemesh-bench-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("bench.yaml"), manifests(2)).unwrap();
        let fixture = Fixture::load(&dir);
        fs::remove_dir_all(&dir).unwrap();
        let fixture = fixture.unwrap();
        assert_eq!((fixture.nodes.len(), fixture.pods.len()), (NODES.len(), PODS.len() + 2));
        for server in SERVERS {
            assert!(fixture.pods.iter().any(|pod| format!("{}/{}", pod.namespace, pod.name) == server));
        }
    }
}
