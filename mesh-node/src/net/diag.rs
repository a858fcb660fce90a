//! The sockets of a network namespace, read and ended by `NETLINK_SOCK_DIAG` (`linux/inet_diag.h`).
//!
//! For listeners that are older than the pod's capture (BPF learns only of those that begin to listen), and for
//! sockets of the pod's own processes that must not go on. Deliberately absent: which sockets those are.

use super::ns::NetNs;
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send, socket,
    },
};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Length of `struct inet_diag_req_v2`.
const REQUEST: usize = 56;
/// Length of `struct inet_diag_sockid`, which ends a request and begins at 4 in an answer.
const ID: usize = 48;
/// Length of `struct inet_diag_msg`; attributes follow.
const MESSAGE: usize = 72;
/// Offset of the cookie in `struct inet_diag_sockid`; all ones in a request match any socket.
const COOKIE: usize = 40;
/// In requests: the storage maps whose values are wanted (`INET_DIAG_REQ_SK_BPF_STORAGES`).
const REQ_STORAGES: u16 = 2;
/// In it, the descriptor of one (`SK_DIAG_BPF_STORAGE_REQ_MAP_FD`).
const REQ_MAP_FD: u16 = 1;
/// In answers: the values (`INET_DIAG_SK_BPF_STORAGES`).
const STORAGES: u16 = 20;
/// In it, one of them (`SK_DIAG_BPF_STORAGE`), and in that its bytes (`SK_DIAG_BPF_STORAGE_MAP_VALUE`).
const STORAGE: u16 = 1;
const MAP_VALUE: u16 = 3;
/// The type of an attribute without its flags.
const TYPE_MASK: u16 = 0x3fff;
const TCP_TIME_WAIT: u8 = 6;
const TCP_LISTEN: u8 = 10;
const TCP_NEW_SYN_RECV: u8 = 12;
/// States of sockets that have a peer and a process: all but CLOSE, LISTEN, TIME_WAIT and half-open ones.
const CONNECTED: u32 = 0b1011_0011_0110;
/// Most sockets that are read for one family; a pod has far fewer.
const MAX_SOCKETS: usize = 131_072;

/// TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP, of which only connected sockets are shown.
    Udp,
}

/// One socket of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiagSocket {
    /// Its own address.
    pub local: SocketAddr,
    /// Its peer's; IPv4 in an IPv6 socket shows as IPv4.
    pub remote: SocketAddr,
    transport: Transport,
    family: u8,
    state: u8,
    /// The kernel's name for it, cookie included: a request with it means this socket and no successor.
    id: [u8; ID],
}

/// A netlink socket inside one namespace. Blocking, but never for long: the kernel answers in the call.
#[derive(Debug)]
pub struct Diag(OwnedFd);

impl NetNs {
    /// Opens the diagnosis of this namespace's sockets.
    pub fn diag(&self) -> io::Result<Diag> {
        let fd = self.run(|| {
            socket(
                AddressFamily::Netlink,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::NetlinkSockDiag,
            )
        })??;
        connect(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Diag(fd))
    }

    /// Every address that a TCP socket of the namespace listens on, sorted, each once. A wildcard listener
    /// shows as `0.0.0.0:PORT` or `[::]:PORT`.
    pub fn tcp_listeners(&self) -> io::Result<Vec<SocketAddr>> {
        let diag = self.diag()?;
        let mut found = Vec::new();
        for family in FAMILIES {
            let request = Request::new(family, Transport::Tcp, 1 << TCP_LISTEN);
            diag.ask(&request.message(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP), |body| {
                found.push(address(body, 0)?);
                bounded(&found)
            })?;
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }
}

const FAMILIES: [u8; 2] = [libc::AF_INET as u8, libc::AF_INET6 as u8];

/// Whether this kernel can end the sockets of others (`CONFIG_INET_DIAG_DESTROY`). Asks it to end one that cannot
/// exist.
pub fn can_destroy() -> io::Result<bool> {
    let nobody = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut request = Request::new(libc::AF_INET as u8, Transport::Tcp, 0);
    request.id = exact(nobody, nobody);
    let diag = NetNs::current()?.diag()?;
    match diag.ask(&request.message(SOCK_DESTROY, NLM_F_ACK), |_| Ok(())) {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(true),
        Err(error) => Err(error),
        Ok(()) => Ok(true),
    }
}

impl Diag {
    /// The connected TCP sockets that have a value in a BPF socket storage map and whose value `wanted` accepts.
    pub fn tcp_with_storage(
        &self,
        map: BorrowedFd<'_>,
        mut wanted: impl FnMut(&[u8]) -> bool,
    ) -> io::Result<Vec<DiagSocket>> {
        self.list(Transport::Tcp, Some(map), |_, value| value.is_some_and(&mut wanted))
    }

