//! Peers that speak to the mesh on their own: a small HBONE client and a TLS server, good or bad as a test wants them.
//! Written against the wire format only (TLS 1.3, ALPN `h2`, HTTP/2 CONNECT), with none of the daemon's code.

use crate::{netns::NetNs, pki::Identity};
use anyhow::{Context, Result};
use bytes::Bytes;
use rustls::{
    ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::{
    future::Future,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// No client here waits longer.
const DEADLINE: Duration = Duration::from_secs(10);

/// How long bytes that get no answer are waited for.
const SILENCE: Duration = Duration::from_millis(500);

/// How an attempt to open a tunnel ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tunnel {
    /// The handshake, or the connection right after it, failed.
    Refused(String),
    /// The server answered CONNECT with this status, other than 200.
    Status(u16),
    /// The tunnel opened, and this came back for what was sent.
    Answered(String),
}

/// Opens an HBONE tunnel from inside `netns` to `to`, asks for `authority`, sends `line` and reads a line back.
pub fn open_tunnel(
    netns: &NetNs,
    identity: Option<Identity>,
    to: SocketAddr,
    authority: &str,
    line: &str,
) -> Result<Tunnel> {
    open_tunnel_with(netns, identity, to, authority, line, 0)
}

/// [`open_tunnel`] with a header of `padding` bytes that nobody needs.
pub fn open_tunnel_with(
    netns: &NetNs,
    identity: Option<Identity>,
    to: SocketAddr,
    authority: &str,
    line: &str,
    padding: usize,
) -> Result<Tunnel> {
    let config = Arc::new(client_config(identity)?);
    netns.within(|| {
        block_on(async {
            tokio::time::timeout(DEADLINE, tunnel(&config, to, authority, line, padding))
                .await
                .context("the tunnel hung")?
        })
    })
}

/// Sends bytes over TCP and gives what comes back until the other side ends the connection, or has been silent for a
/// while.
pub fn send_raw(netns: &NetNs, to: SocketAddr, bytes: &[u8]) -> Result<Vec<u8>> {
    netns.within(|| {
        block_on(async {
            let stream = TcpStream::connect(to).await.with_context(|| format!("connect to {to}"))?;
            Ok(exchange(stream, bytes).await)
        })
    })
}

/// [`send_raw`] inside TLS with the given application protocols. Nothing comes back if the handshake fails.
pub fn send_over_tls(
    netns: &NetNs,
    identity: Option<Identity>,
    to: SocketAddr,
    alpn: &[&[u8]],
    bytes: &[u8],
) -> Result<Vec<u8>> {
    let mut config = client_config(identity)?;
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let config = Arc::new(config);
    netns.within(|| {
        block_on(async {
            match tls_connect(&config, to).await {
                Ok(stream) => Ok(exchange(stream, bytes).await),
                Err(error) if error.is::<std::io::Error>() => Ok(Vec::new()),
                Err(error) => Err(error),
            }
        })
    })
}

async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, bytes: &[u8]) -> Vec<u8> {
    let mut answer = Vec::new();
    // Either side may have had enough at any moment; what counts is what came back.
    let _ = stream.write_all(bytes).await;
    let _ = stream.flush().await;
    let _ = tokio::time::timeout(SILENCE, (&mut stream).take(1 << 20).read_to_end(&mut answer)).await;
    answer
}

async fn tunnel(
    config: &Arc<ClientConfig>,
    to: SocketAddr,
    authority: &str,
    line: &str,
    padding: usize,
) -> Result<Tunnel> {
    let refused = |error: &dyn std::fmt::Display| Ok(Tunnel::Refused(error.to_string()));
    let tls = match tls_connect(config, to).await {
        Ok(tls) => tls,
        Err(error) if error.is::<std::io::Error>() => return refused(&error),
        Err(error) => return Err(error),
    };
    let (client, connection) = match h2::client::handshake(tls).await {
        Ok(pair) => pair,
        Err(error) => return refused(&error),
    };
    let driver = tokio::spawn(connection);
    let mut request = http::Request::builder().method(http::Method::CONNECT).uri(authority).body(())?;
    if padding > 0 {
        request.headers_mut().insert("x-padding", "p".repeat(padding).parse()?);
    }
    // In TLS 1.3 a refused client certificate shows here only: the client's handshake has ended before.
    let result = async {
        let (response, mut body) = client.ready().await?.send_request(request, false)?;
        let response = response.await?;
        let status = response.status().as_u16();
        if status != 200 {
            return Ok(Tunnel::Status(status));
        }
        body.send_data(Bytes::from(format!("{line}\n")), true)?;
        let mut answer = Vec::new();
        let mut stream = response.into_body();
        while let Some(data) = stream.data().await {
            let data = data?;
            stream.flow_control().release_capacity(data.len())?;
            answer.extend_from_slice(&data);
        }
        Ok(Tunnel::Answered(String::from_utf8_lossy(&answer).into_owned()))
    }
    .await;
    driver.abort();
    match result {
        Ok(tunnel) => Ok(tunnel),
        Err::<_, h2::Error>(error) => refused(&error),
    }
}

/// Connects and shakes hands. An error that is a bare `io::Error` is the handshake's.
pub(crate) async fn tls_connect(
    config: &Arc<ClientConfig>,
    to: SocketAddr,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let tcp = TcpStream::connect(to).await.with_context(|| format!("connect to {to}"))?;
    let name = ServerName::IpAddress(to.ip().into());
    Ok(TlsConnector::from(config.clone()).connect(name, tcp).await?)
}

/// A TLS server that accepts connections and never sends anything; ended when dropped.
#[derive(Debug)]
pub struct TlsServer {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl TlsServer {
    /// Listens on `ip`:15008 inside `netns` with a certificate of the test's choice. `None` for a server that speaks no
    /// TLS at all but greets in plain text.
    pub fn start(netns: &NetNs, ip: IpAddr, identity: Option<Identity>) -> Result<Self> {
        let config = identity.map(server_config).transpose()?;
        let listener = netns.within(|| {
            let listener =
                std::net::TcpListener::bind((ip, 15008)).with_context(|| format!("listen on {ip}:15008"))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        })?;
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let outcome = block_on(async move {
                let listener = TcpListener::from_std(listener)?;
                tokio::select! {
                    outcome = accept_all(listener, config) => outcome,
                    _ = stopped => Ok(()),
                }
            });
            if let Err(error) = outcome {
                eprintln!("test TLS server: {error:#}");
            }
        });
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for TlsServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn accept_all(listener: TcpListener, config: Option<Arc<ServerConfig>>) -> Result<()> {
    loop {
        let (mut tcp, _) = listener.accept().await?;
        let config = config.clone();
        tokio::spawn(async move {
            match config {
                None => {
                    let _ = tcp.write_all(b"220 no TLS here\r\n").await;
                    let _ = tcp.read(&mut [0; 1024]).await;
                }
                Some(config) => {
                    if let Ok(mut tls) = TlsAcceptor::from(config).accept(tcp).await {
                        let _ = tls.read(&mut [0; 1024]).await;
                    }
                }
            }
        });
    }
}

/// Runs a future on this thread.
fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(future)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

pub(crate) fn client_config(identity: Option<Identity>) -> Result<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer(provider())));
    let mut config = match identity {
        Some(identity) => builder.with_client_auth_cert(identity.chain, identity.key)?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.enable_sni = false;
    Ok(config)
}

fn server_config(identity: Identity) -> Result<Arc<ServerConfig>> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(identity.chain, identity.key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// The test's client takes any server: what is under test is the server's judgement of the client.
#[derive(Debug)]
struct AnyServer(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not offered".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
