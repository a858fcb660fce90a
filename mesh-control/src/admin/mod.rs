//! For people: health, metrics, and what is served right now.
//!
//! Deliberately absent: anything that changes state.

mod json;
mod metrics;
mod server;

pub use metrics::Metrics;
pub use server::{AdminState, admin_router, metrics_router};
