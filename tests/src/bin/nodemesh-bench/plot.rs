//! The plot: a panel for each of the figures that matter most, a bar for each path.

use crate::report::{Row, number};
use anyhow::{Result, anyhow};
use plotters::prelude::*;
use std::path::Path;

/// Metric, title.
const PANELS: [(&str, &str); 12] = [
    ("connect_p50", "connect() p50, us"),
    ("first_byte_p50", "connect to first byte p50, us"),
    ("close_rate", "new connections per second"),
    ("rtt_1k_c1_p50", "1 KB round trip p50, us"),
    ("rtt_1k_c1_p99", "1 KB round trip p99, us"),
    ("rtt_1k_c32_rate", "1 KB round trips per second, 32 connections"),
    ("rtt_1k_c32_cpu", "proxies' CPU per 1 KB round trip, us"),
    ("bulk_s1_rate", "one stream, Gb/s"),
    ("bulk_s8_rate", "eight streams, Gb/s"),
    ("bulk_s1_cpu", "proxies' CPU seconds per GiB, one stream"),
    ("close_cpu", "proxies' CPU per new connection, us"),
    ("idle_10000_client_side", "KiB per idle connection, client's side"),
];

const COLUMNS: usize = 3;
const PANEL: (u32, u32) = (440, 250);
const LABELS: i32 = 90;

/// Draws the rows that have a panel.
pub(crate) fn draw(path: &Path, title: &str, rows: &[Row]) -> Result<()> {
    let panels: Vec<(&str, Vec<(&str, f64)>)> = PANELS
        .iter()
        .map(|(metric, title)| (*title, bars(rows, metric)))
        .filter(|(_, bars)| !bars.is_empty())
        .collect();
    let lines = panels.len().div_ceil(COLUMNS).max(1);
    let size = (PANEL.0 * COLUMNS as u32, PANEL.1 * lines as u32 + 40);
    let root = SVGBackend::new(path, size).into_drawing_area();
    let failed = |error: &dyn std::fmt::Display| anyhow!("draw {}: {error}", path.display());
    root.fill(&WHITE).map_err(|e| failed(&e))?;
    let root = root.titled(title, ("sans-serif", 20)).map_err(|e| failed(&e))?;
    for (area, (title, bars)) in root.split_evenly((lines, COLUMNS)).iter().zip(&panels) {
        panel(area, title, bars).map_err(|e| failed(&e))?;
    }
    root.present().map_err(|e| failed(&e))
}

/// The values of a metric, one for each path.
fn bars<'a>(rows: &'a [Row], metric: &str) -> Vec<(&'a str, f64)> {
    let mut bars: Vec<(&str, f64)> = Vec::new();
    for row in rows.iter().filter(|row| row.metric == metric) {
        // A path has a row for each baseline, all with the same figure.
        if let Some(value) = row.median.filter(|_| !bars.iter().any(|(name, _)| *name == row.scenario)) {
            bars.push((&row.scenario, value));
        }
    }
    bars
}

fn panel<DB: DrawingBackend>(
    area: &DrawingArea<DB, plotters::coord::Shift>,
    title: &str,
    bars: &[(&str, f64)],
) -> Result<(), DrawingAreaErrorKind<DB::ErrorType>> {
    let area = area.margin(6, 6, 8, 8);
    let area = area.titled(title, ("sans-serif", 15))?;
    let (width, height) = area.dim_in_pixel();
    let largest = bars.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max);
    let step = height as i32 / bars.len().max(1) as i32;
    // Room for the label on the left and the figure on the right.
    let room = f64::from(width as i32 - LABELS - 70);
    for (at, (name, value)) in bars.iter().enumerate() {
        let top = at as i32 * step + 2;
        let bottom = top + (step - 4).clamp(4, 24);
        let end = LABELS + (room * (value.max(0.0) / largest)) as i32;
        let color = if name.starts_with("plain") {
            RGBColor(150, 150, 150)
        } else if ["mtls", "direct", "same", "fast"].contains(name) {
            RGBColor(33, 102, 172)
        } else {
            RGBColor(214, 137, 16)
        };
        area.draw(&Rectangle::new([(LABELS, top), (end, bottom)], color.filled()))?;
        area.draw(&Text::new((*name).to_owned(), (0, top + 2), ("sans-serif", 13)))?;
        area.draw(&Text::new(number(*value), (end + 4, top + 2), ("sans-serif", 13)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_each_path_once() {
        let row = |scenario: &str, base: &'static str| {
            Row::new(scenario, "connect_p50", "us", &[Some(12.0)], Some((base, &[Some(6.0)])))
        };
        let rows = [row("mtls", "plain"), row("mtls", "envoy"), row("direct", "plain")];
        assert_eq!(bars(&rows, "connect_p50"), [("mtls", 12.0), ("direct", 12.0)]);
        let path = std::env::temp_dir().join(format!("nodemesh-plot-{}.svg", std::process::id()));
        draw(&path, "a title", &rows).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(svg.contains("a title") && svg.contains("connect() p50"), "{svg}");
    }
}
