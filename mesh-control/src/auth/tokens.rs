//! The bootstrap tokens of nodes, from a file.
//!
//! One line per token: the node's name, white space, the token. Several lines for a node make a rotation possible.
//! Instead of a node's name there may be a SPIFFE ID: then the token belongs to a proxy that serves this one workload
//! (a ztunnel in dedicated mode) and gets its certificate only. The
//! file is read again when it changes; if it is broken then, the last good one stays. Deliberately absent: tokens that
//! are good for every node, because the CA limits a node to its own pods by the name that its token proves.

use super::{AuthError, Authenticator, Caller};
use arc_swap::ArcSwap;
use futures::future::{BoxFuture, ready};
use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// Shorter tokens could be guessed.
const MIN_TOKEN: usize = 16;
/// Longer lines are a mistake.
const MAX_TOKEN: usize = 4096;

/// Why a token file is not used.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    /// It cannot be read.
    #[error("cannot read the token file {path}; create it with one line `NODE TOKEN` for each node")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Others can read it.
    #[error("{path} has mode {mode:o}, so others can read the tokens; run: chmod 600 {path}")]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A line is not as it should be.
    #[error("{path}:{line}: {message}; {remedy}")]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong.
        message: &'static str,
        /// What to do.
        remedy: &'static str,
    },
}

#[derive(Default, PartialEq, Eq)]
struct Tokens {
    /// By token.
    callers: BTreeMap<String, Caller>,
}

/// A file of node tokens.
pub struct TokenFile {
    path: PathBuf,
    tokens: ArcSwap<Tokens>,
}

impl TokenFile {
    /// Reads the file.
    pub fn open(path: &Path) -> Result<Self, TokenFileError> {
        Ok(Self { path: path.to_owned(), tokens: ArcSwap::from_pointee(read(path)?) })
    }

    /// Reads the file again; true if the tokens are others now. After an error the earlier ones stay valid.
    pub fn reload(&self) -> Result<bool, TokenFileError> {
        let new = read(&self.path)?;
        let changed = **self.tokens.load() != new;
        if changed {
            self.tokens.store(new.into());
        }
        Ok(changed)
    }

