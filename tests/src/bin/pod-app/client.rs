//! The clients: many small exchanges, each verified, and one-off dials.

use crate::options::{Connects, Dial, Hold, Mode, Udp};
use anyhow::{Context, Result, ensure};
use mesh_tests::app::{ConnectsReport, HoldReport, Who};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{MsgFlags, SockaddrStorage, sendto, setsockopt, sockopt::TcpFastOpenConnect},
};
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd},
    thread,
    time::{Duration, Instant},
};

pub(crate) fn target(to: SocketAddr, mapped: bool) -> SocketAddr {
    match to.ip() {
        IpAddr::V4(ip) if mapped => (ip.to_ipv6_mapped(), to.port()).into(),
        _ => to,
    }
}

/// `::ffff:a.b.c.d` and `a.b.c.d` are one address: the server may see the one where the client has the other.
fn canonical(addr: SocketAddr) -> SocketAddr {
    (addr.ip().to_canonical(), addr.port()).into()
}

fn on_threads(
    n: u64,
    threads: u64,
    work: impl Fn(u64, u64) -> ConnectsReport + Sync,
) -> Result<ConnectsReport> {
    let threads = threads.max(1);
    let started = Instant::now();
    let mut total = ConnectsReport::default();
    thread::scope(|scope| -> Result<()> {
        let work = &work;
        let handles: Vec<_> = (0..threads)
            .map(|thread| {
                let share = n / threads + u64::from(thread < n % threads);
                scope.spawn(move || work(thread, share))
            })
            .collect();
        for handle in handles {
            total.merge(handle.join().map_err(|_| anyhow::anyhow!("a client thread panicked"))?);
        }
        Ok(())
    })?;
    total.millis = started.elapsed().as_millis() as u64;
    Ok(total)
}

/// What one exchange showed.
struct Seen {
    who: Who,
    sent: String,
    /// What `getpeername` said; `None` where it does not apply.
    peer: Option<SocketAddr>,
    own: SocketAddr,
}

fn judge(report: &mut ConnectsReport, seen: Seen, dialled: SocketAddr, expect: &[String], any_client: bool) {
    let mut good = true;
    let mut wrong = |counter: &mut u64, example: String, examples: &mut Vec<String>| {
        *counter += 1;
        good = false;
        if examples.len() < 8 {
            examples.push(example);
        }
    };
    if seen.who.payload != seen.sent {
        let text = format!("sent {} and got {}", seen.sent, seen.who.payload);
        wrong(&mut report.lost, text, &mut report.examples);
    }
    if let Some(peer) = seen.peer
        && peer != dialled
    {
        wrong(&mut report.wrong_peer, format!("dialled {dialled}, getpeername {peer}"), &mut report.examples);
    }
    if !any_client {
        let accepted = seen.who.accepted_from.parse().map(canonical);
        let peer = if seen.who.peer == "-" { accepted.clone() } else { seen.who.peer.parse().map(canonical) };
        let own = canonical(seen.own);
        if accepted != Ok(own) || peer != Ok(own) {
            let text = format!(
                "client {own}, server accept() {} getpeername() {}",
                seen.who.accepted_from, seen.who.peer
            );
            wrong(&mut report.wrong_client, text, &mut report.examples);
        }
    }
    if !expect.is_empty() && !expect.contains(&seen.who.name) {
        wrong(&mut report.wrong_backend, format!("answered by {}", seen.who.name), &mut report.examples);
    }
    report.ok += u64::from(good);
    *report.by_backend.entry(seen.who.name).or_default() += 1;
}

/// `pod-app connects`.
pub(crate) fn connects(args: &Connects) -> Result<ConnectsReport> {
    let to = target(args.to, args.mapped);
    on_threads(args.n, args.threads, |thread, share| {
        let mut report = ConnectsReport::default();
        for i in 0..share {
            let payload = format!("x{thread}-{i}-{}", std::process::id());
            match exchange(args, to, &payload) {
                Ok(seen) => judge(&mut report, seen, to, &args.expect, args.any_client),
                Err(error) => {
                    report.lost += 1;
                    report.error(format!("{error:#}"), 1);
                }
            }
        }
        report
    })
}

