//! What a daemon finds of its predecessor, and leaves to its successor: configuration and certificates.
//!
//! A configuration from disk is applied before the first stream, through the same door as one that comes over xDS. Pods
//! are captured under it once the control plane has had [`PATIENCE`] to say something newer. Deliberately absent: the
//! forms of the files, see `disk` and `identity`; and the kernel's pins, see `bpf`.

use super::xds::{IntoStore, Secured};
use crate::{
    config::Config,
    disk::{CacheWriter, ConfigCache, Loaded, Owner},
    identity::{CertKeeper, CertManager},
    metrics::{Metrics, Sample},
    outcome::chain,
};
use mesh_xds::grpc::{AdsClient, AdsStatus};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, SystemTime},
};
use tokio::sync::watch;

/// How long a configuration from disk waits for the control plane.
const PATIENCE: Duration = Duration::from_secs(2);

/// Set while what is applied comes from disk.
pub type Restoring = Arc<AtomicBool>;

/// The configuration on disk.
pub struct KeptConfig {
    cache: Option<ConfigCache>,
    loaded: Option<Loaded>,
    writer: CacheWriter,
    restoring: Restoring,
}

impl KeptConfig {
    /// Opens and reads it. Whatever is wrong with it is said and costs no more than the wait for the control plane.
    pub fn open(config: &Config) -> Self {
        let owner = Owner {
            node: config.args.node_name.clone(),
            cluster: config.args.cluster_id.clone(),
            trust_domain: config.args.trust_domain.clone(),
        };
        let cache = ConfigCache::new(&config.args.state_dir, owner)
            .inspect_err(|e| tracing::error!(error = %chain(e), "no configuration is kept"))
            .ok();
        let loaded = cache.as_ref().and_then(|cache| match cache.load() {
            Ok(loaded) => loaded,
            Err(error) => {
                tracing::error!(error = %chain(&error), "the configuration on disk is refused");
                None
            }
        });
        Self { cache, loaded, writer: CacheWriter::new(), restoring: Restoring::default() }
    }

    /// Where changes go that are to be kept; `None` if they cannot be.
    pub fn writer(&self) -> Option<CacheWriter> {
        self.cache.as_ref().map(|_| self.writer.clone())
    }

    /// Tells the handler of changes that they come from disk.
    pub fn restoring(&self) -> Restoring {
        self.restoring.clone()
    }

    /// Applies what was read. The time of the last contact, if anything is in force now.
    pub async fn restore(&mut self, client: &mut AdsClient<Secured, IntoStore>) -> Option<SystemTime> {
        let mut loaded = self.loaded.take()?;
        // Policies come first, as over xDS.
        let order = |url: &str| super::xds::TYPES.iter().position(|t| *t == url).unwrap_or(usize::MAX);
        loaded.changes.sort_by_key(|changes| order(&changes.type_url));
        let (mut resources, mut refused) = (0, 0);
        self.restoring.store(true, Ordering::Relaxed);
        for changes in loaded.changes {
            if !super::xds::TYPES.contains(&changes.type_url.as_str()) {
                continue;
            }
            resources += changes.resources.len();
            let rejections = client.restore(changes).await;
            refused += rejections.len();
        }
        self.restoring.store(false, Ordering::Relaxed);
        let age = loaded.last_contact.elapsed().unwrap_or_default();
        tracing::info!(resources, refused, torn_bytes = loaded.torn, ?age, "configuration from disk");
        Some(loaded.last_contact)
    }

    /// Begins to write.
    pub fn start(self, ads: watch::Receiver<AdsStatus>) -> Option<Writing> {
        let started = self.writer.start(self.cache?, ads);
        let thread =
            started.inspect_err(|error| tracing::error!(%error, "the configuration is not kept")).ok()?;
        Some(Writing { writer: self.writer, thread })
    }
}

/// The configuration is being written.
pub struct Writing {
    writer: CacheWriter,
    thread: JoinHandle<()>,
}

impl Writing {
    /// Writes what waits, and ends. A successor may write from then on.
    pub async fn finish(self) {
        self.writer.stop();
        // A thread that panicked has said so already.
        let _ = tokio::task::spawn_blocking(move || self.thread.join()).await;
    }
}

/// Certificates of the predecessor, and the file for the successor.
pub fn certificates(config: &Config, manager: &CertManager) -> Option<CertKeeper> {
    let run_dir = &config.args.run_dir;
    if !config.args.keep_certificates {
        if let Err(error) = CertKeeper::remove(run_dir) {
            tracing::error!(%error, ?run_dir, "the kept certificates cannot be removed; remove them by hand");
        }
        return None;
    }
    let keeper = CertKeeper::new(run_dir);
    let keeper =
        keeper.inspect_err(|error| tracing::error!(%error, ?run_dir, "no certificates are kept")).ok()?;
    keeper.load(manager);
    Some(keeper)
}

