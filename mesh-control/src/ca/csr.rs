//! A certificate signing request, checked.
//!
//! What a CSR says about itself is a wish. Its signature proves that the requester has the key; everything else that
//! ends up in the certificate is decided here. Deliberately absent: any trust in its extensions.

use mesh_xds::model::{SpiffeError, SpiffeId};
use rcgen::{PublicKeyData, SubjectPublicKeyInfo};
use rustls_pki_types::{CertificateSigningRequestDer, pem::PemObject};
use x509_parser::{
    certification_request::X509CertificationRequest,
    extensions::{GeneralName, ParsedExtension},
    oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY},
    prelude::FromDer,
};

/// Larger requests are not looked at; a P-256 request has about 400 bytes.
const MAX_PEM: usize = 16 << 10;

/// Why a CSR is refused.
#[derive(Debug, thiserror::Error)]
pub enum CsrError {
    /// Not PEM of a CSR.
    #[error("the csr is not one PEM block of type CERTIFICATE REQUEST; send the CSR as PEM")]
    Pem,
    /// Too large.
    #[error("the csr has {0} bytes, more than 16384; send one without extra extensions")]
    Size(usize),
    /// Not a PKCS #10 structure.
    #[error("the csr cannot be parsed; send a PKCS #10 request")]
    Parse,
    /// The requester does not have the key.
    #[error("the signature of the csr does not match its public key; sign it with the private key it is for")]
    Signature,
    /// Another kind of key.
    #[error("the public key of the csr is not ECDSA P-256; generate a P-256 key")]
    Key,
    /// Not exactly one URI.
    #[error("the csr has {0} subject alternative names; put in exactly one, the URI of the identity")]
    Names(usize),
    /// Its URI is no identity of a workload.
    #[error("the name in the csr is not a workload identity")]
    Identity(#[from] SpiffeError),
}

/// A request whose signature is right and whose one name is an identity.
#[derive(Debug)]
pub struct SigningRequest {
    key: SubjectPublicKeyInfo,
    identity: SpiffeId,
}

impl SigningRequest {
    /// Checks a PEM-encoded request.
    pub fn from_pem(pem: &str) -> Result<Self, CsrError> {
        if pem.len() > MAX_PEM {
            return Err(CsrError::Size(pem.len()));
        }
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).map_err(|_| CsrError::Pem)?;
        let (rest, csr) = X509CertificationRequest::from_der(&der).map_err(|_| CsrError::Parse)?;
        if !rest.is_empty() {
            return Err(CsrError::Parse);
        }
        let spki = &csr.certification_request_info.subject_pki;
        let curve = spki.algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok());
        if spki.algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY || curve != Some(OID_EC_P256) {
            return Err(CsrError::Key);
        }
        csr.verify_signature().map_err(|_| CsrError::Signature)?;
        let mut names = Vec::new();
        for extension in csr.requested_extensions().into_iter().flatten() {
            if let ParsedExtension::SubjectAlternativeName(san) = extension {
                names.extend(&san.general_names);
            }
        }
        let [GeneralName::URI(uri)] = names.as_slice() else { return Err(CsrError::Names(names.len())) };
        let identity = uri.parse()?;
        let key = SubjectPublicKeyInfo::from_der(spki.raw).map_err(|_| CsrError::Key)?;
        Ok(Self { key, identity })
    }

    /// The identity that the requester wishes for. It has to be checked.
    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    pub(super) fn public_key(&self) -> &(impl PublicKeyData + use<>) {
        &self.key
    }
}
