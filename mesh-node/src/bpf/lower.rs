//! The lowering: [`Intent`] -> [`BpfState`], the rows of the maps. Pure.
//!
//! Frontends with equal backends share a backend set. A set is known by its content: a changed one is another set with
//! rows of its own beside the old ones, and a frontend moves over with a single write. Deliberately absent: the ids
//! that sets have in the kernel, which depend on what is there and are the reconciler's; any limit on the backends of
//! a service other than the map's size.

use super::{
    alias,
    intent::{Away, Backend, Balancing, CapturedPod, Frontend, Intent, Verdict},
    maglev,
    ops::Table,
};
use mesh_common::{
    code::{self, deny, inbound, proto, verdict},
    key,
    net::{Endpoint, Ip, NetPort},
    pod::Pod as _,
    value,
};
use mesh_xds::model::Protocol;
use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

/// The content of a backend set.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct BackendSet {
    /// Its slots in order. Every slot's endpoint is also a member row.
    pub slots: Arc<[value::Backend]>,
    /// Its Maglev table, or nothing.
    pub maglev: Arc<[value::MaglevChunk]>,
}

/// The rows that the maps should have. Does not depend on the order of the intent's parts, unless they contradict each
/// other ([`Issue`]).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BpfState {
    /// The backend sets, [`Table::Backends`], [`Table::Members`] and [`Table::Maglev`], without two of the same content. The numbers
    /// count from 1 and mean something in this value only.
    pub sets: BTreeMap<u64, BackendSet>,
    /// [`Table::Frontends`]; `set` is a number of `sets`, or 0 for none.
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
            Table::Members | Table::Backends => self.sets.values().map(|set| set.slots.len()).sum(),
            Table::Maglev => self.sets.values().map(|set| set.maglev.len()).sum(),
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
    /// Two destinations share an address; the stricter verdict is in force.
    DuplicateDestination(IpAddr),
    /// Two captured pods share an address; the one with the higher cookie has it, which as a rule is the younger one
    /// (the kernel hands cookies out in batches per CPU).
    DuplicatePodAddress(IpAddr),
    /// A service has too many backends for consistent hashing; they are chosen at random.
    TooManyForMaglev(SocketAddr, usize),
    /// A backend that a client of the frontend cannot reach: another address family, no address, or port 0.
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
                write!(f, "two workloads claim the address {addr}; the stricter verdict holds")
            }
            Self::DuplicatePodAddress(addr) => {
                write!(f, "two captured pods claim the address {addr}; the one of the higher cookie has it")
            }
            Self::TooManyForMaglev(service, backends) => {
                write!(
                    f,
                    "service {service} has {backends} endpoints, too many for consistent hashing; they are chosen at \
                     random, split the service to have it"
                )
            }
            Self::UnusableBackend(service, backend) => {
                write!(
                    f,
                    "endpoint {backend} of {service} is left out: another address family, no address, or port 0"
                )
            }
        }
    }
}

/// Lowers the intent. What cannot be taken is listed beside the state, which is complete without it.
pub fn lower(intent: &Intent) -> (BpfState, Vec<Issue>) {
    let mut state = BpfState::default();
    let mut issues = Vec::new();
    let mut sets: BTreeMap<BackendSet, Vec<key::Frontend>> = BTreeMap::new();
    for frontend in &intent.frontends {
        lower_frontend(frontend, &mut state, &mut sets, &mut issues);
    }
    for (number, (set, users)) in (1..).zip(sets) {
        for user in users {
            if let Some(row) = state.frontends.get_mut(&user) {
                row.set = number;
            }
        }
        state.sets.insert(number, set);
    }
    for destination in &intent.destinations {
        let (verdict, reason) = verdict_codes(destination.verdict);
        let row = value::Destination { verdict, reason, fallback: away_code(destination.away), reserved: 0 };
        match state.destinations.entry(destination.addr.into()) {
            Entry::Occupied(mut other) => {
                issues.push(Issue::DuplicateDestination(destination.addr));
                let other = other.get_mut();
                other.fallback = other.fallback.max(row.fallback);
                if row.verdict > other.verdict {
                    (other.verdict, other.reason) = (row.verdict, row.reason);
                }
            }
            Entry::Vacant(vacant) => {
                vacant.insert(row);
            }
        }
    }
    for pod in &intent.pods {
        lower_pod(pod, &mut state, &mut issues);
    }
    (state, issues)
}

