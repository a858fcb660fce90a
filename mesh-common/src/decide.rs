//! The pure capture decision: what follows from what the map look-ups returned.
//!
//! Everything is `inline(always)` and free of panics, for the verifier's sake. Absent: the look-ups themselves.

use crate::code::{self, counter, deny, inbound, port, proto, verdict};
use crate::net::{Endpoint, Ip, NetPort};
use crate::{key, value};

/// What becomes of a connect or of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outbound {
    /// Untouched.
    Pass,
    /// To a backend of the set that the frontend names.
    Balance,
    /// To the daemon, unless a cached verdict makes it unnecessary.
    Proxy {
        /// The daemon's listener in the pod.
        listener: Endpoint,
        /// What stands in for the daemon while it is away: `code::verdict`, DIRECT or DENY.
        fallback: u8,
    },
    /// Refused, with a `code::deny`.
    Deny(u8),
}

/// Whether the pod dials itself, which is never captured.
#[inline(always)]
pub fn dials_itself(pod: &value::Pod, dst: &Ip) -> bool {
    dst.same(&pod.addr_v4) || dst.same(&pod.addr_v6)
}

/// The decision for a destination that is a service port.
#[inline(always)]
pub fn frontend(pod: &value::Pod, dst: &Ip, ip_proto: u8, frontend: &value::Frontend) -> Outbound {
    match frontend.verdict {
        verdict::DIRECT if frontend.count == 0 => Outbound::Deny(deny::NO_ENDPOINTS),
        verdict::DIRECT => Outbound::Balance,
        verdict::PROXY if ip_proto != proto::TCP => Outbound::Deny(deny::UDP_NOT_PROXIED),
        verdict::PROXY => proxy(pod, dst, frontend.fallback),
        verdict::DENY => Outbound::Deny(frontend.reason),
        _ => Outbound::Deny(deny::BAD_VERDICT),
    }
}

/// The decision for a destination that is a mesh pod's own address. UDP is not looked up there at all.
#[inline(always)]
pub fn destination(pod: &value::Pod, dst: &Ip, destination: &value::Destination) -> Outbound {
    match destination.verdict {
        verdict::DIRECT => Outbound::Pass,
        verdict::PROXY => proxy(pod, dst, destination.fallback),
        verdict::DENY => Outbound::Deny(destination.reason),
        _ => Outbound::Deny(deny::BAD_VERDICT),
    }
}

/// Where a DNS query of the pod goes while the daemon is there: its socket for DNS, of the family of the nameserver. `None`
/// for what is no query, and for nameservers in the pod itself.
#[inline(always)]
pub fn dns(pod: &value::Pod, dst: &Endpoint) -> Option<Endpoint> {
    if pod.flags & code::pod::DNS == 0
        || dst.port.be != NAMESERVER.be
        || dst.addr.is_loopback()
        || dials_itself(pod, &dst.addr)
    {
        return None;
    }
    let addr = if dst.addr.is_v4() { pod.addr_v4 } else { pod.addr_v6 };
    if addr.is_unspecified() { None } else { Some(Endpoint::new(addr, NetPort::new(port::DNS))) }
}

/// The port of nameservers.
const NAMESERVER: NetPort = NetPort::new(53);

/// The daemon's listener of the destination's family. A pod without one must not get past the proxy.
#[inline(always)]
fn proxy(pod: &value::Pod, dst: &Ip, fallback: u8) -> Outbound {
    let (addr, port) =
        if dst.is_v4() { (pod.addr_v4, pod.outbound_v4) } else { (pod.addr_v6, pod.outbound_v6) };
    if port.is_some() {
        Outbound::Proxy { listener: Endpoint::new(addr, port), fallback }
    } else {
        Outbound::Deny(deny::NO_CAPTURE_ADDRESS)
    }
}

/// Whether the frontend names a set of backends to choose from.
#[inline(always)]
pub fn has_backends(frontend: &value::Frontend) -> bool {
    frontend.count > 0 && (frontend.verdict == verdict::DIRECT || frontend.verdict == verdict::PROXY)
}

/// Whether a connection may go straight to its target while the daemon is away. `has_target` is false for a service of
/// which the kernel knows no backend.
#[inline(always)]
pub fn away_direct(fallback: u8, has_target: bool) -> bool {
    fallback == verdict::DIRECT && has_target
}

/// Slots of one chunk of a Maglev table.
pub const MAGLEV_CHUNK: u32 = 256;

