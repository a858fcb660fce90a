//! The way to the control plane: server-authenticated TLS, against the roots in a file and a host name.
//!
//! Not mutual, since a node proves itself to the control plane with a token; and not over workload certificates,
//! since those come from there.

use super::{ALPN_H2, provider};
use hyper_util::rt::TokioIo;
use mesh_xds::grpc::tune;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
    version::TLS13,
};
use std::{io, path::PathBuf, sync::Arc};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint, Uri};

/// Why there is no connection to the control plane.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The address is not `HOST:PORT`.
    #[error("the control plane's address {0:?} is not HOST:PORT")]
    Address(String),
    /// The name is neither a DNS name nor an IP address.
    #[error("the control plane's server name {0:?} is neither a DNS name nor an IP address")]
    ServerName(String),
    /// The root file cannot be read.
    #[error("cannot read the control plane's roots from {path:?}")]
    Roots {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The root file holds no usable certificate.
    #[error("{path:?} holds no root certificate in PEM{}", .detail.as_deref().map(|d| format!(": {d}")).unwrap_or_default())]
    NoRoot {
        /// The file.
        path: PathBuf,
        /// The parser's words.
        detail: Option<String>,
    },
    /// TCP or TLS failed.
    #[error("no TLS connection to the control plane at {address}")]
    Connect {
        /// The address.
        address: String,
        /// The system's or rustls's error.
        #[source]
        source: io::Error,
    },
    /// rustls refuses the configuration.
    #[error("TLS cannot be configured")]
    Tls(#[source] rustls::Error),
}

#[derive(Debug)]
struct Target {
    address: String,
    server_name: ServerName<'static>,
    roots: PathBuf,
}

/// Where the control plane is and how it proves itself.
#[derive(Clone, Debug)]
pub struct ControlPlane {
    target: Arc<Target>,
    endpoint: Endpoint,
}

impl ControlPlane {
    /// `address` is `HOST:PORT`; `server_name` is what the certificate must carry; `roots` is a PEM file that is read
    /// again for each connection, so that roots can be renewed.
    pub fn new(address: &str, server_name: &str, roots: PathBuf) -> Result<Self, ControlError> {
        let bad = || ControlError::Address(address.to_owned());
        // The connector below does the TLS, hence the scheme.
        let uri: Uri = format!("http://{address}").parse().map_err(|_| bad())?;
        if uri.host().is_none_or(str::is_empty) || uri.port_u16().is_none() || uri.path() != "/" {
            return Err(bad());
        }
        let name = server_name.trim_start_matches('[').trim_end_matches(']');
        let server_name = ServerName::try_from(name.to_owned())
            .map_err(|_| ControlError::ServerName(server_name.to_owned()))?;
        let endpoint = tune(Endpoint::from(uri));
        Ok(Self { target: Arc::new(Target { address: address.to_owned(), server_name, roots }), endpoint })
    }

    /// A channel that connects when it is first used, and again whenever it has to.
    pub fn channel(&self) -> Channel {
        let target = self.target.clone();
        self.endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| dial(target.clone())))
    }

    /// A channel that is connected.
    pub async fn connect(&self) -> Result<Channel, tonic::transport::Error> {
        let target = self.target.clone();
        self.endpoint.connect_with_connector(tower::service_fn(move |_: Uri| dial(target.clone()))).await
    }
}

async fn dial(target: Arc<Target>) -> Result<TokioIo<TlsStream<TcpStream>>, ControlError> {
    let connector = TlsConnector::from(Arc::new(config(&target).await?));
    let failed = |source| ControlError::Connect { address: target.address.clone(), source };
    let tcp = TcpStream::connect(&target.address).await.map_err(failed)?;
    tcp.set_nodelay(true).map_err(failed)?;
    let tls = connector.connect(target.server_name.clone(), tcp).await.map_err(failed)?;
    Ok(TokioIo::new(tls))
}

async fn config(target: &Target) -> Result<ClientConfig, ControlError> {
    let path = || target.roots.clone();
    let pem = tokio::fs::read(&target.roots)
        .await
        .map_err(|source| ControlError::Roots { path: path(), source })?;
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(&pem) {
        let root = root.map_err(|e| ControlError::NoRoot { path: path(), detail: Some(e.to_string()) })?;
        roots.add(root).map_err(|e| ControlError::NoRoot { path: path(), detail: Some(e.to_string()) })?;
    }
    if roots.is_empty() {
        return Err(ControlError::NoRoot { path: path(), detail: None });
    }
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(ControlError::Tls)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::testca::{Leaf, TestCa, pem};
    use rustls::ServerConfig;
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;

    /// A control plane whose certificate is for `mesh-control.test`.
    async fn control_plane(ca: &TestCa) -> String {
        let mut leaf = Leaf::of("spiffe://cluster.local/ns/nodemesh-system/sa/mesh-control");
        leaf.dns = vec!["mesh-control.test".into()];
        let (chain, key) = ca.issue(&leaf);
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(tcp).await else { return };
                    let Ok(mut connection) = h2::server::handshake(stream).await else { return };
                    while connection.accept().await.is_some() {}
                });
            }
        });
        address
    }

    fn all_causes(error: &dyn std::error::Error) -> String {
        std::iter::successors(Some(error), |e| e.source()).map(|e| e.to_string() + "; ").collect()
    }

    #[tokio::test]
    async fn only_the_right_roots_and_name_will_do() {
        let (ca, other) = (TestCa::new(), TestCa::new());
        let address = control_plane(&ca).await;
        let dir = tempfile::tempdir().unwrap();
        let roots = dir.path().join("root-cert.pem");
        let connect = |name: &str| {
            let plane = ControlPlane::new(&address, name, roots.clone()).unwrap();
            async move { plane.connect().await.map(|_| ()).map_err(|e| all_causes(&e)) }
        };
        let error = connect("mesh-control.test").await.unwrap_err();
        assert!(error.contains("root-cert.pem"), "{error}");
        std::fs::write(&roots, "nothing here").unwrap();
        let error = connect("mesh-control.test").await.unwrap_err();
        assert!(error.contains("no root certificate"), "{error}");
        std::fs::write(&roots, pem(&other.root())).unwrap();
        let error = connect("mesh-control.test").await.unwrap_err();
        // Both test roots have the same name, so it is the signature that gives the other one away.
        assert!(error.contains("invalid peer certificate: BadSignature"), "{error}");
        // The right root beside another one, as during a change of roots.
        std::fs::write(&roots, pem(&other.root()) + &pem(&ca.root())).unwrap();
        connect("mesh-control.test").await.unwrap();
        let error = connect("somebody-else.test").await.unwrap_err();
        assert!(error.contains("not valid for name"), "{error}");
    }

    #[test]
    fn addresses_and_names_are_checked() {
        let new = |address, name| ControlPlane::new(address, name, PathBuf::new());
        for good in ["istiod.istio-system.svc:15012", "10.0.0.1:15012", "[fd00::1]:15012"] {
            new(good, "istiod.istio-system.svc").unwrap();
        }
        new("[fd00::1]:15012", "[fd00::1]").unwrap();
        for bad in ["", "istiod", ":15012", "istiod:", "istiod:x", "http://istiod:15012", "istiod:15012/x"] {
            assert!(matches!(new(bad, "istiod"), Err(ControlError::Address(_))), "{bad:?}");
        }
        assert!(matches!(new("istiod:1", "a b"), Err(ControlError::ServerName(_))));
    }
}
