//! Policies. What is not understood denies: see [`decode_authorization`].

use super::{
    AUTHORIZATION_TYPE, ConvertError, Decoded, Note, check_name, check_type, decode, ip_from_bytes,
    ip_to_wire, unknown,
};
use crate::model::{Action, Authorization, Clause, IpBlock, Match, NamespacedName, Rule, Scope, StringMatch};
use crate::wire::{Any, security as pb};
use pb::string_match::MatchType;

/// The wire form of a policy.
pub fn encode_authorization(a: &Authorization) -> pb::Authorization {
    pb::Authorization {
        name: a.name.name.clone(),
        namespace: a.name.namespace.clone(),
        scope: match a.scope {
            Scope::Global => pb::Scope::Global,
            Scope::Namespace => pb::Scope::Namespace,
            Scope::WorkloadSelector => pb::Scope::WorkloadSelector,
        }
        .into(),
        action: match a.action {
            Action::Allow => pb::Action::Allow,
            Action::Deny => pb::Action::Deny,
        }
        .into(),
        rules: a.rules.iter().map(rule_to_wire).collect(),
        dry_run: false,
    }
}

fn rule_to_wire(r: &Rule) -> pb::Rule {
    pb::Rule {
        clauses: r
            .clauses
            .iter()
            .map(|c| pb::Clause { matches: c.matches.iter().map(match_to_wire).collect() })
            .collect(),
    }
}

fn match_to_wire(m: &Match) -> pb::Match {
    let strings = |list: &[StringMatch]| list.iter().map(string_to_wire).collect();
    let blocks = |list: &[IpBlock]| {
        list.iter()
            .map(|b| pb::Address { address: ip_to_wire(b.address), length: b.prefix_len.into() })
            .collect()
    };
    let ports = |list: &[u16]| list.iter().copied().map(u32::from).collect();
    pb::Match {
        namespaces: strings(&m.namespaces),
        not_namespaces: strings(&m.not_namespaces),
        principals: strings(&m.principals),
        not_principals: strings(&m.not_principals),
        source_ips: blocks(&m.source_ips),
        not_source_ips: blocks(&m.not_source_ips),
        destination_ips: blocks(&m.destination_ips),
        not_destination_ips: blocks(&m.not_destination_ips),
        destination_ports: ports(&m.destination_ports),
        not_destination_ports: ports(&m.not_destination_ports),
        // In the model these are suffixes of principals, which says the same.
        service_accounts: Vec::new(),
        not_service_accounts: Vec::new(),
    }
}

fn string_to_wire(s: &StringMatch) -> pb::StringMatch {
    let match_type = match s {
        StringMatch::Exact(s) => MatchType::Exact(s.clone()),
        StringMatch::Prefix(s) => MatchType::Prefix(s.clone()),
        StringMatch::Suffix(s) => MatchType::Suffix(s.clone()),
        StringMatch::Presence => MatchType::Presence(()),
    };
    pb::StringMatch { match_type: Some(match_type) }
}

/// Reads a policy. Only bytes that are no policy at all, or a policy without a name, are an error; what is not
/// understood inside one closes it instead, so that a newer control plane can never open a hole:
///
/// - an unknown action, scope or field of the policy itself: it becomes a DENY of everything in its scope (an
///   unknown scope counts as the whole mesh);
/// - a rule of a DENY policy with anything unknown or malformed in it: the rule matches every connection;
/// - a rule of an ALLOW policy likewise: the rule matches none, and the policy still closes its scope to the rest.
///
/// A dry-run policy is read as one that never matches: it is there, and has no effect.
pub fn decode_authorization(name: &str, any: &Any) -> Result<Decoded<Authorization>, ConvertError> {
    check_type(name, any, AUTHORIZATION_TYPE)?;
    let policy: pb::Authorization = decode(name, any, AUTHORIZATION_TYPE)?;
    let key = NamespacedName {
        namespace: super::required(name, "authorization.namespace", policy.namespace)?,
        name: super::required(name, "authorization.name", policy.name)?,
    };
    check_name(name, key.to_string())?;
    let unknown = unknown::scan(&any.value);
    let mut notes = Vec::new();
    let closed = |scope, field, mut notes: Vec<Note>| {
        notes.push(Note::PolicyClosed { field });
        let rules = vec![Rule::default()];
        Decoded { value: Authorization { name: key.clone(), scope, action: Action::Deny, rules }, notes }
    };
    let scope = match pb::Scope::try_from(policy.scope) {
        Ok(pb::Scope::Global) => Scope::Global,
        Ok(pb::Scope::Namespace) => Scope::Namespace,
        Ok(pb::Scope::WorkloadSelector) => Scope::WorkloadSelector,
        Err(_) => return Ok(closed(Scope::Global, "authorization.scope", notes)),
    };
    if unknown.policy {
        return Ok(closed(scope, "authorization (a field of a newer version)", notes));
    }
    let action = match pb::Action::try_from(policy.action) {
        Ok(pb::Action::Allow) => Action::Allow,
        Ok(pb::Action::Deny) => Action::Deny,
        Err(_) => return Ok(closed(scope, "authorization.action", notes)),
    };
    if policy.dry_run {
        notes.push(Note::Unsupported { field: "authorization.dry_run", effect: "the policy has no effect" });
        let value = Authorization { name: key, scope, action: Action::Deny, rules: Vec::new() };
        return Ok(Decoded { value, notes });
    }
    let mut rules = Vec::with_capacity(policy.rules.len());
    for (index, rule) in policy.rules.into_iter().enumerate() {
        let known = if unknown.rules.get(index).copied().unwrap_or(true) {
            Err("a field of a newer version")
        } else {
            rule_from_wire(rule)
        };
        match (known, action) {
            (Ok(rule), _) => rules.push(rule),
            (Err(field), Action::Deny) => {
                notes.push(Note::RuleClosed { rule: index, field, effect: "it denies every connection" });
                rules.push(Rule::default());
            }
            (Err(field), Action::Allow) => {
                notes.push(Note::RuleClosed { rule: index, field, effect: "it allows no connection" });
            }
        }
    }
    Ok(Decoded { value: Authorization { name: key, scope, action, rules }, notes })
}

