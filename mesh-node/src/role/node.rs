//! The node daemon: puts the parts together, runs until SIGTERM, and takes them apart.

use super::{
    direct::DirectMetrics,
    heartbeat::Heartbeat,
    kept::{self, ConfigSource, KeptConfig},
    limits,
    listeners::Handlers,
    mesh::NodeMesh,
    reconcile::{Command, InStep, QUEUE, Reconcile},
    view::{LogFilter, View},
    workers::Workers,
    xds,
};
use crate::{
    admin::server::{Endpoint, admin_router, bind, stats_router},
    bpf::{Datapath, DenyEvent, Feature, LoadOptions},
    config::{self, Config},
    drain::Drain,
    enroll::{self, Enroller, Limits, Phase, scan::ScanConfig},
    hbone::{Pool, PoolLimits},
    identity::{CertManager, CertOptions, IstioCa, TokenFile},
    inbound::Inbound,
    local::SharedLocals,
    metrics::{Direction, Metrics, Sample},
    net::{self, NetNs},
    outbound::{Affinity, Outbound},
    plan::NodeView,
    pulse::Pulse,
    state::Store,
    tls::ControlPlane,
};
use anyhow::Context;
use arc_swap::ArcSwap;
use mesh_xds::grpc::AdsClient;
use std::{
    net::{IpAddr, Ipv4Addr},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// How often direct connections are counted between scrapes, before the kernel's table may evict rows.
const COUNT_DIRECT: Duration = Duration::from_secs(15);

/// How often it is asked whether all pods were looked at after the start.
const SUCCEED: Duration = Duration::from_secs(1);

/// Runs the daemon until SIGTERM or SIGINT.
pub fn run(config: Config, log: LogFilter) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("control")
        .enable_all()
        .build()
        .context("cannot start the control runtime")?;
    runtime.block_on(serve(config, log))
}

