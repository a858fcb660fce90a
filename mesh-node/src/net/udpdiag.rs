//! The UDP socket that a datagram came from, found by both addresses with `NETLINK_SOCK_DIAG` (`linux/inet_diag.h`): its
//! cookie, by which BPF knows it. Deliberately absent: lists of sockets, which are `diag`'s.

use super::ns::NetNs;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send, socket,
};
use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd,
};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Length of `struct inet_diag_req_v2`.
const REQUEST: usize = 56;
/// Offset of `idiag_cookie` in `struct inet_diag_msg`.
const COOKIE: usize = 44;

/// A UDP socket that a datagram came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpClient {
    /// What `bpf_get_socket_cookie` returns for it.
    pub cookie: u64,
    /// Whether it is connected, so that it talks to one peer alone.
    pub connected: bool,
}

impl NetNs {
    /// The UDP socket at `client` that exchanges datagrams with `peer`. `None` when it is closed, or when the kernel
    /// has no diagnosis of UDP sockets (`CONFIG_INET_UDP_DIAG`).
    pub fn udp_client(&self, client: SocketAddr, peer: SocketAddr) -> io::Result<Option<UdpClient>> {
        let fd = self.run(|| {
            socket(
                AddressFamily::Netlink,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::NetlinkSockDiag,
            )
        })??;
        connect(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        send(fd.as_raw_fd(), &udp_request(client, peer), MsgFlags::empty())?;
        let mut buf = [0; 4096];
        let n = recv(fd.as_raw_fd(), &mut buf, MsgFlags::empty())?;
        parse_udp(&buf[..n])
    }
}

/// A request for one UDP socket.
fn udp_request(client: SocketAddr, peer: SocketAddr) -> [u8; HEADER + REQUEST] {
    let mut out = [0; HEADER + REQUEST];
    out[0..4].copy_from_slice(&((HEADER + REQUEST) as u32).to_ne_bytes());
    out[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    out[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    let body = &mut out[HEADER..];
    body[0] = if client.is_ipv4() { libc::AF_INET as u8 } else { libc::AF_INET6 as u8 };
    body[1] = libc::IPPROTO_UDP as u8;
    body[4..8].fill(0xff);
    // For a single UDP socket the kernel takes source and destination as those of a datagram to it.
    for (at, port_at, side) in [(12, 8, peer), (28, 10, client)] {
        body[port_at..port_at + 2].copy_from_slice(&side.port().to_be_bytes());
        match side.ip() {
            IpAddr::V4(ip) => body[at..at + 4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => body[at..at + 16].copy_from_slice(&ip.octets()),
        }
    }
    // INET_DIAG_NOCOOKIE: any socket.
    body[48..56].fill(0xff);
    out
}

fn parse_udp(data: &[u8]) -> io::Result<Option<UdpClient>> {
    let short = || malformed("a short answer about a UDP socket");
    let kind =
        data.get(4..).and_then(|d| d.first_chunk()).map(|b| u16::from_ne_bytes(*b)).ok_or_else(short)?;
    let body = data.get(HEADER..).ok_or_else(short)?;
    match kind {
        SOCK_DIAG_BY_FAMILY => {
            let cookie = body.get(COOKIE..).and_then(|d| d.first_chunk::<8>()).ok_or_else(short)?;
            let (low, high) = cookie.split_at(4);
            let half = |b: &[u8]| b.first_chunk().map_or(0, |b| u64::from(u32::from_ne_bytes(*b)));
            let connected = body[6..8] != [0, 0];
            Ok(Some(UdpClient { cookie: half(low) | half(high) << 32, connected }))
        }
        NLMSG_ERROR => match body.first_chunk::<4>().map_or(0, |b| i32::from_ne_bytes(*b)) {
            e if -e == libc::ENOENT => Ok(None),
            e => Err(io::Error::from_raw_os_error(-e)),
        },
        _ => Err(malformed("something else than a UDP socket")),
    }
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("sock_diag answered with {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::testing;

    #[test]
    fn a_udp_client_is_found_by_both_ends_and_told_from_others() {
        let ns = testing::with_addresses(&["10.77.0.1/24", "fd77::1/64"]);
        for ip in ["10.77.0.1", "fd77::1"] {
            let at = |port| SocketAddr::new(ip.parse().unwrap(), port);
            let peers = [15053, 15054].map(|port| ns.bind_udp(at(port)).unwrap().local_addr().unwrap());
            let open = ns.bind_udp(at(40_000)).unwrap();
            let first = ns.udp_client(at(40_000), peers[0]).unwrap().unwrap();
            assert!(!first.connected && first.cookie != 0, "{first:?}");
            assert_eq!(ns.udp_client(at(40_000), peers[1]).unwrap(), Some(first), "any peer");
            open.connect(peers[0]).unwrap();
            let connected = ns.udp_client(at(40_000), peers[0]).unwrap();
            assert_eq!(connected, Some(UdpClient { connected: true, ..first }));
            assert_eq!(ns.udp_client(at(40_000), peers[1]).unwrap(), None, "not its peer");
            let other = ns.bind_udp(at(40_001)).unwrap();
            assert_ne!(ns.udp_client(at(40_001), peers[0]).unwrap().unwrap().cookie, first.cookie);
            drop((open, other));
            assert_eq!(ns.udp_client(at(40_000), peers[0]).unwrap(), None);
        }
        assert!(parse_udp(&[0; 10]).is_err() && parse_udp(&message(SOCK_DIAG_BY_FAMILY, &[0; 20])).is_err());
    }

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut out = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        out.extend(kind.to_ne_bytes());
        out.extend([0; 10]);
        out.extend(body);
        out
    }
}
