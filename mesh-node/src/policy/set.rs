//! The policies of one workload, and the verdict on a connection.

use super::matcher::{ConnMeta, Subject, Ternary, matches_on_port, ports_named};
use mesh_xds::model::{Action, Authorization, Scope, StringMatch, Workload};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

/// Ports named by one workload's policies that are looked at one by one. Beyond it every port is strict.
const MAX_PORTS: usize = 1024;

/// What a policy set says about a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may pass.
    Allow {
        /// The key of the ALLOW policy that matched; `None` when no ALLOW policy applies to the workload.
        by: Option<Arc<str>>,
    },
    /// It is refused.
    Deny {
        /// What refused it.
        by: DeniedBy,
    },
}

impl Verdict {
    /// Whether the connection may pass.
    pub fn is_allow(&self) -> bool {
        matches!(self, Self::Allow { .. })
    }
}

/// What refused a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeniedBy {
    /// A DENY policy, by its key `NAMESPACE/NAME`.
    Policy(Arc<str>),
    /// A DENY policy that refuses whoever has no identity, as STRICT does; the client had none.
    Strict(Arc<str>),
    /// There are ALLOW policies and none matched.
    NoAllowMatched,
    /// The workload names a policy that we do not have (yet): until we do, nobody passes.
    MissingPolicy(Arc<str>),
}

impl fmt::Display for DeniedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(key) => write!(f, "policy {key}"),
            Self::Strict(key) => write!(f, "policy {key}: the client came without mutual TLS"),
            Self::NoAllowMatched => f.write_str("no ALLOW policy matched"),
            Self::MissingPolicy(key) => write!(f, "policy {key} is not known yet"),
        }
    }
}

/// Which ports of a workload may only be reached through the daemon.
///
/// A port is strict when some connection to it could be refused. For such a port the kernel must not let a
/// connection past us, not even when the daemon is down: what is not evaluated is not allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Strictness {
    /// For ports without an entry of their own.
    pub all: bool,
    /// Ports that differ from `all`.
    pub ports: BTreeMap<u16, bool>,
}

impl Strictness {
    /// Whether one port is strict.
    pub fn of(&self, port: u16) -> bool {
        self.ports.get(&port).copied().unwrap_or(self.all)
    }
}

#[derive(Debug)]
struct Entry {
    key: Arc<str>,
    /// Whether it matches clients without an identity only.
    identity_missing: bool,
    policy: Arc<Authorization>,
}

/// Whether every match of a policy demands that the client has no principal at all.
fn matches_only_strangers(policy: &Authorization) -> bool {
    let mut matches = policy.rules.iter().map(|rule| {
        rule.clauses.iter().any(|clause| {
            !clause.matches.is_empty()
                && clause.matches.iter().all(|m| m.not_principals.contains(&StringMatch::Presence))
        })
    });
    !policy.rules.is_empty() && matches.all(|strangers| strangers)
}

/// The policies that apply to one workload. Immutable; a change of policies makes a new one.
#[derive(Debug)]
pub struct PolicySet {
    trust_domain: Arc<str>,
    deny: Vec<Entry>,
    allow: Vec<Entry>,
    missing: Option<Arc<str>>,
}

