//! What the kernel has, as a constant: the loader writes it before the verifier sees the programs, which then leaves the
//! branches out that would call a helper that is not there.

use aya_ebpf::Global;

/// Bits of `code::feature`. The name is known to the loader; public, or the linker would drop it.
#[unsafe(no_mangle)]
#[allow(unreachable_pub)]
pub static FEATURES: Global<u32> = Global::new(u32::MAX);

/// Whether the kernel has a feature.
#[inline(always)]
pub(crate) fn has(feature: u32) -> bool {
    FEATURES.load() & feature != 0
}
