//! What the node knows of the mesh: an immutable [`World`], replaced as a whole by the [`Store`].
//!
//! Readers load an `Arc<World>` and keep it for one decision; nobody locks. Deliberately absent: I/O, protobuf
//! types, and everything about local capture (which pods this node enrolled is `role`'s).

mod store;
#[cfg(test)]
pub(crate) mod testing;
mod world;

pub use store::{Batch, Staged, Store};
pub use world::{ServicePortRef, World};
