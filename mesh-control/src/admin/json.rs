//! The snapshot as JSON, for people and their scripts. Not an API: fields may change.

use crate::snapshot::Snapshot;
use mesh_xds::{
    delta::View,
    model::{Authorization, Service, TargetPort, Workload},
};
use serde_json::{Value, json};

/// All of a snapshot.
pub(super) fn snapshot(snapshot: &Snapshot) -> Value {
    json!({
        "generation": snapshot.resources().generation(),
        "services": snapshot.services().values().map(|s| service(s)).collect::<Vec<_>>(),
        "workloads": snapshot.workloads().values().map(|w| workload(w)).collect::<Vec<_>>(),
        "policies": snapshot.policies().values().map(|p| policy(p)).collect::<Vec<_>>(),
    })
}

fn service(s: &Service) -> Value {
    let ports = s.ports.iter().map(|p| {
        json!({
            "port": p.port,
            "targetPort": p.target_port,
            "protocol": format!("{:?}", p.protocol),
            "appProtocol": format!("{:?}", p.app_protocol),
        })
    });
    json!({
        "name": s.key(),
        "addresses": s.addresses.iter().map(|a| a.ip).collect::<Vec<_>>(),
        "ports": ports.collect::<Vec<_>>(),
        "scopes": s.load_balancing.routing_preference.iter().map(|p| format!("{p:?}")).collect::<Vec<_>>(),
        "mode": format!("{:?}", s.load_balancing.mode),
        "unreadyToo": s.load_balancing.allow_unhealthy,
        "affinitySeconds": s.session_affinity.map(|a| a.timeout.as_secs()),
        "algorithm": format!("{:?}", s.algorithm),
    })
}

fn workload(w: &Workload) -> Value {
    let ports = |list: &[TargetPort]| -> Vec<String> {
        list.iter().map(|p| format!("{}->{}", p.service_port, p.target_port)).collect()
    };
    let services = w.services.iter().map(|(name, member)| {
        (name.clone(), json!({ "tcp": ports(&member.tcp), "udp": ports(&member.udp) }))
    });
    json!({
        "uid": w.uid,
        "addresses": w.addresses,
        "node": w.node,
        "identity": w.identity().map(|i| i.to_string()).ok(),
        "inMesh": w.in_mesh(),
        "health": format!("{:?}", w.health),
        "locality": [&w.locality.region, &w.locality.zone, &w.locality.subzone],
        "workloadName": w.workload_name,
        "kind": format!("{:?}", w.kind),
        "canonicalName": w.canonical_name,
        "canonicalRevision": w.canonical_revision,
        "hostNetwork": w.host_network,
        "services": services.collect::<serde_json::Map<_, _>>(),
        "policies": w.policies,
    })
}

fn policy(p: &Authorization) -> Value {
    json!({
        "name": p.key(),
        "scope": format!("{:?}", p.scope),
        "action": format!("{:?}", p.action),
        "rules": p.rules.iter().map(|r| format!("{r:?}")).collect::<Vec<_>>(),
    })
}
