//! The node daemon: puts the parts together, runs until SIGTERM, and takes them apart.

use super::{
    backends::Backends,
    direct::DirectMetrics,
    flows::LocalFlows,
    handover::{self, CniServer, Outgoing},
    heartbeat::Heartbeat,
    kept::{self, ConfigSource, KeptConfig},
    limits,
    listeners::Handlers,
    mesh::NodeMesh,
    reconcile::{Command, InStep, QUEUE, Reconcile},
    sampled::sampled,
    succession::{self, Succession},
    view::{LogFilter, View},
    workers::Workers,
    xds,
};
use crate::{
    admin::{
        self,
        server::{Endpoint, Listener, admin_router, stats_router},
    },
    bpf::{Datapath, DenyEvent, Feature, LoadOptions},
    config::{self, Config},
    dns::{self, Dns},
    drain::Drain,
    enroll::{Enroller, Limits, Phase, scan::ScanConfig},
    hbone::{Pool, PoolLimits},
    identity::{CertManager, CertOptions, IstioCa, TokenFile},
    inbound::Inbound,
    local::SharedLocals,
    metrics::{Direction, Metrics},
    net::{self, NetNs},
    outbound::{Affinity, Outbound},
    outcome::chain,
    plan::NodeView,
    pulse::Pulse,
    state::Store,
    takeover::{self, Server},
    tls::ControlPlane,
};
use anyhow::Context;
use arc_swap::ArcSwap;
use mesh_xds::grpc::AdsClient;
use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

/// How often direct connections are counted between scrapes, before the kernel's table may evict rows.
const COUNT_DIRECT: Duration = Duration::from_secs(15);

/// How often it is asked whether all pods were looked at after the start.
const SUCCEED: Duration = Duration::from_secs(1);

