//! L4 authorization in the form of `istio.security.Authorization`.
//!
//! Evaluation (by mesh-node's policy engine): a policy matches when any of its rules matches; a rule matches when
//! all of its clauses match; a clause matches when any of its matches matches; a match matches when all of its
//! non-empty positive lists match and none of its negative lists does. DENY policies come first; if any ALLOW
//! policy applies, one of them has to match.
//!
//! Empty lists mean what they mean to Istio: a policy without rules never matches; a rule without clauses always
//! does (`crate::convert` uses that form for a DENY rule that it does not understand); a clause without matches is
//! always met; a match without conditions never matches.

use super::NamespacedName;
use std::net::IpAddr;

/// Where a policy applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Every workload of the mesh.
    Global,
    /// Every workload of the policy's namespace.
    Namespace,
    /// Workloads that name the policy in [`super::Workload::policies`].
    WorkloadSelector,
}

/// What a match leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Let the connection through.
    Allow,
    /// Refuse the connection.
    Deny,
}

/// A string match; `Presence` is met by any non-empty value.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum StringMatch {
    /// The whole string.
    Exact(String),
    /// The beginning.
    Prefix(String),
    /// The end.
    Suffix(String),
    /// Any value that is there at all.
    Presence,
}

/// An address block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IpBlock {
    /// Any address of the block.
    pub address: IpAddr,
    /// Prefix length in bits, at most 32 or 128.
    pub prefix_len: u8,
}

/// One match: lists are ORed inside, fields are ANDed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// Source namespaces.
    pub namespaces: Vec<StringMatch>,
    /// Source namespaces that must not match.
    pub not_namespaces: Vec<StringMatch>,
    /// Source principals, without `spiffe://`.
    pub principals: Vec<StringMatch>,
    /// Source principals that must not match.
    pub not_principals: Vec<StringMatch>,
    /// Source addresses.
    pub source_ips: Vec<IpBlock>,
    /// Source addresses that must not match.
    pub not_source_ips: Vec<IpBlock>,
    /// Destination addresses.
    pub destination_ips: Vec<IpBlock>,
    /// Destination addresses that must not match.
    pub not_destination_ips: Vec<IpBlock>,
    /// Destination ports.
    pub destination_ports: Vec<u16>,
    /// Destination ports that must not match.
    pub not_destination_ports: Vec<u16>,
}

/// Matches of which one is enough.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clause {
    /// ORed.
    pub matches: Vec<Match>,
}

/// Clauses which all have to match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// ANDed.
    pub clauses: Vec<Clause>,
}

/// An L4 policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorization {
    /// Its name and namespace; the namespace decides about [`Scope::Namespace`].
    pub name: NamespacedName,
    /// Where it applies.
    pub scope: Scope,
    /// ALLOW or DENY.
    pub action: Action,
    /// ORed. An empty list matches nothing.
    pub rules: Vec<Rule>,
}

impl Authorization {
    /// The xDS resource name, `NAMESPACE/NAME`.
    pub fn key(&self) -> String {
        self.name.to_string()
    }
}
