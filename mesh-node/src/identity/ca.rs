//! The CA as the certificate manager sees it, and Istio's gRPC form of it.

use futures::future::BoxFuture;
use mesh_xds::{
    model::SpiffeId,
    wire::ca::{IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient},
};
use prost_types::{Struct, Value, value::Kind};
use std::{collections::BTreeMap, io, path::PathBuf, time::Duration};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    transport::Channel,
};

/// Tells the CA that a node asks on behalf of a workload.
const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";

/// Longest token file that is read, in bytes.
const MAX_TOKEN: u64 = 64 << 10;

/// Why the CA gave no certificate.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The token file cannot be read.
    #[error("cannot read the token file {path:?}; it must hold the node's bearer token")]
    Token {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The token is not fit for an HTTP header.
    #[error("the token in {path:?} is empty, too long, or has characters that a header cannot carry")]
    BadToken {
        /// The file.
        path: PathBuf,
    },
    /// The cluster id is not fit for an HTTP header.
    #[error("the cluster id {0:?} has characters that a header cannot carry")]
    BadClusterId(String),
    /// The CA refused, or could not be reached.
    #[error("the CA did not sign: {} ({})", .0.message(), .0.code())]
    Rpc(#[source] Box<Status>),
}

/// Signs certificates.
pub trait CaClient: Send + Sync + 'static {
    /// Asks for a certificate for `id` over the key of `csr_pem`, valid for about `ttl`. Answers with PEM texts, the leaf
    /// first and the root (or roots) in the last one.
    fn sign<'a>(
        &'a self,
        csr_pem: String,
        id: &'a SpiffeId,
        ttl: Duration,
    ) -> BoxFuture<'a, Result<Vec<String>, CaError>>;
}

/// A bearer token in a file that somebody else renews; read again for every request.
#[derive(Clone, Debug)]
pub struct TokenFile(pub PathBuf);

impl TokenFile {
    /// The value for the `authorization` header.
    pub async fn bearer(&self) -> Result<MetadataValue<Ascii>, CaError> {
        let path = &self.0;
        let unreadable = |source| CaError::Token { path: path.clone(), source };
        let size = tokio::fs::metadata(path).await.map_err(unreadable)?.len();
        if size > MAX_TOKEN {
            return Err(CaError::BadToken { path: path.clone() });
        }
        let text = tokio::fs::read_to_string(path).await.map_err(unreadable)?;
        let token = text.trim();
        let header = (!token.is_empty()).then(|| format!("Bearer {token}").parse::<MetadataValue<Ascii>>());
        match header {
            Some(Ok(mut value)) => {
                value.set_sensitive(true);
                Ok(value)
            }
            _ => Err(CaError::BadToken { path: path.clone() }),
        }
    }
}

/// `istio.v1.auth.IstioCertificateService` over a channel that the caller secured.
#[derive(Clone, Debug)]
pub struct IstioCa {
    client: IstioCertificateServiceClient<Channel>,
    token: Option<TokenFile>,
    cluster_id: MetadataValue<Ascii>,
}

impl IstioCa {
    /// A client over `channel`, which must be TLS with the control plane's root; the token would be exposed otherwise.
    pub fn new(channel: Channel, token: Option<TokenFile>, cluster_id: &str) -> Result<Self, CaError> {
        let cluster_id = cluster_id.parse().map_err(|_| CaError::BadClusterId(cluster_id.to_owned()))?;
        Ok(Self { client: IstioCertificateServiceClient::new(channel), token, cluster_id })
    }
}

impl CaClient for IstioCa {
    fn sign<'a>(
        &'a self,
        csr_pem: String,
        id: &'a SpiffeId,
        ttl: Duration,
    ) -> BoxFuture<'a, Result<Vec<String>, CaError>> {
        Box::pin(async move {
            let identity = Value { kind: Some(Kind::StringValue(id.to_string())) };
            let mut request = Request::new(IstioCertificateRequest {
                csr: csr_pem,
                validity_duration: i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX),
                metadata: Some(Struct {
                    fields: BTreeMap::from([(IMPERSONATED_IDENTITY.to_owned(), identity)]),
                }),
            });
            let metadata = request.metadata_mut();
            metadata.insert("clusterid", self.cluster_id.clone());
            if let Some(token) = &self.token {
                metadata.insert("authorization", token.bearer().await?);
            }
            let response = self.client.clone().create_certificate(request).await;
            Ok(response.map_err(|status| CaError::Rpc(Box::new(status)))?.into_inner().cert_chain)
        })
    }
}
