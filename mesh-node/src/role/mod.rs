//! What a process of this crate does as a whole: the node daemon. Wiring only.

mod direct;
mod listeners;
mod mesh;
mod reconcile;
mod workers;
