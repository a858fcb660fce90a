//! Changes as bytes, for whoever keeps them: the same messages as on the wire, each with its length before it. There
//! is no second schema that could fall behind the first.

use super::{Changes, Received};
use crate::wire::discovery::{DeltaDiscoveryResponse, Resource as WireResource};
use bytes::Bytes;
use prost::Message;

/// Bytes that are no record, or not all of one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a kept change is not a discovery response: {0}")]
pub struct RecordError(prost::DecodeError);

impl Changes {
    /// Appends the record of these changes.
    pub fn write_record(self, out: &mut Vec<u8>) {
        let wire = |r: Received| WireResource {
            name: r.name,
            version: r.version,
            aliases: r.aliases,
            resource: Some(r.body),
            ttl: None,
        };
        let message = DeltaDiscoveryResponse {
            type_url: self.type_url,
            resources: self.resources.into_iter().map(wire).collect(),
            removed_resources: self.removed,
            ..DeltaDiscoveryResponse::default()
        };
        // A vector grows as it must.
        let _ = message.encode_length_delimited(out);
    }

    /// Takes the record at the beginning of `bytes` off; `None` at the end.
    pub fn read_record(bytes: &mut Bytes) -> Result<Option<Self>, RecordError> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let message = DeltaDiscoveryResponse::decode_length_delimited(bytes).map_err(RecordError)?;
        let received = |r: WireResource| {
            Some(Received { name: r.name, version: r.version, aliases: r.aliases, body: r.resource? })
        };
        Ok(Some(Self {
            type_url: message.type_url,
            resources: message.resources.into_iter().filter_map(received).collect(),
            removed: message.removed_resources,
            partial: false,
        }))
    }
}

impl Received {
    /// About how many bytes it takes in a record.
    pub fn size(&self) -> usize {
        let aliases: usize = self.aliases.iter().map(|a| a.len() + 4).sum();
        self.name.len() + self.version.len() + self.body.type_url.len() + self.body.value.len() + aliases + 32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Any;

    #[test]
    fn records_follow_each_other_and_broken_ones_are_errors() {
        let body = Any { type_url: "t".into(), value: b"content".to_vec().into() };
        let one = Received { name: "a".into(), version: "1".into(), aliases: vec!["n/a".into()], body };
        let first = Changes {
            type_url: "t".into(),
            resources: vec![one.clone()],
            removed: vec!["b".into()],
            partial: false,
        };
        let second = Changes { type_url: "u".into(), resources: vec![], removed: vec![], partial: false };
        let mut out = vec![];
        first.clone().write_record(&mut out);
        assert!(out.len() < one.size() + 64);
        second.clone().write_record(&mut out);
        let mut bytes = Bytes::from(out.clone());
        assert_eq!(Changes::read_record(&mut bytes), Ok(Some(first)));
        assert_eq!(Changes::read_record(&mut bytes), Ok(Some(second)));
        assert_eq!(Changes::read_record(&mut bytes), Ok(None));
        for bad in
            [&out[..out.len() - 1], &b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"[..], b"\x02\xff\xff"]
        {
            let mut bytes = Bytes::copy_from_slice(bad);
            let end = loop {
                match Changes::read_record(&mut bytes) {
                    Ok(Some(_)) => {}
                    end => break end,
                }
            };
            assert!(end.is_err(), "{bad:?}");
        }
    }
}
