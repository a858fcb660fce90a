//! The parameters that a container runtime passes in environment variables.

use super::CniError;
use std::path::PathBuf;

/// `CNI_COMMAND`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Add a container to the network.
    Add,
    /// Remove it.
    Del,
    /// Is it as it should be?
    Check,
    /// Can containers be added?
    Status,
    /// Remove what is left of containers that no longer exist.
    Gc,
    /// Which versions are spoken?
    Version,
}

impl Command {
    /// As in `CNI_COMMAND`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Status => "STATUS",
            Self::Gc => "GC",
            Self::Version => "VERSION",
        }
    }

    /// Reads `CNI_COMMAND`.
    pub fn from_env(get: &dyn Fn(&str) -> Option<String>) -> Result<Self, CniError> {
        let name = required(get, "CNI_COMMAND")?;
        [Self::Add, Self::Del, Self::Check, Self::Status, Self::Gc, Self::Version]
            .into_iter()
            .find(|c| c.name() == name)
            .ok_or_else(|| invalid("CNI_COMMAND", format!("is {name:?}, which is no command of CNI 1.1.0")))
    }
}

/// What identifies the attachment, for ADD, DEL and CHECK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_NETNS`; may be missing for DEL.
    pub netns: Option<PathBuf>,
    /// `K8S_POD_NAMESPACE` of `CNI_ARGS`; may be empty for DEL.
    pub namespace: String,
    /// `K8S_POD_NAME`; may be empty for DEL.
    pub name: String,
    /// `K8S_POD_UID`; empty if the runtime does not pass it.
    pub uid: String,
}

impl Attachment {
    /// Reads the variables that `command` needs.
    pub fn from_env(command: Command, get: &dyn Fn(&str) -> Option<String>) -> Result<Self, CniError> {
        let container_id = required(get, "CNI_CONTAINERID")?;
        if !valid_container_id(&container_id) {
            let problem =
                format!("is {container_id:?}, which is no container ID (letters, digits, '.', '_', '-')");
            return Err(invalid("CNI_CONTAINERID", problem));
        }
        required(get, "CNI_IFNAME")?;
        let netns = match command {
            Command::Del => get("CNI_NETNS").filter(|path| !path.is_empty()),
            _ => Some(required(get, "CNI_NETNS")?),
        };
        let args = get("CNI_ARGS").unwrap_or_default();
        let arg = |key| arg(&args, key).unwrap_or_default().to_owned();
        let pod = Self {
            container_id,
            netns: netns.map(PathBuf::from),
            namespace: arg("K8S_POD_NAMESPACE"),
            name: arg("K8S_POD_NAME"),
            uid: arg("K8S_POD_UID"),
        };
        if command != Command::Del && (pod.namespace.is_empty() || pod.name.is_empty()) {
            let problem = "does not have both K8S_POD_NAMESPACE and K8S_POD_NAME".to_owned();
            return Err(invalid("CNI_ARGS", problem));
        }
        Ok(pod)
    }
}

fn required(get: &dyn Fn(&str) -> Option<String>, variable: &'static str) -> Result<String, CniError> {
    get(variable).filter(|value| !value.is_empty()).ok_or_else(|| invalid(variable, "is not set".to_owned()))
}

fn invalid(variable: &'static str, problem: String) -> CniError {
    CniError::Env { variable, problem }
}

/// The value of `key` in `K=V;K=V`.
fn arg<'a>(args: &'a str, key: &str) -> Option<&'a str> {
    args.split(';')
        .filter_map(|pair| pair.split_once('='))
        .find(|(k, _)| k.trim() == key)
        .map(|(_, v)| v.trim())
}

fn valid_container_id(id: &str) -> bool {
    id.len() <= 256
        && id.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}
