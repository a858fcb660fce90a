//! The daemon's metrics, in OpenMetrics text.
//!
//! Two sorts: Istio's `istio_tcp_*` families with Istio's labels ([`tcp`]), so that its dashboards work here,
//! and the daemon's own `nodemesh_*` families. What another module counts already (kernel counters,
//! certificates, xDS) is read at scrape time through a sampler ([`Metrics::sample_counters`],
//! [`Metrics::sample_gauges`]).
//!
//! Deliberately absent: HTTP (`admin` serves the text), and any label whose values a peer can choose. Every
//! family here has either labels from fixed sets or, for TCP, a limit on its series.

mod fastpath;
mod sampled;
pub mod tcp;

pub use fastpath::FastPath;
pub use sampled::Sample;
pub use tcp::{Reporter, Security, ServiceLabels, TcpLabels, TcpSeries, WorkloadLabels};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        histogram::{Histogram, exponential_buckets},
        info::Info,
    },
    registry::Registry,
};
use sampled::Sampler;
use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// The content type of [`Metrics::render`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Which half of the daemon refused a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Towards a pod of this node.
    Inbound,
    /// From a pod of this node.
    Outbound,
}

impl Direction {
    /// As a label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Refusal {
    direction: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Operation {
    operation: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Resource {
    resource: &'static str,
    outcome: &'static str,
}

/// All metrics of one daemon. Share it in an `Arc`; every method takes `&self` and none waits.
pub struct Metrics {
    registry: Mutex<Registry>,
    tcp: Arc<tcp::TcpMetrics>,
    refusals: Family<Refusal, Counter>,
    /// The same, to be read back: a family cannot be walked.
    refusal_totals: Mutex<BTreeMap<(&'static str, &'static str), u64>>,
    enroll: Family<Operation, Counter>,
    enroll_seconds: Histogram,
    reconciles: Family<Outcome, Counter>,
    reconcile_operations: Counter,
    reconcile_seconds: Histogram,
    xds_resources: Family<Resource, Counter>,
    /// In-kernel connections.
    pub fast_path: FastPath,
    dns_seconds: Histogram,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").field("tcp_series", &self.tcp.len()).finish_non_exhaustive()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new(tcp::Limits::default())
    }
}

impl Metrics {
    /// Makes and registers every family; `limits` bounds the TCP series.
    pub fn new(limits: tcp::Limits) -> Self {
        let mut registry = Registry::default();
        let tcp = Arc::new(tcp::TcpMetrics::new(limits));
        registry.register_collector(Box::new(Arc::clone(&tcp)));
        let version = ("version", env!("CARGO_PKG_VERSION"));
        registry.register("nodemesh_build", "What is running here", Info::new([version]));

        // From 100 us to about 26 s, and from 100 us to about 1.6 s.
        let enroll_seconds = Histogram::new(exponential_buckets(1e-4, 4.0, 10));
        let reconcile_seconds = Histogram::new(exponential_buckets(1e-4, 4.0, 8));
        let m = Self {
            tcp,
            refusals: Family::default(),
            refusal_totals: Mutex::default(),
            enroll: Family::default(),
            enroll_seconds,
            reconciles: Family::default(),
            reconcile_operations: Counter::default(),
            reconcile_seconds,
            xds_resources: Family::default(),
            fast_path: FastPath::default(),
            // From 250 us to about 4 s.
            dns_seconds: Histogram::new(exponential_buckets(2.5e-4, 4.0, 8)),
            registry: Mutex::default(),
        };
        let r = &mut registry;
        r.register("nodemesh_refusals", "Connections refused by the daemon, by reason", m.refusals.clone());
        r.register("nodemesh_enroll", "Enrolment operations, by outcome", m.enroll.clone());
        r.register("nodemesh_enroll_seconds", "Time that enrolling a pod took", m.enroll_seconds.clone());
        r.register("nodemesh_reconciles", "Runs of the BPF reconciler", m.reconciles.clone());
        let help = "Map operations that the BPF reconciler made";
        r.register("nodemesh_reconcile_operations", help, m.reconcile_operations.clone());
        let help = "Time that a run of the BPF reconciler took";
        r.register("nodemesh_reconcile_seconds", help, m.reconcile_seconds.clone());
        let help = "xDS resources received, by what became of them";
        r.register("nodemesh_xds_resources", help, m.xds_resources.clone());
        m.fast_path.register(r);
        let help = "Time that nameservers took for queries that were passed on to them";
        r.register("nodemesh_dns_forward_seconds", help, m.dns_seconds.clone());
        Self { registry: Mutex::new(registry), ..m }
    }

    /// The series for a TCP connection with these labels. Look it up once per connection and keep it: what it
    /// counts then costs one atomic addition each.
    pub fn tcp(&self, labels: &TcpLabels) -> Arc<TcpSeries> {
        self.tcp.series(labels)
    }

    /// Counts an opened connection.
    pub fn tcp_opened(&self, labels: &TcpLabels) {
        self.tcp(labels).opened();
    }

