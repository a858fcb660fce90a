//! Istio's TCP families: `istio_tcp_connections_opened_total`, `istio_tcp_connections_closed_total`,
//! `istio_tcp_sent_bytes_total` and `istio_tcp_received_bytes_total`.
//!
//! A connection looks its series up once and then only adds to atomics. The number of series is limited; what
//! comes beyond is counted in one series per reporter whose other labels are `unknown`, so that sums stay
//! right. A series that no connection holds and that was not used for a while is dropped.

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabel, EncodeLabelSet, LabelSetEncoder, NoLabelSet},
    metrics::MetricType,
};
use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// Who reports a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The client's side.
    Source,
    /// The server's side.
    Destination,
}

/// How a connection was protected (`connection_security_policy`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Security {
    /// Not known.
    #[default]
    Unknown,
    /// Plaintext on the wire.
    None,
    /// Mutual TLS.
    MutualTls,
    /// Pod to pod on one node: the kernel vouches for both identities, and no byte leaves it, so there is no
    /// TLS.
    NodeLocal,
}

impl Security {
    /// The value of `connection_security_policy`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::None => "none",
            Self::MutualTls => "mutual_tls",
            Self::NodeLocal => "node_local",
        }
    }
}

/// Labels of one end of a connection. An empty value shows as `unknown`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct WorkloadLabels {
    /// The owner's name, for example the Deployment.
    pub workload: String,
    /// Its namespace.
    pub namespace: String,
    /// The SPIFFE URI.
    pub principal: String,
    /// `service.istio.io/canonical-name` or `app`.
    pub canonical_service: String,
    /// `service.istio.io/canonical-revision` or `version`.
    pub canonical_revision: String,
    /// `app`.
    pub app: String,
    /// `version`.
    pub version: String,
    /// The cluster's name.
    pub cluster: String,
}

/// Labels of the service that was dialled. An empty value shows as `unknown`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ServiceLabels {
    /// The host name, for example `cart.shop.svc.cluster.local`.
    pub host: String,
    /// The Kubernetes name.
    pub name: String,
    /// The Kubernetes namespace.
    pub namespace: String,
}

/// The labels of a TCP connection. The shared parts are meant to be made once per workload and service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TcpLabels {
    /// Who reports.
    pub reporter: Reporter,
    /// The client.
    pub source: Arc<WorkloadLabels>,
    /// The server.
    pub destination: Arc<WorkloadLabels>,
    /// The service that was dialled.
    pub service: Arc<ServiceLabels>,
    /// How it was protected.
    pub security: Security,
    /// Why it ended early, from a fixed set; `-` if it did not.
    pub response_flags: &'static str,
}

impl TcpLabels {
    /// Labels of which only the reporter is known.
    pub fn unknown(reporter: Reporter) -> Self {
        Self {
            reporter,
            source: Arc::default(),
            destination: Arc::default(),
            service: Arc::default(),
            security: Security::Unknown,
            response_flags: "-",
        }
    }
}

impl EncodeLabelSet for TcpLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let (s, d) = (&*self.source, &*self.destination);
        let reporter = match self.reporter {
            Reporter::Source => "source",
            Reporter::Destination => "destination",
        };
        let security = self.security.as_str();
        let labels: [(&str, &str); 23] = [
            ("reporter", reporter),
            ("source_workload", &s.workload),
            ("source_canonical_service", &s.canonical_service),
            ("source_canonical_revision", &s.canonical_revision),
            ("source_workload_namespace", &s.namespace),
            ("source_principal", &s.principal),
            ("source_app", &s.app),
            ("source_version", &s.version),
            ("source_cluster", &s.cluster),
            ("destination_service", &self.service.host),
            ("destination_service_name", &self.service.name),
            ("destination_service_namespace", &self.service.namespace),
            ("destination_workload", &d.workload),
            ("destination_canonical_service", &d.canonical_service),
            ("destination_canonical_revision", &d.canonical_revision),
            ("destination_workload_namespace", &d.namespace),
            ("destination_principal", &d.principal),
            ("destination_app", &d.app),
            ("destination_version", &d.version),
            ("destination_cluster", &d.cluster),
            ("request_protocol", "tcp"),
            ("response_flags", self.response_flags),
            ("connection_security_policy", security),
        ];
        labels.into_iter().try_for_each(|(name, value)| {
            let value = if value.is_empty() { "unknown" } else { value };
            (name, value).encode(encoder.encode_label())
        })
    }
}

/// The counters of one label set.
#[derive(Debug)]
pub struct TcpSeries {
    opened: AtomicU64,
    closed: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
    /// Of connections that the kernel carries alone.
    retransmits: AtomicU64,
    rtt_us: AtomicU64,
    rtt_count: AtomicU64,
    /// Seconds since the registry was made at which somebody last asked for the series.
    used: AtomicU64,
}

