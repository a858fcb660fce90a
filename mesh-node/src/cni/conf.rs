//! The network configuration that the runtime writes to standard input.

use super::{CniError, VERSIONS};
use crate::{enroll::protocol::DEFAULT_SOCKET, net::links::is_pod_address};
use serde::Deserialize;
use serde_json::Value;
use std::{
    io::Read,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

/// Most bytes that are read from standard input.
pub const MAX_CONFIG: usize = 1024 * 1024;
/// How long an operation may take unless `timeoutSeconds` says otherwise.
const DEFAULT_TIMEOUT_SECONDS: u64 = 30;
/// kubelet gives up on a sandbox after 4 minutes.
const MAX_TIMEOUT_SECONDS: u64 = 200;

/// The parts of the configuration that the plugin uses. Others belong to the runtime and are passed over.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Conf {
    /// `cniVersion`.
    pub cni_version: String,
    /// `prevResult`: what the plugin before this one has made.
    #[serde(default)]
    pub prev_result: Option<Value>,
    /// `socketPath`: where the daemon listens.
    #[serde(default = "default_socket")]
    pub socket_path: PathBuf,
    /// `timeoutSeconds`: how long an operation may take.
    #[serde(default = "default_timeout")]
    timeout_seconds: u64,
    /// `excludeNamespaces`: pods that never wait for the daemon, so that the cluster can start and repair
    /// itself.
    #[serde(default = "default_exclusions")]
    pub exclude_namespaces: Vec<String>,
    /// `cni.dev/valid-attachments`: what exists, for GC.
    #[serde(default, rename = "cni.dev/valid-attachments")]
    pub valid_attachments: Option<Vec<ValidAttachment>>,
}

/// One of GC's valid attachments.
#[derive(Clone, Debug, Deserialize)]
pub struct ValidAttachment {
    /// The container.
    #[serde(rename = "containerID")]
    pub container_id: String,
}

fn default_socket() -> PathBuf {
    DEFAULT_SOCKET.into()
}

fn default_timeout() -> u64 {
    DEFAULT_TIMEOUT_SECONDS
}

fn default_exclusions() -> Vec<String> {
    ["kube-system", "nodemesh-system"].map(str::to_owned).into()
}

/// Reads standard input, at most [`MAX_CONFIG`] bytes.
pub fn read(stdin: &mut dyn Read) -> Result<Vec<u8>, CniError> {
    let mut data = Vec::new();
    stdin.take(MAX_CONFIG as u64 + 1).read_to_end(&mut data).map_err(CniError::Stdin)?;
    if data.len() > MAX_CONFIG { Err(CniError::TooLong { limit: MAX_CONFIG }) } else { Ok(data) }
}

impl Conf {
    /// Decodes and checks a configuration.
    pub fn parse(data: &[u8]) -> Result<Self, CniError> {
        let conf: Self = serde_json::from_slice(data).map_err(CniError::Decode)?;
        if !VERSIONS.contains(&conf.cni_version.as_str()) {
            return Err(CniError::Version { version: conf.cni_version, command: None });
        }
        let wrong = |field, problem| Err(CniError::Config { field, problem });
        if !conf.socket_path.is_absolute() {
            return wrong("socketPath", format!("is {:?}; it has to be an absolute path", conf.socket_path));
        }
        if !(1..=MAX_TIMEOUT_SECONDS).contains(&conf.timeout_seconds) {
            let problem = format!("is {}; it has to be 1 to {MAX_TIMEOUT_SECONDS}", conf.timeout_seconds);
            return wrong("timeoutSeconds", problem);
        }
        Ok(conf)
    }

    /// How long an operation may take.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_seconds)
    }

    /// The previous result, which a chained plugin has to have.
    pub fn prev_result(&self) -> Result<&Value, CniError> {
        match &self.prev_result {
            Some(result) if result.is_object() => Ok(result),
            Some(_) => Err(CniError::Config { field: "prevResult", problem: "is not an object".into() }),
            None => Err(CniError::Config {
                field: "prevResult",
                problem: "is missing; put mesh-cni after the plugin that makes the pod's network".into(),
            }),
        }
    }
}

/// The pod's addresses in a previous result: those of interfaces inside the sandbox, and those that name no
/// interface. Empty if it has none; the daemon then looks inside the namespace.
pub fn pod_addresses(prev_result: &Value, netns: &Path) -> Result<Vec<IpAddr>, CniError> {
    let wrong = |problem: String| CniError::Config { field: "prevResult.ips", problem };
    let interfaces = prev_result.get("interfaces").and_then(Value::as_array);
    let mut found = Vec::new();
    let Some(ips) = prev_result.get("ips").filter(|ips| !ips.is_null()) else { return Ok(found) };
    for ip in ips.as_array().ok_or_else(|| wrong("is not a list".into()))? {
        if let Some(index) = ip.get("interface").and_then(Value::as_u64) {
            let interface = usize::try_from(index).ok().and_then(|i| interfaces?.get(i));
            let sandbox = interface.and_then(|i| i.get("sandbox")?.as_str()).unwrap_or_default();
            if sandbox.is_empty() || (Path::new(sandbox) != netns && interfaces_in(interfaces, netns)) {
                continue;
            }
        }
        let text = ip.get("address").and_then(Value::as_str).unwrap_or_default();
        let address = text.split('/').next().unwrap_or_default();
        let address: IpAddr = address
            .parse()
            .map_err(|_| wrong(format!("has the address {text:?}, which is not an IP address")))?;
        if is_pod_address(address) && !found.contains(&address) {
            found.push(address);
        }
    }
    Ok(found)
}

/// Whether any interface names exactly this sandbox. Runtimes may spell the same namespace in two ways.
fn interfaces_in(interfaces: Option<&Vec<Value>>, netns: &Path) -> bool {
    let names = |i: &Value| i.get("sandbox").and_then(Value::as_str).is_some_and(|s| Path::new(s) == netns);
    interfaces.is_some_and(|all| all.iter().any(names))
}
