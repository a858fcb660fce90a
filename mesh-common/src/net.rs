//! Addresses and ports as the kernel keeps them.

use crate::abi::abi;

abi! {
    /// An IPv6 address in network order, or an IPv4 address in its mapped form `::ffff:a.b.c.d`, so that one set of
    /// maps serves both families. Four words, since that is how the BPF contexts hand addresses out.
    pub struct Ip: 16 {
        /// The words in memory order; each one is in network byte order.
        pub words: [u32; 4] = 0,
    }

    /// A port in network byte order.
    pub struct NetPort: 2 {
        /// The number as it lies in memory.
        pub be: u16 = 0,
    }

    /// An address and a port.
    pub struct Endpoint: 20 {
        /// The address.
        pub addr: Ip = 0,
        /// The port.
        pub port: NetPort = 16,
        _pad: [u8; 2] = 18,
    }
}

/// The third word of a mapped IPv4 address: `00 00 ff ff` in memory.
const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Ip {
    /// `::`, which stands for "any address" in the listener map.
    pub const ANY: Self = Self { words: [0; 4] };

    /// From an IPv4 address as the contexts hand it out (network order).
    #[inline(always)]
    pub const fn v4(word: u32) -> Self {
        Self { words: [0, 0, MAPPED, word] }
    }

    /// From an IPv6 address as the contexts hand it out.
    #[inline(always)]
    pub const fn v6(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// True for an IPv4 address (in its mapped form).
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// The IPv4 word in network order; meaningful only if [`Ip::is_v4`].
    #[inline(always)]
    pub const fn v4_word(&self) -> u32 {
        self.words[3]
    }

    /// True for 127.0.0.0/8 and `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            return u32::from_be(self.words[3]) >> 24 == 127;
        }
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == 0 && self.words[3] == 1_u32.to_be()
    }

    /// True for `0.0.0.0` and `::`.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        self.words[0] == 0
            && self.words[1] == 0
            && (self.words[2] == 0 || self.words[2] == MAPPED)
            && self.words[3] == 0
    }

    /// Field by field instead of through `PartialEq`, which may become a call to `memcmp`.
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        self.words[0] == other.words[0]
            && self.words[1] == other.words[1]
            && self.words[2] == other.words[2]
            && self.words[3] == other.words[3]
    }
}

impl NetPort {
    /// Port 0, which stands for "none".
    pub const NONE: Self = Self { be: 0 };

    /// From a host-order number.
    #[inline(always)]
    pub const fn new(port: u16) -> Self {
        Self { be: port.to_be() }
    }

    /// From a value that is already in network order.
    #[inline(always)]
    pub const fn from_be(be: u16) -> Self {
        Self { be }
    }

    /// The host-order number.
    #[inline(always)]
    pub const fn host(self) -> u16 {
        u16::from_be(self.be)
    }

    /// True unless it is port 0.
    #[inline(always)]
    pub const fn is_some(self) -> bool {
        self.be != 0
    }
}

impl Endpoint {
    /// The all-zero endpoint, which stands for "none".
    pub const NONE: Self = Self::new(Ip::ANY, NetPort::NONE);

    /// Puts the two together.
    #[inline(always)]
    pub const fn new(addr: Ip, port: NetPort) -> Self {
        Self { addr, port, _pad: [0; 2] }
    }

    /// See [`Ip::same`].
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        self.port.be == other.port.be && self.addr.same(&other.addr)
    }
}

#[cfg(feature = "user")]
mod user {
    use super::{Endpoint, Ip, NetPort};
    use std::fmt;
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

    impl From<IpAddr> for Ip {
        /// An IPv4-mapped IPv6 address becomes the IPv4 address: on the wire they are the same.
        fn from(addr: IpAddr) -> Self {
            let octets = match addr {
                IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                IpAddr::V6(v6) => v6.octets(),
            };
            let word =
                |i: usize| u32::from_ne_bytes([octets[i], octets[i + 1], octets[i + 2], octets[i + 3]]);
            Self { words: [word(0), word(4), word(8), word(12)] }
        }
    }

    impl From<Ip> for IpAddr {
        fn from(ip: Ip) -> Self {
            if ip.is_v4() {
                return Self::V4(Ipv4Addr::from(u32::from_be(ip.v4_word())));
            }
            let mut octets = [0_u8; 16];
            for (chunk, word) in octets.chunks_exact_mut(4).zip(ip.words) {
                chunk.copy_from_slice(&word.to_ne_bytes());
            }
            Self::V6(Ipv6Addr::from(octets))
        }
    }

    impl From<SocketAddr> for Endpoint {
        fn from(addr: SocketAddr) -> Self {
            Self::new(addr.ip().into(), NetPort::new(addr.port()))
        }
    }

    impl From<Endpoint> for SocketAddr {
        fn from(endpoint: Endpoint) -> Self {
            Self::new(endpoint.addr.into(), endpoint.port.host())
        }
    }

    impl fmt::Display for Ip {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            fmt::Display::fmt(&IpAddr::from(*self), f)
        }
    }

    impl fmt::Display for NetPort {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            fmt::Display::fmt(&self.host(), f)
        }
    }

    impl fmt::Display for Endpoint {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            fmt::Display::fmt(&SocketAddr::from(*self), f)
        }
    }
}

#[cfg(test)]
#[cfg(feature = "user")]
mod tests {
    use super::*;
    use std::net::{IpAddr, SocketAddr};
    use std::string::ToString;

    fn ip(text: &str) -> Ip {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn both_families_round_trip() {
        for text in ["10.1.2.3", "2001:db8::7", "::1", "127.0.0.1", "0.0.0.0", "::"] {
            assert_eq!(ip(text).to_string(), text);
        }
        assert_eq!(ip("::ffff:10.1.2.3"), ip("10.1.2.3"), "the mapped form is the IPv4 address");
        assert_eq!(ip("10.1.2.3"), Ip::v4(u32::from_ne_bytes([10, 1, 2, 3])), "the contexts' form");
        let endpoint: Endpoint = "[2001:db8::7]:443".parse::<SocketAddr>().unwrap().into();
        assert_eq!(endpoint.to_string(), "[2001:db8::7]:443");
        assert_eq!(endpoint.port.be.to_ne_bytes(), [1, 187], "network order in memory");
    }

    #[test]
    fn special_addresses() {
        for (text, loopback, unspecified) in [
            ("127.0.0.1", true, false),
            ("127.255.0.9", true, false),
            ("128.0.0.1", false, false),
            ("::1", true, false),
            ("::2", false, false),
            ("0.0.0.0", false, true),
            ("::", false, true),
            ("10.0.0.1", false, false),
        ] {
            assert_eq!(ip(text).is_loopback(), loopback, "{text}");
            assert_eq!(ip(text).is_unspecified(), unspecified, "{text}");
        }
    }
}
