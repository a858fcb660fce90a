//! Metrics of the control plane, all named `nodemesh_control_*`.

use crate::{engine::Step, report::Severity};
use mesh_xds::{
    convert::{ADDRESS_TYPE, AUTHORIZATION_TYPE},
    grpc::{ServerStats, StatsReading},
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text::encode},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
    },
    registry::Registry,
};
use std::{fmt, sync::Arc};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SeverityLabel {
    severity: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TypeLabel {
    r#type: &'static str,
}

/// The values come from [`crate::ca::Denied::reason`] and its like, so their number is bounded.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// All metrics of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    objects: Family<KindLabel, Gauge>,
    problems: Family<SeverityLabel, Gauge>,
    resources: Family<TypeLabel, Gauge>,
    changes: Counter,
    readable: Gauge,
    issued: Counter,
    refused: Family<ReasonLabel, Counter>,
    intermediate_expiry: Gauge,
}

impl Metrics {
    /// A registry whose discovery counters are those of `streams`, one entry for each listener.
    pub fn new(streams: Vec<(&'static str, Arc<ServerStats>)>) -> Self {
        let mut registry = Registry::with_prefix("nodemesh_control");
        let metrics = Self {
            objects: Family::default(),
            problems: Family::default(),
            resources: Family::default(),
            changes: Counter::default(),
            readable: Gauge::default(),
            issued: Counter::default(),
            refused: Family::default(),
            intermediate_expiry: Gauge::default(),
            registry: Registry::default(),
        };
        registry.register("objects", "Objects in force", metrics.objects.clone());
        registry.register("problems", "Problems in the configuration", metrics.problems.clone());
        registry.register("resources", "Resources that are served", metrics.resources.clone());
        registry.register("object_changes", "Objects added, changed or removed", metrics.changes.clone());
        registry.register("config_readable", "1 while the directory can be read", metrics.readable.clone());
        registry.register("certificates_issued", "Workload certificates signed", metrics.issued.clone());
        registry.register("certificates_refused", "Refused requests for one", metrics.refused.clone());
        registry.register(
            "intermediate_expiry_seconds",
            "End of the signing certificate, in seconds since 1970",
            metrics.intermediate_expiry.clone(),
        );
        registry.register_collector(Box::new(Discovery(streams)));
        Self { registry, ..metrics }
    }

    /// Takes over the result of a step.
    pub fn configuration(&self, step: &Step) {
        let report = &step.report;
        for (kind, count) in &report.objects {
            self.objects.get_or_create(&KindLabel { kind }).set(gauge(*count));
        }
        for (severity, name) in [(Severity::Error, "error"), (Severity::Warning, "warning")] {
            self.problems.get_or_create(&SeverityLabel { severity: name }).set(gauge(report.count(severity)));
        }
        let resources = step.snapshot.resources();
        for (r#type, url) in [("address", ADDRESS_TYPE), ("authorization", AUTHORIZATION_TYPE)] {
            self.resources.get_or_create(&TypeLabel { r#type }).set(gauge(resources.len(url)));
        }
        self.changes.inc_by(step.events as u64);
        self.readable.set(i64::from(report.directory.is_none()));
    }

    /// Counts a certificate.
    pub fn certificate_issued(&self) {
        self.issued.inc();
    }

    /// Counts a refusal.
    pub fn certificate_refused(&self, reason: &'static str) {
        self.refused.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// Sets the end of the signing certificate, in seconds since 1970.
    pub fn intermediate_expiry(&self, at: i64) {
        self.intermediate_expiry.set(at);
    }

    /// The OpenMetrics text.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

fn gauge(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Reads the counters of the discovery services when asked.
#[derive(Debug)]
struct Discovery(Vec<(&'static str, Arc<ServerStats>)>);

/// Name, help, and where the number is.
type Row = (&'static str, &'static str, fn(&StatsReading) -> u64);

const COUNTERS: [Row; 10] = [
    ("streams", "Discovery streams opened", |s| s.streams),
    ("streams_refused", "Discovery streams refused", |s| s.streams_refused),
    ("stream_protocol_errors", "Discovery streams ended for a broken protocol", |s| s.protocol_errors),
    ("requests", "Discovery requests read", |s| s.requests),
    ("pushes", "Discovery responses sent", |s| s.responses),
    ("pushed_resources", "Resources in discovery responses", |s| s.resources),
    ("pushed_removals", "Removals in discovery responses", |s| s.removals),
    ("acks", "Responses that were applied", |s| s.acks),
    ("nacks", "Responses that were refused, in full or in part", |s| s.nacks),
    ("refused_resources", "Resources that were refused", |s| s.resources_refused),
];

impl Collector for Discovery {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let readings: Vec<_> = self.0.iter().map(|(name, stats)| (*name, stats.read())).collect();
        for (name, help, read) in COUNTERS {
            let kind = ConstCounter::new(0u64).metric_type();
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for (listener, reading) in &readings {
                let labels = [("listener", *listener)];
                ConstCounter::new(read(reading)).encode(family.encode_family(&labels)?)?;
            }
        }
        let kind = ConstGauge::new(0i64).metric_type();
        let mut family = encoder.encode_descriptor("streams_open", "Discovery streams now", None, kind)?;
        for (listener, reading) in &readings {
            let labels = [("listener", *listener)];
            let open = i64::try_from(reading.streams_open).unwrap_or(i64::MAX);
            ConstGauge::new(open).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