    /// How many tokens there are.
    pub fn len(&self) -> usize {
        self.tokens.load().callers.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn find(&self, token: &str) -> Option<Caller> {
        let tokens = self.tokens.load();
        // All are compared, each in constant time, so that the time taken says nothing about any of them.
        let mut found = None;
        for (known, caller) in &tokens.callers {
            if same(known.as_bytes(), token.as_bytes()) {
                found = Some(caller);
            }
        }
        found.cloned()
    }
}

/// Compares without stopping at the first difference. The length is no secret.
fn same(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let difference = a.iter().zip(b).fold(0u8, |acc, (x, y)| std::hint::black_box(acc | (x ^ y)));
    std::hint::black_box(difference) == 0
}

impl Authenticator for TokenFile {
    fn authenticate<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Caller, AuthError>> {
        Box::pin(ready(self.find(token).ok_or(AuthError::Unknown)))
    }
}

fn read(path: &Path) -> Result<Tokens, TokenFileError> {
    let wrap = |source| TokenFileError::Read { path: path.to_owned(), source };
    let mode = fs::metadata(path).map_err(wrap)?.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(TokenFileError::Mode { path: path.to_owned(), mode });
    }
    let text = fs::read_to_string(path).map_err(wrap)?;
    let mut tokens = Tokens::default();
    for (i, line) in text.lines().enumerate() {
        let line_error =
            |message, remedy| TokenFileError::Line { path: path.to_owned(), line: i + 1, message, remedy };
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut words = line.split_whitespace();
        let (Some(name), Some(token), None) = (words.next(), words.next(), words.next()) else {
            return Err(line_error(
                "it is not of the form `NODE TOKEN`",
                "write the two words, nothing else",
            ));
        };
        if token.len() < MIN_TOKEN {
            return Err(line_error(
                "the token is shorter than 16 characters",
                "make a random one, for example with: openssl rand -hex 32",
            ));
        }
        if token.len() > MAX_TOKEN {
            return Err(line_error("the token is longer than 4096 characters", "make a shorter one"));
        }
        let caller = match name.contains("://") {
            false => Caller::Node { name: name.to_owned() },
            true => match name.parse() {
                Ok(identity) => Caller::Workload { identity },
                Err(_) => {
                    return Err(line_error(
                        "the identity is not of the form spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT",
                        "correct it, or write the name of a node",
                    ));
                }
            },
        };
        if let Some(other) = tokens.callers.insert(token.to_owned(), caller.clone())
            && other != caller
        {
            return Err(line_error(
                "the token is another node's as well",
                "give each node a token of its own",
            ));
        }
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(dir: &Path, text: &str, mode: u32) -> PathBuf {
        let path = dir.join("tokens");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    async fn who(tokens: &TokenFile, token: &str) -> Option<String> {
        match tokens.authenticate(token).await {
            Ok(Caller::Node { name }) => Some(name),
            Ok(other) => panic!("{other:?}"),
            Err(error) => {
                assert_eq!(error, AuthError::Unknown);
                None
            }
        }
    }

    #[tokio::test]
    async fn a_token_is_the_name_of_its_node() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path(), "# nodes\nn1 aaaaaaaaaaaaaaaa\n\nn2\tbbbbbbbbbbbbbbbb\n", 0o600);
        let tokens = TokenFile::open(&path).unwrap();
        assert_eq!(who(&tokens, "aaaaaaaaaaaaaaaa").await.as_deref(), Some("n1"));
        assert_eq!(who(&tokens, "bbbbbbbbbbbbbbbb").await.as_deref(), Some("n2"));
        file(dir.path(), "n1 aaaaaaaaaaaaaaaa\nspiffe://td/ns/a/sa/b bbbbbbbbbbbbbbbb\n", 0o600);
        assert!(tokens.reload().unwrap());
        let workload = Caller::Workload { identity: "spiffe://td/ns/a/sa/b".parse().unwrap() };
        assert_eq!(tokens.authenticate("bbbbbbbbbbbbbbbb").await, Ok(workload));
        for wrong in ["aaaaaaaaaaaaaaab", "aaaaaaaaaaaaaaa", "aaaaaaaaaaaaaaaaa", "", "n1"] {
            assert_eq!(who(&tokens, wrong).await, None, "{wrong}");
        }
        // Rotation: both tokens work, then the old one is gone. A broken file changes nothing.
        file(dir.path(), "n1 aaaaaaaaaaaaaaaa\nn1 cccccccccccccccc\n", 0o600);
        assert!(tokens.reload().unwrap());
        assert_eq!(who(&tokens, "aaaaaaaaaaaaaaaa").await, who(&tokens, "cccccccccccccccc").await);
        file(dir.path(), "n1 short\n", 0o600);
        assert!(tokens.reload().is_err());
        assert_eq!(who(&tokens, "cccccccccccccccc").await.as_deref(), Some("n1"));
        file(dir.path(), "n1 cccccccccccccccc\n", 0o600);
        assert!(tokens.reload().unwrap());
        assert!(!tokens.reload().unwrap());
        assert_eq!(who(&tokens, "aaaaaaaaaaaaaaaa").await, None);
    }

    #[test]
    fn mistakes_name_the_line_and_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        for (text, mode, wanted) in [
            ("n1 aaaaaaaaaaaaaaaa\n", 0o644, "chmod 600"),
            ("n1 aaaaaaaaaaaaaaaa\nn2\n", 0o600, ":2: it is not of the form"),
            ("n1 aaaaaaaaaaaaaaaa extra\n", 0o600, ":1: it is not of the form"),
            ("n1 short\n", 0o600, "openssl rand"),
            ("spiffe://td/ns/a aaaaaaaaaaaaaaaa\n", 0o600, ":1: the identity is not of the form"),
            ("n1 aaaaaaaaaaaaaaaa\nn2 aaaaaaaaaaaaaaaa\n", 0o600, ":2: the token is another node's"),
        ] {
            let error = TokenFile::open(&file(dir.path(), text, mode)).err().unwrap().to_string();
            assert!(error.contains(wanted), "{error}");
        }
        assert!(TokenFile::open(&dir.path().join("none")).is_err());
    }

    #[test]
    fn bearer_headers() {
        for (value, wanted) in [
            ("Bearer abc", Some("abc")),
            ("bearer  abc ", Some("abc")),
            ("Basic abc", None),
            ("Bearer ", None),
            ("abc", None),
        ] {
            let mut headers = http::HeaderMap::new();
            headers.insert("authorization", value.parse().unwrap());
            assert_eq!(super::super::bearer(&headers).ok(), wanted, "{value}");
        }
        assert!(super::super::bearer(&http::HeaderMap::new()).is_err());
    }
}
