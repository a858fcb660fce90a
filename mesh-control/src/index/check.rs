//! What is wrong between objects: claims to one address, names that lead nowhere.

use super::{Index, of_namespace, peer_auth::oldest, workloads::selects};
use crate::{
    object::{Kind, ObjectKey, PolicyTarget, TargetRef},
    report::{FieldPath, Issue},
};
use mesh_xds::model::NamespacedName;
use std::{collections::BTreeSet, net::IpAddr};

impl Index {
    /// Everything that is wrong, in no particular order. Linear in the number of objects.
    pub(super) fn check(&self) -> Vec<(ObjectKey, Issue)> {
        let mut found = Vec::new();
        self.check_addresses(&mut found);
        self.check_services(&mut found);
        self.check_slices(&mut found);
        self.check_pods(&mut found);
        self.check_policies(&mut found);
        found
    }

    fn check_addresses(&self, found: &mut Vec<(ObjectKey, Issue)>) {
        let mut clash = |kind: Kind, loser: &NamespacedName, field: &str, ip: IpAddr, owner: String| {
            found.push((
                ObjectKey { kind, name: loser.clone() },
                Issue::error(
                    field,
                    format!("{ip} belongs to {owner}; this object is served without it"),
                    "give one of the two another address",
                ),
            ));
        };
        for (ip, names) in &self.services_by_ip {
            let Some(owner) = self.vip_owner(*ip) else { continue };
            for loser in names.iter().filter(|n| *n != owner) {
                clash(Kind::Service, loser, "spec.clusterIP", *ip, format!("Service {owner}"));
            }
        }
        for (ip, names) in &self.pods_by_ip {
            let Some(owner) = self.pod_ip_owner(*ip) else { continue };
            for loser in names.iter().filter(|n| *n != owner) {
                clash(Kind::Pod, loser, "status.podIP", *ip, format!("Pod {owner}"));
            }
            if let Some(service) = self.vip_owner(*ip) {
                clash(Kind::Service, service, "spec.clusterIP", *ip, format!("Pod {owner} as well"));
            }
        }
    }

    fn check_services(&self, found: &mut Vec<(ObjectKey, Issue)>) {
        for (name, service) in &self.services {
            let key = || ObjectKey { kind: Kind::Service, name: name.clone() };
            let by_label = !self.slices_by_service.contains_key(name) && !service.selector.is_empty();
            if !by_label {
                continue;
            }
            let mut pods = of_namespace(&self.pods, &name.namespace)
                .filter(|(_, p)| selects(service, &p.labels))
                .peekable();
            if pods.peek().is_none() {
                found.push((
                    key(),
                    Issue::warning(
                        "spec.selector",
                        "no pod has these labels, so the service has no endpoints",
                        "correct the selector, or the labels of the pods",
                    ),
                ));
                continue;
            }
            let pods: Vec<_> = pods.map(|(_, p)| p).collect();
            for (i, port) in service.ports.iter().enumerate() {
                let TargetRef::Name(wanted) = &port.target else { continue };
                let has = |p: &&crate::object::Pod| {
                    p.ports.iter().any(|c| c.name == *wanted && c.protocol == port.protocol)
                };
                if !pods.iter().any(has) {
                    found.push((
                        key(),
                        Issue::warning(
                            FieldPath::from("spec.ports").index(i).key("targetPort"),
                            format!("no pod of the service has a container port named {wanted:?}"),
                            "name a container port so, or give the number",
                        ),
                    ));
                }
            }
        }
    }

    fn check_slices(&self, found: &mut Vec<(ObjectKey, Issue)>) {
        for (name, slice) in &self.slices {
            let key = || ObjectKey { kind: Kind::EndpointSlice, name: name.clone() };
            let service = NamespacedName::new(&name.namespace, &slice.service);
            if !self.services.contains_key(&service) {
                found.push((
                    key(),
                    Issue::warning(
                        FieldPath::from("metadata.labels").key("kubernetes.io/service-name"),
                        format!("there is no Service {service}, so the endpoints are not used"),
                        "correct the label or add the Service",
                    ),
                ));
            }
            for (i, endpoint) in slice.endpoints.iter().enumerate() {
                let Some(pod) = &endpoint.pod else { continue };
                if !self.pods.contains_key(&NamespacedName::new(&name.namespace, pod)) {
                    found.push((
                        key(),
                        Issue::warning(
                            FieldPath::from("endpoints").index(i).key("targetRef"),
                            format!("there is no Pod {}/{pod}, so the endpoint is not used", name.namespace),
                            "add the Pod, or remove targetRef if the endpoint is no pod",
                        ),
                    ));
                }
            }
        }
    }

    fn check_pods(&self, found: &mut Vec<(ObjectKey, Issue)>) {
        let mut unknown_namespaces = BTreeSet::new();
        for (name, pod) in &self.pods {
            let mut warn = |field: &str, message: String, remedy: &str| {
                let key = ObjectKey { kind: Kind::Pod, name: name.clone() };
                found.push((key, Issue::warning(field, message, remedy)));
            };
            // Once for each namespace is enough.
            if !self.namespaces.contains_key(&name.namespace) && unknown_namespaces.insert(&name.namespace) {
                warn(
                    "metadata.namespace",
                    format!(
                        "there is no Namespace {}, so only labels of pods can enrol them",
                        name.namespace
                    ),
                    "add the Namespace object, with its labels",
                );
            }
            let account = NamespacedName::new(&name.namespace, &pod.service_account);
            if pod.service_account != "default" && !self.service_accounts.contains(&account) {
                warn(
                    "spec.serviceAccountName",
                    format!("there is no ServiceAccount {account}"),
                    "add the ServiceAccount, or correct the name",
                );
            }
            if !pod.node.is_empty() && !self.nodes.is_empty() && !self.nodes.contains_key(&pod.node) {
                warn(
                    "spec.nodeName",
                    format!("there is no Node {}, so the pod has no locality", pod.node),
                    "add the Node, or correct the name",
                );
            }
        }
    }

    fn check_policies(&self, found: &mut Vec<(ObjectKey, Issue)>) {
        for (name, policy) in &self.authorization_policies {
            let PolicyTarget::Services(services) = &policy.target else { continue };
            for service in services {
                let service = NamespacedName::new(&name.namespace, service);
                if !self.services.contains_key(&service) {
                    found.push((
                        ObjectKey { kind: Kind::AuthorizationPolicy, name: name.clone() },
                        Issue::warning(
                            "spec.targetRefs",
                            format!("there is no Service {service}, so the policy protects nothing"),
                            "correct the name or add the Service",
                        ),
                    ));
                }
            }
        }
        let namespaces: BTreeSet<_> = self.peer_authentications.keys().map(|n| &n.namespace).collect();
        for namespace in namespaces {
            let wide =
                || of_namespace(&self.peer_authentications, namespace).filter(|(_, p)| p.selector.is_none());
            let Some(winner) = oldest(wide()) else { continue };
            for (name, _) in wide().filter(|(name, _)| **name != winner.name) {
                found.push((
                    ObjectKey { kind: Kind::PeerAuthentication, name: name.clone() },
                    Issue::error(
                        "spec.selector",
                        format!(
                            "{} is for the whole namespace too, and it is the one that counts",
                            winner.name
                        ),
                        "remove one of the two, or add a selector",
                    ),
                ));
            }
        }
    }
}
