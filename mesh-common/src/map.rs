//! Names and sizes of the maps. The names are the symbols in the object and the file names of the pins.

/// Declares a map's name and its bound.
macro_rules! maps {
    ($( $(#[$meta:meta])* $konst:ident: $entries:literal; )+) => {
        $( $(#[$meta])* pub const $konst: &str = stringify!($konst); )+

        /// The largest number of entries of each map.
        pub mod entries {
            $( $(#[$meta])* pub const $konst: usize = $entries; )+
        }

        /// Every map's name.
        pub const ALL: &[&str] = &[$( $konst, )+];
    };
}

maps! {
    /// Array of one `value::Config`.
    CONFIG: 1;
    /// `key::Daemon` -> `value::Daemon`: the daemon and those that drain after a takeover. Their sockets are never
    /// captured.
    DAEMONS: 32;
    /// Array of one `value::Heartbeat`.
    HEARTBEAT: 1;
    /// Array of one `value::Generation`.
    GENERATION: 1;
    /// LRU, `key::Verdict` -> `value::Verdict`.
    VERDICTS: 65_536;
    /// `key::Probe` -> `value::LocalFlow`: live connections that a verdict let go straight to a pod of this node.
    LOCAL_FLOWS: 65_536;
    /// `key::Maglev` -> `value::MaglevChunk`.
    MAGLEV: 65_536;
    /// `key::Netns` -> `value::Pod`.
    PODS: 4096;
    /// `key::Frontend` -> `value::Frontend`.
    FRONTENDS: 65_536;
    /// `key::Backend` -> `value::Backend`.
    BACKENDS: 524_288;
    /// `key::Member` -> slot (u32).
    MEMBERS: 524_288;
    /// `net::Ip` -> `value::Destination`.
    DESTINATIONS: 131_072;
    /// LRU, `key::Affinity` -> `value::Affinity`.
    AFFINITY: 65_536;
    /// Socket storage of clients: `value::SocketFlow`.
    SOCKET_FLOW: 1;
    /// Socket storage of the daemon's accepted sockets: `value::OriginalDst`.
    ORIG_DST: 1;
    /// Socket storage of the daemon's dialling sockets and of the app's accepted ones: the client
    /// (`net::Endpoint`).
    CLIENT: 1;
    /// LRU, `key::Flow` -> `value::OriginalDst`: on its way from the client to the daemon's socket.
    ORIG_DST_FLOWS: 32_768;
    /// LRU, `key::Flow` -> client (`net::Endpoint`): on its way from the daemon's socket to the app's.
    CLIENT_FLOWS: 32_768;
    /// LRU, `key::Probe` -> `value::Probe`.
    PROBE_FLOWS: 8192;
    /// `net::Ip` -> `value::Inbound`.
    INBOUND: 16_384;
    /// `net::Endpoint` -> `value::InboundPort`.
    INBOUND_PORTS: 65_536;
    /// Sockets, `net::Ip` -> the daemon's socket that plaintext is steered to.
    INBOUND_SOCKETS: 16_384;
    /// `key::Listener` -> `value::Listener`, kept by the kernel.
    LISTENERS: 65_536;
    /// `key::Listener` -> `value::Listener`, kept by user space: sockets that are older than the capture.
    OLD_LISTENERS: 65_536;
    /// LRU, `key::Udp` of the backend -> service (`net::Endpoint`).
    UDP_FLOWS: 65_536;
    /// LRU, `key::Udp` of the service -> backend (`net::Endpoint`).
    UDP_STICKY: 65_536;
    /// LRU, `key::Nameserver` -> the nameserver (`net::Endpoint`): those that DNS queries were sent to.
    NAMESERVERS: 16_384;
    /// `key::Direct` -> `value::Direct`.
    DIRECT_STATS: 65_536;
    /// Per-CPU array of u64 by `code::counter`.
    COUNTERS: 64;
    /// Ring buffer of `value::DenyEvent`, size in bytes.
    EVENTS: 262_144;
}

const _: () = assert!(crate::code::counter::END as usize <= entries::COUNTERS, "COUNTERS is too small");
