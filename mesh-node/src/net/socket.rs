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
    net::{IpAddr, SocketAddr, TcpListener},
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
    /// returns; `before_connect` has seen it, and its error is returned. The connection is made by awaiting the
    /// result; dropping it gives up.
    pub fn dial(
        &self,
        bind: Option<IpAddr>,
        to: SocketAddr,
        before_connect: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
    ) -> io::Result<Dialing> {
        let socket = self.tcp_socket(to.ip())?;
        if let Some(ip) = bind {
            // Without this bind() would take one of 28,000 ports for good; with it connect() picks the port, and
            // only the 4-tuple has to be free.
            setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
            socket.bind(&SockAddr::from(SocketAddr::new(ip, 0)))?;
        }
        before_connect(socket.as_fd())?;
        let socket = TcpSocket::from_std_stream(socket.into());
        Ok(Dialing(Box::pin(async move { socket.connect(to).await })))
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
/// descriptors or memory it pauses and tries again, so that an accept loop neither ends nor spins. An error that
/// is returned means that the listener itself is broken.
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
