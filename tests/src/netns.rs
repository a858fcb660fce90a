//! Named network namespaces, set up with iproute2 (`ip -batch`: one process per namespace).

use anyhow::{Context, Result, bail};
use nix::{
    mount::{MntFlags, umount2},
    sched::{CloneFlags, setns},
};
use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Where `ip netns` keeps its names.
const NETNS_DIR: &str = "/run/netns";

/// A named network namespace that the harness created. Removal is the run's business (`run.rs`).
#[derive(Clone, Debug)]
pub struct NetNs {
    name: String,
}

impl NetNs {
    /// Creates the namespace with its loopback up and the settings that all nodes and pods share.
    pub fn create(name: &str) -> Result<Self> {
        ip(None, &format!("netns add {name}\n"))?;
        let ns = Self { name: name.to_owned() };
        ns.ip("link set lo up\n")?;
        for (key, value) in [
            // The tests open more connections than the default range holds in TIME_WAIT; the daemon's own ports
            // (15000 and up) stay outside the range.
            ("net/ipv4/ip_local_port_range", "20000 65000"),
            ("net/ipv4/tcp_tw_reuse", "1"),
            // Client and server, and every listener takes part without having asked for it.
            ("net/ipv4/tcp_fastopen", "1027"),
            ("net/ipv6/conf/all/accept_dad", "0"),
            ("net/ipv6/conf/default/accept_dad", "0"),
        ] {
            ns.sysctl(key, value)?;
        }
        Ok(ns)
    }

    /// A namespace that another process of a run created.
    pub fn existing(name: &str) -> Self {
        Self { name: name.to_owned() }
    }

    /// Removes it before its run ends.
    pub fn remove(&self) -> Result<()> {
        remove(&self.name)
    }

    /// The name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The path of its bind mount, for `setns` and `CNI_NETNS`.
    pub fn path(&self) -> PathBuf {
        Path::new(NETNS_DIR).join(&self.name)
    }

    /// Opens it.
    pub fn open(&self) -> Result<File> {
        File::open(self.path()).with_context(|| format!("open network namespace {}", self.name))
    }

    /// Runs a batch of `ip` commands inside it, one per line.
    pub fn ip(&self, batch: &str) -> Result<()> {
        ip(Some(&self.name), batch)
    }

    /// Gives nftables a script inside it.
    pub fn nft(&self, script: &str) -> Result<()> {
        self.within(|| {
            // On this thread, which is inside the namespace; the child inherits it.
            let mut nft = Command::new("nft")
                .args(["-f", "-"])
                .stdin(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .context("run `nft` (package nftables; `cargo xtask setup` installs it)")?;
            nft.stdin.take().context("stdin of nft")?.write_all(script.as_bytes())?;
            let output = nft.wait_with_output()?;
            if !output.status.success() {
                bail!("nft refused the rules: {}", String::from_utf8_lossy(&output.stderr).trim());
            }
            Ok(())
        })
    }

    /// Runs `f` on a thread of its own inside the namespace; sockets made there belong to it for good.
    pub fn within<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = self.open()?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                setns(&file, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter {}", self.name))?;
                f()
            });
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// A counter of the namespace's TCP extensions (`/proc/net/netstat`), for example `TCPFastOpenActive`.
    pub fn tcp_counter(&self, name: &str) -> Result<u64> {
        // `/proc/net` would be the namespace of the process's first thread.
        let text = self.within(|| Ok(std::fs::read_to_string("/proc/thread-self/net/netstat")?))?;
        parse_netstat(&text, name).with_context(|| format!("no counter {name} in /proc/net/netstat"))
    }

    /// Sets a network sysctl of the namespace, for example `net/ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.within(|| {
            std::fs::write(Path::new("/proc/sys").join(key), value).with_context(|| format!("sysctl {key}"))
        })
    }
}

/// Finds a value in pairs of lines: names, then numbers, both with the table's name first.
fn parse_netstat(text: &str, name: &str) -> Option<u64> {
    let lines: Vec<&str> = text.lines().collect();
    lines.chunks(2).find_map(|pair| {
        let [names, values] = pair else { return None };
        let at = names.split(' ').position(|field| field == name)?;
        values.split(' ').nth(at)?.parse().ok()
    })
}

/// Names of all namespaces that begin with `prefix`.
pub fn list(prefix: &str) -> Result<Vec<String>> {
    let entries = match std::fs::read_dir(NETNS_DIR) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context("list network namespaces"),
    };
    Ok(entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect())
}

/// Removes a namespace by name; its interfaces go with it once no process or socket holds it.
pub fn remove(name: &str) -> Result<()> {
    let path = Path::new(NETNS_DIR).join(name);
    // Not mounted any more is fine: a crash may have come between the unmount and the removal of the file.
    let _ = umount2(&path, MntFlags::MNT_DETACH);
    match std::fs::remove_file(&path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("remove {}", path.display())),
    }
}

fn ip(netns: Option<&str>, batch: &str) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(name) = netns {
        command.args(["-n", name]);
    }
    let mut child = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("run `ip` (package iproute2; `cargo xtask setup` installs it)")?;
    child.stdin.take().context("stdin of ip")?.write_all(batch.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("ip -batch in {netns:?} failed: {}\n{batch}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn netstat_counters() {
        let text = "TcpExt: A B C\nTcpExt: 1 2 3\nIpExt: D\nIpExt: 4\n";
        assert_eq!(parse_netstat(text, "B"), Some(2));
        assert_eq!(parse_netstat(text, "D"), Some(4));
        assert_eq!(parse_netstat(text, "E"), None);
    }
}
