//! The bars to aim for: ratios within one run, and memory.

use crate::report::{Row, number};
use std::fmt::Write;

/// Which way a figure is good.
#[derive(Clone, Copy)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

struct Bar {
    what: &'static str,
    scenario: &'static str,
    metrics: &'static [&'static str],
    /// `None` compares the figure itself; of several metrics the worst counts.
    baseline: Option<&'static str>,
    bound: Bound,
}

const BARS: [Bar; 9] = [
    Bar {
        what: "direct: connect p50 to plain",
        scenario: "direct",
        metrics: &["connect_p50"],
        baseline: Some("plain"),
        bound: Bound::AtMost(1.05),
    },
    Bar {
        what: "direct: one-stream throughput to plain",
        scenario: "direct",
        metrics: &["bulk_s1_rate"],
        baseline: Some("plain"),
        bound: Bound::AtLeast(0.97),
    },
    Bar {
        what: "mTLS: CPU of a 1 KB round trip at 32 connections to the Envoys",
        scenario: "mtls",
        metrics: &["rtt_1k_c32_cpu"],
        baseline: Some("envoy"),
        bound: Bound::AtMost(0.6),
    },
    Bar {
        what: "mTLS: added p50 of a 1 KB round trip to the Envoys",
        scenario: "mtls",
        metrics: &["rtt_1k_c1_added_p50"],
        baseline: Some("envoy"),
        bound: Bound::AtMost(0.7),
    },
    Bar {
        what: "mTLS: one-stream throughput to the Envoys",
        scenario: "mtls",
        metrics: &["bulk_s1_rate"],
        baseline: Some("envoy"),
        bound: Bound::AtLeast(1.0),
    },
    Bar {
        what: "mTLS: CPU per GiB to the Envoys",
        scenario: "mtls",
        metrics: &["bulk_s1_cpu"],
        baseline: Some("envoy"),
        bound: Bound::AtMost(0.8),
    },
    Bar {
        what: "mTLS: requests on a new connection each to plain",
        scenario: "mtls",
        metrics: &["close_rate"],
        baseline: Some("plain"),
        bound: Bound::AtLeast(0.5),
    },
    Bar {
        what: "daemon: MiB of RSS with 50 pods",
        scenario: "mesh-node",
        metrics: &["rss_50_pods"],
        baseline: None,
        bound: Bound::AtMost(15.0),
    },
    Bar {
        what: "daemon: KiB of RSS per idle proxied connection, the larger side",
        scenario: "mtls",
        metrics: &["idle_10000_client_side", "idle_10000_server_side"],
        baseline: None,
        bound: Bound::AtMost(12.0),
    },
];

/// The bars as a Markdown table; those that were not measured say so.
pub(crate) fn table(rows: &[Row]) -> String {
    let mut text = "| bar | aim | measured | |\n|---|---:|---:|---|\n".to_owned();
    for bar in BARS {
        let values = bar.metrics.iter().filter_map(|metric| {
            let of_bar = |row: &&Row| row.scenario == bar.scenario && row.metric == *metric;
            match bar.baseline {
                Some(base) => {
                    rows.iter().filter(of_bar).find(|row| row.baseline.as_deref() == Some(base))?.ratio
                }
                None => rows.iter().find(of_bar)?.median,
            }
        });
        let (aim, worst): (String, Option<f64>) = match bar.bound {
            Bound::AtMost(limit) => (format!("<= {limit}"), values.reduce(f64::max)),
            Bound::AtLeast(limit) => (format!(">= {limit}"), values.reduce(f64::min)),
        };
        let verdict = match (worst, bar.bound) {
            (None, _) => "not measured",
            (Some(value), Bound::AtMost(limit)) if value <= limit => "reached",
            (Some(value), Bound::AtLeast(limit)) if value >= limit => "reached",
            _ => "missed",
        };
        let shown = worst.map_or_else(|| "-".to_owned(), number);
        let _ = writeln!(text, "| {} | {aim} | {shown} | {verdict} |", bar.what);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_take_their_own_baseline_and_the_worse_side() {
        let ratio = |base: &'static str, ratio: f64| {
            Row::new("mtls", "bulk_s1_rate", "Gb/s", &[Some(ratio)], Some((base, &[Some(1.0)])))
        };
        let side = |name: &str, value| Row::new("mtls", name, "KiB", &[Some(value)], None);
        let rows = [
            ratio("plain", 0.2),
            ratio("envoy", 1.5),
            side("idle_10000_client_side", 3.0),
            side("idle_10000_server_side", 13.0),
        ];
        let text = table(&rows);
        assert!(text.contains("one-stream throughput to the Envoys | >= 1 | 1.50 | reached"), "{text}");
        assert!(text.contains("| <= 12 | 13.0 | missed |"), "{text}");
        assert!(text.contains("| <= 0.6 | - | not measured |"), "{text}");
    }
}
