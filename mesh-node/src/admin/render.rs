//! The overview as text, within [`WIDTH`] columns.

use super::Status;
use std::fmt::Write;

/// Longest line that is written; longer values are cut, with an ellipsis.
pub const WIDTH: usize = 100;

/// The overview, one fact per line, what is wrong first.
pub fn status(s: &Status) -> String {
    let mut out = Page::default();
    let state = if s.not_ready.is_empty() { "ready" } else { "NOT READY" };
    out.line(&format!(
        "node {}: {state}; mesh-node {}, up {}",
        s.node,
        s.version,
        duration(s.uptime_seconds)
    ));
    for reason in &s.not_ready {
        out.line(&format!("  - {reason}"));
    }
    let xds = &s.xds;
    let updated = xds
        .last_update_seconds
        .map_or("no update yet".to_owned(), |t| format!("last update {} ago", duration(t)));
    let link = if xds.connected { "connected" } else { "NOT CONNECTED" };
    out.line(&format!("control plane {}: {link}, {updated}", xds.address));
    if !xds.error.is_empty() {
        out.line(&format!("  - {}", xds.error));
    }
    if !xds.note.is_empty() {
        out.line(&format!("  - {}", xds.note));
    }
    for rejected in &xds.rejected {
        out.line(&format!("  - refused {}: {}", rejected.name, rejected.error));
    }
    let w = &s.world;
    out.line(&format!("world: {} workloads, {} services, {} policies", w.workloads, w.services, w.policies));
    out.line(if s.bpf.in_step { "BPF: in step" } else { "BPF: NOT IN STEP" });
    if !s.bpf.error.is_empty() {
        out.line(&format!("  - {}", s.bpf.error));
    }
    for counter in s.bpf.counters.iter().filter(|c| c.value > 0) {
        out.line(&format!("  {:>14}  {}", counter.value, counter.name));
    }
    if s.refusals.iter().any(|c| c.value > 0) {
        out.line("refused connections:");
        for counter in s.refusals.iter().filter(|c| c.value > 0) {
            out.line(&format!("  {:>14}  {}", counter.value, counter.name));
        }
    }
    out.line(&format!("pods in the mesh: {}", s.enrolled.len()));
    if !s.enrolled.is_empty() {
        let mut rows =
            vec![["POD", "CERTIFICATE", "CONNECTIONS", "IDENTITY", "ADDRESSES"].map(str::to_owned)];
        for pod in &s.enrolled {
            let certificate = match &pod.certificate {
                None => "none".to_owned(),
                Some(c) if c.expires_in_seconds <= 0 => "EXPIRED".to_owned(),
                Some(c) if !c.error.is_empty() => {
                    format!("{} (renewal fails)", duration(c.expires_in_seconds.unsigned_abs()))
                }
                Some(c) => duration(c.expires_in_seconds.unsigned_abs()),
            };
            rows.push([
                format!("{}/{}", pod.namespace, pod.name),
                certificate,
                pod.connections.to_string(),
                // Without the scheme, which is the same for all, as Istio writes principals.
                pod.identity.strip_prefix("spiffe://").unwrap_or(&pod.identity).to_owned(),
                pod.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
            ]);
        }
        out.table(&rows);
    }
    let (errors, left): (Vec<_>, Vec<_>) = s.others.iter().partition(|pod| pod.error);
    for (title, pods) in [("pods that are NOT captured but should be", errors), ("other pods", left)] {
        if !pods.is_empty() {
            out.line(&format!("{title}: {}", pods.len()));
            for pod in pods {
                out.line(&format!("  {}: {}", pod.pod, pod.reason));
            }
        }
    }
    out.0
}

#[derive(Default)]
struct Page(String);

impl Page {
    fn line(&mut self, text: &str) {
        // Names come from elsewhere: a newline in one must not look like a line of ours, nor an escape
        // sequence reach the terminal.
        let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        if text.chars().count() <= WIDTH {
            let _ = writeln!(self.0, "{}", text.trim_end());
        } else {
            let cut: String = text.chars().take(WIDTH - 1).collect();
            let _ = writeln!(self.0, "{cut}\u{2026}");
        }
    }

