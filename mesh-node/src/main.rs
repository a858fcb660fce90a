//! The `mesh-node` command.
fn main() {}
