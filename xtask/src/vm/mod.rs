//! `cargo xtask vm`: the end-to-end tests on another kernel, in a virtual machine.
//!
//! The machine has no disk and no network: its file system is an initramfs with the daemons, the tests and the few
//! programs that the harness calls, each with its libraries, taken from this machine. Deliberately absent: a part in
//! `cargo xtask test`, since this needs qemu and (with `--debian`) downloads; anything that changes this machine.

mod debian;
mod image;

use crate::{
    commands::{build, cargo, on_path, target_dir},
    setup,
};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// A kernel image (bzImage). Its modules are looked for beside it, and in `../lib/modules` from there.
    #[arg(long, value_name = "FILE", conflicts_with = "debian", required_unless_present = "debian")]
    kernel: Option<PathBuf>,
    /// The modules of the kernel (the folder named after its release), where they are elsewhere.
    #[arg(long, value_name = "DIR", requires = "kernel")]
    modules: Option<PathBuf>,
    /// Fetch the cloud kernel of a Debian suite, for example bookworm or trixie-backports.
    #[arg(long, value_name = "SUITE")]
    debian: Option<String>,
    /// Only `mesh-node check`, no tests.
    #[arg(long)]
    check_only: bool,
    /// Only the end-to-end tests whose names contain one of these.
    #[arg(value_name = "TEXT", default_values = ["capture::", "coexist::", "degraded::"])]
    tests: Vec<String>,
    /// Features that the tests' data paths do without (see `mesh-node check`).
    #[arg(long, value_name = "NAMES", default_value = "")]
    disable_features: String,
    /// `tcg` (emulation: slower, but it works everywhere) or `kvm`.
    #[arg(long, default_value = "tcg", value_parser = ["tcg", "kvm"])]
    accel: String,
    /// Memory of the machine in MiB.
    #[arg(long, default_value_t = 3072)]
    memory: u32,
    /// Seconds until the machine is stopped by force.
    #[arg(long, default_value_t = 1800)]
    timeout: u32,
}

/// What the machine prints last, before its exit status; see `init.sh`.
const RESULT: &str = "VM-RESULT ";

/// A kernel and its modules.
#[derive(Debug)]
struct Kernel {
    image: PathBuf,
    /// The folder named after the release.
    modules: PathBuf,
}

impl Kernel {
    fn release(&self) -> String {
        self.modules.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    for (program, package) in [
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("busybox", "busybox-static"),
        ("cpio", "cpio"),
        ("ip", "iproute2"),
    ] {
        ensure!(on_path(program), "`{program}` is missing: apt-get install {package}");
    }
    let base = target_dir().join("vm");
    let kernel = match (&options.kernel, &options.debian) {
        (Some(image), _) => {
            let modules = match &options.modules {
                Some(modules) => modules.clone(),
                None => find_modules(image)?,
            };
            Kernel { image: image.clone(), modules }
        }
        (None, Some(suite)) => debian::fetch(suite, &base)?,
        (None, None) => bail!("name a kernel: --kernel FILE or --debian SUITE"),
    };
    setup::ensure()?;
    build()?;
    let place = base.join(kernel.release());
    fs::create_dir_all(&place).with_context(|| format!("create {}", place.display()))?;
    let initrd = image::make(&place, &kernel, &tests_binary()?, &script(options))?;
    boot(&kernel, &initrd, &place.join("console.log"), options)
}

/// What the machine is told to do, as shell variables.
fn script(options: &Options) -> String {
    let tests = if options.check_only { String::new() } else { options.tests.join(" ") };
    format!("TESTS='{tests}'\nDISABLE='{}'\n", options.disable_features)
}

fn find_modules(image: &Path) -> Result<PathBuf> {
    let name = image.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let dir = image.parent().unwrap_or(Path::new("."));
    let release = name.strip_prefix("vmlinuz-").unwrap_or_default();
    let candidates =
        [dir.to_owned(), dir.join("../lib/modules").join(release), Path::new("/lib/modules").join(release)];
    let found = candidates.into_iter().find(|dir| dir.join("kernel").is_dir());
    let found =
        found.with_context(|| format!("no modules of {}; name them: --modules DIR", image.display()))?;
    found.canonicalize().with_context(|| format!("resolve {}", found.display()))
}

/// Builds the end-to-end tests and finds their program.
fn tests_binary() -> Result<PathBuf> {
    let mut command = cargo(["test", "--package", "mesh-tests", "--test", "e2e", "--no-run"]);
    command.arg("--message-format=json-render-diagnostics").stderr(Stdio::inherit());
    let output = command.output().context("start cargo")?;
    ensure!(output.status.success(), "the end-to-end tests do not build");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == "e2e")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .context("cargo named no program of the end-to-end tests")
}

/// Boots, passes the console on, and fails unless the machine says that all went well.
fn boot(kernel: &Kernel, initrd: &Path, log: &Path, options: &Options) -> Result<()> {
    // coreutils' timeout, so that nothing is left running whatever happens to this process.
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", &options.timeout.to_string(), "qemu-system-x86_64"]);
    command.args(match options.accel.as_str() {
        "kvm" => ["-accel", "kvm", "-cpu", "host"],
        _ => ["-accel", "tcg,thread=multi", "-cpu", "max"],
    });
    command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(initrd);
    command.args(["-append", "console=ttyS0 quiet panic=-1"]);
    command.args(["-m", &options.memory.to_string(), "-smp", "2", "-nic", "none"]);
    command.args(["-nographic", "-no-reboot", "-monitor", "none", "-serial", "stdio"]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("start qemu")?;
    let console = child.stdout.take().context("the console")?;
    let mut log = File::create(log).with_context(|| format!("create {}", log.display()))?;
    let mut status = None;
    for line in BufReader::new(console).split(b'\n') {
        let line = line.context("read the console")?;
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end_matches('\r');
        writeln!(log, "{text}")?;
        writeln!(std::io::stdout(), "{text}")?;
        status = result_in(text).or(status);
    }
    let ended = child.wait()?;
    match status {
        Some(0) => {
            println!("kernel {}: passed", kernel.release());
            Ok(())
        }
        Some(code) => bail!("kernel {}: the tests ended with status {code}", kernel.release()),
        None => bail!("kernel {}: the machine did not come to an end ({ended})", kernel.release()),
    }
}

fn result_in(line: &str) -> Option<u32> {
    line.strip_prefix(RESULT)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_machines_own_last_word_counts() {
        assert_eq!(result_in("VM-RESULT 0"), Some(0));
        assert_eq!(result_in("VM-RESULT 101\r"), Some(101));
        assert_eq!(result_in("VM-RESULT"), None);
        assert_eq!(result_in("test result: ok"), None);
    }
}
