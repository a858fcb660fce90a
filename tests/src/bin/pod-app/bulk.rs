//! Streams of patterned bytes in both directions at once, every byte compared and summed by its receiver.
//!
//! Client to server: a header line `UP DOWN\n`, then UP patterned bytes, then the end of the stream. Server to client:
//! DOWN patterned bytes, then (after having read everything) a trailer line `VERIFIED UPSUM DOWNSUM\n` and the end.

use crate::options::Bulk;
use anyhow::{Context, Result, ensure};
use mesh_tests::app::BulkReport;
use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{Shutdown, TcpStream},
    thread,
    time::{Duration, Instant},
};

const CHUNK: usize = 64 * 1024;
/// A prime, so that the pattern lines up with no buffer size.
const PERIOD: usize = 1_048_573;

/// An endless, reproducible stream of bytes without structure: a block from a small generator, repeated.
struct Pattern(Vec<u8>);

impl Pattern {
    fn new(seed: u64) -> Self {
        let mut state = seed | 1;
        // One CHUNK more than the period, so that any chunk is one slice.
        let mut block = Vec::with_capacity(PERIOD + CHUNK);
        while block.len() < PERIOD {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            block.extend_from_slice(&state.to_le_bytes());
        }
        block.truncate(PERIOD);
        block.extend_from_within(..CHUNK);
        Self(block)
    }

    fn at(&self, offset: u64, len: usize) -> &[u8] {
        let start = (offset % PERIOD as u64) as usize;
        &self.0[start..start + len]
    }
}

const UP_SEED: u64 = 0x5eed_0001;
const DOWN_SEED: u64 = 0x5eed_0002;

/// A checksum over 8-byte words whose value does not depend on how the stream was cut into reads.
#[derive(Default)]
struct Checksum {
    sum: u64,
    word: u64,
    filled: u32,
}

impl Checksum {
    fn update(&mut self, mut bytes: &[u8]) {
        while self.filled != 0 && !bytes.is_empty() {
            self.byte(bytes[0]);
            bytes = &bytes[1..];
        }
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.fold(u64::from_le_bytes(*word));
        }
        for byte in rest {
            self.byte(*byte);
        }
    }

    fn byte(&mut self, byte: u8) {
        self.word |= u64::from(byte) << (8 * self.filled);
        self.filled += 1;
        if self.filled == 8 {
            self.fold(self.word);
            (self.word, self.filled) = (0, 0);
        }
    }

    fn fold(&mut self, word: u64) {
        self.sum = (self.sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }

    fn finish(mut self) -> u64 {
        self.fold(self.word ^ (u64::from(self.filled) << 56));
        self.sum
    }
}

fn send(mut to: &TcpStream, bytes: u64, seed: u64) -> io::Result<u64> {
    let (pattern, mut checksum, mut done) = (Pattern::new(seed), Checksum::default(), 0);
    while done < bytes {
        let chunk = pattern.at(done, (bytes - done).min(CHUNK as u64) as usize);
        to.write_all(chunk)?;
        checksum.update(chunk);
        done += chunk.len() as u64;
    }
    Ok(checksum.finish())
}

/// Reads exactly `bytes` bytes, comparing each; `rate` bytes per second at most unless 0.
fn receive(from: &mut impl Read, bytes: u64, seed: u64, rate: u64) -> io::Result<u64> {
    let (pattern, mut checksum, mut done) = (Pattern::new(seed), Checksum::default(), 0);
    let mut buffer = vec![0; CHUNK];
    let started = Instant::now();
    while done < bytes {
        let want = (bytes - done).min(CHUNK as u64) as usize;
        let n = from.read(&mut buffer[..want])?;
        if n == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("the stream ended after {done} bytes"),
            ));
        }
        if buffer[..n] != *pattern.at(done, n) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("wrong bytes after offset {done}"),
            ));
        }
        checksum.update(&buffer[..n]);
        done += n as u64;
        if rate > 0 {
            let due = Duration::from_secs_f64(done as f64 / rate as f64);
            thread::sleep(due.saturating_sub(started.elapsed()));
        }
    }
    Ok(checksum.finish())
}