/// The position in a Maglev table of `size` slots for a client and a service. The set of backends has no part in it, so
/// that a client comes to the same place when the set changes.
#[inline(always)]
pub fn maglev_position(client: &Ip, service: &key::Frontend, size: u32) -> u32 {
    let pair = |high: u32, low: u32| ((high as u64) << 32) | low as u64;
    let mut hash = pair(service.port.be as u32, service.proto as u32);
    for word in [
        pair(client.words[0], client.words[1]),
        pair(client.words[2], client.words[3]),
        pair(service.addr.words[0], service.addr.words[1]),
        pair(service.addr.words[2], service.addr.words[3]),
    ] {
        hash = mix(hash ^ word);
    }
    cell((hash >> 32) as u32, size)
}

/// Spreads neighbouring numbers over all numbers: a step and the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
#[inline(always)]
pub const fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The alias table's cell for a random number. `count` must not be 0.
#[inline(always)]
pub fn cell(random: u32, count: u32) -> u32 {
    ((random as u64 * count as u64) >> 32) as u32
}

/// The slot that a second random number leads to from that cell.
#[inline(always)]
pub fn slot(draw: u32, cell: u32, backend: &value::Backend) -> u32 {
    if draw <= backend.threshold { cell } else { backend.alias }
}

/// The two draws of a client with session affinity. Not random: two connects that race for the first choice come to
/// the same backend, whichever of them is remembered; neighbouring cookies spread over all backends.
#[inline(always)]
pub fn sticky_draws(cookie: u64, set: u64) -> (u32, u32) {
    let z = mix(cookie.wrapping_add(set.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    (z as u32, (z >> 32) as u32)
}

/// Whether session affinity still holds: the timeout counts from the last use.
#[inline(always)]
pub fn affinity_holds(entry: &value::Affinity, now_ns: u64, timeout_ns: u64) -> bool {
    // Another CPU's clock may be slightly ahead.
    now_ns.saturating_sub(entry.last_use_ns) <= timeout_ns
}

/// How long a probe's entry counts: longer than a retransmitted SYN, too short to guess a port.
pub const PROBE_TTL_NS: u64 = 5_000_000_000;

/// Whether a probe was announced just now.
#[inline(always)]
pub fn probe_holds(entry: &value::Probe, now_ns: u64) -> bool {
    now_ns.saturating_sub(entry.seen_ns) <= PROBE_TTL_NS
}

/// How long the daemon counts as there after a heartbeat.
pub const HEARTBEAT_TTL_NS: u64 = 3_000_000_000;

/// Whether the daemon said a moment ago that it serves.
#[inline(always)]
pub fn beats(heart: &value::Heartbeat, now_ns: u64) -> bool {
    // Signed: the beat may be later than the time that was read before it.
    heart.beat_ns != 0 && now_ns.wrapping_sub(heart.beat_ns) as i64 <= HEARTBEAT_TTL_NS as i64
}

/// Whether a cached verdict, or the connection that it let through, is of the generation in force.
#[inline(always)]
pub fn verdict_holds(generation: u64, current: &value::Generation) -> bool {
    generation == current.number
}

/// What becomes of a TCP connection that arrives at a captured pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inbound {
    /// The kernel's usual look-up; a `code::counter`.
    Pass(u32),
    /// To the daemon's plaintext listener.
    Steer,
    /// Refused with an RST; a `code::deny`.
    Drop(u8),
    /// It depends on the probe and listener maps: ask them, then [`inbound_open`].
    LookFurther,
}

/// The decision as far as addresses and ports tell it.
#[inline(always)]
pub fn inbound(pod: &value::Inbound, remote: &Ip, local: &Ip, local_port: u16) -> Inbound {
    if remote.same(local) || remote.is_loopback() {
        return Inbound::Pass(counter::INBOUND_LOCAL);
    }
    if local_port == port::INBOUND_HBONE {
        return Inbound::Pass(counter::INBOUND_HBONE);
    }
    let outbound = if local.is_v4() { pod.outbound_v4 } else { pod.outbound_v6 };
    if local_port == port::INBOUND_PLAIN || local_port == outbound.host() {
        return Inbound::Drop(deny::CAPTURE_PORT);
    }
    Inbound::LookFurther
}

/// Whether plaintext to a port is refused: the port's own mode, else the pod's.
#[inline(always)]
pub fn strict(pod: &value::Inbound, port: Option<&value::InboundPort>) -> bool {
    let flags = match port {
        Some(port) => port.flags,
        None => pod.flags,
    };
    flags & inbound::STRICT != 0
}

/// The rest of the decision. `vouched` (the `code::counter` of what this node itself vouches for: a probe, or a local
/// connection that a verdict allows) and `listens` come from the maps.
#[inline(always)]
pub fn inbound_open(vouched: Option<u32>, listens: bool, strict: bool) -> Inbound {
    if let Some(outcome) = vouched {
        Inbound::Pass(outcome)
    } else if listens {
        Inbound::Steer
    } else if strict {
        Inbound::Drop(deny::CLOSED_PORT)
    } else {
        Inbound::Pass(counter::INBOUND_CLOSED)
    }
}

/// What becomes of a connection that could not be steered since the daemon is away or has no listener.
#[inline(always)]
pub fn inbound_unsteered(strict: bool) -> Inbound {
    if strict { Inbound::Drop(deny::NO_DAEMON) } else { Inbound::Pass(counter::INBOUND_CLOSED) }
}

/// Bytes of app data that a TCP socket saw, out of the kernel's counts of sequence numbers, which include SYN and FIN.
/// Returns (sent, received). `old_state` is the state that the socket leaves for CLOSE (`include/net/tcp_states.h`).
///
/// FIN_WAIT2 alone does not tell whether the peer's FIN came. What came after the peer had acknowledged this side's FIN
/// (`received_at_fin`, the low half of the count then) ended with it, unless the connection was reset.
#[inline(always)]
pub fn app_bytes(acked: u64, received: u64, old_state: u32, received_at_fin: u32) -> (u64, u64) {
    const FIN_WAIT2: u32 = 5;
    const CLOSE_WAIT: u32 = 8;
    const LAST_ACK: u32 = 9;
    const CLOSING: u32 = 11;
    let our_fin = matches!(old_state, FIN_WAIT2 | LAST_ACK) as u64;
    let peer_fin = match old_state {
        CLOSE_WAIT | LAST_ACK | CLOSING => 1,
        FIN_WAIT2 => (received as u32 != received_at_fin) as u64,
        _ => 0,
    };
    (acked.saturating_sub(1 + our_fin), received.saturating_sub(peer_fin))
}

/// True for the daemon's outbound listener in this pod.
#[inline(always)]
pub fn is_outbound_listener(pod: &value::Pod, local: &Endpoint) -> bool {
    let (addr, port) =
        if local.addr.is_v4() { (&pod.addr_v4, pod.outbound_v4) } else { (&pod.addr_v6, pod.outbound_v6) };
    port.is_some() && port.be == local.port.be && addr.same(&local.addr)
}

#[cfg(test)]
#[cfg(feature = "user")]
mod tests {
    use super::*;
    use crate::pod::Pod as _;
    use std::net::IpAddr;

    fn ip(text: &str) -> Ip {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn pod() -> value::Pod {
        value::Pod { addr_v4: ip("10.0.0.7"), outbound_v4: NetPort::new(40000), ..value::Pod::zeroed() }
    }

    fn service(verdict: u8, reason: u8, count: u32) -> value::Frontend {
        value::Frontend { verdict, reason, count, fallback: verdict::DENY, ..value::Frontend::zeroed() }
    }

    #[test]
    fn outbound_table() {
        let (v4, v6) = (ip("10.96.0.1"), ip("fd00::1"));
        let listener = Endpoint::new(ip("10.0.0.7"), NetPort::new(40000));
        for (what, dst, ip_proto, frontend_value, expected) in [
            ("direct", v4, proto::TCP, service(verdict::DIRECT, 0, 3), Outbound::Balance),
            ("direct udp", v4, proto::UDP, service(verdict::DIRECT, 0, 3), Outbound::Balance),
            (
                "direct, empty",
                v4,
                proto::TCP,
                service(verdict::DIRECT, 0, 0),
                Outbound::Deny(deny::NO_ENDPOINTS),
            ),
            (
                "proxy",
                v4,
                proto::TCP,
                service(verdict::PROXY, 0, 0),
                Outbound::Proxy { listener, fallback: verdict::DENY },
            ),
            (
                "proxy v6",
                v6,
                proto::TCP,
                service(verdict::PROXY, 0, 0),
                Outbound::Deny(deny::NO_CAPTURE_ADDRESS),
            ),
            (
                "proxy udp",
                v4,
                proto::UDP,
                service(verdict::PROXY, 0, 0),
                Outbound::Deny(deny::UDP_NOT_PROXIED),
            ),
            ("deny", v4, proto::TCP, service(verdict::DENY, deny::POLICY, 0), Outbound::Deny(deny::POLICY)),
            ("unknown", v4, proto::TCP, service(77, 0, 1), Outbound::Deny(deny::BAD_VERDICT)),
        ] {
            assert_eq!(frontend(&pod(), &dst, ip_proto, &frontend_value), expected, "{what}");
        }
        let direct = value::Destination { verdict: verdict::DIRECT, ..value::Destination::zeroed() };
        assert_eq!(destination(&pod(), &v4, &direct), Outbound::Pass);
        let zero = value::Destination::zeroed();
        assert_eq!(
            destination(&pod(), &v4, &zero),
            Outbound::Deny(deny::BAD_VERDICT),
            "no fail-open default"
        );
        assert!(dials_itself(&pod(), &ip("10.0.0.7")) && !dials_itself(&pod(), &v4));
    }

    #[test]
    fn only_what_takes_plaintext_goes_direct_without_the_daemon() {
        for (fallback, has_target, expected) in [
            (verdict::DIRECT, true, true),
            (verdict::DIRECT, false, false),
            (verdict::DENY, true, false),
            (verdict::PROXY, true, false),
            (0, true, false),
        ] {
            assert_eq!(away_direct(fallback, has_target), expected, "{fallback} {has_target}");
        }
        assert!(
            has_backends(&service(verdict::PROXY, 0, 2)) && has_backends(&service(verdict::DIRECT, 0, 1))
        );
        assert!(
            !has_backends(&service(verdict::PROXY, 0, 0)) && !has_backends(&service(verdict::DENY, 0, 2))
        );
    }

    #[test]
    fn clients_spread_evenly_over_a_maglev_table_and_services_do_not_matter_to_each_other() {
        let service = |port| key::Frontend::new(ip("10.96.0.1"), NetPort::new(port), proto::TCP);
        let client = |n: u32| Ip::v4((0x0a01_0000 + n).to_be());
        let mut hits = [0_u32; 251];
        let mut same = 0;
        for n in 0..50_200 {
            let position = maglev_position(&client(n), &service(80), 251);
            hits[position as usize] += 1;
            same += u32::from(position == maglev_position(&client(n), &service(81), 251));
        }
        // 200 expected in each place, standard deviation 14: six of them on either side.
        assert!(hits.iter().all(|n| (115..285).contains(n)), "{hits:?}");
        assert!((115..285).contains(&same), "{same}");
        assert!(maglev_position(&ip("fd00::1"), &service(80), 65_521) < 65_521);
    }

    #[test]
    fn the_cell_covers_every_slot_and_never_more() {
        for count in [1_u32, 2, 3, 7, 1000, u32::MAX] {
            assert_eq!(cell(0, count), 0);
            assert_eq!(cell(u32::MAX, count), count - 1);
        }
        let backend = value::Backend { threshold: 99, alias: 5, ..value::Backend::zeroed() };
        assert_eq!((slot(99, 2, &backend), slot(100, 2, &backend)), (2, 5));
        let always = value::Backend { threshold: u32::MAX, alias: 5, ..value::Backend::zeroed() };
        assert_eq!(slot(u32::MAX, 2, &always), 2);
    }

    #[test]
    fn affinity_and_probes_end() {
        let entry = value::Affinity { last_use_ns: 1000, ..value::Affinity::zeroed() };
        assert!(affinity_holds(&entry, 1500, 500) && !affinity_holds(&entry, 1501, 500));
        assert!(affinity_holds(&entry, 900, 500), "a clock slightly behind");
        let probe = value::Probe { seen_ns: 10 };
        assert!(probe_holds(&probe, 10 + PROBE_TTL_NS) && !probe_holds(&probe, 11 + PROBE_TTL_NS));
    }

    #[test]
    fn a_heart_beats_for_a_while_and_an_ended_one_not_at_all() {
        let heart = value::Heartbeat { beat_ns: 7_000_000_000 };
        for (now, expected) in [
            (7_000_000_000, true),
            (6_999_999_999, true),
            (7_000_000_000 + HEARTBEAT_TTL_NS, true),
            (7_000_000_001 + HEARTBEAT_TTL_NS, false),
        ] {
            assert_eq!(beats(&heart, now), expected, "at {now}");
        }
        assert!(!beats(&value::Heartbeat { beat_ns: 0 }, 5), "0 is not a time just after the boot");
    }

    #[test]
    fn dns_queries_to_nameservers_outside_of_the_pod_are_captured() {
        let v4 = |octets: [u8; 4]| Ip::v4(u32::from_ne_bytes(octets));
        let pod = value::Pod { addr_v4: v4([10, 0, 0, 7]), flags: code::pod::DNS, ..value::Pod::zeroed() };
        let at = |octets, port| Endpoint::new(v4(octets), NetPort::new(port));
        assert_eq!(dns(&pod, &at([10, 96, 0, 10], 53)), Some(at([10, 0, 0, 7], 15053)));
        for (what, dst) in [
            ("another port", at([10, 96, 0, 10], 5353)),
            ("loopback", at([127, 0, 0, 53], 53)),
            ("itself", at([10, 0, 0, 7], 53)),
            ("no address of the family", Endpoint::new(Ip::v6([1, 2, 3, 4]), NetPort::new(53))),
        ] {
            assert_eq!(dns(&pod, &dst), None, "{what}");
        }
        assert_eq!(dns(&value::Pod { flags: 0, ..pod }, &at([10, 96, 0, 10], 53)), None, "switched off");
    }

    #[test]
    fn inbound_table() {
        let target = value::Inbound { outbound_v4: NetPort::new(40000), ..value::Inbound::zeroed() };
        let (own, peer) = (ip("10.0.0.7"), ip("10.0.0.8"));
        for (what, remote, port, expected) in [
            ("itself", own, 80, Inbound::Pass(counter::INBOUND_LOCAL)),
            ("loopback", ip("127.0.0.1"), 80, Inbound::Pass(counter::INBOUND_LOCAL)),
            ("hbone", peer, port::INBOUND_HBONE, Inbound::Pass(counter::INBOUND_HBONE)),
            ("plain capture port", peer, port::INBOUND_PLAIN, Inbound::Drop(deny::CAPTURE_PORT)),
            ("outbound capture port", peer, 40000, Inbound::Drop(deny::CAPTURE_PORT)),
            ("app", peer, 80, Inbound::LookFurther),
        ] {
            assert_eq!(inbound(&target, &remote, &own, port), expected, "{what}");
        }
        let strict_pod = value::Inbound { flags: inbound::STRICT, ..target };
        let open = value::InboundPort { flags: 0 };
        let closed = value::InboundPort { flags: inbound::STRICT };
        assert!(strict(&strict_pod, None) && !strict(&strict_pod, Some(&open)));
        assert!(!strict(&target, None) && strict(&target, Some(&closed)));
        for (vouched, listens, strict, expected) in [
            (Some(counter::INBOUND_PROBE), true, true, Inbound::Pass(counter::INBOUND_PROBE)),
            (Some(counter::INBOUND_FLOW), false, true, Inbound::Pass(counter::INBOUND_FLOW)),
            (None, true, true, Inbound::Steer),
            (None, true, false, Inbound::Steer),
            (None, false, true, Inbound::Drop(deny::CLOSED_PORT)),
            (None, false, false, Inbound::Pass(counter::INBOUND_CLOSED)),
        ] {
            assert_eq!(inbound_open(vouched, listens, strict), expected);
        }
        assert_eq!(inbound_unsteered(true), Inbound::Drop(deny::NO_DAEMON));
    }

    #[test]
    fn clients_with_affinity_spread_evenly_and_always_come_to_the_same_draws() {
        let mut hits = [0_u32; 5];
        for cookie in 0..50_000_u64 {
            let (first, second) = sticky_draws(cookie, 7);
            assert_eq!(sticky_draws(cookie, 7), (first, second));
            hits[cell(first, 5) as usize] += 1;
        }
        // 10,000 expected, standard deviation 89: six of them on either side.
        assert!(hits.iter().all(|n| (9_460..10_540).contains(n)), "{hits:?}");
        assert_ne!(sticky_draws(1, 7), sticky_draws(1, 8));
    }

    #[test]
    fn syn_and_fin_are_not_app_bytes() {
        assert_eq!(
            app_bytes(102, 50, 5, 50),
            (100, 50),
            "FIN_WAIT2: closed, and the peer's FIN is not awaited"
        );
        assert_eq!(app_bytes(102, 51, 5, 20), (100, 50), "FIN_WAIT2: half-closed, then the peer's FIN");
        assert_eq!(app_bytes(102, 51, 9, 0), (100, 50), "LAST_ACK: both");
        assert_eq!(app_bytes(101, 50, 1, 0), (100, 50), "ESTABLISHED: a reset");
        assert_eq!(app_bytes(0, 0, 9, 0), (0, 0));
    }
}
