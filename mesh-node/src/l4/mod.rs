//! The copy between the two halves of a proxied connection.
//!
//! [`copy`] joins a client's and a server's [`Endpoint`] (TCP, or an HBONE stream) until both directions have ended,
//! one side is reset, or somebody revokes the connection. It behaves as a wire would: half-closes pass through each
//! way, a reset on one side becomes a reset on the other, and a reader that stops stops the writer.
//!
//! Memory: an idle connection holds no buffer. A busy direction holds at most one read buffer, and from HBONE at most
//! the stream's flow-control window.
//!
//! Absent on purpose: decisions (which endpoint, whether allowed), metrics, and timeouts: a TCP connection may be idle
//! for days, TCP keepalive and HTTP/2 PING find the dead ones.

mod copy;
mod endpoint;
mod hbone;
mod tcp;
#[cfg(test)]
mod tests;

pub use copy::{ByteCounters, CopyEnd, CopyOutcome, Stop, copy};
pub use endpoint::{Endpoint, EndpointError};
pub use hbone::HboneEnd;
pub use tcp::TcpEnd;