/// `Err`: the field that is not understood.
fn rule_from_wire(rule: pb::Rule) -> Result<Rule, &'static str> {
    let mut clauses = Vec::with_capacity(rule.clauses.len());
    for clause in rule.clauses {
        let matches = clause.matches.into_iter().map(match_from_wire).collect::<Result<_, _>>()?;
        clauses.push(Clause { matches });
    }
    Ok(Rule { clauses })
}

fn match_from_wire(m: pb::Match) -> Result<Match, &'static str> {
    let mut principals = strings(m.principals, "principals")?;
    let mut not_principals = strings(m.not_principals, "not_principals")?;
    // "This service account in any trust domain" is a suffix of the principal. Both lists at once would have to be
    // ANDed, which one list cannot say; Istio's own validation refuses such a policy.
    if !m.service_accounts.is_empty() && !principals.is_empty() {
        return Err("service_accounts together with principals");
    }
    principals.extend(service_accounts(m.service_accounts, "service_accounts")?);
    not_principals.extend(service_accounts(m.not_service_accounts, "not_service_accounts")?);
    Ok(Match {
        namespaces: strings(m.namespaces, "namespaces")?,
        not_namespaces: strings(m.not_namespaces, "not_namespaces")?,
        principals,
        not_principals,
        source_ips: blocks(m.source_ips, "source_ips")?,
        not_source_ips: blocks(m.not_source_ips, "not_source_ips")?,
        destination_ips: blocks(m.destination_ips, "destination_ips")?,
        not_destination_ips: blocks(m.not_destination_ips, "not_destination_ips")?,
        destination_ports: ports(m.destination_ports, "destination_ports")?,
        not_destination_ports: ports(m.not_destination_ports, "not_destination_ports")?,
    })
}

fn strings(list: Vec<pb::StringMatch>, field: &'static str) -> Result<Vec<StringMatch>, &'static str> {
    list.into_iter()
        .map(|s| match s.match_type {
            Some(MatchType::Exact(s)) => Ok(StringMatch::Exact(s)),
            Some(MatchType::Prefix(s)) => Ok(StringMatch::Prefix(s)),
            Some(MatchType::Suffix(s)) => Ok(StringMatch::Suffix(s)),
            Some(MatchType::Presence(())) => Ok(StringMatch::Presence),
            None => Err(field),
        })
        .collect()
}

fn service_accounts(
    list: Vec<pb::ServiceAccountMatch>,
    field: &'static str,
) -> Result<Vec<StringMatch>, &'static str> {
    list.into_iter()
        .map(|s| {
            if s.namespace.is_empty() || s.service_account.is_empty() {
                return Err(field);
            }
            Ok(StringMatch::Suffix(format!("/ns/{}/sa/{}", s.namespace, s.service_account)))
        })
        .collect()
}

fn blocks(list: Vec<pb::Address>, field: &'static str) -> Result<Vec<IpBlock>, &'static str> {
    list.into_iter()
        .map(|b| {
            let address = ip_from_bytes(&b.address).ok_or(field)?;
            let max = if address.is_ipv4() { 32 } else { 128 };
            let prefix_len = u8::try_from(b.length).ok().filter(|l| *l <= max).ok_or(field)?;
            Ok(IpBlock { address, prefix_len })
        })
        .collect()
}

fn ports(list: Vec<u32>, field: &'static str) -> Result<Vec<u16>, &'static str> {
    list.into_iter().map(|p| u16::try_from(p).ok().filter(|p| *p != 0).ok_or(field)).collect()
}
