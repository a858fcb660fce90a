//! Handshakes with a deadline and typed failures.

use super::{
    ALPN_H2, LocalIdentity, ReadAhead,
    cert::Facts,
    reject::{RejectReason, TlsReject, take_verdict},
    verify,
};
use mesh_xds::model::SpiffeId;
use rustls::{CommonState, pki_types::ServerName};
use std::{
    collections::BTreeSet,
    future::{Future, poll_fn},
    io,
    net::IpAddr,
    pin::pin,
    task::Poll,
    time::{Duration, SystemTime},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

/// How long a handshake may take. A peer on the same network needs milliseconds.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// An authenticated peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Who it is, as its certificate proved.
    pub id: SpiffeId,
    /// When that proof ends.
    pub not_after: SystemTime,
}

/// Runs the server side of a handshake for the workload `local`.
pub async fn accept<IO>(
    io: IO,
    local: &LocalIdentity,
    limit: Duration,
) -> Result<(server::TlsStream<ReadAhead<IO>>, Peer), TlsReject>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    local.valid_cert()?;
    let stream = shake(TlsAcceptor::from(local.server_config()).accept(ReadAhead::new(io)), limit).await?;
    let peer = check(stream.get_ref().1)?;
    Ok((stream, peer))
}

/// Runs the client side of a handshake as the workload `local`, towards a server at `to` that must prove to be one of
/// `expected`. The address is for the record: neither SNI nor verification uses it.
pub async fn connect<IO>(
    io: IO,
    local: &LocalIdentity,
    expected: &BTreeSet<SpiffeId>,
    to: IpAddr,
    limit: Duration,
) -> Result<(client::TlsStream<ReadAhead<IO>>, Peer), TlsReject>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    local.valid_cert()?;
    let connector = TlsConnector::from(local.client_config(expected)?);
    let stream =
        shake(connector.connect(ServerName::IpAddress(to.into()), ReadAhead::new(io)), limit).await?;
    let peer = check(stream.get_ref().1)?;
    Ok((stream, peer))
}

/// Polls a handshake to its end, or to the deadline, and picks up what our verifier had to say.
async fn shake<T>(handshake: impl Future<Output = io::Result<T>>, limit: Duration) -> Result<T, TlsReject> {
    let mut handshake = pin!(handshake);
    let polled = poll_fn(|cx| {
        take_verdict();
        match handshake.as_mut().poll(cx) {
            Poll::Ready(Err(error)) => {
                Poll::Ready(Err(take_verdict().unwrap_or_else(|| TlsReject::from_io(&error))))
            }
            Poll::Ready(Ok(stream)) => Poll::Ready(Ok(stream)),
            Poll::Pending => Poll::Pending,
        }
    });
    timeout(limit, polled).await.unwrap_or_else(|_| {
        Err(TlsReject::new(
            RejectReason::HandshakeTimeout,
            format!("no handshake within {} ms", limit.as_millis()),
        ))
    })
}

/// What must hold once the handshake is done: ALPN was negotiated, and the peer has an identity. The verifier has
/// checked the certificate already.
fn check(state: &CommonState) -> Result<Peer, TlsReject> {
    let leaf = state
        .peer_certificates()
        .and_then(|chain| chain.first())
        .ok_or_else(|| TlsReject::new(RejectReason::NoCertificate, "the peer sent no certificate"))?;
    let bad = |detail: String| TlsReject::new(RejectReason::BadCertificate, detail);
    let sans = verify::uri_sans(leaf).map_err(|e| bad(e.to_string()))?;
    let id: SpiffeId = sans
        .first()
        .and_then(|san| san.parse().ok())
        .ok_or_else(|| TlsReject::new(RejectReason::NoIdentity, "the certificate carries no identity"))?;
    if state.alpn_protocol() != Some(ALPN_H2) {
        return Err(TlsReject::new(RejectReason::BadAlpn, "the peer did not negotiate h2")
            .presented(Some(id.to_string())));
    }
    let not_after = Facts::of(leaf).map_err(bad)?.not_after;
    Ok(Peer { id, not_after })
}
