//! Which objects are in force, given what the files say now and what they said before. No I/O.
//!
//! Every call compares the whole set of files with the whole set in force, so it does not matter which change was
//! noticed. A broken object keeps its last good form; a document that cannot be parsed keeps every object that came
//! from its file and is not found elsewhere; of two definitions of one object the first one counts (by file name, then
//! by position). Deliberately absent: reading files (`super::scan`).

use super::document::{self, Document};
use crate::{
    decode::{self, Decoded},
    object::{Object, ObjectKey},
    report::{FieldPath, Issue, Problem, Step},
    source::Event,
};
use serde_yaml_ng::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// The text of each file by its name, or why it could not be read.
pub type Files = BTreeMap<String, Result<String, String>>;

/// Where something was written.
#[derive(Clone, Debug)]
struct Place {
    file: Arc<str>,
    document: Arc<Document>,
    /// From the document to the object: empty, or `items[N]` of a List.
    prefix: FieldPath,
}

impl Place {
    fn line(&self, field: &FieldPath) -> usize {
        self.document.line_of(&self.prefix.join(field))
    }

    fn problem(&self, object: Option<ObjectKey>, issue: Issue) -> Problem {
        let line = Some(self.line(&issue.field));
        Problem { file: self.file.to_string(), line, object, issue }
    }
}

/// A part of a file that stands for one object.
#[derive(Debug)]
struct Item {
    place: Place,
    decoded: Decoded,
    /// Set when the parser itself said where it stopped.
    line: Option<usize>,
}

/// An object in force.
#[derive(Clone, Debug)]
struct Held {
    object: Object,
    place: Place,
    /// It stands for a broken object of which no good version was ever seen.
    fallback: bool,
}

/// What the files say and what is in force because of it.
#[derive(Debug, Default)]
pub struct Tracker {
    parsed: BTreeMap<String, (String, Vec<Item>)>,
    held: BTreeMap<ObjectKey, Held>,
    problems: Vec<Problem>,
    touched: bool,
}

impl Tracker {
    /// Takes in the files as they are now and says what has changed for the index.
    pub fn update(&mut self, files: Files) -> Vec<Event> {
        self.problems.clear();
        self.touched = false;
        // Files whose contents are not known completely.
        let mut uncertain = BTreeSet::new();
        let mut parsed = BTreeMap::new();
        for (name, text) in files {
            match text {
                Ok(text) => {
                    let items = match self.parsed.remove(&name) {
                        Some((old, items)) if old == text => items,
                        _ => {
                            self.touched = true;
                            parse(&name, &text)
                        }
                    };
                    parsed.insert(name, (text, items));
                }
                Err(why) => {
                    self.touched = true;
                    self.problems.push(Problem {
                        file: name.clone(),
                        line: None,
                        object: None,
                        issue: Issue::error(
                            FieldPath::default(),
                            why,
                            "make it readable; its last good objects stay in force",
                        ),
                    });
                    uncertain.insert(name);
                }
            }
        }
        // What is left are files that are gone.
        self.touched |= !self.parsed.is_empty();
        self.parsed = parsed;
        let old = std::mem::take(&mut self.held);
        self.held = self.next(&old, &mut uncertain);
        let mut events = Vec::new();
        for key in old.keys().filter(|key| !self.held.contains_key(key)) {
            events.push(Event::Delete(key.clone()));
        }
        for (key, held) in &self.held {
            if old.get(key).is_none_or(|old| old.object != held.object) {
                events.push(Event::Put(held.object.clone()));
            }
        }
        self.problems.sort();
        self.problems.dedup();
        events
    }