/// How long a takeover waits for the configuration.
const CONFIGURATION: Duration = Duration::from_secs(60);

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
    let mut succession = match config.args.takeover {
        true => tokio::task::block_in_place(|| Succession::begin(&config)).context("cannot take over")?,
        false => None,
    };
    let mut datapath = load(&config, succession.as_mut())?;
    let (events, logs) = (datapath.take_events(), datapath.take_logs());
    let (heart, pulse, adopted) = (datapath.heartbeat(), datapath.pulse(), datapath.adopted());
    let (meta, nameservers, verdicts) = (datapath.sockets(), datapath.nameservers(), datapath.verdicts());
    let datapath = Arc::new(Mutex::new(datapath));
    if let Some(logs) = logs {
        tokio::spawn(logs);
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
    let keeper = kept::certificates(&config, &certs);

    let workers = Workers::start(config.workers).context("cannot start the workers")?;
    let pools: Vec<Pool> = (0..workers.len()).map(|_| Pool::new(PoolLimits::default())).collect();
    let inbound = Inbound {
        store: store.clone(),
        locals: locals.clone(),
        metrics: metrics.clone(),
        meta: meta.clone(),
        drain: drain.clone(),
        verdicts: Some(verdicts.clone()),
    };
    let outbound = Outbound {
        store: store.clone(),
        locals: locals.clone(),
        node: node.clone(),
        metrics: metrics.clone(),
        meta: meta.clone(),
        verdicts: config.args.same_node_fast_path.then(|| verdicts.clone()),
        affinity: Arc::new(Affinity::default()),
        inbound: inbound.clone(),
        drain: drain.clone(),
    };
    let affinity = outbound.affinity.clone();
    let dns = dns::Parts {
        store: store.clone(),
        node: node.clone(),
        nameservers,
        metrics: metrics.clone(),
        drain: drain.clone(),
        domain: config.args.cluster_domain.clone(),
    };
    let dns =
        config.args.dns.then(|| Dns::new(dns).context("--cluster-domain is no domain name")).transpose()?;
    let handlers = Arc::new(Handlers { workers, pools, outbound, inbound, dns });

    let (commands, queue) = mpsc::sync_channel(QUEUE);
    let synced = Arc::new(AtomicBool::new(false));
    // While a predecessor is there, the kernel is its own.
    let gate = if succession.is_some() { Arc::default() } else { synced.clone() };
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
        synced: gate.clone(),
        pulse: pulse.clone(),
        limits: limits.clone(),
        frozen: Cell::default(),
        flows: RefCell::new(LocalFlows::new(verdicts, metrics.clone())),
        backends: Backends { meta, metrics: metrics.clone() },
        plaintext: RefCell::default(),
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
    let enrol = Limits { dns: config.args.dns, ..Limits::default() };
    let enroller = Enroller::new(mesh.clone(), metrics.clone(), enrol)?;

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
    let mut writing = kept_config.start(ads.clone());
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
    tokio::spawn(follow_sync(source, synced.clone(), mesh.clone(), to_reconcile.clone()));
    // Ends at a takeover, when the connection to the control plane goes on for the policies of what is still open.
    let serving = stop.child_token();
    // After a takeover the file is the successor's.
    if let Some(keeper) = keeper {
        tokio::spawn(keeper.run(CertManager::clone(&certs), serving.clone()));
    }
    let mut inherited = HashMap::new();
    if let Some(mut succession) = succession {
        let complete = tokio::time::timeout(CONFIGURATION, wait_for(&synced)).await;
        complete.context("no configuration came; the running daemon stays")?;
        let estate = tokio::task::block_in_place(|| succession.inherit()).context("cannot take over")?;
        let (certificates, errors) = certs.import(estate.certificates);
        errors
            .iter()
            .for_each(|error| tracing::warn!(error = %chain(error), "a certificate is not taken over"));
        gate.store(true, Ordering::Release);
        let captured = succession::adopt(&enroller, estate.pods).await;
        inherited.extend(estate.servers);
        tracing::info!(captured, certificates, took = ?started.elapsed(), "serving beside the predecessor");
        // An error after the commit leaves two that accept for a while, which does no harm.
        if let Err(error) = tokio::task::block_in_place(|| succession.commit()) {
            tracing::warn!(error = %chain(&error), "the predecessor does not say that it has stepped aside");
        }
    }
    let events = events.map(|events| {
        let (locals, metrics) = (view.locals.clone(), metrics.clone());
        tokio::spawn(events.run(move |event| denied(&locals, &metrics, &event)))
    });
    let mut shared = servers(&config, &view, &serving, &mut inherited)?;
    tokio::spawn(count_direct(view.clone(), serving.clone()));
    let mut unix = |server, name: &str| -> anyhow::Result<tokio::net::UnixListener> {
        let listener = inherited.remove(&server).map(net::unix::adopt).transpose();
        match listener.with_context(|| format!("cannot go on with {name}"))? {
            Some(listener) => Ok(listener),
            None => net::unix::listen(&config.args.run_dir.join(name))
                .with_context(|| format!("cannot listen on {name}")),
        }
    };
    let cni = unix(Server::Cni, "cni.sock")?.as_fd().try_clone_to_owned()?;
    let cni = CniServer::start(cni, enroller.clone(), serving.clone()).context("cannot serve mesh-cni")?;
    let takeover = unix(Server::Takeover, takeover::SOCKET)?;
    shared.push((Server::Takeover, takeover.as_fd().try_clone_to_owned()?));
    let outgoing = Outgoing {
        node: config.args.node_name.clone(),
        commands: to_reconcile.clone(),
        datapath: datapath.clone(),
        enroller: enroller.clone(),
        certs: certs.clone(),
        servers: shared,
        cni,
    };
    let mut handover = tokio::spawn(handover::serve(takeover, outgoing, serving.clone()));
    let scan = ScanConfig {
        // The mount point, not the directory to attach to: /proc shows paths from there.
        cgroup_root: config::find_cgroup2().unwrap_or_else(|| config.cgroup_root.clone()),
        pods_cgroup: config.args.pods_cgroup.clone(),
        ..ScanConfig::default()
    };
    let found = enroller.scan(&scan).await.context("cannot look for running pods")?;
    tokio::spawn(succeed(enroller.clone(), synced, to_reconcile.clone(), certs.clone()));
    let following = tokio::spawn({
        let (enroller, stop) = (enroller.clone(), serving.clone());
        async move { enroller.run(Path::new("/proc"), stop).await }
    });
    tracing::info!(node = config.args.node_name, pods = found, took = ?started.elapsed(), "running");

    let handed_over = tokio::select! {
        ended = terminated() => {
            ended?;
            false
        }
        handed_over = &mut handover => handed_over.unwrap_or(false),
    };
    drain.begin.cancel();
    serving.cancel();
    if handed_over {
        tracing::info!(open = ?handlers.workers.active(), "handed over; what is open goes on here");
        events.iter().for_each(JoinHandle::abort);
        let _ = tokio::task::spawn_blocking(move || heartbeat.hand_over()).await;
        let _ = following.await;
        // The successor keeps it from now on.
        if let Some(writing) = writing.take() {
            writing.finish().await;
        }
        wind_down(config.takeover_drain, &handlers, &drain).await;
        if let Err(error) = datapath.lock().unwrap_or_else(PoisonError::into_inner).leave() {
            tracing::warn!(error = %chain(&error), "the kernel goes on to spare this daemon's cgroup");
        }
    } else {
        tracing::info!("stopping; the pins stay, and the kernel does without the daemon");
        // First: from here on the kernel sends nothing new here.
        let _ = tokio::task::spawn_blocking(move || heartbeat.end()).await;
        let _ = tokio::join!(following, handover);
    }
    stop.cancel();
    let _ = client.await;
    if let Some(writing) = writing.take() {
        writing.finish().await;
    }
    let (done, stopped) = tokio::sync::oneshot::channel();
    let sent = tokio::task::spawn_blocking(move || to_reconcile.send(Command::Stop(done)).is_ok()).await;
    if sent.unwrap_or(false) {
        // An error means that the thread is gone already.
        let _ = stopped.await;
    }
    if !handed_over {
        wind_down(config.drain, &handlers, &drain).await;
    }
    drop((view, enroller, mesh));
    // A thread that panicked has said so already.
    let _ = tokio::task::spawn_blocking(move || reconciler.join()).await;
    tracing::info!("stopped");
    Ok(())
}

