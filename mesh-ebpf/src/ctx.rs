//! Reads and writes of the contexts.
//!
//! In assembly: LLVM otherwise merges accesses of two branches, or computes a field's address early and keeps it, and
//! the verifier refuses an access through a computed context pointer ("dereference of modified ctx ptr").

use crate::{features, find, maps::DAEMONS};
use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_F_CURRENT_NETNS, bpf_sk_lookup, bpf_sock, bpf_sock_addr, bpf_sock_ops, bpf_sock_tuple},
    helpers::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_current_pid_tgid,
        bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_set_retval,
        bpf_sk_lookup_udp, bpf_sk_release, bpf_skc_lookup_tcp, bpf_sock_ops_cb_flags_set,
    },
    programs::{SkLookupContext, SockAddrContext, SockOpsContext},
};
use mesh_common::{
    code::feature,
    key,
    net::{Endpoint, Ip, NetPort},
    value,
};

/// What a cgroup socket-address program returns to let the system call go on.
pub(crate) const ALLOW: i32 = 1;
/// What makes the system call fail, with the error of [`refuse`].
const REFUSE: i32 = 0;

const ECONNREFUSED: i32 = 111;

/// `AF_INET`, the same on every architecture.
const AF_INET: u32 = 2;
/// `AF_INET6`.
const AF_INET6: u32 = 10;

/// Reads one context field, by the type of the context, the field and its width in the context.
macro_rules! read {
    ($ctx:expr, $context:ty, $field:ident) => {
        read!($ctx, $context, $field, 0, "u32", u32)
    };
    ($ctx:expr, $context:ty, $field:ident[$index:literal]) => {
        read!($ctx, $context, $field, $index, "u32", u32)
    };
    ($ctx:expr, $context:ty, $field:ident, $index:literal, $width:literal, $value:ty) => {{
        let ctx: *mut $context = $ctx;
        let value: u64;
        // SAFETY: the context is live while the program runs, and the verifier checks the offset and the width.
        unsafe {
            core::arch::asm!(
                concat!("{value} = *(", $width, " *)({ctx} + {offset})"),
                value = out(reg) value,
                ctx = in(reg) ctx,
                offset = const core::mem::offset_of!($context, $field) + 4 * $index,
            );
        }
        value as $value
    }};
}

/// Writes one context field of 32 bits.
macro_rules! write {
    ($ctx:expr, $context:ty, $field:ident, $index:literal, $value:expr) => {{
        let ctx: *mut $context = $ctx;
        let value: u64 = u64::from($value);
        // SAFETY: as for reads; the verifier checks that the field may be written.
        unsafe {
            core::arch::asm!(
                "*(u32 *)({ctx} + {offset}) = {value}",
                value = in(reg) value,
                ctx = in(reg) ctx,
                offset = const core::mem::offset_of!($context, $field) + 4 * $index,
            );
        }
    }};
}

/// The two families of socket-address programs.
pub(crate) trait Family {
    /// The address in the context: a destination, or the peer that is about to be shown.
    fn address(ctx: &SockAddrContext) -> Endpoint;
    /// Replaces it; false when this family cannot carry the address.
    fn rewrite(ctx: &SockAddrContext, to: &Endpoint) -> bool;
}

/// Programs that end in 4.
pub(crate) enum V4 {}
/// Programs that end in 6; IPv4 destinations come in their mapped form, and leave so.
pub(crate) enum V6 {}

impl Family for V4 {
    #[inline(always)]
    fn address(ctx: &SockAddrContext) -> Endpoint {
        let addr: *mut bpf_sock_addr = ctx.sock_addr;
        Endpoint::new(
            Ip::v4(read!(addr, bpf_sock_addr, user_ip4)),
            NetPort::from_be(read!(addr, bpf_sock_addr, user_port) as u16),
        )
    }

    #[inline(always)]
    fn rewrite(ctx: &SockAddrContext, to: &Endpoint) -> bool {
        if !to.addr.is_v4() {
            return false;
        }
        let addr: *mut bpf_sock_addr = ctx.sock_addr;
        write!(addr, bpf_sock_addr, user_ip4, 0, to.addr.v4_word());
        write!(addr, bpf_sock_addr, user_port, 0, u32::from(to.port.be));
        true
    }
}

