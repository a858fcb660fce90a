//! Puts the parts together and keeps them running until a signal.
//!
//! One task owns the engine and publishes; the servers only read what it has published. Deliberately absent: decisions.

use crate::{
    admin::{AdminState, Metrics, admin_router, metrics_router},
    auth::TokenFile,
    ca::Authority,
    config::Config,
    engine::{Engine, Report, Step},
    report::Severity,
    serve::{
        CertificateService, Current, Gate, LoopbackAdmit, ServerIdentity, TlsIncoming, TokenAdmit, plaintext,
        secure,
    },
    source::file::Watch,
};
use anyhow::{Context, Result, anyhow};
use arc_swap::ArcSwap;
use axum::Router;
use mesh_xds::{
    delta,
    grpc::{AdsServerConfig, AdsService},
};
use std::{io::IsTerminal as _, net::SocketAddr, sync::Arc, time::Duration};
use time::OffsetDateTime;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::{JoinSet, spawn_blocking},
    time::{MissedTickBehavior, interval, timeout},
};

/// How often the token file is read again.
const TOKENS_EVERY: Duration = Duration::from_secs(2);
/// How often the ends of our own certificates are looked at.
const RENEW_EVERY: Duration = Duration::from_hours(1);
/// HTTP connections at a time on each of the listeners for pages and metrics.
const MAX_PAGES: usize = 256;
/// How long open streams may take to end at shutdown.
const DRAIN: Duration = Duration::from_secs(5);

/// Sets up logging for the process.
pub fn log_to_stderr(filter: &str, json: bool) -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .with_context(|| format!("--log {filter:?}: write a level, or target=level pairs"))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let done = if json { builder.json().try_init() } else { builder.try_init() };
    done.map_err(|e| anyhow!("logging cannot be set up: {e}"))
}

/// Serves until SIGTERM or SIGINT.
pub fn run(config: Config) -> Result<()> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(serve(config))
}

/// Where the engine's results go.
struct Publisher {
    current: Current,
    report: Arc<ArcSwap<Report>>,
    resources: watch::Sender<Arc<delta::Snapshot>>,
}

async fn serve(config: Config) -> Result<()> {
    let now = OffsetDateTime::now_utc();
    let tokens = Arc::new(TokenFile::open(&config.node_tokens)?);
    let authority = Authority::open(&config.data_dir, &config.settings.trust_domain, config.lifetimes, now)
        .context("the certificate authority cannot start")?;
    let authority = Arc::new(authority);
    let identity = ServerIdentity::new(&authority, config.dns_names.clone(), config.ip_sans.clone(), now)?;
    let identity = Arc::new(identity);

    // Watching begins before the first reading, so that no change falls between the two.
    let watch = Watch::new(&config.config_dir)?;
    let mut engine = Engine::new(config.config_dir.clone(), config.settings.clone());
    let (engine, first) = spawn_blocking(move || {
        let step = engine.step().clone();
        (engine, step)
    })
    .await?;
    if let Some(error) = &first.report.directory {
        return Err(anyhow!("{error}"));
    }

    let publisher = Publisher {
        current: Arc::new(ArcSwap::new(first.snapshot.clone())),
        report: Arc::new(ArcSwap::new(first.report.clone())),
        resources: watch::Sender::new(first.snapshot.resources().clone()),
    };
    let current = publisher.current.clone();
    let state = AdminState { current: current.clone(), report: publisher.report.clone() };
    let ads = AdsServerConfig {
        identifier: concat!("mesh-control/", env!("CARGO_PKG_VERSION")).to_owned(),
        ..AdsServerConfig::default()
    };
    let discovery =
        AdsService::new(ads.clone(), TokenAdmit::new(tokens.clone()), publisher.resources.subscribe());
    let loopback = AdsService::new(ads, LoopbackAdmit, publisher.resources.subscribe());
    let metrics = Arc::new(Metrics::new(vec![("tls", discovery.stats()), ("plaintext", loopback.stats())]));
    metrics.configuration(&first);
    metrics.intermediate_expiry(authority.intermediate_not_after().unix_timestamp());
    log_report(&Report::default(), &first);

    // Everything is bound before anything is served: a port that is taken is an error at once.
    let xds = bind(config.xds_addr, "--xds-addr").await?;
    let plain = match config.plaintext_xds_addr {
        Some(addr) => Some(bind(addr, "--plaintext-xds-addr").await?),
        None => None,
    };
    let admin = bind(config.admin_addr, "--admin-addr").await?;
    let metrics_listener = bind(config.metrics_addr, "--metrics-addr").await?;

    // What the kernel chose where a port was given as 0.
    let addresses = [xds.local_addr()?, admin.local_addr()?, metrics_listener.local_addr()?];

    let (stop, stopped) = watch::channel(());
    let stopping = |mut stopped: watch::Receiver<()>| async move {
        // Resolves when the sender is dropped, too.
        let _ = stopped.changed().await;
    };
    let mut servers = JoinSet::new();
    let certificates = CertificateService::new(authority.clone(), tokens.clone(), current, metrics.clone());
    let incoming = TlsIncoming::new(xds, identity.server_config()?);
    let stop_secure = stopping(stopped.clone());
    servers.spawn(async move { Ok(secure(incoming, discovery, certificates, stop_secure).await?) });
    if let Some(listener) = plain {
        let stop_plain = stopping(stopped.clone());
        servers.spawn(async move { Ok(plaintext(listener, loopback, stop_plain).await?) });
    }
    servers.spawn(pages(admin, admin_router(state.clone()), stopping(stopped.clone())));
    let pages_of_metrics = metrics_router(metrics.clone(), state);
    servers.spawn(pages(metrics_listener, pages_of_metrics, stopping(stopped)));

    let mut upkeep = JoinSet::new();
    upkeep.spawn(follow(watch, engine, publisher, metrics.clone()));
    upkeep.spawn(reload_tokens(tokens));
    upkeep.spawn(renew(authority, identity, metrics));
    tracing::info!(
        xds = %addresses[0], admin = %addresses[1], metrics = %addresses[2],
        root = %config.data_dir.join("root-cert.pem").display(), "serving"
    );

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let failed = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        Some(done) = servers.join_next() => Some(ended("a listener", done)),
        Some(done) = upkeep.join_next() => Some(ended("a background task", done)),
    };
    tracing::info!("stopping");
    // With the publisher gone the discovery streams end, and with them their connections.
    upkeep.shutdown().await;
    drop(stop);
    let drained = timeout(DRAIN, async { while servers.join_next().await.is_some() {} }).await;
    if drained.is_err() {
        tracing::warn!("connections were still open at the end and were closed");
    }
    failed.map_or(Ok(()), Err)
}

