//! The certificate authority: a root, an intermediate that signs, and the certificates of workloads.
//!
//! `store` keeps the two key pairs on disk, `csr` checks what a node asks for, `policy` decides whether it may have it.
//! All keys are ECDSA P-256. Deliberately absent: gRPC (`crate::serve`), revocation (certificates live for a day), and
//! certificates from outside.

mod authority;
mod csr;
mod policy;
mod store;

pub use authority::{Authority, CaError, Issued, Lifetimes};
pub use csr::{CsrError, SigningRequest};
pub use policy::{Denied, decide};
pub use store::{Pair, StoreError, write_atomically};

#[cfg(test)]
mod tests;
