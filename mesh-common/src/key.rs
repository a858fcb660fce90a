//! Keys of the maps.

use crate::abi::abi;
use crate::net::{Endpoint, Ip, NetPort};

abi! {
    /// A network namespace, by its cookie (never reused while the machine is up).
    pub struct Netns: 8 {
        /// The cookie.
        pub cookie: u64 = 0,
    }

    /// A daemon's cgroup, by its id.
    pub struct Daemon: 8 {
        /// The id.
        pub cgroup: u64 = 0,
    }

    /// A service's address, port and protocol.
    pub struct Frontend: 20 {
        /// The virtual address.
        pub addr: Ip = 0,
        /// The service's port.
        pub port: NetPort = 16,
        /// `code::proto`.
        pub proto: u8 = 18,
        _pad: u8 = 19,
    }

    /// A slot of a backend set.
    pub struct Backend: 16 {
        /// The set, named by its content.
        pub set: u64 = 0,
        /// From 0 to the set's size - 1.
        pub slot: u32 = 8,
        _pad: u32 = 12,
    }

    /// A member of a backend set, by its address.
    pub struct Member: 32 {
        /// The set.
        pub set: u64 = 0,
        /// The backend.
        pub backend: Endpoint = 8,
        _pad: u32 = 28,
    }

    /// A client pod and a service, for session affinity.
    pub struct Affinity: 32 {
        /// The client's network namespace.
        pub cookie: u64 = 0,
        /// The service.
        pub frontend: Frontend = 8,
        _pad: u32 = 28,
    }

    /// A TCP connection inside one network namespace. The whole 4-tuple, since a source port may be shared by
    /// connections to different destinations.
    pub struct Flow: 48 {
        /// The network namespace.
        pub cookie: u64 = 0,
        /// The dialling side.
        pub source: Endpoint = 8,
        /// The accepting side.
        pub destination: Endpoint = 28,
    }

    /// A TCP connection between network namespaces of this machine.
    pub struct Probe: 40 {
        /// The dialling side.
        pub source: Endpoint = 0,
        /// The accepting side.
        pub destination: Endpoint = 20,
    }

    /// A listening port.
    pub struct Listener: 32 {
        /// The network namespace.
        pub cookie: u64 = 0,
        /// The address it is bound to; `::` for any (of both families).
        pub addr: Ip = 8,
        /// The port.
        pub port: NetPort = 24,
        _pad: [u8; 6] = 26,
    }

    /// A pod and a port of another pod of this node.
    pub struct Verdict: 32 {
        /// The client's network namespace.
        pub cookie: u64 = 0,
        /// The pod's address and port.
        pub destination: Endpoint = 8,
        _pad: u32 = 28,
    }

    /// A part of a backend set's Maglev table.
    pub struct Maglev: 16 {
        /// The set.
        pub set: u64 = 0,
        /// The position in the table, divided by the slots of a `value::MaglevChunk`.
        pub chunk: u32 = 8,
        _pad: u32 = 12,
    }

    /// A UDP socket and an address that it talks to.
    pub struct Udp: 32 {
        /// The socket's cookie.
        pub socket: u64 = 0,
        /// The service's or the backend's address.
        pub peer: Endpoint = 8,
        _pad: u32 = 28,
    }

    /// One of the nameservers that a pod, or a single socket, has used.
    pub struct Nameserver: 16 {
        /// The cookie of the pod's network namespace, or of the socket.
        pub cookie: u64 = 0,
        /// From 0 to [`NAMESERVERS_PER_OWNER`] - 1.
        pub slot: u32 = 8,
        /// 1 for a socket: the two sorts of cookies may be equal.
        pub socket: u32 = 12,
    }

    /// A row of the statistics of direct connections.
    pub struct Direct: 56 {
        /// The client's network namespace.
        pub cookie: u64 = 0,
        /// What the client dialled.
        pub service: Endpoint = 8,
        /// What it got.
        pub backend: Endpoint = 28,
        /// `code::flow`, DIRECT or LOCAL.
        pub kind: u32 = 48,
        _pad: u32 = 52,
    }
}

impl Netns {
    /// By cookie.
    #[inline(always)]
    pub const fn new(cookie: u64) -> Self {
        Self { cookie }
    }
}

impl Frontend {
    /// Puts the parts together.
    #[inline(always)]
    pub const fn new(addr: Ip, port: NetPort, proto: u8) -> Self {
        Self { addr, port, proto, _pad: 0 }
    }
}

impl Backend {
    /// Puts the parts together.
    #[inline(always)]
    pub const fn new(set: u64, slot: u32) -> Self {
        Self { set, slot, _pad: 0 }
    }
}

impl Member {
    /// Puts the parts together.
    #[inline(always)]
    pub const fn new(set: u64, backend: Endpoint) -> Self {
        Self { set, backend, _pad: 0 }
    }
}

impl Affinity {
    /// Puts the parts together.
    #[inline(always)]
    pub const fn new(cookie: u64, frontend: Frontend) -> Self {
        Self { cookie, frontend, _pad: 0 }
    }
}

impl Flow {
    /// Puts the parts together.
    #[inline(always)]
    pub const fn new(cookie: u64, source: Endpoint, destination: Endpoint) -> Self {
        Self { cookie, source, destination }
    }
}

impl Probe {
    /// Puts the parts together.
    #[inline(always)]
    pub const fn new(source: Endpoint, destination: Endpoint) -> Self {
        Self { source, destination }
    }
}

impl Listener {
    /// Puts the parts together; both unspecified addresses become [`Ip::ANY`].
    #[inline(always)]
    pub const fn new(cookie: u64, addr: Ip, port: NetPort) -> Self {
        let addr = if addr.is_unspecified() { Ip::ANY } else { addr };
        Self { cookie, addr, port, _pad: [0; 6] }
    }
}

impl Verdict {
    /// Puts the parts together.
    #[inline(always)]
    pub const fn new(cookie: u64, destination: Endpoint) -> Self {
        Self { cookie, destination, _pad: 0 }
    }
}

impl Maglev {
    /// Puts the parts together.
    #[inline(always)]
    pub const fn new(set: u64, chunk: u32) -> Self {
        Self { set, chunk, _pad: 0 }
    }
}

impl Udp {
    /// Puts the parts together.
    #[inline(always)]
    pub const fn new(socket: u64, peer: Endpoint) -> Self {
        Self { socket, peer, _pad: 0 }
    }
}

/// How many nameservers of a pod or socket are remembered; resolvers take three (resolv.conf(5)).
pub const NAMESERVERS_PER_OWNER: u32 = 4;

impl Nameserver {
    /// The first place of a pod.
    #[inline(always)]
    pub const fn of_pod(netns: u64) -> Self {
        Self { cookie: netns, slot: 0, socket: 0 }
    }

    /// The first place of a socket.
    #[inline(always)]
    pub const fn of_socket(socket: u64) -> Self {
        Self { cookie: socket, slot: 0, socket: 1 }
    }
}

impl Direct {
    /// Puts the parts together.
    #[inline(always)]
    pub const fn new(cookie: u64, service: Endpoint, backend: Endpoint, kind: u32) -> Self {
        Self { cookie, service, backend, kind, _pad: 0 }
    }
}
