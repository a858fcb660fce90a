//! BPF programs of somebody else, as other software on a node has them: a few instructions each, so that they need no
//! compiler. They only touch addresses and ports of their own.

use crate::{cgroup::Cgroup, netns::NetNs, sys};
use anyhow::{Context, Result};
use std::{
    fs::File,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsFd as _, OwnedFd},
};

/// Types of programs and hooks, `include/uapi/linux/bpf.h`.
const SOCK_OPS: (u32, u32) = (13, 3);
const CONNECT4: (u32, u32) = (18, 10);
const SK_LOOKUP: (u32, u32) = (30, 36);

/// How a program is attached to a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By a link.
    Link,
    /// By `BPF_PROG_ATTACH` with `BPF_F_ALLOW_MULTI`, as older software does.
    Attach,
}

/// An attached program; dropping it detaches it.
#[derive(Debug)]
pub struct Foreign {
    program: OwnedFd,
    /// The cgroup and the hook of a program without a link.
    attached: Option<(File, u32)>,
    _link: Option<OwnedFd>,
}

impl Foreign {
    /// A `connect4` program that sends what is for `from` to `to`, as another socket-level load balancer does.
    pub fn rewrite(cgroup: &Cgroup, way: Way, from: SocketAddrV4, to: SocketAddrV4) -> Result<Self> {
        // Offsets in `struct bpf_sock_addr`.
        const IP4: i16 = 4;
        const PORT: i16 = 24;
        let program = [
            mov(0, 1),
            load(2, 1, IP4),
            // The immediate is sign-extended, so that the halves are compared as 32 bits.
            jump32_not_equal(2, word(*from.ip()), 6),
            load(2, 1, PORT),
            jump32_not_equal(2, i32::from(from.port().to_be()), 4),
            mov(2, word(*to.ip())),
            store(1, IP4, 2),
            mov(2, i32::from(to.port().to_be())),
            store(1, PORT, 2),
            EXIT,
        ];
        Self::on_cgroup(cgroup, way, CONNECT4, &program)
    }

    /// A `connect4` program that forbids an address.
    pub fn forbid(cgroup: &Cgroup, way: Way, address: Ipv4Addr) -> Result<Self> {
        let program = [mov(0, 1), load(2, 1, 4), jump32_not_equal(2, word(address), 1), mov(0, 0), EXIT];
        Self::on_cgroup(cgroup, way, CONNECT4, &program)
    }

    /// A sockops program that wants to hear of round-trip times of every connection, and of nothing else.
    pub fn watch(cgroup: &Cgroup, way: Way) -> Result<Self> {
        const TCP_CONNECT_CB: i32 = 3;
        const RTT_CB_FLAG: i32 = 8;
        const SOCK_OPS_CB_FLAGS_SET: i32 = 59;
        let program = [
            load(2, 1, 0),
            jump32_not_equal(2, TCP_CONNECT_CB, 2),
            mov(2, RTT_CB_FLAG),
            call(SOCK_OPS_CB_FLAGS_SET),
            mov(0, 1),
            EXIT,
        ];
        Self::on_cgroup(cgroup, way, SOCK_OPS, &program)
    }

    /// An `sk_lookup` program of a pod that closes one port.
    pub fn close_port(netns: &NetNs, port: u16) -> Result<Self> {
        const LOCAL_PORT: i16 = 60;
        let program =
            [mov(0, 1), load(2, 1, LOCAL_PORT), jump32_not_equal(2, i32::from(port), 1), mov(0, 0), EXIT];
        let (kind, hook) = SK_LOOKUP;
        let program = sys::bpf_load(kind, hook, &program).context("load an sk_lookup program")?;
        let link = sys::bpf_link(program.as_fd(), netns.open()?.as_fd(), hook).context("attach it")?;
        Ok(Self { program, attached: None, _link: Some(link) })
    }

    fn on_cgroup(cgroup: &Cgroup, way: Way, (kind, hook): (u32, u32), program: &[u64]) -> Result<Self> {
        let program = sys::bpf_load(kind, hook, program).context("load a cgroup program")?;
        let dir = File::open(cgroup.path())?;
        let what = || format!("attach to {}", cgroup.path().display());
        match way {
            Way::Link => {
                let link = sys::bpf_link(program.as_fd(), dir.as_fd(), hook).with_context(what)?;
                Ok(Self { program, attached: None, _link: Some(link) })
            }
            Way::Attach => {
                sys::bpf_attach(program.as_fd(), dir.as_fd(), hook, true).with_context(what)?;
                Ok(Self { program, attached: Some((dir, hook)), _link: None })
            }
        }
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if let Some((dir, hook)) = &self.attached {
            // A cgroup that is gone has let it go already.
            let _ = sys::bpf_attach(self.program.as_fd(), dir.as_fd(), *hook, false);
        }
    }
}

/// An address as the contexts hold it: in network order.
fn word(address: Ipv4Addr) -> i32 {
    i32::from_ne_bytes(address.octets())
}

/// One instruction, as `struct bpf_insn` is laid out on a little-endian machine.
const fn instruction(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> u64 {
    code as u64
        | (dst as u64) << 8
        | (src as u64) << 12
        | (offset.cast_unsigned() as u64) << 16
        | (immediate.cast_unsigned() as u64) << 32
}

/// `dst = value`.
const fn mov(dst: u8, value: i32) -> u64 {
    instruction(0xb7, dst, 0, 0, value)
}

/// `dst = *(u32 *)(src + offset)`.
const fn load(dst: u8, src: u8, offset: i16) -> u64 {
    instruction(0x61, dst, src, offset, 0)
}

/// `*(u32 *)(dst + offset) = src`.
const fn store(dst: u8, offset: i16, src: u8) -> u64 {
    instruction(0x63, dst, src, offset, 0)
}

/// Skips instructions unless the lower half of a register has a value.
const fn jump32_not_equal(register: u8, value: i32, skip: i16) -> u64 {
    instruction(0x56, register, 0, skip, value)
}

const fn call(helper: i32) -> u64 {
    instruction(0x85, 0, 0, 0, helper)
}

const EXIT: u64 = instruction(0x95, 0, 0, 0, 0);
