//! Checks on the text of files: size, module heads, unsafe code, and words that must not be committed.

use super::{
    modules::has_word,
    source::{Source, relative, walk},
};
use anyhow::Result;
use std::{fs, path::Path};

const MAX_LINES: usize = 600;

/// Where unsafe code may be: the kernel ABI, the BPF programs, raw sockets, raw map calls, the test harness.
const UNSAFE: [&str; 6] = [
    "mesh-common/src/pod.rs",
    "mesh-common/src/abi.rs",
    "mesh-ebpf/src/",
    "mesh-node/src/net/sys.rs",
    "mesh-node/src/bpf/sys.rs",
    "tests/src/sys.rs",
];

/// Text that belongs to one machine or to unfinished work, and why.
/// Put together here, so that this file does not hold what it looks for.
const WORDS: [(&str, &str); 5] = [
    (concat!("/ho", "me/"), "a path of one machine"),
    (concat!("/ro", "ot/"), "a path of one machine"),
    (concat!("/wo", "rk/"), "a path of one machine"),
    (concat!("TO", "DO"), "unfinished work belongs into the issue tracker"),
    (concat!("FIX", "ME"), "unfinished work belongs into the issue tracker"),
];

pub(super) fn check(sources: &[Source]) -> Vec<String> {
    let mut findings = Vec::new();
    for source in sources {
        let path = &source.path;
        let lines = Source::without_tests(&source.text).lines().count();
        if lines > MAX_LINES && !is_test(path) {
            findings.push(format!("{path}: {lines} lines without tests; split it (at most {MAX_LINES})"));
        }
        if !path.ends_with("/tests.rs") && !has_head(&source.text) {
            findings.push(format!(
                "{path}: begin with `//!` lines: what it does, and what is deliberately absent"
            ));
        }
        if has_word(&source.code, "unsafe") && !UNSAFE.iter().any(|place| path.starts_with(place)) {
            findings.push(format!("{path}: unsafe code; it is allowed in {} only", UNSAFE.join(", ")));
        }
    }
    findings
}

/// Whether a file consists of tests only.
fn is_test(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.contains("/tests/")
}

/// Whether the first thing in a file, but for inner attributes, is its documentation.
fn has_head(text: &str) -> bool {
    text.lines()
        .find(|line| !line.trim().is_empty() && !line.starts_with("#!["))
        .is_some_and(|line| line.starts_with("//!"))
}

/// Looks for [`WORDS`] in every text file of the workspace but this one.
pub(super) fn check_words(root: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    walk(root, &mut files)?;
    let mut findings = Vec::new();
    for file in files {
        let path = relative(root, &file);
        if path == "xtask/src/tidy/text.rs" {
            continue;
        }
        let Ok(text) = fs::read_to_string(&file) else { continue };
        for (number, line) in text.lines().enumerate() {
            for (word, why) in WORDS {
                if line.contains(word) {
                    findings.push(format!("{path}:{}: `{word}`: {why}", number + 1));
                }
            }
        }
    }
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(path: &str, text: &str) -> usize {
        check(&[Source::new(path.to_owned(), text.to_owned())]).len()
    }

    #[test]
    fn unsafe_code_outside_its_places() {
        let text = "//! Head.\nfn f() { unsafe { g() } }\n";
        assert_eq!(findings("mesh-node/src/role/mod.rs", text), 1);
        assert_eq!(findings("mesh-node/src/net/sys.rs", text), 0);
        assert_eq!(findings("mesh-node/src/role/mod.rs", "//! Head, unsafe.\n#![deny(unsafe_code)]\n"), 0);
    }

    #[test]
    fn sizes_count_without_tests() {
        let long = format!("//! Head.\n{}", "fn f() {}\n".repeat(MAX_LINES));
        assert_eq!(findings("a.rs", &long), 1);
        let tests = format!("//! Head.\n\n#[cfg(test)]\nmod tests {{\n{}}}\n", "// x\n".repeat(MAX_LINES));
        assert_eq!(findings("a.rs", &tests), 0);
    }

    #[test]
    fn every_file_has_a_head() {
        assert_eq!(findings("a.rs", "fn f() {}\n"), 1);
        assert_eq!(findings("a.rs", "#![no_std]\n//! Head.\n"), 0);
    }
}
