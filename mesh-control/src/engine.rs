//! The single writer: files -> events -> index -> published snapshot and report.
//!
//! Deliberately absent: waiting for changes (`crate::run` does), so that a test or `mesh-control check` takes one step.

use crate::{
    index::{Index, Settings},
    object::Kind,
    report::{Problem, Severity},
    snapshot::Snapshot,
    source::file::{self, ScanError, Tracker},
};
use serde::Serialize;
use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

/// The state of the configuration, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Objects in force, by kind.
    pub objects: BTreeMap<&'static str, usize>,
    /// Broken security objects that a refusing form stands for.
    pub fallbacks: Vec<String>,
    /// Everything that is wrong, by file and line.
    pub problems: Vec<Problem>,
    /// Set while the directory cannot be read.
    pub directory: Option<String>,
}

impl Report {
    /// How many problems of a severity there are.
    pub fn count(&self, severity: Severity) -> usize {
        self.problems.iter().filter(|p| p.issue.severity == severity).count()
    }

    /// Whether anything is an error.
    pub fn failed(&self) -> bool {
        self.directory.is_some() || self.count(Severity::Error) > 0
    }
}

/// What one step has led to.
#[derive(Clone, Debug)]
pub struct Step {
    /// The state to serve. The same allocation as before when nothing changed.
    pub snapshot: Arc<Snapshot>,
    /// What is wrong.
    pub report: Arc<Report>,
    /// How many objects were changed, added or removed.
    pub events: usize,
}

/// Source and index.
#[derive(Debug)]
pub struct Engine {
    dir: PathBuf,
    tracker: Tracker,
    index: Index,
    last: Step,
    /// Whether there was a report on a directory that could be read.
    reported: bool,
}

impl Engine {
    /// An engine that has read nothing yet.
    pub fn new(dir: PathBuf, settings: Settings) -> Self {
        let mut index = Index::new(settings);
        let last = Step { snapshot: index.snapshot(), report: Arc::default(), events: 0 };
        Self { dir, tracker: Tracker::default(), index, last, reported: false }
    }

    /// Reads the directory and brings the snapshot up to date. When it cannot be read everything stays as it is.
    /// Blocks on file I/O.
    pub fn step(&mut self) -> &Step {
        match file::scan(&self.dir) {
            Ok(files) => {
                let events = self.tracker.update(files);
                self.last.events = events.len();
                for event in events {
                    self.index.apply(event);
                }
                self.last.snapshot = self.index.snapshot();
                // The report is linear in all objects: not for a scan that found nothing new.
                if self.tracker.touched() || self.last.report.directory.is_some() || !self.reported {
                    self.reported = true;
                    self.set_report(self.report());
                }
            }
            Err(error) => {
                self.last.events = 0;
                let report = Report { directory: Some(chain(&error)), ..(*self.last.report).clone() };
                self.set_report(report);
            }
        }
        &self.last
    }

    fn set_report(&mut self, report: Report) {
        if *self.last.report != report {
            self.last.report = Arc::new(report);
        }
    }

    fn report(&self) -> Report {
        let found = self.index.problems().into_iter().map(|(key, issue)| self.tracker.locate(&key, issue));
        let mut problems: Vec<Problem> = self.tracker.problems().iter().cloned().chain(found).collect();
        problems.sort();
        problems.dedup();
        let fallbacks = self.tracker.objects().filter(|(_, fallback)| *fallback);
        Report {
            objects: Kind::ALL.into_iter().map(|k| (k.as_str(), self.index.count(k))).collect(),
            fallbacks: fallbacks.map(|(key, _)| key.to_string()).collect(),
            problems,
            directory: None,
        }
    }
}

/// An error and its causes on one line.
fn chain(error: &ScanError) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
