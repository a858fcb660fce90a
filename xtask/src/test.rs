//! `cargo xtask test`: every check and test in one command, a line for each suite, and a total that cannot hide a
//! suite which ran nothing.

use crate::{
    commands::{build, cargo, codegen, describe, root, run as run_command, target_dir},
    setup, tidy,
    toolchain::{self, Compiler},
};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::{
    fmt,
    io::{BufRead, BufReader, Write},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Run one suite: fmt, clippy, clippy-bpf, tidy, codegen, unit, e2e.
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Only tests whose name contains this (suites unit and e2e).
    #[arg(long, value_name = "TEXT", requires = "only")]
    filter: Option<String>,
}

/// What a suite that passed did.
enum Passed {
    /// A check without a number of tests.
    Check,
    /// This many tests, of which there is at least one.
    Tests(u64),
}

struct Suite {
    name: &'static str,
    run: fn(Option<&str>) -> Result<Passed>,
}

const SUITES: [Suite; 7] = [
    Suite { name: "fmt", run: |_| check(&mut cargo(["fmt", "--all", "--check"])) },
    Suite { name: "tidy", run: |_| tidy::run().map(|()| Passed::Check) },
    Suite {
        name: "clippy",
        run: |_| check(&mut cargo(["clippy", "--workspace", "--all-targets", "--quiet", "--", "-Dwarnings"])),
    },
    Suite { name: "clippy-bpf", run: |_| clippy_bpf() },
    Suite { name: "codegen", run: |_| codegen(true).map(|()| Passed::Check) },
    Suite { name: "unit", run: unit },
    Suite { name: "e2e", run: e2e },
];

struct Outcome {
    name: &'static str,
    result: Result<Passed>,
    took: Duration,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let suites: Vec<&Suite> =
        SUITES.iter().filter(|suite| options.only.as_deref().is_none_or(|only| only == suite.name)).collect();
    if suites.is_empty() {
        let names: Vec<&str> = SUITES.iter().map(|suite| suite.name).collect();
        bail!("there is no suite {:?}; there are: {}", options.only, names.join(", "));
    }
    setup::ensure()?;
    let mut outcomes = Vec::new();
    for suite in suites {
        println!("--- {}", suite.name);
        let started = Instant::now();
        let result = (suite.run)(options.filter.as_deref());
        let outcome = Outcome { name: suite.name, result, took: started.elapsed() };
        println!("{outcome}");
        outcomes.push(outcome);
    }
    summary(&outcomes)
}

fn summary(outcomes: &[Outcome]) -> Result<()> {
    println!("---");
    let (mut tests, mut failed) = (0, Vec::new());
    for outcome in outcomes {
        println!("{outcome}");
        match &outcome.result {
            Ok(Passed::Tests(count)) => tests += count,
            Ok(Passed::Check) => {}
            Err(_) => failed.push(outcome.name),
        }
    }
    println!(
        "{tests} tests passed; {} suites passed, {} failed",
        outcomes.len() - failed.len(),
        failed.len()
    );
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, seconds) = (self.name, self.took.as_secs_f64());
        match &self.result {
            Ok(Passed::Check) => write!(f, "suite {name:<12} ok      {seconds:7.1} s"),
            Ok(Passed::Tests(count)) => write!(f, "suite {name:<12} ok      {seconds:7.1} s  {count} tests"),
            Err(error) => write!(f, "suite {name:<12} FAILED  {seconds:7.1} s  {error:#}"),
        }
    }
}

fn check(command: &mut Command) -> Result<Passed> {
    run_command(command)?;
    Ok(Passed::Check)
}

/// Clippy on the BPF crate, with the compiler that builds the object.
fn clippy_bpf() -> Result<Passed> {
    let chain = toolchain::find()?;
    let dir = target_dir().join("bpf-clippy");
    let arch = std::env::consts::ARCH;
    let mut command = match &chain.compiler {
        // `cargo clippy` would pick whichever clippy is first on PATH, which belongs to another compiler.
        Compiler::Distro { rustc, .. } => {
            let mut command = chain.cargo("check", root(), &dir, arch);
            command.env("RUSTC_WORKSPACE_WRAPPER", rustc.with_file_name("clippy-driver"));
            command.env("CLIPPY_ARGS", "-Dwarnings__CLIPPY_HACKERY__");
            command
        }
        Compiler::Nightly => {
            let mut command = chain.cargo("clippy", root(), &dir, arch);
            command.args(["--", "-Dwarnings"]);
            command
        }
    };
    check(&mut command)
}

fn unit(filter: Option<&str>) -> Result<Passed> {
    let mut count = 0;
    for selection in [
        &["--workspace", "--exclude", "mesh-tests", "--lib", "--bins", "--tests"][..],
        &["--package", "mesh-tests", "--lib", "--bins"],
    ] {
        let mut command = cargo(["test"]);
        command.args(selection).arg("--");
        command.args(filter);
        count += count_tests(&mut command)?;
    }
    at_least_one(count)
}

/// Needs root and the real kernel; one test at a time, since each has daemons, namespaces and load of its own.
fn e2e(filter: Option<&str>) -> Result<Passed> {
    build()?;
    let mut command = cargo(["test", "--package", "mesh-tests", "--test", "*", "--", "--test-threads", "1"]);
    command.args(filter);
    at_least_one(count_tests(&mut command)?)
}

fn at_least_one(count: u64) -> Result<Passed> {
    ensure!(count > 0, "not one test was run");
    Ok(Passed::Tests(count))
}

/// Runs a test command, passing its output on, and counts the tests that passed.
fn count_tests(command: &mut Command) -> Result<u64> {
    let name = describe(command);
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("start {name}"))?;
    let stdout = child.stdout.take().context("stdout")?;
    let mut count = 0;
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        count += passed_in(&line).unwrap_or(0);
        writeln!(std::io::stdout(), "{line}")?;
    }
    let status = child.wait()?;
    ensure!(status.success(), "{name}: {status}");
    Ok(count)
}

/// The count in `test result: ok. 12 passed; 0 failed; ...`.
fn passed_in(line: &str) -> Option<u64> {
    let rest = line.strip_prefix("test result: ")?;
    let before = rest.split_once(" passed")?.0;
    before.rsplit(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_libtest_prints() {
        assert_eq!(passed_in("test result: ok. 12 passed; 0 failed; 0 ignored"), Some(12));
        assert_eq!(passed_in("test result: FAILED. 3 passed; 1 failed"), Some(3));
        assert_eq!(passed_in("test foo ... ok"), None);
    }

    #[test]
    fn a_suite_that_ran_nothing_fails() {
        assert!(at_least_one(0).is_err());
        assert!(matches!(at_least_one(2), Ok(Passed::Tests(2))));
    }

    #[test]
    fn one_failed_suite_fails_the_run() {
        let ok = || Outcome { name: "a", result: Ok(Passed::Check), took: Duration::ZERO };
        let bad = Outcome { name: "b", result: Err(anyhow::anyhow!("broken")), took: Duration::ZERO };
        assert!(summary(&[ok()]).is_ok());
        let error = summary(&[ok(), bad]).unwrap_err();
        assert!(error.to_string().contains('b'), "{error}");
    }
}
