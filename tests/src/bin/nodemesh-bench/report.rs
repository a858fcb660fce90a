//! Rows: what a benchmark writes as JSON, prints as a table and puts into the documentation.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::{fmt::Write as _, fs, path::Path};

/// One figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    /// The path, or what was measured.
    pub(crate) scenario: String,
    /// The metric.
    pub(crate) metric: String,
    /// Its unit; of a row without figures, why there are none.
    pub(crate) unit: String,
    /// Over the rounds; `None` when it could not be measured.
    pub(crate) median: Option<f64>,
    /// The smallest of the rounds.
    pub(crate) min: Option<f64>,
    /// The largest.
    pub(crate) max: Option<f64>,
    /// How many there were.
    pub(crate) rounds: usize,
    /// The scenario that it is compared with.
    pub(crate) baseline: Option<String>,
    /// The median, over the rounds, of the figure divided by the baseline's of the same round.
    pub(crate) ratio: Option<f64>,
}

impl Row {
    /// A row over the values of its rounds. `base` has the baseline's values by round.
    pub(crate) fn new(
        scenario: &str,
        metric: &str,
        unit: &str,
        values: &[Option<f64>],
        base: Option<(&str, &[Option<f64>])>,
    ) -> Self {
        let have: Vec<f64> = values.iter().flatten().copied().collect();
        let ratio = base.and_then(|(_, base)| {
            let pairs = values.iter().zip(base);
            median(
                pairs
                    .filter_map(|(value, base)| Some((*value)? / (*base)?))
                    .filter(|r| r.is_finite())
                    .collect(),
            )
        });
        Self {
            scenario: scenario.to_owned(),
            metric: metric.to_owned(),
            unit: unit.to_owned(),
            median: median(have.clone()),
            min: have.iter().copied().reduce(f64::min),
            max: have.iter().copied().reduce(f64::max),
            rounds: have.len(),
            baseline: base.map(|(name, _)| name.to_owned()),
            ratio,
        }
    }

    /// A scenario that could not be measured, and why.
    pub(crate) fn missing(scenario: &str, why: &anyhow::Error) -> Self {
        let mut row = Self::new(scenario, "missing", &format!("{why:#}"), &[], None);
        row.unit = row.unit.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(300).collect();
        row
    }
}

/// The median; of an even number, the mean of the two in the middle.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    match n {
        0 => None,
        _ if n % 2 == 1 => Some(values[n / 2]),
        _ => Some((values[n / 2 - 1] + values[n / 2]) / 2.0),
    }
}

/// Writes the rows as `NAME.json`.
pub(crate) fn write_json(dir: &Path, name: &str, rows: &[Row]) -> Result<()> {
    fs::create_dir_all(dir)?;
    let path = dir.join(format!("{name}.json"));
    fs::write(&path, serde_json::to_string_pretty(rows)? + "\n").with_context(|| path.display().to_string())
}

/// Three significant digits.
pub(crate) fn number(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

fn cells(row: &Row) -> [String; 8] {
    let show = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), number);
    [
        row.metric.clone(),
        row.scenario.clone(),
        show(row.median),
        row.unit.clone(),
        format!("{} .. {}", show(row.min), show(row.max)),
        row.rounds.to_string(),
        row.ratio.map_or_else(String::new, |ratio| format!("{ratio:.3}")),
        row.baseline.clone().unwrap_or_default(),
    ]
}

const HEAD: [&str; 8] = ["metric", "scenario", "median", "unit", "min .. max", "rounds", "ratio", "to"];

/// The rows as text, for a terminal.
pub(crate) fn table(rows: &[Row]) -> String {
    let lines: Vec<[String; 8]> =
        std::iter::once(HEAD.map(str::to_owned)).chain(rows.iter().map(cells)).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].len()).max().unwrap_or(0).min(40);
    let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
    let mut text = String::new();
    let mut last = "";
    for line in &lines {
        if line[0] != last && !last.is_empty() {
            text.push('\n');
        }
        last = &line[0];
        for (column, cell) in line.iter().enumerate() {
            let width = widths[column];
            let _ = match column {
                2 | 5 | 6 => write!(text, "{cell:>width$}  "),
                _ => write!(text, "{cell:<width$}  "),
            };
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

/// The rows as a Markdown table.
pub(crate) fn markdown(rows: &[Row]) -> String {
    let mut text = format!("| {} |\n|---|---|---:|---|---|---:|---:|---|\n", HEAD.join(" | "));
    for row in rows {
        let _ = writeln!(text, "| {} |", cells(row).map(|cell| cell.replace('|', "/")).join(" | "));
    }
    text
}

/// Puts `section` between the markers of benchmark `name` in a Markdown file.
pub(crate) fn update_docs(path: &Path, name: &str, section: &str) -> Result<()> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let text = replace_section(&text, name, section)
        .with_context(|| format!("{} has no section between the markers of {name}", path.display()))?;
    Ok(fs::write(path, text)?)
}

fn replace_section(text: &str, name: &str, section: &str) -> Option<String> {
    let (begin, end) =
        (format!("<!-- {name}: generated, begin -->"), format!("<!-- {name}: generated, end -->"));
    let from = text.find(&begin)? + begin.len();
    let to = from + text[from..].find(&end)?;
    Some(format!("{}\n\n{}\n\n{}", &text[..from], section.trim(), &text[to..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_round_by_round() {
        let row = Row::new(
            "a",
            "m",
            "us",
            &[Some(2.0), Some(30.0), None],
            Some(("b", &[Some(1.0), Some(10.0), Some(1.0)])),
        );
        assert_eq!(row.median, Some(16.0));
        assert_eq!((row.min, row.max, row.rounds), (Some(2.0), Some(30.0), 2));
        assert_eq!(row.ratio, Some(2.5));
        assert_eq!(Row::new("a", "m", "us", &[None], None).median, None);
        // A baseline of nothing is no ratio, not an infinite one.
        assert_eq!(Row::new("a", "m", "us", &[Some(1.0)], Some(("b", &[Some(0.0)]))).ratio, None);
    }

    #[test]
    fn a_missing_peer_is_a_row() {
        let row = Row::missing("envoy", &anyhow::anyhow!("not there\n  more"));
        assert_eq!((row.metric.as_str(), row.unit.as_str(), row.median), ("missing", "not there more", None));
        assert!(table(&[row]).contains("not there"));
    }

    #[test]
    fn the_generated_section_is_replaced_and_the_rest_kept() {
        let text = "a\n<!-- l4: generated, begin -->\nold\n<!-- l4: generated, end -->\nb\n";
        let new = replace_section(text, "l4", "new\n").unwrap();
        assert_eq!(new, "a\n<!-- l4: generated, begin -->\n\nnew\n\n<!-- l4: generated, end -->\nb\n");
        assert_eq!(replace_section(&new, "l4", "new").unwrap(), new);
        assert!(replace_section(text, "l7", "x").is_none());
    }

    #[test]
    fn three_digits() {
        assert_eq!([1234.5, 12.34, 1.234, 0.1234].map(number), ["1234", "12.3", "1.23", "0.123"]);
    }
}