// Where two claim one destination the stricter verdict and fallback win, which are the higher codes.
const _: () = assert!(verdict::DIRECT < verdict::PROXY && verdict::PROXY < verdict::DENY);

fn verdict_codes(verdict: Verdict) -> (u8, u8) {
    match verdict {
        Verdict::Direct => (verdict::DIRECT, 0),
        Verdict::Proxy => (verdict::PROXY, 0),
        Verdict::Deny(reason) => (verdict::DENY, reason.code()),
    }
}

fn away_code(away: Away) -> u8 {
    match away {
        Away::Direct => verdict::DIRECT,
        Away::Deny => verdict::DENY,
    }
}

fn lower_frontend(
    frontend: &Frontend,
    state: &mut BpfState,
    sets: &mut BTreeMap<BackendSet, Vec<key::Frontend>>,
    issues: &mut Vec<Issue>,
) {
    let service = SocketAddr::new(frontend.addr, frontend.port);
    let ip_proto = match frontend.proto {
        Protocol::Tcp => proto::TCP,
        Protocol::Udp => proto::UDP,
    };
    let key = key::Frontend::new(frontend.addr.into(), NetPort::new(frontend.port), ip_proto);
    let Entry::Vacant(vacant) = state.frontends.entry(key) else {
        issues.push(Issue::DuplicateFrontend(service, frontend.proto));
        return;
    };
    let (verdict, reason) = verdict_codes(frontend.verdict);
    let mut row =
        value::Frontend { verdict, reason, fallback: away_code(frontend.away), ..value::Frontend::zeroed() };
    if !matches!(frontend.verdict, Verdict::Deny(_)) {
        let (set, maglev) = backend_set(service, frontend, issues);
        if set.slots.is_empty() {
            // The daemon may know more endpoints than the kernel can reach.
            if frontend.verdict == Verdict::Direct {
                (row.verdict, row.reason) = (verdict::DENY, deny::NO_ENDPOINTS);
            }
        } else {
            // A set that long would not fit into the map, whose refusal then names the frontend's set.
            row.count = u32::try_from(set.slots.len()).unwrap_or(u32::MAX);
            row.maglev = maglev;
            row.affinity_ns = nanoseconds(frontend.affinity.unwrap_or_default());
            sets.entry(set).or_default().push(key);
        }
    }
    vacant.insert(row);
}

