//! The blocking client of the daemon's CNI socket. Every step ends at one deadline.

use crate::{
    enroll::protocol::{self, Op, ProtocolError, Request, Response, VERSION},
    net::fdpass,
};
use socket2::{Domain, SockAddr, Socket, Type};
use std::{
    io::{self, Read, Write},
    os::fd::BorrowedFd,
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// How often a daemon with a full accept queue is tried again.
const CONNECT_RETRY: Duration = Duration::from_millis(20);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody listens, or the socket is not ours to use.
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    /// No answer before the deadline.
    #[error("no answer within {} ms", .0.as_millis())]
    Timeout(Duration),
    /// The exchange broke.
    #[error("the connection broke")]
    Broken(#[source] io::Error),
    /// The request or the answer is malformed.
    #[error("the exchange is malformed")]
    Protocol(#[from] ProtocolError),
}

/// Asks the daemon behind `socket` for `op` and waits for its answer for at most `limit`.
pub fn call(
    socket: &Path,
    op: Op,
    fd: Option<BorrowedFd<'_>>,
    limit: Duration,
) -> Result<Response, CallError> {
    let call = Call { end: Instant::now() + limit, limit };
    let request = protocol::encode(&Request { version: VERSION, op })?;
    let mut stream = call.connect(socket)?;
    call.arm(&stream)?;
    // The descriptor travels with the first bytes. The rest of the message fits no matter how little was
    // taken.
    let sent = fdpass::send(&stream, &request, fd).map_err(|e| call.failed(e))?;
    stream.write_all(&request[sent..]).map_err(|e| call.failed(e))?;
    let mut prefix = [0; 4];
    call.read(&mut stream, &mut prefix)?;
    let mut json = vec![0; protocol::length(prefix)?];
    call.read(&mut stream, &mut json)?;
    Ok(serde_json::from_slice(&json).map_err(ProtocolError::from)?)
}

struct Call {
    end: Instant,
    limit: Duration,
}

impl Call {
    /// Connects without blocking: a Unix socket blocks for as long as the accept queue is full.
    fn connect(&self, path: &Path) -> Result<Socket, CallError> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(CallError::Connect)?;
        socket.set_nonblocking(true).map_err(CallError::Connect)?;
        let address = SockAddr::unix(path).map_err(CallError::Connect)?;
        loop {
            match socket.connect(&address) {
                Ok(()) => break,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.left()?;
                    thread::sleep(CONNECT_RETRY);
                }
                Err(e) => return Err(CallError::Connect(e)),
            }
        }
        socket.set_nonblocking(false).map_err(CallError::Connect)?;
        Ok(socket)
    }

    /// Reads exactly `buf.len()` bytes. The timeout of a socket is per system call, so it is set before each.
    fn read(&self, stream: &mut Socket, mut buf: &mut [u8]) -> Result<(), CallError> {
        while !buf.is_empty() {
            self.arm(stream)?;
            match stream.read(buf) {
                Ok(0) => return Err(CallError::Broken(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => buf = &mut buf[n..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.failed(e)),
            }
        }
        Ok(())
    }

    fn arm(&self, stream: &Socket) -> Result<(), CallError> {
        let left = Some(self.left()?);
        stream.set_read_timeout(left).and_then(|()| stream.set_write_timeout(left)).map_err(CallError::Broken)
    }

    /// The time that is left; never zero, which would mean no timeout at all.
    fn left(&self) -> Result<Duration, CallError> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(CallError::Timeout(self.limit)) } else { Ok(left) }
    }

    fn failed(&self, e: io::Error) -> CallError {
        match e.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => CallError::Timeout(self.limit),
            _ => CallError::Broken(e),
        }
    }
}
