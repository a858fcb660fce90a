//! What a process of this crate does as a whole: the node daemon. Wiring only.

pub mod backends;
pub mod direct;
pub mod flows;
pub mod handover;
pub mod heartbeat;
pub mod kept;
pub mod limits;
pub mod listeners;
pub mod mesh;
pub mod node;
pub mod reconcile;
pub mod sampled;
pub mod succession;
pub mod view;
pub mod workers;
pub mod xds;

pub use view::LogFilter;
