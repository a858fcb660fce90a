//! A wire with a delay: frames between a node and the fabric's bridge go through a relay of two threads, which hold each
//! one back for a time that can be changed while it runs. For kernels without netem.
//!
//! The frames travel with their offload state (`PACKET_VNET_HDR`), so that segments larger than the wire's MTU and
//! checksums that are not computed yet survive. Their order is kept. Deliberately absent: loss, which `faults` makes with
//! nftables.

use crate::{netns::NetNs, sys};
use anyhow::{Context, Result};
use nix::net::if_::if_nametoindex;
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    collections::VecDeque,
    io::{Read, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Frames that one direction holds back at most; more are dropped, as a full queue does.
const QUEUE: usize = 4096;

/// The largest frame: 64 KiB of a coalesced segment, its headers, and the offload header.
const FRAME: usize = 68 << 10;

/// A relay on one node's wire; dropping it ends the threads.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    delay_us: AtomicU64,
    stop: AtomicBool,
    carried: AtomicU64,
}

impl Relay {
    /// Takes the wire `port` (an interface of the fabric) off the bridge and puts the relay between the two.
    pub fn insert(fabric: &NetNs, port: &str) -> Result<Self> {
        let (inner, outer) = (format!("{port}i"), format!("{port}o"));
        fabric.ip(&format!(
            "link set {port} nomaster\nlink set {port} promisc on\nlink add {inner} type veth peer name {outer}\n\
             link set {inner} up promisc on\nlink set {outer} up\nlink set {outer} master br0\n"
        ))?;
        let open = |name: &str| -> Result<Socket> {
            let name = name.to_owned();
            fabric.within(move || {
                let all = Protocol::from(i32::from((libc::ETH_P_ALL as u16).to_be()));
                let socket =
                    Socket::new(Domain::PACKET, Type::RAW, Some(all)).context("open a packet socket")?;
                let index = if_nametoindex(name.as_str()).with_context(|| format!("interface {name}"))?;
                sys::bind_packet(&socket, index).with_context(|| format!("bind to {name}"))?;
                socket.set_recv_buffer_size(16 << 20)?;
                socket.set_read_timeout(Some(Duration::from_millis(1)))?;
                Ok(socket)
            })
        };
        let (near, far) = (open(port)?, open(&inner)?);
        let shared = Arc::new(Shared::default());
        let threads = [(near.try_clone()?, far.try_clone()?), (far, near)]
            .into_iter()
            .map(|(from, to)| {
                let shared = shared.clone();
                std::thread::spawn(move || carry(from, to, &shared))
            })
            .collect();
        Ok(Self { shared, threads })
    }

    /// Holds every frame back for so long, in each direction.
    pub fn set_delay(&self, delay: Duration) {
        self.shared.delay_us.store(u64::try_from(delay.as_micros()).unwrap_or(0), Ordering::Relaxed);
    }

    /// Frames carried so far, both directions.
    pub fn carried(&self) -> u64 {
        self.shared.carried.load(Ordering::Relaxed)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn carry(mut from: Socket, mut to: Socket, shared: &Shared) {
    let mut held: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let mut buffer = vec![0; FRAME];
    while !shared.stop.load(Ordering::Relaxed) {
        // Waits for a millisecond at most.
        if let Ok(n) = from.read(&mut buffer)
            && held.len() < QUEUE
        {
            let delay = Duration::from_micros(shared.delay_us.load(Ordering::Relaxed));
            held.push_back((Instant::now() + delay, buffer[..n].to_vec()));
        }
        while held.front().is_some_and(|(due, _)| *due <= Instant::now()) {
            if let Some((_, frame)) = held.pop_front() {
                // A frame that the other side does not take is lost, as on any wire.
                shared.carried.fetch_add(u64::from(to.write(&frame).is_ok()), Ordering::Relaxed);
            }
        }
    }
}
