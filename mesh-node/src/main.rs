//! The `mesh-node` command: the daemon (`run`), the tools that ask it (`status`, `dump`, `log`), and a look at the
//! host (`check`).

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use mesh_node::{
    admin::{Status, client, render},
    bpf::{self, Feature},
    check,
    config::{Config, RunArgs},
    memory, role,
};
use std::{path::PathBuf, process::ExitCode};
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, reload, util::SubscriberInitExt};

/// Why this one: see `mesh_node::memory`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[derive(Parser)]
#[command(name = "mesh-node", version, about = "The node daemon of nodemesh.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the daemon.
    Run(Box<RunArgs>),
    /// Shows the state of the daemon on this node.
    Status(AdminArgs),
    /// Prints everything that the daemon knows, as JSON.
    Dump(AdminArgs),
    /// Changes log levels of the running daemon.
    Log(LogArgs),
    /// Takes the mesh off this node: removes what a daemon that has ended left in the kernel.
    Unload(UnloadArgs),
    /// Checks whether this host can run the daemon, and what it has to do without; exits with 1 if it cannot.
    Check(CheckArgs),
}

#[derive(Args)]
struct AdminArgs {
    /// Directory of the daemon's sockets.
    #[arg(long, env = "NODEMESH_RUN_DIR", default_value = "/run/nodemesh")]
    run_dir: PathBuf,
}

#[derive(Args)]
struct UnloadArgs {
    /// The daemon's directory of pins.
    #[arg(long, env = "NODEMESH_PIN_DIR", default_value = "/sys/fs/bpf/nodemesh")]
    pin_dir: PathBuf,
}

#[derive(Args)]
struct CheckArgs {
    /// Features of the kernel that count as missing.
    #[arg(long, env = "NODEMESH_DISABLE_FEATURES", value_delimiter = ',', hide = true)]
    disable_features: Vec<String>,
}

#[derive(Args)]
struct LogArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// The daemon's filter, for example `info,mesh_node=debug`.
    #[arg(long)]
    level: Option<String>,
    /// The level of the BPF programs: off, error, warn, info or debug.
    #[arg(long)]
    bpf_level: Option<String>,
}

fn main() -> ExitCode {
    match command(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("mesh-node: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn command(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run(args) => run(*args),
        Command::Status(args) => {
            let status: Status = serde_json::from_slice(&ask(&args, "/status")?)?;
            print!("{}", render::status(&status));
            Ok(ExitCode::SUCCESS)
        }
        Command::Dump(args) => {
            let dump: serde_json::Value = serde_json::from_slice(&ask(&args, "/dump")?)?;
            println!("{dump:#}");
            Ok(ExitCode::SUCCESS)
        }
        Command::Log(args) => {
            let socket = args.admin.run_dir.join("admin.sock");
            let levels = [("/logging?level=", args.level), ("/bpf/logging?level=", args.bpf_level)];
            for (path, level) in levels {
                if let Some(level) = level {
                    block_on(client::post(&socket, &format!("{path}{level}")))??;
                }
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Unload(args) => {
            let gone = bpf::unload(&args.pin_dir).context("the mesh stays on this node")?;
            if gone == bpf::Unloaded::default() {
                println!("nothing is pinned under {}", args.pin_dir.display());
            } else {
                println!(
                    "removed {} programs, the capture of {} pods and {} maps under {}; no connection is touched any more",
                    gone.programs,
                    gone.inbound,
                    gone.maps,
                    args.pin_dir.display()
                );
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Check(args) => {
            let disabled = Feature::parse_all(&args.disable_features).context("--disable-features")?;
            let findings = check::check(&check::CheckConfig { disabled, ..check::CheckConfig::default() });
            print!("{}", check::render(&findings));
            let good = findings.iter().all(|finding| finding.result.is_ok());
            Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

fn run(args: RunArgs) -> anyhow::Result<ExitCode> {
    let config = match Config::validate(args) {
        Ok(config) => config,
        Err(errors) => {
            errors.iter().for_each(|error| eprintln!("mesh-node: {error}"));
            return Ok(ExitCode::from(2));
        }
    };
    let filter = EnvFilter::try_new(&config.args.log).context("--log is not a log filter")?;
    let (filter, handle) = reload::Layer::new(filter);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    tracing_subscriber::registry().with(filter).with(lines.boxed()).init();
    memory::tune();
    role::node::run(config, handle)?;
    Ok(ExitCode::SUCCESS)
}

fn ask(args: &AdminArgs, path: &str) -> anyhow::Result<bytes::Bytes> {
    Ok(block_on(client::get(&args.run_dir.join("admin.sock"), path))??)
}

fn block_on<F: Future>(future: F) -> anyhow::Result<F::Output> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(future))
}
