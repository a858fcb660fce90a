//! One run of the harness: its id, what it owns, and the removal of all of it, also after a crash.
//!
//! A state file `BASE/ID.json` is written before anything else exists; it names the owner by process id and
//! start time. Every new run first removes the runs whose owner is gone. What a run owns is found by its id alone
//! (namespaces and the cgroup by name, pins because the run has a bpffs of its own), so there is nothing that a
//! crash could have left out of a list.

use crate::{cgroup, netns, sys};
use anyhow::{Context, Result};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, MsFlags, mount, umount2},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    fs::File,
    path::{Path, PathBuf},
    sync::{Mutex, Once, PoisonError},
};

const BASE: &str = "/run/nodemesh-test";

/// Common beginning of all names that the harness gives to things of the kernel.
const PREFIX: &str = "nodemesh";

#[derive(Serialize, Deserialize)]
struct State {
    pid: u32,
    /// Field 22 of `/proc/PID/stat`, so that a reused process id is not taken for the owner.
    start_time: u64,
    cgroup: PathBuf,
}

/// A live run; dropping it removes everything that belongs to it.
#[derive(Debug)]
pub struct Run {
    id: String,
    cgroup: PathBuf,
}

static LIVE: Mutex<Vec<(String, PathBuf)>> = Mutex::new(Vec::new());

impl Run {
    /// Removes what dead runs left, then begins a new one.
    pub fn begin() -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            anyhow::bail!("the harness makes network namespaces and loads BPF programs: run it as root");
        }
        std::fs::create_dir_all(BASE).with_context(|| format!("create {BASE}"))?;
        crate::proc::forget_failures();
        sweep()?;
        handle_signals();

        let id = format!("{:06x}", rand::random::<u32>() & 0x00ff_ffff);
        let cgroup = cgroup::mount_point()?.join(format!("{PREFIX}-{id}"));
        let state = State { pid: std::process::id(), start_time: start_time(std::process::id())?, cgroup };
        let partial = Path::new(BASE).join(format!("{id}.new"));
        std::fs::write(&partial, serde_json::to_vec(&state)?)?;
        std::fs::rename(&partial, state_file(&id))?;
        live().push((id.clone(), state.cgroup.clone()));

        let run = Self { id, cgroup: state.cgroup };
        std::fs::create_dir_all(run.bpffs())?;
        // A bpffs of its own: unmounting it releases every pin of the run, whatever the pins are called.
        mount(Some("bpffs"), &run.bpffs(), Some("bpf"), MsFlags::empty(), None::<&str>)
            .context("mount a bpffs")?;
        cgroup::Cgroup::create(run.cgroup.clone())?;
        Ok(run)
    }

    /// The id: six hexadecimal digits.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// A name for a network namespace of this run.
    pub fn name(&self, part: &str) -> String {
        format!("{PREFIX}-{}-{part}", self.id)
    }

    /// The run's cgroup.
    pub fn cgroup(&self) -> Result<cgroup::Cgroup> {
        cgroup::Cgroup::create(self.cgroup.clone())
    }

    /// The run's directory: logs, sockets, configuration copies.
    pub fn dir(&self) -> PathBuf {
        run_dir(&self.id)
    }

    /// The run's own bpffs.
    pub fn bpffs(&self) -> PathBuf {
        self.dir().join("bpf")
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        live().retain(|(id, _)| *id != self.id);
        if let Err(error) = remove(&self.id, &self.cgroup) {
            eprintln!("clean-up of run {}: {error:#}", self.id);
        }
    }
}

fn live() -> std::sync::MutexGuard<'static, Vec<(String, PathBuf)>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run_dir(id: &str) -> PathBuf {
    Path::new(BASE).join(id)
}

fn state_file(id: &str) -> PathBuf {
    Path::new(BASE).join(format!("{id}.json"))
}

fn handle_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let outcome = sys::on_termination(|| {
            for (id, cgroup) in live().drain(..) {
                if let Err(error) = remove(&id, &cgroup) {
                    eprintln!("clean-up of run {id}: {error:#}");
                }
            }
        });
        if let Err(error) = outcome {
            eprintln!("no clean-up on signals (the next run does it): {error}");
        }
    });
}