/// One connection of the `bulk` server.
pub(crate) fn serve(mut stream: &TcpStream) -> io::Result<()> {
    let bad = || io::Error::new(io::ErrorKind::InvalidData, "bad header");
    let mut reader = BufReader::with_capacity(CHUNK, stream.try_clone()?);
    let mut header = String::new();
    reader.by_ref().take(64).read_line(&mut header)?;
    let (up, down) = header.trim_end().split_once(' ').ok_or_else(bad)?;
    let (up, down): (u64, u64) = (up.parse().map_err(|_| bad())?, down.parse().map_err(|_| bad())?);
    let writer = stream.try_clone()?;
    let sender = thread::spawn(move || send(&writer, down, DOWN_SEED));
    let up_sum = receive(&mut reader, up, UP_SEED, 0)?;
    if reader.read(&mut [0])? != 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "more bytes than announced"));
    }
    let down_sum = sender.join().map_err(|_| io::Error::other("the sender panicked"))??;
    stream.write_all(format!("{up} {up_sum} {down_sum}\n").as_bytes())?;
    stream.shutdown(Shutdown::Write)
}

/// The client side.
pub(crate) fn client(args: &Bulk) -> Result<BulkReport> {
    let started = Instant::now();
    let mut stream = TcpStream::connect(args.to).with_context(|| format!("connect to {}", args.to))?;
    stream.write_all(format!("{} {}\n", args.up, args.down).as_bytes())?;
    let writer = stream.try_clone()?;
    let up = args.up;
    let sender = thread::spawn(move || -> io::Result<u64> {
        let sum = send(&writer, up, UP_SEED)?;
        writer.shutdown(Shutdown::Write)?;
        Ok(sum)
    });
    let mut reader = BufReader::with_capacity(CHUNK, stream);
    let down_sum = receive(&mut reader, args.down, DOWN_SEED, args.read_rate).context("receive")?;
    let up_sum = sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))?.context("send")?;
    let mut trailer = String::new();
    reader.read_line(&mut trailer).context("read the trailer")?;
    let fields: Vec<u64> = trailer.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    ensure!(fields.len() == 3, "bad trailer {trailer:?}");
    ensure!(reader.read(&mut [0])? == 0, "bytes after the trailer");
    Ok(BulkReport {
        sent: args.up,
        server_verified: fields[0],
        received: args.down,
        up_checksums: (up_sum, fields[1]),
        down_checksums: (fields[2], down_sum),
        millis: started.elapsed().as_millis() as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_does_not_depend_on_the_cuts() {
        let data: Vec<u8> = (0..1000u32).map(|n| (n * 7) as u8).collect();
        let mut whole = Checksum::default();
        whole.update(&data);
        let mut cut = Checksum::default();
        for piece in data.chunks(13) {
            cut.update(piece);
        }
        assert_eq!(whole.finish(), cut.finish());
    }

    #[test]
    fn checksum_sees_swaps_and_lengths() {
        let sum = |data: &[u8]| {
            let mut checksum = Checksum::default();
            checksum.update(data);
            checksum.finish()
        };
        assert_ne!(sum(b"abcdefgh12345678"), sum(b"12345678abcdefgh"));
        assert_ne!(sum(b"a"), sum(b"a\0"));
    }

    #[test]
    fn receive_compares_every_byte() {
        let mut good = Pattern::new(UP_SEED).at(0, 5000).to_vec();
        assert!(receive(&mut &good[..], 5000, UP_SEED, 0).is_ok());
        good[4999] ^= 1;
        assert_eq!(receive(&mut &good[..], 5000, UP_SEED, 0).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(
            receive(&mut &good[..10], 11, UP_SEED, 0).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }
}
