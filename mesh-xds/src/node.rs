//! Who is at the other end of a discovery stream: the node id of Istio's form, and the metadata that goes with it.
//!
//! Deliberately absent: trust. A node id is a claim; whoever serves it checks it against the credentials.

use crate::delta::Audience;
use crate::wire::core::{Locality as WireLocality, Node};
use prost_types::{Struct, Value, value::Kind};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

const NODE_NAME: &str = "NODE_NAME";
const CLUSTER_ID: &str = "CLUSTER_ID";
/// Our own key: the client understands the extensions of `nodemesh/v1.proto`.
const NODEMESH_API: &str = "NODEMESH_API";

/// `KIND~IP~POD.NAMESPACE~NAMESPACE.svc.DOMAIN`, as in `ztunnel~10.0.0.7~ztunnel-x2k9p.istio-system~istio-system.svc.cluster.local`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NodeId {
    /// `ztunnel` for a node's daemon; `sidecar`, `waypoint`, `router` for others.
    pub kind: String,
    /// The daemon's address.
    pub ip: IpAddr,
    /// The daemon's own pod. May be empty outside of Kubernetes.
    pub pod: String,
    /// The pod's namespace. May be empty outside of Kubernetes.
    pub namespace: String,
    /// The cluster's DNS domain, for example `cluster.local`.
    pub domain: String,
}

/// Why a string is not a node id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NodeIdError {
    /// Not four parts.
    #[error("node id {0:?} is not TYPE~IP~POD.NAMESPACE~NAMESPACE.svc.DOMAIN; set node.id to that form")]
    Form(String),
    /// No address in its second part.
    #[error("node id {0:?} has no IP address as its second part; set it to the address of the client")]
    Ip(String),
    /// The two namespaces differ.
    #[error("node id {0:?} names two namespaces; POD.NAMESPACE and NAMESPACE.svc.DOMAIN have to agree")]
    Namespace(String),
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, ip, pod, namespace, domain } = self;
        write!(f, "{kind}~{ip}~{pod}.{namespace}~{namespace}.svc.{domain}")
    }
}

impl FromStr for NodeId {
    type Err = NodeIdError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let parts: Vec<&str> = s.split('~').collect();
        let &[kind, ip, workload, dns] = parts.as_slice() else {
            return Err(NodeIdError::Form(s.to_owned()));
        };
        let ip = ip.parse().map_err(|_| NodeIdError::Ip(s.to_owned()))?;
        // A pod's name may have dots, a namespace never has.
        let (pod, namespace) = workload.rsplit_once('.').ok_or_else(|| NodeIdError::Form(s.to_owned()))?;
        let (dns_namespace, domain) =
            dns.split_once(".svc.").ok_or_else(|| NodeIdError::Form(s.to_owned()))?;
        if kind.is_empty() || domain.is_empty() {
            return Err(NodeIdError::Form(s.to_owned()));
        }
        if namespace != dns_namespace {
            return Err(NodeIdError::Namespace(s.to_owned()));
        }
        Ok(Self {
            kind: kind.to_owned(),
            ip,
            pod: pod.to_owned(),
            namespace: namespace.to_owned(),
            domain: domain.to_owned(),
        })
    }
}

/// What a client says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeInfo {
    /// Its id.
    pub id: NodeId,
    /// The Kubernetes node that it serves; empty if not said.
    pub node_name: String,
    /// Its cluster; empty if not said.
    pub cluster_id: String,
    /// Where it is. Empty strings if not said.
    pub locality: crate::model::Locality,
    /// It understands nodemesh's extensions and gets the resources that only such clients can read.
    pub extensions: bool,
}

