//! TLS for the gRPC listener: our certificate, and connections after their handshake.
//!
//! Handshakes run beside each other, bounded in number and time, so that a client that stalls in its own does not hold
//! up the others. Clients are known by tokens, so no client certificate is asked for.

use super::connection::{Connection, Gate};
use crate::ca::{Authority, CaError};
use arc_swap::ArcSwapOption;
use rustls::{
    ServerConfig,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use std::{
    io,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};
use time::OffsetDateTime;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// Handshakes at a time.
const MAX_HANDSHAKES: usize = 1024;
/// Connections at a time. More wait in the listener's queue.
const MAX_CONNECTIONS: usize = 20_000;
/// The longest handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Why TLS cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The certificate could not be made.
    #[error("the server certificate could not be made")]
    Ca(#[from] CaError),
    /// The TLS library refuses it.
    #[error("the TLS library refuses the server certificate; check --dns-name and --ip-san")]
    Tls(#[from] rustls::Error),
    /// The CA's output cannot be read back.
    #[error("the CA's own certificate cannot be read back; check the files in DATA_DIR/ca")]
    Pem(#[from] rustls_pki_types::pem::Error),
}

/// Our certificate, replaced before it ends.
#[derive(Debug)]
pub struct ServerIdentity {
    dns_names: Vec<String>,
    addresses: Vec<IpAddr>,
    current: ArcSwapOption<CertifiedKey>,
    /// When the half of its life is over, in seconds since 1970.
    due: AtomicI64,
}

impl ServerIdentity {
    /// Makes a certificate for these names and addresses.
    pub fn new(
        authority: &Authority,
        dns_names: Vec<String>,
        addresses: Vec<IpAddr>,
        now: OffsetDateTime,
    ) -> Result<Self, TlsError> {
        let identity = Self { dns_names, addresses, current: ArcSwapOption::empty(), due: AtomicI64::new(0) };
        identity.renew(authority, now)?;
        Ok(identity)
    }

    /// Makes a new certificate; connections that exist keep theirs.
    pub fn renew(&self, authority: &Authority, now: OffsetDateTime) -> Result<(), TlsError> {
        let (key, issued) = authority.server_certificate(&self.dns_names, &self.addresses, now)?;
        // The root is left out: whoever trusts it has it.
        let chain = issued.chain[..issued.chain.len() - 1]
            .iter()
            .map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()))
            .collect::<Result<Vec<_>, _>>()?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key)?;
        self.current.store(Some(Arc::new(CertifiedKey::new(chain, key))));
        let half: time::Duration = (issued.not_after - now) / 2;
        self.due.store((now + half).unix_timestamp(), Ordering::Relaxed);
        Ok(())
    }

    /// Whether half of the certificate's life is over.
    pub fn is_due(&self, now: OffsetDateTime) -> bool {
        now.unix_timestamp() >= self.due.load(Ordering::Relaxed)
    }

    /// A TLS configuration that follows renewals.
    pub fn server_config(self: &Arc<Self>) -> Result<Arc<ServerConfig>, TlsError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
            .with_no_client_auth()
            .with_cert_resolver(self.clone());
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }
}

impl ResolvesServerCert for ServerIdentity {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current.load_full()
    }
}

/// Connections whose handshake is done.
#[derive(Debug)]
pub struct TlsIncoming {
    gate: Gate,
    config: Arc<ServerConfig>,
    handshakes: JoinSet<Option<TlsConnection>>,
}

/// A connection after its handshake.
pub type TlsConnection = Connection<TlsStream<TcpStream>>;

impl TlsIncoming {
    /// Accepts on `listener`.
    pub fn new(listener: TcpListener, config: Arc<ServerConfig>) -> Self {
        Self { gate: Gate::new(listener, MAX_CONNECTIONS), config, handshakes: JoinSet::new() }
    }

    /// As the stream that tonic takes. It never ends.
    pub fn into_stream(self) -> impl futures::Stream<Item = io::Result<TlsConnection>> + Send {
        futures::stream::unfold(self, |mut incoming| async move {
            let next = incoming.next().await;
            Some((Ok(next), incoming))
        })
    }

    async fn next(&mut self) -> TlsConnection {
        loop {
            tokio::select! {
                Some(done) = self.handshakes.join_next() => {
                    if let Ok(Some(connection)) = done {
                        return connection;
                    }
                }
                connection = self.gate.accept(), if self.handshakes.len() < MAX_HANDSHAKES => {
                    self.handshakes.spawn(handshake(self.config.clone().into(), connection));
                }
            }
        }
    }
}

async fn handshake(acceptor: TlsAcceptor, connection: Connection<TcpStream>) -> Option<TlsConnection> {
    let peer = connection.peer();
    let upgrade = connection.upgrade(async |stream| acceptor.accept(stream).await);
    match tokio::time::timeout(HANDSHAKE, upgrade).await {
        Ok(Ok(connection)) => Some(connection),
        Ok(Err(error)) => {
            tracing::info!(%peer, %error, "TLS handshake failed; the peer may not have our root-cert.pem");
            None
        }
        Err(_) => {
            tracing::info!(%peer, "TLS handshake took too long");
            None
        }
    }
}
