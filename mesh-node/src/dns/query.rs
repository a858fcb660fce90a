//! A query as it came in: what was asked, and how the answer may look.
//!
//! Deliberately absent: who asked, and any decision about the answer.

use hickory_proto::{
    op::{Header, Message, MessageType, OpCode, Query as Question},
    rr::{DNSClass, Name, RecordType},
    serialize::binary::{BinDecodable, BinDecoder},
};

/// Length of a DNS header.
pub(super) const HEADER: usize = 12;
/// What a client without EDNS takes over UDP (RFC 1035, section 2.3.4).
const CLASSIC_SIZE: usize = 512;
/// What is sent over UDP at most, whatever the client says.
const MAX_SIZE: usize = 4096;

/// What a message asks for.
#[derive(Debug)]
pub(super) enum Incoming {
    /// One question.
    Question(Box<Query>),
    /// Something else than a question (an update, a notification): for the nameserver alone.
    Other,
    /// Not even a question. Answered with a format error.
    Malformed,
    /// Not to be answered: too short, or an answer itself.
    Ignored,
}

/// One question.
#[derive(Clone, Debug)]
pub(super) struct Query {
    /// The header as it came.
    pub(super) header: Header,
    /// The question, in the client's spelling.
    pub(super) question: Question,
    /// The name in lower case, without the final dot.
    pub(super) name: String,
    /// The question's place in the message: from [`HEADER`] to here.
    pub(super) question_end: usize,
    /// EDNS, if the client speaks it.
    pub(super) edns: Option<ClientEdns>,
    /// Whether the rest of the message was understood too.
    pub(super) whole: bool,
}

/// What a client says by EDNS (RFC 6891).
#[derive(Clone, Copy, Debug)]
pub(super) struct ClientEdns {
    /// The largest datagram that it takes.
    pub(super) size: u16,
    /// The version of EDNS; only 0 exists.
    pub(super) version: u8,
    /// DNSSEC records are welcome.
    pub(super) dnssec: bool,
    /// There are options (cookies, client subnet...), which make an answer this client's own.
    pub(super) options: bool,
}

impl Query {
    /// The type asked for.
    pub(super) fn kind(&self) -> RecordType {
        self.question.query_type
    }

    /// Whether it asks about the Internet class.
    pub(super) fn internet(&self) -> bool {
        matches!(self.question.query_class, DNSClass::IN | DNSClass::ANY)
    }

    /// The largest answer that may be sent over UDP.
    pub(super) fn udp_size(&self) -> usize {
        self.edns.map_or(CLASSIC_SIZE, |edns| usize::from(edns.size).clamp(CLASSIC_SIZE, MAX_SIZE))
    }

    /// The question as bytes of `message`, the message that it was read from.
    pub(super) fn question_bytes<'a>(&self, message: &'a [u8]) -> &'a [u8] {
        message.get(HEADER..self.question_end).unwrap_or_default()
    }
}

/// Reads a message of a client.
pub(super) fn read(message: &[u8]) -> Incoming {
    let mut decoder = BinDecoder::new(message);
    let Ok(header) = Header::read(&mut decoder) else { return Incoming::Ignored };
    if header.metadata.message_type != MessageType::Query {
        return Incoming::Ignored;
    }
    if header.metadata.op_code != OpCode::Query {
        return Incoming::Other;
    }
    if header.counts.queries != 1 {
        return Incoming::Malformed;
    }
    let Ok(question) = Question::read(&mut decoder) else { return Incoming::Malformed };
    let question_end = decoder.index();
    // Nothing comes before the question that a compressed name could point to. `len` counts every label's length and
    // the root's.
    if question_end != HEADER + wire_len(&question.name) + 4 {
        return Incoming::Malformed;
    }
    // A rest that this library does not understand may mean something to the nameserver.
    let rest = Message::from_vec(message).ok();
    let edns = rest.as_ref().and_then(|rest| rest.edns.as_ref()).map(|edns| ClientEdns {
        size: edns.max_payload(),
        version: edns.version(),
        dnssec: edns.flags().dnssec_ok,
        options: !edns.options().as_ref().is_empty(),
    });
    let whole = rest.is_some_and(|rest| {
        rest.answers.is_empty() && rest.authorities.is_empty() && rest.additionals.is_empty()
    });
    let mut name = question.name.to_lowercase().to_ascii();
    if name.len() > 1 && name.ends_with('.') {
        name.pop();
    }
    Incoming::Question(Box::new(Query { header, question, name, question_end, edns, whole }))
}

/// The length of a name on the wire without compression.
fn wire_len(name: &Name) -> usize {
    name.iter().map(|label| label.len() + 1).sum::<usize>() + 1
}