impl TcpSeries {
    fn new(now: u64) -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            opened: zero(),
            closed: zero(),
            sent: zero(),
            received: zero(),
            retransmits: zero(),
            rtt_us: zero(),
            rtt_count: zero(),
            used: AtomicU64::new(now),
        }
    }

    /// Adds what the kernel counted of direct connections.
    pub fn add(&self, opened: u64, closed: u64, sent: u64, received: u64) {
        self.opened.fetch_add(opened, Relaxed);
        self.closed.fetch_add(closed, Relaxed);
        self.bytes(sent, received);
    }

    /// Adds what the kernel measured of direct connections that have closed: segments sent again by the client, and the
    /// sum of round-trip times with their number.
    pub fn add_direct(&self, retransmits: u64, rtt_us: u64, rtt_count: u64) {
        self.retransmits.fetch_add(retransmits, Relaxed);
        self.rtt_us.fetch_add(rtt_us, Relaxed);
        self.rtt_count.fetch_add(rtt_count, Relaxed);
    }

    /// Counts an opened connection.
    pub fn opened(&self) {
        self.opened.fetch_add(1, Relaxed);
    }

    /// Counts a closed connection.
    pub fn closed(&self) {
        self.closed.fetch_add(1, Relaxed);
    }

    /// Adds bytes: `sent` from the destination to the source, `received` the other way (Istio's sense).
    pub fn bytes(&self, sent: u64, received: u64) {
        self.sent.fetch_add(sent, Relaxed);
        self.received.fetch_add(received, Relaxed);
    }
}

/// Bounds on the TCP series.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most label sets at a time.
    pub series: usize,
    /// A series that nobody holds is dropped after this long without use.
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { series: 10_000, idle: Duration::from_secs(15 * 60) }
    }
}

#[derive(Debug)]
pub(super) struct TcpMetrics {
    series: RwLock<HashMap<TcpLabels, Arc<TcpSeries>>>,
    overflow: [(TcpLabels, Arc<TcpSeries>); 2],
    overflowed: AtomicU64,
    evicted: AtomicU64,
    limits: Limits,
    start: Instant,
}

