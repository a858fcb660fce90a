//! One record per connection: what is counted and logged when it opens, ends or is refused.
//!
//! Handlers fill in [`Ends`] as they learn them and end with exactly one [`Connection::finish`]; a connection that is
//! dropped without it (a task that was aborted) still counts as closed. Deliberately absent: decisions.

use crate::{
    l4::CopyEnd,
    metrics::{Direction, Metrics, Reporter, Security, ServiceLabels, TcpLabels, WorkloadLabels},
};
use mesh_xds::model::{Service, SpiffeId, Workload};
use std::{net::SocketAddr, sync::Arc, time::Instant};

/// What is known of the two ends of a connection.
#[derive(Clone, Debug, Default)]
pub struct Ends {
    /// The client's address.
    pub client: Option<SocketAddr>,
    /// The client's workload.
    pub source: Option<Arc<Workload>>,
    /// The client's identity, proven by TLS or by the kernel.
    pub source_id: Option<SpiffeId>,
    /// The address that is dialled in the end.
    pub server: Option<SocketAddr>,
    /// The workload there.
    pub destination: Option<Arc<Workload>>,
    /// Its identity, proven by TLS or by the kernel.
    pub destination_id: Option<SpiffeId>,
    /// The service that was dialled.
    pub service: Option<Arc<Service>>,
    /// How the bytes are protected.
    pub security: Security,
}

impl Ends {
    /// The metric labels.
    pub fn labels(&self, reporter: Reporter, response_flags: &'static str) -> TcpLabels {
        TcpLabels {
            reporter,
            source: workload_labels(self.source.as_deref(), self.source_id.as_ref()),
            destination: workload_labels(self.destination.as_deref(), self.destination_id.as_ref()),
            service: service_labels(self.service.as_deref()),
            security: self.security,
            response_flags,
        }
    }
}

fn workload_labels(workload: Option<&Workload>, id: Option<&SpiffeId>) -> Arc<WorkloadLabels> {
    let principal = id.map(ToString::to_string).unwrap_or_default();
    let Some(w) = workload else {
        return Arc::new(WorkloadLabels { principal, ..WorkloadLabels::default() });
    };
    Arc::new(WorkloadLabels {
        workload: w.workload_name.clone(),
        namespace: w.name.namespace.clone(),
        principal,
        canonical_service: w.canonical_name.clone(),
        canonical_revision: w.canonical_revision.clone(),
        app: w.canonical_name.clone(),
        version: w.canonical_revision.clone(),
        cluster: w.cluster_id.clone(),
    })
}

fn service_labels(service: Option<&Service>) -> Arc<ServiceLabels> {
    Arc::new(service.map_or_else(ServiceLabels::default, |s| ServiceLabels {
        host: s.hostname.clone(),
        name: s.name.name.clone(),
        namespace: s.name.namespace.clone(),
    }))
}

/// How a connection ended, for Envoy's response flags and for the log.
#[derive(Clone, Debug)]
pub struct End {
    /// Envoy's response flag: `-`, `UF` (cannot connect), `UH` (no endpoint), `NR` (no route), `UC`/`DC` (a side
    /// broke off), `RBAC` (denied, as Istio's ztunnel has no letter for it either).
    pub flags: &'static str,
    /// A stable word for the refusal metric; `None` when nothing was refused.
    pub refusal: Option<&'static str>,
    /// The error with its causes, for the log; empty when there is none.
    pub error: String,
}

impl End {
    /// Ended as it should.
    pub fn clean() -> Self {
        Self { flags: "-", refusal: None, error: String::new() }
    }

    /// Broken off after it was established.
    pub fn broken(flags: &'static str, error: impl Into<String>) -> Self {
        Self { flags, refusal: None, error: error.into() }
    }

