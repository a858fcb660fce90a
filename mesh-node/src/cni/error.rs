//! Errors as CNI reports them (specification, section "Error").

use super::{VERSIONS, client::CallError, env::Command};
use crate::enroll::protocol::{ErrorKind, Failure};
use serde_json::{Value, json};
use std::{io, path::PathBuf};

/// Why the plugin failed.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// The configuration's version, or a command that its version does not have.
    #[error("CNI version {version:?} is not supported{}", .command.map(|c| format!(" for {}", c.name())).unwrap_or_default())]
    Version {
        /// `cniVersion`.
        version: String,
        /// The command that needs a newer one.
        command: Option<Command>,
    },
    /// An environment variable is missing or wrong.
    #[error("{variable} {problem}")]
    Env {
        /// Its name.
        variable: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The network namespace file cannot be opened.
    #[error("CNI_NETNS names {}, which cannot be opened", .path.display())]
    NetNs {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Standard input cannot be read.
    #[error("the network configuration cannot be read from standard input")]
    Stdin(#[source] io::Error),
    /// Standard input is too long.
    #[error("the network configuration has more than {limit} bytes")]
    TooLong {
        /// The limit.
        limit: usize,
    },
    /// Standard input is not JSON of the right form.
    #[error("the network configuration cannot be decoded")]
    Decode(#[source] serde_json::Error),
    /// A field of the configuration is wrong.
    #[error("{field} in the network configuration {problem}")]
    Config {
        /// Its name.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The daemon did not answer.
    #[error("mesh-node on {} is not available for {}", .socket.display(), .command.name())]
    Daemon {
        /// Its socket.
        socket: PathBuf,
        /// What it was asked for.
        command: Command,
        /// Why.
        #[source]
        source: CallError,
    },
    /// The daemon answered with an error.
    #[error("{}", .0.message)]
    Refused(Failure),
}

impl CniError {
    /// The code; 1 to 99 are CNI's, from 100 on the plugin's own.
    pub fn code(&self) -> u32 {
        match self {
            Self::Version { .. } => 1,
            Self::Env { .. } | Self::NetNs { .. } => 4,
            Self::Stdin(_) => 5,
            Self::TooLong { .. } | Self::Decode(_) => 6,
            Self::Config { .. } => 7,
            Self::Daemon { command: Command::Status, .. } => 50,
            Self::Daemon { .. } => 11,
            Self::Refused(failure) => match failure.kind {
                ErrorKind::Invalid => 4,
                ErrorKind::TryAgain => 11,
                ErrorKind::NotReady => 50,
                ErrorKind::Failed => 100,
                ErrorKind::Version => 101,
            },
        }
    }

    /// What to do about it.
    fn remedy(&self) -> String {
        match self {
            Self::Version { .. } => format!("use one of {}", VERSIONS.join(", ")),
            Self::Env { .. } => "mesh-cni is run by the container runtime, for Kubernetes pods only".into(),
            Self::NetNs { .. } => "the runtime has to make the pod's network namespace before ADD".into(),
            Self::Stdin(_) | Self::TooLong { .. } | Self::Decode(_) => {
                "see that the file in /etc/cni/net.d is a valid network configuration list".into()
            }
            Self::Config { .. } => "correct it in the network configuration list in /etc/cni/net.d".into(),
            Self::Daemon { .. } => {
                "see that the nodemesh DaemonSet's pod runs on this node; the runtime tries again by itself"
                    .into()
            }
            Self::Refused(failure) => failure.remedy.clone(),
        }
    }

    /// The error object for standard output.
    pub fn to_json(&self, version: &str) -> Value {
        let mut details = String::new();
        let mut cause = std::error::Error::source(self);
        while let Some(e) = cause {
            details += &format!("{e}; ");
            cause = e.source();
        }
        details += &self.remedy();
        json!({ "cniVersion": version, "code": self.code(), "msg": self.to_string(), "details": details })
    }
}
