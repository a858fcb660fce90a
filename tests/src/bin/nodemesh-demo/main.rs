//! `nodemesh-demo`: two nodes, real traffic, a table of what happened. `cargo xtask demo` builds and runs it.
//!
//! Every line of the table is a check that can fail. Without `--once` the cluster stays up until Ctrl-C; `exec` runs
//! a command inside a pod or a node of a cluster that is up.

mod checks;
mod enter;
mod table;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use mesh_tests::{cluster::Cluster, fixture::Fixture, proc::binary};
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};
use table::Table;

/// Shows nodemesh at work on this machine.
#[derive(Debug, Parser)]
struct Options {
    /// End after the table, with status 0 only if every line held.
    #[arg(long)]
    once: bool,
    /// The manifests that describe the cluster.
    #[arg(long, default_value = "deploy/examples/quickstart")]
    config: PathBuf,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a command in a pod (`NAMESPACE/NAME`) or a node (`NAME`) of the cluster that is up.
    Exec {
        /// The pod or node.
        place: String,
        /// The command with its arguments.
        #[arg(trailing_var_arg = true, required = true)]
        command: Vec<String>,
    },
}

fn main() -> ExitCode {
    let options = Options::parse();
    let result = match &options.command {
        Some(Command::Exec { place, command }) => enter::exec(place, command).map(|never| match never {}),
        None => demo(&options),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo(options: &Options) -> Result<bool> {
    let started = Instant::now();
    let fixture = Fixture::load(&options.config)?;
    let (mut cluster, leftovers) = bring_up(&fixture, &options.config)?;
    println!();
    let mut table = Table::default();
    checks::run_all(&mut cluster, &mut table);
    table.summary(started.elapsed());
    if !table.all_held() {
        print_logs(&cluster);
    }
    if !options.once {
        print_commands(&cluster)?;
        loop {
            // Ctrl-C is handled by the run, which removes everything.
            std::thread::park();
        }
    }
    drop(cluster);
    let clean = leftovers.check();
    if let Err(error) = &clean {
        println!("something was left behind: {error:#}");
    }
    Ok(table.all_held() && clean.is_ok())
}

/// Where the traces of a run would be.
struct Leftovers {
    netns: String,
    cgroup: PathBuf,
    dir: PathBuf,
}

impl Leftovers {
    fn check(&self) -> Result<()> {
        let left = mesh_tests::netns::list(&self.netns)?;
        anyhow::ensure!(left.is_empty(), "network namespaces {left:?}");
        for path in [&self.cgroup, &self.dir] {
            anyhow::ensure!(!path.exists(), "{}", path.display());
        }
        Ok(())
    }
}

fn bring_up(fixture: &Fixture, config: &Path) -> Result<(Cluster, Leftovers)> {
    println!("nodemesh demo\n");
    let counts =
        format!("{} nodes and {} pods as network namespaces", fixture.nodes.len(), fixture.pods.len());
    let mut cluster = table::step(&counts, || Cluster::new(fixture))?;
    let leftovers = Leftovers {
        netns: cluster.run.name(""),
        cgroup: cluster.run.cgroup()?.path().to_owned(),
        dir: cluster.run.dir(),
    };
    enter::write_places(&cluster)?;
    table::step(&format!("mesh-control on {}", config.display()), || cluster.start_control(config))?;
    let names: Vec<String> = fixture.nodes.iter().map(|node| node.name.clone()).collect();
    table::step(&format!("mesh-node on {}", names.join(" and ")), || {
        for name in &names {
            cluster.launch_node(name, &mesh_tests::daemons::NodeOptions::default())?;
        }
        names.iter().try_for_each(|name| cluster.wait_node_ready(name))
    })?;
    table::step("pods offered to the mesh through the CNI plugin", || cluster.enrol_all())?;
    table::step("applications", || cluster.start_apps())?;
    Ok((cluster, leftovers))
}

/// What the daemons complained about: a line for each connection that went well would hide it.
fn print_logs(cluster: &Cluster) {
    let complaints = |name: &str, log: &str| {
        let lines: Vec<&str> = log.lines().filter(|line| !line.contains(" INFO ")).collect();
        println!("--- {name}: warnings and errors\n{}", mesh_tests::proc::tail(&lines.join("\n"), 20));
    };
    if let Some(control) = &cluster.control {
        complaints("mesh-control", &control.proc.log());
    }
    for node in &cluster.nodes {
        if let Ok(daemon) = node.daemon() {
            complaints(&format!("mesh-node {}", node.spec.name), &daemon.proc.log());
        }
    }
}

fn print_commands(cluster: &Cluster) -> Result<()> {
    let here = std::env::current_dir()?;
    let shown = |path: &Path| path.strip_prefix(&here).unwrap_or(path).display().to_string();
    let (me, app) = (shown(&std::env::current_exe()?), shown(&binary("pod-app")?));
    let node_bin = shown(&binary("mesh-node")?);
    let control = cluster.control.as_ref().context("control")?;
    let node = cluster.node("node-b")?;
    println!(
        "The cluster stays up; Ctrl-C removes it. Things to try in another terminal:\n\n\
         # a connection from a pod through the mesh, and who answered\n\
         {me} exec shop/web-0 {app} connects --to 10.96.0.10:80 --n 100\n\
         {me} exec shop/web-0 {app} dial --to 10.96.0.13:80 --send hello --shutdown\n\n\
         # the same from a pod that policy refuses\n\
         {me} exec shop/guest-0 {app} dial --to 10.96.0.13:80 --send hello\n\n\
         # metrics, state and log of a node\n\
         {me} exec node-b curl -s localhost:15020/metrics\n\
         {node_bin} status --run-dir {run_dir}\n\
         tail -f {log}\n\n\
         # the configuration; changes take effect at once\n\
         $EDITOR {config}/30-policy.yaml\n",
        run_dir = node.dir.display(),
        log = node.dir.join("mesh-node.log").display(),
        config = control.config_dir.display(),
    );
    Ok(())
}
