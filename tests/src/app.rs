//! What the traffic program `pod-app` reports, shared with the tests that read it.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Well-known ports of `pod-app serve`, used by the example manifests too.
pub mod ports {
    /// Answers each line with who it is and whom it sees.
    pub const WHO: u16 = 9000;
    /// Sends every byte back, and the end of the stream too.
    pub const ECHO: u16 = 9001;
    /// Streams and verifies patterned bytes in both directions.
    pub const BULK: u16 = 9002;
    /// Accepts and never reads.
    pub const SLEEP: u16 = 9003;
    /// Speaks first.
    pub const BANNER: u16 = 9004;
    /// Reads a line, then resets the connection.
    pub const RESET: u16 = 9005;
    /// UDP: answers each datagram with who it is and whom it sees.
    pub const UDP: u16 = 9053;
}

/// One answer of the `who` server, TCP and UDP: a line of blank-separated fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Who {
    /// The payload that was sent, back.
    pub payload: String,
    /// The name of the server.
    pub name: String,
    /// The client's address as `accept()` (UDP: `recvfrom`) gave it.
    pub accepted_from: String,
    /// The client's address as `getpeername()` gives it; `-` for UDP.
    pub peer: String,
    /// The server's own address on this connection; `-` for UDP.
    pub local: String,
}

impl Who {
    /// Parses an answer.
    pub fn parse(line: &str) -> Option<Self> {
        let mut fields = line.trim_end().split(' ').map(str::to_owned);
        let who = Self {
            payload: fields.next()?,
            name: fields.next()?,
            accepted_from: fields.next()?,
            peer: fields.next()?,
            local: fields.next()?,
        };
        fields.next().is_none().then_some(who)
    }

    /// The line form.
    pub fn line(&self) -> String {
        format!("{} {} {} {} {}\n", self.payload, self.name, self.accepted_from, self.peer, self.local)
    }
}

/// Result of `pod-app connects` and `pod-app udp`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ConnectsReport {
    /// Exchanges that were right in every respect.
    pub ok: u64,
    /// Exchanges that failed: refused, reset, timed out, wrong payload.
    pub lost: u64,
    /// Connections whose `getpeername()` was not the address that was dialled.
    pub wrong_peer: u64,
    /// Connections where the server saw another client address than the client's own `getsockname()`.
    pub wrong_client: u64,
    /// Exchanges answered by a server that was not expected.
    pub wrong_backend: u64,
    /// Exchanges by answering server.
    pub by_backend: BTreeMap<String, u64>,
    /// Failures by message, at most 16 different ones.
    pub errors: BTreeMap<String, u64>,
    /// One example of each kind of wrong address, for the failure message.
    pub examples: Vec<String>,
    /// Wall time in milliseconds.
    pub millis: u64,
}

impl ConnectsReport {
    /// Adds another report to this one.
    pub fn merge(&mut self, other: Self) {
        self.ok += other.ok;
        self.lost += other.lost;
        self.wrong_peer += other.wrong_peer;
        self.wrong_client += other.wrong_client;
        self.wrong_backend += other.wrong_backend;
        for (name, count) in other.by_backend {
            *self.by_backend.entry(name).or_default() += count;
        }
        for (message, count) in other.errors {
            self.error(message, count);
        }
        self.examples.extend(other.examples);
        self.examples.truncate(8);
        self.millis = self.millis.max(other.millis);
    }

    /// Counts a failure message.
    pub fn error(&mut self, message: String, count: u64) {
        let key = if self.errors.len() < 16 || self.errors.contains_key(&message) {
            message
        } else {
            "other".to_owned()
        };
        *self.errors.entry(key).or_default() += count;
    }

    /// Whether all `expected` exchanges were right and nothing was wrong.
    pub fn all_right(&self, expected: u64) -> bool {
        self.ok == expected
            && self.lost == 0
            && self.wrong_peer == 0
            && self.wrong_client == 0
            && self.wrong_backend == 0
    }
}

/// Result of `pod-app bulk`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BulkReport {
    /// Bytes the client sent.
    pub sent: u64,
    /// Bytes the server says it received, each compared with the pattern.
    pub server_verified: u64,
    /// Bytes the client received, each compared with the pattern.
    pub received: u64,
    /// Checksum over what the client sent, and what the server computed over what it received.
    pub up_checksums: (u64, u64),
    /// Checksum over what the server sent, as it said, and what the client computed over what it received.
    pub down_checksums: (u64, u64),
    /// Wall time in milliseconds.
    pub millis: u64,
}

/// Result of `pod-app hold`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldReport {
    /// Lines that came back as they were sent.
    pub lines: u64,
}

/// Result of `pod-app resolve`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    /// The addresses, sorted.
    pub addresses: Vec<String>,
    /// Why there are none; empty when there are some.
    pub error: String,
    /// Wall time in milliseconds.
    pub millis: u64,
}

/// Result of `pod-app exchange`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exchanged {
    /// The messages that came back, in hexadecimal, and from where.
    pub answers: Vec<(String, String)>,
    /// What `getpeername()` says; empty for an unconnected socket.
    pub peer: String,
    /// The error that ended it, if any; waiting in vain is none.
    pub error: String,
}

/// Bytes in hexadecimal.
pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes again; `None` for something else.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u32>> = text.chars().map(|c| c.to_digit(16)).collect();
    let pairs = digits?;
    let bytes = pairs.chunks(2).map(|pair| match pair {
        [high, low] => u8::try_from(high * 16 + low).ok(),
        _ => None,
    });
    bytes.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_round_trips_and_rejects_other_lines() {
        let who = Who {
            payload: "x1".into(),
            name: "cart-0".into(),
            accepted_from: "10.0.0.1:5".into(),
            peer: "10.0.0.1:5".into(),
            local: "[fd00::1]:9000".into(),
        };
        assert_eq!(Who::parse(&who.line()), Some(who));
        assert_eq!(Who::parse("too few"), None);
        assert_eq!(Who::parse("a b c d e f"), None);
    }

    #[test]
    fn hexadecimal_round_trips() {
        assert_eq!(from_hex(&to_hex(&[0, 255, 16])), Some(vec![0, 255, 16]));
        assert_eq!((from_hex("abc"), from_hex("zz")), (None, None));
    }

    #[test]
    fn a_report_with_any_fault_is_not_right() {
        let good = ConnectsReport { ok: 3, ..ConnectsReport::default() };
        assert!(good.all_right(3));
        assert!(!good.all_right(4));
        assert!(!ConnectsReport { wrong_peer: 1, ..good.clone() }.all_right(3));
        assert!(!ConnectsReport { lost: 1, ..good }.all_right(3));
    }
}
