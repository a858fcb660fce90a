//! The addresses that a network namespace has.

use super::ns::NetNs;
use nix::{ifaddrs::getifaddrs, net::if_::InterfaceFlags};
use std::{io, net::IpAddr};

impl NetNs {
    /// Addresses of the interfaces that are up, in the interfaces' order, without loopback, link-local,
    /// multicast and unspecified ones, each once.
    pub fn addresses(&self) -> io::Result<Vec<IpAddr>> {
        let mut found = Vec::new();
        for interface in self.run(getifaddrs)?? {
            let flags = interface.flags;
            if !flags.contains(InterfaceFlags::IFF_UP) || flags.contains(InterfaceFlags::IFF_LOOPBACK) {
                continue;
            }
            let Some(address) = interface.address else { continue };
            let ip = if let Some(v4) = address.as_sockaddr_in() {
                IpAddr::V4(v4.ip())
            } else if let Some(v6) = address.as_sockaddr_in6() {
                IpAddr::V6(v6.ip())
            } else {
                continue;
            };
            if is_pod_address(ip) && !found.contains(&ip) {
                found.push(ip);
            }
        }
        Ok(found)
    }
}

/// Whether other pods can reach a pod by `ip`.
pub fn is_pod_address(ip: IpAddr) -> bool {
    let local = match ip {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local() || ip.to_ipv4_mapped().is_some(),
    };
    !local && !ip.is_multicast() && !ip.is_unspecified()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::testing;

    #[test]
    fn loopback_and_link_local_are_left_out() {
        let ns = testing::with_addresses(&["10.77.0.1/24", "fd77::1/64", "169.254.3.1/16"]);
        let expected: Vec<IpAddr> = vec!["10.77.0.1".parse().unwrap(), "fd77::1".parse().unwrap()];
        assert_eq!(ns.addresses().unwrap(), expected);
        testing::set_link(&ns, "eth0", false);
        assert_eq!(ns.addresses().unwrap(), Vec::<IpAddr>::new());
    }

    #[test]
    fn only_reachable_addresses_count() {
        for (ip, expected) in [
            ("10.1.2.3", true),
            ("192.168.0.1", true),
            ("fd00::1", true),
            ("2001:db8::1", true),
            ("127.0.0.1", false),
            ("::1", false),
            ("169.254.7.127", false),
            ("fe80::1", false),
            ("ff02::1", false),
            ("224.0.0.1", false),
            ("0.0.0.0", false),
            ("::", false),
            ("::ffff:10.0.0.1", false),
        ] {
            assert_eq!(is_pod_address(ip.parse().unwrap()), expected, "{ip}");
        }
    }
}