/// Removes the runs whose owner is gone. One sweep at a time on the machine.
pub fn sweep() -> Result<()> {
    let lock = File::create(Path::new(BASE).join("lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno).context("lock")?;
    // Traces are listed before the state files are read: a run that begins meanwhile has its file first.
    let cgroups = cgroup::mount_point()?;
    let traces = traces(&cgroups)?;
    let states = states()?;
    for id in traces {
        // An interrupted run may have made one more thing while its clean-up was under way.
        if !states.iter().any(|(path, _)| path.file_stem().is_some_and(|stem| *stem == *id)) {
            remove(&id, &cgroups.join(format!("{PREFIX}-{id}")))
                .with_context(|| format!("remove the rest of {id}"))?;
        }
    }
    for (path, state) in states {
        let Some(id) = path.file_stem().and_then(|stem| stem.to_str()) else { continue };
        if start_time(state.pid).ok() != Some(state.start_time) {
            remove(id, &state.cgroup).with_context(|| format!("remove the dead run {id}"))?;
        }
    }
    Ok(())
}

/// Ids of the runs of which a namespace, a cgroup or a directory exists.
fn traces(cgroups: &Path) -> Result<BTreeSet<String>> {
    let names = |dir: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(dir).into_iter().flatten();
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
    };
    let mut ids: BTreeSet<String> = names(Path::new(BASE)).into_iter().filter(|name| is_id(name)).collect();
    for name in netns::list(&format!("{PREFIX}-"))?.into_iter().chain(names(cgroups)) {
        let id = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_prefix('-')?.split('-').next());
        ids.extend(id.filter(|id| is_id(id)).map(str::to_owned));
    }
    Ok(ids)
}

fn is_id(text: &str) -> bool {
    text.len() == 6 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// Directories of the runs whose owner is alive.
pub fn live_dirs() -> Result<Vec<PathBuf>> {
    let mut dirs = Vec::new();
    for (path, state) in states()? {
        if start_time(state.pid).ok() == Some(state.start_time) {
            dirs.push(path.with_extension(""));
        }
    }
    Ok(dirs)
}

/// The directory of the run that a process owns, alive or not.
pub fn dir_of(pid: u32) -> Result<Option<PathBuf>> {
    Ok(states()?.into_iter().find(|(_, state)| state.pid == pid).map(|(path, _)| path.with_extension("")))
}

/// All state files with their content.
fn states() -> Result<Vec<(PathBuf, State)>> {
    let mut states = Vec::new();
    let entries = match std::fs::read_dir(BASE) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(states),
        Err(error) => return Err(error).context(BASE),
    };
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_none_or(|ext| ext != "json") {
            continue;
        }
        match std::fs::read(&path) {
            Ok(bytes) => {
                let state =
                    serde_json::from_slice(&bytes).with_context(|| format!("parse {}", path.display()))?;
                states.push((path, state));
            }
            // Another process may just have ended its own run.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        }
    }
    Ok(states)
}

/// The order matters: processes first (they hold namespaces, sockets and BPF objects), the state file last.
fn remove(id: &str, cgroup: &Path) -> Result<()> {
    cgroup::remove_tree(cgroup)?;
    for name in netns::list(&format!("{PREFIX}-{id}-"))? {
        netns::remove(&name)?;
    }
    let dir = run_dir(id);
    let _ = umount2(&dir.join("bpf"), MntFlags::MNT_DETACH);
    if std::env::var_os("NODEMESH_KEEP_LOGS").is_none()
        && let Err(error) = std::fs::remove_dir_all(&dir)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error).with_context(|| format!("remove {}", dir.display()));
    }
    match std::fs::remove_file(state_file(id)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Start time of a process in clock ticks since boot; an error when there is no such process.
fn start_time(pid: u32) -> Result<u64> {
    parse_start_time(&std::fs::read_to_string(format!("/proc/{pid}/stat"))?)
        .context("start time in /proc/PID/stat")
}

fn parse_start_time(stat: &str) -> Option<u64> {
    // The command (field 2) may contain blanks and brackets: count from its closing one.
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ids_are_taken_for_ids() {
        assert!(is_id("0a1b2c"));
        for other in ["lock", "0A1B2C", "0a1b2", "nodeab", ""] {
            assert!(!is_id(other), "{other}");
        }
    }

    #[test]
    fn start_time_survives_odd_command_names() {
        let stat = "42 (a) b) S 1 42 42 0 -1 4194560 1 0 0 0 3 4 0 0 20 0 1 0 98765 1 2 3";
        assert_eq!(parse_start_time(stat), Some(98765));
        assert_eq!(parse_start_time("42 (x) S 1"), None);
    }
}
