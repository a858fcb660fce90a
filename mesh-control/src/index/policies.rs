//! AuthorizationPolicy on the wire, and the policies that a workload lists.

use super::{Index, of_namespace, workloads::Backing};
use crate::object::{Effect, Pod, PolicyAction, PolicyTarget};
use mesh_xds::model::{Action, Authorization, NamespacedName, Scope};

impl Index {
    pub(super) fn build_authorization(&self, name: &NamespacedName) -> Option<Authorization> {
        let policy = self.authorization_policies.get(name).filter(|p| p.effect == Effect::Enforced)?;
        let scope = match policy.target {
            PolicyTarget::All if name.namespace == self.settings.root_namespace => Scope::Global,
            PolicyTarget::All => Scope::Namespace,
            PolicyTarget::Selector(_) | PolicyTarget::Services(_) => Scope::WorkloadSelector,
        };
        Some(Authorization {
            name: name.clone(),
            scope,
            action: match policy.action {
                PolicyAction::Allow => Action::Allow,
                PolicyAction::Deny => Action::Deny,
            },
            rules: policy.rules.clone(),
        })
    }

    /// The names of the policies that apply to a pod by selector or service, sorted. Those of namespace and mesh scope
    /// are found by the node itself.
    pub(super) fn policies_of(&self, pod: &Pod, backing: &Backing) -> Vec<String> {
        let root = &self.settings.root_namespace;
        let own = of_namespace(&self.authorization_policies, &pod.name.namespace);
        let global = of_namespace(&self.authorization_policies, root)
            .filter(|_| pod.name.namespace != *root)
            .filter(|(_, p)| matches!(p.target, PolicyTarget::Selector(_)));
        let mut found: Vec<String> = own
            .chain(global)
            .filter(|(_, policy)| policy.effect == Effect::Enforced)
            .filter(|(_, policy)| match &policy.target {
                PolicyTarget::All => false,
                PolicyTarget::Selector(selector) => selector.matches(&pod.labels),
                PolicyTarget::Services(names) => names.iter().any(|n| backing.services.contains(n)),
            })
            .map(|(name, _)| name.to_string())
            .collect();
        found.extend(self.mtls_policy(pod).map(|name| name.to_string()));
        found.sort();
        found
    }
}
