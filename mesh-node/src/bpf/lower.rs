//! The lowering: [`Intent`] -> [`BpfState`], the rows of the maps. Pure.
//!
//! A backend set is named by the hash of its content. So frontends with equal backends share one, a changed one is
//! new rows beside the old ones, and a frontend moves over with a single write. Deliberately absent: any limit on
//! the backends of a service other than the map's size.

use super::{
    intent::{Backend, CapturedPod, Frontend, Intent, Verdict},
    ops::Table,
};
use mesh_common::{
    code::{inbound, proto, verdict},
    key,
    net::{Endpoint, Ip, NetPort},
    pod::Pod as _,
    value,
};
use mesh_xds::model::Protocol;
use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

/// The rows that the maps should have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BpfState {
    /// [`Table::Members`].
    pub members: BTreeMap<key::Member, u32>,
    /// [`Table::Backends`].
    pub backends: BTreeMap<key::Backend, value::Backend>,
    /// [`Table::Frontends`].
    pub frontends: BTreeMap<key::Frontend, value::Frontend>,
    /// [`Table::Destinations`].
    pub destinations: BTreeMap<Ip, value::Destination>,
    /// [`Table::InboundPorts`].
    pub inbound_ports: BTreeMap<Endpoint, value::InboundPort>,
    /// [`Table::Inbound`].
    pub inbound: BTreeMap<Ip, value::Inbound>,
    /// [`Table::Pods`].
    pub pods: BTreeMap<key::Netns, value::Pod>,
}

impl BpfState {
    /// How many rows a table should have.
    pub fn len(&self, table: Table) -> usize {
        match table {
            Table::Members => self.members.len(),
            Table::Backends => self.backends.len(),
            Table::Frontends => self.frontends.len(),
            Table::Destinations => self.destinations.len(),
            Table::InboundPorts => self.inbound_ports.len(),
            Table::Inbound => self.inbound.len(),
            Table::Pods => self.pods.len(),
        }
    }
}

/// A part of the intent that could not be taken as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Issue {
    /// Two frontends share address, port and protocol; the first one is in force.
    DuplicateFrontend(SocketAddr, Protocol),
    /// Two destinations share an address; the first one is in force.
    DuplicateDestination(IpAddr),
    /// Two captured pods share an address; the one in the younger network namespace has it.
    DuplicatePodAddress(IpAddr),
    /// A backend that a client of the frontend cannot reach: another address family, or port 0.
    UnusableBackend(SocketAddr, SocketAddr),
}

impl fmt::Display for Issue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DuplicateFrontend(addr, proto) => {
                write!(
                    f,
                    "two services claim {addr} ({proto:?}); the first one has it, give one another address"
                )
            }
            Self::DuplicateDestination(addr) => {
                write!(f, "two workloads claim the address {addr}; the first one has it")
            }
            Self::DuplicatePodAddress(addr) => {
                write!(f, "two captured pods claim the address {addr}; the younger one has it")
            }
            Self::UnusableBackend(service, backend) => {
                write!(f, "endpoint {backend} of {service} is left out: another address family, or port 0")
            }
        }
    }
}

/// Lowers the intent. What cannot be taken is listed beside the state, which is complete without it.
pub fn lower(intent: &Intent) -> (BpfState, Vec<Issue>) {
    let mut state = BpfState::default();
    let mut issues = Vec::new();
    let mut sets = Sets::default();
    for frontend in &intent.frontends {
        lower_frontend(frontend, &mut state, &mut sets, &mut issues);
    }
    for destination in &intent.destinations {
        let (verdict, reason) = verdict_codes(destination.verdict);
        let row = value::Destination { verdict, reason, reserved: 0 };
        match state.destinations.entry(destination.addr.into()) {
            std::collections::btree_map::Entry::Occupied(_) => {
                issues.push(Issue::DuplicateDestination(destination.addr));
            }
            std::collections::btree_map::Entry::Vacant(vacant) => {
                vacant.insert(row);
            }
        }
    }
    for pod in &intent.pods {
        lower_pod(pod, &mut state, &mut issues);
    }
    (state, issues)
}

