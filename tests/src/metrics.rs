//! Reading the daemons' metrics endpoints.

use anyhow::{Context, Result, bail};
use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

/// One sample of a scrape.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Metric name with its suffix.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Value.
    pub value: f64,
}

/// All samples of one scrape.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scrape(pub Vec<Sample>);

impl Scrape {
    /// Parses the OpenMetrics text form.
    pub fn parse(text: &str) -> Result<Self> {
        let mut samples = Vec::new();
        for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            samples.push(sample(line).with_context(|| format!("metrics line {line:?}"))?);
        }
        Ok(Self(samples))
    }

    /// Samples of one metric whose labels contain all of `labels`.
    pub fn matching<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a Sample> + 'a {
        self.0.iter().filter(move |sample| {
            sample.name == name
                && labels.iter().all(|(key, value)| sample.labels.get(*key).is_some_and(|have| have == value))
        })
    }

    /// The sum of [`Self::matching`].
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.matching(name, labels).map(|sample| sample.value).sum()
    }
}

fn sample(line: &str) -> Option<Sample> {
    let mut labels = BTreeMap::new();
    let (name, rest) = match line.split_once('{') {
        None => line.split_once(' ')?,
        Some((name, mut rest)) => {
            while !rest.starts_with('}') {
                let (key, after) = rest.split_once("=\"")?;
                let (value, after) = quoted(after)?;
                labels.insert(key.to_owned(), value);
                rest = after.strip_prefix(',').unwrap_or(after);
            }
            (name, rest[1..].trim_start())
        }
    };
    let value = rest.split(' ').next()?.parse().ok()?;
    Some(Sample { name: name.to_owned(), labels, value })
}

/// Reads up to the closing quote; returns the unescaped text and what follows the quote.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut out = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((out, &text[at + 1..])),
            '\\' => match chars.next()?.1 {
                'n' => out.push('\n'),
                other => out.push(other),
            },
            other => out.push(other),
        }
    }
    None
}

/// GET of a path over HTTP/1.1 in the current network namespace: status and body. A minimal client, since the only
/// peers are our own endpoints.
pub fn http_get(addr: SocketAddr, path: &str) -> Result<(u16, String)> {
    let timeout = Duration::from_secs(5);
    let mut stream =
        TcpStream::connect_timeout(&addr, timeout).with_context(|| format!("connect to {addr}"))?;
    stream.set_read_timeout(Some(timeout))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {addr}\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(16 << 20).read_to_string(&mut answer)?;
    let Some((head, body)) = answer.split_once("\r\n\r\n") else {
        bail!("no HTTP answer from {addr}: {answer:?}")
    };
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("status line")?;
    Ok((status, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_and_sums() {
        let text = "# TYPE a counter\na_total{x=\"1\",y=\"q\\\"u\"} 3\na_total{x=\"2\",y=\"z\"} 4 1.5\nb 0.5\n# EOF\n";
        let scrape = Scrape::parse(text).unwrap();
        assert_eq!(scrape.sum("a_total", &[]), 7.0);
        assert_eq!(scrape.sum("a_total", &[("x", "2")]), 4.0);
        assert_eq!(scrape.0[0].labels["y"], "q\"u");
        assert_eq!(scrape.sum("b", &[]), 0.5);
        assert!(Scrape::parse("a{x=\"1\" 3").is_err());
    }
}
