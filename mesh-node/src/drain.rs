//! The end of the daemon, in two steps: from `begin` on nothing new is taken and tunnels say GOAWAY; at `force`
//! what is still open is ended.

use tokio_util::sync::CancellationToken;

/// Shared by everything that serves connections. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Drain {
    /// Cancelled when draining begins.
    pub begin: CancellationToken,
    /// Cancelled when the time for draining is over.
    pub force: CancellationToken,
}
