//! Certificates that a test makes up: right ones from the mesh's own CA, and wrong ones of every kind.

use crate::daemons::Control;
use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, date_time_ymd,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use std::fs;

/// A CA that can issue workload certificates.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    /// What follows the leaf: intermediate, root.
    chain: Vec<CertificateDer<'static>>,
}

/// A certificate chain, leaf first, with the leaf's key.
pub struct Identity {
    /// The chain.
    pub chain: Vec<CertificateDer<'static>>,
    /// The key of its first certificate.
    pub key: PrivateKeyDer<'static>,
}

impl Ca {
    /// The mesh's CA: the intermediate from the control plane's data directory.
    pub fn of_mesh(control: &Control) -> Result<Self> {
        let path = control.data_dir.join("ca/intermediate.pem");
        let pem = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let key = PrivateKeyDer::from_pem_slice(&pem).context("the intermediate's key")?;
        let certificate = CertificateDer::from_pem_slice(&pem).context("the intermediate's certificate")?;
        let root = CertificateDer::from_pem_file(control.root_ca()).context("the root certificate")?;
        let issuer = Issuer::from_ca_cert_der(&certificate, KeyPair::try_from(&key)?)?;
        Ok(Self { issuer, chain: vec![certificate.clone(), root] })
    }

    /// A CA that nobody trusts.
    pub fn stranger() -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "a stranger's root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key)?;
        Ok(Self { issuer: Issuer::new(params, key), chain: vec![certificate.der().clone()] })
    }

    /// A certificate for a SPIFFE URI that is valid now.
    pub fn issue(&self, uri: &str) -> Result<Identity> {
        self.sign(uri, CertificateParams::default())
    }

    /// A certificate for a SPIFFE URI that was valid for a day, years ago.
    pub fn issue_expired(&self, uri: &str) -> Result<Identity> {
        let mut params = CertificateParams::default();
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2020, 1, 2);
        self.sign(uri, params)
    }

    fn sign(&self, uri: &str, mut params: CertificateParams) -> Result<Identity> {
        let key = KeyPair::generate()?;
        params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = params.signed_by(&key, &self.issuer)?;
        let mut chain = vec![leaf.der().clone()];
        chain.extend(self.chain.iter().cloned());
        Ok(Identity { chain, key: PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)? })
    }
}
