//! What is wrong with the configuration, in words for the person who wrote it.
//!
//! An [`Issue`] is about one object and knows only the object's own field; a [`Problem`] is an issue with the file
//! and line where that field is written. Deliberately absent: logging and HTTP, which render these values.

use crate::object::ObjectKey;
use serde::{Serialize, Serializer};
use std::fmt;

/// How bad an issue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The object is not used in this form (its last good form, or a form that fails closed, is).
    Error,
    /// The object is used, but not all of it does what it may look like.
    Warning,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warning => "warning",
        })
    }
}

/// One step of a path into a YAML document.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// A key of a mapping.
    Key(String),
    /// An element of a sequence, counted from 0.
    Index(usize),
}

/// A path to a field, written like `spec.ports[0].port` or `metadata.labels["app.kubernetes.io/name"]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct FieldPath(pub Vec<Step>);

impl FieldPath {
    /// This path and one key more.
    #[must_use]
    pub fn key(&self, key: impl Into<String>) -> Self {
        let mut steps = self.0.clone();
        steps.push(Step::Key(key.into()));
        Self(steps)
    }

    /// This path and one sequence index more.
    #[must_use]
    pub fn index(&self, index: usize) -> Self {
        let mut steps = self.0.clone();
        steps.push(Step::Index(index));
        Self(steps)
    }

    /// This path, then the other one.
    #[must_use]
    pub fn join(&self, rest: &Self) -> Self {
        Self(self.0.iter().chain(&rest.0).cloned().collect())
    }
}

impl From<&str> for FieldPath {
    /// Reads a dotted path of plain keys, as in `metadata.name`. Keys with dots are added by [`FieldPath::key`].
    fn from(dotted: &str) -> Self {
        Self(dotted.split('.').filter(|s| !s.is_empty()).map(|s| Step::Key(s.to_owned())).collect())
    }
}

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, step) in self.0.iter().enumerate() {
            match step {
                Step::Key(k) if k.contains(['.', '[', '"', ' ']) || k.is_empty() => write!(f, "[{k:?}]")?,
                Step::Key(k) if i == 0 => f.write_str(k)?,
                Step::Key(k) => write!(f, ".{k}")?,
                Step::Index(n) => write!(f, "[{n}]")?,
            }
        }
        Ok(())
    }
}

impl Serialize for FieldPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Something wrong with one object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Issue {
    /// How bad it is.
    pub severity: Severity,
    /// The field, from the object's root; empty for the object as a whole.
    pub field: FieldPath,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
}

impl Issue {
    /// An error at `field`.
    pub fn error(field: impl Into<FieldPath>, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            field: field.into(),
            message: message.into(),
            remedy: remedy.into(),
        }
    }

    /// A warning at `field`.
    pub fn warning(
        field: impl Into<FieldPath>,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { severity: Severity::Warning, ..Self::error(field, message, remedy) }
    }

    /// Whether this is an error.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

/// An issue and the place where it was written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    /// The file, relative to the configuration directory.
    pub file: String,
    /// The line, counted from 1; `None` when the file as a whole is meant.
    pub line: Option<usize>,
    /// The object, as far as it could be read.
    pub object: Option<ObjectKey>,
    /// What is wrong with it.
    #[serde(flatten)]
    pub issue: Issue,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        write!(f, ": {}: ", self.issue.severity)?;
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        if !self.issue.field.0.is_empty() {
            write!(f, "{}: ", self.issue.field)?;
        }
        write!(f, "{}; {}", self.issue.message, self.issue.remedy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_written_as_people_write_them() {
        let path = FieldPath::from("spec.ports").index(2).key("port");
        assert_eq!(path.to_string(), "spec.ports[2].port");
        let path = FieldPath::from("metadata.labels").key("app.kubernetes.io/name");
        assert_eq!(path.to_string(), "metadata.labels[\"app.kubernetes.io/name\"]");
    }
}
