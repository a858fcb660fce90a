//! The project's own commands: set up the tool chain, build, test, tidy, demo, bench.
//!
//! Everything that CI runs is a command here, so that it can be run by hand the same way. Light on purpose: it
//! depends on no crate of the workspace, so that it builds on a machine that cannot build the rest yet.

mod bench;
mod commands;
mod demo;
mod setup;
mod test;
mod tidy;
// Shared with mesh-node's build script, which uses another part of it.
#[allow(dead_code, unreachable_pub)]
mod toolchain;
mod vm;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Commands of the nodemesh workspace.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask")]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Bring this machine to a working BPF tool chain; does nothing when it has one.
    Setup,
    /// Build all binaries, the BPF object included.
    Build,
    /// Run every check and test, or one suite.
    Test(test::Options),
    /// Check the house rules: arrows, file sizes, unsafe code, licences, module heads.
    Tidy,
    /// Generate code from its sources, or check that it is in step with them.
    Codegen {
        /// Only compare.
        #[arg(long)]
        check: bool,
    },
    /// Run two nodes with real traffic on this machine and show what happens.
    Demo(demo::Options),
    /// Measure, side by side with a plain path and with other proxies: `cargo xtask bench l4`.
    Bench(bench::Options),
    /// Run the end-to-end tests on another kernel, in a virtual machine.
    Vm(vm::Options),
}

fn main() -> ExitCode {
    match run(Options::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Setup => setup::run(),
        Command::Build => {
            setup::ensure()?;
            commands::build()
        }
        Command::Test(options) => test::run(&options),
        Command::Tidy => tidy::run(),
        Command::Codegen { check } => commands::codegen(check),
        Command::Demo(options) => demo::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Vm(options) => vm::run(&options),
    }
}
