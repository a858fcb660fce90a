//! `cargo xtask demo`: sets up and builds what is missing, then hands over to `nodemesh-demo` of the tests crate.

use crate::{
    commands::{self, build, target_dir},
    setup,
};
use anyhow::{Result, ensure};
use clap::Args;
use std::process::Command;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// End after the table, with status 0 only if every line held, and leave nothing behind.
    #[arg(long)]
    once: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the demo makes network namespaces and loads BPF programs; run it as root: sudo -E cargo xtask demo"
    );
    setup::ensure()?;
    println!("Building (the first time takes some minutes) ...");
    build()?;
    let mut demo = Command::new(target_dir().join("debug/nodemesh-demo"));
    demo.current_dir(commands::root());
    if options.once {
        demo.arg("--once");
    }
    commands::run(&mut demo)
}
