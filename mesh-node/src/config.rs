//! The configuration of `mesh-node`.
