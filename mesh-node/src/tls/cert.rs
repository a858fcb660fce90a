//! A workload's certificate, checked when it is made, and the cell that holds the current one.

use super::{provider, verify};
use arc_swap::ArcSwapOption;
use mesh_xds::model::SpiffeId;
use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, TrustAnchor},
    sign::CertifiedKey,
};
use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::sync::watch;

/// Why a certificate cannot be used as a workload's own.
#[derive(Debug, thiserror::Error)]
pub enum CertError {
    /// The chain has no certificate.
    #[error("the certificate chain for {0} is empty; the CA must answer with the leaf first")]
    Empty(SpiffeId),
    /// No root came with it.
    #[error("no root certificate came with the certificate for {0}; the CA must answer with the root last")]
    NoRoot(SpiffeId),
    /// A certificate does not parse.
    #[error("the {which} certificate for {id} does not parse: {detail}")]
    Malformed {
        /// For whom it was meant.
        id: SpiffeId,
        /// `leaf` or `root`.
        which: &'static str,
        /// The parser's words.
        detail: String,
    },
    /// It is for somebody else.
    #[error("the certificate for {id} carries the identity {found:?}")]
    WrongIdentity {
        /// For whom it was meant.
        id: SpiffeId,
        /// The URI SANs found.
        found: Vec<String>,
    },
    /// The private key is not the certificate's.
    #[error("the certificate for {id} does not belong to our key")]
    WrongKey {
        /// For whom it was meant.
        id: SpiffeId,
        /// rustls's words.
        #[source]
        source: rustls::Error,
    },
    /// The chain does not verify against its own root, now.
    #[error("the certificate chain for {id} does not verify: {detail}")]
    Chain {
        /// For whom it was meant.
        id: SpiffeId,
        /// The verifier's words.
        detail: String,
    },
}

/// A certificate with its key and the roots to judge peers by. Valid when it was made: the key and the identity are
/// the certificate's, and the chain leads to the roots.
pub struct WorkloadCert {
    id: SpiffeId,
    certified: Arc<CertifiedKey>,
    /// The same key as it came: rustls does not give it back, and a successor needs it.
    key: PrivateKeyDer<'static>,
    roots: Vec<TrustAnchor<'static>>,
    root_certs: Vec<CertificateDer<'static>>,
    not_before: SystemTime,
    not_after: SystemTime,
    serial: String,
}

