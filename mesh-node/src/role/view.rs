//! The daemon as its admin interface shows it.

use super::{direct::DirectMetrics, kept::ConfigSource, reconcile::InStep, xds::Rejected};
use crate::{
    admin::{
        AdminState, BadRequest, BpfStatus, CertificateStatus, Counter, EnrolledPod, Health, OtherPod,
        RejectedResource, Status, WorldStatus, XdsStatus,
    },
    bpf::Datapath,
    config::Config,
    enroll::{Enroller, Phase},
    identity::CertManager,
    local::SharedLocals,
    metrics::Metrics,
    outcome::chain,
    state::Store,
};
use arc_swap::ArcSwap;
use mesh_common::code::log_level;
use mesh_xds::grpc::AdsStatus;
use serde_json::{Value, json};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Instant, SystemTime},
};
use tokio::sync::watch;
use tracing_subscriber::{EnvFilter, Registry, reload};

/// Changes the log filter at run time.
pub type LogFilter = reload::Handle<EnvFilter, Registry>;

/// What the admin interface reads.
pub struct View {
    /// The configuration.
    pub config: Config,
    /// When the daemon started.
    pub started: Instant,
    /// The world.
    pub store: Arc<Store>,
    /// The captured pods.
    pub locals: SharedLocals,
    /// All pods of this node.
    pub enroller: Arc<Enroller<super::mesh::NodeMesh>>,
    /// Identities.
    pub certs: Arc<CertManager>,
    /// The kernel.
    pub datapath: Arc<Mutex<Datapath>>,
    /// Whether it is in step.
    pub in_step: Arc<ArcSwap<InStep>>,
    /// The control plane.
    pub ads: watch::Receiver<AdsStatus>,
    /// Where the configuration is from.
    pub source: ConfigSource,
    /// Whether there is a whole configuration.
    pub synced: Arc<AtomicBool>,
    /// Refused resources.
    pub rejected: Rejected,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Direct connections.
    pub direct: DirectMetrics,
    /// The log filter.
    pub log: LogFilter,
}

impl View {
    fn datapath(&self) -> std::sync::MutexGuard<'_, Datapath> {
        self.datapath.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what the kernel counted of direct connections into the metrics.
    pub fn count_direct(&self) {
        let rows = self.datapath().direct_stats();
        match rows {
            Ok(rows) => {
                self.direct.count(&rows);
                if let Err(error) = self.datapath().forget_direct_stats(&rows) {
                    tracing::warn!(error = %chain(&error), "rows of direct connections stay in the kernel");
                }
            }
            Err(error) => tracing::warn!(error = %chain(&error), "direct connections cannot be counted"),
        }
    }

    /// Passes over what the kernel counted for a predecessor, which had it in its own metrics.
    pub fn skip_direct(&self) {
        let rows = self.datapath().direct_stats();
        match rows {
            Ok(rows) => self.direct.skip(&rows),
            Err(error) => tracing::warn!(error = %chain(&error), "direct connections cannot be counted"),
        }
    }

    /// What the maps hold and should hold, by map: rows that the last run left, rows that are there, and the bound.
    fn tables(&self) -> Vec<Value> {
        let in_step = self.in_step.load();
        match self.datapath().tables() {
            Ok(tables) => tables
                .into_iter()
                .map(|(table, actual, capacity)| {
                    let desired = in_step.rows[table.index()];
                    json!({ "map": table.name(), "desired": desired, "actual": actual, "capacity": capacity })
                })
                .collect(),
            Err(error) => vec![json!({ "error": chain(&error) })],
        }
    }

    /// Why the daemon is not ready, if it is not.
    pub fn not_ready(&self) -> Vec<String> {
        let mut why = vec![];
        if !self.synced.load(Ordering::Acquire) {
            why.push("the control plane has not sent the whole configuration yet".to_owned());
        }
        let in_step = self.in_step.load();
        if !in_step.error.is_empty() {
            why.push(format!("the kernel did not take the configuration: {}", in_step.error));
        } else if in_step.generation < self.store.world().generation() {
            why.push("the kernel is being brought in step with the configuration".to_owned());
        }
        why
    }

