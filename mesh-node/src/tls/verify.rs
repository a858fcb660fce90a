//! Certificate verification: our own rules over webpki's path building.

use super::{
    cert::CertCell,
    provider,
    reject::{RejectReason, TlsReject, note_verdict},
};
use mesh_xds::model::SpiffeId;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use std::{
    collections::BTreeSet,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use webpki::{EndEntityCert, KeyUsage};

/// The URI SANs of a certificate, in order. Says nothing about its validity.
pub(crate) fn uri_sans(leaf: &CertificateDer<'_>) -> Result<Vec<String>, webpki::Error> {
    Ok(EndEntityCert::try_from(leaf)?.valid_uri_names().map(str::to_owned).collect())
}

/// Verifies that `leaf` leads to one of `roots`, is valid at `now`, and may be used for `usage`.
pub(crate) fn chain(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &[TrustAnchor<'_>],
    now: UnixTime,
    usage: KeyUsage,
) -> Result<(), webpki::Error> {
    let algorithms = provider().signature_verification_algorithms.all;
    EndEntityCert::try_from(leaf)?
        .verify_for_usage(algorithms, roots, intermediates, now, usage, None, None)
        .map(|_| ())
}

/// The form of time that webpki takes; times before 1970 become 1970.
pub(crate) fn unix_time(now: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO))
}

/// The one workload identity in a certificate, or why there is none.
fn identity(leaf: &CertificateDer<'_>) -> Result<SpiffeId, Refusal> {
    let sans = uri_sans(leaf)
        .map_err(|e| Refusal::new(CertificateError::BadEncoding, RejectReason::BadCertificate, &e))?;
    // SPIFFE X.509-SVID, section 2: exactly one URI SAN.
    match sans.as_slice() {
        [one] => one.parse().map_err(|e: mesh_xds::model::SpiffeError| {
            Refusal::new(CertificateError::NotValidForName, RejectReason::NoIdentity, &e)
                .presented(Some(one.clone()))
        }),
        [] => Err(Refusal::new(
            CertificateError::NotValidForName,
            RejectReason::NoIdentity,
            &"the certificate carries no URI SAN",
        )),
        more => Err(Refusal::new(
            CertificateError::NotValidForName,
            RejectReason::NoIdentity,
            &format!("the certificate carries {} URI SANs; a workload has exactly one", more.len()),
        )),
    }
}

/// An error in both forms: the one that decides about the alert, and ours.
struct Refusal {
    alert: CertificateError,
    reject: TlsReject,
}

impl Refusal {
    fn new(alert: CertificateError, reason: RejectReason, detail: &dyn fmt::Display) -> Self {
        Self { alert, reject: TlsReject::new(reason, detail.to_string()) }
    }

    fn presented(mut self, presented: Option<String>) -> Self {
        self.reject = self.reject.presented(presented);
        self
    }

    /// Keeps our form for the handshake future and hands the standard form to rustls.
    fn into_rustls(self) -> Error {
        note_verdict(self.reject);
        Error::InvalidCertificate(self.alert)
    }
}

fn verify_peer(
    cell: &CertCell,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
    usage: KeyUsage,
) -> Result<SpiffeId, Refusal> {
    let Some(own) = cell.current() else {
        return Err(Refusal::new(
            CertificateError::UnknownIssuer,
            RejectReason::OwnCertificate,
            &"there are no roots yet to judge the peer by",
        ));
    };
    if let Err(error) = chain(leaf, intermediates, own.roots(), now, usage) {
        let presented = uri_sans(leaf).ok().and_then(|sans| sans.into_iter().next());
        return Err(refuse_chain(&error).presented(presented));
    }
    identity(leaf)
}

fn refuse_chain(error: &webpki::Error) -> Refusal {
    use webpki::Error as W;
    let (alert, reason) = match error {
        W::CertExpired { .. } => (CertificateError::Expired, RejectReason::Expired),
        W::CertNotValidYet { .. } => (CertificateError::NotValidYet, RejectReason::NotYetValid),
        // A root of the same name with another key shows up as a bad signature.
        W::UnknownIssuer | W::InvalidSignatureForPublicKey => {
            (CertificateError::UnknownIssuer, RejectReason::UnknownCa)
        }
        W::RequiredEkuNotFoundContext(_) => (CertificateError::InvalidPurpose, RejectReason::BadCertificate),
        _ => (CertificateError::BadEncoding, RejectReason::BadCertificate),
    };
    Refusal::new(alert, reason, error)
}

/// Verifies servers: chain, and identity within the expected set. Names of hosts play no part.
#[derive(Debug)]
pub(crate) struct ServerVerifier {
    pub(crate) cell: Arc<CertCell>,
    pub(crate) expected: BTreeSet<SpiffeId>,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let id = verify_peer(&self.cell, end_entity, intermediates, now, KeyUsage::server_auth())
            .map_err(Refusal::into_rustls)?;
        if !self.expected.contains(&id) {
            let expected: Vec<String> = self.expected.iter().take(4).map(ToString::to_string).collect();
            let detail =
                format!("expected one of {} identities: {}", self.expected.len(), expected.join(", "));
            return Err(Refusal::new(
                CertificateError::NotValidForName,
                RejectReason::WrongIdentity,
                &detail,
            )
            .presented(Some(id.to_string()))
            .into_rustls());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Verifies clients: chain, and our own trust domain. Which identity may do what is the policy's matter.
#[derive(Debug)]
pub(crate) struct ClientVerifier {
    pub(crate) cell: Arc<CertCell>,
    pub(crate) trust_domain: String,
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // No hints: a workload has one certificate, and hints would freeze the roots of today into the configuration.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let id = verify_peer(&self.cell, end_entity, intermediates, now, KeyUsage::client_auth())
            .map_err(Refusal::into_rustls)?;
        if id.trust_domain() != self.trust_domain {
            return Err(Refusal::new(
                CertificateError::ApplicationVerificationFailure,
                RejectReason::WrongTrustDomain,
                &format!("our trust domain is {:?}", self.trust_domain),
            )
            .presented(Some(id.to_string()))
            .into_rustls());
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