async fn serve(config: Config, log: LogFilter) -> anyhow::Result<()> {
    let started = Instant::now();
    let metrics = Arc::new(Metrics::default());
    let store = Arc::new(Store::default());
    let locals = SharedLocals::default();
    let node = Arc::new(ArcSwap::from_pointee(NodeView {
        name: config.args.node_name.clone(),
        ..NodeView::default()
    }));
    let drain = Drain::default();
    let stop = CancellationToken::new();

    let limits = limits::start(&config);
    let mut datapath = load(&config)?;
    let (events, logs) = (datapath.take_events(), datapath.take_logs());
    let (heart, pulse, adopted) = (datapath.heartbeat(), datapath.pulse(), datapath.adopted());
    let meta = datapath.sockets();
    let datapath = Arc::new(Mutex::new(datapath));
    if let Some(logs) = logs {
        tokio::spawn(logs);
    }
    if let Some(events) = events {
        let (locals, metrics) = (locals.clone(), metrics.clone());
        tokio::spawn(events.run(move |event| denied(&locals, &metrics, &event)));
    }

    let plane = ControlPlane::new(
        &config.args.xds_address,
        &config.xds_server_name,
        config.args.xds_root_ca.clone(),
    )?;
    let token = TokenFile(config.args.token_file.clone());
    let ca = IstioCa::new(plane.channel(), Some(token.clone()), &config.args.cluster_id)?;
    let options = CertOptions { ttl: config.cert_ttl, ..CertOptions::default() };
    let certs = Arc::new(CertManager::new(Arc::new(ca), options));
    if let Some(keeper) = kept::certificates(&config, &certs) {
        tokio::spawn(keeper.run(CertManager::clone(&certs), stop.clone()));
    }

    let workers = Workers::start(config.workers).context("cannot start the workers")?;
    let pools: Vec<Pool> = (0..workers.len()).map(|_| Pool::new(PoolLimits::default())).collect();
    let inbound = Inbound {
        store: store.clone(),
        locals: locals.clone(),
        metrics: metrics.clone(),
        meta: meta.clone(),
        drain: drain.clone(),
    };
    let outbound = Outbound {
        store: store.clone(),
        locals: locals.clone(),
        node: node.clone(),
        metrics: metrics.clone(),
        meta,
        affinity: Arc::new(Affinity::default()),
        inbound: inbound.clone(),
        drain: drain.clone(),
    };
    let affinity = outbound.affinity.clone();
    let handlers = Arc::new(Handlers { workers, pools, outbound, inbound });

    let (commands, queue) = mpsc::sync_channel(QUEUE);
    let synced = Arc::new(AtomicBool::new(false));
    let in_step = Arc::new(ArcSwap::from_pointee(InStep::default()));
    let reconcile = Reconcile {
        datapath: datapath.clone(),
        store: store.clone(),
        locals: locals.clone(),
        node,
        handlers: handlers.clone(),
        certs: certs.clone(),
        metrics: metrics.clone(),
        in_step: in_step.clone(),
        node_name: config.args.node_name.clone(),
        runtime: tokio::runtime::Handle::current(),
        synced: synced.clone(),
        pulse: pulse.clone(),
        limits: limits.clone(),
    };
    let reconciler =
        std::thread::Builder::new().name("reconcile".into()).spawn(move || reconcile.run(&queue))?;

    let to_reconcile = commands.clone();
    let mut threads: Vec<(String, Pulse)> = vec![("reconcile".to_owned(), pulse)];
    threads.extend(
        (0..).zip(handlers.workers.pulses()).map(|(n, pulse): (usize, _)| (format!("worker-{n}"), pulse)),
    );
    let heartbeat = Heartbeat::start(heart, threads, &metrics).context("cannot start the heartbeat")?;
    let mesh = Arc::new(NodeMesh {
        store: store.clone(),
        locals: locals.clone(),
        commands: commands.clone(),
        in_step: in_step.clone(),
        synced: synced.clone(),
        exempt: config.args.exempt_namespaces.clone(),
    });
    let enroller = Enroller::new(mesh.clone(), metrics.clone(), Limits::default())?;

    let rejected = xds::Rejected::default();
    let mut kept_config = KeptConfig::open(&config);
    let handler = xds::IntoStore {
        commands,
        rejected: rejected.clone(),
        metrics: metrics.clone(),
        kept: kept_config.writer(),
        restoring: kept_config.restoring(),
    };
    let transport = xds::Secured { plane, token };
    let (mut client, _demand, ads) = AdsClient::new(xds::ads_config(&config, node_ip()), transport, handler);
    let source = ConfigSource { ads: ads.clone(), disk: kept_config.restore(&mut client).await };
    kept::register(&metrics, &source, kept_config.writer().as_ref());
    let writing = kept_config.start(ads.clone());
    let client = tokio::spawn(client.run(stop.clone().cancelled_owned()));

    let view = Arc::new(View {
        started,
        direct: DirectMetrics::new(store.clone(), locals.clone(), metrics.clone()),
        store,
        locals,
        enroller: enroller.clone(),
        certs: certs.clone(),
        datapath: datapath.clone(),
        in_step,
        ads,
        source: source.clone(),
        synced: synced.clone(),
        rejected,
        metrics: metrics.clone(),
        log,
        config: config.clone(),
    });
    if adopted {
        view.skip_direct();
    }
    sampled(&metrics, &view, &handlers, &affinity);
    limits::export(&metrics, &limits, &view.locals);
    servers(&config, &view, &stop)?;
    let gate = synced.clone();
    tokio::spawn(follow_sync(source, synced, mesh.clone(), to_reconcile.clone()));
    tokio::spawn(count_direct(view.clone(), stop.clone()));
    let cni =
        net::unix::listen(&config.args.run_dir.join("cni.sock")).context("cannot listen for mesh-cni")?;
    let cni = tokio::spawn(enroll::server::serve(cni, enroller.clone(), stop.clone()));
    let scan = ScanConfig {
        // The mount point, not the directory to attach to: /proc shows paths from there.
        cgroup_root: config::find_cgroup2().unwrap_or_else(|| config.cgroup_root.clone()),
        pods_cgroup: config.args.pods_cgroup.clone(),
        ..ScanConfig::default()
    };
    let found = enroller.scan(&scan).await.context("cannot look for running pods")?;
    tokio::spawn(succeed(enroller.clone(), gate, to_reconcile.clone(), certs.clone()));
    let following = tokio::spawn({
        let (enroller, stop) = (enroller.clone(), stop.clone());
        async move { enroller.run(Path::new("/proc"), stop).await }
    });
    tracing::info!(node = config.args.node_name, pods = found, took = ?started.elapsed(), "running");

    terminated().await?;
    tracing::info!("stopping; the pins stay, and the kernel does without the daemon");
    // First: from here on the kernel sends nothing new here.
    let _ = tokio::task::spawn_blocking(move || heartbeat.end()).await;
    drain.begin.cancel();
    stop.cancel();
    let _ = tokio::join!(client, cni, following);
    if let Some(writing) = writing {
        writing.finish().await;
    }
    let (done, stopped) = tokio::sync::oneshot::channel();
    let sent = tokio::task::spawn_blocking(move || to_reconcile.send(Command::Stop(done)).is_ok()).await;
    if sent.unwrap_or(false) {
        // An error means that the thread is gone already.
        let _ = stopped.await;
    }
    wind_down(&config, &handlers, &drain).await;
    drop((view, enroller, mesh));
    // A thread that panicked has said so already.
    let _ = tokio::task::spawn_blocking(move || reconciler.join()).await;
    tracing::info!("stopped");
    Ok(())
}

