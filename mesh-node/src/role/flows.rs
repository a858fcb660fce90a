//! The live connections between pods of this node that the kernel carries: the daemon said yes to them once, and
//! watches that it would say so still.
//!
//! After every change that a verdict could depend on, a new generation of verdicts begins, then the live connections
//! are judged by the policies that are in force now, as the daemon does with those that it carries itself. Who the ends
//! are is remembered with a connection: a pod that leaves the mesh keeps what it has established, and a successor with
//! the same address is not mistaken for it. Deliberately absent: giving verdicts, which is `outbound`'s.

use crate::{
    bpf::{LocalFlow, Verdicts},
    inbound::{Denied, POLICY_ON_ITS_WAY, Permit},
    local::{LocalPod, Locals},
    metrics::Metrics,
};
use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

/// How often connections are looked for whose sockets are gone.
const SWEEP: Duration = Duration::from_secs(30);
/// Connections looked at in one sweep.
const SWEEP_MOST: usize = 4096;
/// How long connections of a predecessor wait for their client to be captured again before it counts as a stranger.
const SETTLED: Duration = Duration::from_secs(60);

/// A connection by its ends and its beginning, since ends may be used again.
type Key = (SocketAddr, SocketAddr, u64);

/// The pods at the ends, as far as they are known.
#[derive(Debug, Default)]
struct Ends {
    client: Option<Arc<LocalPod>>,
    server: Option<Arc<LocalPod>>,
}

/// Watches the live connections; owned by the reconcile thread.
pub struct LocalFlows {
    verdicts: Verdicts,
    metrics: Arc<Metrics>,
    /// As large as the kernel's table at most: what is not there any more is dropped.
    known: HashMap<Key, Ends>,
    started: Instant,
    swept: Instant,
    cursor: usize,
    /// A generation that should have begun and could not.
    owed: bool,
    /// Since when a policy is missing that live connections wait for.
    unsettled: Option<Instant>,
}

impl LocalFlows {
    /// Nothing known yet.
    pub fn new(verdicts: Verdicts, metrics: Arc<Metrics>) -> Self {
        let now = Instant::now();
        Self {
            verdicts,
            metrics,
            known: HashMap::new(),
            started: now,
            swept: now,
            cursor: 0,
            owed: false,
            unsettled: None,
        }
    }

    /// To be called when policies or captured pods have changed and are published: ends all verdicts, and the live
    /// connections that are forbidden now. `before` is how the captured pods were.
    pub fn changed(&mut self, before: &Locals, now: &Locals) {
        let generation = match self.verdicts.bump() {
            Ok(generation) => generation,
            Err(error) => {
                tracing::error!(%error, "the verdicts could not be ended; trying again");
                self.owed = true;
                return;
            }
        };
        self.owed = false;
        self.metrics.fast_path.generations.inc();
        // Read after the new generation has begun: older ones grow no more.
        if let Some(flows) = self.list() {
            self.learn(&flows, before, now, generation);
            self.judge(&flows, now);
        }
    }

    /// To be called now and then.
    pub fn tick(&mut self, now: &Locals) {
        if self.owed {
            self.changed(now, now);
        }
        let waited = self.unsettled.is_some_and(|since| since.elapsed() >= POLICY_ON_ITS_WAY);
        let sweep = self.swept.elapsed() >= SWEEP;
        if !sweep && !waited {
            return;
        }
        if let Some(flows) = self.list() {
            self.learn(&flows, now, now, u64::MAX);
            self.judge(&flows, now);
            if sweep {
                self.swept = Instant::now();
                self.forget_dead(&flows);
            }
        }
    }

    fn list(&self) -> Option<Vec<LocalFlow>> {
        match self.verdicts.flows() {
            Ok(flows) => Some(flows),
            Err(error) => {
                tracing::warn!(%error, "the live connections between pods of this node cannot be read");
                None
            }
        }
    }

    /// Finds out who the ends of new connections are: of those that began before the change, by the pods of before.
    fn learn(&mut self, flows: &[LocalFlow], before: &Locals, now: &Locals, generation: u64) {
        let mut known = HashMap::with_capacity(flows.len());
        for flow in flows {
            let mut ends = self.known.remove(&key(flow)).unwrap_or_default();
            let then = if flow.generation < generation { before } else { now };
            // A cookie is never used again, so that any pod with it is the client.
            let client = || now.by_cookie(flow.cookie).or_else(|| then.by_cookie(flow.cookie));
            ends.client = ends.client.or_else(|| client().cloned());
            let server = || then.by_addr(&flow.server.ip()).or_else(|| now.by_addr(&flow.server.ip()));
            ends.server = ends.server.or_else(|| server().cloned());
            known.insert(key(flow), ends);
        }
        self.known = known;
        self.metrics.fast_path.live.set(i64::try_from(flows.len()).unwrap_or(i64::MAX));
    }

