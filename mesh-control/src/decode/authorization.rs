//! AuthorizationPolicy (security.istio.io), reduced to what can be enforced on L4.
//!
//! What cannot be enforced on L4 never widens access: an ALLOW rule with an L7 attribute matches nothing, a DENY rule
//! loses the attribute and so refuses more, CUSTOM is treated as DENY. Every such change is a warning on the object.

use super::{loose_selector, peer_authentication::RawSelector, port};
use crate::{
    object::{AuthorizationPolicy, Effect, Object, ObjectKey, PolicyAction, PolicyTarget},
    report::{FieldPath, Issue},
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use mesh_xds::model::{Clause, IpBlock, Match, Rule, StringMatch};
use serde::{Deserialize, Deserializer, de::IgnoredAny};
use serde_yaml_ng::Value;
use std::net::IpAddr;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Raw {
    #[serde(rename = "apiVersion")]
    _api_version: IgnoredAny,
    #[serde(rename = "kind")]
    _kind: IgnoredAny,
    metadata: ObjectMeta,
    spec: Option<Spec>,
    #[serde(rename = "status")]
    _status: Option<IgnoredAny>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct Spec {
    selector: Option<RawSelector>,
    target_ref: Option<RawTarget>,
    #[serde(deserialize_with = "null_is_default")]
    target_refs: Vec<RawTarget>,
    #[serde(deserialize_with = "null_is_default")]
    rules: Vec<RawRule>,
    action: Option<String>,
    provider: Option<IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawTarget {
    group: Option<String>,
    kind: String,
    name: String,
    namespace: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawRule {
    #[serde(deserialize_with = "null_is_default")]
    from: Vec<RawFrom>,
    #[serde(deserialize_with = "null_is_default")]
    to: Vec<RawTo>,
    #[serde(deserialize_with = "null_is_default")]
    when: Vec<RawWhen>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFrom {
    source: Option<RawSource>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTo {
    operation: Option<RawOperation>,
}

type Strings = Option<Vec<String>>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawSource {
    principals: Strings,
    not_principals: Strings,
    request_principals: Strings,
    not_request_principals: Strings,
    namespaces: Strings,
    not_namespaces: Strings,
    service_accounts: Strings,
    not_service_accounts: Strings,
    ip_blocks: Strings,
    not_ip_blocks: Strings,
    remote_ip_blocks: Strings,
    not_remote_ip_blocks: Strings,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawOperation {
    hosts: Strings,
    not_hosts: Strings,
    ports: Strings,
    not_ports: Strings,
    methods: Strings,
    not_methods: Strings,
    paths: Strings,
    not_paths: Strings,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawWhen {
    key: String,
    values: Strings,
    not_values: Strings,
}

fn null_is_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(d: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

pub(super) fn decode(key: &ObjectKey, raw: &Raw, issues: &mut Vec<Issue>) -> Option<Object> {
    let empty = Spec::default();
    let spec = raw.spec.as_ref().unwrap_or(&empty);
    let target = target(key, spec, issues);
    let mut effect = Effect::Enforced;
    let action = match spec.action.as_deref() {
        None | Some("ALLOW") => PolicyAction::Allow,
        Some("DENY") => PolicyAction::Deny,
        Some("AUDIT") => {
            effect = Effect::None;
            issues.push(Issue::warning(
                "spec.action",
                "AUDIT is not supported; the policy has no effect",
                "remove it, or use ALLOW or DENY",
            ));
            PolicyAction::Allow
        }
        Some("CUSTOM") => {
            issues.push(Issue::warning(
                "spec.action",
                "CUSTOM is not supported; connections that its rules match are refused",
                "use ALLOW or DENY",
            ));
            PolicyAction::Deny
        }
        Some(other) => {
            issues.push(Issue::error(
                "spec.action",
                format!("{other:?} is not an action"),
                "use ALLOW or DENY",
            ));
            PolicyAction::Deny
        }
    };
    if spec.provider.is_some() && spec.action.as_deref() != Some("CUSTOM") {
        issues.push(Issue::error(
            "spec.provider",
            "a provider belongs to action CUSTOM only",
            "remove the provider",
        ));
    }
    let annotations = raw.metadata.annotations.as_ref();
    if annotations.and_then(|a| a.get("istio.io/dry-run")).is_some_and(|v| v == "true") {
        effect = Effect::None;
        issues.push(Issue::warning(
            FieldPath::from("metadata.annotations").key("istio.io/dry-run"),
            "dry run is on, so the policy has no effect",
            "remove the annotation to enforce it",
        ));
    }
    if action == PolicyAction::Deny && spec.rules.is_empty() {
        issues.push(Issue::warning(
            "spec.rules",
            "without rules this policy refuses nothing",
            "add a rule; an empty rule ({}) matches every connection",
        ));
    }
    let mut rules = Vec::new();
    for (i, rule) in spec.rules.iter().enumerate() {
        let at = FieldPath::from("spec.rules").index(i);
        rules.extend(
            RuleReader { action, namespace: &key.name.namespace, issues, unenforceable: Vec::new() }
                .rule(rule, &at),
        );
    }
    Some(Object::AuthorizationPolicy(AuthorizationPolicy {
        name: key.name.clone(),
        target,
        action,
        rules,
        effect,
    }))
}

fn target(key: &ObjectKey, spec: &Spec, issues: &mut Vec<Issue>) -> PolicyTarget {
    let selector = RawSelector::checked(spec.selector.as_ref(), issues);
    let single = spec.target_ref.iter().map(|t| (FieldPath::from("spec.targetRef"), t));
    let many = spec.target_refs.iter().enumerate();
    let many = many.map(|(i, t)| (FieldPath::from("spec.targetRefs").index(i), t));
    let mut services = Vec::new();
    for (at, t) in single.chain(many) {
        if selector.is_some() {
            issues.push(Issue::error(
                at,
                "a policy has either a selector or targetRefs",
                "remove one of the two",
            ));
            continue;
        }
        let group = t.group.as_deref().unwrap_or_default();
        if t.kind != "Service" || !matches!(group, "" | "core") {
            issues.push(Issue::error(
                at.key("kind"),
                format!("a policy cannot be bound to a {} here", t.kind),
                "bind it to a Service, or use a selector",
            ));
        } else if t.namespace.as_deref().is_some_and(|ns| ns != key.name.namespace) {
            issues.push(Issue::error(
                at.key("namespace"),
                "a policy is for services of its own namespace",
                "move the policy into the namespace of the service",
            ));
        } else {
            services.push(t.name.clone());
        }
    }
    match selector {
        Some(selector) => PolicyTarget::Selector(selector),
        None if spec.target_ref.is_some() || !spec.target_refs.is_empty() => PolicyTarget::Services(services),
        None => PolicyTarget::All,
    }
}

/// Refuses everything that the broken object may have been about: nothing is let through by a broken ALLOW (other
/// ALLOW policies still count), and everything is refused by a broken policy of any other action.
pub(super) fn fallback(key: &ObjectKey, value: &Value) -> Object {
    let action = value.get("spec").and_then(|s| s.get("action"));
    let allow = matches!(action.map(Value::as_str), None | Some(Some("ALLOW")));
    Object::AuthorizationPolicy(AuthorizationPolicy {
        name: key.name.clone(),
        target: loose_selector(value).map_or(PolicyTarget::All, PolicyTarget::Selector),
        action: if allow { PolicyAction::Allow } else { PolicyAction::Deny },
        rules: if allow { Vec::new() } else { vec![Rule::default()] },
        effect: Effect::Enforced,
    })
}

/// Reads one rule: one clause for `from`, one for `to`, up to two for each `when`.
struct RuleReader<'a> {
    action: PolicyAction,
    /// The policy's namespace.
    namespace: &'a str,
    issues: &'a mut Vec<Issue>,
    /// Fields that were set but cannot be enforced on L4.
    unenforceable: Vec<FieldPath>,
}

impl RuleReader<'_> {
    fn rule(mut self, raw: &RawRule, at: &FieldPath) -> Option<Rule> {
        let from: Vec<Match> = raw
            .from
            .iter()
            .enumerate()
            .map(|(i, f)| self.source(f.source.as_ref(), &at.key("from").index(i).key("source")))
            .collect();
        let to: Vec<Match> = raw
            .to
            .iter()
            .enumerate()
            .map(|(i, t)| self.operation(t.operation.as_ref(), &at.key("to").index(i).key("operation")))
            .collect();
        let mut clauses = vec![from, to];
        for (i, when) in raw.when.iter().enumerate() {
            let (positive, negative) = self.when(when, &at.key("when").index(i));
            clauses.extend([vec![positive], vec![negative]]);
        }
        if !self.unenforceable.is_empty() {
            let allow = self.action == PolicyAction::Allow;
            let (what, remedy) = if allow {
                ("cannot be checked on L4, so this rule allows nothing", "use a rule with L4 attributes only")
            } else {
                (
                    "cannot be checked on L4 and was left out, so this rule refuses more",
                    "remove it, or use L4 attributes only",
                )
            };
            for field in std::mem::take(&mut self.unenforceable) {
                let name = field.0.last().cloned().map(|s| FieldPath(vec![s]).to_string());
                self.issues.push(Issue::warning(
                    field,
                    format!("{} {what}", name.unwrap_or_default()),
                    remedy,
                ));
            }
            if allow {
                return None;
            }
        }
        // A match without conditions matches every connection, and with it its clause. On the wire an empty match
        // would match nothing, so such a clause is left out: that says the same.
        clauses.retain(|matches| !matches.is_empty() && !matches.contains(&Match::default()));
        Some(Rule { clauses: clauses.into_iter().map(|matches| Clause { matches }).collect() })
    }

    fn source(&mut self, raw: Option<&RawSource>, at: &FieldPath) -> Match {
        let Some(s) = raw else {
            self.nothing(at);
            return Match::default();
        };
        let all = [
            ("principals", &s.principals),
            ("notPrincipals", &s.not_principals),
            ("requestPrincipals", &s.request_principals),
            ("notRequestPrincipals", &s.not_request_principals),
            ("namespaces", &s.namespaces),
            ("notNamespaces", &s.not_namespaces),
            ("serviceAccounts", &s.service_accounts),
            ("notServiceAccounts", &s.not_service_accounts),
            ("ipBlocks", &s.ip_blocks),
            ("notIpBlocks", &s.not_ip_blocks),
            ("remoteIpBlocks", &s.remote_ip_blocks),
            ("notRemoteIpBlocks", &s.not_remote_ip_blocks),
        ];
        self.check_set(&all, at);
        for field in ["requestPrincipals", "notRequestPrincipals", "remoteIpBlocks", "notRemoteIpBlocks"] {
            self.not_on_l4(&all, field, at);
        }
        let set = |list: &Strings| list.as_ref().is_some_and(|l| !l.is_empty());
        if (set(&s.service_accounts) || set(&s.not_service_accounts))
            && [&s.principals, &s.not_principals, &s.namespaces, &s.not_namespaces].into_iter().any(set)
        {
            self.issues.push(Issue::error(
                at.key("serviceAccounts"),
                "service accounts cannot be combined with principals or namespaces",
                "write two rules, or use principals only",
            ));
        }
        let mut principals = self.principals(&s.principals, &at.key("principals"));
        principals.extend(self.service_accounts(&s.service_accounts, &at.key("serviceAccounts")));
        let mut not_principals = self.principals(&s.not_principals, &at.key("notPrincipals"));
        not_principals.extend(self.service_accounts(&s.not_service_accounts, &at.key("notServiceAccounts")));
        Match {
            namespaces: self.strings(&s.namespaces, &at.key("namespaces")),
            not_namespaces: self.strings(&s.not_namespaces, &at.key("notNamespaces")),
            principals,
            not_principals,
            source_ips: self.blocks(&s.ip_blocks, &at.key("ipBlocks")),
            not_source_ips: self.blocks(&s.not_ip_blocks, &at.key("notIpBlocks")),
            ..Match::default()
        }
    }

    fn operation(&mut self, raw: Option<&RawOperation>, at: &FieldPath) -> Match {
        let Some(o) = raw else {
            self.nothing(at);
            return Match::default();
        };
        let all = [
            ("hosts", &o.hosts),
            ("notHosts", &o.not_hosts),
            ("ports", &o.ports),
            ("notPorts", &o.not_ports),
            ("methods", &o.methods),
            ("notMethods", &o.not_methods),
            ("paths", &o.paths),
            ("notPaths", &o.not_paths),
        ];
        self.check_set(&all, at);
        for field in ["hosts", "notHosts", "methods", "notMethods", "paths", "notPaths"] {
            self.not_on_l4(&all, field, at);
        }
        Match {
            destination_ports: self.ports(&o.ports, &at.key("ports")),
            not_destination_ports: self.ports(&o.not_ports, &at.key("notPorts")),
            ..Match::default()
        }
    }

    /// The clause of `values` and the clause of `notValues`.
    fn when(&mut self, raw: &RawWhen, at: &FieldPath) -> (Match, Match) {
        self.check_set(&[("values", &raw.values), ("notValues", &raw.not_values)], at);
        let (yes, no) = (at.key("values"), at.key("notValues"));
        let (mut positive, mut negative) = (Match::default(), Match::default());
        match raw.key.as_str() {
            "source.ip" => {
                positive.source_ips = self.blocks(&raw.values, &yes);
                negative.not_source_ips = self.blocks(&raw.not_values, &no);
            }
            "source.namespace" => {
                positive.namespaces = self.strings(&raw.values, &yes);
                negative.not_namespaces = self.strings(&raw.not_values, &no);
            }
            "source.principal" => {
                positive.principals = self.principals(&raw.values, &yes);
                negative.not_principals = self.principals(&raw.not_values, &no);
            }
            "source.serviceAccount" => {
                positive.principals = self.service_accounts(&raw.values, &yes);
                negative.not_principals = self.service_accounts(&raw.not_values, &no);
            }
            "destination.ip" => {
                positive.destination_ips = self.blocks(&raw.values, &yes);
                negative.not_destination_ips = self.blocks(&raw.not_values, &no);
            }
            "destination.port" => {
                positive.destination_ports = self.ports(&raw.values, &yes);
                negative.not_destination_ports = self.ports(&raw.not_values, &no);
            }
            key if key.starts_with("request.")
                || key.starts_with("experimental.")
                || matches!(key, "remote.ip" | "connection.sni") =>
            {
                self.unenforceable.push(at.key("key"));
            }
            other => self.issues.push(Issue::error(
                at.key("key"),
                format!("{other:?} is not an attribute"),
                "use source.ip, source.namespace, source.principal, destination.ip or destination.port",
            )),
        }
        (positive, negative)
    }

    fn nothing(&mut self, at: &FieldPath) {
        self.issues.push(Issue::error(
            at.clone(),
            "it says nothing",
            "give at least one attribute, or leave the whole entry out to match everything",
        ));
    }

    fn check_set(&mut self, fields: &[(&str, &Strings)], at: &FieldPath) {
        if fields.iter().all(|(_, list)| list.as_ref().is_none_or(Vec::is_empty)) {
            self.nothing(at);
        }
        for (name, list) in fields {
            for (i, value) in list.iter().flatten().enumerate() {
                if value.is_empty() {
                    self.issues.push(Issue::error(
                        at.key(*name).index(i),
                        "the value is empty",
                        "write a value or remove the entry",
                    ));
                }
            }
        }
    }

    fn not_on_l4(&mut self, fields: &[(&str, &Strings)], name: &str, at: &FieldPath) {
        if fields.iter().any(|(n, list)| *n == name && list.as_ref().is_some_and(|l| !l.is_empty())) {
            self.unenforceable.push(at.key(name));
        }
    }

    fn strings(&mut self, list: &Strings, at: &FieldPath) -> Vec<StringMatch> {
        let mut found = Vec::new();
        for (i, text) in list.iter().flatten().enumerate() {
            let parsed = match (text.strip_prefix('*'), text.strip_suffix('*')) {
                _ if text == "*" => Some(StringMatch::Presence),
                (Some(rest), None) if !rest.contains('*') => Some(StringMatch::Suffix(rest.to_owned())),
                (None, Some(rest)) if !rest.contains('*') => Some(StringMatch::Prefix(rest.to_owned())),
                (None, None) if !text.contains('*') => Some(StringMatch::Exact(text.clone())),
                _ => None,
            };
            match parsed {
                Some(parsed) => found.push(parsed),
                None => self.issues.push(Issue::error(
                    at.index(i),
                    format!("{text:?} has a wildcard where none can be"),
                    "use one * at the beginning or at the end, or * alone",
                )),
            }
        }
        found
    }

    fn principals(&mut self, list: &Strings, at: &FieldPath) -> Vec<StringMatch> {
        for (i, text) in list.iter().flatten().enumerate() {
            if text.starts_with("spiffe://") {
                self.issues.push(Issue::error(
                    at.index(i),
                    "a principal is written without spiffe://",
                    format!("write {:?}", text.trim_start_matches("spiffe://")),
                ));
            }
        }
        self.strings(list, at)
    }

    /// `NAME` (of the policy's namespace) or `NAMESPACE/NAME`, in any trust domain. A trust domain has no slash, so
    /// the end of a principal names the account beyond doubt.
    fn service_accounts(&mut self, list: &Strings, at: &FieldPath) -> Vec<StringMatch> {
        let mut found = Vec::new();
        for (i, text) in list.iter().flatten().enumerate() {
            let (ns, sa) = text.split_once('/').unwrap_or((self.namespace, text));
            match mesh_xds::model::SpiffeId::new("any", ns, sa) {
                Ok(_) => found.push(StringMatch::Suffix(format!("/ns/{ns}/sa/{sa}"))),
                Err(_) => self.issues.push(Issue::error(
                    at.index(i),
                    format!("{text:?} is not a service account"),
                    "write NAME or NAMESPACE/NAME without wildcards",
                )),
            }
        }
        found
    }

    fn blocks(&mut self, list: &Strings, at: &FieldPath) -> Vec<IpBlock> {
        let mut found = Vec::new();
        for (i, text) in list.iter().flatten().enumerate() {
            match ip_block(text) {
                Some(block) => found.push(block),
                None => self.issues.push(Issue::error(
                    at.index(i),
                    format!("{text:?} is not an address block"),
                    "write an IP address, or a block like 10.0.0.0/8",
                )),
            }
        }
        found
    }

    fn ports(&mut self, list: &Strings, at: &FieldPath) -> Vec<u16> {
        let mut found = Vec::new();
        for (i, text) in list.iter().flatten().enumerate() {
            match text.parse::<i64>() {
                Ok(number) => found.extend(port(number, at.index(i), self.issues)),
                Err(_) => self.issues.push(Issue::error(
                    at.index(i),
                    format!("{text:?} is not a port"),
                    "use a number from 1 to 65535, in quotes",
                )),
            }
        }
        found
    }
}

fn ip_block(text: &str) -> Option<IpBlock> {
    let (address, len) = match text.split_once('/') {
        Some((address, len)) => (address, Some(len)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().ok()?;
    let max = if address.is_ipv4() { 32 } else { 128 };
    let prefix_len = match len {
        None => max,
        Some(len) if len.bytes().all(|b| b.is_ascii_digit()) => len.parse().ok().filter(|l| *l <= max)?,
        Some(_) => return None,
    };
    Some(IpBlock { address, prefix_len })
}
