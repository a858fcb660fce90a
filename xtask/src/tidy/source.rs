//! Reading the workspace's source files, with comments and literals blanked out for the checks that look for code.

use anyhow::{Context, Result};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// One Rust file.
#[derive(Debug)]
pub(super) struct Source {
    /// Relative to the root, with forward slashes.
    pub(super) path: String,
    /// As it is.
    pub(super) text: String,
    /// Comments, strings and character literals replaced by blanks; the lines stay.
    pub(super) code: String,
}

impl Source {
    pub(super) fn new(path: String, text: String) -> Self {
        let code = strip(&text);
        Self { path, text, code }
    }

    /// All Rust files of the workspace, generated ones left out.
    pub(super) fn all(root: &Path) -> Result<Vec<Self>> {
        let mut files = Vec::new();
        walk(root, &mut files)?;
        files.sort();
        files
            .into_iter()
            .filter(|path| path.extension().is_some_and(|ext| ext == "rs"))
            .map(|path| {
                let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
                Ok(Self::new(relative(root, &path), text))
            })
            .filter(|source| source.as_ref().map_or(true, |source| !source.path.contains("/src/gen/")))
            .collect()
    }

    /// The part before the test module at the end of the file.
    pub(super) fn without_tests(text: &str) -> &str {
        text.find("\n#[cfg(test)]\nmod ").map_or(text, |at| &text[..=at])
    }
}

/// Path below the root.
pub(super) fn relative(root: &Path, path: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).to_string_lossy().replace('\\', "/")
}

/// All files below `dir`, without build folders and hidden ones.
pub(super) fn walk(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        let hidden = name.to_string_lossy().starts_with('.');
        if entry.file_type()?.is_dir() {
            if !hidden && name != "target" {
                walk(&entry.path(), files)?;
            }
        } else if !hidden {
            files.push(entry.path());
        }
    }
    Ok(())
}

fn strip(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let len = literal(rest);
        if len == 0 {
            out.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            out.extend(rest[..len].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
            rest = &rest[len..];
        }
        // An identifier is passed over as a whole, so that the r of `for"` does not begin a raw string.
        if len == 0 && (first.is_alphanumeric() || first == '_') {
            let more = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
            if !(more == 0 && rest.starts_with(['"', '#', '\''])) {
                out.push_str(&rest[..more]);
                rest = &rest[more..];
            }
        }
    }
    out
}

/// The length of the comment or literal that `text` begins with; 0 for anything else.
fn literal(text: &str) -> usize {
    let to = |end: Option<usize>| end.unwrap_or(text.len());
    if text.starts_with("//") {
        return to(text.find('\n'));
    }
    if text.starts_with("/*") {
        return to(text.find("*/").map(|at| at + 2));
    }
    for prefix in ["r", "br", "cr"] {
        if let Some(raw) = text.strip_prefix(prefix) {
            let hashes = raw.len() - raw.trim_start_matches('#').len();
            if raw[hashes..].starts_with('"') {
                let close = format!("\"{}", "#".repeat(hashes));
                let body = prefix.len() + hashes + 1;
                return to(text[body..].find(&close).map(|at| body + at + close.len()));
            }
        }
    }
    let quote_at = usize::from(text.starts_with("b\"") || text.starts_with("c\"") || text.starts_with("b'"));
    match text.as_bytes()[quote_at..].first() {
        Some(b'"') => quote_at + quoted(&text[quote_at..], b'"'),
        // A character literal, not a lifetime.
        Some(b'\'') => {
            let body = &text[quote_at + 1..];
            let escaped = body.starts_with('\\');
            let closes = body.chars().nth(1) == Some('\'');
            if escaped || closes { quote_at + quoted(&text[quote_at..], b'\'') } else { 0 }
        }
        _ => 0,
    }
}

/// The length of a literal from its opening to its closing quote.
fn quoted(text: &str, quote: u8) -> usize {
    let bytes = text.as_bytes();
    let mut at = 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 1,
            byte if byte == quote => return at + 1,
            _ => {}
        }
        at += 1;
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_and_comments_are_blanked_and_lines_kept() {
        let text = "a // unsafe\nlet s = \"unsafe \\\" x\"; /* unsafe\n */ b\n";
        let code = strip(text);
        assert!(!code.contains("unsafe"), "{code}");
        assert_eq!(code.lines().count(), text.lines().count());
        assert!(code.contains("let s =") && code.contains(" b"));
    }

    #[test]
    fn raw_strings_characters_and_lifetimes() {
        assert!(!strip("x(r#\"unsafe \" y\"#) z").contains("unsafe"));
        assert!(strip("x(r#\"unsafe\"#) z").ends_with(") z"));
        assert!(!strip("b\"unsafe\" '\"' 'u' b'\\''").contains(['"', 'u']));
        assert_eq!(strip("fn f<'a>(x: &'a str) {}"), "fn f<'a>(x: &'a str) {}");
        assert!(strip("for x in y { unsafe {} }").contains("unsafe"));
    }

    #[test]
    fn tests_at_the_end_are_cut_off() {
        let text = "fn a() {}\n\n#[cfg(test)]\nmod tests {\n}\n";
        assert_eq!(Source::without_tests(text).lines().count(), 2);
        assert_eq!(Source::without_tests("fn a() {}\n"), "fn a() {}\n");
    }
}
