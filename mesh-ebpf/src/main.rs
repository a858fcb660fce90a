//! The BPF object: capture and L4 load balancing in the kernel.
//!
//! | program | attached to | part |
//! |---|---|---|
//! | `connect4/6` | cgroup | [`connect`]: direct, proxy or deny, for TCP and connected UDP; announces probes |
//! | `sendmsg4/6`, `recvmsg4/6` | cgroup | [`udp`]: unconnected UDP, there and back |
//! | `getpeername4/6` | cgroup | [`peername`]: the address that the app expects, also for accept |
//! | `sock_ops` | cgroup | [`sockops`]: carries original destination and client over; listeners; statistics |
//! | `inbound` | network namespace | [`inbound`]: steers plaintext to the daemon (sk_lookup) |
//!
//! [`daemon`] asks whether the daemon serves, [`dns`] sends a pod's queries to it, [`balance`] chooses backends.
//!
//! The decisions are in `mesh_common::decide`; here are the context reads, the look-ups and the writes. Deliberately
//! absent: anything per packet.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
// For the atomic addition; see `maps::Shared`.
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
// The context structures, the helpers and the map references are raw pointers of the kernel's.
#![allow(unsafe_code)]
// Contexts are pointers and are taken as aya hands them over; keys stay borrowed on the small BPF stack.
#![allow(clippy::needless_pass_by_value, clippy::needless_borrows_for_generic_args)]

#[cfg(target_arch = "bpf")]
mod balance;
#[cfg(target_arch = "bpf")]
mod connect;
#[cfg(target_arch = "bpf")]
mod ctx;
#[cfg(target_arch = "bpf")]
mod daemon;
#[cfg(target_arch = "bpf")]
mod dns;
#[cfg(target_arch = "bpf")]
mod features;
#[cfg(target_arch = "bpf")]
mod inbound;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod peername;
#[cfg(target_arch = "bpf")]
mod report;
#[cfg(target_arch = "bpf")]
mod sockops;
#[cfg(target_arch = "bpf")]
mod udp;

/// The host's build of the workspace has nothing to run here.
#[cfg(not(target_arch = "bpf"))]
fn main() {}

/// Never reached: nothing in the programs panics, or the verifier would refuse the loop.
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Read by the kernel. The programs call no helper that it keeps for GPL-compatible ones.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 11] = *b"Apache-2.0\0";
