//! A directory of Kubernetes YAML as the cluster's API: `*.yaml`, `*.yml` and `*.json`, flat, re-read while it changes.
//!
//! `document` splits text and finds lines, `tracker` decides which objects are in force, `scan` reads the directory,
//! `watch` says when to look again. Deliberately absent: sub-directories (a ConfigMap mount has hidden ones that
//! repeat every file), templates, and writing anything back.

mod document;
mod scan;
mod tracker;
mod watch;

pub use scan::{ScanError, scan};
pub use tracker::{Files, Tracker};
pub use watch::{Watch, WatchError};

#[cfg(test)]
mod tests;