    /// The new set in force.
    fn next(
        &mut self,
        old: &BTreeMap<ObjectKey, Held>,
        uncertain: &mut BTreeSet<String>,
    ) -> BTreeMap<ObjectKey, Held> {
        let mut next: BTreeMap<ObjectKey, Held> = BTreeMap::new();
        let mut broken: BTreeMap<ObjectKey, (Option<Object>, Place)> = BTreeMap::new();
        let mut problems = Vec::new();
        for item in self.parsed.values().flat_map(|(_, items)| items) {
            let place = &item.place;
            let (key, good, fallback, issues) = match &item.decoded {
                Decoded::Good { object, warnings } => (Some(object.key()), Some(object), None, warnings),
                Decoded::Broken { key, fallback, issues } => (key.clone(), None, fallback.as_ref(), issues),
                Decoded::Ignored(issue) => {
                    problems.push(place.problem(None, issue.clone()));
                    continue;
                }
            };
            let Some(key) = key else {
                uncertain.insert(place.file.to_string());
                problems.extend(issues.iter().map(|issue| Problem {
                    line: item.line.or_else(|| Some(place.line(&issue.field))),
                    ..place.problem(None, issue.clone())
                }));
                continue;
            };
            let first = next.get(&key).map(|h| &h.place).or_else(|| broken.get(&key).map(|b| &b.1));
            if let Some(first) = first {
                let name = FieldPath::from("metadata.name");
                let message = format!(
                    "it is defined in {}:{} already; the first one counts",
                    first.file,
                    first.line(&name)
                );
                problems.push(
                    place.problem(
                        Some(key),
                        Issue::error(name, message, "remove one of the two, or rename it"),
                    ),
                );
                continue;
            }
            problems.extend(issues.iter().map(|issue| place.problem(Some(key.clone()), issue.clone())));
            match good {
                Some(object) => {
                    let held = Held { object: (**object).clone(), place: place.clone(), fallback: false };
                    next.insert(key, held);
                }
                None => {
                    broken.insert(key, (fallback.map(|o| (**o).clone()), place.clone()));
                }
            }
        }
        for (key, (fallback, place)) in broken {
            let last_good = old.get(&key).filter(|held| !held.fallback);
            // The place moves along: what the index says about the object is to be found in its present text.
            let held = match (last_good, fallback) {
                (Some(held), _) => Some(Held { place, ..held.clone() }),
                (None, Some(object)) => Some(Held { object, place, fallback: true }),
                (None, None) => None,
            };
            next.extend(held.map(|held| (key, held)));
        }
        for (key, held) in old {
            if uncertain.contains(&*held.place.file) && !next.contains_key(key) {
                next.insert(key.clone(), held.clone());
            }
        }
        self.problems.append(&mut problems);
        next
    }

    /// Whether any text differed in the last update, or could not be read.
    pub fn touched(&self) -> bool {
        self.touched
    }

    /// Everything that is wrong with the files.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// The objects in force, with a note whether one only stands for a broken object.
    pub fn objects(&self) -> impl Iterator<Item = (&ObjectKey, bool)> {
        self.held.iter().map(|(key, held)| (key, held.fallback))
    }

    /// Puts a place to something that the index found out about an object.
    pub fn locate(&self, key: &ObjectKey, issue: Issue) -> Problem {
        match self.held.get(key) {
            Some(held) => held.place.problem(Some(key.clone()), issue),
            None => Problem { file: String::new(), line: None, object: Some(key.clone()), issue },
        }
    }
}

fn parse(file: &str, text: &str) -> Vec<Item> {
    let file: Arc<str> = file.into();
    let mut items = Vec::new();
    for document in document::split(text) {
        let document = Arc::new(document);
        let place = Place { file: file.clone(), document: document.clone(), prefix: FieldPath::default() };
        match serde_yaml_ng::from_str::<Value>(&document.text) {
            Ok(Value::Null) => {}
            Ok(value) => expand(&value, place, &mut items),
            Err(error) => {
                let line = error.location().map(|at| document.file_line(at.line()));
                // The parser's own line is relative to the document; ours is said in front.
                let message = error.to_string();
                let message = message.split(" at line ").next().unwrap_or(&message);
                let issue = Issue::error(
                    FieldPath::default(),
                    format!("not valid YAML: {message}"),
                    "correct the syntax; the last good objects of this file stay in force",
                );
                let decoded = Decoded::Broken { key: None, fallback: None, issues: vec![issue] };
                items.push(Item { place, decoded, line });
            }
        }
    }
    items
}

/// A `v1 List` stands for its items.
fn expand(value: &Value, place: Place, items: &mut Vec<Item>) {
    let text = |name: &str| value.get(name).and_then(Value::as_str);
    if text("kind") != Some("List") || text("apiVersion") != Some("v1") {
        items.push(Item { place, decoded: decode::decode(value), line: None });
        return;
    }
    let Some(list) = value.get("items").and_then(Value::as_sequence) else {
        let issue = Issue::error("items", "there is no list of items", "list the objects under items");
        let decoded = Decoded::Broken { key: None, fallback: None, issues: vec![issue] };
        items.push(Item { place, decoded, line: None });
        return;
    };
    for (i, item) in list.iter().enumerate() {
        let prefix = FieldPath(vec![Step::Key("items".to_owned()), Step::Index(i)]);
        let place = Place { prefix, ..place.clone() };
        items.push(Item { place, decoded: decode::decode(item), line: None });
    }
}
