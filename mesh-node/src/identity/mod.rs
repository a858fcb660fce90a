//! Certificates of the workloads on this node: asked for, checked, rotated, and let go.
//!
//! [`CertManager`] keeps one certificate per identity for as long as a pod of it holds an [`IdentityHandle`]. A fresh
//! P-256 key is made for every request; keys are never logged, and leave the process only for the next daemon of the same
//! node: over a socket ([`CertManager::export`]) or in a private file in memory ([`CertKeeper`]). A certificate is renewed
//! at half of its life, and a valid one stays in force while renewals fail.
//!
//! Absent on purpose: any knowledge of how the control plane is reached: [`IstioCa`] takes a channel.

mod ca;
mod exported;
mod keep;
mod manager;
#[cfg(test)]
mod tests;

pub use ca::{CaClient, CaError, IstioCa, TokenFile};
pub use exported::{Exported, ImportError};
pub use keep::CertKeeper;
pub use manager::{
    CertManager, CertOptions, CertStats, CertStatus, IdentityError, IdentityHandle, MAX_IDENTITIES,
};