    /// What the kernel did, by outcome.
    pub fn counters(&self) -> Vec<Counter> {
        let counters = self.datapath().counters().unwrap_or_else(|error| {
            tracing::warn!(error = %chain(&error), "the kernel's counters cannot be read");
            vec![]
        });
        counters.into_iter().map(|(c, value)| Counter { name: c.label().to_owned(), value }).collect()
    }

    /// The captured pods.
    pub fn enrolled(&self) -> Vec<EnrolledPod> {
        let certificates = self.certs.snapshot();
        let now = SystemTime::now();
        let seconds = |at: SystemTime| match at.duration_since(now) {
            Ok(left) => i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            Err(past) => -i64::try_from(past.duration().as_secs()).unwrap_or(i64::MAX),
        };
        let locals = self.locals.load();
        let mut pods: Vec<EnrolledPod> = locals
            .iter()
            .map(|pod| {
                let certificate = certificates.iter().find(|c| c.id == pod.identity);
                EnrolledPod {
                    namespace: pod.name.namespace.clone(),
                    name: pod.name.name.clone(),
                    addresses: pod.addrs.clone(),
                    cookie: pod.cookie,
                    identity: pod.identity.to_string(),
                    certificate: certificate.map(|c| CertificateStatus {
                        expires_in_seconds: c.not_after.map_or(0, seconds),
                        error: c.last_error.clone().unwrap_or_default(),
                    }),
                    connections: pod.connections() as u64,
                }
            })
            .collect();
        pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        pods
    }

    fn others(&self) -> Vec<OtherPod> {
        let others = self.enroller.pods().into_iter().filter_map(|pod| {
            let (reason, error) = match &pod.phase {
                Phase::Captured => return None,
                Phase::Pending => {
                    ("waiting for the control plane to say whether it is in the mesh".to_owned(), false)
                }
                Phase::Left(reason) => (reason.to_string(), false),
                Phase::Failed(error) => (error.clone(), true),
            };
            Some(OtherPod { pod: pod.info.to_string(), reason, error })
        });
        others.collect()
    }
}

impl AdminState for View {
    fn live(&self) -> Health {
        Health::Good
    }

    fn ready(&self) -> Health {
        match self.not_ready() {
            why if why.is_empty() => self.source.note().map_or(Health::Good, Health::GoodBut),
            why => Health::Bad(why),
        }
    }

    fn status(&self) -> Status {
        let (workloads, services, policies) = self.store.world().counts();
        let ads = self.ads.borrow().clone();
        let in_step = self.in_step.load();
        let rejected = self.rejected.load();
        let since = |at: SystemTime| at.elapsed().map(|d| d.as_secs()).unwrap_or(0);
        Status {
            node: self.config.args.node_name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: self.started.elapsed().as_secs(),
            not_ready: self.not_ready(),
            xds: XdsStatus {
                address: self.config.args.xds_address.clone(),
                connected: ads.connected,
                last_update_seconds: ads.last_update.map(since),
                note: self.source.note().unwrap_or_default(),
                rejected: rejected
                    .iter()
                    .map(|(name, error)| RejectedResource { name: name.clone(), error: error.clone() })
                    .collect(),
                error: ads.last_error.unwrap_or_default(),
            },
            world: WorldStatus { workloads, services, policies },
            bpf: BpfStatus {
                in_step: in_step.error.is_empty(),
                error: in_step.error.clone(),
                counters: self.counters().into_iter().filter(|c| c.value > 0).collect(),
            },
            enrolled: self.enrolled(),
            others: self.others(),
            refusals: self
                .metrics
                .refusals()
                .into_iter()
                .map(|((direction, reason), value)| Counter { name: format!("{direction} {reason}"), value })
                .collect(),
        }
    }

