//! Values of the maps.

use crate::abi::abi;
use crate::net::{Endpoint, Ip, NetPort};

abi! {
    /// The one row of CONFIG.
    pub struct Config: 32 {
        /// Cookie of the host's network namespace, where probes come from.
        pub host_netns: u64 = 0,
        /// Id of the cgroup above all pods; 0 switches the exemption of probes off.
        pub pods_cgroup: u64 = 8,
        /// The level of that cgroup in the hierarchy (the root is 0).
        pub pods_level: u32 = 16,
        /// `code::log_level`.
        pub log_level: u32 = 20,
        /// `ABI_VERSION` of the writer, for readers of the pins.
        pub abi_version: u32 = 24,
        /// Zero.
        pub reserved: u32 = 28,
    }

    /// A daemon of this node, by its cgroup.
    pub struct Daemon: 8 {
        /// When it was entered, by the monotonic clock, in nanoseconds.
        pub since_ns: u64 = 0,
    }

    /// What a captured pod needs for its outbound connections.
    pub struct Pod: 40 {
        /// Its IPv4 address, or `::`.
        pub addr_v4: Ip = 0,
        /// Its IPv6 address, or `::`.
        pub addr_v6: Ip = 16,
        /// Port of the daemon's outbound listener on the IPv4 address, or 0.
        pub outbound_v4: NetPort = 32,
        /// The same for IPv6.
        pub outbound_v6: NetPort = 34,
        /// `code::pod`.
        pub flags: u32 = 36,
    }

    /// The one row of HEARTBEAT.
    pub struct Heartbeat: 8 {
        /// When the daemon last said that it serves, by the monotonic clock, in nanoseconds; 0 when it has ended.
        pub beat_ns: u64 = 0,
    }

    /// The one row of GENERATION.
    pub struct Generation: 8 {
        /// Verdicts and flows of another generation do not count.
        pub number: u64 = 0,
    }

    /// A cached verdict: this client may go straight to that port of a pod of this node.
    pub struct Verdict: 8 {
        /// The generation it was given in.
        pub generation: u64 = 0,
    }

    /// A live connection from pod to pod of this node without the daemon.
    pub struct LocalFlow: 48 {
        /// The client's network namespace.
        pub cookie: u64 = 0,
        /// The generation of its verdict.
        pub generation: u64 = 8,
        /// When it was dialled, by the monotonic clock, in nanoseconds.
        pub opened_ns: u64 = 16,
        /// What the client dialled.
        pub original: Endpoint = 24,
        /// Zero.
        pub reserved: u32 = 44,
    }

    /// What the daemon's accepted socket has to know.
    pub struct OriginalDst: 40 {
        /// What the client dialled.
        pub original: Endpoint = 0,
        /// The backend that the kernel chose, or [`Endpoint::NONE`].
        pub chosen: Endpoint = 20,
    }

    /// A part of a Maglev table: slots of the backend set.
    pub struct MaglevChunk: 512 {
        /// The slots.
        pub slots: [u16; 256] = 0,
    }

    /// A service port.
    pub struct Frontend: 32 {
        /// The backend set.
        pub set: u64 = 0,
        /// Timeout of session affinity in nanoseconds; 0 for none.
        pub affinity_ns: u64 = 8,
        /// How many slots the set has.
        pub count: u32 = 16,
        /// `code::verdict`.
        pub verdict: u8 = 20,
        /// `code::deny` for a denial.
        pub reason: u8 = 21,
        /// `code::verdict` (DIRECT or DENY) that stands in for PROXY while the daemon is away.
        pub fallback: u8 = 22,
        /// Zero.
        pub reserved: u8 = 23,
        /// Size of the Maglev table, or 0: by weighted random choice.
        pub maglev: u32 = 24,
        /// Zero.
        pub reserved_too: u32 = 28,
    }

    /// A slot of a backend set, also a cell of Vose's alias table: of all the draws that hit this slot, those above
    /// `threshold` go to the slot `alias`.
    pub struct Backend: 28 {
        /// Where it listens.
        pub endpoint: Endpoint = 0,
        /// The highest draw that stays.
        pub threshold: u32 = 20,
        /// Where the others go.
        pub alias: u32 = 24,
    }

    /// A mesh destination that is dialled by its own address.
    pub struct Destination: 4 {
        /// `code::verdict`, not DIRECT.
        pub verdict: u8 = 0,
        /// `code::deny` for a denial.
        pub reason: u8 = 1,
        /// `code::verdict` (DIRECT or DENY) that stands in for PROXY while the daemon is away.
        pub fallback: u8 = 2,
        /// Zero.
        pub reserved: u8 = 3,
    }

    /// Which backend a client sticks to.
    pub struct Affinity: 32 {
        /// The last use, by the monotonic clock, in nanoseconds.
        pub last_use_ns: u64 = 0,
        /// The backend.
        pub backend: Endpoint = 8,
        /// Zero.
        pub reserved: u32 = 28,
    }

    /// Socket storage of a client: what it dialled and what it got.
    pub struct SocketFlow: 88 {
        /// Its network namespace.
        pub cookie: u64 = 0,
        /// What the app dialled.
        pub original: Endpoint = 8,
        /// What the kernel dials.
        pub actual: Endpoint = 28,
        /// `code::flow`.
        pub kind: u32 = 48,
        /// Low half of the count of received bytes when the peer acknowledged this side's FIN; see
        /// `decide::app_bytes`.
        pub received_at_fin: u32 = 52,
        /// `code::flow::LOCAL`: the generation of the verdict.
        pub generation: u64 = 56,
        /// The backend that the kernel chose, or [`Endpoint::NONE`].
        pub chosen: Endpoint = 64,
        /// Zero.
        pub reserved: u32 = 84,
    }

    /// When a probe was seen, by the monotonic clock, in nanoseconds.
    pub struct Probe: 8 {
        /// The time.
        pub seen_ns: u64 = 0,
    }

    /// How many sockets listen; SO_REUSEPORT makes it more than one.
    pub struct Listener: 8 {
        /// The number; 64 bits, since the BPF target has no smaller atomics.
        pub count: u64 = 0,
    }

    /// A captured pod as the receiving side, by each of its addresses.
    pub struct Inbound: 16 {
        /// Its network namespace.
        pub cookie: u64 = 0,
        /// The daemon's outbound listeners, which nobody else may dial.
        pub outbound_v4: NetPort = 8,
        /// The same for IPv6.
        pub outbound_v6: NetPort = 10,
        /// `code::inbound`.
        pub flags: u32 = 12,
    }

    /// A port with another mode than its pod.
    pub struct InboundPort: 4 {
        /// `code::inbound`.
        pub flags: u32 = 0,
    }

    /// Statistics of direct connections.
    pub struct Direct: 56 {
        /// Connections established.
        pub opened: u64 = 0,
        /// Connections closed.
        pub closed: u64 = 8,
        /// Bytes from the client, of closed connections.
        pub sent: u64 = 16,
        /// Bytes to the client, of closed connections.
        pub received: u64 = 24,
        /// Segments that the client sent again, of closed connections.
        pub retransmits: u64 = 32,
        /// Sum of the smoothed round-trip times at close, in microseconds.
        pub rtt_us: u64 = 40,
        /// How many connections are in that sum.
        pub rtt_count: u64 = 48,
    }

    /// A denial, in the event buffer.
    pub struct DenyEvent: 64 {
        /// When, by the monotonic clock, in nanoseconds.
        pub time_ns: u64 = 0,
        /// The network namespace of the client (outbound) or of the pod (inbound).
        pub cookie: u64 = 8,
        /// The client; all zero for an outbound denial, which comes before the socket has an address.
        pub source: Endpoint = 16,
        /// What was dialled.
        pub destination: Endpoint = 36,
        /// Process id of the client in the first pid namespace; 0 for an inbound denial.
        pub pid: u32 = 56,
        /// `code::deny`.
        pub reason: u8 = 60,
        /// `code::proto`.
        pub proto: u8 = 61,
        /// 1 for an inbound denial.
        pub inbound: u8 = 62,
        /// Zero.
        pub reserved: u8 = 63,
    }
}
