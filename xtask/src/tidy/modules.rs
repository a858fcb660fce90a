//! Arrows between the modules of mesh-node, and who may touch the kernel.

use super::source::Source;

/// The modules of mesh-node from the bottom to the top: code may name `crate::MODULE` of a lower layer only. `main`,
/// `lib` and the programs in `bin` may name all.
const LAYERS: [&[&str]; 10] = [
    &["net", "config", "metrics", "drain", "pulse", "memory", "fair"],
    &["state", "bpf", "admin", "disk"],
    &["tls", "policy", "enroll", "check"],
    &["identity", "plan", "cni"],
    &["hbone", "local", "takeover"],
    &["l4"],
    &["outcome"],
    &["inbound"],
    // Above `inbound`: for a destination on the same node it calls the other half without a network in between.
    &["outbound", "dns"],
    &["role"],
];

/// Words that only the named places may use in code.
const RESERVED: [(&str, &[&str], &str); 3] = [
    ("aya", &["mesh-node/src/bpf/", "tests/"], "mesh-node/src/bpf is the only user of aya"),
    (
        "setns",
        &["mesh-node/src/net/", "tests/src/"],
        "network namespaces are entered through mesh-node/src/net only",
    ),
    ("aya_ebpf", &["mesh-ebpf/"], "only mesh-ebpf is compiled for the kernel"),
];

pub(super) fn check(sources: &[Source]) -> Vec<String> {
    let mut findings = Vec::new();
    for source in sources {
        let code = Source::without_tests(&source.code);
        if let Some(inner) = source.path.strip_prefix("mesh-node/src/") {
            let module = inner.split(['/', '.']).next().unwrap_or_default();
            if let Some(own) = layer(module) {
                for used in crate_paths(code) {
                    if used != module && layer(used).is_some_and(|other| other >= own) {
                        findings.push(format!("{}: module {module} must not use crate::{used}", source.path));
                    }
                }
            } else if !["main", "lib", "bin"].contains(&module) {
                findings.push(format!(
                    "{}: give module {module} a layer in xtask/src/tidy/modules.rs",
                    source.path
                ));
            }
        }
        for (word, places, rule) in RESERVED {
            if has_word(code, word) && !places.iter().any(|place| source.path.starts_with(place)) {
                findings.push(format!("{}: `{word}`: {rule}", source.path));
            }
        }
    }
    findings.sort();
    findings.dedup();
    findings
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|modules| modules.contains(&module))
}

/// The first path segments after `crate::`, also inside one level of braces (`use crate::{a::B, c}`).
fn crate_paths(code: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for (at, prefix) in code.match_indices("crate::") {
        if code[..at].ends_with('$') {
            continue;
        }
        let rest = &code[at + prefix.len()..];
        match rest.strip_prefix('{') {
            None => found.push(word(rest)),
            Some(group) => {
                let mut depth = 0;
                let mut expect = true;
                for (at, c) in group.char_indices() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => expect = true,
                        c if expect && c.is_alphabetic() => {
                            found.push(word(&group[at..]));
                            expect = false;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    found
}

fn word(text: &str) -> &str {
    &text[..text.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(text.len())]
}

/// Whether `code` contains `word` as an identifier of its own.
pub(super) fn has_word(code: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).any(|(at, _)| {
        !code[..at].chars().next_back().is_some_and(part)
            && !code[at + word.len()..].chars().next().is_some_and(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, text: &str) -> Vec<Source> {
        vec![Source::new(path.to_owned(), text.to_owned())]
    }

    #[test]
    fn upward_arrows_are_found() {
        assert_eq!(check(&source("mesh-node/src/state/mod.rs", "use crate::plan::Plan;")).len(), 1);
        assert_eq!(
            check(&source("mesh-node/src/state.rs", "use crate::{state::A, outbound::{b, c}};")).len(),
            1
        );
        assert!(
            check(&source("mesh-node/src/outbound/mod.rs", "use crate::{l4, hbone::X, inbound};")).is_empty()
        );
        assert_eq!(check(&source("mesh-node/src/inbound/mod.rs", "use crate::outbound;")).len(), 1);
        assert_eq!(check(&source("mesh-node/src/newcomer.rs", "fn f() {}")).len(), 1);
        assert!(check(&source("mesh-node/src/main.rs", "use crate::role;")).is_empty());
    }

    #[test]
    fn reserved_words_are_found_in_code_only() {
        assert_eq!(check(&source("mesh-node/src/role/mod.rs", "use aya::Ebpf;")).len(), 1);
        assert!(
            check(&source("mesh-node/src/role/mod.rs", "// aya\nlet s = \"aya\"; fn playaya() {}"))
                .is_empty()
        );
        assert!(check(&source("mesh-node/src/bpf/load.rs", "use aya::Ebpf;")).is_empty());
    }

    #[test]
    fn paths_in_groups() {
        assert_eq!(crate_paths("use crate::{a::{x, y}, b, c::Z};"), ["a", "b", "c"]);
        assert_eq!(crate_paths("crate::d::f()"), ["d"]);
        assert!(crate_paths("$crate::d").is_empty());
    }
}
