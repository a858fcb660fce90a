//! `cargo xtask setup`: brings a machine to what building and testing need, saying each step before it is taken.
//!
//! On Debian the tool chain comes from the distribution: a current compiler with the BPF standard library, and an
//! LLVM of the same version for `bpf-linker`. Elsewhere it comes from rustup. Complete machines are left alone.
//! Deliberately absent: editing package sources, PATH or shell profiles, and asking questions.

use crate::{
    commands::{cargo, on_path, output, run as run_command},
    toolchain,
};
use anyhow::{Context, Result, bail, ensure};
use std::{path::Path, process::Command};

/// Tested together with the compilers named here; the build is locked to its own dependency versions.
const BPF_LINKER: &str = "0.13.0";

/// Compiler, standard library for BPF, and clippy for the BPF crate.
const DEBIAN_COMPILER: [&str; 4] = ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf", "rust-web-clippy"];

/// What `bpf-linker` needs beside LLVM itself.
const DEBIAN_LIBRARIES: [&str; 3] = ["g++", "zlib1g-dev", "libzstd-dev"];

/// What the network namespaces of tests and demo are made with, and what loses packets in them.
const DEBIAN_TOOLS: [&str; 2] = ["iproute2", "nftables"];

/// `cargo xtask setup`.
pub(crate) fn run() -> Result<()> {
    if let Some(missing) = missing() {
        println!("setup: {missing}");
        if Path::new("/etc/debian_version").exists() && on_path("apt-get") {
            debian()?;
        } else {
            rustup()?;
        }
        if let Some(still) = self::missing() {
            bail!("setup ended, and something is still missing: {still}");
        }
    }
    println!("setup: complete ({})", toolchain::find()?);
    Ok(())
}

/// Runs the setup only if something is missing.
pub(crate) fn ensure() -> Result<()> {
    if missing().is_some() { run() } else { Ok(()) }
}

/// What is missing, as text.
fn missing() -> Option<String> {
    let mut parts = Vec::new();
    let chain = toolchain::find();
    if let Err(missing) = &chain {
        parts.push(missing.parts.join("; "));
    }
    if let Ok(chain) = &chain
        && !has_clippy(chain)
    {
        parts.push("clippy of the BPF compiler".to_owned());
    }
    if !on_path("ip") {
        parts.push("`ip` (iproute2)".to_owned());
    }
    if !on_path("nft") {
        parts.push("`nft` (nftables)".to_owned());
    }
    (!parts.is_empty()).then(|| format!("missing: {}", parts.join("; ")))
}

fn has_clippy(chain: &toolchain::Toolchain) -> bool {
    match &chain.compiler {
        toolchain::Compiler::Distro { rustc, .. } => rustc.with_file_name("clippy-driver").is_file(),
        toolchain::Compiler::Nightly => {
            let mut version = Command::new("rustup");
            version.args(["run", "nightly", "cargo", "clippy", "--version"]);
            version.output().is_ok_and(|out| out.status.success())
        }
    }
}

fn debian() -> Result<()> {
    let packages: Vec<&str> = [&DEBIAN_COMPILER[..], &DEBIAN_LIBRARIES, &DEBIAN_TOOLS].concat();
    apt_install(&packages)?;
    let llvm = llvm_of_rustc()?;
    apt_install(&[&format!("llvm-{llvm}-dev")])?;
    if toolchain::find().is_ok() {
        return Ok(());
    }
    let prefix = format!("/usr/lib/llvm-{llvm}");
    println!("setup: building bpf-linker {BPF_LINKER} against {prefix} (cargo install; about a minute)");
    let mut install = bpf_linker();
    install
        .args(["--no-default-features", "--features", &format!("llvm-{llvm}")])
        .env("LLVM_PREFIX", &prefix)
        .env("PATH", prepend(&format!("{prefix}/bin")));
    run_command(&mut install)
}

fn rustup() -> Result<()> {
    ensure!(
        on_path("rustup"),
        "this is not Debian, and there is no rustup either: install it (https://rustup.rs), then run this again"
    );
    ensure!(
        on_path("ip") && on_path("nft"),
        "install iproute2 (the command `ip`) and nftables (`nft`) with the package manager, then run this again"
    );
    println!("setup: installing rustup's nightly with rust-src and clippy");
    run_command(Command::new("rustup").args([
        "toolchain",
        "install",
        "nightly",
        "--profile",
        "minimal",
        "--component",
        "rust-src",
        "--component",
        "clippy",
    ]))?;
    if toolchain::find().is_err() {
        println!("setup: building bpf-linker {BPF_LINKER} (cargo install; some minutes)");
        run_command(&mut bpf_linker())?;
    }
    Ok(())
}

fn bpf_linker() -> Command {
    let mut command = cargo(["install", "bpf-linker", "--version", BPF_LINKER, "--locked"]);
    // The workspace's settings are not for a tool.
    command.env_remove("CARGO_TARGET_DIR").env_remove("RUSTFLAGS");
    command
}

/// The LLVM version that the distribution's compiler was built with: bpf-linker must read its bitcode.
fn llvm_of_rustc() -> Result<u32> {
    let text = output(Command::new("/usr/bin/rustc").args(["--version", "--verbose"]))?;
    parse_llvm(&text).with_context(|| format!("no LLVM version in what rustc says: {text}"))
}

fn parse_llvm(text: &str) -> Option<u32> {
    text.lines().find_map(|line| line.strip_prefix("LLVM version: "))?.split('.').next()?.trim().parse().ok()
}

/// Installs what is not installed yet; refreshes the package lists only if apt does not know a package or cannot
/// fetch it.
fn apt_install(packages: &[&str]) -> Result<()> {
    let wanted: Vec<&str> = packages.iter().copied().filter(|package| !installed(package)).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    ensure!(
        nix::unistd::geteuid().is_root(),
        "Debian packages are missing; run this as root, or install them by hand: apt-get install {}",
        wanted.join(" ")
    );
    if !wanted.iter().all(|package| known(package)) {
        println!("setup: apt-get update");
        run_command(apt().arg("update"))?;
    }
    println!("setup: apt-get install {}", wanted.join(" "));
    let install = || {
        let mut command = apt();
        command.args(["install", "--yes", "--no-install-recommends"]).args(&wanted);
        command
    };
    if run_command(&mut install()).is_err() {
        println!("setup: that failed; the package lists may be old: apt-get update, then once more");
        run_command(apt().arg("update"))?;
        run_command(&mut install())?;
    }
    Ok(())
}

fn apt() -> Command {
    let mut command = Command::new("apt-get");
    command.arg("--quiet").env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn installed(package: &str) -> bool {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat=${db:Status-Status}", package]);
    query.output().is_ok_and(|out| out.status.success() && out.stdout == b"installed")
}

fn known(package: &str) -> bool {
    let out = Command::new("apt-cache").args(["policy", package]).output();
    out.is_ok_and(|out| {
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        text.lines().any(|line| line.trim_start().starts_with("Candidate:") && !line.contains("(none)"))
    })
}

fn prepend(dir: &str) -> std::ffi::OsString {
    let mut path = std::ffi::OsString::from(dir);
    if let Some(old) = std::env::var_os("PATH") {
        path.push(":");
        path.push(old);
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_llvm_version() {
        assert_eq!(parse_llvm("rustc 1.96.0\nbinary: rustc\nLLVM version: 22.1.0\n"), Some(22));
        assert_eq!(parse_llvm("rustc 1.96.0\n"), None);
    }
}