impl WorkloadCert {
    /// Checks the parts and puts them together. `chain` is leaf first, without the roots.
    pub fn new(
        id: &SpiffeId,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        roots: &[CertificateDer<'static>],
    ) -> Result<Self, CertError> {
        Self::new_at(id, chain, key, roots, SystemTime::now())
    }

    /// The same as seen at `now`, so that tests can have certificates that expired since.
    pub(crate) fn new_at(
        id: &SpiffeId,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        roots: &[CertificateDer<'static>],
        now: SystemTime,
    ) -> Result<Self, CertError> {
        let Some((leaf, intermediates)) = chain.split_first() else {
            return Err(CertError::Empty(id.clone()));
        };
        if roots.is_empty() {
            return Err(CertError::NoRoot(id.clone()));
        }
        let malformed = |which, detail: String| CertError::Malformed { id: id.clone(), which, detail };
        let anchors = roots
            .iter()
            .map(|root| webpki::anchor_from_trusted_cert(root).map(|anchor| anchor.to_owned()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| malformed("root", e.to_string()))?;
        let found = verify::uri_sans(leaf).map_err(|e| malformed("leaf", e.to_string()))?;
        if found.len() != 1 || found[0].parse::<SpiffeId>().ok().as_ref() != Some(id) {
            return Err(CertError::WrongIdentity { id: id.clone(), found });
        }
        for usage in [webpki::KeyUsage::server_auth(), webpki::KeyUsage::client_auth()] {
            verify::chain(leaf, intermediates, &anchors, verify::unix_time(now), usage)
                .map_err(|e| CertError::Chain { id: id.clone(), detail: e.to_string() })?;
        }
        let facts = Facts::of(leaf).map_err(|e| malformed("leaf", e))?;
        let certified = CertifiedKey::from_der(chain, key.clone_key(), &provider())
            .map_err(|source| CertError::WrongKey { id: id.clone(), source })?;
        Ok(Self {
            id: id.clone(),
            certified: Arc::new(certified),
            key,
            roots: anchors,
            root_certs: roots.to_vec(),
            not_before: facts.not_before,
            not_after: facts.not_after,
            serial: facts.serial,
        })
    }

    /// Whose it is.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// Start of validity.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// End of validity.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// The serial number in hexadecimal.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// Whether it is still valid.
    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        now >= self.not_before && now < self.not_after
    }

    /// The private key. Its only use is to keep it or to hand it to a successor.
    pub(crate) fn secret_key(&self) -> &PrivateKeyDer<'static> {
        &self.key
    }

    /// The chain, leaf first, without the roots.
    pub(crate) fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// The roots as certificates.
    pub(crate) fn root_certs(&self) -> &[CertificateDer<'static>] {
        &self.root_certs
    }

    pub(crate) fn certified(&self) -> Arc<CertifiedKey> {
        self.certified.clone()
    }

    pub(crate) fn roots(&self) -> &[TrustAnchor<'static>] {
        &self.roots
    }
}

/// Never shows the key.
impl fmt::Debug for WorkloadCert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadCert")
            .field("id", &self.id)
            .field("serial", &self.serial)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// What we read from a certificate beyond what webpki tells.
pub(crate) struct Facts {
    pub(crate) not_before: SystemTime,
    pub(crate) not_after: SystemTime,
    pub(crate) serial: String,
}

impl Facts {
    pub(crate) fn of(der: &CertificateDer<'_>) -> Result<Self, String> {
        use x509_parser::prelude::FromDer;
        let (_, cert) =
            x509_parser::certificate::X509Certificate::from_der(der).map_err(|e| e.to_string())?;
        let time = |t: x509_parser::time::ASN1Time| {
            u64::try_from(t.timestamp())
                .ok()
                .and_then(|s| UNIX_EPOCH.checked_add(Duration::from_secs(s)))
                .ok_or_else(|| format!("validity {t} is outside what this system can represent"))
        };
        Ok(Self {
            not_before: time(cert.validity().not_before)?,
            // The notAfter second itself still belongs to the validity (RFC 5280, 4.1.2.5).
            not_after: time(cert.validity().not_after)? + Duration::from_secs(1),
            serial: format!("{:x}", cert.tbs_certificate.serial),
        })
    }
}

/// The current certificate of one identity: written by the certificate manager, read at every handshake.
#[derive(Debug)]
pub struct CertCell {
    current: ArcSwapOption<WorkloadCert>,
    changed: watch::Sender<()>,
}

impl CertCell {
    pub(crate) fn new() -> Self {
        Self { current: ArcSwapOption::empty(), changed: watch::Sender::new(()) }
    }

    /// The certificate in force, if there is one.
    pub fn current(&self) -> Option<Arc<WorkloadCert>> {
        self.current.load_full()
    }

    /// The certificate in force, unless it has expired.
    pub fn valid(&self) -> Option<Arc<WorkloadCert>> {
        self.current().filter(|cert| cert.is_valid_at(SystemTime::now()))
    }

    /// Puts a new one in force for all handshakes from now on.
    pub fn install(&self, cert: WorkloadCert) {
        self.current.store(Some(Arc::new(cert)));
        self.changed.send_replace(());
    }

    /// Waits until there is a valid certificate. The caller sets the deadline.
    pub async fn ready(&self) -> Arc<WorkloadCert> {
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(cert) = self.valid() {
                return cert;
            }
            // The sender lives in self, so the channel cannot close while we wait.
            if changed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}
