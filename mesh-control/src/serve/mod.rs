//! The gRPC endpoints: discovery and certificates over TLS, discovery in plaintext on loopback.
//!
//! `admit` and `certificates` decide, `tls` carries, `grpc` puts the services on their listeners. Deliberately absent:
//! what is served (`crate::snapshot`) and who may have which certificate (`crate::ca`).

mod admit;
mod certificates;
mod connection;
mod grpc;
mod tls;

pub use admit::{LoopbackAdmit, TokenAdmit};
pub use certificates::CertificateService;
pub use connection::{Connection, Gate, Peer};
pub use grpc::{plaintext, secure};
pub use tls::{ServerIdentity, TlsConnection, TlsError, TlsIncoming};

use crate::snapshot::Snapshot;
use arc_swap::ArcSwap;
use std::sync::Arc;

/// The snapshot that decisions are made on at this moment.
pub type Current = Arc<ArcSwap<Snapshot>>;
