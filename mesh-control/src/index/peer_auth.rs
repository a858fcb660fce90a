//! PeerAuthentication as L4 policies, in the form that Istio gives ztunnel: a refusal of peers without an identity.
//!
//! A workload that is STRICT on every port lists one policy that is the same for all ([`STATIC_STRICT`], in the root
//! namespace). A workload with exceptions by port lists the converted form of its own object, which then says
//! everything: the mode that it inherits and the exceptions.

use super::{Index, of_namespace};
use crate::object::{MtlsMode, PeerAuthentication, Pod};
use mesh_xds::model::{Action, Authorization, Clause, Match, NamespacedName, Rule, Scope, StringMatch};

/// The policy that refuses plaintext on all ports. Underscores cannot be in a Kubernetes name, so nothing collides.
const STATIC_STRICT: &str = "istio_converted_static_strict";
/// Before the name of an object that was converted.
const CONVERTED: &str = "converted_peer_authentication_";

/// The resource name of the converted form.
pub(super) fn converted_name(name: &NamespacedName) -> NamespacedName {
    NamespacedName::new(&name.namespace, format!("{CONVERTED}{}", name.name))
}

/// Matches a peer that has shown no certificate.
fn without_identity() -> Match {
    Match { not_principals: vec![StringMatch::Presence], ..Match::default() }
}

fn deny(name: NamespacedName, clauses: Vec<Match>) -> Authorization {
    let clauses = clauses.into_iter().map(|m| Clause { matches: vec![m] }).collect();
    Authorization {
        name,
        scope: Scope::WorkloadSelector,
        action: Action::Deny,
        rules: vec![Rule { clauses }],
    }
}

/// The policy for workloads that are STRICT on every port.
pub(super) fn static_strict(root_namespace: &str) -> Authorization {
    deny(NamespacedName::new(root_namespace, STATIC_STRICT), vec![without_identity()])
}

/// What holds for one workload after inheritance.
struct Effective {
    strict: bool,
    /// Ports for which the opposite holds.
    exceptions: Vec<u16>,
}

impl Index {
    /// The oldest object without a selector in a namespace, and its mode.
    fn namespace_mode(&self, namespace: &str) -> MtlsMode {
        oldest(of_namespace(&self.peer_authentications, namespace).filter(|(_, p)| p.selector.is_none()))
            .map_or(MtlsMode::Unset, |p| p.mode)
    }

    /// STRICT or not, for a workload of `namespace` whose own mode is `own`.
    fn inherited(&self, namespace: &str, own: MtlsMode) -> bool {
        let root = || self.namespace_mode(&self.settings.root_namespace);
        let modes = [own, self.namespace_mode(namespace), root()];
        modes.into_iter().find(|m| *m != MtlsMode::Unset) == Some(MtlsMode::Strict)
    }

    fn effective(&self, object: &PeerAuthentication) -> Effective {
        let strict = self.inherited(&object.name.namespace, object.mode);
        let opposite = if strict { MtlsMode::Permissive } else { MtlsMode::Strict };
        let exceptions = object.ports.iter().filter(|(_, mode)| **mode == opposite);
        Effective { strict, exceptions: exceptions.map(|(port, _)| *port).collect() }
    }

    /// The policy that makes a pod's mTLS mode hold; `None` when it is PERMISSIVE throughout.
    pub(super) fn mtls_policy(&self, pod: &Pod) -> Option<NamespacedName> {
        let namespace = &pod.name.namespace;
        let own = of_namespace(&self.peer_authentications, namespace)
            .filter(|(_, p)| p.selector.as_ref().is_some_and(|s| s.matches(&pod.labels)));
        let effective = match oldest(own) {
            Some(object) => {
                let effective = self.effective(object);
                if !effective.exceptions.is_empty() {
                    return Some(converted_name(&object.name));
                }
                effective
            }
            None => Effective { strict: self.inherited(namespace, MtlsMode::Unset), exceptions: Vec::new() },
        };
        effective.strict.then(|| NamespacedName::new(&self.settings.root_namespace, STATIC_STRICT))
    }

    /// The converted form of an object with exceptions by port.
    pub(super) fn build_peer_authentication(&self, name: &NamespacedName) -> Option<Authorization> {
        let object = self.peer_authentications.get(name).filter(|p| p.selector.is_some())?;
        let Effective { strict, exceptions } = self.effective(object);
        if exceptions.is_empty() {
            return None;
        }
        let clauses = if strict {
            let other_ports = Match { not_destination_ports: exceptions, ..Match::default() };
            vec![without_identity(), other_ports]
        } else {
            vec![Match { destination_ports: exceptions, ..without_identity() }]
        };
        Some(deny(converted_name(name), clauses))
    }
}

/// Of several objects for the same workloads the oldest counts, then the first by name.
pub(super) fn oldest<'a>(
    objects: impl Iterator<Item = (&'a NamespacedName, &'a PeerAuthentication)>,
) -> Option<&'a PeerAuthentication> {
    objects.min_by_key(|(name, o)| (o.created.unwrap_or(i64::MAX), *name)).map(|(_, o)| o)
}
