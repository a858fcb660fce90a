//! The ABI between the BPF object and user space, and the pure capture decision.
//!
//! Both sides compile this crate: mesh-ebpf for the kernel, mesh-node for the host. Every type that crosses the
//! boundary is made by the [`abi!`] macro (`repr(C)`, no hidden padding, sizes asserted on both targets), and every
//! decision that the programs take is a function here, so that unit tests on the host cover what runs in the kernel.
//!
//! Deliberately absent: context reads and map look-ups (mesh-ebpf), domain types and map writes (mesh-node's `bpf`
//! module), and any dependency.
#![no_std]

#[cfg(feature = "user")]
extern crate std;

mod abi;
pub mod code;
pub mod decide;
pub mod key;
pub mod map;
pub mod net;
pub mod pod;
pub mod value;

/// The version of everything in this crate that crosses the boundary; it names the folder of the pins. Any change of
/// a key, a value, a code or a map's type needs a new one.
pub const ABI_VERSION: u32 = 2;