    /// Rows with columns of equal width, each row's last cell as long as it is.
    fn table<const N: usize>(&mut self, rows: &[[String; N]]) {
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; N] = std::array::from_fn(width);
        for row in rows {
            let mut text = String::new();
            for (cell, width) in row.iter().zip(widths) {
                let _ = write!(text, "  {cell:<width$}");
            }
            self.line(&text);
        }
    }
}

/// A time in its two largest units.
pub fn duration(seconds: u64) -> String {
    let (d, h, m, s) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    match (d, h, m) {
        (0, 0, 0) => format!("{s}s"),
        (0, 0, _) => format!("{m}m{s}s"),
        (0, ..) => format!("{h}h{m}m"),
        _ => format!("{d}d{h}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::{
        BpfStatus, CertificateStatus, Counter, EnrolledPod, OtherPod, RejectedResource, XdsStatus,
    };

    fn sample() -> Status {
        let pod = |name: &str, certificate| EnrolledPod {
            namespace: "shop".into(),
            name: name.into(),
            addresses: vec!["10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap()],
            identity: "spiffe://cluster.local/ns/shop/sa/cart".into(),
            certificate,
            connections: 12,
            ..EnrolledPod::default()
        };
        Status {
            node: "node-a".into(),
            version: "0.1.0".into(),
            uptime_seconds: 3723,
            not_ready: vec!["the control plane has not told everything yet".into()],
            xds: XdsStatus {
                address: "mesh-control:15012".into(),
                error: "connection refused".into(),
                rejected: vec![RejectedResource {
                    name: "shop/bad".into(),
                    error: "no\nrules \u{1b}[31m".into(),
                }],
                ..XdsStatus::default()
            },
            bpf: BpfStatus {
                in_step: true,
                counters: vec![
                    Counter { name: "direct".into(), value: 41 },
                    Counter { name: "denied".into(), value: 0 },
                ],
                ..BpfStatus::default()
            },
            enrolled: vec![
                pod("cart", Some(CertificateStatus { expires_in_seconds: 43_300, error: String::new() })),
                pod(
                    "a-pod-with-a-long-name",
                    Some(CertificateStatus { expires_in_seconds: -1, error: String::new() }),
                ),
                pod("new", None),
            ],
            others: vec![
                OtherPod { pod: "shop/busy".into(), reason: "10.0.0.9:15008 is in use".into(), error: true },
                OtherPod { pod: "plain/web".into(), reason: "not in the mesh".into(), error: false },
            ],
            ..Status::default()
        }
    }

    #[test]
    fn says_what_is_wrong_and_fits() {
        let text = status(&sample());
        for part in [
            "node node-a: NOT READY; mesh-node 0.1.0, up 1h2m\n",
            "  - the control plane has not told everything yet\n",
            "control plane mesh-control:15012: NOT CONNECTED, no update yet\n",
            "  - connection refused\n",
            "  - refused shop/bad: no rules  [31m\n",
            "              41  direct\n",
            "pods in the mesh: 3\n",
            "  shop/cart                    12h1m        12           cluster.local/ns/shop/sa/cart",
            "EXPIRED",
            "pods that are NOT captured but should be: 1\n  shop/busy: 10.0.0.9:15008 is in use\n",
            "other pods: 1\n  plain/web: not in the mesh\n",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
        assert!(!text.contains("denied"), "a zero is shown:\n{text}");
        assert!(text.lines().all(|l| l.chars().count() <= WIDTH), "{text}");
        assert!(text.contains('\u{2026}'), "the long line is not cut:\n{text}");
    }

    #[test]
    fn durations() {
        for (seconds, expected) in
            [(0, "0s"), (59, "59s"), (60, "1m0s"), (3600, "1h0m"), (86_399, "23h59m"), (90_000, "1d1h")]
        {
            assert_eq!(duration(seconds), expected);
        }
    }
}