impl NodeInfo {
    /// The wire form.
    pub fn to_wire(&self) -> Node {
        let ip = self.id.ip.to_string();
        let mut fields = vec![
            ("NAME", self.id.pod.as_str()),
            ("NAMESPACE", self.id.namespace.as_str()),
            ("INSTANCE_IPS", ip.as_str()),
            (NODE_NAME, self.node_name.as_str()),
            (CLUSTER_ID, self.cluster_id.as_str()),
        ];
        if self.extensions {
            fields.push((NODEMESH_API, "1"));
        }
        let fields = fields
            .into_iter()
            .map(|(key, value)| (key.to_owned(), Value { kind: Some(Kind::StringValue(value.to_owned())) }));
        Node {
            id: self.id.to_string(),
            cluster: self.node_name.clone(),
            metadata: Some(Struct { fields: fields.collect() }),
            locality: Some(WireLocality {
                region: self.locality.region.clone(),
                zone: self.locality.zone.clone(),
                sub_zone: self.locality.subzone.clone(),
            }),
            user_agent_name: "nodemesh".to_owned(),
            user_agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// Reads the wire form. Metadata that is absent or of another kind counts as empty.
    pub fn from_wire(node: &Node) -> Result<Self, NodeIdError> {
        let text = |key: &str| match node.metadata.as_ref()?.fields.get(key)?.kind.as_ref()? {
            Kind::StringValue(s) => Some(s.clone()),
            _ => None,
        };
        let locality = node.locality.clone().unwrap_or_default();
        Ok(Self {
            id: node.id.parse()?,
            node_name: text(NODE_NAME).unwrap_or_default(),
            cluster_id: text(CLUSTER_ID).unwrap_or_default(),
            locality: crate::model::Locality {
                region: locality.region,
                zone: locality.zone,
                subzone: locality.sub_zone,
            },
            extensions: text(NODEMESH_API).is_some_and(|v| !v.is_empty()),
        })
    }

    /// Which resources this client may see.
    pub fn audience(&self) -> Audience {
        if self.extensions { Audience::Nodemesh } else { Audience::Everyone }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_and_bad_ones_are_refused() {
        for good in [
            "ztunnel~10.0.0.7~ztunnel-x2k9p.istio-system~istio-system.svc.cluster.local",
            "ztunnel~fd00::7~a.pod.with.dots.ns~ns.svc.example.org",
            "ztunnel~1.1.1.1~.~.svc.cluster.local",
        ] {
            assert_eq!(good.parse::<NodeId>().unwrap().to_string(), good);
        }
        let dotted: NodeId = "ztunnel~fd00::7~a.pod.with.dots.ns~ns.svc.example.org".parse().unwrap();
        assert_eq!((dotted.pod.as_str(), dotted.namespace.as_str()), ("a.pod.with.dots", "ns"));
        for (bad, words) in [
            ("ztunnel~10.0.0.7~pod.ns", "is not TYPE~IP"),
            ("ztunnel~10.0.0.7~pod~ns.svc.x", "is not TYPE~IP"),
            ("ztunnel~10.0.0.7~pod.ns~ns.cluster.local", "is not TYPE~IP"),
            ("~10.0.0.7~pod.ns~ns.svc.x", "is not TYPE~IP"),
            ("ztunnel~nowhere~pod.ns~ns.svc.x", "no IP address"),
            ("ztunnel~10.0.0.7~pod.a~b.svc.x", "two namespaces"),
        ] {
            let error = bad.parse::<NodeId>().unwrap_err().to_string();
            assert!(error.contains(words) && error.contains(bad), "{error}");
        }
    }

    #[test]
    fn what_a_node_says_survives_the_wire() {
        let info = NodeInfo {
            id: "ztunnel~10.0.0.7~d.ns~ns.svc.cluster.local".parse().unwrap(),
            node_name: "node-1".into(),
            cluster_id: "c1".into(),
            locality: crate::model::Locality { region: "r".into(), zone: "z".into(), subzone: String::new() },
            extensions: true,
        };
        assert_eq!(NodeInfo::from_wire(&info.to_wire()).unwrap(), info);
        assert_eq!(info.audience(), Audience::Nodemesh);
        // A stock client says less.
        let stock = Node { id: info.id.to_string(), ..Node::default() };
        assert_eq!(NodeInfo::from_wire(&stock).unwrap().audience(), Audience::Everyone);
    }
}
