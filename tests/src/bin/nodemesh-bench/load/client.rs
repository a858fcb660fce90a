//! The client's measurements. Each warms up for a part of its time, is bounded in time and count, and returns one
//! [`Sample`].

use super::{Header, Mode, Sample};
use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

/// A round trip that takes longer than this has failed.
const DEADLINE: Duration = Duration::from_secs(10);

/// Bytes of one write of bulk data.
const BULK_BUFFER: usize = 128 << 10;

/// Connections of one measurement; a bound for machines that are faster than expected.
const MAX_CONNECTIONS: u64 = 200_000;

/// The measured time begins after this part of the whole.
const WARM_UP: f64 = 0.15;

struct Clock {
    measured_from: Instant,
    end: Instant,
}

impl Clock {
    fn start(time: Duration) -> Self {
        let now = Instant::now();
        Self { measured_from: now + time.mul_f64(WARM_UP), end: now + time }
    }

    fn measured(&self, now: Instant) -> bool {
        now >= self.measured_from
    }
}

fn histogram() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, DEADLINE.as_nanos() as u64, 3)?)
}

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    Ok(stream)
}

/// One connection after the other: `connect()`, one byte there and back, close.
pub(crate) fn connects(to: SocketAddr, time: Duration) -> Result<Sample> {
    let (mut connects, mut firsts) = (histogram()?, histogram()?);
    let mut sample = Sample::default();
    let mut first = Header { mode: Mode::Once, size: 1 }.encode().to_vec();
    first.push(b'x');
    let clock = Clock::start(time);
    loop {
        let begin = Instant::now();
        if begin >= clock.end || sample.all_ops >= MAX_CONNECTIONS {
            break;
        }
        let one = || -> io::Result<(Duration, Duration)> {
            let mut stream = TcpStream::connect(to)?;
            let connected = begin.elapsed();
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(DEADLINE))?;
            stream.write_all(&first)?;
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            let answered = begin.elapsed();
            // The server closes first, so that the client's ports do not run out in TIME_WAIT.
            let _ = stream.read(&mut byte)?;
            Ok((connected, answered))
        };
        sample.all_ops += 1;
        match one() {
            Ok((connected, answered)) if clock.measured(begin) => {
                sample.ops += 1;
                connects.saturating_record(connected.as_nanos() as u64);
                firsts.saturating_record(answered.as_nanos() as u64);
            }
            Ok(_) => {}
            Err(error) => sample.failed(&error),
        }
    }
    sample.seconds = clock.measured_from.elapsed().as_secs_f64();
    (sample.connect, sample.latency) = (super::Latency::of(&connects), super::Latency::of(&firsts));
    Ok(sample)
}

/// Round trips on connections that stay open, one under way on each.
pub(crate) fn round_trips(to: SocketAddr, size: usize, connections: usize, time: Duration) -> Result<Sample> {
    let header = Header { mode: Mode::Echo, size };
    let mut first = header.encode().to_vec();
    first.resize(Header::LEN + size, b'x');
    let message = vec![b'x'; size];
    let mut streams = Vec::with_capacity(connections);
    for _ in 0..connections {
        streams.push(connect(to).with_context(|| format!("connect to {to}"))?);
    }
    let clock = Clock::start(time);
    if let [stream] = streams.as_mut_slice() {
        return one_at_a_time(stream, &first, &message, &clock);
    }
    many(&mut streams, &first, &message, &clock)
}

fn one_at_a_time(stream: &mut TcpStream, first: &[u8], message: &[u8], clock: &Clock) -> Result<Sample> {
    let mut latency = histogram()?;
    let mut sample = Sample::default();
    let mut answer = vec![0; message.len()];
    let mut next = first;
    loop {
        let begin = Instant::now();
        if begin >= clock.end {
            break;
        }
        stream.write_all(next).context("send")?;
        stream.read_exact(&mut answer).context("receive")?;
        next = message;
        sample.all_ops += 1;
        if clock.measured(begin) {
            sample.ops += 1;
            latency.saturating_record(begin.elapsed().as_nanos() as u64);
        }
    }
    sample.seconds = clock.measured_from.elapsed().as_secs_f64();
    sample.latency = super::Latency::of(&latency);
    Ok(sample)
}

fn many(streams: &mut [TcpStream], first: &[u8], message: &[u8], clock: &Clock) -> Result<Sample> {
    let mut latency = histogram()?;
    let mut sample = Sample::default();
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut begun = vec![(Instant::now(), 0usize); streams.len()];
    for (index, stream) in streams.iter_mut().enumerate() {
        begun[index].0 = Instant::now();
        stream.write_all(first).context("send")?;
        stream.set_nonblocking(true)?;
        epoll.add(&*stream, EpollEvent::new(EpollFlags::EPOLLIN, index as u64))?;
    }
    let mut events = vec![EpollEvent::empty(); streams.len()];
    let mut buffer = vec![0; message.len()];
    loop {
        let n = epoll.wait(&mut events, EpollTimeout::try_from(DEADLINE)?)?;
        ensure!(n > 0, "no answer within {DEADLINE:?}");
        if Instant::now() >= clock.end {
            break;
        }
        for event in &events[..n] {
            let index = event.data() as usize;
            let got = match streams[index].read(&mut buffer) {
                Ok(0) => anyhow::bail!("a connection was closed"),
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error).context("receive"),
            };
            let (since, have) = &mut begun[index];
            *have += got;
            if *have < message.len() {
                continue;
            }
            let now = Instant::now();
            sample.all_ops += 1;
            if clock.measured(*since) {
                sample.ops += 1;
                latency.saturating_record((now - *since).as_nanos() as u64);
            }
            (*since, *have) = (now, 0);
            streams[index].write_all(message).context("send")?;
        }
    }
    sample.seconds = clock.measured_from.elapsed().as_secs_f64();
    sample.latency = super::Latency::of(&latency);
    Ok(sample)
}

