//! Network namespaces and the sockets in them: the only door of the daemon to `setns` and to raw socket
//! options.
//!
//! - [`ns`]: a handle on a network namespace, and running a closure inside it
//! - [`socket`]: listening and dialling inside a namespace
//! - [`links`]: the addresses that a namespace has
//! - [`diag`]: the sockets that a namespace has, and their end
//! - [`udpdiag`]: the UDP socket that a datagram came from
//! - [`unix`]: Unix sockets for root only
//! - [`fdpass`]: messages with a file descriptor over a Unix socket
//!
//! Deliberately absent: knowledge of pods (`enroll`), of BPF (`bpf`) and of what flows through a socket.

pub mod diag;
pub mod fdpass;
pub mod links;
pub mod ns;
pub mod socket;
mod sys;
#[cfg(test)]
pub(crate) mod testing;
pub mod udpdiag;
pub mod unix;

/// Raises this process's limit on descriptors (RLIMIT_NOFILE) to the hard one and returns it.
pub fn raise_descriptor_limit() -> std::io::Result<u64> {
    sys::raise_descriptor_limit()
}

pub use ns::{NetNs, NetNsError, NsId};
pub use socket::{Dialing, accept_from, reset_on_close};
pub use udpdiag::UdpClient;
