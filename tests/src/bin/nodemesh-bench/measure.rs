//! Traffic: every load on every path, in rounds that take the paths by turns, so that what else the machine does hits
//! all of them alike.

use crate::{
    load::{PORT, Sample},
    report::Row,
};
use anyhow::{Context, Result, ensure};
use mesh_tests::{cgroup::Cgroup, cluster::Cluster};
use std::{collections::BTreeMap, fs, net::SocketAddr, time::Duration};

/// One way from a client to a server.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    /// Its name in the rows.
    pub(crate) name: &'static str,
    /// The pod of the client, `NAMESPACE/NAME`.
    pub(crate) client: &'static str,
    /// What the client dials.
    pub(crate) to: SocketAddr,
    /// The groups of the proxies on it; none on a path through the kernel alone.
    pub(crate) proxies: Vec<Cgroup>,
    /// The route without anything on it, between the same kinds of ends.
    pub(crate) baseline: Option<&'static str>,
}

/// One kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    Connect,
    RoundTrips { size: usize, connections: usize },
    Bulk { streams: usize },
    Close,
}

/// Requests of [`Load::Close`]: bytes each way, and how many are under way.
const CLOSE_SIZE: usize = 1024;
const CLOSE_CONCURRENCY: usize = 32;

/// All loads, in the order of the tables.
pub(crate) const LOADS: [Load; 8] = [
    Load::Connect,
    Load::RoundTrips { size: 1, connections: 1 },
    Load::RoundTrips { size: 1024, connections: 1 },
    Load::RoundTrips { size: 1, connections: 32 },
    Load::RoundTrips { size: 1024, connections: 32 },
    Load::Bulk { streams: 1 },
    Load::Bulk { streams: 8 },
    Load::Close,
];

impl Load {
    /// The beginning of its metrics' names, and what `--only` compares with.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Connect => "connect".to_owned(),
            Self::RoundTrips { size, connections } => {
                let size = if size == 1 { "1b" } else { "1k" };
                format!("rtt_{size}_c{connections}")
            }
            Self::Bulk { streams } => format!("bulk_s{streams}"),
            Self::Close => "close".to_owned(),
        }
    }

    /// The arguments of the client program.
    fn arguments(self, to: SocketAddr, time: Duration) -> Vec<String> {
        let common = format!("--to {to} --millis {}", time.as_millis());
        let text = match self {
            Self::Connect => format!("client connect {common}"),
            Self::RoundTrips { size, connections } => {
                format!("client rtt {common} --size {size} --connections {connections}")
            }
            Self::Bulk { streams } => format!("client bulk {common} --connections {streams}"),
            Self::Close => {
                format!("client close {common} --size {CLOSE_SIZE} --connections {CLOSE_CONCURRENCY}")
            }
        };
        text.split(' ').map(str::to_owned).collect()
    }

    /// What a sample says, as metrics: name, unit, value.
    #[expect(clippy::cast_precision_loss, reason = "counts of one measurement")]
    fn metrics(self, sample: &Sample, cpu: &Cpu) -> Vec<(String, &'static str, f64)> {
        let name = self.name();
        let of = |what: &str| format!("{name}_{what}");
        let each = |seconds: f64| seconds * 1e6 / sample.all_ops.max(1) as f64;
        let rate = sample.ops as f64 / sample.seconds;
        let latency = [(of("p50"), "us", sample.latency.p50), (of("p99"), "us", sample.latency.p99)];
        let mut metrics = match self {
            Self::Connect => vec![
                (of("p50"), "us", sample.connect.p50),
                (of("p99"), "us", sample.connect.p99),
                ("first_byte_p50".to_owned(), "us", sample.latency.p50),
                ("first_byte_p99".to_owned(), "us", sample.latency.p99),
            ],
            Self::RoundTrips { .. } | Self::Close => {
                let unit = if self == Self::Close { "connections/s" } else { "round trips/s" };
                [(of("rate"), unit, rate)].into_iter().chain(latency).collect()
            }
            Self::Bulk { .. } => {
                let gibibytes = sample.bytes as f64 / f64::from(1 << 30);
                let mut metrics = vec![(of("rate"), "Gb/s", sample.bytes as f64 * 8e-9 / sample.seconds)];
                if let Some(proxies) = cpu.proxies {
                    metrics.push((of("cpu"), "CPU-s/GiB", proxies / gibibytes));
                }
                metrics.push((of("cpu_all"), "CPU-s/GiB", cpu.all / gibibytes));
                return metrics;
            }
        };
        if let Some(proxies) = cpu.proxies {
            metrics.push((of("cpu"), "CPU-us each", each(proxies)));
        }
        metrics.push((of("cpu_all"), "CPU-us each", each(cpu.all)));
        metrics
    }
}

