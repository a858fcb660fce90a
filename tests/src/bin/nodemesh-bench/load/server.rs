//! The server: one epoll thread for messages, a thread for each stream of bulk data.

use super::{Header, MAX_MESSAGE, Mode, PORT};
use anyhow::{Context, Result};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd, RawFd},
    thread,
};

/// Bytes of one read of bulk data.
const BULK_BUFFER: usize = 256 << 10;

struct Conn {
    stream: TcpStream,
    head: Vec<u8>,
    header: Option<Header>,
    /// Bytes of the present message.
    have: usize,
}

/// What is to happen to a connection next.
enum Next {
    Keep,
    Close,
    Sink,
}

/// Serves until it is killed.
pub(crate) fn run() -> Result<()> {
    let listener = listen().with_context(|| format!("listen on port {PORT}"))?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let listener_key = listener.as_raw_fd() as u64;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, listener_key))?;
    let mut conns: HashMap<RawFd, Conn> = HashMap::new();
    let mut events = vec![EpollEvent::empty(); 256];
    let mut buffer = vec![0u8; MAX_MESSAGE];
    println!("ready");
    loop {
        let n = match epoll.wait(&mut events, EpollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => other?,
        };
        for event in &events[..n] {
            if event.data() == listener_key {
                accept(&listener, &epoll, &mut conns);
                continue;
            }
            let fd = event.data() as RawFd;
            let Some(conn) = conns.get_mut(&fd) else { continue };
            // A connection that breaks is its client's business.
            let next = readable(conn, &mut buffer).unwrap_or(Next::Close);
            if matches!(next, Next::Keep) {
                continue;
            }
            let Some(conn) = conns.remove(&fd) else { continue };
            if matches!(next, Next::Sink) {
                epoll.delete(&conn.stream)?;
                thread::spawn(move || sink(&conn));
            }
        }
    }
}

fn listen() -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT)).into())?;
    socket.listen(4096)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn accept(listener: &TcpListener, epoll: &Epoll, conns: &mut HashMap<RawFd, Conn>) {
    // A few at a time: connections that are there already get their turn.
    for _ in 0..64 {
        let Ok((stream, _)) = listener.accept() else { return };
        let ready = stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true));
        let fd = stream.as_raw_fd();
        let added = epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, fd as u64));
        if ready.is_ok() && added.is_ok() {
            conns.insert(fd, Conn { stream, head: Vec::with_capacity(Header::LEN), header: None, have: 0 });
        }
    }
}

fn readable(conn: &mut Conn, buffer: &mut [u8]) -> Result<Next> {
    let n = match (&conn.stream).read(buffer) {
        Ok(0) => return Ok(Next::Close),
        Ok(n) => n,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Next::Keep),
        Err(error) => return Err(error.into()),
    };
    let mut data = &buffer[..n];
    let header = match conn.header {
        Some(header) => header,
        None => {
            let take = data.len().min(Header::LEN - conn.head.len());
            conn.head.extend_from_slice(&data[..take]);
            data = &data[take..];
            let Ok(bytes) = conn.head.as_slice().try_into() else { return Ok(Next::Keep) };
            let header = Header::decode(bytes)?;
            conn.header = Some(header);
            conn.have = 0;
            header
        }
    };
    conn.have += data.len();
    if header.mode == Mode::Sink {
        return Ok(Next::Sink);
    }
    while conn.have >= header.size {
        conn.have -= header.size;
        // At most one message is under way, so it fits into the socket's buffer.
        (&conn.stream).write_all(&buffer[..header.size])?;
        if header.mode == Mode::Once {
            return Ok(Next::Close);
        }
    }
    Ok(Next::Keep)
}

fn sink(conn: &Conn) {
    let mut count = conn.have as u64;
    let mut buffer = vec![0u8; BULK_BUFFER];
    if conn.stream.set_nonblocking(false).is_err() {
        return;
    }
    loop {
        match (&conn.stream).read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => count += n as u64,
            Err(_) => return,
        }
    }
    // The client that is gone needs no answer.
    let _ = (&conn.stream).write_all(&count.to_be_bytes());
}