    /// The connected UDP sockets that `wanted` accepts. The kernel shows their storage to nobody.
    pub fn udp(&self, mut wanted: impl FnMut(&DiagSocket) -> bool) -> io::Result<Vec<DiagSocket>> {
        self.list(Transport::Udp, None, |socket, _| wanted(socket))
    }

    fn list(
        &self,
        transport: Transport,
        storage_map: Option<BorrowedFd<'_>>,
        mut wanted: impl FnMut(&DiagSocket, Option<&[u8]>) -> bool,
    ) -> io::Result<Vec<DiagSocket>> {
        let mut found = Vec::new();
        for family in FAMILIES {
            let mut request = Request::new(family, transport, CONNECTED);
            request.storage = storage_map.map(|map| map.as_raw_fd().unsigned_abs());
            self.ask(&request.message(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP), |body| {
                let socket = DiagSocket::parse(body, transport)?;
                if wanted(&socket, storage(body)) {
                    found.push(socket);
                }
                bounded(&found)
            })?;
        }
        Ok(found)
    }

    /// The live TCP socket with these two ends, if there is one.
    pub fn tcp(&self, local: SocketAddr, remote: SocketAddr) -> io::Result<Option<DiagSocket>> {
        // A socket of IPv6 that carries IPv4 is found as IPv4.
        let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let mut request = Request::new(family as u8, Transport::Tcp, !0);
        request.id = exact(local, remote);
        let mut found = None;
        let asked = self.ask(&request.message(SOCK_DIAG_BY_FAMILY, 0), |body| {
            found = Some(DiagSocket::parse(body, Transport::Tcp)?);
            Ok(())
        });
        match asked {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            // Without the connection the kernel goes on to look for a listener, or shows what is left of it.
            Ok(()) => Ok(found.filter(|s| !matches!(s.state, TCP_TIME_WAIT | TCP_LISTEN | TCP_NEW_SYN_RECV))),
            Err(error) => Err(error),
        }
    }

