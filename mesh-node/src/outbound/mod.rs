//! outbound
mod affinity;
