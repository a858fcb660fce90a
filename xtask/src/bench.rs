//! `cargo xtask bench NAME`: builds with the release profile, then hands over to `nodemesh-bench` of the tests crate.

use crate::{
    commands::{self, cargo, root, target_dir},
    setup,
};
use anyhow::{Result, ensure};
use clap::Args;
use std::process::Command;

/// Descriptors that the proxies under test may have, where the machine allows it: two for each idle connection.
const DESCRIPTORS: &str = "65536";

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Which: l4.
    name: String,
    /// Options of the benchmark, for example --quick; `--help` has all.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    options: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the benchmarks make network namespaces and load BPF programs; run them as root: sudo -E cargo xtask bench"
    );
    setup::ensure()?;
    println!("Building with the release profile (the first time takes some minutes) ...");
    let packages = ["mesh-node", "mesh-control", "mesh-tests"].map(|name| format!("--package={name}"));
    commands::run(cargo(["build", "--release", "--bins"]).args(packages))?;
    let program = target_dir().join("release/nodemesh-bench");
    let out = target_dir().join("bench");
    // The shell's ulimit: raising the limit from here would need unsafe code.
    let script =
        format!("ulimit -n {DESCRIPTORS} 2>/dev/null || ulimit -n $(ulimit -Hn); exec \"$0\" \"$@\"");
    let mut bench = Command::new("sh");
    bench.current_dir(root()).args(["-c", &script]).arg(program).arg(&options.name);
    bench.arg("--out").arg(out).args(&options.options);
    commands::run(&mut bench)
}
