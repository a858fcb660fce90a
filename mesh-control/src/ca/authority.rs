//! Root and intermediate, and the certificates that they sign.

use super::{
    csr::SigningRequest,
    store::{Pair, StoreError, pem, write_atomically},
};
use arc_swap::ArcSwap;
use mesh_xds::model::SpiffeId;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber, string::Ia5String,
};
use rustls_pki_types::CertificateDer;
use std::{
    fs,
    net::IpAddr,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use time::OffsetDateTime;

/// How long certificates live.
#[derive(Clone, Copy, Debug)]
pub struct Lifetimes {
    /// The root.
    pub root: Duration,
    /// The intermediate; replaced when a third of this is left.
    pub intermediate: Duration,
    /// The longest for workloads, and what they get when they do not ask for less.
    pub workload: Duration,
    /// Of our own server certificate.
    pub server: Duration,
    /// How far certificates reach into the past, for clocks that are behind.
    pub backdate: Duration,
}

const DAY: Duration = Duration::from_hours(24);

impl Default for Lifetimes {
    fn default() -> Self {
        Self {
            root: DAY * 3650,
            intermediate: DAY * 365,
            workload: DAY,
            server: DAY * 30,
            backdate: Duration::from_mins(2),
        }
    }
}

/// Why the authority cannot start or sign.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The pairs on disk.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Another process uses the directory.
    #[error(
        "the data directory {dir} is in use by another mesh-control; stop it or give this one another --data-dir"
    )]
    Locked {
        /// The directory.
        dir: PathBuf,
    },
    /// The root is at its end.
    #[error(
        "the root certificate in {path} expired; move the file away to start a new CA and give every node the new root"
    )]
    RootExpired {
        /// The file.
        path: PathBuf,
    },
    /// The intermediate was signed by another root.
    #[error(
        "the certificate in {path} was not signed by the root beside it; move that file away to have a new one made"
    )]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// Signing failed.
    #[error("a certificate could not be made")]
    Sign(#[from] rcgen::Error),
}

/// A certificate that was just signed.
#[derive(Clone, Debug)]
pub struct Issued {
    /// PEM, leaf first, root last.
    pub chain: Vec<String>,
    /// The end of its validity.
    pub not_after: OffsetDateTime,
}

struct Intermediate {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    not_after: OffsetDateTime,
    /// PEM of intermediate and root, which end every chain.
    tail: [String; 2],
}

/// The authority. One per data directory.
pub struct Authority {
    lifetimes: Lifetimes,
    trust_domain: String,
    dir: PathBuf,
    root: Pair,
    current: ArcSwap<Intermediate>,
    /// Held as long as the authority lives.
    _lock: fs::File,
}

impl Authority {
    /// Opens the CA in `data_dir`, or makes a new one when there is none.
    pub fn open(
        data_dir: &Path,
        trust_domain: &str,
        lifetimes: Lifetimes,
        now: OffsetDateTime,
    ) -> Result<Self, CaError> {
        let dir = data_dir.join("ca");
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| StoreError::Io { action, path, source }
        };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(io("create", &dir))?;
        let lock_path = dir.join("lock");
        let lock = fs::File::create(&lock_path).map_err(io("create", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(CaError::Locked { dir: data_dir.to_owned() }),
            Err(fs::TryLockError::Error(e)) => return Err(io("lock", &lock_path)(e).into()),
        }

        let root_path = dir.join("root.pem");
        let intermediate_path = dir.join("intermediate.pem");
        let root = match Pair::read(&root_path)? {
            Some(pair) => pair,
            None if intermediate_path.exists() => {
                // A root that was lost must not be replaced in silence: nodes trust the old one.
                return Err(StoreError::Incomplete {
                    path: root_path,
                    part: "content (the file is missing)",
                }
                .into());
            }
            None => {
                let pair = make_root(trust_domain, &lifetimes, now)?;
                pair.write(&root_path)?;
                pair
            }
        };
        if validity(&root.certificate).is_none_or(|(_, end)| end <= now) {
            return Err(CaError::RootExpired { path: root_path });
        }
        let pair = match Pair::read(&intermediate_path)? {
            Some(pair) => {
                let signed = signed_by(&pair.certificate, &root.certificate);
                signed.then_some(pair).ok_or(CaError::Foreign { path: intermediate_path })?
            }
            None => renew_intermediate(&dir, trust_domain, &root, &lifetimes, now)?,
        };
        // For the nodes, which need nothing else of this directory.
        write_atomically(&data_dir.join("root-cert.pem"), pem(&root.certificate).as_bytes(), 0o644)?;
        let current = ArcSwap::from_pointee(Intermediate::new(pair, &root)?);
        let trust_domain = trust_domain.to_owned();
        let authority = Self { lifetimes, trust_domain, dir, root, current, _lock: lock };
        authority.renew_if_due(now)?;
        Ok(authority)
    }

    /// The trust domain of all identities.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The root certificate as PEM.
    pub fn root_pem(&self) -> String {
        pem(&self.root.certificate)
    }

    /// When the intermediate ends.
    pub fn intermediate_not_after(&self) -> OffsetDateTime {
        self.current.load().not_after
    }