    fn judge(&mut self, flows: &[LocalFlow], now: &Locals) {
        let mut unsettled = false;
        let waited = self.unsettled.is_some_and(|since| since.elapsed() >= POLICY_ON_ITS_WAY);
        for flow in flows {
            let Some(ends) = self.known.get(&key(flow)) else { continue };
            let Some(forbidden) = self.forbidden(flow, ends, now) else { continue };
            if forbidden.unsettled && !waited {
                unsettled = true;
            } else {
                self.end(flow, ends, &forbidden.to_string());
            }
        }
        self.unsettled = if unsettled { self.unsettled.or_else(|| Some(Instant::now())) } else { None };
    }

    fn forbidden(&self, flow: &LocalFlow, ends: &Ends, now: &Locals) -> Option<Denied> {
        // A pod that has left the mesh keeps its connections, and nothing protects it any more.
        let captured = now.by_addr(&flow.server.ip())?;
        let server = ends.server.as_ref()?;
        if captured.cookie != server.cookie {
            let by = "the address having passed to another pod".to_owned();
            return Some(Denied { by, plaintext: false, unsettled: false });
        }
        if ends.client.is_none() && self.started.elapsed() < SETTLED {
            return None;
        }
        let source = ends.client.as_ref().map(|pod| &pod.identity);
        Permit::check(captured, source, flow.client, flow.server).err()
    }

    fn end(&self, flow: &LocalFlow, ends: &Ends, why: &str) {
        match destroy(flow, ends) {
            Ok(true) => {
                self.metrics.fast_path.destroyed.inc();
                let name = |pod: &Option<Arc<LocalPod>>| {
                    pod.as_ref().map(|pod| pod.name.to_string()).unwrap_or_default()
                };
                tracing::warn!(
                    target: "access",
                    direction = "outbound",
                    src.addr = %flow.client,
                    src.workload = name(&ends.client),
                    dst.addr = %flow.server,
                    dst.workload = name(&ends.server),
                    dialled = %flow.dialled,
                    security = "node_local",
                    flags = "RBAC",
                    error = why,
                    "connection ended"
                );
            }
            Ok(false) => {}
            Err(error) => {
                tracing::error!(src = %flow.client, dst = %flow.server, %error, why, "a connection cannot be ended");
            }
        }
    }

    fn forget_dead(&mut self, flows: &[LocalFlow]) {
        let from = if self.cursor < flows.len() { self.cursor } else { 0 };
        let part = &flows[from..flows.len().min(from + SWEEP_MOST)];
        self.cursor = from + part.len();
        let mut by_client: HashMap<u64, Vec<&LocalFlow>> = HashMap::new();
        for flow in part {
            by_client.entry(flow.cookie).or_default().push(flow);
        }
        for flows in by_client.into_values() {
            let ends = flows.first().and_then(|flow| self.known.get(&key(flow)));
            let Some(client) = ends.and_then(|ends| ends.client.as_ref()) else { continue };
            if let Err(error) = self.forget_dead_of(client, &flows) {
                tracing::warn!(pod = %client.name, %error, "the sockets of a pod cannot be read");
            }
        }
    }

    fn forget_dead_of(&self, client: &LocalPod, flows: &[&LocalFlow]) -> io::Result<()> {
        let diag = client.netns.diag()?;
        for flow in flows {
            if diag.tcp(flow.client, flow.server)?.is_none() {
                self.verdicts.forget(flow)?;
                self.metrics.fast_path.forgotten.inc();
            }
        }
        Ok(())
    }
}

fn key(flow: &LocalFlow) -> Key {
    (flow.client, flow.server, flow.opened_ns)
}

/// Ends the client's socket, which resets the server's; or the server's where the client cannot be reached.
fn destroy(flow: &LocalFlow, ends: &Ends) -> io::Result<bool> {
    let sides = [(&ends.client, flow.client, flow.server), (&ends.server, flow.server, flow.client)];
    for (pod, local, remote) in sides {
        let Some(pod) = pod else { continue };
        let diag = pod.netns.diag()?;
        if let Some(socket) = diag.tcp(local, remote)?
            && diag.destroy(&socket)?
        {
            return Ok(true);
        }
    }
    Ok(false)
}