/// None of the tasks ends by itself while all is well.
fn ended(what: &str, done: Result<Result<()>, tokio::task::JoinError>) -> anyhow::Error {
    match done {
        Ok(Ok(())) => anyhow!("{what} ended although nobody asked it to"),
        Ok(Err(error)) => error.context(format!("{what} failed")),
        Err(error) => anyhow!(error).context(format!("{what} failed")),
    }
}

async fn bind(addr: SocketAddr, flag: &str) -> Result<TcpListener> {
    TcpListener::bind(addr)
        .await
        .with_context(|| format!("cannot listen on {addr}; free it, or choose another with {flag}"))
}

async fn pages(
    listener: TcpListener,
    router: Router,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<()> {
    Ok(axum::serve(Gate::new(listener, MAX_PAGES), router).with_graceful_shutdown(stop).await?)
}

/// Takes a step whenever the directory may have changed.
async fn follow(
    mut watch: Watch,
    mut engine: Engine,
    publisher: Publisher,
    metrics: Arc<Metrics>,
) -> Result<()> {
    loop {
        watch.changed().await;
        let step;
        (engine, step) = spawn_blocking(move || {
            let step = engine.step().clone();
            (engine, step)
        })
        .await?;
        metrics.configuration(&step);
        let before = publisher.report.swap(step.report.clone());
        if !Arc::ptr_eq(&before, &step.report) {
            log_report(&before, &step);
        }
        let same = Arc::ptr_eq(&publisher.current.load(), &step.snapshot);
        if !same {
            publisher.current.store(step.snapshot.clone());
            publisher.resources.send_replace(step.snapshot.resources().clone());
            tracing::info!(
                objects = step.events,
                services = step.snapshot.services().len(),
                workloads = step.snapshot.workloads().len(),
                policies = step.snapshot.policies().len(),
                "configuration changed"
            );
        }
    }
}

/// Logs what is new in a report, and what was corrected.
fn log_report(before: &Report, step: &Step) {
    let report = &step.report;
    if let Some(error) = &report.directory {
        tracing::error!("{error}; the last good configuration stays in force");
    }
    for problem in report.problems.iter().filter(|p| !before.problems.contains(p)) {
        match problem.issue.severity {
            Severity::Error => tracing::error!("{problem}"),
            Severity::Warning => tracing::warn!("{problem}"),
        }
    }
    for problem in before.problems.iter().filter(|p| !report.problems.contains(p)) {
        tracing::info!("no longer: {problem}");
    }
    for name in report.fallbacks.iter().filter(|f| !before.fallbacks.contains(f)) {
        tracing::error!(
            "{name} is broken and no good version of it is known: it refuses connections until it is corrected"
        );
    }
    tracing::info!(objects = ?report.objects, errors = report.count(Severity::Error), warnings = report.count(Severity::Warning), "configuration read");
}

async fn reload_tokens(tokens: Arc<TokenFile>) -> Result<()> {
    let mut ticks = interval(TOKENS_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last_error = String::new();
    loop {
        ticks.tick().await;
        let file = tokens.clone();
        match spawn_blocking(move || file.reload()).await? {
            Ok(changed) => {
                last_error.clear();
                if changed {
                    tracing::info!(tokens = tokens.len(), "node tokens changed");
                }
            }
            Err(error) => {
                // Once for each error, not every two seconds.
                let text = error.to_string();
                if text != last_error {
                    tracing::error!("{text}; the earlier tokens stay valid");
                    last_error = text;
                }
            }
        }
    }
}

async fn renew(
    authority: Arc<Authority>,
    identity: Arc<ServerIdentity>,
    metrics: Arc<Metrics>,
) -> Result<()> {
    let mut ticks = interval(RENEW_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first tick comes at once, right after both were made or checked.
    ticks.tick().await;
    loop {
        ticks.tick().await;
        let (authority, identity) = (authority.clone(), identity.clone());
        let done = spawn_blocking(move || -> Result<_> {
            let now = OffsetDateTime::now_utc();
            let renewed = authority.renew_if_due(now)?;
            let server = renewed || identity.is_due(now);
            if server {
                identity.renew(&authority, now)?;
            }
            Ok((renewed, server, authority.intermediate_not_after()))
        });
        match done.await? {
            Ok((renewed, server, expiry)) => {
                metrics.intermediate_expiry(expiry.unix_timestamp());
                if renewed || server {
                    tracing::info!(intermediate = renewed, server, %expiry, "own certificates renewed");
                }
            }
            Err(error) => {
                tracing::error!("own certificates could not be renewed, next try in an hour: {error:#}");
            }
        }
    }
}