    /// Replaces the intermediate when a third of its life is left; true if it was replaced.
    pub fn renew_if_due(&self, now: OffsetDateTime) -> Result<bool, CaError> {
        let left = self.intermediate_not_after() - now;
        if left > self.lifetimes.intermediate / 3 {
            return Ok(false);
        }
        let pair = renew_intermediate(&self.dir, &self.trust_domain, &self.root, &self.lifetimes, now)?;
        self.current.store(Arc::new(Intermediate::new(pair, &self.root)?));
        Ok(true)
    }

    /// Signs a workload's certificate. The caller has decided that `identity` is the requester's right.
    pub fn sign(
        &self,
        request: &SigningRequest,
        identity: &SpiffeId,
        wanted: Option<Duration>,
        now: OffsetDateTime,
    ) -> Result<Issued, CaError> {
        let mut params = leaf_params()?;
        params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(identity.to_string())?)];
        let life = wanted.filter(|w| !w.is_zero()).unwrap_or(self.lifetimes.workload);
        self.sign_leaf(params, request.public_key(), life.min(self.lifetimes.workload), now)
    }

    /// Makes a key and a certificate for our own TLS endpoint.
    pub fn server_certificate(
        &self,
        dns_names: &[String],
        addresses: &[IpAddr],
        now: OffsetDateTime,
    ) -> Result<(KeyPair, Issued), CaError> {
        let mut params = leaf_params()?;
        let names = dns_names.iter().map(|name| Ok(SanType::DnsName(Ia5String::try_from(name.as_str())?)));
        params.subject_alt_names = names.collect::<Result<_, rcgen::Error>>()?;
        params.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let issued = self.sign_leaf(params, &key, self.lifetimes.server, now)?;
        Ok((key, issued))
    }

    fn sign_leaf(
        &self,
        mut params: CertificateParams,
        key: &impl rcgen::PublicKeyData,
        life: Duration,
        now: OffsetDateTime,
    ) -> Result<Issued, CaError> {
        let intermediate = self.current.load();
        let not_after = (now + life).min(intermediate.not_after);
        params.not_before = now - self.lifetimes.backdate;
        params.not_after = not_after;
        let leaf = params.signed_by(key, &intermediate.issuer)?;
        let [second, root] = intermediate.tail.clone();
        Ok(Issued { chain: vec![pem(leaf.der()), second, root], not_after })
    }
}

impl Intermediate {
    fn new(pair: Pair, root: &Pair) -> Result<Self, CaError> {
        let tail = [pem(&pair.certificate), pem(&root.certificate)];
        let issuer = Issuer::from_ca_cert_der(&pair.certificate, pair.key)?;
        let not_after = validity(&pair.certificate).map_or(OffsetDateTime::UNIX_EPOCH, |(_, end)| end);
        Ok(Self { issuer, certificate: pair.certificate, not_after, tail })
    }
}

impl std::fmt::Debug for Authority {
    /// Without keys.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bytes = self.current.load().certificate.len();
        f.debug_struct("Authority").field("dir", &self.dir).field("intermediate_bytes", &bytes).finish()
    }
}

fn leaf_params() -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::new(Vec::new())?;
    // The identity is the SAN alone.
    params.distinguished_name = DistinguishedName::new();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(serial());
    Ok(params)
}

fn ca_params(trust_domain: &str, name: &str, path_len: u8) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain);
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_len));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(serial());
    Ok(params)
}

/// 159 random bits: unique, positive, and within the 20 bytes of RFC 5280, 4.1.2.2.
fn serial() -> SerialNumber {
    let mut bytes: [u8; 20] = rand::random();
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

fn make_root(trust_domain: &str, lifetimes: &Lifetimes, now: OffsetDateTime) -> Result<Pair, CaError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = ca_params(trust_domain, "nodemesh root", 1)?;
    params.not_before = now - lifetimes.backdate;
    params.not_after = now + lifetimes.root;
    let certificate = params.self_signed(&key)?.der().clone();
    Ok(Pair { key, certificate })
}

fn renew_intermediate(
    dir: &Path,
    trust_domain: &str,
    root: &Pair,
    lifetimes: &Lifetimes,
    now: OffsetDateTime,
) -> Result<Pair, CaError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = ca_params(trust_domain, "nodemesh intermediate", 0)?;
    params.use_authority_key_identifier_extension = true;
    params.not_before = now - lifetimes.backdate;
    let root_end = validity(&root.certificate).map_or(now, |(_, end)| end);
    params.not_after = (now + lifetimes.intermediate).min(root_end);
    let issuer = Issuer::from_ca_cert_der(&root.certificate, &root.key)?;
    let certificate = params.signed_by(&key, &issuer)?.der().clone();
    let pair = Pair { key, certificate };
    pair.write(&dir.join("intermediate.pem"))?;
    Ok(pair)
}

/// Begin and end of a certificate; `None` if it cannot be parsed.
fn validity(certificate: &[u8]) -> Option<(OffsetDateTime, OffsetDateTime)> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let at = |t: x509_parser::time::ASN1Time| OffsetDateTime::from_unix_timestamp(t.timestamp()).ok();
    Some((at(parsed.validity().not_before)?, at(parsed.validity().not_after)?))
}

fn signed_by(certificate: &[u8], issuer: &[u8]) -> bool {
    let (Ok((_, certificate)), Ok((_, issuer))) =
        (x509_parser::parse_x509_certificate(certificate), x509_parser::parse_x509_certificate(issuer))
    else {
        return false;
    };
    certificate.verify_signature(Some(issuer.public_key())).is_ok()
}
