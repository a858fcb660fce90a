//! Matching of one connection, and the three-valued form of it for connections not yet known.

use mesh_xds::model::{IpBlock, Match, Rule, SpiffeId, StringMatch};
use std::net::IpAddr;

/// The trust domain that stands for the mesh's own in policies, whatever that is called.
const TRUST_DOMAIN_ALIAS: &str = "cluster.local";

/// What is known about a connection to a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnMeta {
    /// Who the peer has proven to be; `None` for plaintext.
    pub source: Option<SpiffeId>,
    /// The source address.
    pub source_ip: IpAddr,
    /// The workload's address.
    pub destination_ip: IpAddr,
    /// The workload's port.
    pub destination_port: u16,
}

/// A connection prepared for matching against many policies: its strings are built once.
pub(super) struct Subject<'a> {
    conn: &'a ConnMeta,
    namespace: Option<&'a str>,
    /// The principal, and its form under the alias if its trust domain is the mesh's own.
    principals: Vec<String>,
}

impl<'a> Subject<'a> {
    pub(super) fn new(conn: &'a ConnMeta, trust_domain: &str) -> Self {
        let mut principals = Vec::new();
        if let Some(id) = &conn.source {
            principals.push(id.principal());
            if id.trust_domain() == trust_domain && trust_domain != TRUST_DOMAIN_ALIAS {
                principals.push(format!(
                    "{TRUST_DOMAIN_ALIAS}/ns/{}/sa/{}",
                    id.namespace(),
                    id.service_account()
                ));
            }
        }
        Self { conn, namespace: conn.source.as_ref().map(SpiffeId::namespace), principals }
    }

    /// Whether any of the rules matches.
    pub(super) fn matches(&self, rules: &[Rule]) -> bool {
        any_rule(rules, |m| Ternary::from(self.matches_one(m))) == Ternary::Yes
    }

    fn matches_one(&self, m: &Match) -> bool {
        let principal = |p: &StringMatch| self.principals.iter().any(|have| string_matches(p, have));
        // A peer without an identity has no namespace: it meets no positive match and every negative one.
        let namespace = |p: &StringMatch| self.namespace.is_some_and(|have| string_matches(p, have));
        let source = |block: &IpBlock| contains(block, self.conn.source_ip);
        let destination = |block: &IpBlock| contains(block, self.conn.destination_ip);
        let port = |port: &u16| *port == self.conn.destination_port;
        both(&m.namespaces, &m.not_namespaces, namespace)
            && both(&m.principals, &m.not_principals, principal)
            && both(&m.source_ips, &m.not_source_ips, source)
            && both(&m.destination_ips, &m.not_destination_ips, destination)
            && both(&m.destination_ports, &m.not_destination_ports, port)
    }
}

/// An attribute's positive list (empty: anything) and its negative one.
fn both<T>(positive: &[T], negative: &[T], mut test: impl FnMut(&T) -> bool) -> bool {
    (positive.is_empty() || positive.iter().any(&mut test)) && !negative.iter().any(&mut test)
}

fn string_matches(pattern: &StringMatch, have: &str) -> bool {
    match pattern {
        StringMatch::Exact(s) => have == s,
        StringMatch::Prefix(s) => have.starts_with(s.as_str()),
        StringMatch::Suffix(s) => have.ends_with(s.as_str()),
        StringMatch::Presence => !have.is_empty(),
    }
}

/// Whether a block contains an address. An IPv4 address in its IPv6-mapped form is the IPv4 address.
fn contains(block: &IpBlock, ip: IpAddr) -> bool {
    match (block.address.to_canonical(), ip.to_canonical()) {
        (IpAddr::V4(net), IpAddr::V4(ip)) => {
            // A mapped block counts its prefix from the 128-bit form.
            let len =
                if block.address.is_ipv6() { block.prefix_len.saturating_sub(96) } else { block.prefix_len };
            prefix_equal(u32::from(net).into(), u32::from(ip).into(), len, 32)
        }
        (IpAddr::V6(net), IpAddr::V6(ip)) => prefix_equal(net.into(), ip.into(), block.prefix_len, 128),
        _ => false,
    }
}