fn load(config: &Config) -> anyhow::Result<Datapath> {
    let options = LoadOptions {
        cgroup_root: config.cgroup_root.clone(),
        pin_dir: config.args.pin_dir.clone(),
        daemon_cgroup: Config::own_cgroup().context("cannot find the daemon's cgroup")?,
        pods_cgroup: config.args.pods_cgroup.clone(),
        host_netns_cookie: NetNs::current()?.cookie(),
        disabled: Feature::parse_all(&config.args.disable_features).context("--disable-features")?,
    };
    Datapath::load(&options).context("cannot load the BPF programs; `mesh-node check` tells what is missing")
}

/// Lets the open connections end, up to the deadline.
async fn wind_down(config: &Config, handlers: &Handlers, drain: &Drain) {
    handlers.pools.iter().for_each(Pool::drain);
    let idle = async {
        while handlers.workers.active().iter().sum::<usize>() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    if tokio::time::timeout(config.drain, idle).await.is_err() {
        tracing::warn!(open = ?handlers.workers.active(), "ending the connections that are still open");
        drain.force.cancel();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn servers(config: &Config, view: &Arc<View>, stop: &CancellationToken) -> anyhow::Result<()> {
    let admin_socket = Endpoint::Unix(config.args.run_dir.join("admin.sock"));
    let all = [
        ("metrics", Endpoint::Tcp(config.args.metrics_addr), stats_router(view.clone())),
        ("admin", Endpoint::Tcp(config.args.admin_addr), admin_router(view.clone())),
        ("admin", admin_socket, admin_router(view.clone())),
    ];
    for (what, endpoint, router) in all {
        tokio::spawn(bind(what, &endpoint, router, stop.clone())?);
    }
    Ok(())
}

/// Metrics that are read when they are asked for.
fn sampled(metrics: &Arc<Metrics>, view: &Arc<View>, handlers: &Arc<Handlers>, affinity: &Arc<Affinity>) {
    let weak = Arc::downgrade(view);
    metrics.sample_counters(
        "nodemesh_kernel_outcomes",
        "Connects and datagrams by what the kernel did",
        move || {
            let counters = weak.upgrade().map(|view| view.counters()).unwrap_or_default();
            counters.into_iter().map(|c| Sample::new([("outcome", c.name.as_str())], c.value)).collect()
        },
    );
    let weak = Arc::downgrade(view);
    metrics.sample_gauges("nodemesh_ready", "1 when configuration and kernel are in step", move || {
        let ready = weak.upgrade().is_some_and(|view| view.not_ready().is_empty());
        vec![Sample::new([], f64::from(u8::from(ready)))]
    });
    let weak = Arc::downgrade(view);
    metrics.sample_gauges(
        "nodemesh_xds_connected",
        "1 while there is a stream to the control plane",
        move || {
            let connected = weak.upgrade().is_some_and(|view| view.ads.borrow().connected);
            vec![Sample::new([], f64::from(u8::from(connected)))]
        },
    );
    let weak = Arc::downgrade(view);
    metrics.sample_gauges(
        "nodemesh_certificate_expires_seconds",
        "Time that is left, by identity",
        move || {
            let pods = weak.upgrade().map(|view| view.enrolled()).unwrap_or_default();
            let mut samples = vec![];
            for pod in pods {
                if let Some(certificate) = pod.certificate {
                    #[expect(clippy::cast_precision_loss, reason = "seconds")]
                    let left = certificate.expires_in_seconds as f64;
                    samples.push(Sample::new([("identity", pod.identity.as_str())], left));
                }
            }
            samples.dedup_by(|a, b| a == b);
            samples
        },
    );
    let weak = Arc::downgrade(handlers);
    metrics.sample_gauges("nodemesh_worker_connections", "Live connections by worker", move || {
        let active = weak.upgrade().map(|h| h.workers.active()).unwrap_or_default();
        #[expect(clippy::cast_precision_loss, reason = "connections")]
        let sample =
            |(n, active): (usize, usize)| Sample::new([("worker", n.to_string().as_str())], active as f64);
        active.into_iter().enumerate().map(sample).collect()
    });
    let weak = Arc::downgrade(handlers);
    metrics.sample_gauges(
        "nodemesh_tunnels",
        "HBONE connections and streams of the client pools",
        move || {
            let stats = weak
                .upgrade()
                .map(|h| h.pools.iter().map(Pool::stats).collect::<Vec<_>>())
                .unwrap_or_default();
            #[expect(clippy::cast_precision_loss, reason = "connections")]
            let sum = |f: fn(&crate::hbone::PoolStats) -> u64| stats.iter().map(f).sum::<u64>() as f64;
            vec![
                Sample::new([("state", "connection")], sum(|s| s.connections)),
                Sample::new([("state", "stream")], sum(|s| s.streams)),
                Sample::new([("state", "dialing")], sum(|s| s.dialing)),
            ]
        },
    );
    let weak = Arc::downgrade(view);
    metrics.sample_counters(
        "nodemesh_certificate_requests",
        "Certificates asked for, by outcome",
        move || {
            let stats = weak.upgrade().map(|view| view.certs.stats()).unwrap_or_default();
            vec![
                Sample::new([("outcome", "issued")], stats.issued),
                Sample::new([("outcome", "failed")], stats.failed),
            ]
        },
    );
    let weak = Arc::downgrade(handlers);
    metrics.sample_counters("nodemesh_tunnel_events", "What became of HBONE connections", move || {
        let stats =
            weak.upgrade().map(|h| h.pools.iter().map(Pool::stats).collect::<Vec<_>>()).unwrap_or_default();
        let sum = |f: fn(&crate::hbone::PoolStats) -> u64| stats.iter().map(f).sum::<u64>();
        vec![
            Sample::new([("event", "opened")], sum(|s| s.opened)),
            Sample::new([("event", "failed")], sum(|s| s.failed)),
            Sample::new([("event", "retried")], sum(|s| s.retried)),
            Sample::new([("event", "evicted")], sum(|s| s.evicted)),
        ]
    });
    let weak = Arc::downgrade(affinity);
    #[expect(clippy::cast_precision_loss, reason = "at most 65,536")]
    metrics.sample_gauges(
        "nodemesh_affinity_entries",
        "Clients with session affinity in the daemon",
        move || vec![Sample::new([], weak.upgrade().map_or(0.0, |a| a.len() as f64))],
    );
}

/// Lets go what a predecessor captured beyond the pods of now, and its certificates that nobody uses, once every pod that
/// runs here has been looked at.
async fn succeed(
    enroller: Arc<Enroller<NodeMesh>>,
    synced: Arc<AtomicBool>,
    commands: mpsc::SyncSender<Command>,
    certs: Arc<CertManager>,
) {
    let undecided =
        || enroller.pods().iter().any(|pod| matches!(pod.phase, Phase::Pending | Phase::Failed(_)));
    loop {
        tokio::time::sleep(SUCCEED).await;
        if synced.load(Ordering::Acquire) && !undecided() {
            break;
        }
    }
    certs.forget_imported();
    // An error means that the daemon is ending.
    let _ = tokio::task::spawn_blocking(move || commands.send(Command::LetGo).is_ok()).await;
}

/// Opens the gate for enrolment once there is a whole configuration.
async fn follow_sync(
    source: ConfigSource,
    synced: Arc<AtomicBool>,
    mesh: Arc<NodeMesh>,
    commands: mpsc::SyncSender<Command>,
) {
    source.usable().await;
    synced.store(true, Ordering::Release);
    // An error means that the daemon is ending.
    let _ = tokio::task::spawn_blocking(move || commands.send(Command::Synced).is_ok()).await;
    mesh.store.wake();
}

async fn count_direct(view: Arc<View>, stop: CancellationToken) {
    let mut tick = tokio::time::interval(COUNT_DIRECT);
    while stop.run_until_cancelled(tick.tick()).await.is_some() {
        view.count_direct();
    }
}

/// A denial in the kernel, in the access log and in the metrics.
fn denied(locals: &SharedLocals, metrics: &Metrics, event: &DenyEvent) {
    let pod = locals.load().by_cookie(event.cookie).map(|p| p.name.to_string()).unwrap_or_default();
    let direction = if event.inbound { Direction::Inbound } else { Direction::Outbound };
    metrics.refused(direction, event.reason.label());
    tracing::warn!(
        target: "access",
        direction = direction.as_str(),
        src.addr = %event.src.map(|a| a.to_string()).unwrap_or_default(),
        pod,
        dst.addr = %event.dst,
        protocol = ?event.proto,
        reason = event.reason.label(),
        pid = event.pid.unwrap_or_default(),
        "denied in the kernel"
    );
}

async fn terminated() -> anyhow::Result<()> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    Ok(())
}

/// This node's address for the xDS node id, which is informational: the first one that is not loopback.
fn node_ip() -> IpAddr {
    let addrs = NetNs::current().ok().and_then(|ns| ns.addresses().ok()).unwrap_or_default();
    addrs.into_iter().next().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}
