//! The binary `mesh-control`: `run` serves the nodes, `check` looks at a configuration directory.

use anyhow::Result;
use clap::Parser;
use mesh_control::{
    config::{CheckArgs, Cli, Command},
    engine::Engine,
    report::Severity,
};
use std::{io::Write as _, process::ExitCode};

fn main() -> Result<ExitCode> {
    match Cli::parse().command {
        Command::Check(args) => check(&args),
        Command::Run(args) => {
            let config = args.config()?;
            mesh_control::run::log_to_stderr(&args.log, args.log_json)?;
            mesh_control::run::run(config)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Prints every problem, then the counts.
fn check(args: &CheckArgs) -> Result<ExitCode> {
    let mut engine = Engine::new(args.dir.clone(), args.mesh.settings()?);
    let report = engine.step().report.clone();
    let mut out = std::io::stdout().lock();
    if let Some(error) = &report.directory {
        writeln!(out, "error: {error}")?;
    }
    for problem in &report.problems {
        writeln!(out, "{problem}")?;
    }
    let objects: Vec<String> =
        report.objects.iter().filter(|(_, n)| **n > 0).map(|(kind, n)| format!("{n} {kind}")).collect();
    writeln!(
        out,
        "{}: {} errors, {} warnings",
        if objects.is_empty() { "no objects".to_owned() } else { objects.join(", ") },
        report.count(Severity::Error) + usize::from(report.directory.is_some()),
        report.count(Severity::Warning),
    )?;
    Ok(ExitCode::from(u8::from(report.failed())))
}
