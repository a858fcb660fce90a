//! The load generator: one server and one client program for everything that is measured, so that the paths differ and
//! nothing else does.
//!
//! Plain threads, blocking sockets and epoll. A client begins each connection with a [`Header`] that says what the
//! server shall do with it. Deliberately absent: checks of the payload, which are the end-to-end tests' business; a
//! connection that fails is counted, and a measurement with failures says so.

pub(crate) mod client;
pub(crate) mod server;

use anyhow::{Result, ensure};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// The port of the load server in every server pod.
pub(crate) const PORT: u16 = 9100;

/// Largest message of [`Mode::Echo`] and [`Mode::Once`].
pub(crate) const MAX_MESSAGE: usize = 64 << 10;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Messages of a fixed size go back and forth.
    Echo,
    /// One message each way, then the server closes: an HTTP/1.1 request with `connection: close`.
    Once,
    /// The server reads to the end of the stream and answers with the number of bytes.
    Sink,
}

/// The first bytes of a connection, sent together with its first message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) mode: Mode,
    /// Bytes of a message.
    pub(crate) size: usize,
}

impl Header {
    pub(crate) const LEN: usize = 8;

    pub(crate) fn encode(self) -> [u8; Self::LEN] {
        let mode = match self.mode {
            Mode::Echo => b'e',
            Mode::Once => b'o',
            Mode::Sink => b's',
        };
        let size = u32::try_from(self.size).unwrap_or(u32::MAX).to_be_bytes();
        [mode, 0, 0, 0, size[0], size[1], size[2], size[3]]
    }

    pub(crate) fn decode(bytes: [u8; Self::LEN]) -> Result<Self> {
        let mode = match bytes[0] {
            b'e' => Mode::Echo,
            b'o' => Mode::Once,
            b's' => Mode::Sink,
            other => anyhow::bail!("unknown mode {other}"),
        };
        let size = u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) as usize;
        ensure!(mode == Mode::Sink || (1..=MAX_MESSAGE).contains(&size), "a message of {size} bytes");
        Ok(Self { mode, size })
    }
}

/// Quantiles of a latency, in microseconds.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

impl Latency {
    #[expect(clippy::cast_precision_loss, reason = "nanoseconds of at most seconds")]
    pub(crate) fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1000.0;
        Self { p50: at(0.5), p99: at(0.99) }
    }
}

/// What one measurement of the client says.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// Operations in the measured time.
    pub(crate) ops: u64,
    /// Operations with those of the warm-up.
    pub(crate) all_ops: u64,
    /// The measured time.
    pub(crate) seconds: f64,
    /// Latency of an operation: a round trip, or a connection from `connect()` to its first answer.
    pub(crate) latency: Latency,
    /// Latency of `connect()` alone.
    pub(crate) connect: Latency,
    /// Payload bytes that the server has counted.
    pub(crate) bytes: u64,
    /// Connections that failed.
    pub(crate) errors: u64,
    /// The first failure.
    pub(crate) error: Option<String>,
}

impl Sample {
    pub(crate) fn failed(&mut self, error: &dyn std::fmt::Display) {
        self.errors += 1;
        self.error.get_or_insert_with(|| error.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_round_trip_and_bad_ones_are_refused() {
        for (mode, size) in [(Mode::Echo, 1), (Mode::Once, 1024), (Mode::Sink, 0)] {
            let header = Header { mode, size };
            assert_eq!(Header::decode(header.encode()).unwrap(), header);
        }
        assert!(Header::decode(*b"GET / HT").is_err());
        assert!(Header::decode(Header { mode: Mode::Echo, size: MAX_MESSAGE + 1 }.encode()).is_err());
        assert!(Header::decode(Header { mode: Mode::Echo, size: 0 }.encode()).is_err());
    }
}
