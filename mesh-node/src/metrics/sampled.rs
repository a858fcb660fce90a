//! Families whose values another module holds and that are read at scrape time.

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabel, EncodeLabelSet, LabelSetEncoder, MetricEncoder, NoLabelSet},
    metrics::MetricType,
};
use std::fmt;

/// One value with its labels.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample<V> {
    labels: Vec<(&'static str, String)>,
    value: V,
}

impl<V> Sample<V> {
    /// Most samples of one family that are shown.
    pub const MAX: usize = 10_000;

    /// A value with labels; the label names are the same in every sample of a family.
    pub fn new<const N: usize>(labels: [(&'static str, &str); N], value: V) -> Self {
        Self { labels: labels.map(|(name, value)| (name, value.to_owned())).into(), value }
    }
}

type Read<V> = Box<dyn Fn() -> Vec<Sample<V>> + Send + Sync>;

enum Values {
    Counters(Read<u64>),
    Gauges(Read<f64>),
}

pub(super) struct Sampler {
    name: &'static str,
    help: &'static str,
    values: Values,
}

impl Sampler {
    pub(super) fn counters(name: &'static str, help: &'static str, read: Read<u64>) -> Self {
        Self { name, help, values: Values::Counters(read) }
    }

    pub(super) fn gauges(name: &'static str, help: &'static str, read: Read<f64>) -> Self {
        Self { name, help, values: Values::Gauges(read) }
    }
}

impl fmt::Debug for Sampler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sampler").field("name", &self.name).finish_non_exhaustive()
    }
}

struct Labels<'a>(&'a [(&'static str, String)]);

impl EncodeLabelSet for Labels<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(name, value)| (*name, value.as_str()).encode(encoder.encode_label()))
    }
}

impl Collector for Sampler {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        match &self.values {
            Values::Counters(read) => {
                let mut family =
                    encoder.encode_descriptor(self.name, self.help, None, MetricType::Counter)?;
                each(&mut family, &read(), |m, v| m.encode_counter::<NoLabelSet, _, u64>(v, None))
            }
            Values::Gauges(read) => {
                let mut family = encoder.encode_descriptor(self.name, self.help, None, MetricType::Gauge)?;
                each(&mut family, &read(), |m, v| m.encode_gauge(v))
            }
        }
    }
}

fn each<V>(
    family: &mut MetricEncoder<'_>,
    samples: &[Sample<V>],
    encode: impl Fn(&mut MetricEncoder<'_>, &V) -> fmt::Result,
) -> fmt::Result {
    samples.iter().take(Sample::<V>::MAX).try_for_each(|s| {
        if s.labels.is_empty() {
            // An empty family would be written as `name{}`.
            encode(family, &s.value)
        } else {
            encode(&mut family.encode_family(&Labels(&s.labels))?, &s.value)
        }
    })
}