fn prefix_equal(a: u128, b: u128, len: u8, width: u32) -> bool {
    match width.checked_sub(u32::from(len)) {
        Some(rest) => rest >= 128 || (a ^ b) >> rest == 0,
        None => false,
    }
}

/// Yes, no, or it depends on the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Ternary {
    No,
    Depends,
    Yes,
}

impl From<bool> for Ternary {
    fn from(b: bool) -> Self {
        if b { Self::Yes } else { Self::No }
    }
}

/// Whether the rules match connections to `port` of which nothing else is known: always, never, or it depends.
pub(super) fn matches_on_port(rules: &[Rule], port: u16) -> Ternary {
    any_rule(rules, |m| {
        if !both(&m.destination_ports, &m.not_destination_ports, |p| *p == port) {
            return Ternary::No;
        }
        let rest_is_open = m.namespaces.is_empty()
            && m.not_namespaces.is_empty()
            && m.principals.is_empty()
            && m.not_principals.is_empty()
            && m.source_ips.is_empty()
            && m.not_source_ips.is_empty()
            && m.destination_ips.is_empty()
            && m.not_destination_ips.is_empty();
        if rest_is_open { Ternary::Yes } else { Ternary::Depends }
    })
}

/// The common skeleton: any rule, of which all clauses, of which any match. A clause without matches holds; a match
/// without any condition does not (Istio never sends one, and ztunnel reads it like this).
fn any_rule(rules: &[Rule], mut test: impl FnMut(&Match) -> Ternary) -> Ternary {
    let mut best = Ternary::No;
    for rule in rules {
        let mut all = Ternary::Yes;
        for clause in &rule.clauses {
            if clause.matches.is_empty() {
                continue;
            }
            let mut any = Ternary::No;
            for m in &clause.matches {
                any = any.max(if *m == Match::default() { Ternary::No } else { test(m) });
                if any == Ternary::Yes {
                    break;
                }
            }
            all = all.min(any);
            if all == Ternary::No {
                break;
            }
        }
        best = best.max(all);
        if best == Ternary::Yes {
            break;
        }
    }
    best
}

/// Every port that the rules name.
pub(super) fn ports_named(rules: &[Rule]) -> impl Iterator<Item = u16> + '_ {
    rules
        .iter()
        .flat_map(|rule| &rule.clauses)
        .flat_map(|clause| &clause.matches)
        .flat_map(|m| m.destination_ports.iter().chain(&m.not_destination_ports).copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(s: &str) -> IpBlock {
        let (address, len) = s.split_once('/').unwrap();
        IpBlock { address: address.parse().unwrap(), prefix_len: len.parse().unwrap() }
    }

    #[test]
    fn blocks() {
        for (net, ip, expected) in [
            ("10.1.0.0/16", "10.1.255.3", true),
            ("10.1.7.7/16", "10.1.0.1", true),
            ("10.1.0.0/16", "10.2.0.0", false),
            ("0.0.0.0/0", "255.255.255.255", true),
            ("10.1.2.3/32", "10.1.2.3", true),
            ("10.1.2.3/32", "10.1.2.2", false),
            ("10.1.0.0/16", "::ffff:10.1.9.9", true),
            ("::ffff:10.1.0.0/112", "10.1.9.9", true),
            ("::ffff:10.1.0.0/112", "10.2.9.9", false),
            ("fd00::/8", "fd12::1", true),
            ("fd00::/8", "fe80::1", false),
            ("::/0", "fe80::1", true),
            ("::/0", "10.0.0.1", false),
            ("0.0.0.0/0", "fe80::1", false),
            ("10.0.0.0/33", "10.0.0.0", false),
        ] {
            assert_eq!(contains(&block(net), ip.parse().unwrap()), expected, "{ip} in {net}");
        }
    }
}