fn verdict_codes(verdict: Verdict) -> (u8, u8) {
    match verdict {
        Verdict::Direct => (verdict::DIRECT, 0),
        Verdict::Proxy => (verdict::PROXY, 0),
        Verdict::Deny(reason) => (verdict::DENY, reason.code()),
    }
}

fn lower_frontend(frontend: &Frontend, state: &mut BpfState, sets: &mut Sets, issues: &mut Vec<Issue>) {
    let service = SocketAddr::new(frontend.addr, frontend.port);
    let addr = Ip::from(frontend.addr);
    let ip_proto = match frontend.proto {
        Protocol::Tcp => proto::TCP,
        Protocol::Udp => proto::UDP,
    };
    let key = key::Frontend::new(addr, NetPort::new(frontend.port), ip_proto);
    if state.frontends.contains_key(&key) {
        issues.push(Issue::DuplicateFrontend(service, frontend.proto));
        return;
    }
    let (verdict, reason) = verdict_codes(frontend.verdict);
    let mut row = value::Frontend {
        verdict,
        reason,
        affinity_ns: nanoseconds(frontend.affinity.unwrap_or_default()),
        ..value::Frontend::zeroed()
    };
    if frontend.verdict == Verdict::Direct {
        let mut weights: BTreeMap<Endpoint, u32> = BTreeMap::new();
        for Backend { addr: backend, weight } in &frontend.backends {
            let endpoint = Endpoint::from(*backend);
            if endpoint.addr.is_v4() != addr.is_v4() || backend.port() == 0 {
                issues.push(Issue::UnusableBackend(service, *backend));
            } else if *weight > 0 {
                let sum = weights.entry(endpoint).or_default();
                *sum = sum.saturating_add(*weight);
            }
        }
        (row.set, row.count) = sets.add(weights.into_iter().collect(), state);
    }
    state.frontends.insert(key, row);
}

/// Nanoseconds for the kernel; a timeout of centuries is as good as the largest number.
fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn lower_pod(pod: &CapturedPod, state: &mut BpfState, issues: &mut Vec<Issue>) {
    let port = |port: Option<u16>| port.map_or(NetPort::NONE, NetPort::new);
    let first = |v4: bool| pod.addrs.iter().map(|a| Ip::from(*a)).find(|a| a.is_v4() == v4);
    let (addr_v4, addr_v6) = (first(true), first(false));
    let row = value::Pod {
        addr_v4: addr_v4.unwrap_or(Ip::ANY),
        addr_v6: addr_v6.unwrap_or(Ip::ANY),
        outbound_v4: addr_v4.map_or(NetPort::NONE, |_| port(pod.outbound_v4)),
        outbound_v6: addr_v6.map_or(NetPort::NONE, |_| port(pod.outbound_v6)),
        flags: 0,
    };
    let flags = |strict: bool| if strict { inbound::STRICT } else { 0 };
    let target = value::Inbound {
        cookie: pod.cookie,
        outbound_v4: row.outbound_v4,
        outbound_v6: row.outbound_v6,
        flags: flags(pod.strict),
    };
    state.pods.insert(key::Netns::new(pod.cookie), row);
    for addr in &pod.addrs {
        let ip = Ip::from(*addr);
        if let Some(other) = state.inbound.get(&ip)
            && other.cookie != pod.cookie
        {
            issues.push(Issue::DuplicatePodAddress(*addr));
            if other.cookie > pod.cookie {
                continue;
            }
            state.inbound_ports.retain(|endpoint, _| endpoint.addr != ip);
        }
        state.inbound.insert(ip, target);
        for (number, strict) in &pod.port_strict {
            let endpoint = Endpoint::new(ip, NetPort::new(*number));
            state.inbound_ports.insert(endpoint, value::InboundPort { flags: flags(*strict) });
        }
    }
}

/// Backend sets by name, to share equal ones and to notice a collision of hashes.
#[derive(Default)]
struct Sets(BTreeMap<u64, Vec<(Endpoint, u32)>>);

