//! Clients of a pod's HBONE port that mean no good: each stops at another step of the protocol and keeps what it has.

use crate::{
    netns::NetNs,
    peer::{client_config, tls_connect},
    pki::Identity,
};
use anyhow::{Context, Result};
use rustls::ClientConfig;
use std::{
    io::Write,
    net::{SocketAddr, TcpStream},
    sync::Arc,
};
use tokio::{io::AsyncWriteExt, runtime::Runtime};

/// The beginning of a TLS record with a ClientHello that never comes.
const HALF_A_HELLO: [u8; 6] = [0x16, 0x03, 0x01, 0x02, 0x00, 0x01];

/// HTTP/2 connection preface and an empty SETTINGS frame.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// A HEADERS frame for stream 1, without END_HEADERS, that announces 4,096 bytes; and the first byte of them.
const HALF_HEADERS: &[u8] = b"\0\x10\0\x01\0\0\0\0\x01\x83";

/// How far an authenticated client goes before it falls silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// The TLS handshake.
    Tls,
    /// The HTTP/2 preface.
    Preface,
    /// The beginning of a request.
    HalfHeaders,
}

/// Opens `n` connections that begin a handshake and never go on. They last as long as the result.
pub fn half_open(netns: &NetNs, to: SocketAddr, n: usize) -> Result<Vec<TcpStream>> {
    netns.within(|| {
        let one = || -> Result<TcpStream> {
            let mut stream = TcpStream::connect(to).with_context(|| format!("connect to {to}"))?;
            stream.write_all(&HALF_A_HELLO)?;
            Ok(stream)
        };
        (0..n).map(|_| one()).collect()
    })
}

/// Connections of an authenticated client; closed when dropped.
pub struct Silent {
    // Dropped in this order: a stream outside of its runtime cannot be closed.
    streams: Vec<tokio_rustls::client::TlsStream<tokio::net::TcpStream>>,
    runtime: Runtime,
}

impl Silent {
    /// Opens `n` connections as `identity` and goes as far as `until`.
    pub fn open(netns: &NetNs, identity: Identity, to: SocketAddr, n: usize, until: Until) -> Result<Self> {
        let config: Arc<ClientConfig> = Arc::new(client_config(Some(identity))?);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let streams = netns.within(|| {
            runtime.block_on(async {
                let mut streams = Vec::new();
                for _ in 0..n {
                    let mut stream = tls_connect(&config, to).await?;
                    if until != Until::Tls {
                        stream.write_all(PREFACE).await?;
                    }
                    if until == Until::HalfHeaders {
                        stream.write_all(HALF_HEADERS).await?;
                    }
                    stream.flush().await?;
                    streams.push(stream);
                }
                anyhow::Ok(streams)
            })
        })?;
        Ok(Self { streams, runtime })
    }

    /// How many of them the server has closed by now.
    pub fn closed(&mut self) -> usize {
        use tokio::io::AsyncReadExt;
        let streams = &mut self.streams;
        self.runtime.block_on(async {
            let mut closed = 0;
            for stream in streams {
                let mut buffer = [0; 4096];
                let wait = std::time::Duration::from_millis(2);
                loop {
                    match tokio::time::timeout(wait, stream.read(&mut buffer)).await {
                        Ok(Ok(1..)) => {}
                        Ok(_) => {
                            closed += 1;
                            break;
                        }
                        Err(_) => break,
                    }
                }
            }
            closed
        })
    }
}