fn exchange(args: &Connects, to: SocketAddr, payload: &str) -> Result<Seen> {
    let timeout = Duration::from_secs(args.timeout);
    let line = format!("{payload}\n");
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP)).context("socket")?;
    let mut early = 0;
    match args.mode {
        Mode::Plain => socket.connect_timeout_blocking(to, timeout).context("connect")?,
        Mode::Nonblock => {
            socket.set_nonblocking(true)?;
            match socket.connect(&to.into()) {
                Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
                    await_connected(&socket, timeout)?;
                }
                other => other.context("connect")?,
            }
            socket.set_nonblocking(false)?;
        }
        Mode::Tfo => {
            let flags = MsgFlags::from_bits_retain(libc::MSG_FASTOPEN);
            socket.set_write_timeout(Some(timeout))?;
            early = sendto(socket.as_raw_fd(), line.as_bytes(), &SockaddrStorage::from(to), flags)
                .context("sendto(MSG_FASTOPEN)")?;
        }
        Mode::TfoConnect => {
            setsockopt(&socket, TcpFastOpenConnect, &true).context("TCP_FASTOPEN_CONNECT")?;
            socket.connect(&to.into()).context("connect")?;
        }
    }
    let mut stream: TcpStream = socket.into();
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    stream.write_all(&line.as_bytes()[early..]).context("write")?;
    let mut answer = String::new();
    BufReader::new(&stream).read_line(&mut answer).context("read")?;
    // After the answer: a TFO socket has no peer before its handshake.
    let seen = Seen {
        who: Who::parse(&answer).with_context(|| format!("the answer was {answer:?}"))?,
        sent: payload.to_owned(),
        peer: Some(stream.peer_addr().context("getpeername")?),
        own: stream.local_addr().context("getsockname")?,
    };
    Ok(seen)
}

/// A blocking connect with a bound that does not turn the socket non-blocking as `connect_timeout` would: the
/// send timeout bounds connect(2).
trait ConnectBlocking {
    fn connect_timeout_blocking(&self, to: SocketAddr, timeout: Duration) -> io::Result<()>;
}

impl ConnectBlocking for Socket {
    fn connect_timeout_blocking(&self, to: SocketAddr, timeout: Duration) -> io::Result<()> {
        self.set_write_timeout(Some(timeout))?;
        self.connect(&to.into())
    }
}

fn await_connected(socket: &Socket, timeout: Duration) -> Result<()> {
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    if poll(&mut fds, timeout).context("poll")? == 0 {
        return Err(io::Error::from(io::ErrorKind::TimedOut)).context("connect");
    }
    match socket.take_error()? {
        Some(error) => Err(error).context("connect"),
        None => Ok(()),
    }
}

/// `pod-app udp`.
pub(crate) fn udp(args: &Udp) -> Result<ConnectsReport> {
    let to = target(args.to, args.mapped);
    on_threads(args.n, args.threads, |thread, share| {
        let mut report = ConnectsReport::default();
        let mut socket = None;
        for i in 0..share {
            let payload = format!("u{thread}-{i}-{}", std::process::id());
            match datagram(args, to, &payload, &mut socket) {
                Ok(seen) => judge(&mut report, seen, to, &args.expect, false),
                Err(error) => {
                    report.lost += 1;
                    report.error(format!("{error:#}"), 1);
                    socket = None;
                }
            }
        }
        report
    })
}

fn datagram(args: &Udp, to: SocketAddr, payload: &str, kept: &mut Option<UdpSocket>) -> Result<Seen> {
    let socket = match kept.take() {
        Some(socket) if !args.fresh => socket,
        _ => {
            let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
            let socket = UdpSocket::bind(any)?;
            socket.set_read_timeout(Some(Duration::from_secs(args.timeout)))?;
            if args.connected {
                socket.connect(to).context("connect")?;
            }
            socket
        }
    };
    let mut buffer = [0; 2048];
    let (n, peer) = if args.connected {
        socket.send(payload.as_bytes()).context("send")?;
        (socket.recv(&mut buffer).context("recv")?, socket.peer_addr().context("getpeername")?)
    } else {
        socket.send_to(payload.as_bytes(), to).context("sendto")?;
        // Unconnected: the peer is where the answer says that it came from.
        socket.recv_from(&mut buffer).context("recvfrom")?
    };
    let answer = String::from_utf8_lossy(&buffer[..n]);
    let who = Who::parse(&answer).with_context(|| format!("the answer was {answer:?}"))?;
    // An unconnected socket has no address of its own: only its port can be compared then.
    let mut own = socket.local_addr()?;
    if own.ip().is_unspecified()
        && let Ok(seen) = who.accepted_from.parse::<SocketAddr>()
    {
        own.set_ip(seen.ip());
    }
    *kept = Some(socket);
    Ok(Seen { who, sent: payload.to_owned(), peer: Some(peer), own })
}

