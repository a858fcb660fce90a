//! PeerAuthentication (security.istio.io).

use super::{created, loose_selector, port};
use crate::{
    object::{MtlsMode, Object, ObjectKey, PeerAuthentication, Selector},
    report::{FieldPath, Issue},
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, Visitor},
};
use serde_yaml_ng::Value;
use std::{collections::BTreeMap, fmt};

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
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Spec {
    selector: Option<RawSelector>,
    mtls: Option<Mtls>,
    port_level_mtls: Option<BTreeMap<PortKey, Mtls>>,
}

/// `WorkloadSelector` of both security kinds.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct RawSelector {
    match_labels: Option<BTreeMap<String, String>>,
}

impl RawSelector {
    /// A selector without labels is the same as none.
    pub(super) fn checked(self_: Option<&Self>, issues: &mut Vec<Issue>) -> Option<Selector> {
        let labels = self_?.match_labels.clone().unwrap_or_default();
        for (key, value) in &labels {
            if key.is_empty() || key.contains('*') || value.contains('*') {
                issues.push(Issue::error(
                    FieldPath::from("spec.selector.matchLabels").key(key),
                    "a selector's labels cannot be empty or have wildcards",
                    "name the label and its exact value",
                ));
            }
        }
        (!labels.is_empty()).then_some(Selector(labels))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mtls {
    mode: Option<String>,
}

/// A port as the key of a mapping: YAML writes it as a number, JSON as a string.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct PortKey(String);

impl<'de> Deserialize<'de> for PortKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PortVisitor;
        impl Visitor<'_> for PortVisitor {
            type Value = PortKey;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port number")
            }
            fn visit_u64<E>(self, v: u64) -> Result<PortKey, E> {
                Ok(PortKey(v.to_string()))
            }
            fn visit_i64<E>(self, v: i64) -> Result<PortKey, E> {
                Ok(PortKey(v.to_string()))
            }
            fn visit_str<E>(self, v: &str) -> Result<PortKey, E> {
                Ok(PortKey(v.to_owned()))
            }
        }
        deserializer.deserialize_any(PortVisitor)
    }
}

pub(super) fn decode(key: &ObjectKey, raw: &Raw, issues: &mut Vec<Issue>) -> Option<Object> {
    let empty = Spec::default();
    let spec = raw.spec.as_ref().unwrap_or(&empty);
    let selector = RawSelector::checked(spec.selector.as_ref(), issues);
    let mode = mode(spec.mtls.as_ref(), &"spec.mtls.mode".into(), issues);
    let mut ports = BTreeMap::new();
    for (PortKey(text), mtls) in spec.port_level_mtls.iter().flatten() {
        let at = FieldPath::from("spec.portLevelMtls").key(text);
        let Ok(number) = text.parse::<i64>() else {
            issues.push(Issue::error(
                at,
                format!("{text:?} is not a port"),
                "use the number of a port of the workload",
            ));
            continue;
        };
        let Some(number) = port(number, at.clone(), issues) else { continue };
        ports.insert(number, self::mode(Some(mtls), &at.key("mode"), issues));
    }
    if !ports.is_empty() && selector.is_none() {
        issues.push(Issue::error(
            "spec.portLevelMtls",
            "modes for single ports need a selector",
            "add spec.selector.matchLabels, or set the mode for all ports in spec.mtls",
        ));
    }
    Some(Object::PeerAuthentication(PeerAuthentication {
        name: key.name.clone(),
        created: created(&raw.metadata),
        selector,
        mode,
        ports,
    }))
}

fn mode(mtls: Option<&Mtls>, at: &FieldPath, issues: &mut Vec<Issue>) -> MtlsMode {
    match mtls.and_then(|m| m.mode.as_deref()) {
        None | Some("UNSET") => MtlsMode::Unset,
        Some("PERMISSIVE") => MtlsMode::Permissive,
        Some("STRICT") => MtlsMode::Strict,
        Some("DISABLE") => {
            issues.push(Issue::warning(
                at.clone(),
                "DISABLE is treated as PERMISSIVE: a node always offers mTLS for a workload of the mesh",
                "write PERMISSIVE, or take the pod out of the mesh with the label nodemesh.io/enabled=false",
            ));
            MtlsMode::Permissive
        }
        Some(other) => {
            issues.push(Issue::error(
                at.clone(),
                format!("{other:?} is not an mTLS mode"),
                "use STRICT, PERMISSIVE or UNSET",
            ));
            MtlsMode::Unset
        }
    }
}

/// STRICT for whatever the broken object selects: nobody can be sure that it did not ask for that.
pub(super) fn fallback(key: &ObjectKey, value: &Value) -> Object {
    Object::PeerAuthentication(PeerAuthentication {
        name: key.name.clone(),
        created: None,
        selector: loose_selector(value),
        mode: MtlsMode::Strict,
        ports: BTreeMap::new(),
    })
}
