//! The plugin: one run per command.

use super::{
    CniError, LATEST, VERSIONS, client,
    conf::{self, Conf},
    env::{Attachment, Command},
};
use crate::enroll::protocol::{Done, Op, Response, Sandbox};
use serde_json::{Value, json};
use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    time::Duration,
};

/// What the daemon gets less of than the plugin, so that its explanation arrives before the plugin gives up.
const ANSWER_MARGIN: Duration = Duration::from_millis(500);

/// What a run leads to.
#[derive(Debug)]
pub enum Outcome {
    /// Success; write this to standard output, if anything.
    Done(Option<Value>),
    /// Success although something was not done; the text is for standard error.
    Unfinished(String),
    /// Failure; write this error object to standard output and exit with 1.
    Failed(Value),
}

/// Runs the plugin: `get` reads the environment, `stdin` has the network configuration.
pub fn run(get: &dyn Fn(&str) -> Option<String>, stdin: &mut dyn Read) -> Outcome {
    let mut version = LATEST.to_owned();
    match perform(get, stdin, &mut version) {
        Ok(outcome) => outcome,
        Err(e) => Outcome::Failed(e.to_json(&version)),
    }
}

/// `version` becomes the one that the configuration asks for, for the error object.
fn perform(
    get: &dyn Fn(&str) -> Option<String>,
    stdin: &mut dyn Read,
    version: &mut String,
) -> Result<Outcome, CniError> {
    let command = Command::from_env(get)?;
    let input = conf::read(stdin)?;
    if command == Command::Version {
        return versions(&input);
    }
    let conf = Conf::parse(&input)?;
    version.clone_from(&conf.cni_version);
    // Each command came with a version: CHECK with 0.4.0, STATUS and GC with 1.1.0.
    let too_old = match command {
        Command::Check => conf.cni_version == "0.3.1",
        Command::Status | Command::Gc => conf.cni_version != LATEST,
        _ => false,
    };
    if too_old {
        return Err(CniError::Version { version: conf.cni_version, command: Some(command) });
    }
    match command {
        Command::Add => add(&conf, &Attachment::from_env(command, get)?),
        Command::Del => Ok(del(&conf, Attachment::from_env(command, get)?)),
        Command::Check => check(&conf, Attachment::from_env(command, get)?),
        Command::Status => ask(&conf, command, Op::Status, None).map(|_| Outcome::Done(None)),
        Command::Gc => gc(&conf),
        Command::Version => versions(&input),
    }
}

fn versions(input: &[u8]) -> Result<Outcome, CniError> {
    let asked: Value = match input.trim_ascii() {
        b"" => Value::Null,
        json => serde_json::from_slice(json).map_err(CniError::Decode)?,
    };
    let version = asked.get("cniVersion").and_then(Value::as_str).unwrap_or(LATEST);
    Ok(Outcome::Done(Some(json!({ "cniVersion": version, "supportedVersions": VERSIONS }))))
}

fn add(conf: &Conf, pod: &Attachment) -> Result<Outcome, CniError> {
    let mut result = conf.prev_result()?.clone();
    if let Some(result) = result.as_object_mut() {
        // The runtime converts prevResult to the configuration's version, but may leave the field out.
        result.entry("cniVersion").or_insert_with(|| conf.cni_version.as_str().into());
    }
    if !conf.exclude_namespaces.contains(&pod.namespace) {
        let netns = open_netns(pod)?;
        let addresses = conf::pod_addresses(&result, pod.netns.as_deref().unwrap_or(Path::new("")))?;
        let timeout = conf.timeout().saturating_sub(ANSWER_MARGIN);
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let op = Op::Add { sandbox: sandbox(pod.clone()), addresses, timeout_ms };
        ask(conf, Command::Add, op, Some(netns.as_fd()))?;
    }
    Ok(Outcome::Done(Some(result)))
}

/// Never fails for what the daemon says or does not say: a pod's deletion must not wait for the mesh, and the
/// daemon finds out by itself that the pod is gone.
fn del(conf: &Conf, pod: Attachment) -> Outcome {
    let netns = open_netns(&pod).ok();
    let op = Op::Del { sandbox: sandbox(pod) };
    match ask(conf, Command::Del, op, netns.as_ref().map(File::as_fd)) {
        Ok(_) => Outcome::Done(None),
        Err(e) => Outcome::Unfinished(e.to_json(&conf.cni_version).to_string()),
    }
}

fn check(conf: &Conf, pod: Attachment) -> Result<Outcome, CniError> {
    conf.prev_result()?;
    if !conf.exclude_namespaces.contains(&pod.namespace) {
        let netns = open_netns(&pod)?;
        ask(conf, Command::Check, Op::Check { sandbox: sandbox(pod) }, Some(netns.as_fd()))?;
    }
    Ok(Outcome::Done(None))
}

fn gc(conf: &Conf) -> Result<Outcome, CniError> {
    let Some(valid) = &conf.valid_attachments else {
        let problem = "is missing; without it GC would release every pod".to_owned();
        return Err(CniError::Config { field: "cni.dev/valid-attachments", problem });
    };
    let mut keep: Vec<String> = valid.iter().map(|a| a.container_id.clone()).collect();
    keep.sort_unstable();
    keep.dedup();
    ask(conf, Command::Gc, Op::Gc { keep }, None).map(|_| Outcome::Done(None))
}

fn ask(conf: &Conf, command: Command, op: Op, fd: Option<BorrowedFd<'_>>) -> Result<Done, CniError> {
    match client::call(&conf.socket_path, op, fd, conf.timeout()) {
        Ok(Response::Ok(done)) => Ok(done),
        Ok(Response::Error(failure)) => Err(CniError::Refused(failure)),
        Err(source) => Err(CniError::Daemon { socket: conf.socket_path.clone(), command, source }),
    }
}

fn open_netns(pod: &Attachment) -> Result<File, CniError> {
    let path = pod.netns.clone().unwrap_or_default();
    let failed = |source| CniError::NetNs { path: path.clone(), source };
    // Looked at first: opening a FIFO or a device that somebody put there could block or do worse.
    if !std::fs::metadata(&path).map_err(failed)?.is_file() {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is not a namespace file")));
    }
    File::open(&path).map_err(failed)
}

fn sandbox(pod: Attachment) -> Sandbox {
    Sandbox { container_id: pod.container_id, namespace: pod.namespace, name: pod.name, uid: pod.uid }
}
