//! The TCP listeners that a network namespace already has, read by `NETLINK_SOCK_DIAG` (`linux/inet_diag.h`).
//!
//! BPF learns of a listener when it starts to listen; this is for those which are older than the pod's
//! capture. Deliberately absent: established sockets, UDP, and destroying sockets.

use super::ns::NetNs;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send, socket,
};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Length of `struct inet_diag_req_v2`.
const REQUEST: usize = 56;
/// Offset of `idiag_src` in `struct inet_diag_msg`; the port is 4 bytes before it.
const SRC: usize = 8;
/// `1 << TCP_LISTEN`.
const STATE_LISTEN: u32 = 1 << 10;
/// Most listeners that are read for one family; a pod has a handful.
const MAX_LISTENERS: usize = 65_536;

impl NetNs {
    /// Every address that a TCP socket of the namespace listens on, sorted, each once. A wildcard listener
    /// shows as `0.0.0.0:PORT` or `[::]:PORT`.
    pub fn tcp_listeners(&self) -> io::Result<Vec<SocketAddr>> {
        let fd = self.run(|| {
            socket(
                AddressFamily::Netlink,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::NetlinkSockDiag,
            )
        })??;
        connect(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        let mut found = Vec::new();
        for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
            send(fd.as_raw_fd(), &request(family), MsgFlags::empty())?;
            let mut buf = vec![0; 32 * 1024];
            loop {
                let n = recv(fd.as_raw_fd(), &mut buf, MsgFlags::empty())?;
                if parse(&buf[..n], &mut found)? {
                    break;
                }
                if found.len() > MAX_LISTENERS {
                    return Err(malformed("more TCP listeners than a namespace can have"));
                }
            }
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }
}

/// A dump request for the listening TCP sockets of `family`.
fn request(family: u8) -> [u8; HEADER + REQUEST] {
    let mut out = [0; HEADER + REQUEST];
    out[0..4].copy_from_slice(&((HEADER + REQUEST) as u32).to_ne_bytes());
    out[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    out[6..8].copy_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    out[HEADER] = family;
    out[HEADER + 1] = libc::IPPROTO_TCP as u8;
    out[HEADER + 4..HEADER + 8].copy_from_slice(&STATE_LISTEN.to_ne_bytes());
    out
}

/// Reads one datagram of answers; true when the dump is complete.
fn parse(mut data: &[u8], found: &mut Vec<SocketAddr>) -> io::Result<bool> {
    while !data.is_empty() {
        let len = data.first_chunk::<4>().map_or(0, |b| u32::from_ne_bytes(*b) as usize);
        if len < HEADER || len > data.len() {
            return Err(malformed("a netlink message with a wrong length"));
        }
        let kind = u16::from_ne_bytes([data[4], data[5]]);
        let body = &data[HEADER..len];
        match kind {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let code = body.first_chunk::<4>().map_or(0, |b| i32::from_ne_bytes(*b));
                return match code {
                    0 => Ok(true),
                    _ => Err(io::Error::from_raw_os_error(-code)),
                };
            }
            SOCK_DIAG_BY_FAMILY => {
                found.push(listener(body).ok_or_else(|| malformed("a short inet_diag message"))?);
            }
            _ => {}
        }
        data = &data[(len.next_multiple_of(4)).min(data.len())..];
    }
    Ok(false)
}

/// The local address in a `struct inet_diag_msg`.
fn listener(body: &[u8]) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(*body.get(4..)?.first_chunk()?);
    let src: [u8; 16] = *body.get(SRC..)?.first_chunk()?;
    let ip = match i32::from(body[0]) {
        libc::AF_INET => IpAddr::V4(Ipv4Addr::from(*src.first_chunk::<4>()?)),
        libc::AF_INET6 => IpAddr::V6(Ipv6Addr::from(src)),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("sock_diag answered with {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::testing;

    #[test]
    fn listeners_of_the_namespace_and_only_those() {
        let ns = testing::with_addresses(&["10.77.0.1/24", "fd77::1/64"]);
        assert_eq!(ns.tcp_listeners().unwrap(), []);
        let mut expected: Vec<SocketAddr> =
            ["0.0.0.0:80", "10.77.0.1:15006", "[::]:80", "[fd77::1]:443"].map(|a| a.parse().unwrap()).into();
        let held: Vec<_> = expected.iter().map(|a| ns.listen(*a).unwrap()).collect();
        // A bound or connected socket is no listener.
        let _client = ns.run(|| std::net::TcpStream::connect("127.0.0.1:80")).unwrap().unwrap();
        expected.sort_unstable();
        assert_eq!(ns.tcp_listeners().unwrap(), expected);
        drop(held);
        assert_eq!(ns.tcp_listeners().unwrap(), []);
    }

    #[test]
    fn many_listeners_come_in_several_answers() {
        let ns = testing::fresh();
        let held: Vec<_> =
            (1..=1000).map(|p| ns.listen(SocketAddr::from(([127, 0, 0, 1], p))).unwrap()).collect();
        assert_eq!(ns.tcp_listeners().unwrap().len(), held.len());
    }

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut out = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        out.extend(kind.to_ne_bytes());
        out.extend([0; 10]);
        out.extend(body);
        out
    }

    #[test]
    fn answers_are_parsed_and_damaged_ones_refused() {
        let mut v4 = vec![libc::AF_INET as u8, 10, 0, 0, 0x1f, 0x90, 0, 0, 10, 0, 0, 7];
        v4.resize(72, 0);
        let mut v6 = vec![libc::AF_INET6 as u8, 10, 0, 0, 0, 80, 0, 0];
        v6.resize(72, 0);
        let mut data = message(SOCK_DIAG_BY_FAMILY, &v4);
        data.extend(message(SOCK_DIAG_BY_FAMILY, &v6));
        let mut found = Vec::new();
        assert!(!parse(&data, &mut found).unwrap());
        assert_eq!(found, ["10.0.0.7:8080".parse().unwrap(), "[::]:80".parse().unwrap()]);

        assert!(parse(&message(NLMSG_DONE, &[0; 4]), &mut found).unwrap());
        let denied = parse(&message(NLMSG_ERROR, &(-libc::EPERM).to_ne_bytes()), &mut found).unwrap_err();
        assert_eq!(denied.raw_os_error(), Some(libc::EPERM));
        assert!(parse(&message(SOCK_DIAG_BY_FAMILY, &v4[..10]), &mut found).is_err(), "short body");
        assert!(parse(&data[..data.len() - 4], &mut found).is_err(), "cut off");
        assert!(parse(&[1, 0, 0], &mut found).is_err(), "no header");
    }
}