/// Bytes in one direction as fast as they go, on a number of streams. The time ends when the server has counted all.
pub(crate) fn bulk(to: SocketAddr, streams: usize, time: Duration) -> Result<Sample> {
    let mut open = Vec::with_capacity(streams);
    for _ in 0..streams {
        let mut stream = connect(to).with_context(|| format!("connect to {to}"))?;
        stream.write_all(&Header { mode: Mode::Sink, size: 0 }.encode())?;
        open.push(stream);
    }
    let begin = Instant::now();
    let threads: Vec<_> = open
        .into_iter()
        .map(|mut stream| {
            thread::spawn(move || -> Result<u64> {
                let buffer = vec![b'x'; BULK_BUFFER];
                while begin.elapsed() < time {
                    stream.write_all(&buffer).context("send")?;
                }
                stream.shutdown(Shutdown::Write)?;
                let mut count = [0; 8];
                stream.read_exact(&mut count).context("the server's count")?;
                Ok(u64::from_be_bytes(count))
            })
        })
        .collect();
    let mut sample = Sample::default();
    for thread in threads {
        match thread.join() {
            Ok(Ok(bytes)) => sample.bytes += bytes,
            Ok(Err(error)) => sample.failed(&format!("{error:#}")),
            Err(_) => sample.failed(&"a thread panicked"),
        }
    }
    sample.seconds = begin.elapsed().as_secs_f64();
    (sample.ops, sample.all_ops) = (streams as u64, streams as u64);
    Ok(sample)
}

/// A connection of [`closes`].
struct Slot {
    socket: Option<Socket>,
    begin: Instant,
    sent: bool,
    have: usize,
}

/// Requests on a new connection each, a number of them under way all the time.
pub(crate) fn closes(to: SocketAddr, size: usize, concurrency: usize, time: Duration) -> Result<Sample> {
    let mut request = Header { mode: Mode::Once, size }.encode().to_vec();
    request.resize(Header::LEN + size, b'x');
    let mut latency = histogram()?;
    let mut sample = Sample::default();
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut slots: Vec<Slot> = Vec::with_capacity(concurrency);
    let clock = Clock::start(time);
    for index in 0..concurrency {
        slots.push(Slot { socket: None, begin: Instant::now(), sent: false, have: 0 });
        open(&mut slots[index], index, to, &epoll)?;
    }
    let mut events = vec![EpollEvent::empty(); concurrency];
    let mut buffer = vec![0; size.max(2)];
    loop {
        let n = epoll.wait(&mut events, EpollTimeout::try_from(DEADLINE)?)?;
        ensure!(n > 0, "no answer within {DEADLINE:?}");
        let now = Instant::now();
        if now >= clock.end || sample.all_ops >= MAX_CONNECTIONS {
            break;
        }
        for event in &events[..n] {
            let index = event.data() as usize;
            let slot = &mut slots[index];
            match step(slot, index, &request, &mut buffer, &epoll) {
                Ok(false) => continue,
                Ok(true) if slot.have == size => {
                    sample.all_ops += 1;
                    if clock.measured(slot.begin) {
                        sample.ops += 1;
                        latency.saturating_record(slot.begin.elapsed().as_nanos() as u64);
                    }
                }
                Ok(true) => sample.failed(&format!("closed after {} of {size} bytes", slot.have)),
                Err(error) => sample.failed(&error),
            }
            ensure!(sample.errors < 1000, "too many failures, the first: {:?}", sample.error);
            slot.socket = None;
            open(slot, index, to, &epoll)?;
        }
    }
    sample.seconds = clock.measured_from.elapsed().as_secs_f64();
    sample.latency = super::Latency::of(&latency);
    Ok(sample)
}

fn open(slot: &mut Slot, index: usize, to: SocketAddr, epoll: &Epoll) -> Result<()> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    *slot = Slot { socket: None, begin: Instant::now(), sent: false, have: 0 };
    match socket.connect(&to.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(nix::errno::Errno::EINPROGRESS as i32) => {}
        Err(error) => return Err(error).context("connect"),
    }
    epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLOUT, index as u64))?;
    slot.socket = Some(socket);
    Ok(())
}

/// Goes on with a connection; true when the server has closed it.
fn step(slot: &mut Slot, index: usize, request: &[u8], buffer: &mut [u8], epoll: &Epoll) -> io::Result<bool> {
    let Some(socket) = slot.socket.as_mut() else { return Ok(false) };
    if !slot.sent {
        // A connect that failed is reported here.
        socket.write_all(request)?;
        slot.sent = true;
        let mut event = EpollEvent::new(EpollFlags::EPOLLIN, index as u64);
        epoll.modify(&*socket, &mut event)?;
        return Ok(false);
    }
    loop {
        match socket.read(buffer) {
            Ok(0) => return Ok(true),
            Ok(n) => slot.have += n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}

/// Opens connections, sends a byte on each there and back, says `open`, and holds them until it is killed.
pub(crate) fn idle(to: SocketAddr, connections: usize, hold: Duration) -> Result<()> {
    let mut first = Header { mode: Mode::Echo, size: 1 }.encode().to_vec();
    first.push(b'x');
    let mut open = Vec::with_capacity(connections);
    for n in 0..connections {
        let mut stream = connect(to).with_context(|| format!("connection {n} to {to}"))?;
        stream.write_all(&first)?;
        stream.read_exact(&mut [0]).with_context(|| format!("answer on connection {n}"))?;
        open.push(stream);
    }
    println!("open");
    thread::sleep(hold);
    Ok(())
}
