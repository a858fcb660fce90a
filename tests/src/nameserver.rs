//! A nameserver for tests, over UDP and TCP. It knows the names that [`Nameserver::start`] lists, keeps what it was asked,
//! and can be told to be silent.

use crate::netns::NetNs;
use anyhow::{Context, Result};
use hickory_proto::{
    op::{Edns, Message, OpCode, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata},
};
use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

/// How often a thread looks whether it is to end.
const TICK: Duration = Duration::from_millis(50);
/// Addresses of `big.test`: more than fit into a datagram.
pub const BIG: u32 = 200;

/// One query as it came in.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The name, in lower case, with the final dot.
    pub name: String,
    /// The whole message.
    pub message: Vec<u8>,
    /// The client.
    pub from: SocketAddr,
    /// Whether it came over TCP.
    pub tcp: bool,
}

#[derive(Debug, Default)]
struct Shared {
    asked: Mutex<Vec<Asked>>,
    silent: AtomicBool,
    stop: AtomicBool,
}

/// A running nameserver; ended when dropped.
#[derive(Debug)]
pub struct Nameserver {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Nameserver {
    /// Serves port 53 of the addresses inside `netns`:
    ///
    /// * `tag.test` A 192.0.2.`tag`, for a minute; `alias.shop.svc.cluster.local` the same
    /// * `big.test` A: [`BIG`] addresses
    /// * `forged.test` A: first an answer with another id, then the right one
    /// * anything below `silent.test`: no answer
    /// * all else does not exist, for half a minute
    pub fn start(netns: &NetNs, addrs: &[IpAddr], tag: u8) -> Result<Self> {
        let shared = Arc::<Shared>::default();
        let mut threads = vec![];
        for ip in addrs {
            let at = SocketAddr::new(*ip, 53);
            let (udp, tcp) = netns.within(|| {
                let udp = UdpSocket::bind(at).with_context(|| format!("bind {at}"))?;
                Ok((udp, TcpListener::bind(at).with_context(|| format!("listen on {at}"))?))
            })?;
            udp.set_read_timeout(Some(TICK))?;
            tcp.set_nonblocking(true)?;
            let ours = shared.clone();
            threads.push(std::thread::spawn(move || ours.datagrams(&udp, tag)));
            let ours = shared.clone();
            threads.push(std::thread::spawn(move || ours.connections(&tcp, tag)));
        }
        Ok(Self { shared, threads })
    }

    /// Answers no more, or again.
    pub fn set_silent(&self, silent: bool) {
        self.shared.silent.store(silent, Ordering::Relaxed);
    }

    /// The queries for a name (with the final dot) so far.
    pub fn asked(&self, name: &str) -> Vec<Asked> {
        let asked = self.shared.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.iter().filter(|a| a.name == name).cloned().collect()
    }
}

impl Drop for Nameserver {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn datagrams(&self, socket: &UdpSocket, tag: u8) {
        let mut buffer = [0; 65_535];
        while !self.stopped() {
            let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
            for answer in self.answers(&buffer[..length], from, false, tag) {
                let _ = socket.send_to(&answer, from);
            }
        }
    }

    fn connections(&self, listener: &TcpListener, tag: u8) {
        while !self.stopped() {
            match listener.accept() {
                Ok((stream, from)) => {
                    let _ = self.connection(stream, from, tag);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(TICK / 10),
                Err(_) => {}
            }
        }
    }

    /// One connection at a time is enough for tests.
    fn connection(&self, mut stream: TcpStream, from: SocketAddr, tag: u8) -> std::io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        loop {
            let mut length = [0; 2];
            stream.read_exact(&mut length)?;
            let mut message = vec![0; u16::from_be_bytes(length).into()];
            stream.read_exact(&mut message)?;
            for answer in self.answers(&message, from, true, tag) {
                let length = u16::try_from(answer.len()).unwrap_or(u16::MAX);
                stream.write_all(&[&length.to_be_bytes()[..], &answer].concat())?;
            }
        }
    }

    fn answers(&self, message: &[u8], from: SocketAddr, tcp: bool, tag: u8) -> Vec<Vec<u8>> {
        let parsed = Message::from_vec(message).ok();
        let query = parsed.as_ref().and_then(|m| m.queries.first()).cloned();
        let name = query.as_ref().map(|q| q.name.to_lowercase().to_ascii()).unwrap_or_default();
        let asked = Asked { name: name.clone(), message: message.to_vec(), from, tcp };
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).push(asked);
        let (Some(parsed), Some(query)) = (parsed, query) else { return vec![] };
        if self.silent.load(Ordering::Relaxed) || name.ends_with("silent.test.") {
            return vec![];
        }
        let mut answer = Message::response(parsed.metadata.id, OpCode::Query);
        answer.metadata.recursion_desired = parsed.metadata.recursion_desired;
        answer.metadata.recursion_available = true;
        answer.add_query(query.clone());
        if let Some(edns) = &parsed.edns {
            answer.set_edns(Edns::new()).edns.iter_mut().for_each(|e| {
                e.set_max_payload(edns.max_payload());
            });
        }
        let a = |ip: [u8; 4]| Record::from_rdata(query.name.clone(), 60, RData::A(rdata::A(ip.into())));
        let known = match name.as_str() {
            "tag.test." | "forged.test." | "alias.shop.svc.cluster.local." => vec![a([192, 0, 2, tag])],
            "big.test." => (0..BIG).map(|n| a([198, 51, 100, n.to_le_bytes()[0]])).collect(),
            _ => vec![],
        };
        if known.is_empty() {
            answer.metadata.response_code = ResponseCode::NXDomain;
        } else if query.query_type == RecordType::A {
            answer.answers = known;
        }
        if answer.answers.is_empty() {
            let soa = rdata::SOA::new(Name::root(), Name::root(), 1, 2, 3, 4, 30);
            answer.add_authority(Record::from_rdata(Name::root(), 30, RData::SOA(soa)));
        }
        let limit = if tcp { 65_535 } else { parsed.edns.map_or(512, |e| usize::from(e.max_payload())) };
        let mut bytes = answer.to_vec().unwrap_or_default();
        if bytes.len() > limit {
            answer.answers.clear();
            answer.metadata.truncation = true;
            bytes = answer.to_vec().unwrap_or_default();
        }
        if name == "forged.test." {
            let mut forged = bytes.clone();
            forged[0] ^= 0xff;
            return vec![forged, bytes];
        }
        vec![bytes]
    }
}