/// The set for a frontend's backends, and the size of its Maglev table: a slot for each endpoint that clients of the
/// service reach, in the order of addresses.
fn backend_set(service: SocketAddr, frontend: &Frontend, issues: &mut Vec<Issue>) -> (BackendSet, u32) {
    let is_v4 = Ip::from(service.ip()).is_v4();
    let mut weights: BTreeMap<Endpoint, u32> = BTreeMap::new();
    for Backend { addr, weight } in &frontend.backends {
        let endpoint = Endpoint::from(*addr);
        if endpoint.addr.is_v4() != is_v4 || endpoint.addr.is_unspecified() || addr.port() == 0 {
            issues.push(Issue::UnusableBackend(service, *addr));
        } else if *weight > 0 {
            let sum = weights.entry(endpoint).or_default();
            *sum = sum.saturating_add(*weight);
        }
    }
    let weights: Vec<(Endpoint, u32)> = weights.into_iter().collect();
    let mut set = BackendSet::default();
    let mut size = 0;
    if frontend.balancing == Balancing::Maglev && !weights.is_empty() {
        match maglev::size(weights.len()) {
            Some(fitting) => {
                size = fitting;
                set.maglev = maglev::chunks(&maglev::table(&weights, size));
            }
            None => issues.push(Issue::TooManyForMaglev(service, weights.len())),
        }
    }
    let cells = alias::table(&weights.iter().map(|(_, weight)| *weight).collect::<Vec<_>>());
    let slots = weights.into_iter().zip(cells);
    set.slots = slots
        .map(|((endpoint, _), cell)| value::Backend {
            endpoint,
            threshold: cell.threshold,
            alias: cell.alias,
        })
        .collect();
    (set, size)
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
        flags: if pod.dns { code::pod::DNS } else { 0 },
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

#[cfg(test)]
mod tests {
    use super::super::intent::Destination;
    use super::*;
    use mesh_common::{code::DenyReason, decide};

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
            away: Away::Deny,
            balancing: Balancing::Random,
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
        assert_eq!((state.sets.len(), state.len(Table::Backends), state.len(Table::Members)), (1, 2, 2));
        let mut reversed = intent.clone();
        reversed.frontends.reverse();
        assert_eq!(lower(&reversed).0, state);

        let other =
            Intent { frontends: vec![direct("10.96.0.1:80", vec![a, backend("10.0.0.2:80", 4)])], ..intent };
        let (changed, _) = lower(&other);
        assert_ne!(state.sets, changed.sets, "weights are content");
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
            dns: true,
            strict: true,
            port_strict: BTreeMap::from([(8080, false)]),
        };
        let (state, issues) = lower(&Intent { pods: vec![pod], ..Intent::default() });
        assert_eq!(issues, []);
        let row = state.pods[&key::Netns::new(9)];
        assert_eq!((row.addr_v4.to_string(), row.outbound_v6.host()), ("10.0.0.7".into(), 40001));
        assert_eq!(row.flags, code::pod::DNS);
        assert_eq!((state.inbound.len(), state.inbound_ports.len()), (2, 2));
        let inbound = state.inbound[&"fd00::7".parse::<IpAddr>().unwrap().into()];
        assert!(decide::strict(&inbound, None));
        assert!(state.inbound_ports.values().all(|port| !decide::strict(&inbound, Some(port))));
    }

    #[test]
    fn a_reused_address_belongs_to_the_higher_cookie() {
        let pod = |cookie, port_strict| CapturedPod {
            cookie,
            addrs: vec!["10.0.0.7".parse().unwrap()],
            outbound_v4: None,
            outbound_v6: None,
            dns: false,
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

    #[test]
    fn weights_arrive_in_the_rows() {
        let backends = vec![backend("10.0.0.2:80", 3), backend("10.0.0.1:80", 1)];
        let (state, _) =
            lower(&Intent { frontends: vec![direct("10.96.0.1:80", backends)], ..Intent::default() });
        let set = &state.sets[&frontend_row(&state, "10.96.0.1:80").set];
        let set = &set.slots;
        let endpoints: Vec<String> = set.iter().map(|slot| slot.endpoint.to_string()).collect();
        assert_eq!(endpoints, ["10.0.0.1:80", "10.0.0.2:80"]);
        // 1 of 4 is half of the first of two cells; the second cell and the other half are the second backend's.
        assert_eq!((set[0].threshold, set[0].alias), (u32::MAX / 2, 1));
        assert_eq!(set[1].threshold, u32::MAX);
    }

    #[test]
    fn maglev_has_a_table_of_its_own_until_there_are_too_many() {
        let hashed = |addr: &str, count: u32, verdict| Frontend {
            balancing: Balancing::Maglev,
            verdict,
            ..direct(addr, many(count))
        };
        let frontends = vec![
            hashed("10.96.0.1:80", 3, Verdict::Direct),
            hashed("10.96.0.2:80", 3, Verdict::Proxy),
            direct("10.96.0.3:80", many(3)),
            hashed("10.96.0.4:80", 6553, Verdict::Direct),
        ];
        let (state, issues) = lower(&Intent { frontends, ..Intent::default() });
        assert_eq!(issues, [Issue::TooManyForMaglev("10.96.0.4:80".parse().unwrap(), 6553)]);
        let row = |addr| *frontend_row(&state, addr);
        assert_eq!((row("10.96.0.1:80").maglev, row("10.96.0.2:80").maglev), (1021, 1021));
        assert_eq!(row("10.96.0.1:80").set, row("10.96.0.2:80").set, "shared");
        assert_ne!(row("10.96.0.1:80").set, row("10.96.0.3:80").set, "one without a table is another set");
        assert_eq!((row("10.96.0.3:80").maglev, row("10.96.0.4:80").maglev), (0, 0));
        assert_eq!((state.len(Table::Maglev), state.len(Table::Backends)), (4, 3 + 3 + 6553));
    }

    fn many(count: u32) -> Vec<Backend> {
        let addr = |n| (std::net::Ipv4Addr::from(0x0a00_0000 + n), 80).into();
        (0..count).map(|n| Backend { addr: addr(n), weight: 1 }).collect()
    }

    #[test]
    fn a_service_may_be_huge() {
        let (state, issues) =
            lower(&Intent { frontends: vec![direct("10.96.0.1:80", many(70_000))], ..Intent::default() });
        let row = frontend_row(&state, "10.96.0.1:80");
        assert_eq!((row.count, state.sets[&row.set].slots.len(), issues.len()), (70_000, 70_000, 0));
    }

    #[test]
    fn both_families_and_the_mapped_form() {
        let frontends = vec![
            direct("10.96.0.1:80", vec![backend("[::ffff:10.0.0.1]:80", 1), backend("10.0.0.1:80", 1)]),
            direct("[fd00::1]:80", vec![backend("[fd00::2]:80", 1), backend("10.0.0.1:80", 1)]),
        ];
        let (state, issues) = lower(&Intent { frontends, ..Intent::default() });
        let v4 = &state.sets[&frontend_row(&state, "10.96.0.1:80").set].slots;
        assert_eq!((v4.len(), v4[0].endpoint.to_string()), (1, "10.0.0.1:80".into()), "one and the same");
        let v6 = &state.sets[&frontend_row(&state, "[fd00::1]:80").set].slots;
        assert_eq!((v6.len(), v6[0].endpoint.to_string()), (1, "[fd00::2]:80".into()));
        assert_eq!(issues.len(), 1, "{issues:?}");
    }

    #[test]
    fn frontends_that_are_not_denied_have_a_set_if_there_are_backends() {
        let mut proxied = direct("10.96.0.1:80", vec![backend("10.0.0.1:80", 1)]);
        proxied.verdict = Verdict::Proxy;
        proxied.affinity = Some(Duration::from_secs(9));
        let mut blind = direct("10.96.0.4:80", vec![]);
        blind.verdict = Verdict::Proxy;
        blind.away = Away::Direct;
        let mut denied = direct("10.96.0.2:80", vec![]);
        denied.verdict = Verdict::Deny(DenyReason::Policy);
        let mut balanced = direct("10.96.0.3:80", vec![backend("10.0.0.1:80", 1)]);
        balanced.affinity = Some(Duration::from_secs(9));
        let (state, _) =
            lower(&Intent { frontends: vec![proxied, denied, balanced, blind], ..Intent::default() });
        let row = |addr| *frontend_row(&state, addr);
        let zero = value::Frontend { fallback: verdict::DENY, ..value::Frontend::zeroed() };
        assert_eq!(
            row("10.96.0.4:80"),
            value::Frontend { verdict: verdict::PROXY, fallback: verdict::DIRECT, ..zero }
        );
        assert_eq!(
            row("10.96.0.2:80"),
            value::Frontend { verdict: verdict::DENY, reason: deny::POLICY, ..zero }
        );
        for (service, verdict) in [("10.96.0.1:80", verdict::PROXY), ("10.96.0.3:80", verdict::DIRECT)] {
            let row = row(service);
            assert_eq!(
                (row.verdict, row.set, row.count, row.affinity_ns),
                (verdict, 1, 1, 9_000_000_000),
                "{service}"
            );
        }
    }

    #[test]
    fn the_stricter_verdict_holds_for_an_address_claimed_twice() {
        let addr = "10.0.0.1".parse().unwrap();
        let claim = |verdict, away| Destination { addr, verdict, away };
        for destinations in [
            vec![claim(Verdict::Direct, Away::Deny), claim(Verdict::Proxy, Away::Direct)],
            vec![claim(Verdict::Proxy, Away::Direct), claim(Verdict::Direct, Away::Deny)],
        ] {
            let (state, issues) = lower(&Intent { destinations, ..Intent::default() });
            let row = state.destinations[&addr.into()];
            assert_eq!((row.verdict, row.fallback), (verdict::PROXY, verdict::DENY));
            assert_eq!(issues, [Issue::DuplicateDestination(addr)]);
        }
    }

    #[test]
    fn nothing_becomes_nothing_and_a_pod_without_a_family_has_no_listener_in_it() {
        assert_eq!(lower(&Intent::default()), (BpfState::default(), vec![]));
        let pod = CapturedPod {
            cookie: 9,
            addrs: vec!["10.0.0.7".parse().unwrap()],
            outbound_v4: Some(40000),
            outbound_v6: Some(40001),
            dns: false,
            strict: false,
            port_strict: BTreeMap::new(),
        };
        let (state, _) = lower(&Intent { pods: vec![pod], ..Intent::default() });
        let row = state.pods[&key::Netns::new(9)];
        assert_eq!((row.outbound_v4.host(), row.outbound_v6), (40000, NetPort::NONE));
    }
}
