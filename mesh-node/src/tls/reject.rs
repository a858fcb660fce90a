//! Why a TLS handshake failed, in terms that an operator can count and search for.

use rustls::{AlertDescription, CertificateError, InvalidMessage};
use std::{cell::RefCell, fmt, io};

/// The kind of a refusal. [`RejectReason::label`] is stable: it is a metric label and a log field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RejectReason {
    /// The peer's certificate is good, but for an identity that was not expected.
    WrongIdentity,
    /// A certificate of the peer's chain has expired.
    Expired,
    /// A certificate of the peer's chain is not valid yet.
    NotYetValid,
    /// The chain does not lead to one of our roots.
    UnknownCa,
    /// The peer's identity belongs to another trust domain.
    WrongTrustDomain,
    /// The client sent no certificate.
    NoCertificate,
    /// The certificate does not carry exactly one workload SPIFFE URI.
    NoIdentity,
    /// The certificate is malformed, badly signed, or not meant for this use.
    BadCertificate,
    /// The peer does not speak TLS at all (plaintext).
    NotTls,
    /// No common TLS version, cipher suite or key exchange; TLS 1.2 clients land here.
    Incompatible,
    /// The peer did not negotiate `h2`.
    BadAlpn,
    /// The handshake did not finish in time.
    HandshakeTimeout,
    /// The peer refused us with a TLS alert.
    PeerRefused,
    /// The peer closed or reset the connection during the handshake.
    Disconnected,
    /// This node has no valid certificate for its own side.
    OwnCertificate,
    /// Any other violation of the protocol.
    Protocol,
}

impl RejectReason {
    /// Every reason, for metric families that start at zero.
    pub const ALL: [Self; 16] = [
        Self::WrongIdentity,
        Self::Expired,
        Self::NotYetValid,
        Self::UnknownCa,
        Self::WrongTrustDomain,
        Self::NoCertificate,
        Self::NoIdentity,
        Self::BadCertificate,
        Self::NotTls,
        Self::Incompatible,
        Self::BadAlpn,
        Self::HandshakeTimeout,
        Self::PeerRefused,
        Self::Disconnected,
        Self::OwnCertificate,
        Self::Protocol,
    ];

    /// The reason as a metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::WrongIdentity => "wrong_identity",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::UnknownCa => "unknown_ca",
            Self::WrongTrustDomain => "wrong_trust_domain",
            Self::NoCertificate => "no_certificate",
            Self::NoIdentity => "no_identity",
            Self::BadCertificate => "bad_certificate",
            Self::NotTls => "not_tls",
            Self::Incompatible => "incompatible",
            Self::BadAlpn => "bad_alpn",
            Self::HandshakeTimeout => "handshake_timeout",
            Self::PeerRefused => "peer_refused",
            Self::Disconnected => "disconnected",
            Self::OwnCertificate => "own_certificate",
            Self::Protocol => "protocol",
        }
    }
}

impl fmt::Display for RejectReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// A failed handshake.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("TLS handshake failed ({reason}): {detail}{}", presented_suffix(.presented.as_deref()))]
pub struct TlsReject {
    /// What kind of failure it was.
    pub reason: RejectReason,
    /// The identity in the certificate that the peer presented, at most 256 bytes. It is a claim: for
    /// [`RejectReason::UnknownCa`] and [`RejectReason::BadCertificate`] nothing vouches for it.
    pub presented: Option<String>,
    /// One line for the log.
    pub detail: String,
}

fn presented_suffix(presented: Option<&str>) -> String {
    presented.map(|p| format!("; the peer presented {p:?}")).unwrap_or_default()
}

impl TlsReject {
    pub(crate) fn new(reason: RejectReason, detail: impl Into<String>) -> Self {
        Self { reason, presented: None, detail: detail.into() }
    }

    pub(crate) fn presented(mut self, presented: Option<String>) -> Self {
        self.presented = presented.map(|mut p| {
            let end = (0..=256.min(p.len())).rev().find(|&i| p.is_char_boundary(i)).unwrap_or(0);
            p.truncate(end);
            p
        });
        self
    }

    /// Classifies an error of a TLS stream. Also for errors after the handshake: a TLS 1.3 client learns only with its
    /// first read that the server refused its certificate.
    pub fn from_io(error: &io::Error) -> Self {
        let inner = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
        let reason = match inner {
            Some(tls) => classify(tls),
            None if is_disconnect(error.kind()) => RejectReason::Disconnected,
            None => RejectReason::Protocol,
        };
        Self::new(reason, error.to_string())
    }
}

/// Whether an error kind means that the other side went away.
fn is_disconnect(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{
        BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, TimedOut, UnexpectedEof,
    };
    matches!(kind, UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe | NotConnected | TimedOut)
}

fn classify(error: &rustls::Error) -> RejectReason {
    use rustls::Error as E;
    match error {
        E::NoCertificatesPresented => RejectReason::NoCertificate,
        E::NoApplicationProtocol | E::AlertReceived(AlertDescription::NoApplicationProtocol) => {
            RejectReason::BadAlpn
        }
        E::AlertReceived(_) => RejectReason::PeerRefused,
        E::PeerIncompatible(_) => RejectReason::Incompatible,
        E::InvalidCertificate(error) => classify_certificate(error),
        E::InvalidMessage(
            InvalidMessage::InvalidContentType
            | InvalidMessage::UnknownProtocolVersion
            | InvalidMessage::InvalidEmptyPayload
            | InvalidMessage::MessageTooLarge,
        ) => RejectReason::NotTls,
        _ => RejectReason::Protocol,
    }
}

fn classify_certificate(error: &CertificateError) -> RejectReason {
    use CertificateError as C;
    match error {
        C::Expired | C::ExpiredContext { .. } => RejectReason::Expired,
        C::NotValidYet | C::NotValidYetContext { .. } => RejectReason::NotYetValid,
        C::UnknownIssuer => RejectReason::UnknownCa,
        C::NotValidForName | C::NotValidForNameContext { .. } => RejectReason::WrongIdentity,
        C::ApplicationVerificationFailure => RejectReason::WrongTrustDomain,
        _ => RejectReason::BadCertificate,
    }
}

thread_local! {
    /// What our verifier found in the handshake that this thread is polling right now. rustls has no way to carry an
    /// identity beside the standard error that decides about the alert to the peer, and a verifier is shared by many
    /// connections. Verification runs inside one poll of the handshake, so the thread is the connection's.
    static VERDICT: RefCell<Option<TlsReject>> = const { RefCell::new(None) };
}

/// Called by a verifier just before it returns its error.
pub(crate) fn note_verdict(verdict: TlsReject) {
    VERDICT.with_borrow_mut(|slot| *slot = Some(verdict));
}

/// Takes what the verifier noted during the poll that just ended.
pub(crate) fn take_verdict() -> Option<TlsReject> {
    VERDICT.with_borrow_mut(Option::take)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_unique() {
        let labels: std::collections::BTreeSet<_> = RejectReason::ALL.iter().map(|r| r.label()).collect();
        assert_eq!(labels.len(), RejectReason::ALL.len());
    }

    #[test]
    fn a_presented_identity_is_bounded() {
        let reject = TlsReject::new(RejectReason::UnknownCa, "x").presented(Some("é".repeat(400)));
        assert_eq!(reject.presented.unwrap().len(), 256);
    }
}
