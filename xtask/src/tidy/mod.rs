//! `cargo xtask tidy`: the house rules that a compiler does not check. Each check returns findings, one line each,
//! which name the file, the rule and what to do.

mod arrows;
mod licences;
mod modules;
mod source;
mod text;

use crate::commands::{cargo, output, root};
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use source::Source;

/// The part of `cargo metadata` that the checks need.
#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_members: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    license_file: Option<String>,
    dependencies: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    name: String,
    kind: Option<String>,
}

impl Metadata {
    fn read() -> Result<Self> {
        let text = output(&mut cargo(["metadata", "--format-version", "1", "--locked"]))?;
        serde_json::from_str(&text).context("parse cargo metadata")
    }

    fn members(&self) -> impl Iterator<Item = &Package> {
        self.packages.iter().filter(|package| self.workspace_members.contains(&package.id))
    }
}

/// Runs all checks and prints the findings.
pub(crate) fn run() -> Result<()> {
    let metadata = Metadata::read()?;
    let sources = Source::all(root())?;
    ensure!(sources.len() > 10, "only {} source files found below {}", sources.len(), root().display());
    let mut findings = arrows::check(&metadata);
    findings.extend(modules::check(&sources));
    findings.extend(licences::check(&metadata));
    findings.extend(text::check(&sources));
    findings.extend(text::check_words(root())?);
    for finding in &findings {
        println!("tidy: {finding}");
    }
    ensure!(findings.is_empty(), "{} findings", findings.len());
    println!("tidy: {} source files and {} packages are in order", sources.len(), metadata.packages.len());
    licences::advisories()
}
