//! Nodes and pods as a directory of Kubernetes YAML describes them, so that what the control plane is told and what
//! really runs cannot differ: a pod's `spec.containers[0].args` are the arguments of its `pod-app`.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

/// A node: the N-th one is 10.0.0.N and fd00:10::N, with pods in 10.244.N.0/24 and fd00:10:244:N::/64.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSpec {
    /// Kubernetes name.
    pub name: String,
    /// 1 to 200.
    pub number: u8,
}

impl NodeSpec {
    /// Its address on the fabric.
    pub fn v4(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, 0, self.number)
    }

    /// Its IPv6 address on the fabric.
    pub fn v6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, self.number.into())
    }

    /// The address of its pod bridge, the pods' gateway.
    pub fn gateway_v4(&self) -> Ipv4Addr {
        self.pod_v4(1)
    }

    /// The IPv6 address of its pod bridge.
    pub fn gateway_v6(&self) -> Ipv6Addr {
        self.pod_v6(1)
    }

    /// The pod address with the given host part.
    pub fn pod_v4(&self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, self.number, host)
    }

    /// The IPv6 pod address with the given host part.
    pub fn pod_v6(&self, host: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x10, 0x244, self.number.into(), 0, 0, 0, host.into())
    }
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodSpec {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Kubernetes name.
    pub name: String,
    /// Kubernetes UID.
    pub uid: String,
    /// The node it runs on.
    pub node: String,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
    /// Arguments of its `pod-app`; empty for a pod without a process.
    pub args: Vec<String>,
}

/// Everything that a directory of YAML says about nodes and pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fixture {
    /// The nodes, by number.
    pub nodes: Vec<NodeSpec>,
    /// The pods, in file order.
    pub pods: Vec<PodSpec>,
}

impl Fixture {
    /// Reads all `*.yaml` files of a directory in name order.
    pub fn load(dir: &Path) -> Result<Self> {
        let mut files: Vec<_> = std::fs::read_dir(dir)
            .with_context(|| format!("read {}", dir.display()))?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<_>>()?;
        files.retain(|path| path.extension().is_some_and(|ext| ext == "yaml"));
        files.sort();
        let mut fixture = Self::default();
        for file in files {
            let text = std::fs::read_to_string(&file)?;
            fixture.read(&text).with_context(|| file.display().to_string())?;
        }
        fixture.nodes.sort_by_key(|node| node.number);
        for pod in &fixture.pods {
            ensure!(
                fixture.nodes.iter().any(|node| node.name == pod.node
                    && node.pod_v4(pod.v4.octets()[3]) == pod.v4
                    && node.pod_v6(pod.v6.octets()[15]) == pod.v6),
                "pod {}/{}: its nodeName and podIPs do not fit together ({} {} {})",
                pod.namespace,
                pod.name,
                pod.node,
                pod.v4,
                pod.v6
            );
        }
        Ok(fixture)
    }

    fn read(&mut self, yaml: &str) -> Result<()> {
        for document in serde_yaml_ng::Deserializer::from_str(yaml) {
            let value = serde_yaml_ng::Value::deserialize(document)?;
            match value.get("kind").and_then(|kind| kind.as_str()) {
                Some("Node") => self.nodes.push(node(serde_yaml_ng::from_value(value)?)?),
                Some("Pod") => {
                    let raw: RawPod = serde_yaml_ng::from_value(value)?;
                    let name = raw.metadata.name.clone();
                    self.pods.push(pod(raw).with_context(|| format!("pod {name}"))?);
                }
                _ => {}
            }
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    uid: String,
}

#[derive(Deserialize)]
struct RawNode {
    metadata: Metadata,
    status: NodeStatus,
}

#[derive(Deserialize)]
struct NodeStatus {
    addresses: Vec<NodeAddress>,
}

#[derive(Deserialize)]
struct NodeAddress {
    address: IpAddr,
}

fn node(raw: RawNode) -> Result<NodeSpec> {
    let name = raw.metadata.name;
    let addresses: Vec<IpAddr> = raw.status.addresses.iter().map(|entry| entry.address).collect();
    let Some(IpAddr::V4(first)) = addresses.first() else {
        bail!("node {name}: the first address must be IPv4");
    };
    let spec = NodeSpec { name, number: first.octets()[3] };
    ensure!(
        addresses == [IpAddr::V4(spec.v4()), IpAddr::V6(spec.v6())],
        "node {}: addresses must be {} and {} for the harness",
        spec.name,
        spec.v4(),
        spec.v6()
    );
    Ok(spec)
}

#[derive(Deserialize)]
struct RawPod {
    metadata: Metadata,
    spec: RawPodSpec,
    status: PodStatus,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPodSpec {
    node_name: String,
    containers: Vec<Container>,
}

#[derive(Deserialize)]
struct Container {
    #[serde(default)]
    args: Vec<String>,
}

#[derive(Deserialize)]
struct PodStatus {
    #[serde(rename = "podIPs")]
    pod_ips: Vec<PodIp>,
}

#[derive(Deserialize)]
struct PodIp {
    ip: IpAddr,
}

fn pod(raw: RawPod) -> Result<PodSpec> {
    let (mut v4, mut v6) = (None, None);
    for entry in raw.status.pod_ips {
        match entry.ip {
            IpAddr::V4(ip) => v4 = Some(ip),
            IpAddr::V6(ip) => v6 = Some(ip),
        }
    }
    ensure!(!raw.metadata.uid.is_empty(), "metadata.uid is missing");
    Ok(PodSpec {
        namespace: raw.metadata.namespace,
        name: raw.metadata.name,
        uid: raw.metadata.uid,
        node: raw.spec.node_name,
        v4: v4.context("status.podIPs has no IPv4 address")?,
        v6: v6.context("status.podIPs has no IPv6 address")?,
        args: raw.spec.containers.into_iter().next().context("spec.containers is empty")?.args,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: &str = "kind: Node\nmetadata: {name: n1}\nstatus: {addresses: [{type: InternalIP, address: 10.0.0.1}, \
                        {type: InternalIP, address: 'fd00:10::1'}]}\n";

    #[test]
    fn reads_nodes_and_pods_and_skips_the_rest() {
        let mut fixture = Fixture::default();
        let yaml = format!(
            "{NODE}---\nkind: Service\nmetadata: {{name: s}}\n---\nkind: Pod\nmetadata: {{name: a, namespace: x, uid: u1}}\n\
             spec: {{nodeName: n1, containers: [{{name: c, args: [idle]}}]}}\n\
             status: {{podIPs: [{{ip: 10.244.1.10}}, {{ip: 'fd00:10:244:1::a'}}]}}\n"
        );
        fixture.read(&yaml).unwrap();
        assert_eq!(fixture.nodes, [NodeSpec { name: "n1".into(), number: 1 }]);
        assert_eq!(fixture.pods[0].args, ["idle"]);
        assert_eq!(fixture.pods[0].v6, fixture.nodes[0].pod_v6(10));
    }

    #[test]
    fn a_node_outside_the_convention_is_refused() {
        let error = Fixture::default().read(&NODE.replace("fd00:10::1", "fd00:10::2")).unwrap_err();
        assert!(format!("{error:#}").contains("fd00:10::1"), "{error:#}");
    }
}