/// CPU seconds of one measurement.
struct Cpu {
    /// Of the proxies; `None` on a path without any.
    proxies: Option<f64>,
    /// Of everything in the run: proxies, client, server.
    all: f64,
}

/// CPU seconds that a group has used so far.
fn cpu_seconds(cgroup: &Cgroup) -> Result<f64> {
    let path = cgroup.path().join("cpu.stat");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    parse_cpu(&text).with_context(|| format!("usage_usec in {}", path.display()))
}

fn parse_cpu(text: &str) -> Option<f64> {
    let micros = text.lines().find_map(|line| line.strip_prefix("usage_usec "))?;
    Some(micros.parse::<f64>().ok()? / 1e6)
}

/// Values by metric and route, one for each round.
#[derive(Default)]
pub(crate) struct Results {
    /// (metric, unit), in the order of their first appearance.
    order: Vec<(String, &'static str)>,
    values: BTreeMap<(String, &'static str), Vec<Option<f64>>>,
    rounds: usize,
    /// Failures, for the reader of the table.
    pub(crate) failures: Vec<String>,
}

impl Results {
    fn put(&mut self, route: &'static str, metric: String, unit: &'static str, value: f64) {
        if !self.order.iter().any(|(name, _)| *name == metric) {
            self.order.push((metric.clone(), unit));
        }
        let values = self.values.entry((metric, route)).or_default();
        values.resize(self.rounds, None);
        if let Some(last) = values.last_mut() {
            *last = Some(value);
        }
    }

    /// The values of a metric on a route.
    fn of(&self, metric: &str, route: &'static str) -> Option<&[Option<f64>]> {
        self.values.get(&(metric.to_owned(), route)).map(Vec::as_slice)
    }

    /// All rows: against the plain route, and for the mesh's tunnels against each of the proxies.
    pub(crate) fn rows(&self, routes: &[Route]) -> Vec<Row> {
        let mut rows = Vec::new();
        for (metric, unit) in &self.order {
            for route in routes {
                let Some(values) = self.of(metric, route.name) else { continue };
                let against = |base: &'static str| self.of(metric, base).map(|values| (base, values));
                rows.push(Row::new(route.name, metric, unit, values, route.baseline.and_then(against)));
                if route.name == "mtls" {
                    for base in ["envoy", "haproxy"].into_iter().filter_map(against) {
                        rows.push(Row::new(route.name, metric, unit, values, Some(base)));
                    }
                }
            }
            rows.extend(self.added(metric, routes));
        }
        rows
    }

    /// For round trips at one connection: what a path adds to the plain one, against the proxies.
    fn added(&self, metric: &str, routes: &[Route]) -> Vec<Row> {
        if !(metric.starts_with("rtt_") && metric.ends_with("_c1_p50")) {
            return vec![];
        }
        let added = |route: &'static str| -> Option<Vec<Option<f64>>> {
            let (values, plain) = (self.of(metric, route)?, self.of(metric, "plain")?);
            Some(values.iter().zip(plain).map(|(value, plain)| Some((*value)? - (*plain)?)).collect())
        };
        let proxied: Vec<&'static str> = routes
            .iter()
            .map(|r| r.name)
            .filter(|name| ["mtls", "envoy", "haproxy"].contains(name))
            .collect();
        let name = format!("{}_added_p50", metric.trim_end_matches("_p50"));
        let mut rows = Vec::new();
        for route in &proxied {
            let Some(values) = added(route) else { continue };
            let bases: Vec<_> = match *route {
                "mtls" => ["envoy", "haproxy"].into_iter().filter(|b| proxied.contains(b)).collect(),
                _ => vec![],
            };
            if bases.is_empty() {
                rows.push(Row::new(route, &name, "us", &values, None));
            }
            for base in bases {
                if let Some(other) = added(base) {
                    rows.push(Row::new(route, &name, "us", &values, Some((base, &other))));
                }
            }
        }
        rows
    }
}

/// One measurement of the client program in a pod.
pub(crate) fn client(cluster: &Cluster, pod: &str, args: &[String], time: Duration) -> Result<Sample> {
    let pod = cluster.pod(pod)?;
    let program = std::env::current_exe()?;
    let output = pod.place().run(&program, args, &[], &[], time + Duration::from_secs(30))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}", output.status, stderr.trim());
    serde_json::from_slice(&output.stdout).context("output of the load client")
}

/// Fails with the reason if a path does not work.
pub(crate) fn probe(cluster: &Cluster, route: &Route) -> Result<()> {
    let time = Duration::from_millis(50);
    let sample = client(cluster, route.client, &Load::Connect.arguments(route.to, time), time)?;
    ensure!(sample.errors == 0 && sample.all_ops > 0, "{}", sample.error.as_deref().unwrap_or("no answer"));
    Ok(())
}