impl Family for V6 {
    #[inline(always)]
    fn address(ctx: &SockAddrContext) -> Endpoint {
        let addr: *mut bpf_sock_addr = ctx.sock_addr;
        let words = [
            read!(addr, bpf_sock_addr, user_ip6[0]),
            read!(addr, bpf_sock_addr, user_ip6[1]),
            read!(addr, bpf_sock_addr, user_ip6[2]),
            read!(addr, bpf_sock_addr, user_ip6[3]),
        ];
        Endpoint::new(Ip::v6(words), NetPort::from_be(read!(addr, bpf_sock_addr, user_port) as u16))
    }

    #[inline(always)]
    fn rewrite(ctx: &SockAddrContext, to: &Endpoint) -> bool {
        let addr: *mut bpf_sock_addr = ctx.sock_addr;
        write!(addr, bpf_sock_addr, user_ip6, 0, to.addr.words[0]);
        write!(addr, bpf_sock_addr, user_ip6, 1, to.addr.words[1]);
        write!(addr, bpf_sock_addr, user_ip6, 2, to.addr.words[2]);
        write!(addr, bpf_sock_addr, user_ip6, 3, to.addr.words[3]);
        write!(addr, bpf_sock_addr, user_port, 0, u32::from(to.port.be));
        true
    }
}

/// The IP protocol of the socket; 0 for one that is not captured.
#[inline(always)]
pub(crate) fn protocol(ctx: &SockAddrContext) -> u8 {
    let protocol = read!(ctx.sock_addr, bpf_sock_addr, protocol);
    if protocol > 255 { 0 } else { protocol as u8 }
}

/// The socket, never null in these programs.
#[inline(always)]
pub(crate) fn socket(ctx: &SockAddrContext) -> *mut bpf_sock {
    read!(ctx.sock_addr, bpf_sock_addr, __bindgen_anon_1, 0, "u64", *mut bpf_sock)
}