impl Sets {
    /// Adds a set's rows, unless they are there, and returns its name and size.
    fn add(&mut self, content: Vec<(Endpoint, u32)>, state: &mut BpfState) -> (u64, u32) {
        // A set is as large as the map allows at most; the map's size fits.
        let count = u32::try_from(content.len()).unwrap_or(u32::MAX);
        if count == 0 {
            return (0, 0);
        }
        let mut name = hash(&content);
        while let Some(other) = self.0.get(&name) {
            if *other == content {
                return (name, count);
            }
            name = name.wrapping_add(1);
        }
        for (slot, (endpoint, cell)) in (0..).zip(content.iter().zip(alias_table(&content))) {
            let (threshold, alias) = cell;
            let row = value::Backend { endpoint: endpoint.0, threshold, alias };
            state.backends.insert(key::Backend::new(name, slot), row);
            state.members.insert(key::Member::new(name, endpoint.0), slot);
        }
        self.0.insert(name, content);
        (name, count)
    }
}

/// FNV-1a with a final mix. Stable over restarts and versions, which std's hasher does not promise.
fn hash(content: &[(Endpoint, u32)]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for (endpoint, weight) in content {
        for byte in endpoint.bytes().iter().chain(&weight.to_be_bytes()) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    hash ^= hash >> 32;
    hash = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash ^ (hash >> 29)
}

/// Vose's alias method in integers: for each slot the highest draw (of 32 bits) that stays, and where the others go.
fn alias_table(content: &[(Endpoint, u32)]) -> Vec<(u32, u32)> {
    let count = content.len() as u128;
    let total: u128 = content.iter().map(|(_, weight)| u128::from(*weight)).sum();
    // Each slot's share in units of 1 / (count * total): `total` is exactly one cell.
    let mut share: Vec<u128> = content.iter().map(|(_, weight)| u128::from(*weight) * count).collect();
    let mut cells: Vec<(u32, u32)> = (0..).map(|slot| (u32::MAX, slot)).take(content.len()).collect();
    let (mut small, mut large): (Vec<usize>, Vec<usize>) =
        (0..content.len()).partition(|i| share[*i] < total);
    while let (Some(&below), Some(&above)) = (small.last(), large.last()) {
        small.pop();
        // A share below one cell is at most 2^32 - 1 in 32 bits; the draw `threshold` itself stays, hence the - 1.
        let threshold = ((share[below] << 32) / total).saturating_sub(1);
        cells[below] = (u32::try_from(threshold).unwrap_or(u32::MAX), above as u32);
        share[above] -= total - share[below];
        if share[above] < total {
            large.pop();
            small.push(above);
        }
    }
    cells
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_common::{code::DenyReason, decide};
    use proptest::prelude::*;

    fn backend(addr: &str, weight: u32) -> Backend {
        Backend { addr: addr.parse().unwrap(), weight }
    }

    fn direct(addr: &str, backends: Vec<Backend>) -> Frontend {
        let addr: SocketAddr = addr.parse().unwrap();
        Frontend {
            addr: addr.ip(),
            port: addr.port(),
            proto: Protocol::Tcp,
            verdict: Verdict::Direct,
            affinity: None,
            backends,
        }
    }

    fn frontend_row<'a>(state: &'a BpfState, addr: &str) -> &'a value::Frontend {
        let addr: SocketAddr = addr.parse().unwrap();
        &state.frontends[&key::Frontend::new(addr.ip().into(), NetPort::new(addr.port()), proto::TCP)]
    }

    #[test]
    fn equal_sets_are_shared_and_order_does_not_matter() {
        let (a, b) = (backend("10.0.0.1:80", 1), backend("10.0.0.2:80", 3));
        let intent = Intent {
            frontends: vec![direct("10.96.0.1:80", vec![a, b]), direct("10.96.0.2:80", vec![b, a])],
            ..Intent::default()
        };
        let (state, issues) = lower(&intent);
        assert_eq!(issues, []);
        assert_eq!(frontend_row(&state, "10.96.0.1:80").set, frontend_row(&state, "10.96.0.2:80").set);
        assert_eq!((state.backends.len(), state.members.len()), (2, 2));

        let other =
            Intent { frontends: vec![direct("10.96.0.1:80", vec![a, backend("10.0.0.2:80", 4)])], ..intent };
        let (changed, _) = lower(&other);
        assert_ne!(frontend_row(&state, "10.96.0.1:80").set, frontend_row(&changed, "10.96.0.1:80").set);
    }

    #[test]
    fn what_cannot_be_used_is_reported_and_left_out() {
        let backends = vec![
            backend("[fd00::1]:80", 1),
            backend("10.0.0.1:0", 1),
            backend("10.0.0.3:80", 0),
            backend("10.0.0.2:80", 1),
            backend("10.0.0.2:80", 1),
        ];
        let intent = Intent {
            frontends: vec![direct("10.96.0.1:80", backends), direct("10.96.0.1:80", vec![])],
            ..Intent::default()
        };
        let (state, issues) = lower(&intent);
        assert_eq!(frontend_row(&state, "10.96.0.1:80").count, 1);
        assert_eq!(issues.len(), 3, "{issues:?}");
        assert!(matches!(issues[2], Issue::DuplicateFrontend(..)));
    }

    #[test]
    fn an_empty_service_is_denied_by_the_kernel() {
        let intent = Intent { frontends: vec![direct("10.96.0.1:80", vec![])], ..Intent::default() };
        let (state, _) = lower(&intent);
        let row = frontend_row(&state, "10.96.0.1:80");
        let decision = decide::frontend(&value::Pod::zeroed(), &Ip::ANY, proto::TCP, row);
        assert_eq!(decision, decide::Outbound::Deny(DenyReason::NoEndpoints.code()));
    }

    #[test]
    fn a_pod_becomes_its_rows() {
        let pod = CapturedPod {
            cookie: 9,
            addrs: vec!["10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap()],
            outbound_v4: Some(40000),
            outbound_v6: Some(40001),
            strict: true,
            port_strict: BTreeMap::from([(8080, false)]),
        };
        let (state, issues) = lower(&Intent { pods: vec![pod], ..Intent::default() });
        assert_eq!(issues, []);
        let row = state.pods[&key::Netns::new(9)];
        assert_eq!((row.addr_v4.to_string(), row.outbound_v6.host()), ("10.0.0.7".into(), 40001));
        assert_eq!((state.inbound.len(), state.inbound_ports.len()), (2, 2));
        let inbound = state.inbound[&"fd00::7".parse::<IpAddr>().unwrap().into()];
        assert!(decide::strict(&inbound, None));
        assert!(state.inbound_ports.values().all(|port| !decide::strict(&inbound, Some(port))));
    }

    #[test]
    fn a_reused_address_belongs_to_the_younger_pod() {
        let pod = |cookie, port_strict| CapturedPod {
            cookie,
            addrs: vec!["10.0.0.7".parse().unwrap()],
            outbound_v4: None,
            outbound_v6: None,
            strict: false,
            port_strict,
        };
        let (old, young) = (pod(3, BTreeMap::from([(80, true)])), pod(5, BTreeMap::from([(81, true)])));
        for pods in [vec![old.clone(), young.clone()], vec![young, old]] {
            let (state, issues) = lower(&Intent { pods, ..Intent::default() });
            assert_eq!(issues.len(), 1);
            assert_eq!(state.inbound.values().next().map(|inbound| inbound.cookie), Some(5));
            let ports: Vec<u16> = state.inbound_ports.keys().map(|endpoint| endpoint.port.host()).collect();
            assert_eq!(ports, [81], "no port mode of the older pod survives");
        }
    }

    proptest! {
        /// The table gives each backend its weight's share, to the precision of the draw.
        #[test]
        fn the_alias_table_keeps_the_weights(weights in prop::collection::vec(1_u32..=1000, 1..40)) {
            let content: Vec<(Endpoint, u32)> = weights.iter().map(|w| (Endpoint::NONE, *w)).collect();
            let cells = alias_table(&content);
            let mut got = vec![0_f64; weights.len()];
            for (slot, (threshold, alias)) in cells.iter().enumerate() {
                prop_assert!((*alias as usize) < weights.len());
                let stays = (f64::from(*threshold) + 1.0) / 4_294_967_296.0;
                got[slot] += stays / weights.len() as f64;
                got[*alias as usize] += (1.0 - stays) / weights.len() as f64;
            }
            let total: f64 = weights.iter().map(|w| f64::from(*w)).sum();
            for (share, weight) in got.iter().zip(&weights) {
                prop_assert!((share - f64::from(*weight) / total).abs() < 1e-6, "{share} for {weight} of {total}");
            }
        }
    }
}