    fn dump(&self) -> Value {
        let world = self.store.world();
        let sorted = |mut lines: Vec<Value>| {
            lines.sort_by_cached_key(ToString::to_string);
            lines
        };
        let workloads = world.workloads().map(|w| {
            json!({
                "uid": w.uid, "namespace": w.name.namespace, "name": w.name.name, "addresses": w.addresses,
                "node": w.node, "inMesh": w.in_mesh(), "health": format!("{:?}", w.health),
                "identity": w.identity().map(|id| id.to_string()).unwrap_or_default(),
                "services": w.services.keys().collect::<Vec<_>>(), "policies": w.policies,
                "region": w.locality.region, "zone": w.locality.zone, "weight": w.weight,
            })
        });
        let services = world.services().map(|s| {
            json!({
                "key": s.key(), "addresses": s.addresses.iter().map(|a| a.ip).collect::<Vec<_>>(),
                "ports": s.ports.iter().map(|p| json!({
                    "port": p.port, "targetPort": p.target_port, "protocol": format!("{:?}", p.protocol),
                    "appProtocol": format!("{:?}", p.app_protocol),
                })).collect::<Vec<_>>(),
                "affinitySeconds": s.session_affinity.map(|a| a.timeout.as_secs()),
                "algorithm": format!("{:?}", s.algorithm),
                "endpoints": world.members(&s.key()).map(|w| w.uid.clone()).collect::<Vec<_>>(),
            })
        });
        let policies = world.policies().map(|p| {
            json!({
                "key": p.key(), "scope": format!("{:?}", p.scope), "action": format!("{:?}", p.action),
                "rules": format!("{:?}", p.rules),
            })
        });
        let locals = self.locals.load();
        let applied: Vec<Value> = locals
            .iter()
            .map(|pod| {
                let policies = pod.policies.borrow();
                let keys: Vec<_> = policies.keys().map(ToString::to_string).collect();
                json!({ "pod": pod.name.to_string(), "policies": keys })
            })
            .collect();
        json!({
            "status": self.status(),
            "workloads": sorted(workloads.collect()),
            "services": sorted(services.collect()),
            "policies": sorted(policies.collect()),
            "policiesByPod": sorted(applied),
            "certificates": self.certs.snapshot().iter().map(|c| json!({
                "identity": c.id.to_string(), "serial": c.serial, "users": c.users, "issued": c.issued,
                "failures": c.failures, "lastError": c.last_error,
            })).collect::<Vec<_>>(),
            "bpf": {
                "inStep": self.in_step.load().error.is_empty(),
                "tables": self.tables(),
                "counters": self.counters().iter().map(|c| json!({"outcome": c.name, "count": c.value}))
                    .collect::<Vec<_>>(),
            },
        })
    }

    fn set_log_level(&self, filter: &str) -> Result<(), BadRequest> {
        let parsed = EnvFilter::try_new(filter).map_err(|e| {
            BadRequest(format!("{filter:?} is not a log filter ({e}); use for example mesh_node=debug"))
        })?;
        self.log.reload(parsed).map_err(|e| BadRequest(e.to_string()))
    }

    fn set_bpf_log_level(&self, level: &str) -> Result<(), BadRequest> {
        let code = match level {
            "off" => log_level::OFF,
            "error" => log_level::ERROR,
            "warn" => log_level::WARN,
            "info" => log_level::INFO,
            "debug" | "trace" => log_level::DEBUG,
            _ => {
                let text = format!("{level:?} is not a level; use off, error, warn, info or debug");
                return Err(BadRequest(text));
            }
        };
        self.datapath().set_log_level(code).map_err(|e| BadRequest(chain(&e)))
    }

    fn metrics(&self) -> Result<String, std::fmt::Error> {
        self.count_direct();
        self.metrics.render()
    }
}
