//! Codes that travel as small integers: verdicts, reasons, counters, log levels.
//!
//! The BPF side uses the constants; user space gets enums with checked conversions (feature `user`), since an enum
//! read from a map would be undefined behaviour for an unknown value.

/// What to do with a connection to a known destination.
pub mod verdict {
    /// Straight to a backend, balanced in the kernel.
    pub const DIRECT: u8 = 1;
    /// To the pod's outbound listener, that is to the node daemon.
    pub const PROXY: u8 = 2;
    /// Refused with ECONNREFUSED.
    pub const DENY: u8 = 3;
}

/// IP protocol numbers that are captured.
pub mod proto {
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
}

/// What a socket's storage says about it (`value::SocketFlow::kind`).
pub mod flow {
    /// A client socket that was rewritten to a backend.
    pub const DIRECT: u8 = 1;
    /// A client socket that was rewritten to the daemon.
    pub const PROXY: u8 = 2;
    /// A host process's socket to a local pod (a probe).
    pub const PROBE: u8 = 3;
    /// A client socket that goes straight to a pod of this node by a cached verdict.
    pub const LOCAL: u8 = 4;
    /// A client socket whose DNS queries go to the daemon.
    pub const DNS: u8 = 5;
}

/// `value::Pod::flags`.
pub mod pod {
    /// DNS queries of the pod (port 53, UDP and TCP) go to the daemon while it is there.
    pub const DNS: u32 = 1;
}

/// `value::Inbound::flags` and `value::InboundPort::flags`.
pub mod inbound {
    /// Plaintext is refused.
    pub const STRICT: u32 = 1;
}

/// Bits of the programs' constant `FEATURES`: what the kernel has, as the loader found.
pub mod feature {
    /// `bpf_set_retval`: a refused system call fails with an error of the programs' choice.
    pub const SET_RETVAL: u32 = 1;
    /// `bpf_skc_lookup_tcp` at connect: whether the daemon's listener is there.
    pub const LISTENER_LOOKUP: u32 = 2;
}

/// Ports that the daemon listens on in every pod (host order).
pub mod port {
    /// Plaintext that sk_lookup steers to the daemon.
    pub const INBOUND_PLAIN: u16 = 15006;
    /// HBONE.
    pub const INBOUND_HBONE: u16 = 15008;
    /// DNS over UDP.
    pub const DNS: u16 = 15053;
}

/// Levels of the programs' log lines (`value::Config::log_level`); 0 is off. The numbers are aya-log's.
pub mod log_level {
    /// No lines.
    pub const OFF: u32 = 0;
    /// What went wrong in the data path itself.
    pub const ERROR: u32 = 1;
    /// Denials.
    pub const WARN: u32 = 2;
    /// Captured connections.
    pub const INFO: u32 = 3;
    /// Connections that pass.
    pub const DEBUG: u32 = 4;
}