    /// Counts a closed connection with its bytes: `sent` went from the destination to the source, `received`
    /// from the source to the destination (Istio's sense of the words).
    pub fn tcp_closed(&self, labels: &TcpLabels, sent: u64, received: u64) {
        let series = self.tcp(labels);
        series.bytes(sent, received);
        series.closed();
    }

    /// Counts a refused connection; `reason` is from a fixed set.
    pub fn refused(&self, direction: Direction, reason: &'static str) {
        self.refusals.get_or_create(&Refusal { direction: direction.as_str(), reason }).inc();
        let mut totals = self.refusal_totals.lock().unwrap_or_else(PoisonError::into_inner);
        *totals.entry((direction.as_str(), reason)).or_default() += 1;
    }

    /// Refused connections since the start, by direction and reason.
    pub fn refusals(&self) -> Vec<((&'static str, &'static str), u64)> {
        let totals = self.refusal_totals.lock().unwrap_or_else(PoisonError::into_inner);
        totals.iter().map(|(key, n)| (*key, *n)).collect()
    }

    /// Counts a DNS query that a nameserver answered.
    pub fn dns_forwarded(&self, took: Duration) {
        self.dns_seconds.observe(took.as_secs_f64());
    }

    /// Counts an enrolment operation (`add`, `del`, `check`, `scan`, ...); both strings are from fixed sets.
    pub fn enrolled(&self, operation: &'static str, outcome: &'static str, took: Duration) {
        self.enroll.get_or_create(&Operation { operation, outcome }).inc();
        self.enroll_seconds.observe(took.as_secs_f64());
    }

    /// Counts a run of the BPF reconciler that made `operations` map operations.
    pub fn reconciled(&self, outcome: &'static str, operations: u64, took: Duration) {
        self.reconciles.get_or_create(&Outcome { outcome }).inc();
        self.reconcile_operations.inc_by(operations);
        self.reconcile_seconds.observe(took.as_secs_f64());
    }

    /// Counts `n` xDS resources of a kind (`address`, `authorization`) that were `accepted`, `rejected` or
    /// `removed`.
    pub fn xds_resources(&self, resource: &'static str, outcome: &'static str, n: u64) {
        self.xds_resources.get_or_create(&Resource { resource, outcome }).inc_by(n);
    }

    /// Registers counters that `sample` reads at each scrape. `name` goes without `_total`. `sample` must be
    /// quick and must not register anything; only its first [`Sample::MAX`] samples are shown.
    pub fn sample_counters(
        &self,
        name: &'static str,
        help: &'static str,
        sample: impl Fn() -> Vec<Sample<u64>> + Send + Sync + 'static,
    ) {
        self.register(Sampler::counters(name, help, Box::new(sample)));
    }

    /// Registers gauges that `sample` reads at each scrape; see [`Metrics::sample_counters`].
    pub fn sample_gauges(
        &self,
        name: &'static str,
        help: &'static str,
        sample: impl Fn() -> Vec<Sample<f64>> + Send + Sync + 'static,
    ) {
        self.register(Sampler::gauges(name, help, Box::new(sample)));
    }

    fn register(&self, sampler: Sampler) {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner).register_collector(Box::new(sampler));
    }

    /// Everything as OpenMetrics text; first drops TCP series that nobody has used for a while.
    pub fn render(&self) -> Result<String, fmt::Error> {
        self.tcp.evict_idle();
        let mut out = String::with_capacity(16 * 1024);
        encode(&mut out, &self.registry.lock().unwrap_or_else(PoisonError::into_inner))?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_families_have_their_names_and_the_text_ends_as_openmetrics_says() {
        let m = Metrics::default();
        m.refused(Direction::Inbound, "wrong_identity");
        m.enrolled("add", "captured", Duration::from_millis(3));
        m.reconciled("ok", 12, Duration::from_millis(1));
        m.xds_resources("address", "rejected", 1);
        m.sample_counters("nodemesh_kernel_connects", "Connects seen in the kernel", || {
            vec![Sample::new([("outcome", "direct")], 41), Sample::new([("outcome", "a\"b")], 1)]
        });
        m.sample_gauges("nodemesh_xds_connected", "1 while the control plane is connected", || {
            vec![Sample::new([], 1.0)]
        });
        let text = m.render().unwrap();
        for line in [
            "nodemesh_build_info{version=\"",
            "nodemesh_refusals_total{direction=\"inbound\",reason=\"wrong_identity\"} 1\n",
            "nodemesh_enroll_total{operation=\"add\",outcome=\"captured\"} 1\n",
            "nodemesh_enroll_seconds_count 1\n",
            "nodemesh_reconciles_total{outcome=\"ok\"} 1\n",
            "nodemesh_reconcile_operations_total 12\n",
            "nodemesh_xds_resources_total{resource=\"address\",outcome=\"rejected\"} 1\n",
            "# TYPE nodemesh_kernel_connects counter\n",
            "nodemesh_kernel_connects_total{outcome=\"direct\"} 41\n",
            "nodemesh_kernel_connects_total{outcome=\"a\\\"b\"} 1\n",
            "nodemesh_xds_connected 1.0\n",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
        assert_eq!(text.matches("# EOF").count(), 1);
    }
}
