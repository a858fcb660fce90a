//! What the tests share: the quickstart cluster, its addresses, and arithmetic on metrics.

use anyhow::Result;
use mesh_tests::{app::ConnectsReport, cluster::Cluster, fixture::Fixture, metrics::Scrape, wait};
use std::{path::PathBuf, time::Duration};

/// Virtual addresses of the quickstart services, without ports.
pub(crate) mod vip {
    /// Pods cart-0 (node-a), cart-1 and cart-2 (node-b), in the mesh.
    pub(crate) const CART: &str = "10.96.0.10";
    /// UDP port 5300 of the same pods.
    pub(crate) const QUOTES: &str = "10.96.0.11";
    /// UDP port 5300 of the same pods, IPv6.
    pub(crate) const QUOTES_V6: &str = "[fd00:10:96::b]";
    /// Pod db-0 on node-a, in the mesh.
    pub(crate) const DB: &str = "10.96.0.12";
    /// The same, IPv6.
    pub(crate) const DB_V6: &str = "[fd00:10:96::c]";
    /// Pod pay-0 on node-b, in the mesh, STRICT, for `web` only.
    pub(crate) const PAY: &str = "10.96.0.13";
    /// The same, IPv6.
    pub(crate) const PAY_V6: &str = "[fd00:10:96::d]";
    /// Pods ledger-0 (node-a) and ledger-1 (node-b), not in the mesh.
    pub(crate) const LEDGER: &str = "10.96.0.20";
    /// The same, IPv6.
    pub(crate) const LEDGER_V6: &str = "[fd00:10:96::14]";
    /// The same pods with ClientIP affinity.
    pub(crate) const LEDGER_STICKY: &str = "10.96.0.22";
}

/// Metric of opened connections.
pub(crate) const OPENED: &str = "istio_tcp_connections_opened_total";

/// Metric of what the kernel did.
pub(crate) const OUTCOMES: &str = "nodemesh_kernel_outcomes_total";

/// How long a change of the configuration may take until it is in force everywhere.
pub(crate) const PROPAGATION: Duration = Duration::from_secs(10);

/// The directory of the quickstart manifests.
pub(crate) fn quickstart() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples/quickstart")
}

/// The quickstart cluster without any daemon.
pub(crate) fn bare() -> Result<Cluster> {
    Cluster::new(&Fixture::load(&quickstart())?)
}

/// The quickstart cluster with everything running.
pub(crate) fn mesh() -> Result<Cluster> {
    let mut cluster = bare()?;
    cluster.start_mesh(&quickstart())?;
    Ok(cluster)
}

/// Fails with the whole report unless all `n` exchanges were right.
#[track_caller]
pub(crate) fn assert_right(what: &str, report: &ConnectsReport, n: u64) {
    assert!(report.all_right(n), "{what}: {report:#?}");
}

/// A connection that `pod-app hold` keeps busy.
pub(crate) struct Held {
    proc: mesh_tests::proc::Proc,
    alive: PathBuf,
}

impl Held {
    /// Opens it and waits for the first answer. `args` are those of `pod-app hold` without `--while`.
    pub(crate) fn open(cluster: &Cluster, client: &str, name: &str, args: &str) -> Result<Self> {
        let alive = cluster.run.dir().join(format!("{name}.alive"));
        std::fs::write(&alive, "")?;
        let command = format!("hold {args} --while {}", alive.display());
        let words: Vec<&str> = command.split(' ').collect();
        let log = cluster.run.dir().join(format!("{name}.log"));
        let program = mesh_tests::proc::binary("pod-app")?;
        let mut proc = cluster.pod(client)?.place().spawn(name, &program, &words, &log)?;
        proc.until(&format!("{name} to be open"), PROPAGATION, |proc| Ok(proc.log().contains("open")))?;
        Ok(Self { proc: proc.quiet(), alive })
    }

    /// Waits until it was broken off, and returns what the client said.
    pub(crate) fn broken(&mut self, what: &str) -> Result<String> {
        wait::until_true(what, PROPAGATION, || Ok(self.proc.ended()?.is_some()))?;
        let status = self.proc.ended()?;
        anyhow::ensure!(!status.is_some_and(|s| s.success()), "{what}: it ended by itself");
        Ok(self.proc.log())
    }

    /// Ends it; fails if it had not been all right up to now.
    pub(crate) fn finish(mut self, what: &str) -> Result<()> {
        std::fs::remove_file(&self.alive)?;
        wait::until_true(what, PROPAGATION, || Ok(self.proc.ended()?.is_some()))?;
        let status = self.proc.ended()?;
        anyhow::ensure!(status.is_some_and(|s| s.success()), "{what}: {}", self.proc.log());
        Ok(())
    }

    /// Whether it goes on.
    pub(crate) fn lives(&mut self) -> Result<bool> {
        Ok(self.proc.ended()?.is_none())
    }
}

/// Growth of a counter between two scrapes.
pub(crate) fn growth(before: &Scrape, after: &Scrape, name: &str, labels: &[(&str, &str)]) -> f64 {
    after.sum(name, labels) - before.sum(name, labels)
}

/// Waits until refusals with `reason` on `node` have grown since `before`.
pub(crate) fn await_refusal(cluster: &Cluster, node: &str, before: &Scrape, reason: &str) -> Result<()> {
    let labels = [("reason", reason)];
    wait::until_true(&format!("a refusal for {reason} on {node}"), PROPAGATION, || {
        let now = cluster.node(node)?.scrape()?;
        let grown = growth(before, &now, "nodemesh_refusals_total", &labels);
        anyhow::ensure!(grown > 0.0, "refusals so far: {:?}", refusals(before, &now));
        Ok(true)
    })
}

/// Refusals by reason since `before`, for failure messages.
fn refusals(before: &Scrape, now: &Scrape) -> Vec<(String, f64)> {
    now.matching("nodemesh_refusals_total", &[])
        .filter_map(|sample| {
            let labels: Vec<(&str, &str)> =
                sample.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
            let grown = sample.value - before.sum("nodemesh_refusals_total", &labels);
            (grown > 0.0).then(|| (format!("{:?}", sample.labels), grown))
        })
        .collect()
}