/// Runs `rounds` rounds of all loads on all routes.
pub(crate) fn run(
    cluster: &Cluster,
    routes: &[Route],
    loads: &[Load],
    rounds: usize,
    time: Duration,
) -> Result<Results> {
    let mut results = Results::default();
    let everything = cluster.run.cgroup()?;
    for round in 1..=rounds {
        results.rounds = round;
        println!("round {round} of {rounds}");
        for load in loads {
            for route in routes {
                let proxies = |cgroups: &[Cgroup]| -> Result<f64> { cgroups.iter().map(cpu_seconds).sum() };
                let (before, all_before) = (proxies(&route.proxies)?, cpu_seconds(&everything)?);
                let sample = client(cluster, route.client, &load.arguments(route.to, time), time);
                let cpu = Cpu {
                    proxies: match route.proxies.is_empty() {
                        true => None,
                        false => Some(proxies(&route.proxies)? - before),
                    },
                    all: cpu_seconds(&everything)? - all_before,
                };
                let what = format!("{} on {}, round {round}", load.name(), route.name);
                match sample {
                    Ok(sample) => {
                        if sample.errors > 0 {
                            let first = sample.error.as_deref().unwrap_or_default();
                            results.failures.push(format!("{what}: {} failed: {first}", sample.errors));
                        }
                        for (metric, unit, value) in load.metrics(&sample, &cpu) {
                            if value.is_finite() {
                                results.put(route.name, metric, unit, value);
                            }
                        }
                    }
                    Err(error) => results.failures.push(format!("{what}: {error:#}")),
                }
            }
        }
    }
    Ok(results)
}

/// The address of a load server behind a virtual address or a proxy.
pub(crate) fn at(ip: std::net::Ipv4Addr, port: u16) -> SocketAddr {
    SocketAddr::new(ip.into(), port)
}

/// [`at`] with the load server's own port.
pub(crate) fn service(ip: std::net::Ipv4Addr) -> SocketAddr {
    at(ip, PORT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(name: &'static str, baseline: Option<&'static str>) -> Route {
        let to = SocketAddr::from(([127, 0, 0, 1], 1));
        Route { name, client: "x/y", to, proxies: vec![], baseline }
    }

    #[test]
    fn rows_compare_within_a_round_and_with_the_proxies() {
        let mut results = Results::default();
        let name = || "rtt_1k_c1_p50".to_owned();
        for (plain, mtls, envoy) in [(10.0, 30.0, 50.0), (20.0, 80.0, 120.0)] {
            results.rounds += 1;
            results.put("plain", name(), "us", plain);
            results.put("mtls", name(), "us", mtls);
            results.put("envoy", name(), "us", envoy);
        }
        let routes = [route("plain", None), route("mtls", Some("plain")), route("envoy", Some("plain"))];
        let rows = results.rows(&routes);
        let find = |scenario: &str, metric: &str, base: Option<&str>| {
            rows.iter()
                .find(|r| r.scenario == scenario && r.metric == metric && r.baseline.as_deref() == base)
                .unwrap_or_else(|| panic!("{scenario} {metric} {base:?} in {rows:#?}"))
        };
        assert_eq!(find("mtls", "rtt_1k_c1_p50", Some("plain")).ratio, Some(3.5));
        assert_eq!(find("mtls", "rtt_1k_c1_added_p50", Some("envoy")).median, Some(40.0));
        let ratio = find("mtls", "rtt_1k_c1_added_p50", Some("envoy")).ratio.unwrap();
        assert!((ratio - 0.55).abs() < 1e-9, "{ratio}");
        assert_eq!(find("plain", "rtt_1k_c1_p50", None).ratio, None);
    }

    #[test]
    fn a_round_without_a_value_keeps_its_place() {
        let mut results = Results { rounds: 1, ..Results::default() };
        results.put("plain", "m".into(), "us", 1.0);
        results.rounds = 2;
        results.put("mtls", "m".into(), "us", 2.0);
        assert_eq!(results.of("mtls", "mtls"), None);
        assert_eq!(results.of("m", "mtls"), Some(&[None, Some(2.0)][..]));
    }

    #[test]
    fn reads_cpu_stat() {
        assert_eq!(parse_cpu("usage_usec 1500000\nuser_usec 1\n"), Some(1.5));
        assert_eq!(parse_cpu("user_usec 1\n"), None);
    }

    #[test]
    fn names_of_loads_differ() {
        let names: std::collections::BTreeSet<_> = LOADS.iter().map(|load| load.name()).collect();
        assert_eq!(names.len(), LOADS.len());
    }
}
