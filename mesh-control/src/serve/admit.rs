//! Who may have a discovery stream.

use crate::auth::{Authenticator, Caller, bearer};
use mesh_xds::{
    delta::Audience,
    grpc::{Admission, Admit},
    node::NodeInfo,
    wire::core::Node,
};
use std::sync::Arc;
use tonic::{Status, metadata::MetadataMap};

/// Admits whoever shows a valid bearer token.
#[derive(Clone)]
pub struct TokenAdmit {
    authenticator: Arc<dyn Authenticator>,
}

impl TokenAdmit {
    /// Admits what `authenticator` knows.
    pub fn new(authenticator: Arc<dyn Authenticator>) -> Self {
        Self { authenticator }
    }
}

impl TokenAdmit {
    async fn caller(&self, metadata: &MetadataMap) -> Result<Caller, Status> {
        let token = bearer(metadata.as_ref()).map_err(|e| Status::unauthenticated(e.to_string()))?;
        self.authenticator.authenticate(token).await.map_err(|e| Status::unauthenticated(e.to_string()))
    }
}

impl Admit for TokenAdmit {
    async fn authenticate(&self, metadata: &MetadataMap) -> Result<(), Status> {
        self.caller(metadata).await.map(drop)
    }

    async fn admit(&self, metadata: &MetadataMap, node: &Node) -> Result<Admission, Status> {
        let caller = self.caller(metadata).await?;
        let claims = claims(node);
        let label = match caller {
            Caller::Node { name } => {
                if !claims.node_name.is_empty() && claims.node_name != name {
                    return Err(Status::permission_denied(format!(
                        "the token belongs to node {name}, but the stream is for node {}; give each node its own token",
                        claims.node_name
                    )));
                }
                name
            }
            Caller::Workload { identity } => identity.to_string(),
        };
        Ok(Admission { audience: claims.audience, label })
    }
}

/// Admits everybody: for a listener on loopback.
#[derive(Clone, Copy, Debug)]
pub struct LoopbackAdmit;

impl Admit for LoopbackAdmit {
    async fn admit(&self, _: &MetadataMap, node: &Node) -> Result<Admission, Status> {
        let claims = claims(node);
        Ok(Admission { audience: claims.audience, label: format!("loopback {}", node.id) })
    }
}

struct Claims {
    node_name: String,
    audience: Audience,
}

/// What a client says about itself. A node id that cannot be read claims nothing; it gets what every client gets.
fn claims(node: &Node) -> Claims {
    match NodeInfo::from_wire(node) {
        Ok(info) => Claims { audience: info.audience(), node_name: info.node_name },
        Err(_) => Claims { node_name: String::new(), audience: Audience::Everyone },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::AuthError;
    use futures::future::{BoxFuture, ready};

    struct One;

    impl Authenticator for One {
        fn authenticate<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Caller, AuthError>> {
            let known = (token == "secret").then(|| Caller::Node { name: "n1".into() });
            Box::pin(ready(known.ok_or(AuthError::Unknown)))
        }
    }

    fn node(name: &str, extensions: bool) -> Node {
        NodeInfo {
            id: "ztunnel~10.0.0.1~z.istio-system~istio-system.svc.cluster.local".parse().unwrap(),
            node_name: name.into(),
            cluster_id: String::new(),
            locality: Default::default(),
            extensions,
        }
        .to_wire()
    }

    async fn admit(token: Option<&str>, node: &Node) -> Result<Admission, tonic::Code> {
        let mut metadata = MetadataMap::new();
        if let Some(token) = token {
            metadata.insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        TokenAdmit::new(Arc::new(One)).admit(&metadata, node).await.map_err(|s| s.code())
    }

    #[tokio::test]
    async fn a_token_is_needed_and_names_its_node() {
        use tonic::Code::{PermissionDenied, Unauthenticated};
        assert_eq!(admit(None, &node("n1", true)).await, Err(Unauthenticated));
        assert_eq!(admit(Some("other"), &node("n1", true)).await, Err(Unauthenticated));
        assert_eq!(admit(Some("secret"), &node("n2", true)).await, Err(PermissionDenied));
        let ours = admit(Some("secret"), &node("n1", true)).await.unwrap();
        assert_eq!((ours.audience, ours.label.as_str()), (Audience::Nodemesh, "n1"));
        // A ztunnel says less about itself, and sees less.
        let stock = admit(Some("secret"), &node("", false)).await.unwrap();
        assert_eq!((stock.audience, stock.label.as_str()), (Audience::Everyone, "n1"));
        let odd = Node { id: "something".into(), ..node("n1", true) };
        assert_eq!(admit(Some("secret"), &odd).await.unwrap().audience, Audience::Everyone);
    }
}
