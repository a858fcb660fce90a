//! Listening and dialling inside a network namespace.
//!
//! Deliberately absent: transparent (spoofed) source addresses and socket marks. The app sees its real client
//! through BPF, and the daemon's own sockets are told apart by its cgroup.

use super::ns::NetNs;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, Socket, TcpKeepalive, Type};
use std::{
    future::Future,
    io,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    os::fd::{AsFd, BorrowedFd},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::net::{TcpSocket, TcpStream};

/// Length of the accept queue that is asked for; the namespace's `net.core.somaxconn` may lower it.
const BACKLOG: i32 = 4096;
/// Idle time before the first keep-alive probe.
const KEEPALIVE_TIME: Duration = Duration::from_secs(60);
/// Time between probes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// Probes without an answer before the connection is given up.
const KEEPALIVE_RETRIES: u32 = 4;
/// How long an accept loop waits after an error that will come back at once (no descriptors, no memory).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

impl NetNs {
    /// Listens on `addr` inside the namespace; port 0 takes any free port. The listener does not block.
    /// Accepted sockets inherit TCP_NODELAY and keep-alive from it.
    pub fn listen(&self, addr: SocketAddr) -> io::Result<TcpListener> {
        let socket = self.tcp_socket(addr.ip())?;
        // A restarted daemon must get its port although old connections linger in TIME_WAIT.
        socket.set_reuse_address(true)?;
        if addr.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.bind(&SockAddr::from(addr))?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    }

    /// Dials `to` from inside the namespace, from the address `bind` if given. The socket exists when this
    /// returns; `before_connect` has seen it, and its error is returned. The connection is made by awaiting
    /// the result; dropping it gives up.
    pub fn dial(
        &self,
        bind: Option<IpAddr>,
        to: SocketAddr,
        before_connect: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
    ) -> io::Result<Dialing> {
        let socket = self.tcp_socket(to.ip())?;
        if let Some(ip) = bind {
            // Without this bind() would take one of 28,000 ports for good; with it connect() picks the port,
            // and only the 4-tuple has to be free.
            setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
            socket.bind(&SockAddr::from(SocketAddr::new(ip, 0)))?;
        }
        before_connect(socket.as_fd())?;
        let socket = TcpSocket::from_std_stream(socket.into());
        Ok(Dialing(Box::pin(async move { socket.connect(to).await })))
    }

    /// A datagram socket at `addr` inside the namespace; it does not block.
    pub fn bind_udp(&self, addr: SocketAddr) -> io::Result<UdpSocket> {
        let socket = self.udp_socket(addr.ip())?;
        socket.bind(&SockAddr::from(addr))?;
        Ok(socket.into())
    }

    /// A datagram socket inside the namespace that exchanges datagrams with `to` alone, from a random port of the
    /// address `from`.
    pub fn dial_udp(&self, from: Option<IpAddr>, to: SocketAddr) -> io::Result<tokio::net::UdpSocket> {
        let socket = self.udp_socket(to.ip())?;
        if let Some(ip) = from {
            socket.bind(&SockAddr::from(SocketAddr::new(ip, 0)))?;
        }
        socket.connect(&SockAddr::from(to))?;
        tokio::net::UdpSocket::from_std(socket.into())
    }

    fn udp_socket(&self, ip: IpAddr) -> io::Result<Socket> {
        let domain = if ip.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let kind = Type::DGRAM.nonblocking().cloexec();
        let socket = self.run(|| Socket::new_raw(domain, kind, Some(Protocol::UDP)))??;
        if ip.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        Ok(socket)
    }

    fn tcp_socket(&self, ip: IpAddr) -> io::Result<Socket> {
        let domain = if ip.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let kind = Type::STREAM.nonblocking().cloexec();
        let socket = self.run(|| Socket::new_raw(domain, kind, Some(Protocol::TCP)))??;
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_keepalive(
            &TcpKeepalive::new()
                .with_time(KEEPALIVE_TIME)
                .with_interval(KEEPALIVE_INTERVAL)
                .with_retries(KEEPALIVE_RETRIES),
        )?;
        Ok(socket)
    }
}

/// Makes the close of a connection a reset (SO_LINGER with no time, socket(7)), as from a closed port.
pub fn reset_on_close(stream: &TcpStream) {
    // A socket that is gone already cannot be told, nor needs to be.
    let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// A connection being made; see [`NetNs::dial`].
pub struct Dialing(Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>>);

impl Future for Dialing {
    type Output = io::Result<TcpStream>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}

/// Accepts the next connection. Errors of a single connection are skipped; when the process is out of
/// descriptors or memory it pauses and tries again, so that an accept loop neither ends nor spins. An error
/// that is returned means that the listener itself is broken.
pub async fn accept_from(listener: &tokio::net::TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    loop {
        match listener.accept().await {
            Ok(accepted) => return Ok(accepted),
            Err(e) => match e.raw_os_error() {
                Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                    tracing::warn!(error = %e, "cannot accept a connection for now");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
                Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP) => return Err(e),
                _ => tracing::debug!(error = %e, "a connection failed before it was accepted"),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::testing;
    use std::net::Ipv4Addr;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn any(ip: &str) -> SocketAddr {
        SocketAddr::new(ip.parse().unwrap(), 0)
    }

    #[tokio::test]
    async fn sockets_belong_to_the_namespace_whatever_thread_uses_them() {
        let ns = testing::with_addresses(&["10.77.0.1/24", "10.77.0.2/24"]);
        let listener = ns.listen(any("10.77.0.1")).unwrap();
        let to = listener.local_addr().unwrap();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();

        let mut seen = None;
        let client = "10.77.0.2".parse().unwrap();
        let dialing = ns
            .dial(Some(client), to, |fd| {
                seen = Some(socket2::SockRef::from(&fd).local_addr()?.as_socket().unwrap());
                Ok(())
            })
            .unwrap();
        assert_eq!(seen.unwrap().ip(), client, "before_connect runs after bind");
        let (dialled, accepted) = tokio::join!(dialing, accept_from(&listener));
        let (mut dialled, (mut accepted, peer)) = (dialled.unwrap(), accepted.unwrap());
        assert_eq!(peer.ip(), client);
        assert_eq!(dialled.local_addr().unwrap(), peer);

        dialled.write_all(b"ping").await.unwrap();
        let mut buf = [0; 4];
        accepted.read_exact(&mut buf).await.unwrap();
        assert_eq!(&buf, b"ping");

        for (side, socket) in [("dialled", &dialled), ("accepted", &accepted)] {
            let socket = socket2::SockRef::from(socket);
            assert!(socket.tcp_nodelay().unwrap(), "{side}");
            assert!(socket.keepalive().unwrap(), "{side}");
            assert_eq!(socket.tcp_keepalive_time().unwrap(), KEEPALIVE_TIME, "{side}");
        }

        let home = NetNs::current().unwrap();
        let refused =
            home.dial(None, SocketAddr::new(Ipv4Addr::LOCALHOST.into(), to.port()), |_| Ok(())).unwrap();
        assert!(refused.await.is_err(), "the listener is visible outside its namespace");
    }

    #[tokio::test]
    async fn errors_come_back() {
        let ns = testing::with_addresses(&["10.77.0.1/24"]);
        let taken = ns.listen(any("10.77.0.1")).unwrap().local_addr().unwrap();
        let _holder = ns.listen(taken).unwrap();
        assert_eq!(ns.listen(taken).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(ns.listen(any("10.99.0.1")).unwrap_err().kind(), io::ErrorKind::AddrNotAvailable);
        let Err(e) = ns.dial(None, taken, |_| Err(io::ErrorKind::PermissionDenied.into())) else {
            panic!("the error of before_connect was lost")
        };
        assert_eq!(e.kind(), io::ErrorKind::PermissionDenied);
        let closed = SocketAddr::new(taken.ip(), 1);
        let e = ns.dial(None, closed, |_| Ok(())).unwrap().await.unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn both_families_share_a_port() {
        let ns = testing::with_addresses(&["10.77.0.1/24", "fd77::1/64"]);
        let v6 = ns.listen("[::]:15006".parse().unwrap()).unwrap();
        let v4 = ns.listen("0.0.0.0:15006".parse().unwrap()).unwrap();
        assert_eq!(v4.local_addr().unwrap().port(), v6.local_addr().unwrap().port());
    }
}
