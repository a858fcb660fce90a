//! Pure decisions over the [`World`](crate::state::World): which endpoints a service has from here, what an outbound
//! connection leads to, and what the kernel should hold.
//!
//! Deliberately absent: sockets, clocks and randomness (the caller picks), and any BPF type but the plain intent.

mod endpoints;
mod kernel;
mod outbound;
mod plaintext;

pub use endpoints::{Endpoint, NodeView, endpoints, still_backs};
pub use kernel::intent;
pub use outbound::{HBONE_PORT, Plan, PlanError, PlanInput, Target, outbound};
pub use plaintext::Plaintext;
