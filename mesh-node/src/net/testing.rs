//! Network namespaces for tests. They need root; without it the tests that use them fail.
//!
//! Links and addresses are made by rtnetlink rather than by running `ip`: a child process holds copies of every
//! socket of every other test until it has executed its program, and closed ports would not be closed.

use super::NetNs;
use nix::{
    net::if_::if_nametoindex,
    sched::{CloneFlags, unshare},
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send, socket,
    },
};
use std::{net::IpAddr, os::fd::AsRawFd, thread};

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const NLM_F_REQUEST_ACK: u16 = 5;
const NLM_F_CREATE_EXCL: u16 = 0x600;
const IFA_F_NODAD: u32 = 2;

/// A new, empty network namespace that lives as long as the value; loopback is up.
pub(crate) fn fresh() -> NetNs {
    // On a thread of its own, which ends in the new namespace.
    let made = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("run the tests as root: they make network namespaces");
        NetNs::current().unwrap()
    });
    let ns = made.join().unwrap();
    set_link(&ns, "lo", true);
    ns
}

/// A fresh namespace with `addrs` (with prefix lengths) on the link `eth0`, which is up.
pub(crate) fn with_addresses(addrs: &[&str]) -> NetNs {
    let ns = fresh();
    let peer = attribute(1, &[&link_header(0, 0)[..], &attribute(3, b"peer0\0")].concat());
    let kind = [attribute(1, b"veth\0"), attribute(2, &peer)].concat();
    let body = [link_header(0, 0).to_vec(), attribute(3, b"eth0\0"), attribute(18, &kind)].concat();
    request(&ns, RTM_NEWLINK, NLM_F_CREATE_EXCL, &body);
    set_link(&ns, "peer0", true);
    set_link(&ns, "eth0", true);
    for addr in addrs {
        let (ip, prefix) = addr.split_once('/').unwrap();
        let (family, octets) = match ip.parse().unwrap() {
            IpAddr::V4(ip) => (libc::AF_INET, ip.octets().to_vec()),
            IpAddr::V6(ip) => (libc::AF_INET6, ip.octets().to_vec()),
        };
        let mut body = vec![family as u8, prefix.parse().unwrap(), 0, 0];
        body.extend(index(&ns, "eth0").to_ne_bytes());
        body.extend(attribute(2, &octets));
        body.extend(attribute(1, &octets));
        body.extend(attribute(8, &IFA_F_NODAD.to_ne_bytes()));
        request(&ns, RTM_NEWADDR, NLM_F_CREATE_EXCL, &body);
    }
    ns
}

/// Takes a link up or down.
pub(crate) fn set_link(ns: &NetNs, name: &str, up: bool) {
    request(ns, RTM_NEWLINK, 0, &link_header(index(ns, name), u32::from(up)));
}

fn index(ns: &NetNs, name: &str) -> u32 {
    ns.run(|| if_nametoindex(name)).unwrap().unwrap()
}

/// A `struct ifinfomsg` that sets `IFF_UP` to `up`.
fn link_header(index: u32, up: u32) -> [u8; 16] {
    let mut out = [0; 16];
    out[4..8].copy_from_slice(&index.to_ne_bytes());
    out[8..12].copy_from_slice(&up.to_ne_bytes());
    out[12..16].copy_from_slice(&1u32.to_ne_bytes());
    out
}

/// A `struct rtattr` with its value, padded.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut out = (4 + value.len() as u16).to_ne_bytes().to_vec();
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

/// Sends one rtnetlink request and expects it to succeed.
fn request(ns: &NetNs, kind: u16, flags: u16, body: &[u8]) {
    let route = SockProtocol::NetlinkRoute;
    let fd = ns
        .run(|| socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, route))
        .unwrap()
        .unwrap();
    connect(fd.as_raw_fd(), &NetlinkAddr::new(0, 0)).unwrap();
    let mut message = (16 + body.len() as u32).to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend((NLM_F_REQUEST_ACK | flags).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    send(fd.as_raw_fd(), &message, MsgFlags::empty()).unwrap();
    let mut answer = [0; 512];
    let n = recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty()).unwrap();
    assert!(n >= 20, "a short answer");
    let error = i32::from_ne_bytes(*answer[16..].first_chunk().unwrap());
    assert_eq!(error, 0, "rtnetlink request {kind}: {}", std::io::Error::from_raw_os_error(-error));
}
