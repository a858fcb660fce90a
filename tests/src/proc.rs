//! Processes of a run: started inside a network namespace and a cgroup, with their output kept in a file.

use crate::{cgroup::Cgroup, netns::NetNs, sys, wait};
use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    cell::Cell,
    ffi::{OsStr, OsString},
    fs::File,
    io::Write,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::Duration,
};

thread_local! {
    /// A deadline has passed on this thread: the test is about to fail with an error instead of a panic.
    static FAILED: Cell<bool> = const { Cell::new(false) };
}

/// Makes processes dropped from now on by this thread show the end of their logs.
pub(crate) fn print_logs_on_drop() {
    FAILED.set(true);
}

/// Takes [`print_logs_on_drop`] back: a new cluster begins.
pub(crate) fn forget_failures() {
    FAILED.set(false);
}

/// Finds a binary of the workspace beside the running one (`target/PROFILE/NAME`).
pub fn binary(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe()?;
    // Test binaries live one level deeper, in `deps`.
    for dir in me.ancestors().skip(1).take(2) {
        let candidate = dir.join(name);
        if candidate.is_file() {
            return Ok(candidate);
        }
    }
    bail!("no binary `{name}` beside {}: run `cargo build` first", me.display())
}

/// Where a process runs.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Its cgroup.
    pub cgroup: &'a Cgroup,
    /// Its network namespace; `None` keeps the harness's own.
    pub netns: Option<&'a NetNs>,
}

impl Place<'_> {
    /// A command that will run in this place, in a process group of its own (a Ctrl-C on the terminal reaches the
    /// harness only, which then cleans up).
    pub fn command<S: AsRef<OsStr>>(&self, program: &Path, args: &[S]) -> Result<Command> {
        let mut command = Command::new(program);
        command.args(args).process_group(0);
        let netns = self.netns.map(NetNs::open).transpose()?;
        sys::join_before_exec(&mut command, self.cgroup.procs()?, netns);
        Ok(command)
    }

    /// Runs a command to its end with `stdin`, collecting its output. Ended by force after `deadline`.
    pub fn run<S: AsRef<OsStr>>(
        &self,
        program: &Path,
        args: &[S],
        env: &[(&str, OsString)],
        stdin: &[u8],
        deadline: Duration,
    ) -> Result<Output> {
        let mut command = self.command(program, args)?;
        command.envs(env.iter().map(|(key, value)| (*key, value)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("start {}", program.display()))?;
        let pid = Pid::from_raw(child.id().cast_signed());
        let mut pipe = child.stdin.take().context("stdin")?;
        // A child that reads nothing closes the pipe; that is its business.
        let _ = pipe.write_all(stdin);
        drop(pipe);
        let (done, finished) = std::sync::mpsc::channel::<()>();
        let watchdog = std::thread::spawn(move || {
            let late = finished.recv_timeout(deadline) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
            if late {
                let _ = kill(pid, Signal::SIGKILL);
            }
            late
        });
        let output = child.wait_with_output();
        drop(done);
        let late = watchdog.join().unwrap_or(false);
        let output = output?;
        if late {
            bail!(
                "{} was still running after {deadline:?}; stderr: {}",
                program.display(),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(output)
    }

    /// Starts a long-running command; both of its outputs go to the end of `log`.
    pub fn spawn<S: AsRef<OsStr>>(&self, name: &str, program: &Path, args: &[S], log: &Path) -> Result<Proc> {
        let out = File::options().create(true).append(true).open(log)?;
        let mut command = self.command(program, args)?;
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let child = command.spawn().with_context(|| format!("start {}", program.display()))?;
        Ok(Proc { name: name.to_owned(), child, log: log.to_owned(), quiet: false })
    }
}

/// A long-running process; killed when dropped. Its log is printed if the thread is panicking then.
#[derive(Debug)]
pub struct Proc {
    name: String,
    child: Child,
    log: PathBuf,
    quiet: bool,
}

impl Proc {
    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Keeps the log out of a failing test's output.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// Its exit status if it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Fails, with the end of the log, if it is not running any more.
    pub fn check_running(&mut self) -> Result<()> {
        if let Some(status) = self.ended()? {
            bail!("{} ended with {status}; the end of its log:\n{}", self.name, tail(&self.log(), 40));
        }
        Ok(())
    }

    /// Waits for `probe` to hold, but no longer than the process runs.
    pub fn until(
        &mut self,
        what: &str,
        deadline: Duration,
        mut probe: impl FnMut(&Self) -> Result<bool>,
    ) -> Result<()> {
        wait::until(what, deadline, || {
            if let Err(dead) = self.check_running() {
                return Ok(Some(Err(dead)));
            }
            Ok(probe(self)?.then_some(Ok(())))
        })?
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid().cast_signed()), signal)
            .with_context(|| format!("{signal} to {}", self.name))
    }

    /// Sends SIGTERM and waits for the end; by force after `deadline`, which is then an error.
    pub fn stop(&mut self, deadline: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        let name = format!("{} to end after SIGTERM", self.name);
        let child = &mut self.child;
        let status = wait::until(&name, deadline, || Ok(child.try_wait()?));
        if status.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
        status
    }

    /// Ends it with SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Resident memory in bytes.
    pub fn resident_bytes(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        parse_rss(&status).with_context(|| format!("VmRSS of {}", self.name))
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if (std::thread::panicking() || FAILED.get()) && !self.quiet {
            eprintln!("--- {} (end of its log)\n{}", self.name, tail(&self.log(), 60));
        }
    }
}

fn parse_rss(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

/// The last `lines` lines of a text.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_resident_memory() {
        assert_eq!(parse_rss("Name:\tx\nVmRSS:\t    2048 kB\nThreads:\t1\n"), Some(2048 * 1024));
        assert_eq!(parse_rss("Name:\tx\n"), None);
    }

    #[test]
    fn tail_keeps_the_end() {
        assert_eq!(tail("a\nb\nc", 2), "b\nc");
        assert_eq!(tail("a", 5), "a");
    }
}
