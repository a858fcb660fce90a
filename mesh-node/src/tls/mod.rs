//! Mutual TLS between workloads, on rustls with aws-lc-rs.
//!
//! TLS 1.3 only, ALPN `h2`, no SNI, AES-GCM suites, no resumption: the wire form of Istio's HBONE. A client checks the
//! chain and the exact SPIFFE URI SAN against the identities it expects; a server checks the chain and the trust
//! domain. Every refusal is a [`TlsReject`] with a typed [`RejectReason`] that serves as metric label and log field.
//!
//! A [`LocalIdentity`] owns the current certificate of one workload identity and the rustls configurations built over
//! it. Configurations are built once and read the certificate and the roots at each handshake, so a rotation takes
//! effect at once and no connection notices it. [`ControlPlane`] is the other kind of TLS here: to the control plane.
//!
//! Absent on purpose: TLS 1.2, session tickets and early data (all would outlive a policy decision), host-name
//! checks (workloads have none), revocation lists (certificates live for hours).

mod cert;
mod config;
mod control;
mod handshake;
mod readahead;
mod reject;
#[cfg(test)]
pub(crate) mod testca;
#[cfg(test)]
mod tests;
mod verify;

pub use cert::{CertCell, CertError, WorkloadCert};
pub use config::{LocalIdentity, provider};
pub use control::{ControlError, ControlPlane};
pub use handshake::{HANDSHAKE_TIMEOUT, Peer, accept, connect};
pub use readahead::ReadAhead;
pub use reject::{RejectReason, TlsReject};

/// The only application protocol spoken inside workload TLS.
pub const ALPN_H2: &[u8] = b"h2";