/// Where the configuration in force is from, and how old that is.
#[derive(Clone, Debug)]
pub struct ConfigSource {
    /// The control plane.
    pub ads: watch::Receiver<AdsStatus>,
    /// The predecessor's last contact, if its configuration was on disk.
    pub disk: Option<SystemTime>,
}

impl ConfigSource {
    /// Source and age; `None` before there is a configuration.
    pub fn age(&self) -> Option<(&'static str, Duration)> {
        let ads = self.ads.borrow();
        let since = |at: SystemTime| at.elapsed().unwrap_or_default();
        match (ads.current, ads.last_contact, self.disk) {
            (true, ..) => Some(("control-plane", Duration::ZERO)),
            (false, Some(at), _) => Some(("control-plane", since(at))),
            (false, None, Some(at)) => Some(("disk", since(at))),
            // The first answer is on its way in parts.
            (false, None, None) => None,
        }
    }

    /// What to say of a configuration that is not the control plane's of this moment.
    pub fn note(&self) -> Option<String> {
        let (source, age) = self.age().filter(|(_, age)| !age.is_zero())?;
        let from = if source == "disk" { "configuration from disk" } else { "configuration without contact" };
        Some(format!("{from}, age {} s", age.as_secs()))
    }

    /// Waits until pods may be captured: the control plane has said everything, or what is on disk has to do.
    pub async fn usable(&self) {
        let mut ads = self.ads.clone();
        let live = async { ads.wait_for(|s| s.synced).await.is_ok() };
        let disk = async {
            match self.disk {
                Some(_) => tokio::time::sleep(PATIENCE).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            true = live => tracing::info!("the whole configuration is in force"),
            () = disk => {
                let age = self.age().map(|(_, age)| age).unwrap_or_default();
                tracing::warn!(?age, "the control plane does not answer: the configuration from disk is in force");
            }
            // The client has ended, and with it the daemon.
            else => std::future::pending().await,
        }
    }
}

/// Registers the metrics of all of this.
pub fn register(metrics: &Metrics, source: &ConfigSource, writer: Option<&CacheWriter>) {
    let source = source.clone();
    metrics.sample_gauges(
        "nodemesh_config_age_seconds",
        "Time since the configuration in force was the control plane's; 0 while it is",
        move || {
            let age = source.age();
            age.into_iter().map(|(from, age)| Sample::new([("source", from)], age.as_secs_f64())).collect()
        },
    );
    let Some(writer) = writer else { return };
    let stats = writer.clone();
    metrics.sample_counters("nodemesh_config_writes", "Writes of the configuration to disk", move || {
        let stats = stats.stats();
        vec![
            Sample::new([("outcome", "ok")], stats.written),
            Sample::new([("outcome", "error")], stats.failed),
        ]
    });
    let stats = writer.clone();
    metrics.sample_counters(
        "nodemesh_config_written_bytes",
        "Bytes of the configuration written to disk",
        move || vec![Sample::new([], stats.stats().written_bytes)],
    );
    let stats = writer.clone();
    #[expect(clippy::cast_precision_loss, reason = "bytes of a file")]
    metrics.sample_gauges("nodemesh_config_file_bytes", "Size of the configuration on disk", move || {
        vec![Sample::new([], stats.stats().file_bytes as f64)]
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_age_is_that_of_the_last_contact_whoever_had_it() {
        let ago = |s| Some(SystemTime::now() - Duration::from_secs(s));
        let of = |current, last_contact, disk| {
            let (_, ads) = watch::channel(AdsStatus { current, last_contact, ..AdsStatus::default() });
            let source = ConfigSource { ads, disk };
            (source.age().map(|(from, age)| (from, age.as_secs())), source.note())
        };
        let note = |text: &str| Some(text.to_owned());
        for (status, age, text) in [
            (of(false, None, None), None, None),
            (of(true, None, ago(50)), Some(("control-plane", 0)), None),
            (
                of(false, ago(7), ago(50)),
                Some(("control-plane", 7)),
                note("configuration without contact, age 7 s"),
            ),
            (of(false, None, ago(50)), Some(("disk", 50)), note("configuration from disk, age 50 s")),
        ] {
            assert_eq!(status, (age, text));
        }
    }

    #[tokio::test]
    async fn pods_wait_for_the_control_plane_unless_there_is_something_on_disk() {
        let (ads, status) = watch::channel(AdsStatus::default());
        let soon = Duration::from_millis(50);
        let nothing = ConfigSource { ads: status.clone(), disk: None };
        assert!(tokio::time::timeout(soon, nothing.usable()).await.is_err());
        let disk = ConfigSource { ads: status, disk: Some(SystemTime::now()) };
        let began = std::time::Instant::now();
        disk.usable().await;
        assert!(began.elapsed() >= PATIENCE);
        ads.send_modify(|s| s.synced = true);
        nothing.usable().await;
        drop(ads);
        nothing.usable().await;
    }
}