impl PolicySet {
    /// Picks the policies for `workload`: global ones, those of its namespace, and those that it names. A policy that it
    /// names but `policies` lacks makes the set deny everything.
    pub fn for_workload<'a>(
        workload: &Workload,
        policies: impl IntoIterator<Item = &'a Arc<Authorization>>,
    ) -> Self {
        let mut named: BTreeSet<&str> = workload.policies.iter().map(String::as_str).collect();
        let picked: Vec<_> = policies
            .into_iter()
            .filter(|policy| match policy.scope {
                Scope::Global => true,
                Scope::Namespace => policy.name.namespace == workload.name.namespace,
                Scope::WorkloadSelector => named.remove(policy.key().as_str()),
            })
            .cloned()
            .collect();
        // A scope may have changed from selector to namespace while the workload still names the policy.
        for policy in &picked {
            named.remove(policy.key().as_str());
        }
        let missing = named.first().map(|key| Arc::from(*key));
        Self { missing, ..Self::of(&workload.trust_domain, picked) }
    }

    /// A set of exactly these policies, for a workload of this trust domain.
    pub fn of(trust_domain: &str, policies: impl IntoIterator<Item = Arc<Authorization>>) -> Self {
        let mut set = Self { trust_domain: trust_domain.into(), deny: vec![], allow: vec![], missing: None };
        for policy in policies {
            let identity_missing = matches_only_strangers(&policy);
            let entry = Entry { key: policy.key().into(), identity_missing, policy };
            match entry.policy.action {
                Action::Deny => set.deny.push(entry),
                Action::Allow => set.allow.push(entry),
            }
        }
        // The order decides only which of several matching policies is named; make it the same each time.
        set.deny.sort_by(|a, b| a.key.cmp(&b.key));
        set.allow.sort_by(|a, b| a.key.cmp(&b.key));
        set
    }

    /// Whether the answer may depend on the client's address: one and the same client may come from several.
    pub fn asks_for_source_address(&self) -> bool {
        let matches = |entry: &Entry| {
            let clauses = entry.policy.rules.iter().flat_map(|rule| &rule.clauses);
            let mut all = clauses.flat_map(|clause| &clause.matches);
            all.any(|m| !m.source_ips.is_empty() || !m.not_source_ips.is_empty())
        };
        self.deny.iter().chain(&self.allow).any(matches)
    }

    /// Whether another set gives the same answer to every connection, as far as equal policies tell.
    pub fn same(&self, other: &Self) -> bool {
        let equal = |a: &[Entry], b: &[Entry]| {
            let same = |(a, b): (&Entry, &Entry)| Arc::ptr_eq(&a.policy, &b.policy) || a.policy == b.policy;
            a.len() == b.len() && a.iter().zip(b).all(same)
        };
        self.trust_domain == other.trust_domain
            && self.missing == other.missing
            && equal(&self.deny, &other.deny)
            && equal(&self.allow, &other.allow)
    }

    /// How many policies are in it.
    pub fn len(&self) -> usize {
        self.deny.len() + self.allow.len()
    }

    /// Whether no policy applies.
    pub fn is_empty(&self) -> bool {
        self.len() == 0 && self.missing.is_none()
    }

    /// The keys of its policies, DENY first.
    pub fn keys(&self) -> impl Iterator<Item = &Arc<str>> {
        self.deny.iter().chain(&self.allow).map(|entry| &entry.key)
    }

    /// The verdict on a connection: DENY policies first; then, if there are ALLOW policies, one has to match.
    pub fn check(&self, conn: &ConnMeta) -> Verdict {
        if let Some(key) = &self.missing {
            return Verdict::Deny { by: DeniedBy::MissingPolicy(key.clone()) };
        }
        if self.is_empty() {
            return Verdict::Allow { by: None };
        }
        let subject = Subject::new(conn, &self.trust_domain);
        let find = |entries: &'_ [Entry]| entries.iter().position(|e| subject.matches(&e.policy.rules));
        if let Some(entry) = find(&self.deny).and_then(|at| self.deny.get(at)) {
            let key = entry.key.clone();
            let by = if entry.identity_missing { DeniedBy::Strict(key) } else { DeniedBy::Policy(key) };
            return Verdict::Deny { by };
        }
        if self.allow.is_empty() {
            return Verdict::Allow { by: None };
        }
        match find(&self.allow) {
            Some(at) => Verdict::Allow { by: self.allow.get(at).map(|e| e.key.clone()) },
            None => Verdict::Deny { by: DeniedBy::NoAllowMatched },
        }
    }

    /// Which ports may only be reached through the daemon.
    pub fn strictness(&self) -> Strictness {
        let ports: BTreeSet<u16> =
            self.deny.iter().chain(&self.allow).flat_map(|e| ports_named(&e.policy.rules)).collect();
        if ports.len() > MAX_PORTS {
            return Strictness { all: true, ports: BTreeMap::new() };
        }
        // Any port that no policy names stands for all of those.
        let other = (0..=u16::MAX).find(|port| !ports.contains(port));
        let all = other.is_none_or(|port| self.could_deny(port));
        let ports = ports.into_iter().map(|port| (port, self.could_deny(port)));
        Strictness { all, ports: ports.filter(|(_, strict)| *strict != all).collect() }
    }

    /// Whether some connection to this port could be refused.
    fn could_deny(&self, port: u16) -> bool {
        let certainly_allowed = self.allow.is_empty()
            || self.allow.iter().any(|e| matches_on_port(&e.policy.rules, port) == Ternary::Yes);
        self.missing.is_some()
            || !certainly_allowed
            || self.deny.iter().any(|e| matches_on_port(&e.policy.rules, port) != Ternary::No)
    }
}

#[cfg(test)]
mod tests;
