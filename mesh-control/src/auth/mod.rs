//! Who is calling: a bearer token becomes a [`Caller`].
//!
//! For the file source tokens are in a file ([`TokenFile`]); a cluster will have a TokenReview behind the same trait.
//! Deliberately absent: what a caller may do (`crate::ca`, `crate::serve`).

mod tokens;

pub use tokens::{TokenFile, TokenFileError};

use futures::future::BoxFuture;
use mesh_xds::model::SpiffeId;

/// Somebody who has shown a valid credential.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// The daemon of a node.
    Node {
        /// The node's name.
        name: String,
    },
    /// A workload that speaks for itself.
    Workload {
        /// Its identity.
        identity: SpiffeId,
    },
}

/// Why nobody is known behind a request. The text goes to the caller, so it does not say how near a guess was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// No token.
    #[error("there is no bearer token; send the header `authorization: Bearer TOKEN`")]
    Missing,
    /// Not a known token.
    #[error(
        "the bearer token is not known here; give the node a token that is in mesh-control's --node-tokens file"
    )]
    Unknown,
}

impl AuthError {
    /// A short name for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Missing => "no_token",
            Self::Unknown => "unknown_token",
        }
    }
}

/// Turns a bearer token into a caller.
pub trait Authenticator: Send + Sync + 'static {
    /// Looks the token up; may ask somebody else.
    fn authenticate<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Caller, AuthError>>;
}

/// The token of an `authorization: Bearer` header. The scheme's case does not matter (RFC 9110, 11.1).
pub fn bearer(headers: &http::HeaderMap) -> Result<&str, AuthError> {
    let value = headers.get(http::header::AUTHORIZATION).and_then(|v| v.to_str().ok());
    let (scheme, token) = value.and_then(|v| v.split_once(' ')).ok_or(AuthError::Missing)?;
    let token = token.trim();
    if scheme.eq_ignore_ascii_case("bearer") && !token.is_empty() {
        Ok(token)
    } else {
        Err(AuthError::Missing)
    }
}
