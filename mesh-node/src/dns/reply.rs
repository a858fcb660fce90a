//! Answers that are made here: for the mesh's names, and for what went wrong.

use super::{names::Reply, query::Query};
use hickory_proto::{
    op::{Edns, Message, OpCode, ResponseCode},
    rr::{
        Name, RData, Record,
        rdata::{SOA, name::PTR},
    },
};
use rand::seq::SliceRandom;

/// What this side takes over UDP, said by EDNS: fits into any network's packets (DNS flag day 2020).
const OWN_SIZE: u16 = 1232;
/// Bytes of our OPT record.
const OPT: usize = 11;
/// How long a client may remember that there is nothing.
pub(super) const NEGATIVE_TTL: u32 = 5;

/// The answer to a question about a mesh name; `limit` is the largest size of the message. `None` if it cannot be
/// encoded, which no name that was read can cause.
pub(super) fn mesh(query: &Query, reply: Reply, zone: &Name, limit: usize) -> Option<Vec<u8>> {
    let mut message = answer_to(query);
    message.metadata.authoritative = true;
    if query.edns.is_some_and(|edns| edns.version != 0) {
        message.metadata.response_code = ResponseCode::BADVERS;
        return message.to_vec().ok();
    }
    match reply {
        Reply::Records { mut answers, additionals } => {
            answers.shuffle(&mut rand::rng());
            message.answers = answers;
            message.additionals = additionals;
        }
        Reply::NoName => message.metadata.response_code = ResponseCode::NXDomain,
        Reply::Elsewhere { .. } => return None,
    }
    if message.answers.is_empty() {
        message.authorities.push(start_of_authority(query, zone));
    }
    fit(message, limit)
}

/// An answer without records: an error, or that a name is not there.
pub(super) fn failure(query: &Query, code: ResponseCode, zone: Option<&Name>) -> Option<Vec<u8>> {
    let mut message = answer_to(query);
    message.metadata.response_code = code;
    message.authorities.extend(zone.map(|zone| start_of_authority(query, zone)));
    message.to_vec().ok()
}

/// The answer to something that is no question: its header, turned around.
pub(super) fn malformed(message: &[u8]) -> Option<Vec<u8>> {
    let id = u16::from_be_bytes(*message.first_chunk()?);
    Message::error_msg(id, OpCode::Query, ResponseCode::FormErr).to_vec().ok()
}

/// Tells a client to come back over TCP: the question, and that something was left out.
pub(super) fn truncated(query: &Query) -> Option<Vec<u8>> {
    let mut message = answer_to(query);
    message.metadata.truncation = true;
    message.to_vec().ok()
}

fn answer_to(query: &Query) -> Message {
    let asked = &query.header.metadata;
    let mut message = Message::response(asked.id, asked.op_code);
    message.metadata.recursion_desired = asked.recursion_desired;
    message.metadata.recursion_available = true;
    message.metadata.checking_disabled = asked.checking_disabled;
    message.add_query(query.question.clone());
    if let Some(client) = query.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(OWN_SIZE).set_version(0).set_dnssec_ok(client.dnssec);
        message.set_edns(edns);
    }
    message
}

/// RFC 2308: how long a negative answer holds. The owner is the zone, or the name itself outside of it.
fn start_of_authority(query: &Query, zone: &Name) -> Record {
    let inside = zone.zone_of(&query.question.name);
    let owner = if inside { zone.clone() } else { query.question.name.clone() };
    let host = |label: &str| zone.prepend_label(label).unwrap_or_else(|_| zone.clone());
    let dns = host("dns");
    let server = dns.prepend_label("ns").unwrap_or(dns);
    let soa = SOA::new(server, host("hostmaster"), 1, 7200, 1800, 86_400, NEGATIVE_TTL);
    Record::from_rdata(owner, NEGATIVE_TTL, RData::SOA(soa))
}

/// Leaves out what does not fit: additional records silently, answers with the flag that tells so.
fn fit(mut message: Message, limit: usize) -> Option<Vec<u8>> {
    let whole = message.to_vec().ok()?;
    if whole.len() <= limit {
        return Some(whole);
    }
    message.additionals.clear();
    let without = message.to_vec().ok()?;
    if without.len() <= limit {
        return Some(without);
    }
    message.metadata.truncation = true;
    let answers = std::mem::take(&mut message.answers);
    let with = |count: usize| {
        let mut part = message.clone();
        part.answers = answers[..count].to_vec();
        part.to_vec().ok().filter(|bytes| bytes.len() <= limit)
    };
    let (mut good, mut bad) = (0, answers.len());
    while bad - good > 1 {
        let middle = usize::midpoint(good, bad);
        if with(middle).is_some() {
            good = middle;
        } else {
            bad = middle;
        }
    }
    debug_assert!(limit > OPT);
    with(good)
}

/// A PTR record's data.
pub(super) fn pointer(to: Name) -> RData {
    RData::PTR(PTR(to))
}
