//! YAML text: its documents, and the line on which a field stands.
//!
//! Documents are split by hand, so that one with broken syntax does not take the rest of its file with it. Lines are
//! found only when there is something to report: the document is read again with a visitor that fails on purpose at
//! the wanted field, because the parser says where a failure happened. Deliberately absent: any meaning of the text.

use crate::report::{FieldPath, Step};
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::fmt;

/// One YAML document of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Document {
    /// Its text.
    pub(super) text: String,
    /// The line of the file on which it begins, counted from 1.
    pub(super) first_line: usize,
}

/// Splits a file at `---` and `...` lines. Documents with nothing but comments are left out.
pub(super) fn split(text: &str) -> Vec<Document> {
    let mut documents = Vec::new();
    let mut current = Document { text: String::new(), first_line: 1 };
    let mut finish = |document: Document| {
        let said = |line: &str| {
            let line = line.trim();
            !(line.is_empty() || line.starts_with('#') || line.starts_with('%'))
        };
        if document.text.lines().any(said) {
            documents.push(document);
        }
    };
    for (i, line) in text.lines().enumerate() {
        // Content of a document is indented or begins with a key, so these markers can only stand between documents.
        let marker = line.trim_end();
        if marker == "---" || marker == "..." {
            let next = Document { text: String::new(), first_line: i + 2 };
            finish(std::mem::replace(&mut current, next));
            continue;
        }
        if let Some(rest) = line.strip_prefix("---").filter(|r| r.starts_with([' ', '\t'])) {
            let next = Document { text: format!("   {rest}\n"), first_line: i + 1 };
            finish(std::mem::replace(&mut current, next));
            continue;
        }
        current.text.push_str(line);
        current.text.push('\n');
    }
    finish(current);
    documents
}

impl Document {
    /// The file's line on which `path` stands, or the deepest part of it that is there.
    pub(super) fn line_of(&self, path: &FieldPath) -> usize {
        (0..=path.0.len())
            .rev()
            .find_map(|len| self.exact_line(&path.0[..len]))
            .unwrap_or_else(|| self.first_content_line())
    }

    /// The file's line for a line of the document, counted from 1.
    pub(super) fn file_line(&self, line: usize) -> usize {
        self.first_line + line.saturating_sub(1)
    }

    fn first_content_line(&self) -> usize {
        let said = |line: &str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
        self.first_line + self.text.lines().position(said).unwrap_or(0)
    }

    fn exact_line(&self, steps: &[Step]) -> Option<usize> {
        if steps.is_empty() {
            return None;
        }
        let error = Probe(steps).deserialize(serde_yaml_ng::Deserializer::from_str(&self.text)).err()?;
        if !error.to_string().contains(FOUND) {
            return None;
        }
        Some(self.file_line(error.location()?.line()))
    }
}

/// The message by which the probe's own failure is told from a real one.
const FOUND: &str = "\u{1}found";

/// Walks down a path and fails where it ends.
struct Probe<'a>(&'a [Step]);

impl<'de> DeserializeSeed<'de> for Probe<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Probe<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a path")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        self.end()?;
        let (wanted, last) = match self.0 {
            [Step::Key(key)] => (Some(key.as_str()), true),
            [Step::Key(key), ..] => (Some(key.as_str()), false),
            _ => (None, false),
        };
        while let Some(hit) = map.next_key_seed(KeyProbe { wanted, last })? {
            if hit {
                map.next_value_seed(Probe(&self.0[1..]))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        self.end()?;
        let Some(Step::Index(wanted)) = self.0.first() else {
            while seq.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(());
        };
        for i in 0usize.. {
            let more = if i == *wanted {
                seq.next_element_seed(Probe(&self.0[1..]))?.is_some()
            } else {
                seq.next_element::<IgnoredAny>()?.is_some()
            };
            if !more {
                break;
            }
        }
        Ok(())
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        self.end()
    }
    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        self.end()
    }
    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        self.end()
    }
    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        self.end()
    }
    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        self.end()
    }
    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.end()
    }
}

impl Probe<'_> {
    /// Fails when the path ends here: at an element of a sequence, which has no key to fail at.
    fn end<E: Error>(&self) -> Result<(), E> {
        if self.0.is_empty() { Err(E::custom(FOUND)) } else { Ok(()) }
    }
}

/// Reads a key; true when the path goes on below it, an error when the path ends at it.
struct KeyProbe<'a> {
    wanted: Option<&'a str>,
    last: bool,
}

impl<'de> DeserializeSeed<'de> for KeyProbe<'_> {
    type Value = bool;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl Visitor<'_> for KeyProbe<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }
    fn visit_str<E: Error>(self, key: &str) -> Result<bool, E> {
        let hit = self.wanted == Some(key);
        if hit && self.last { Err(E::custom(FOUND)) } else { Ok(hit) }
    }
    fn visit_u64<E: Error>(self, key: u64) -> Result<bool, E> {
        self.visit_str(&key.to_string())
    }
    fn visit_i64<E: Error>(self, key: i64) -> Result<bool, E> {
        self.visit_str(&key.to_string())
    }
    fn visit_bool<E: Error>(self, key: bool) -> Result<bool, E> {
        self.visit_str(if key { "true" } else { "false" })
    }
    fn visit_f64<E: Error>(self, key: f64) -> Result<bool, E> {
        self.visit_str(&key.to_string())
    }
    fn visit_unit<E: Error>(self) -> Result<bool, E> {
        self.visit_str("null")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# a comment
kind: A
metadata:
  name: a
  labels:
    app.kubernetes.io/name: x
spec:
  ports:
  - port: 1
  - name: two
    port: 2
  list: [a, b]
  portLevelMtls:
    8080:
      mode: STRICT
---
kind: B
---
# nothing
---
--- {kind: C,
  spec: 1}
...
kind: D
";

    #[test]
    fn documents_and_their_lines() {
        let documents = split(TEXT);
        let found: Vec<_> =
            documents.iter().map(|d| (d.first_line, d.line_of(&FieldPath::from("kind")))).collect();
        assert_eq!(found, [(1, 2), (17, 17), (21, 21), (24, 24)]);
        let value: serde_yaml_ng::Value = serde_yaml_ng::from_str(&documents[2].text).unwrap();
        assert_eq!(value["spec"], 1);
    }

    #[test]
    fn fields_are_found_at_their_key() {
        let document = &split(TEXT)[0];
        let spec = FieldPath::from("spec");
        for (path, line) in [
            (FieldPath::from("metadata.name"), 4),
            (FieldPath::from("metadata.labels").key("app.kubernetes.io/name"), 6),
            (spec.key("ports"), 8),
            (spec.key("ports").index(0).key("port"), 9),
            (spec.key("ports").index(1), 10),
            (spec.key("ports").index(1).key("port"), 11),
            (spec.key("list").index(1), 12),
            (spec.key("portLevelMtls").key("8080").key("mode"), 15),
            // What is missing is reported at the nearest thing that is there.
            (spec.key("ports").index(1).key("targetPort"), 10),
            (spec.key("selector"), 7),
            (FieldPath::from("status"), 2),
            (FieldPath::default(), 2),
        ] {
            assert_eq!(document.line_of(&path), line, "{path}");
        }
    }
}
