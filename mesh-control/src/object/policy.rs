//! The two security kinds, in the form in which the index attaches them to workloads.

use super::Labels;
use mesh_xds::model::{NamespacedName, Rule};
use std::collections::BTreeMap;

/// Labels that have to be there, all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector(pub Labels);

impl Selector {
    /// Whether `labels` have every label asked for. An empty selector matches everything.
    pub fn matches(&self, labels: &Labels) -> bool {
        has_all(labels, &self.0)
    }
}

/// Whether `labels` have every one of `wanted`, with the same value.
pub fn has_all(labels: &Labels, wanted: &Labels) -> bool {
    wanted.iter().all(|(k, v)| labels.get(k) == Some(v))
}

/// An mTLS mode as it is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MtlsMode {
    /// Inherited from the namespace, then from the mesh, then PERMISSIVE.
    #[default]
    Unset,
    /// Plaintext is taken as well. DISABLE is read as this, with a warning.
    Permissive,
    /// mTLS only.
    Strict,
}

/// Who has to use mTLS towards the selected workloads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAuthentication {
    /// Its name; the root namespace makes one without a selector mesh-wide.
    pub name: NamespacedName,
    /// Creation time in seconds since 1970; of two with the same scope the oldest counts.
    pub created: Option<i64>,
    /// The workloads of the namespace that it is for; `None` for all of them.
    pub selector: Option<Selector>,
    /// The mode of all ports.
    pub mode: MtlsMode,
    /// Exceptions by port of the workload.
    pub ports: BTreeMap<u16, MtlsMode>,
}

/// What a policy does on a match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyAction {
    /// Lets the connection through.
    Allow,
    /// Refuses it.
    Deny,
}

/// Whether a policy takes part in decisions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It does.
    Enforced,
    /// It is there for the record only: action AUDIT, or a dry run.
    None,
}

/// Which workloads a policy is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PolicyTarget {
    /// All of the namespace, or of the mesh when it is the root namespace.
    All,
    /// Those of the namespace (of the mesh, for the root namespace) with these labels.
    Selector(Selector),
    /// Those behind these services of the namespace (`targetRefs`).
    Services(Vec<String>),
}

/// Who may connect, in a form that can be enforced on L4. `crate::decode` has already turned what cannot into
/// something stricter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthorizationPolicy {
    /// Its name.
    pub name: NamespacedName,
    /// Which workloads it is for.
    pub target: PolicyTarget,
    /// What a match does.
    pub action: PolicyAction,
    /// ORed; none matches nothing.
    pub rules: Vec<Rule>,
    /// Whether it counts.
    pub effect: Effect,
}
