//! The thin part that has I/O: delta discovery on tonic streams, for both ends.
//!
//! All decisions are made in [`crate::delta`]; this turns them into messages and timers. Deliberately absent: TLS,
//! addresses and where tokens come from. The caller brings a [`Transport`], or puts the service into its own server.

mod client;
mod server;

#[cfg(test)]
mod tests;

pub use client::{AdsClient, AdsConfig, AdsHandle, AdsStatus, Handler, Transport, TransportError, tune};
pub use server::{Admission, Admit, AdsServerConfig, AdsService, ServerStats, StatsReading};
