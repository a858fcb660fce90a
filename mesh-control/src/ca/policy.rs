//! Which certificate a caller may have.
//!
//! A node gets certificates for the pods of the mesh that run on it, and for nothing else: whoever takes over a node
//! gains the identities of that node's pods only. A workload gets its own. Pure.

use super::csr::SigningRequest;
use crate::{auth::Caller, snapshot::Snapshot};
use mesh_xds::model::SpiffeId;

/// Why a request is refused. The text goes to the caller.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// A workload speaks for somebody else.
    #[error("ImpersonatedIdentity is for nodes; a workload asks for its own certificate without it")]
    NotANode,
    /// The impersonated identity is not one.
    #[error(
        "ImpersonatedIdentity {0:?} is not a workload identity; expected spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT"
    )]
    NotAnIdentity(String),
    /// Another trust domain.
    #[error("{identity} is not of the trust domain {expected}; this CA signs for no other")]
    TrustDomain {
        /// What was asked for.
        identity: String,
        /// Ours.
        expected: String,
    },
    /// No such pod there.
    #[error(
        "no pod of the mesh with the identity {identity} runs on node {node}; check the pod's node, its service account and that it is enrolled"
    )]
    NotOnNode {
        /// What was asked for.
        identity: String,
        /// The caller.
        node: String,
    },
    /// A node without impersonation.
    #[error("node {0} has no identity of its own; name the pod's in ImpersonatedIdentity")]
    NoIdentity(String),
    /// The CSR is for another identity.
    #[error("the csr is for {csr}, but the request is for {identity}; put the same identity into both")]
    Mismatch {
        /// In the CSR.
        csr: String,
        /// Authenticated or impersonated.
        identity: String,
    },
}

impl Denied {
    /// A short name for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotANode => "impersonation_not_by_node",
            Self::NotAnIdentity(_) => "not_an_identity",
            Self::TrustDomain { .. } => "trust_domain",
            Self::NotOnNode { .. } => "not_on_node",
            Self::NoIdentity(_) => "no_impersonation",
            Self::Mismatch { .. } => "csr_mismatch",
        }
    }

    /// Whether the request itself is malformed, rather than not allowed.
    pub fn is_malformed(&self) -> bool {
        matches!(self, Self::NotAnIdentity(_) | Self::NoIdentity(_))
    }
}

/// Decides which identity the certificate gets.
pub fn decide(
    caller: &Caller,
    impersonated: Option<&str>,
    request: &SigningRequest,
    trust_domain: &str,
    snapshot: &Snapshot,
) -> Result<SpiffeId, Denied> {
    let identity = match (caller, impersonated) {
        (Caller::Workload { .. }, Some(_)) => return Err(Denied::NotANode),
        (Caller::Workload { identity }, None) => identity.clone(),
        (Caller::Node { name }, None) => return Err(Denied::NoIdentity(name.clone())),
        (Caller::Node { name: node }, Some(text)) => {
            let identity: SpiffeId = text.parse().map_err(|_| Denied::NotAnIdentity(text.to_owned()))?;
            if identity.trust_domain() != trust_domain {
                let expected = trust_domain.to_owned();
                return Err(Denied::TrustDomain { identity: identity.to_string(), expected });
            }
            if !snapshot.runs_on(node, &identity) {
                return Err(Denied::NotOnNode { identity: identity.to_string(), node: node.clone() });
            }
            identity
        }
    };
    if identity.trust_domain() != trust_domain {
        let expected = trust_domain.to_owned();
        return Err(Denied::TrustDomain { identity: identity.to_string(), expected });
    }
    if *request.identity() != identity {
        return Err(Denied::Mismatch { csr: request.identity().to_string(), identity: identity.to_string() });
    }
    Ok(identity)
}
