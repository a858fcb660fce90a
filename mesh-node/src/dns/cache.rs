//! Answers of nameservers, for as long as they say.
//!
//! Kept as bytes: an answer goes out as it came in but for the id, the spelling of the question and the time that has
//! passed. Failures are not kept. Bounded by entries and bytes; the oldest go first. Deliberately absent: answers about
//! the mesh's names, which are made anew from the world.

use super::query::{HEADER, Query};
use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

/// Answers kept at most.
const ENTRIES: usize = 8192;
/// Bytes kept at most.
const BYTES: usize = 4 << 20;
/// What an entry costs beside its message.
const OVERHEAD: usize = 256;
/// Larger messages are not kept.
const LARGEST: usize = 16 << 10;
/// The longest time that an answer is kept, whatever it says.
const MAX_TTL: u32 = 3600;
/// The same for "there is nothing".
const MAX_NEGATIVE_TTL: u32 = 60;

const TYPE_SOA: u16 = 6;
const TYPE_OPT: u16 = 41;
const RCODE: u8 = 0x0f;
const TRUNCATED: u8 = 0x02;

/// What an answer depends on.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    server: SocketAddr,
    name: Box<str>,
    kind: u16,
    class: u16,
    flags: u8,
}

impl Key {
    /// The key of a question to a nameserver; `None` for one whose answer is this client's own.
    pub(super) fn new(server: SocketAddr, query: &Query) -> Option<Self> {
        let edns = query.edns;
        if !query.whole || edns.is_some_and(|edns| edns.options || edns.version != 0) {
            return None;
        }
        let asked = &query.header.metadata;
        let bits = [
            asked.recursion_desired,
            asked.checking_disabled,
            asked.authentic_data,
            edns.is_some(),
            edns.is_some_and(|edns| edns.dnssec),
        ];
        Some(Self {
            server,
            name: query.name.as_str().into(),
            kind: query.kind().into(),
            class: query.question.query_class.into(),
            flags: bits.iter().fold(0, |flags, bit| flags << 1 | u8::from(*bit)),
        })
    }
}

#[derive(Debug)]
struct Entry {
    message: Box<[u8]>,
    /// Where the times to live are.
    ttls: Box<[u16]>,
    stored: Instant,
    expires: Instant,
    number: u64,
}

/// The cache; one owner at a time.
#[derive(Debug, Default)]
pub(super) struct Cache {
    entries: HashMap<Arc<Key>, Entry>,
    order: VecDeque<(Arc<Key>, u64)>,
    bytes: usize,
    number: u64,
}

impl Cache {
    /// The answer for `query`, whose message is `asked`.
    pub(super) fn get(&self, key: &Key, query: &Query, asked: &[u8], now: Instant) -> Option<Vec<u8>> {
        let entry = self.entries.get(key).filter(|entry| now < entry.expires)?;
        let mut message = entry.message.to_vec();
        message.get_mut(..2)?.copy_from_slice(asked.get(..2)?);
        let question = query.question_bytes(asked);
        message.get_mut(HEADER..HEADER + question.len())?.copy_from_slice(question);
        let passed = u32::try_from(now.duration_since(entry.stored).as_secs()).unwrap_or(u32::MAX);
        for at in &entry.ttls {
            let field = message.get_mut(usize::from(*at)..)?.first_chunk_mut::<4>()?;
            *field = u32::from_be_bytes(*field).saturating_sub(passed).to_be_bytes();
        }
        Some(message)
    }

    /// Keeps an answer that was validated against its question, if it may be kept.
    pub(super) fn put(&mut self, key: Key, message: &[u8], now: Instant) {
        if message.len() > LARGEST {
            return;
        }
        let Some((ttl, ttls)) = lifetime(message).filter(|(ttl, _)| *ttl > 0) else { return };
        self.number += 1;
        let key = Arc::new(key);
        let entry = Entry {
            message: message.into(),
            ttls: ttls.into(),
            stored: now,
            expires: now + Duration::from_secs(ttl.into()),
            number: self.number,
        };
        self.bytes += cost(&entry);
        if let Some(old) = self.entries.insert(key.clone(), entry) {
            self.bytes -= cost(&old);
        }
        self.order.push_back((key, self.number));
        // A question that was answered anew has an old place in the queue, which may be most of it.
        while self.entries.len() > ENTRIES || self.bytes > BYTES || self.order.len() > 2 * ENTRIES {
            let Some((key, number)) = self.order.pop_front() else { break };
            if self.entries.get(&key).is_some_and(|entry| entry.number == number)
                && let Some(old) = self.entries.remove(&key)
            {
                self.bytes -= cost(&old);
            }
        }
    }

    /// Entries and bytes.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.entries.len(), self.bytes)
    }
}

fn cost(entry: &Entry) -> usize {
    entry.message.len() + OVERHEAD
}

/// How long an answer may be kept, and where its times to live are. `None`: not at all.
fn lifetime(message: &[u8]) -> Option<(u32, Vec<u16>)> {
    let number = |at: usize| Some(u16::from_be_bytes(*message.get(at..)?.first_chunk()?));
    let rcode = message.get(3)? & RCODE;
    if message.get(2)? & TRUNCATED != 0 || !matches!(rcode, 0 | 3) || number(4)? != 1 {
        return None;
    }
    let (answers, authorities, additionals) = (number(6)?, number(8)?, number(10)?);
    let mut at = skip_name(message, HEADER)? + 4;
    let (mut least, mut negative, mut ttls) = (MAX_TTL, None, vec![]);
    let total = u32::from(answers) + u32::from(authorities) + u32::from(additionals);
    for n in 0..total {
        at = skip_name(message, at)?;
        let kind = number(at)?;
        let raw = u32::from_be_bytes(*message.get(at + 4..)?.first_chunk()?);
        // RFC 2181, section 8: a value with the top bit set is none.
        let ttl = if raw > i32::MAX.unsigned_abs() { 0 } else { raw };
        let data = at + 10;
        let end = data + usize::from(number(at + 8)?);
        if kind != TYPE_OPT {
            ttls.push(u16::try_from(at + 4).ok()?);
            least = least.min(ttl);
        }
        if kind == TYPE_SOA && n >= u32::from(answers) {
            let minimum = u32::from_be_bytes(*message.get(data..end)?.last_chunk()?);
            negative = Some(minimum.min(ttl));
        }
        at = end;
    }
    if at > message.len() {
        return None;
    }
    if rcode == 0 && answers > 0 {
        return Some((least, ttls));
    }
    // RFC 2308: without the zone's word nobody knows how long there is nothing.
    Some((negative?.min(least).min(MAX_NEGATIVE_TTL), ttls))
}

/// The place after a name. Pointers end a name, so that no loop is possible here.
fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            length if length & 0xc0 == 0xc0 => return Some(at + 2),
            length if length & 0xc0 != 0 => return None,
            length => at += usize::from(length) + 1,
        }
    }
}