/// The cookie of the socket's network namespace.
#[inline(always)]
pub(crate) fn netns(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the helper takes a socket-address context.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// The socket's own cookie.
#[inline(always)]
pub(crate) fn socket_cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the helper takes a socket-address context.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// Makes the system call fail; to be returned. With ECONNREFUSED where the kernel lets programs choose, else with EPERM.
#[inline(always)]
pub(crate) fn refuse() -> i32 {
    if features::has(feature::SET_RETVAL) {
        // SAFETY: the helper sets the return value of the running hook.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
    }
    REFUSE
}

/// Makes a TCP connect of a pod fail with ECONNREFUSED; to be returned. Applications take EPERM for a fault that no
/// second try mends, so where the error cannot be chosen the connect goes to the pod's own port 0, where no socket can
/// listen: the kernel answers that with an RST at once, and sends nothing out of the pod.
#[inline(always)]
pub(crate) fn refuse_tcp<F: Family>(ctx: &SockAddrContext, pod: &value::Pod, dst: &Endpoint) -> i32 {
    if !features::has(feature::SET_RETVAL) {
        let own = if dst.addr.is_v4() { pod.addr_v4 } else { pod.addr_v6 };
        if F::rewrite(ctx, &Endpoint::new(own, NetPort::NONE)) {
            return ALLOW;
        }
    }
    refuse()
}

/// `bpf_sock_tuple` of IPv4.
#[repr(C)]
struct TupleV4 {
    source: u32,
    destination: u32,
    ports: [u16; 2],
}

/// `bpf_sock_tuple` of IPv6.
#[repr(C)]
struct TupleV6 {
    source: [u32; 4],
    destination: [u32; 4],
    ports: [u16; 2],
}

/// Whether a TCP socket listens at this address of the caller's network namespace. The look-up runs the namespace's
/// sk_lookup programs: it comes from the same address and from port 0, by which `inbound` knows it.
#[inline(always)]
pub(crate) fn listens(ctx: &SockAddrContext, at: &Endpoint) -> bool {
    exists(ctx, at, false)
}

/// The same for TCP, or for a UDP socket that is bound to the address.
#[inline(always)]
pub(crate) fn exists(ctx: &SockAddrContext, at: &Endpoint, udp: bool) -> bool {
    let ports = [0, at.port.be];
    let socket = if at.addr.is_v4() {
        let word = at.addr.v4_word();
        let mut tuple = TupleV4 { source: word, destination: word, ports };
        look_up(ctx, (&raw mut tuple).cast(), size_of::<TupleV4>() as u32, udp)
    } else {
        let mut tuple = TupleV6 { source: at.addr.words, destination: at.addr.words, ports };
        look_up(ctx, (&raw mut tuple).cast(), size_of::<TupleV6>() as u32, udp)
    };
    if socket.is_null() {
        return false;
    }
    // SAFETY: the look-up gave a reference to the socket, which is given back exactly once.
    unsafe { bpf_sk_release(socket.cast()) };
    true
}

#[inline(always)]
fn look_up(ctx: &SockAddrContext, tuple: *mut bpf_sock_tuple, size: u32, udp: bool) -> *mut bpf_sock {
    let netns = BPF_F_CURRENT_NETNS as u64;
    // SAFETY: the helpers take a socket-address context and read `size` bytes of a tuple on the stack.
    unsafe {
        if udp {
            bpf_sk_lookup_udp(ctx.as_ptr(), tuple, size, netns, 0)
        } else {
            bpf_skc_lookup_tcp(ctx.as_ptr(), tuple, size, netns, 0)
        }
    }
}

/// Whether the calling process is a daemon. By cgroup and not by socket mark, which a container can set.
#[inline(always)]
pub(crate) fn is_daemon() -> bool {
    // SAFETY: the helper has no arguments.
    let cgroup = unsafe { bpf_get_current_cgroup_id() };
    find!(DAEMONS, &key::Daemon { cgroup }).is_some()
}

/// Whether the calling process is outside the pods' cgroup.
#[inline(always)]
pub(crate) fn is_host_process(config: &value::Config) -> bool {
    // SAFETY: the helper takes a number and gives 0 for a level that the process's cgroup does not have.
    let ancestor = unsafe { bpf_get_current_ancestor_cgroup_id(config.pods_level as i32) };
    config.pods_cgroup != 0 && ancestor != config.pods_cgroup
}

/// The monotonic clock in nanoseconds.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: the helper has no arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// 32 random bits, good enough to balance.
#[inline(always)]
pub(crate) fn random() -> u32 {
    // SAFETY: the helper has no arguments.
    unsafe { bpf_get_prandom_u32() }
}

/// The calling process.
#[inline(always)]
pub(crate) fn process() -> u32 {
    (bpf_get_current_pid_tgid() >> 32) as u32
}

/// What a sockops program needs to know about its connection.
pub(crate) struct Connection {
    /// This machine's side.
    pub(crate) local: Endpoint,
    /// The other side.
    pub(crate) remote: Endpoint,
}

/// Reads both addresses. IPv4 sockets have IPv4 addresses, IPv6 sockets carry IPv4 in its mapped form.
#[inline(always)]
pub(crate) fn connection(ctx: &SockOpsContext) -> Connection {
    let ops: *mut bpf_sock_ops = ctx.ops;
    let family = read!(ops, bpf_sock_ops, family);
    let (remote_v4, local_v4) = (read!(ops, bpf_sock_ops, remote_ip4), read!(ops, bpf_sock_ops, local_ip4));
    let remote_v6 = [
        read!(ops, bpf_sock_ops, remote_ip6[0]),
        read!(ops, bpf_sock_ops, remote_ip6[1]),
        read!(ops, bpf_sock_ops, remote_ip6[2]),
        read!(ops, bpf_sock_ops, remote_ip6[3]),
    ];
    let local_v6 = [
        read!(ops, bpf_sock_ops, local_ip6[0]),
        read!(ops, bpf_sock_ops, local_ip6[1]),
        read!(ops, bpf_sock_ops, local_ip6[2]),
        read!(ops, bpf_sock_ops, local_ip6[3]),
    ];
    // Network order in the word's upper half in memory order, unlike local_port, which is in host order.
    let remote_port = NetPort::new(u32::from_be(read!(ops, bpf_sock_ops, remote_port)) as u16);
    let local_port = NetPort::new(read!(ops, bpf_sock_ops, local_port) as u16);
    let (remote, local) = if family == AF_INET6 {
        (Ip::v6(remote_v6), Ip::v6(local_v6))
    } else {
        (Ip::v4(remote_v4), Ip::v4(local_v4))
    };
    Connection { local: Endpoint::new(local, local_port), remote: Endpoint::new(remote, remote_port) }
}

/// The event that called a sockops program.
#[inline(always)]
pub(crate) fn sock_ops_event(ctx: &SockOpsContext) -> u32 {
    read!(ctx.ops, bpf_sock_ops, op)
}

/// The old and the new state of a `STATE_CB`.
#[inline(always)]
pub(crate) fn state_change(ctx: &SockOpsContext) -> (u32, u32) {
    (read!(ctx.ops, bpf_sock_ops, __bindgen_anon_1[0]), read!(ctx.ops, bpf_sock_ops, __bindgen_anon_1[1]))
}

/// Sequence numbers that the peer acknowledged and that it sent: (acked, received).
#[inline(always)]
pub(crate) fn byte_counts(ctx: &SockOpsContext) -> (u64, u64) {
    (
        read!(ctx.ops, bpf_sock_ops, bytes_acked, 0, "u64", u64),
        read!(ctx.ops, bpf_sock_ops, bytes_received, 0, "u64", u64),
    )
}

/// Segments that were sent again, and the smoothed round-trip time in microseconds.
#[inline(always)]
pub(crate) fn quality(ctx: &SockOpsContext) -> (u32, u32) {
    // The kernel keeps eighths.
    (read!(ctx.ops, bpf_sock_ops, total_retrans), read!(ctx.ops, bpf_sock_ops, srtt_us) >> 3)
}

/// The socket; null unless it is a full one.
#[inline(always)]
pub(crate) fn sock_ops_socket(ctx: &SockOpsContext) -> *mut bpf_sock {
    read!(ctx.ops, bpf_sock_ops, __bindgen_anon_2, 0, "u64", *mut bpf_sock)
}

/// The cookie of the socket's network namespace.
#[inline(always)]
pub(crate) fn sock_ops_netns(ctx: &SockOpsContext) -> u64 {
    // SAFETY: the helper takes a sockops context.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// Adds and removes callback flags, leaving those of other programs.
#[inline(always)]
pub(crate) fn change_flags(ctx: &SockOpsContext, add: u32, remove: u32) {
    let flags = read!(ctx.ops, bpf_sock_ops, bpf_sock_ops_cb_flags);
    let wanted = (flags | add) & !remove;
    if wanted != flags {
        // SAFETY: the helper takes the sockops context itself. The only error, an unknown flag, cannot happen.
        unsafe { bpf_sock_ops_cb_flags_set(ctx.ops, wanted as i32) };
    }
}

/// What an sk_lookup program decides on; `None` for another family.
#[inline(always)]
pub(crate) fn lookup(ctx: &SkLookupContext) -> Option<(u32, Connection)> {
    let lookup: *mut bpf_sk_lookup = ctx.lookup;
    let (family, protocol) = (read!(lookup, bpf_sk_lookup, family), read!(lookup, bpf_sk_lookup, protocol));
    let (remote_v4, local_v4) =
        (read!(lookup, bpf_sk_lookup, remote_ip4), read!(lookup, bpf_sk_lookup, local_ip4));
    let remote_v6 = [
        read!(lookup, bpf_sk_lookup, remote_ip6[0]),
        read!(lookup, bpf_sk_lookup, remote_ip6[1]),
        read!(lookup, bpf_sk_lookup, remote_ip6[2]),
        read!(lookup, bpf_sk_lookup, remote_ip6[3]),
    ];
    let local_v6 = [
        read!(lookup, bpf_sk_lookup, local_ip6[0]),
        read!(lookup, bpf_sk_lookup, local_ip6[1]),
        read!(lookup, bpf_sk_lookup, local_ip6[2]),
        read!(lookup, bpf_sk_lookup, local_ip6[3]),
    ];
    // Here it is the remote port that comes in network order as 16 bits, and the local one in host order.
    let remote_port = NetPort::from_be(read!(lookup, bpf_sk_lookup, remote_port, 0, "u16", u16));
    let local_port = NetPort::new(read!(lookup, bpf_sk_lookup, local_port) as u16);
    let (remote, local) = match family {
        AF_INET => (Ip::v4(remote_v4), Ip::v4(local_v4)),
        AF_INET6 => (Ip::v6(remote_v6), Ip::v6(local_v6)),
        _ => return None,
    };
    let connection =
        Connection { local: Endpoint::new(local, local_port), remote: Endpoint::new(remote, remote_port) };
    Some((protocol, connection))
}
