//! Small builders of model values for unit tests.

use mesh_xds::model::{
    Health, LoadBalancing, Locality, NamespacedName, Protocol, Service, ServiceAddress, ServiceMembership,
    ServicePort, TargetPort, TunnelProtocol, Workload, WorkloadKind,
};
use std::collections::BTreeMap;

/// A healthy mesh pod of node `n1` with one address.
pub(crate) fn pod(name: &str, namespace: &str, addr: &str) -> Workload {
    Workload {
        uid: format!("c1//Pod/{namespace}/{name}"),
        name: NamespacedName::new(namespace, name),
        addresses: vec![addr.parse().unwrap()],
        network: String::new(),
        tunnel: TunnelProtocol::Hbone,
        trust_domain: "cluster.local".into(),
        service_account: name.into(),
        node: "n1".into(),
        cluster_id: "c1".into(),
        locality: Locality::default(),
        health: Health::Healthy,
        canonical_name: name.into(),
        canonical_revision: "v1".into(),
        workload_name: name.into(),
        kind: WorkloadKind::Deployment,
        services: BTreeMap::new(),
        policies: vec![],
        weight: 1,
        native_tunnel: false,
        host_network: false,
    }
}

/// A TCP service with `(port, target port)` pairs.
pub(crate) fn service(name: &str, namespace: &str, vip: &str, ports: &[(u16, u16)]) -> Service {
    Service {
        name: NamespacedName::new(namespace, name),
        hostname: format!("{name}.{namespace}.svc.cluster.local"),
        addresses: vec![ServiceAddress { network: String::new(), ip: vip.parse().unwrap() }],
        ports: ports
            .iter()
            .map(|(port, target_port)| ServicePort {
                port: *port,
                target_port: *target_port,
                protocol: Protocol::Tcp,
                app_protocol: Default::default(),
            })
            .collect(),
        port_names: BTreeMap::new(),
        subject_alt_names: vec![],
        load_balancing: LoadBalancing::default(),
        session_affinity: None,
        algorithm: Default::default(),
    }
}

/// Makes a workload back a TCP service.
pub(crate) fn backs(mut workload: Workload, service: &Service) -> Workload {
    let tcp = service
        .ports
        .iter()
        .map(|p| TargetPort { service_port: p.port, target_port: p.target_port })
        .collect();
    workload.services.insert(service.key(), ServiceMembership { tcp, ..ServiceMembership::default() });
    workload
}
