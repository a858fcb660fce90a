//! `istio.v1.auth.IstioCertificateService`.
//!
//! A refusal has one of three codes: UNAUTHENTICATED (nobody knows the caller), PERMISSION_DENIED (the caller may not
//! have this identity), INVALID_ARGUMENT (the request is not well formed). Each is counted and logged by its reason.

use super::Current;
use crate::{
    admin::Metrics,
    auth::{Authenticator, Caller, bearer},
    ca::{Authority, Denied, SigningRequest, decide},
};
use mesh_xds::wire::ca::{
    IstioCertificateRequest, IstioCertificateResponse,
    istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer},
};
use prost_types::{Struct, value::Kind};
use std::{sync::Arc, time::Duration};
use time::OffsetDateTime;
use tonic::{Request, Response, Status, metadata::MetadataMap};

/// Istio's name for the identity that a node asks for.
const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";
/// The largest request that is read.
const MAX_REQUEST: usize = 64 << 10;

/// Signs certificates for callers with a valid token.
#[derive(Clone)]
pub struct CertificateService {
    authority: Arc<Authority>,
    authenticator: Arc<dyn Authenticator>,
    current: Current,
    metrics: Arc<Metrics>,
}

/// A refusal: for the caller, and its name in metrics.
struct Refusal {
    status: Status,
    reason: &'static str,
}

impl CertificateService {
    /// A service that signs with `authority` what `current` allows.
    pub fn new(
        authority: Arc<Authority>,
        authenticator: Arc<dyn Authenticator>,
        current: Current,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { authority, authenticator, current, metrics }
    }

    /// The tonic service.
    pub fn into_server(self) -> IstioCertificateServiceServer<Self> {
        IstioCertificateServiceServer::new(self).max_decoding_message_size(MAX_REQUEST)
    }

    async fn caller(&self, metadata: &MetadataMap) -> Result<Caller, Refusal> {
        let refuse = |e: crate::auth::AuthError| Refusal {
            status: Status::unauthenticated(e.to_string()),
            reason: e.reason(),
        };
        let token = bearer(metadata.as_ref()).map_err(refuse)?;
        self.authenticator.authenticate(token).await.map_err(refuse)
    }

    fn sign(
        &self,
        caller: &Caller,
        request: &IstioCertificateRequest,
        now: OffsetDateTime,
    ) -> Result<IstioCertificateResponse, Refusal> {
        let invalid = |message: String, reason| Refusal { status: Status::invalid_argument(message), reason };
        let csr = SigningRequest::from_pem(&request.csr).map_err(|e| {
            let cause = std::error::Error::source(&e).map(|c| format!(": {c}")).unwrap_or_default();
            invalid(format!("{e}{cause}"), "csr")
        })?;
        let wanted = match u64::try_from(request.validity_duration) {
            Ok(0) => None,
            Ok(seconds) => Some(Duration::from_secs(seconds)),
            Err(_) => {
                let message =
                    "validity_duration is negative; give seconds, or 0 for the longest that is allowed";
                return Err(invalid(message.into(), "validity"));
            }
        };
        let impersonated = impersonated(request.metadata.as_ref())
            .map_err(|message| invalid(message.into(), "impersonation_malformed"))?;
        let snapshot = self.current.load();
        let identity = decide(caller, impersonated, &csr, self.authority.trust_domain(), &snapshot).map_err(
            |denied: Denied| Refusal {
                reason: denied.reason(),
                status: if denied.is_malformed() {
                    Status::invalid_argument(denied.to_string())
                } else {
                    Status::permission_denied(denied.to_string())
                },
            },
        )?;
        let issued = self.authority.sign(&csr, &identity, wanted, now).map_err(|error| {
            tracing::error!(%identity, error = &error as &dyn std::error::Error, "a certificate could not be signed");
            let message = "the certificate could not be signed; see mesh-control's log";
            Refusal { status: Status::internal(message), reason: "internal" }
        })?;
        tracing::debug!(%identity, ?caller, not_after = %issued.not_after, "certificate issued");
        Ok(IstioCertificateResponse { cert_chain: issued.chain })
    }
}

/// The impersonated identity, if there is one.
fn impersonated(metadata: Option<&Struct>) -> Result<Option<&str>, &'static str> {
    let Some(value) = metadata.and_then(|m| m.fields.get(IMPERSONATED_IDENTITY)) else { return Ok(None) };
    match &value.kind {
        Some(Kind::StringValue(identity)) => Ok(Some(identity)),
        _ => Err("ImpersonatedIdentity is not a string; give the SPIFFE ID of a pod on the node"),
    }
}

#[tonic::async_trait]
impl IstioCertificateService for CertificateService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let result = match self.caller(&metadata).await {
            Ok(caller) => self.sign(&caller, &request, OffsetDateTime::now_utc()).inspect_err(|r| {
                tracing::warn!(
                    ?caller,
                    reason = r.reason,
                    message = r.status.message(),
                    "certificate refused"
                );
            }),
            Err(refusal) => {
                tracing::warn!(reason = refusal.reason, "certificate refused");
                Err(refusal)
            }
        };
        match result {
            Ok(response) => {
                self.metrics.certificate_issued();
                Ok(Response::new(response))
            }
            Err(refusal) => {
                self.metrics.certificate_refused(refusal.reason);
                Err(refusal.status)
            }
        }
    }
}
