//! Finds fields that this version does not know in an encoded `istio.security.Authorization`.
//!
//! The protobuf decoder skips unknown fields, which is right for everything but a policy: a match with one more
//! condition than was understood is another match. So the encoded form is walked beside the decoder, and says for
//! each rule whether all of it was understood. Deliberately absent: field types and values; the decoder checks those.

use bytes::Buf;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

/// A message: the fields that are known, and which of them are messages in turn.
struct Message {
    known: &'static [u32],
    nested: &'static [(u32, &'static Message)],
}

static STRING_MATCH: Message = Message { known: &[1, 2, 3, 4], nested: &[] };
static BLOCK: Message = Message { known: &[1, 2], nested: &[] };
static SERVICE_ACCOUNT: Message = Message { known: &[1, 2], nested: &[] };
static MATCH: Message = Message {
    known: &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    nested: &[
        (1, &STRING_MATCH),
        (2, &STRING_MATCH),
        (3, &STRING_MATCH),
        (4, &STRING_MATCH),
        (5, &BLOCK),
        (6, &BLOCK),
        (7, &BLOCK),
        (8, &BLOCK),
        (11, &SERVICE_ACCOUNT),
        (12, &SERVICE_ACCOUNT),
    ],
};
static CLAUSE: Message = Message { known: &[2], nested: &[(2, &MATCH)] };
static RULE: Message = Message { known: &[1], nested: &[(1, &CLAUSE)] };
const POLICY_KNOWN: &[u32] = &[1, 2, 3, 4, 5, 6];
const POLICY_RULES: u32 = 5;

/// What the walk found.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Unknown {
    /// The policy itself has a field that is not known.
    pub(super) policy: bool,
    /// For each rule, whether it has one.
    pub(super) rules: Vec<bool>,
}

/// Walks an encoded policy. Bytes that are not a protobuf message count as unknown.
pub(super) fn scan(mut buf: &[u8]) -> Unknown {
    let mut found = Unknown { policy: false, rules: Vec::new() };
    while buf.has_remaining() {
        let Some((tag, body)) = field(&mut buf) else {
            found.policy = true;
            break;
        };
        match (tag, body) {
            (POLICY_RULES, Some(body)) => found.rules.push(has_unknown(&RULE, body)),
            (tag, _) => found.policy |= !POLICY_KNOWN.contains(&tag),
        }
    }
    found
}

// The depth is that of the static tables above.
fn has_unknown(message: &Message, mut buf: &[u8]) -> bool {
    while buf.has_remaining() {
        let Some((tag, body)) = field(&mut buf) else { return true };
        if !message.known.contains(&tag) {
            return true;
        }
        let nested = message.nested.iter().find(|(t, _)| *t == tag);
        if let (Some((_, nested)), Some(body)) = (nested, body)
            && has_unknown(nested, body)
        {
            return true;
        }
    }
    false
}

/// Takes one field off the front: its number, and its body when it is length-delimited. `None`: malformed.
fn field<'a>(buf: &mut &'a [u8]) -> Option<(u32, Option<&'a [u8]>)> {
    let (tag, wire_type) = decode_key(buf).ok()?;
    if wire_type == WireType::LengthDelimited {
        let len = usize::try_from(decode_varint(buf).ok()?).ok()?;
        let (body, rest) = buf.split_at_checked(len)?;
        *buf = rest;
        return Some((tag, Some(body)));
    }
    skip_field(wire_type, tag, buf, DecodeContext::default()).ok()?;
    Some((tag, None))
}
