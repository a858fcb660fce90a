//! Licences of everything that is linked in, from `cargo metadata`, and advisories where `cargo-deny` is installed.
//!
//! The licences are checked without any tool or network; `deny.toml` has the same list for those who run `cargo deny`,
//! which also reads the advisory database and therefore needs the network.

use super::Metadata;
use crate::commands::{cargo, on_path, run};
use anyhow::Result;

/// Licences that code under Apache-2.0 may be combined with; the same list as in `deny.toml`.
const ALLOWED: [&str; 13] = [
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "MIT",
    "MIT-0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "0BSD",
    "CC0-1.0",
    "Unicode-3.0",
    "CDLA-Permissive-2.0",
    // Copyleft for changes to its own files only; used unchanged.
    "MPL-2.0",
];

pub(super) fn check(metadata: &Metadata) -> Vec<String> {
    let mut findings = Vec::new();
    for package in &metadata.packages {
        let name = format!("dependency {} {}", package.name, package.version);
        match (&package.license, &package.license_file) {
            (Some(expression), _) if allowed(expression) => {}
            (Some(expression), _) => {
                findings.push(format!("{name}: the licence `{expression}` is not on the list"));
            }
            (None, Some(file)) => {
                findings.push(format!("{name}: has a licence of its own ({file}); judge it by hand"));
            }
            (None, None) => findings.push(format!("{name}: declares no licence")),
        }
    }
    findings
}

/// Runs `cargo deny check` where it is installed, and says so where it is not.
pub(super) fn advisories() -> Result<()> {
    if on_path("cargo-deny") {
        run(&mut cargo(["deny", "--log-level", "warn", "check"]))
    } else {
        println!("tidy: cargo-deny is not installed: licences were checked here, advisories were not");
        Ok(())
    }
}

/// Whether an SPDX expression can be satisfied by allowed licences alone.
fn allowed(expression: &str) -> bool {
    // Old crates write MIT/Apache-2.0.
    let expression = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = expression.split_whitespace().collect();
    let mut at = 0;
    let result = any_of(&words, &mut at);
    result && at == words.len()
}

fn any_of(words: &[&str], at: &mut usize) -> bool {
    let mut result = all_of(words, at);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        // Both sides are parsed, whatever the first was.
        result |= all_of(words, at);
    }
    result
}

fn all_of(words: &[&str], at: &mut usize) -> bool {
    let mut result = one(words, at);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        result &= one(words, at);
    }
    result
}

fn one(words: &[&str], at: &mut usize) -> bool {
    let Some(word) = words.get(*at) else { return false };
    *at += 1;
    if *word == "(" {
        let result = any_of(words, at);
        let closed = words.get(*at) == Some(&")");
        *at += 1;
        return result && closed;
    }
    // "Or later" includes the version itself.
    let mut licence = word.trim_end_matches('+').trim_end_matches("-or-later").to_owned();
    if words.get(*at) == Some(&"WITH")
        && let Some(exception) = words.get(*at + 1)
    {
        licence = format!("{licence} WITH {exception}");
        *at += 2;
    }
    ALLOWED.contains(&licence.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions() {
        for good in [
            "MIT",
            "MIT/Apache-2.0",
            "GPL-2.0 OR MIT",
            "Apache-2.0 WITH LLVM-exception OR GPL-3.0",
            "(MIT OR GPL-2.0) AND Unicode-3.0",
            "ISC AND (Apache-2.0 OR ISC)",
            "MPL-2.0+",
        ] {
            assert!(allowed(good), "{good}");
        }
        for bad in
            ["GPL-2.0", "MIT AND GPL-2.0", "GPL-2.0 WITH Classpath-exception-2.0", "", "(MIT", "MIT MIT"]
        {
            assert!(!allowed(bad), "{bad}");
        }
    }
}
