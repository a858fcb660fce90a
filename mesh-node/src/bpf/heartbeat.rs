//! The daemon's heartbeat: the row by which the programs know that it serves.
//!
//! Deliberately absent: the thread that beats, and the time after which a heart counts as still
//! (`mesh_common::decide::HEARTBEAT_TTL_NS`).

use super::sys::{self, Map};
use mesh_common::{pod::Pod as _, value};
use std::{io, sync::Arc};

/// Access to the heartbeat; cheap to clone, and usable while others hold the data path.
#[derive(Clone, Debug)]
pub struct Heartbeat(Arc<Map>);

impl Heartbeat {
    pub(super) fn new(map: Arc<Map>) -> Self {
        Self(map)
    }

    /// Says that the daemon serves now.
    pub fn beat(&self) -> io::Result<()> {
        self.write(sys::monotonic_ns()?)
    }

    /// Says that it does not serve any more, from this moment on.
    pub fn end(&self) -> io::Result<()> {
        self.write(0)
    }

    fn write(&self, beat_ns: u64) -> io::Result<()> {
        self.0.update(0_u32.bytes(), value::Heartbeat { beat_ns }.bytes())
    }
}