    /// Ends a socket: its process gets ECONNABORTED, a TCP peer a reset. False when it was gone already.
    pub fn destroy(&self, socket: &DiagSocket) -> io::Result<bool> {
        let mut request = Request::new(socket.family, socket.transport, 0);
        request.id = socket.id;
        match self.ask(&request.message(SOCK_DESTROY, NLM_F_ACK), |_| Ok(())) {
            Ok(()) => Ok(true),
            // ESTALE: another socket has its addresses now.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Sends one request and reads its answers.
    fn ask(&self, message: &[u8], mut each: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        let dump = u16::from_ne_bytes([message[6], message[7]]) & NLM_F_DUMP != 0;
        let fd = self.0.as_raw_fd();
        send(fd, message, MsgFlags::empty())?;
        let mut buf = vec![0; 32 * 1024];
        loop {
            let n = match recv(fd, &mut buf, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            // A request for one socket is answered by one message.
            if parse(&buf[..n], &mut each)? || !dump {
                return Ok(());
            }
        }
    }
}

fn bounded<T>(found: &[T]) -> io::Result<()> {
    if found.len() > MAX_SOCKETS {
        return Err(malformed("more sockets than a namespace can have"));
    }
    Ok(())
}

/// A `struct inet_diag_req_v2`, and the storage map whose values are wanted.
struct Request {
    family: u8,
    transport: Transport,
    states: u32,
    id: [u8; ID],
    storage: Option<u32>,
}

impl Request {
    fn new(family: u8, transport: Transport, states: u32) -> Self {
        Self { family, transport, states, id: [0; ID], storage: None }
    }

    fn message(&self, kind: u16, flags: u16) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + REQUEST + 12);
        out.extend([0; 4]);
        out.extend(kind.to_ne_bytes());
        out.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        out.extend([0; 8]);
        let protocol = match self.transport {
            Transport::Tcp => libc::IPPROTO_TCP,
            Transport::Udp => libc::IPPROTO_UDP,
        };
        out.extend([self.family, protocol as u8, 0, 0]);
        out.extend(self.states.to_ne_bytes());
        out.extend(self.id);
        if let Some(map) = self.storage {
            out.extend(12u16.to_ne_bytes());
            out.extend(REQ_STORAGES.to_ne_bytes());
            out.extend(8u16.to_ne_bytes());
            out.extend(REQ_MAP_FD.to_ne_bytes());
            out.extend(map.to_ne_bytes());
        }
        let len = out.len() as u32;
        out[0..4].copy_from_slice(&len.to_ne_bytes());
        out
    }
}

/// A `struct inet_diag_sockid` for whatever socket has these two ends.
fn exact(local: SocketAddr, remote: SocketAddr) -> [u8; ID] {
    let mut id = [0; ID];
    id[0..2].copy_from_slice(&local.port().to_be_bytes());
    id[2..4].copy_from_slice(&remote.port().to_be_bytes());
    for (at, ip) in [(4, local.ip()), (20, remote.ip())] {
        match ip {
            IpAddr::V4(ip) => id[at..at + 4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => id[at..at + 16].copy_from_slice(&ip.octets()),
        }
    }
    id[COOKIE..].fill(0xff);
    id
}

impl DiagSocket {
    /// The kernel's number for the socket, the same that BPF programs see.
    pub fn cookie(&self) -> u64 {
        let half = |at: usize| self.id[at..].first_chunk().map_or(0, |b| u64::from(u32::from_ne_bytes(*b)));
        half(COOKIE) | half(COOKIE + 4) << 32
    }

    fn parse(body: &[u8], transport: Transport) -> io::Result<Self> {
        let (local, remote) = (address(body, 0)?, address(body, 1)?);
        let canonical = |addr: SocketAddr| SocketAddr::new(addr.ip().to_canonical(), addr.port());
        Ok(Self {
            local: canonical(local),
            remote: canonical(remote),
            transport,
            family: body[0],
            state: body[1],
            id: body[4..].first_chunk().copied().ok_or_else(short)?,
        })
    }
}

/// Reads one datagram of answers; true when they are complete.
fn parse(mut data: &[u8], each: &mut impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<bool> {
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
            SOCK_DIAG_BY_FAMILY => each(body)?,
            _ => {}
        }
        data = &data[(len.next_multiple_of(4)).min(data.len())..];
    }
    Ok(false)
}

/// One of the two addresses in a `struct inet_diag_msg`: 0 is the socket's own, 1 the peer's.
fn address(body: &[u8], which: usize) -> io::Result<SocketAddr> {
    let port = body.get(4 + 2 * which..).and_then(<[u8]>::first_chunk).ok_or_else(short)?;
    let ip: [u8; 16] = *body.get(8 + 16 * which..).and_then(<[u8]>::first_chunk).ok_or_else(short)?;
    let ip = match i32::from(body[0]) {
        libc::AF_INET => IpAddr::V4(Ipv4Addr::from([ip[0], ip[1], ip[2], ip[3]])),
        libc::AF_INET6 => IpAddr::V6(Ipv6Addr::from(ip)),
        _ => return Err(malformed("an unknown address family")),
    };
    Ok(SocketAddr::new(ip, u16::from_be_bytes(*port)))
}

/// The value of the storage map that was asked for.
fn storage(body: &[u8]) -> Option<&[u8]> {
    attribute(attribute(attribute(body.get(MESSAGE..)?, STORAGES)?, STORAGE)?, MAP_VALUE)
}

/// The first netlink attribute of a type.
fn attribute(mut data: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let [l0, l1, t0, t1] = *data.first_chunk::<4>()?;
        let len = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = data.get(4..len)?;
        if u16::from_ne_bytes([t0, t1]) & TYPE_MASK == wanted {
            return Some(value);
        }
        data = data.get(len.next_multiple_of(4)..)?;
    }
}

fn short() -> io::Error {
    malformed("a short inet_diag message")
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("sock_diag answered with {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::testing;
    use std::io::Read as _;

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
    fn a_live_connection_is_found_and_ended_and_its_listener_is_not() {
        for any in ["127.0.0.1:0", "[::1]:0"] {
            let ns = testing::fresh();
            let diag = ns.diag().unwrap();
            let listener = ns.run(|| std::net::TcpListener::bind(any)).unwrap().unwrap();
            let server_addr = listener.local_addr().unwrap();
            let mut client = ns.run(|| std::net::TcpStream::connect(server_addr)).unwrap().unwrap();
            let (server, client_addr) = listener.accept().unwrap();
            assert_eq!(diag.tcp(client_addr, SocketAddr::new(server_addr.ip(), 9)).unwrap(), None);
            let found = diag.tcp(client_addr, server_addr).unwrap().unwrap();
            assert_eq!((found.local, found.remote), (client_addr, server_addr));
            assert!(diag.destroy(&found).unwrap());
            let error = client.read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
            assert!(!diag.destroy(&found).unwrap(), "it is gone");
            assert_eq!(diag.tcp(client_addr, server_addr).unwrap(), None);
            // The server's end got a reset; its addresses now lead to the listener, which must live.
            let error = (&server).read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            assert_eq!(diag.tcp(server_addr, client_addr).unwrap(), None);
            ns.run(|| std::net::TcpStream::connect(server_addr)).unwrap().unwrap();
        }
    }

    #[test]
    fn connected_udp_sockets_are_listed_with_their_cookie_and_ended() {
        let ns = testing::fresh();
        let diag = ns.diag().unwrap();
        let bind = || ns.run(|| std::net::UdpSocket::bind("127.0.0.1:0")).unwrap().unwrap();
        let (server, client, _unconnected) = (bind(), bind(), bind());
        let peer = server.local_addr().unwrap();
        client.connect(peer).unwrap();
        let found = diag.udp(|_| true).unwrap();
        assert_eq!(found.iter().map(|s| s.remote).collect::<Vec<_>>(), [peer]);
        assert_ne!(found[0].cookie(), 0);
        assert!(diag.destroy(&found[0]).unwrap());
        let error = client.recv(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        assert_eq!(diag.udp(|_| true).unwrap(), []);
    }

    #[test]
    fn a_kernel_that_can_destroy_says_so() {
        assert!(can_destroy().unwrap());
    }

    #[test]
    fn a_request_names_family_protocol_states_and_map() {
        let mut request = Request::new(libc::AF_INET6 as u8, Transport::Udp, CONNECTED);
        request.storage = Some(77);
        let message = request.message(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP);
        assert_eq!(message.len(), HEADER + REQUEST + 12);
        assert_eq!(message[0..4], 84u32.to_ne_bytes());
        assert_eq!(message[HEADER..HEADER + 2], [libc::AF_INET6 as u8, 17]);
        assert_eq!(message[80..], 77u32.to_ne_bytes());
    }

    #[test]
    fn the_storage_value_is_found_among_other_attributes() {
        let attr = |kind: u16, value: &[u8]| {
            let mut out = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
            out.extend(kind.to_ne_bytes());
            out.extend(value);
            out.resize(out.len().next_multiple_of(4), 0);
            out
        };
        let value = attr(MAP_VALUE, b"what it holds");
        let one = [attr(2, &[1, 0, 0, 0]), attr(1, &[]), value].concat();
        let all = attr(STORAGES | 0x8000, &attr(STORAGE | 0x8000, &one));
        let mut body = vec![0; MESSAGE];
        body.extend(attr(8, &[0]));
        assert_eq!(storage(&body), None);
        body.extend(all);
        assert_eq!(storage(&body).unwrap(), b"what it holds");
        for cut in MESSAGE + 8..body.len() {
            assert_eq!(storage(&body[..cut]), None, "cut off at {cut}");
        }
        body.truncate(MESSAGE);
        body.extend([0; 8]);
        assert_eq!(storage(&body), None, "an attribute without a length must not be read for ever");
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
        let mut each = |body: &[u8]| {
            found.push(address(body, 0)?);
            Ok(())
        };
        assert!(!parse(&data, &mut each).unwrap());
        assert!(parse(&message(NLMSG_DONE, &[0; 4]), &mut each).unwrap());
        let denied = parse(&message(NLMSG_ERROR, &(-libc::EPERM).to_ne_bytes()), &mut each).unwrap_err();
        assert_eq!(denied.raw_os_error(), Some(libc::EPERM));
        assert!(parse(&message(SOCK_DIAG_BY_FAMILY, &v4[..10]), &mut each).is_err(), "short body");
        assert!(parse(&data[..data.len() - 4], &mut each).is_err(), "cut off");
        assert!(parse(&[1, 0, 0], &mut each).is_err(), "no header");
        // The first of the two messages in the cut-off answer was whole.
        let expected: [SocketAddr; 3] =
            ["10.0.0.7:8080", "[::]:80", "10.0.0.7:8080"].map(|addr| addr.parse().unwrap());
        assert_eq!(found, expected);
    }
}