impl TcpMetrics {
    pub(super) fn new(limits: Limits) -> Self {
        let overflow = |r| (TcpLabels::unknown(r), Arc::new(TcpSeries::new(0)));
        Self {
            series: RwLock::default(),
            overflow: [overflow(Reporter::Source), overflow(Reporter::Destination)],
            overflowed: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
            limits,
            start: Instant::now(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.series.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub(super) fn series(&self, labels: &TcpLabels) -> Arc<TcpSeries> {
        if let Some((_, series)) = self.overflow.iter().find(|(unknown, _)| unknown == labels) {
            return Arc::clone(series);
        }
        let now = self.start.elapsed().as_secs();
        if let Some(series) = self.series.read().unwrap_or_else(PoisonError::into_inner).get(labels) {
            series.used.store(now, Relaxed);
            return Arc::clone(series);
        }
        let mut all = self.series.write().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= self.limits.series && !all.contains_key(labels) {
            self.overflowed.fetch_add(1, Relaxed);
            let [source, destination] = &self.overflow;
            return Arc::clone(match labels.reporter {
                Reporter::Source => &source.1,
                Reporter::Destination => &destination.1,
            });
        }
        Arc::clone(all.entry(labels.clone()).or_insert_with(|| Arc::new(TcpSeries::new(now))))
    }

    pub(super) fn evict_idle(&self) {
        let now = self.start.elapsed().as_secs();
        let idle = self.limits.idle.as_secs();
        let mut all = self.series.write().unwrap_or_else(PoisonError::into_inner);
        let before = all.len();
        // A strong count of 1 under the write lock: nobody holds the series, and nobody can get it now.
        all.retain(|_, s| Arc::strong_count(s) > 1 || now.saturating_sub(s.used.load(Relaxed)) < idle);
        self.evicted.fetch_add((before - all.len()) as u64, Relaxed);
    }
}

impl Collector for TcpMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let all = self.series.read().unwrap_or_else(PoisonError::into_inner);
        let overflow =
            self.overflow.iter().filter(|(_, s)| s.opened.load(Relaxed) + s.closed.load(Relaxed) > 0);
        let series: Vec<(&TcpLabels, &TcpSeries)> =
            all.iter().map(|(l, s)| (l, &**s)).chain(overflow.map(|(l, s)| (l, &**s))).collect();
        type Pick = fn(&TcpSeries) -> &AtomicU64;
        let families: [(&str, &str, Pick); 4] = [
            ("istio_tcp_connections_opened", "TCP connections opened", |s| &s.opened),
            ("istio_tcp_connections_closed", "TCP connections closed", |s| &s.closed),
            ("istio_tcp_sent_bytes", "Bytes sent from the destination to the source", |s| &s.sent),
            ("istio_tcp_received_bytes", "Bytes sent from the source to the destination", |s| &s.received),
        ];
        for (name, help, pick) in families {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (labels, series) in &series {
                let value = pick(series).load(Relaxed);
                family.encode_family(*labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
            }
        }
        let direct: [(&str, &str, Pick); 3] = [
            (
                "nodemesh_direct_retransmits",
                "Segments that clients of in-kernel connections sent again",
                |s| &s.retransmits,
            ),
            ("nodemesh_direct_rtt_microseconds", "Sum of round-trip times of in-kernel connections", |s| {
                &s.rtt_us
            }),
            ("nodemesh_direct_rtt_samples", "How many connections are in the sum of round-trip times", |s| {
                &s.rtt_count
            }),
        ];
        for (name, help, pick) in direct {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (labels, series) in series.iter().filter(|(_, s)| s.rtt_count.load(Relaxed) > 0) {
                let value = pick(series).load(Relaxed);
                family.encode_family(*labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
            }
        }
        for (name, help, value) in [
            ("nodemesh_tcp_series_overflows", "Look-ups beyond the limit of TCP series", &self.overflowed),
            ("nodemesh_tcp_series_evicted", "Idle TCP series dropped", &self.evicted),
        ] {
            encoder
                .encode_descriptor(name, help, None, MetricType::Counter)?
                .encode_counter::<NoLabelSet, _, u64>(&value.load(Relaxed), None)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::{encoding::text, registry::Registry};

    fn labels(workload: &str) -> TcpLabels {
        TcpLabels {
            source: Arc::new(WorkloadLabels {
                workload: workload.into(),
                namespace: "shop".into(),
                principal: "spiffe://cluster.local/ns/shop/sa/cart".into(),
                ..Default::default()
            }),
            security: Security::MutualTls,
            ..TcpLabels::unknown(Reporter::Destination)
        }
    }

    fn render(m: &Arc<TcpMetrics>) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Arc::clone(m)));
        let mut out = String::new();
        text::encode(&mut out, &registry).unwrap();
        out
    }

    #[test]
    fn istios_names_labels_and_order() {
        let m = Arc::new(TcpMetrics::new(Limits::default()));
        let series = m.series(&labels("cart"));
        series.opened();
        series.bytes(7, 11);
        series.closed();
        let text = render(&m);
        let expected = concat!(
            "{reporter=\"destination\",source_workload=\"cart\",source_canonical_service=\"unknown\",",
            "source_canonical_revision=\"unknown\",source_workload_namespace=\"shop\",",
            "source_principal=\"spiffe://cluster.local/ns/shop/sa/cart\",source_app=\"unknown\",",
            "source_version=\"unknown\",source_cluster=\"unknown\",destination_service=\"unknown\",",
            "destination_service_name=\"unknown\",destination_service_namespace=\"unknown\",",
            "destination_workload=\"unknown\",destination_canonical_service=\"unknown\",",
            "destination_canonical_revision=\"unknown\",destination_workload_namespace=\"unknown\",",
            "destination_principal=\"unknown\",destination_app=\"unknown\",destination_version=\"unknown\",",
            "destination_cluster=\"unknown\",request_protocol=\"tcp\",response_flags=\"-\",",
            "connection_security_policy=\"mutual_tls\"} ",
        );
        for (name, value) in [
            ("istio_tcp_connections_opened_total", 1),
            ("istio_tcp_connections_closed_total", 1),
            ("istio_tcp_sent_bytes_total", 7),
            ("istio_tcp_received_bytes_total", 11),
        ] {
            let line = format!("{name}{expected}{value}\n");
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn equal_labels_share_a_series_whichever_arc_they_are_in() {
        let m = TcpMetrics::new(Limits::default());
        assert!(Arc::ptr_eq(&m.series(&labels("cart")), &m.series(&labels("cart"))));
        assert_eq!(m.len(), 1);
    }

    #[test]
    fn beyond_the_limit_sums_stay_right() {
        let m = Arc::new(TcpMetrics::new(Limits { series: 3, idle: Duration::from_secs(900) }));
        for i in 0..10 {
            m.series(&labels(&format!("w{i}"))).opened();
        }
        assert_eq!(m.len(), 3);
        let text = render(&m);
        let total: u64 = text
            .lines()
            .filter(|l| l.starts_with("istio_tcp_connections_opened_total{"))
            .map(|l| l.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
            .sum();
        assert_eq!(total, 10);
        assert!(text.contains("nodemesh_tcp_series_overflows_total 7\n"), "{text}");
    }

    #[test]
    fn idle_series_go_and_held_ones_stay() {
        let m = TcpMetrics::new(Limits { series: 10, idle: Duration::ZERO });
        let held = m.series(&labels("held"));
        m.series(&labels("idle")).opened();
        assert_eq!(m.len(), 2);
        m.evict_idle();
        assert_eq!(m.len(), 1);
        assert!(Arc::ptr_eq(&held, &m.series(&labels("held"))));
        drop(held);
        m.evict_idle();
        assert_eq!(m.len(), 0);
        assert_eq!(m.evicted.load(Relaxed), 2);

        let m = TcpMetrics::new(Limits { series: 10, idle: Duration::from_secs(3600) });
        m.series(&labels("recent"));
        m.evict_idle();
        assert_eq!(m.len(), 1);
    }
}
