//! A packet capture on the wire between the nodes: an `AF_PACKET` socket in the fabric's namespace, so that no tool
//! has to be installed.

use crate::netns::NetNs;
use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io::Read,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

/// More than this is not kept (and not needed: a test's marked traffic is small).
const MAX_BYTES: usize = 64 << 20;

/// A running capture of everything that crosses the fabric.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Packets>>,
}

/// What a capture saw.
#[derive(Clone, Debug, Default)]
pub struct Packets {
    frames: Vec<Vec<u8>>,
    /// True when more than the bound was seen and the rest is missing.
    pub truncated: bool,
}

impl Capture {
    /// Begins to capture in `netns` on all of its interfaces.
    pub fn start(netns: &NetNs) -> Result<Self> {
        // In network order, as packet(7) wants it.
        let all = Protocol::from(i32::from((libc::ETH_P_ALL as u16).to_be()));
        let socket = netns
            .within(|| Socket::new(Domain::PACKET, Type::RAW, Some(all)).context("open a packet socket"))?;
        socket.set_recv_buffer_size(8 << 20)?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || collect(socket, &told));
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Ends the capture once nothing more arrives.
    pub fn finish(mut self) -> Result<Packets> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("capture thread")?;
        thread.join().map_err(|_| anyhow::anyhow!("the capture thread panicked"))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn collect(mut socket: Socket, stop: &AtomicBool) -> Packets {
    let mut packets = Packets::default();
    let mut bytes = 0;
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match socket.read(&mut buffer) {
            Ok(n) if bytes + n <= MAX_BYTES => {
                bytes += n;
                packets.frames.push(buffer[..n].to_vec());
            }
            Ok(_) => packets.truncated = true,
            // The read timed out: nothing is waiting any more.
            Err(_) if stop.load(Ordering::Relaxed) => return packets,
            Err(_) => {}
        }
        if packets.truncated && stop.load(Ordering::Relaxed) {
            return packets;
        }
    }
}

impl Packets {
    /// How many frames were seen.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// True if nothing was seen.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// How many frames contain `needle`.
    pub fn containing(&self, needle: &[u8]) -> usize {
        self.frames.iter().filter(|frame| frame.windows(needle.len()).any(|window| window == needle)).count()
    }

    /// How many frames are TCP segments from or to `port`.
    pub fn tcp_port(&self, port: u16) -> usize {
        self.frames.iter().filter(|frame| tcp_ports(frame).is_some_and(|ports| ports.contains(&port))).count()
    }
}

/// Source and destination port of a TCP segment in an Ethernet frame (no VLAN tags, no IPv6 extension headers).
fn tcp_ports(frame: &[u8]) -> Option<[u16; 2]> {
    let ip = frame.get(14..)?;
    let segment = match frame.get(12..14)? {
        [0x08, 0x00] if ip.get(9) == Some(&6) => ip.get(usize::from(ip[0] & 15) * 4..)?,
        [0x86, 0xdd] if ip.get(6) == Some(&6) => ip.get(40..)?,
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes([*segment.get(at)?, *segment.get(at + 1)?]));
    Some([port(0)?, port(2)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_ports_in_both_families() {
        let mut v4 = vec![0; 14 + 20 + 4];
        v4[12] = 8;
        v4[14] = 0x45;
        v4[23] = 6;
        v4[34..38].copy_from_slice(&[0x9c, 0x40, 0x3a, 0xa0]);
        assert_eq!(tcp_ports(&v4), Some([40000, 15008]));
        let mut v6 = vec![0; 14 + 40 + 4];
        v6[12..14].copy_from_slice(&[0x86, 0xdd]);
        v6[20] = 6;
        v6[54..58].copy_from_slice(&[0, 80, 0x3a, 0xa0]);
        assert_eq!(tcp_ports(&v6), Some([80, 15008]));
        v4[23] = 17;
        assert_eq!(tcp_ports(&v4), None);
        assert_eq!(tcp_ports(&v4[..20]), None);
    }
}
