//! Asking the nameserver that the application meant, in its place: from inside the pod, with the very bytes of the query.
//!
//! Every query over UDP has a socket of its own, on a random port that takes datagrams from that nameserver alone; the id
//! is the client's. An answer has to have the id and the question of the query. Deliberately absent: any choice of
//! another nameserver, and following of referrals; the pod's own nameserver is a resolver.

use super::query::{HEADER, Query};
use crate::{
    local::LocalPod,
    plan::{NodeView, endpoints},
    state::World,
};
use mesh_xds::model::Protocol;
use rand::seq::IndexedRandom;
use std::{
    cell::RefCell,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

/// How long a nameserver may take.
pub(super) const TIMEOUT: Duration = Duration::from_secs(5);
/// The largest UDP payload.
const LARGEST: usize = 65_535;
/// QR in the header's third byte.
const RESPONSE: u8 = 0x80;
/// OPCODE in the header's third byte.
const OPCODE: u8 = 0x78;

/// Where a nameserver is really: the daemon bypasses the capture, so that a service's address is replaced here.
pub(super) fn locate(world: &World, node: &NodeView, server: SocketAddr, protocol: Protocol) -> SocketAddr {
    let Some(found) = world.service_port(&server.ip(), server.port(), protocol) else { return server };
    let all = endpoints(world, node, &found.service, &found.port, &server.ip());
    // Without an endpoint the query goes to the address itself, where somebody else may know better.
    all.choose(&mut rand::rng()).map_or(server, |endpoint| endpoint.addr)
}

/// Whether `answer` answers `query`, the message of which the question ends at `question_end` (`None`: no question).
pub(super) fn answers(query: &[u8], question_end: Option<usize>, answer: &[u8]) -> bool {
    let (Some(asked), Some(head)) = (query.get(..HEADER), answer.get(..HEADER)) else { return false };
    if head[..2] != asked[..2] || head[2] & RESPONSE == 0 || head[2] & OPCODE != asked[2] & OPCODE {
        return false;
    }
    let Some(end) = question_end else { return true };
    let (questions, failed) = (u16::from_be_bytes([head[4], head[5]]), head[3] & 0x0f != 0);
    match questions {
        // Some servers leave the question out of errors.
        0 => failed,
        1 => answer.get(HEADER..end).is_some_and(|q| q.eq_ignore_ascii_case(&query[HEADER..end])),
        _ => false,
    }
}

/// The end of the question, of a message that was read as one.
pub(super) fn question_end(query: Option<&Query>) -> Option<usize> {
    query.map(|query| query.question_end)
}

/// Opens a socket for one query.
pub(super) fn open(pod: &LocalPod, client: SocketAddr, to: SocketAddr) -> io::Result<UdpSocket> {
    pod.netns.dial_udp(same_family(client, to), to)
}

/// Sends the query and waits for its answer.
pub(super) async fn ask(socket: &UdpSocket, message: &[u8], end: Option<usize>) -> io::Result<Vec<u8>> {
    socket.send(message).await?;
    loop {
        socket.readable().await?;
        match receive(socket) {
            Ok(answer) if answers(message, end, &answer) => return Ok(answer),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Receives into memory that the thread's sockets share: an answer may be large, and few are.
fn receive(socket: &UdpSocket) -> io::Result<Vec<u8>> {
    thread_local! {
        static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    BUFFER.with_borrow_mut(|buffer| {
        buffer.resize(LARGEST, 0);
        let length = socket.try_recv(buffer)?;
        Ok(buffer[..length].to_vec())
    })
}

/// A connection to a nameserver, kept for the queries of one client connection.
#[derive(Debug)]
pub(super) struct Stream {
    pod: Arc<LocalPod>,
    client: SocketAddr,
    to: SocketAddr,
    open: Option<TcpStream>,
}

impl Stream {
    /// Nothing is dialled yet.
    pub(super) fn new(pod: Arc<LocalPod>, client: SocketAddr, to: SocketAddr) -> Self {
        Self { pod, client, to, open: None }
    }

    /// The pod in whose name it is.
    pub(super) fn pod(&self) -> &LocalPod {
        &self.pod
    }

    /// Dials, for a caller that goes on by itself.
    pub(super) async fn dial(&self) -> io::Result<TcpStream> {
        let dialing = self.pod.netns.dial(same_family(self.client, self.to), self.to, |_| Ok(()))?;
        timeout(TIMEOUT, dialing).await?
    }

    /// Sends one query and waits for its answer. A connection that was used before may have been closed by the
    /// nameserver meanwhile, so it is tried once more on a new one.
    pub(super) async fn ask(&mut self, message: &[u8], end: Option<usize>) -> io::Result<Vec<u8>> {
        if let Some(mut used) = self.open.take()
            && let Ok(Ok(answer)) = timeout(TIMEOUT, exchange(&mut used, message, end)).await
        {
            self.open = Some(used);
            return Ok(answer);
        }
        let mut fresh = self.dial().await?;
        let answer = timeout(TIMEOUT, exchange(&mut fresh, message, end)).await??;
        self.open = Some(fresh);
        Ok(answer)
    }
}

async fn exchange(stream: &mut TcpStream, message: &[u8], end: Option<usize>) -> io::Result<Vec<u8>> {
    stream.write_all(&frame(message)?).await?;
    loop {
        let answer = read_frame(stream).await?;
        if answers(message, end, &answer) {
            return Ok(answer);
        }
    }
}

/// A message with its length before it (RFC 1035, section 4.2.2).
pub(super) fn frame(message: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok([&length.to_be_bytes()[..], message].concat())
}

/// Reads one message; the memory follows what has arrived, not what was promised.
pub(super) async fn read_frame(stream: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = Vec::new();
    stream.take(length.into()).read_to_end(&mut message).await?;
    if message.len() < usize::from(length) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(message)
}

fn same_family(client: SocketAddr, to: SocketAddr) -> Option<IpAddr> {
    (client.is_ipv4() == to.is_ipv4()).then(|| client.ip())
}