fn load(config: &Config, succession: Option<&mut Succession>) -> anyhow::Result<Datapath> {
    let options = LoadOptions {
        cgroup_root: config.cgroup_root.clone(),
        pin_dir: config.args.pin_dir.clone(),
        daemon_cgroup: Config::own_cgroup().context("cannot find the daemon's cgroup")?,
        pods_cgroup: config.args.pods_cgroup.clone(),
        host_netns_cookie: NetNs::current()?.cookie(),
        disabled: Feature::parse_all(&config.args.disable_features).context("--disable-features")?,
    };
    let datapath = match succession.and_then(Succession::take_lock) {
        Some(lock) => Datapath::succeed(&options, lock),
        None => Datapath::load(&options),
    };
    datapath.context("cannot load the BPF programs; `mesh-node check` tells what is missing")
}

/// Lets the open connections end, up to the deadline.
async fn wind_down(within: Duration, handlers: &Handlers, drain: &Drain) {
    handlers.pools.iter().for_each(Pool::drain);
    let idle = async {
        while handlers.workers.active().iter().sum::<usize>() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    if tokio::time::timeout(within, idle).await.is_err() {
        tracing::warn!(open = ?handlers.workers.active(), "ending the connections that are still open");
        drain.force.cancel();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Starts the HTTP servers, on a predecessor's sockets where there are any. Returns the sockets, for a successor.
fn servers(
    config: &Config,
    view: &Arc<View>,
    stop: &CancellationToken,
    inherited: &mut HashMap<Server, OwnedFd>,
) -> anyhow::Result<Vec<(Server, OwnedFd)>> {
    let admin_socket = Endpoint::Unix(config.args.run_dir.join("admin.sock"));
    let all = [
        (Server::Metrics, "metrics", Endpoint::Tcp(config.args.metrics_addr), stats_router(view.clone())),
        (Server::Admin, "admin", Endpoint::Tcp(config.args.admin_addr), admin_router(view.clone())),
        (Server::AdminSocket, "admin", admin_socket, admin_router(view.clone())),
    ];
    let mut sockets = vec![];
    for (server, what, endpoint, router) in all {
        let adopted = inherited.remove(&server).and_then(|socket| Listener::adopt(&endpoint, socket).ok());
        let listener = match adopted {
            Some(listener) => listener,
            None => Listener::bind(what, &endpoint)?,
        };
        sockets.push((server, listener.share()?));
        tokio::spawn(admin::server::serve(listener, router, stop.clone()));
    }
    Ok(sockets)
}

/// Waits until the configuration is complete.
async fn wait_for(synced: &AtomicBool) {
    while !synced.load(Ordering::Acquire) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
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