    /// How a copy ended.
    pub fn of_copy(end: &CopyEnd) -> Self {
        match end {
            CopyEnd::Clean => Self::clean(),
            CopyEnd::ResetByClient | CopyEnd::ClientError(_) => Self::broken("DC", end.to_string()),
            CopyEnd::ResetByServer | CopyEnd::ServerError(_) => Self::broken("UC", end.to_string()),
            CopyEnd::Revoked => Self::broken("RBAC", "a policy that forbids the connection came into force"),
            CopyEnd::Deadline => Self::broken("DC", "the daemon stopped"),
            CopyEnd::Overloaded => Self::broken("UO", "the pod holds too much for readers that do not read"),
        }
    }

    /// Refused before a byte was forwarded.
    pub fn refused(flags: &'static str, reason: &'static str, error: impl Into<String>) -> Self {
        Self { flags, refusal: Some(reason), error: error.into() }
    }
}

/// Display of an error and all its causes on one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

/// A connection from its first byte to its record.
#[derive(Debug)]
pub struct Connection {
    metrics: Arc<Metrics>,
    direction: Direction,
    started: Instant,
    /// What is known so far.
    pub ends: Ends,
    finished: bool,
}

impl Connection {
    /// Begins a record. Nothing is counted yet: the labels are not known.
    pub fn begin(metrics: Arc<Metrics>, direction: Direction, ends: Ends) -> Self {
        Self { metrics, direction, started: Instant::now(), ends, finished: false }
    }

    fn reporter(&self) -> Reporter {
        match self.direction {
            Direction::Outbound => Reporter::Source,
            Direction::Inbound => Reporter::Destination,
        }
    }

    /// Counts the connection as opened. `sent` and `received` in [`Connection::finish`] follow it.
    pub fn opened(&self) {
        self.metrics.tcp_opened(&self.ends.labels(self.reporter(), "-"));
    }

    /// Writes the one record: `sent` bytes went from the server to the client, `received` from the client to it.
    pub fn finish(mut self, end: &End, sent: u64, received: u64) {
        self.record(end, sent, received);
    }

    fn record(&mut self, end: &End, sent: u64, received: u64) {
        self.finished = true;
        if let Some(reason) = end.refusal {
            self.metrics.refused(self.direction, reason);
            // A refused connection was opened by the client all the same; Istio counts both as well.
            self.metrics.tcp_opened(&self.ends.labels(self.reporter(), end.flags));
        }
        // Opened and closed share a label set unless the end is worth telling apart.
        self.metrics.tcp_closed(&self.ends.labels(self.reporter(), end.flags), sent, received);
        let ends = &self.ends;
        let show = |addr: Option<SocketAddr>| addr.map(|a| a.to_string()).unwrap_or_default();
        let id = |id: &Option<SpiffeId>| id.as_ref().map(ToString::to_string).unwrap_or_default();
        let name = |w: &Option<Arc<Workload>>| w.as_ref().map(|w| w.name.to_string()).unwrap_or_default();
        let service = ends.service.as_ref().map_or("", |s| s.hostname.as_str());
        macro_rules! log {
            ($level:ident) => {
                tracing::$level!(
                    target: "access",
                    direction = self.direction.as_str(),
                    src.addr = %show(ends.client),
                    src.workload = %name(&ends.source),
                    src.identity = %id(&ends.source_id),
                    dst.addr = %show(ends.server),
                    dst.workload = %name(&ends.destination),
                    dst.identity = %id(&ends.destination_id),
                    dst.service = service,
                    security = ends.security.as_str(),
                    flags = end.flags,
                    reason = end.refusal.unwrap_or(""),
                    bytes_sent = sent,
                    bytes_received = received,
                    duration_ms = self.started.elapsed().as_millis() as u64,
                    error = %end.error,
                    "connection"
                )
            };
        }
        match end.refusal {
            Some(_) => log!(warn),
            None => log!(info),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.finished {
            self.record(&End::broken("DC", "the daemon gave the connection up"), 0, 0);
        }
    }
}