/// Declares codes: constants for both sides, an enum with names for user space.
macro_rules! codes {
    (
        $(#[$meta:meta])*
        pub mod $module:ident, enum $enum:ident: $repr:ident {
            $( $(#[$code_meta:meta])* $konst:ident = $value:literal, $variant:ident, $label:literal; )+
        }
    ) => {
        $(#[$meta])*
        pub mod $module {
            $( $(#[$code_meta])* pub const $konst: $repr = $value; )+
            /// One more than the highest code.
            pub const END: $repr = { let mut end = 0; $( if $value >= end { end = $value + 1; } )+ end };
        }

        #[cfg(feature = "user")]
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr($repr)]
        pub enum $enum {
            $( $(#[$code_meta])* $variant = $value, )+
        }

        #[cfg(feature = "user")]
        impl $enum {
            /// All of them, by code.
            pub const ALL: &'static [Self] = &[$( Self::$variant, )+];

            /// The number that travels.
            pub const fn code(self) -> $repr {
                self as $repr
            }

            /// The name in metric labels and log fields.
            pub const fn label(self) -> &'static str {
                match self {
                    $( Self::$variant => $label, )+
                }
            }
        }

        #[cfg(feature = "user")]
        impl TryFrom<$repr> for $enum {
            type Error = UnknownCode;

            fn try_from(code: $repr) -> Result<Self, UnknownCode> {
                match code {
                    $( $value => Ok(Self::$variant), )+
                    _ => Err(UnknownCode { kind: stringify!($enum), code: code.into() }),
                }
            }
        }

        #[cfg(feature = "user")]
        impl core::fmt::Display for $enum {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.write_str(self.label())
            }
        }
    };
}

/// A number from the kernel that this version does not know.
#[cfg(feature = "user")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownCode {
    /// Which kind of code.
    pub kind: &'static str,
    /// The number.
    pub code: u64,
}

#[cfg(feature = "user")]
impl core::fmt::Display for UnknownCode {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(
            f,
            "{} {} is not known to this version; the BPF object is of another one",
            self.kind, self.code
        )
    }
}

#[cfg(feature = "user")]
impl core::error::Error for UnknownCode {}

codes! {
    /// Why a connection was refused in the kernel.
    pub mod deny, enum DenyReason: u8 {
        /// The service has no endpoint that may be used.
        NO_ENDPOINTS = 1, NoEndpoints, "no_endpoints";
        /// A policy forbids it.
        POLICY = 2, Policy, "policy";
        /// The destination needs the mesh's protection and the daemon cannot give it now.
        UNPROTECTED = 3, Unprotected, "unprotected";
        /// The pod has no capture address of the destination's family.
        NO_CAPTURE_ADDRESS = 4, NoCaptureAddress, "no_capture_address";
        /// UDP to a destination that only the proxy may reach; the proxy carries TCP only.
        UDP_NOT_PROXIED = 5, UdpNotProxied, "udp_not_proxied";
        /// The configuration changed twice while the connection was balanced; the client may try again.
        BACKEND_GONE = 6, BackendGone, "backend_gone";
        /// Inbound plaintext to a closed port of a STRICT pod.
        CLOSED_PORT = 7, ClosedPort, "closed_port";
        /// Somebody outside the pod dialled a port that only the capture uses.
        CAPTURE_PORT = 8, CapturePort, "capture_port";
        /// Inbound plaintext to a STRICT pod while the daemon has no listener for it.
        NO_DAEMON = 9, NoDaemon, "no_daemon";
        /// The verdict in the map is not one that the programs know.
        BAD_VERDICT = 10, BadVerdict, "bad_verdict";
        /// The kernel would not keep what the capture has to remember about the socket.
        NO_MEMORY = 11, NoMemory, "no_memory";
        /// The daemon is away and the destination takes no plaintext.
        DAEMON_AWAY = 12, DaemonAway, "daemon_away";
    }
}

codes! {
    /// Per-CPU counters; the label is the value of `outcome` in the metric.
    pub mod counter, enum Counter: u32 {
        /// connect: TCP balanced in the kernel.
        CONNECT_DIRECT = 0, ConnectDirect, "connect_direct";
        /// connect: TCP sent to the daemon.
        CONNECT_PROXY = 1, ConnectProxy, "connect_proxy";
        /// connect: refused.
        CONNECT_DENY = 2, ConnectDeny, "connect_deny";
        /// connect: an enrolled pod, but an unknown destination.
        CONNECT_PASS = 3, ConnectPass, "connect_pass";
        /// connect: the daemon's own.
        CONNECT_BYPASS = 4, ConnectBypass, "connect_bypass";
        /// connect: UDP balanced in the kernel.
        UDP_CONNECT = 5, UdpConnect, "udp_connect";
        /// sendmsg: UDP balanced in the kernel.
        UDP_SEND = 6, UdpSend, "udp_send";
        /// sendmsg: refused.
        UDP_DENY = 7, UdpDeny, "udp_deny";
        /// recvmsg: the answer's address was translated back.
        UDP_RECEIVE = 8, UdpReceive, "udp_receive";
        /// A session-affinity entry decided.
        AFFINITY_HIT = 9, AffinityHit, "affinity_hit";
        /// A session-affinity entry was too old or its backend gone.
        AFFINITY_MISS = 10, AffinityMiss, "affinity_miss";
        /// A backend set changed under a connect, which then looked again.
        BACKEND_RETRY = 11, BackendRetry, "backend_retry";
        /// The original destination reached an accepted socket of the daemon.
        ORIG_DST_SET = 12, OrigDstSet, "orig_dst_set";
        /// An accepted socket of the daemon without an original destination.
        ORIG_DST_MISSING = 13, OrigDstMissing, "orig_dst_missing";
        /// The client's address reached an accepted socket of the app.
        CLIENT_SET = 14, ClientSet, "client_set";
        /// getpeername or accept was answered with the address that the app expects.
        PEERNAME = 15, Peername, "peername";
        /// Inbound: steered to the daemon.
        INBOUND_STEER = 16, InboundSteer, "inbound_steer";
        /// Inbound: not an address of an enrolled pod, or not TCP.
        INBOUND_PASS = 17, InboundPass, "inbound_pass";
        /// Inbound: from the pod itself.
        INBOUND_LOCAL = 18, InboundLocal, "inbound_local";
        /// Inbound: a probe of a host process.
        INBOUND_PROBE = 19, InboundProbe, "inbound_probe";
        /// Inbound: HBONE.
        INBOUND_HBONE = 20, InboundHbone, "inbound_hbone";
        /// Inbound: no listener, PERMISSIVE.
        INBOUND_CLOSED = 21, InboundClosed, "inbound_closed";
        /// Inbound: refused.
        INBOUND_DROP = 22, InboundDrop, "inbound_drop";
        /// A direct connection was established.
        DIRECT_OPENED = 23, DirectOpened, "direct_opened";
        /// A direct connection was closed.
        DIRECT_CLOSED = 24, DirectClosed, "direct_closed";
        /// A row did not fit into the statistics of direct connections.
        DIRECT_STATS_FULL = 25, DirectStatsFull, "direct_stats_full";
        /// A listening port did not fit into the listener map.
        LISTENERS_FULL = 26, ListenersFull, "listeners_full";
        /// A denial did not fit into the event buffer.
        EVENT_LOST = 27, EventLost, "event_lost";
        /// A flow or storage could not be written (out of memory, or the map is full).
        STORE_FAILED = 28, StoreFailed, "store_failed";
        /// connect: TCP straight to a pod of this node by a cached verdict.
        CONNECT_LOCAL = 29, ConnectLocal, "connect_local";
        /// connect: straight to a backend that would be proxied, since the daemon is away.
        AWAY_DIRECT = 30, AwayDirect, "away_direct";
        /// connect: refused, since the daemon is away and the destination takes no plaintext.
        AWAY_DENY = 31, AwayDeny, "away_deny";
        /// sk_lookup: a connection that a cached verdict let go straight to the pod.
        INBOUND_FLOW = 32, InboundFlow, "inbound_flow";
        /// A DNS query or connection was sent to the daemon.
        DNS_CAPTURE = 33, DnsCapture, "dns_capture";
        /// A live connection between pods of this node did not fit into its map.
        LOCAL_FLOWS_FULL = 34, LocalFlowsFull, "local_flows_full";
    }
}

#[cfg(test)]
#[cfg(feature = "user")]
mod tests {
    use super::*;

    #[test]
    fn codes_are_dense_and_convert_both_ways() {
        for (index, counter) in Counter::ALL.iter().enumerate() {
            assert_eq!(counter.code() as usize, index, "{counter} would leave a hole in the counter array");
            assert_eq!(Counter::try_from(counter.code()), Ok(*counter));
        }
        assert_eq!(counter::END as usize, Counter::ALL.len());
        for reason in DenyReason::ALL {
            assert_eq!(DenyReason::try_from(reason.code()), Ok(*reason));
        }
        assert!(DenyReason::try_from(0).is_err() && DenyReason::try_from(deny::END).is_err());
    }
}
