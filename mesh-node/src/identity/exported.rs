//! Certificates on their way out of one daemon and into the next one.
//!
//! What comes in is checked as if the CA had sent it: the key is the certificate's, the identity is the one that it is
//! said to be, the chain verifies now. Deliberately absent: how it travels; see `keep` for the file.

use crate::tls::{CertError, WorkloadCert};
use base64::{Engine, engine::general_purpose::STANDARD};
use mesh_xds::model::{SpiffeError, SpiffeId};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A certificate with its key, to be kept or handed over. Holds a secret: for private files and sockets only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exported {
    identity: String,
    /// PKCS #8, in base64 as all that follows.
    key: String,
    /// Leaf first.
    chain: Vec<String>,
    roots: Vec<String>,
}

/// Why an exported certificate is not taken.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The identity is not one.
    #[error("{identity:?} in a kept certificate is not a SPIFFE ID; a new certificate is asked for")]
    Identity {
        /// What is written there.
        identity: String,
        /// Why.
        #[source]
        source: SpiffeError,
    },
    /// Not base64.
    #[error("the kept certificate of {id} has a {field} that is not base64; a new one is asked for")]
    Encoding {
        /// Whose.
        id: SpiffeId,
        /// The field.
        field: &'static str,
    },
    /// It does not hold what it promises, or has expired.
    #[error("a kept certificate is of no use; a new one is asked for")]
    Certificate(#[source] CertError),
    /// Too many.
    #[error("there are more kept certificates than identities that a node may have; {id} is left out")]
    TooMany {
        /// Who is left out.
        id: SpiffeId,
    },
}

impl Exported {
    pub(super) fn of(cert: &WorkloadCert) -> Self {
        let text = |der: &[CertificateDer<'_>]| der.iter().map(|c| STANDARD.encode(c)).collect();
        Self {
            identity: cert.id().to_string(),
            key: STANDARD.encode(cert.secret_key().secret_der()),
            chain: text(cert.chain()),
            roots: text(cert.root_certs()),
        }
    }

    /// Whose it says it is.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Checks everything and gives the certificate.
    pub(super) fn open(&self) -> Result<WorkloadCert, ImportError> {
        let id: SpiffeId = self.identity.parse().map_err(|source| ImportError::Identity {
            identity: self.identity.chars().take(256).collect(),
            source,
        })?;
        let bytes = |text: &String, field| {
            STANDARD.decode(text).map_err(|_| ImportError::Encoding { id: id.clone(), field })
        };
        let certs = |list: &[String], field| {
            list.iter().map(|c| bytes(c, field).map(CertificateDer::from)).collect::<Result<Vec<_>, _>>()
        };
        let (chain, roots) = (certs(&self.chain, "chain")?, certs(&self.roots, "roots")?);
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(bytes(&self.key, "key")?));
        WorkloadCert::new(&id, chain, key, &roots).map_err(ImportError::Certificate)
    }
}

/// Never shows the key.
impl fmt::Debug for Exported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exported").field("identity", &self.identity).finish_non_exhaustive()
    }
}
