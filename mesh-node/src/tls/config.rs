//! rustls configurations, built once per identity (server) and once per identity and expected peers (client).

use super::{
    ALPN_H2,
    cert::{CertCell, WorkloadCert},
    reject::{RejectReason, TlsReject},
    verify::{ClientVerifier, ServerVerifier},
};
use mesh_xds::model::SpiffeId;
use rustls::{
    ClientConfig, ServerConfig, SignatureScheme,
    client::{ResolvesClientCert, Resumption},
    crypto::{CryptoProvider, aws_lc_rs},
    server::{ClientHello, NoServerSessionStorage, ResolvesServerCert},
    sign::CertifiedKey,
    version::TLS13,
};
use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

/// Distinct sets of expected peers whose client configurations one identity keeps.
const MAX_CLIENT_CONFIGS: usize = 1024;

/// The cryptography of all workload TLS: AES-GCM suites, and key exchange with the post-quantum hybrid first (a
/// client then sends a plain X25519 share beside it, so that peers without the hybrid lose nothing).
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
            aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
        ],
        kx_groups: vec![
            aws_lc_rs::kx_group::X25519MLKEM768,
            aws_lc_rs::kx_group::X25519,
            aws_lc_rs::kx_group::SECP256R1,
            aws_lc_rs::kx_group::SECP384R1,
        ],
        ..aws_lc_rs::default_provider()
    })
});

/// The crypto provider of all workload TLS.
pub fn provider() -> Arc<CryptoProvider> {
    PROVIDER.clone()
}

/// One workload identity on this node: its current certificate and the TLS configurations over it.
#[derive(Debug)]
pub struct LocalIdentity {
    id: SpiffeId,
    cell: Arc<CertCell>,
    server: Arc<ServerConfig>,
    clients: Mutex<HashMap<BTreeSet<SpiffeId>, Arc<ClientConfig>>>,
}

impl LocalIdentity {
    /// An identity without a certificate yet.
    pub fn new(id: SpiffeId) -> Result<Self, TlsReject> {
        let cell = Arc::new(CertCell::new());
        let server = Arc::new(server_config(&cell, id.trust_domain())?);
        Ok(Self { id, cell, server, clients: Mutex::default() })
    }

    /// Whose it is.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The cell with the current certificate.
    pub fn cell(&self) -> &Arc<CertCell> {
        &self.cell
    }

    /// The certificate in force, or the refusal to hand to a caller who needs it.
    pub fn valid_cert(&self) -> Result<Arc<WorkloadCert>, TlsReject> {
        self.cell.valid().ok_or_else(|| {
            let what = if self.cell.current().is_some() { "has expired" } else { "has not been issued yet" };
            TlsReject::new(RejectReason::OwnCertificate, format!("our certificate for {} {what}", self.id))
        })
    }

    /// The server side's configuration.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// The client side's configuration that accepts exactly `expected` as servers.
    pub fn client_config(&self, expected: &BTreeSet<SpiffeId>) -> Result<Arc<ClientConfig>, TlsReject> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = clients.get(expected) {
            return Ok(config.clone());
        }
        if clients.len() >= MAX_CLIENT_CONFIGS {
            // Cheap to build again; what matters is that it cannot grow with the churn of the cluster.
            clients.clear();
        }
        let config = Arc::new(client_config(&self.cell, expected.clone())?);
        clients.insert(expected.clone(), config.clone());
        Ok(config)
    }
}

fn internal(error: &rustls::Error) -> TlsReject {
    TlsReject::new(RejectReason::Protocol, format!("TLS cannot be configured: {error}"))
}

fn server_config(cell: &Arc<CertCell>, trust_domain: &str) -> Result<ServerConfig, TlsReject> {
    let verifier = ClientVerifier { cell: cell.clone(), trust_domain: trust_domain.to_owned() };
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(|e| internal(&e))?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(Resolver { cell: cell.clone() }));
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn client_config(cell: &Arc<CertCell>, expected: BTreeSet<SpiffeId>) -> Result<ClientConfig, TlsReject> {
    let verifier = ServerVerifier { cell: cell.clone(), expected };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(|e| internal(&e))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(Resolver { cell: cell.clone() }));
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

/// Serves whatever certificate is current when a handshake asks.
#[derive(Debug)]
struct Resolver {
    cell: Arc<CertCell>,
}

impl Resolver {
    fn key(&self) -> Option<Arc<CertifiedKey>> {
        self.cell.valid().map(|cert| cert.certified())
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.key()
    }
}

impl ResolvesClientCert for Resolver {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.key()
    }

    fn has_certs(&self) -> bool {
        true
    }
}
