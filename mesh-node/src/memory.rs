//! The process's own memory and descriptors: tuning the allocator, telling how much is in use, raising the limit.
//!
//! The allocator is jemalloc, installed by `main`: after a storm glibc's keeps what it had at the peak, since one live
//! allocation at the end of its heap holds all of it. Deliberately absent: bounds on what others allocate (`local`).

use tikv_jemalloc_ctl::{Access, AsName, background_thread, epoch, stats};

/// How long freed pages stay with the process for reuse before they go back to the kernel, in milliseconds. jemalloc's
/// default is 10 s of decay plus lazily freed pages that still count as resident; a node's memory is other people's.
const DIRTY_DECAY_MS: isize = 2000;

/// "Lazily freed" pages look resident until the kernel needs them, which hides from operators what is free: none.
const MUZZY_DECAY_MS: isize = 0;

/// The arena that exists when the process begins.
const FIRST_DIRTY: &[u8] = b"arena.0.dirty_decay_ms\0";
const FIRST_MUZZY: &[u8] = b"arena.0.muzzy_decay_ms\0";
/// Arenas to come.
const NEW_DIRTY: &[u8] = b"arenas.dirty_decay_ms\0";
const NEW_MUZZY: &[u8] = b"arenas.muzzy_decay_ms\0";

/// Sets the allocator up, before the process has other threads. `MALLOC_CONF`-style settings by environment (`_RJEM_MALLOC_CONF`) are left alone when given.
pub fn tune() {
    if std::env::var_os("_RJEM_MALLOC_CONF").is_some() {
        return;
    }
    let set = || -> Result<(), tikv_jemalloc_ctl::Error> {
        for (name, value) in [
            (NEW_DIRTY, DIRTY_DECAY_MS),
            (NEW_MUZZY, MUZZY_DECAY_MS),
            (FIRST_DIRTY, DIRTY_DECAY_MS),
            (FIRST_MUZZY, MUZZY_DECAY_MS),
        ] {
            name.name().write(value)?;
        }
        // Without its thread an arena gives pages back only when somebody allocates in it, and after a storm nobody does.
        background_thread::write(true)
    };
    if let Err(error) = set() {
        tracing::warn!(%error, "the allocator keeps its defaults: memory may return later after a peak");
    }
}

/// What the allocator has, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// In use by the program.
    pub allocated: usize,
    /// In pages that back it, fragmentation included.
    pub active: usize,
    /// Resident: `active`, the allocator's own data, and free pages not yet given back.
    pub resident: usize,
}

/// Reads the statistics as they are now.
pub fn stats() -> MemoryStats {
    // They are kept per epoch; a failure means that the last one is shown.
    let _ = epoch::advance();
    MemoryStats {
        allocated: stats::allocated::read().unwrap_or_default(),
        active: stats::active::read().unwrap_or_default(),
        resident: stats::resident::read().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_settings_have_names_that_the_allocator_knows() {
        tune();
        for (name, value) in [(NEW_DIRTY, DIRTY_DECAY_MS), (NEW_MUZZY, MUZZY_DECAY_MS)] {
            let read: isize = name.name().read().unwrap();
            assert_eq!(read, value);
        }
        assert!(background_thread::read().unwrap());
        assert!(stats().resident > 0);
    }
}
