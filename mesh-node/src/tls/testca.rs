//! A CA for tests: roots, intermediates, and certificates good and bad.

use super::{LocalIdentity, WorkloadCert};
use mesh_xds::model::SpiffeId;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

/// A root and an intermediate that signs.
pub(crate) struct TestCa {
    root: CertificateDer<'static>,
    intermediate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

/// What a leaf shall be like.
pub(crate) struct Leaf {
    pub(crate) uris: Vec<String>,
    pub(crate) dns: Vec<String>,
    pub(crate) from: SystemTime,
    pub(crate) until: SystemTime,
    pub(crate) usages: Vec<ExtendedKeyUsagePurpose>,
}

impl Leaf {
    pub(crate) fn of(uri: &str) -> Self {
        let now = SystemTime::now();
        Self {
            uris: vec![uri.to_owned()],
            dns: vec![],
            from: now - Duration::from_secs(60),
            until: now + Duration::from_secs(3600),
            usages: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
        }
    }

    /// Valid an hour ago, and not any more.
    pub(crate) fn expired(mut self) -> Self {
        self.from = SystemTime::now() - Duration::from_secs(7200);
        self.until = SystemTime::now() - Duration::from_secs(3600);
        self
    }

    pub(crate) fn lasting(mut self, ttl: Duration) -> Self {
        self.until = SystemTime::now() + ttl;
        self
    }
}

/// A chain without the root, and the leaf's key.
pub(crate) type Chain = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

impl TestCa {
    pub(crate) fn new() -> Self {
        let root_key = KeyPair::generate().unwrap();
        let root_params = ca_params("test root");
        let root = root_params.self_signed(&root_key).unwrap();
        let root_issuer = Issuer::new(root_params, root_key);
        let key = KeyPair::generate().unwrap();
        let params = ca_params("test intermediate");
        let intermediate = params.signed_by(&key, &root_issuer).unwrap();
        Self {
            root: root.der().clone(),
            intermediate: intermediate.der().clone(),
            issuer: Issuer::new(params, key),
        }
    }

    pub(crate) fn root(&self) -> CertificateDer<'static> {
        self.root.clone()
    }

    pub(crate) fn issue(&self, leaf: &Leaf) -> Chain {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names =
            leaf.uris.iter().map(|uri| SanType::URI(uri.clone().try_into().unwrap())).collect();
        let dns = leaf.dns.iter().map(|name| SanType::DnsName(name.clone().try_into().unwrap()));
        params.subject_alt_names.extend(dns);
        params.not_before = leaf.from.into();
        params.not_after = leaf.until.into();
        params.extended_key_usages = leaf.usages.clone();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let chain = vec![cert.der().clone(), self.intermediate.clone()];
        (chain, PrivateKeyDer::Pkcs8(key.serialize_der().into()))
    }

    /// Signs a request as the control plane does: PEM texts, leaf first, root last.
    pub(crate) fn sign_csr(&self, csr_pem: &str, ttl: Duration) -> Vec<String> {
        let mut csr = CertificateSigningRequestParams::from_pem(csr_pem).unwrap();
        csr.params.not_before = (SystemTime::now() - Duration::from_secs(60)).into();
        csr.params.not_after = (SystemTime::now() + ttl).into();
        csr.params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = csr.signed_by(&self.issuer).unwrap();
        vec![leaf.pem(), pem(&self.intermediate), pem(&self.root)]
    }

    /// A usable certificate for `id` whose holder trusts this CA.
    pub(crate) fn cert(&self, id: &SpiffeId) -> WorkloadCert {
        let (chain, key) = self.issue(&Leaf::of(&id.to_string()));
        WorkloadCert::new(id, chain, key, &[self.root()]).unwrap()
    }

    /// An identity with a certificate of this CA.
    pub(crate) fn identity(&self, id: &str) -> Arc<LocalIdentity> {
        let id: SpiffeId = id.parse().unwrap();
        let identity = LocalIdentity::new(id.clone()).unwrap();
        identity.cell().install(self.cert(&id));
        Arc::new(identity)
    }
}

pub(crate) fn pem(der: &CertificateDer<'_>) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> =
        text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}