/// `pod-app dial`: prints what came back, or how it ended, as JSON.
pub(crate) fn dial(args: &Dial) -> Result<String> {
    let timeout = Duration::from_secs(args.timeout);
    let outcome = |received: &[u8], taken: u64, end: &str| {
        serde_json::json!({ "received": String::from_utf8_lossy(received), "taken": taken, "end": end })
            .to_string()
    };
    let mut stream = match TcpStream::connect_timeout(&args.to, timeout) {
        Ok(stream) => stream,
        Err(error) => return Ok(outcome(&[], 0, &format!("connect: {}", kind(&error)))),
    };
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    if let Some(line) = &args.send {
        stream.write_all(format!("{line}\n").as_bytes()).context("write")?;
    }
    if let Some(limit) = args.fill {
        let zeros = [0; 64 * 1024];
        let mut taken = 0;
        while taken < limit {
            match stream.write(&zeros[..(limit - taken).min(zeros.len() as u64) as usize]) {
                Ok(n) => taken += n as u64,
                Err(error) => return Ok(outcome(&[], taken, &format!("write: {}", kind(&error)))),
            }
        }
        return Ok(outcome(&[], taken, "limit"));
    }
    if args.shutdown {
        stream.shutdown(Shutdown::Write).context("shutdown")?;
    }
    let mut received = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(outcome(&received, 0, "eof")),
            Ok(n) => received.extend_from_slice(&buffer[..n]),
            Err(error) => return Ok(outcome(&received, 0, &format!("read: {}", kind(&error)))),
        }
    }
}

/// `pod-app hold`. Says `open` on standard error after the first exchange.
pub(crate) fn hold(args: &Hold) -> Result<HoldReport> {
    if args.udp {
        return hold_udp(args);
    }
    let timeout = Some(Duration::from_secs(args.timeout));
    let stream = TcpStream::connect(args.to).context("connect")?;
    stream.set_read_timeout(timeout)?;
    stream.set_write_timeout(timeout)?;
    let mut lines = BufReader::new(&stream);
    let mut report = HoldReport::default();
    while args.file.exists() {
        let sent = format!("{} {}\n", report.lines, std::process::id());
        (&stream).write_all(sent.as_bytes()).with_context(|| format!("write line {}", report.lines))?;
        let mut back = String::new();
        lines.read_line(&mut back).with_context(|| format!("read line {}", report.lines))?;
        ensure!(back == sent, "sent {sent:?} and got {back:?}");
        if report.lines == 0 {
            eprintln!("open");
        }
        report.lines += 1;
        thread::sleep(Duration::from_millis(5));
    }
    stream.shutdown(Shutdown::Write).context("shutdown")?;
    let mut rest = String::new();
    lines.read_to_string(&mut rest).context("read the end")?;
    ensure!(rest == "bye\n", "the end was {rest:?}");
    Ok(report)
}

fn hold_udp(args: &Hold) -> Result<HoldReport> {
    let any: SocketAddr = if args.to.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(args.to).context("connect")?;
    socket.set_read_timeout(Some(Duration::from_secs(args.timeout)))?;
    let mut report = HoldReport::default();
    let mut buffer = [0; 2048];
    while args.file.exists() {
        let sent = format!("{}-{}", report.lines, std::process::id());
        socket.send(sent.as_bytes()).with_context(|| format!("send datagram {}", report.lines))?;
        let n = socket.recv(&mut buffer).with_context(|| format!("receive datagram {}", report.lines))?;
        let back = String::from_utf8_lossy(&buffer[..n]);
        let who = Who::parse(&back).with_context(|| format!("the answer was {back:?}"))?;
        ensure!(who.payload == sent, "sent {sent:?} and got {back:?}");
        if report.lines == 0 {
            eprintln!("open");
        }
        report.lines += 1;
        thread::sleep(Duration::from_millis(5));
    }
    Ok(report)
}

/// A stable word for an error, whatever the language of the system.
fn kind(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "refused".to_owned(),
        io::ErrorKind::ConnectionReset => "reset".to_owned(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "timeout".to_owned(),
        other => format!("{other:?}"),
    }
}
