//! The services on their listeners.

use super::{
    CertificateService, TlsIncoming,
    admit::{LoopbackAdmit, TokenAdmit},
};
use mesh_xds::grpc::AdsService;
use std::{future::Future, time::Duration};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Error, Server};

/// How often an idle connection is asked for a sign of life.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// How long it has for that.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Streams on one connection at a time.
const MAX_STREAMS: u32 = 1024;

fn server() -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .max_concurrent_streams(Some(MAX_STREAMS))
        .tcp_nodelay(true)
}

/// Discovery and certificates over TLS, until `stop` is done and the last stream has ended.
pub async fn secure(
    incoming: TlsIncoming,
    discovery: AdsService<TokenAdmit>,
    certificates: CertificateService,
    stop: impl Future<Output = ()>,
) -> Result<(), Error> {
    server()
        .add_service(discovery.into_server())
        .add_service(certificates.into_server())
        .serve_with_incoming_shutdown(incoming.into_stream(), stop)
        .await
}

/// Discovery alone, without TLS and tokens. The caller has bound the listener to loopback.
pub async fn plaintext(
    listener: TcpListener,
    discovery: AdsService<LoopbackAdmit>,
    stop: impl Future<Output = ()>,
) -> Result<(), Error> {
    server()
        .add_service(discovery.into_server())
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop)
        .await
}
