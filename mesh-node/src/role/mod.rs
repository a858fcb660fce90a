//! What a process of this crate does as a whole: the node daemon. Wiring only.

mod direct;
mod listeners;
mod mesh;
pub mod node;
mod reconcile;
mod view;
mod workers;
mod xds;

pub use view::LogFilter;
