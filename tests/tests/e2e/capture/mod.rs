//! The kernel data path alone: this process plays the daemon, with a relay of a few threads instead of the real
//! outbound and inbound parts. What the apps see is then the work of the BPF programs.

mod away;
mod choice;
mod degraded;
mod fastpath;
mod lab;

use self::lab::*;
use crate::support::{assert_right, bare, vip};
use anyhow::{Context, Result, ensure};
use mesh_common::code::{Counter, DenyReason, log_level};
use mesh_node::bpf::{Away, Backend, Destination, Verdict};
use mesh_tests::{app::ports, wait};
use mesh_xds::model::Protocol;
use std::{
    io::{self, Write},
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

/// Every way to connect, with a share of [`MANY`].
const WAYS: [(&str, u64); 6] = [
    ("--mode plain", MANY),
    ("--mode nonblock", MANY / 4),
    ("--mode tfo", MANY / 4),
    ("--mode tfo-connect", MANY / 4),
    ("--mode plain --mapped", MANY / 4),
    ("--mode tfo --mapped", MANY / 8),
];

#[test]
fn direct_is_balanced_in_the_kernel_and_nothing_is_lost() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_apps()?;
    let (a, b) = (cluster.pod("shop/db-0")?.spec.clone(), cluster.pod("shop/pay-0")?.spec.clone());
    let mut lab = Lab::new(&cluster, "node-a")?;
    let v4 = [addr(a.v4, ports::WHO), addr(b.v4, ports::WHO)];
    let v6 = [addr(a.v6, ports::WHO), addr(b.v6, ports::WHO)];
    lab.frontend(&format!("{}:80", vip::LEDGER), Protocol::Tcp, Verdict::Direct, &v4);
    lab.frontend(&format!("{}:80", vip::LEDGER_V6), Protocol::Tcp, Verdict::Direct, &v6);
    lab.capture("shop/web-0", false)?;
    let web = cluster.pod("shop/web-0")?;

    let mut total = 0;
    for (way, n) in WAYS {
        let report = web.connects(&format!("--to {}:80 --n {n} --threads 4 {way}", vip::LEDGER))?;
        assert_right(way, &report, n);
        eprintln!("direct {way}: {n} in {} ms, {:?}", report.millis, report.by_backend);
        let share = report.by_backend[&a.name] as f64 / n as f64;
        assert!((0.45..0.55).contains(&share), "{way}: {:?}", report.by_backend);
        total += n;
    }
    let report = web.connects(&format!("--to {}:80 --n {MANY} --threads 4", vip::LEDGER_V6))?;
    assert_right("v6", &report, MANY);
    total += MANY;

    ensure!(lab.counter(Counter::ConnectDirect)? == total);
    let closed = || lab.datapath.direct_stats().map(|rows| rows.iter().map(|row| row.closed).sum::<u64>());
    wait::until_true("all direct connections to be closed", Duration::from_secs(20), || {
        Ok(closed().map_err(chain)? == total)
    })?;
    let rows = lab.datapath.direct_stats().map_err(chain)?;
    assert_eq!(rows.len(), 4, "{rows:?}");
    assert_eq!(rows.iter().map(|row| row.opened).sum::<u64>(), total);
    assert!(
        rows.iter().all(|row| row.sent_bytes > row.closed && row.received_bytes > row.closed),
        "{rows:?}"
    );
    lab.end()
}

#[test]
fn direct_bytes_are_counted_exactly() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_apps()?;
    let server = cluster.pod("shop/pay-0")?.spec.clone();
    let mut lab = Lab::new(&cluster, "node-a")?;
    let service = format!("{}:9002", vip::LEDGER);
    lab.frontend(&service, Protocol::Tcp, Verdict::Direct, &[addr(server.v4, ports::BULK)]);
    lab.capture("shop/web-0", false)?;
    let (up, down) = (3 << 20, 5 << 20);
    let bulk = cluster.pod("shop/web-0")?.bulk(&format!("--to {service} --up {up} --down {down}"))?;
    assert_eq!((bulk.server_verified, bulk.received), (up, down));
    let rows = wait::until("the connection to be closed", Duration::from_secs(10), || {
        let rows = lab.datapath.direct_stats().map_err(chain)?;
        Ok((rows.iter().map(|row| row.closed).sum::<u64>() == 1).then_some(rows))
    })?;
    eprintln!("bytes: {rows:?}");
    let row = rows[0];
    // The protocol adds a header and a trailer of well under a kilobyte.
    assert!((up..up + 1024).contains(&row.sent_bytes), "{row:?}");
    assert!((down..down + 1024).contains(&row.received_bytes), "{row:?}");

    // Whoever closes first: SYN and FIN are no bytes of the app.
    let cases = [(ports::ECHO, "--send hello --shutdown", 6, 10), (ports::RESET, "--send hello", 6, 0)];
    for (seen, (port, options, sent, received)) in (rows.len() + 1..).zip(cases) {
        let service = format!("{}:{port}", vip::LEDGER);
        lab.frontend(&service, Protocol::Tcp, Verdict::Direct, &[addr(server.v4, port)]);
        lab.apply()?;
        let dialled = cluster.pod("shop/web-0")?.dial(&format!("--to {service} {options}"))?;
        assert_eq!(dialled.received.len(), received, "{dialled:?}");
        let row = wait::until("the connection to be closed", Duration::from_secs(10), || {
            let rows = lab.datapath.direct_stats().map_err(chain)?;
            let closed = rows.iter().filter(|row| row.closed == 1).count() == seen;
            Ok(rows.into_iter().find(|row| closed && row.vip.port() == port))
        })?;
        assert_eq!((row.sent_bytes, row.received_bytes), (sent, received as u64), "{port}: {row:?}");
    }
    // What was counted stays while its pod is captured, and no longer.
    let counted = lab.datapath.direct_stats().map_err(chain)?;
    assert_eq!((counted.len(), lab.datapath.forget_direct_stats(&counted).map_err(chain)?), (3, 0));
    lab.intent.pods.clear();
    lab.apply()?;
    assert_eq!(lab.datapath.forget_direct_stats(&counted).map_err(chain)?, 3);
    assert_eq!(lab.datapath.direct_stats().map_err(chain)?, []);
    lab.end()
}

#[test]
fn proxied_connections_arrive_with_their_destination_and_client() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_apps()?;
    let db = cluster.pod("shop/db-0")?.spec.clone();
    let mut lab = Lab::new(&cluster, "node-a")?;
    let targets = [
        (format!("{}:80", vip::DB), addr(db.v4, ports::WHO)),
        (format!("{}:80", vip::DB_V6), addr(db.v6, ports::WHO)),
    ];
    for (service, backend) in &targets {
        lab.frontend(service, Protocol::Tcp, Verdict::Proxy, &[]);
        lab.upstream.insert(service.parse()?, *backend);
    }
    // Dialled by its own address as well.
    lab.intent.destinations.push(Destination {
        addr: db.v4.into(),
        verdict: Verdict::Proxy,
        away: Away::Deny,
    });
    lab.upstream.insert(addr(db.v4, ports::WHO), addr(db.v4, ports::WHO));
    lab.capture("shop/web-0", false)?;
    let web = cluster.pod("shop/web-0")?;
    for (way, n) in WAYS {
        let report = web.connects(&format!(
            "--to {} --n {n} --threads 4 --any-client {way} --expect db-0",
            targets[0].0
        ))?;
        assert_right(way, &report, n);
        lab.assert_no_wrong_destination(way);
        eprintln!("proxy {way}: {n} in {} ms", report.millis);
    }
    for to in [targets[1].0.clone(), addr(db.v4, ports::WHO).to_string()] {
        let report = web.connects(&format!("--to {to} --n 2000 --threads 4 --any-client --expect db-0"))?;
        assert_right(&to, &report, 2000);
        lab.assert_no_wrong_destination(&to);
    }
    lab.end()
}

#[test]
fn the_server_sees_the_real_client_through_the_inbound_capture() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_apps()?;
    let db = cluster.pod("shop/db-0")?.spec.clone();
    let mut lab = Lab::new(&cluster, "node-a")?;
    // Its apps listened before it was captured.
    lab.capture("shop/db-0", false)?;
    let web = cluster.pod("shop/web-1")?;
    for (way, n) in WAYS.into_iter().chain([("--mode plain ", 2000)]) {
        let to = addr(db.v4, ports::WHO);
        let report = web.connects(&format!("--to {to} --n {n} --threads 4 {way} --expect db-0"))?;
        assert_right(way, &report, n);
        eprintln!("inbound {way}: {n} in {} ms", report.millis);
    }
    let to = addr(db.v6, ports::WHO);
    let report = web.connects(&format!("--to {to} --n 2000 --threads 4 --expect db-0"))?;
    assert_right("v6", &report, 2000);
    ensure!(lab.counter(Counter::InboundSteer)? >= MANY);
    ensure!(lab.counter(Counter::ClientSet)? >= MANY);
    lab.end()
}

#[test]
fn denied_connections_are_refused_with_a_reason() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_apps()?;
    let mut lab = Lab::new(&cluster, "node-a")?;
    let mut events = lab.datapath.take_events().context("the events")?;
    let empty = format!("{}:80", vip::PAY);
    let forbidden = format!("{}:80", vip::PAY_V6);
    lab.frontend(&empty, Protocol::Tcp, Verdict::Direct, &[]);
    lab.frontend(&forbidden, Protocol::Tcp, Verdict::Deny(DenyReason::Policy), &[]);
    lab.frontend(&format!("{}:53", vip::QUOTES), Protocol::Udp, Verdict::Proxy, &[]);
    lab.capture("shop/web-0", false)?;
    let web = cluster.pod("shop/web-0")?;
    for (to, reason) in [(&empty, DenyReason::NoEndpoints), (&forbidden, DenyReason::Policy)] {
        assert_eq!(web.dial(&format!("--to {to}"))?.end, "connect: refused");
        let event = events.try_next().context("an event")?;
        assert_eq!((event.reason, event.dst.to_string()), (reason, to.clone()));
        assert_eq!(event.cookie, lab.intent.pods[0].cookie);
    }
    let report = web.connects(&format!("--to {empty} --n {MANY} --threads 4"))?;
    assert_eq!((report.ok, report.lost), (0, MANY), "{report:?}");
    ensure!(lab.counter(Counter::ConnectDeny)? == MANY + 2);
    // The buffer is bounded; what did not fit was counted.
    let seen =
        std::iter::from_fn(|| events.try_next()).filter(|e| e.reason == DenyReason::NoEndpoints).count();
    let lost = lab.counter(Counter::EventLost)?;
    assert!(lost > 0 && seen as u64 + lost == MANY, "{seen} events, {lost} lost");

    let report = web.udp(&format!("--to {}:53 --n 1 --timeout 1", vip::QUOTES))?;
    assert_eq!(report.ok, 0, "{report:?}");
    let event = events.try_next().context("no event for the denied datagram")?;
    assert_eq!((event.reason, event.proto), (DenyReason::UdpNotProxied, Protocol::Udp));
    lab.end()
}

#[test]
fn udp_keeps_its_backend_and_shows_the_service() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_apps()?;
    let (a, b) = (cluster.pod("shop/db-0")?.spec.clone(), cluster.pod("shop/pay-0")?.spec.clone());
    let mut lab = Lab::new(&cluster, "node-a")?;
    let v4 = [addr(a.v4, ports::UDP), addr(b.v4, ports::UDP)];
    let v6 = [addr(a.v6, ports::UDP), addr(b.v6, ports::UDP)];
    lab.frontend(&format!("{}:53", vip::QUOTES), Protocol::Udp, Verdict::Direct, &v4);
    lab.frontend(&format!("{}:53", vip::QUOTES_V6), Protocol::Udp, Verdict::Direct, &v6);
    lab.capture("shop/web-0", false)?;
    let web = cluster.pod("shop/web-0")?;
    for (to, options) in [
        (vip::QUOTES, ""),
        (vip::QUOTES, "--connected"),
        (vip::QUOTES, "--mapped"),
        (vip::QUOTES, "--connected --mapped"),
        (vip::QUOTES_V6, ""),
        (vip::QUOTES_V6, "--connected"),
    ] {
        let report = web.udp(&format!("--to {to}:53 --n 2000 {options}"))?;
        assert_right(&format!("{to} {options}"), &report, 2000);
        assert_eq!(report.by_backend.len(), 1, "{to} {options}: one socket keeps its backend: {report:?}");
        let report = web.udp(&format!("--to {to}:53 --n 2000 --threads 4 --fresh {options}"))?;
        assert_right(&format!("{to} {options} --fresh"), &report, 2000);
        assert_eq!(report.by_backend.len(), 2, "{to} {options}: new sockets are balanced: {report:?}");
    }
    lab.end()
}

#[test]
fn session_affinity_holds_until_its_timeout_or_its_backend_ends() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_apps()?;
    let (a, b) = (cluster.pod("shop/db-0")?.spec.clone(), cluster.pod("shop/pay-0")?.spec.clone());
    let mut lab = Lab::new(&cluster, "node-a")?;
    let service = format!("{}:80", vip::LEDGER_STICKY);
    let backends = [addr(a.v4, ports::WHO), addr(b.v4, ports::WHO)];
    lab.frontend(&service, Protocol::Tcp, Verdict::Direct, &backends);
    lab.intent.frontends[0].affinity = Some(Duration::from_secs(3600));
    lab.capture("shop/web-0", false)?;
    let web = cluster.pod("shop/web-0")?;
    let once = |n: u64| web.connects(&format!("--to {service} --n {n} --threads 4"));
    // The first connection decides; the others, at the same time, follow it.
    let first = once(1)?;
    let stuck = first.by_backend.keys().next().cloned().context("a backend")?;
    let report = once(500)?;
    assert_right("sticky", &report, 500);
    assert_eq!(report.by_backend.keys().collect::<Vec<_>>(), [&stuck]);

    // Its backend leaves.
    let other = if stuck == a.name { backends[1] } else { backends[0] };
    lab.intent.frontends[0].backends = vec![Backend { addr: other, weight: 1 }];
    lab.apply()?;
    let report = once(500)?;
    assert_right("moved", &report, 500);
    assert!(!report.by_backend.contains_key(&stuck), "{report:?}");

    // With a timeout that is over at once every connect decides anew; a client's choice is the same each time, since
    // it follows from the client and the set of backends.
    lab.intent.frontends[0].backends =
        backends.iter().map(|addr| Backend { addr: *addr, weight: 1 }).collect();
    lab.intent.frontends[0].affinity = Some(Duration::from_nanos(1));
    lab.apply()?;
    let (hits, misses) = (lab.counter(Counter::AffinityHit)?, lab.counter(Counter::AffinityMiss)?);
    let report = once(500)?;
    assert_right("expired", &report, 500);
    assert_eq!(report.by_backend.len(), 1, "{report:?}");
    assert_eq!(lab.counter(Counter::AffinityMiss)? - misses, 500);
    assert_eq!(lab.counter(Counter::AffinityHit)?, hits);
    lab.end()
}

#[test]
fn inbound_spares_probes_and_refuses_what_it_must() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_apps()?;
    let db = cluster.pod("shop/db-0")?.spec.clone();
    let mut lab = Lab::new(&cluster, "node-a")?;
    let mut events = lab.datapath.take_events().context("the events")?;
    lab.capture("shop/db-0", true)?;
    let web = cluster.pod("shop/web-1")?;
    let outbound = lab.intent.pods[0].outbound_v4.context("a port")?;
    // Closed and capture ports are refused from outside, with a reason each.
    for (port, reason) in
        [(9, DenyReason::ClosedPort), (15006, DenyReason::CapturePort), (outbound, DenyReason::CapturePort)]
    {
        assert_eq!(web.dial(&format!("--to {}:{port}", db.v4))?.end, "connect: refused", "port {port}");
        let event = events.try_next().context("an event")?;
        assert_eq!((event.reason, event.inbound, event.dst.port()), (reason, true, port));
        assert_eq!(event.src.map(|src| src.ip()), Some(web.spec.v4.into()));
    }
    // A host process outside the pods' groups is a probe: it reaches the app itself.
    let node = cluster.node("node-a")?;
    let steered = lab.counter(Counter::InboundSteer)?;
    let place = mesh_tests::proc::Place { cgroup: &node.host_cgroup, netns: Some(&node.netns) };
    let to = addr(db.v4, ports::WHO).to_string();
    let args = ["connects", "--to", to.as_str(), "--n", "500", "--threads", "4"];
    let output =
        place.run(&mesh_tests::proc::binary("pod-app")?, &args, &[], &[], Duration::from_secs(60))?;
    let report: mesh_tests::app::ConnectsReport = serde_json::from_slice(&output.stdout)?;
    assert_right("probes", &report, 500);
    assert_eq!(lab.counter(Counter::InboundSteer)?, steered, "a probe was steered");
    assert_eq!(lab.counter(Counter::InboundProbe)?, 500);
    // A pod of the host's network is no probe.
    let pods = node.pods_cgroup.child("hostnet")?;
    let place = mesh_tests::proc::Place { cgroup: &pods, netns: Some(&node.netns) };
    let output =
        place.run(&mesh_tests::proc::binary("pod-app")?, &args, &[], &[], Duration::from_secs(60))?;
    let report: mesh_tests::app::ConnectsReport = serde_json::from_slice(&output.stdout)?;
    assert_right("a host-network pod through the daemon", &report, 500);
    assert_eq!(lab.counter(Counter::InboundSteer)?, steered + 500);
    // The pod reaches itself, by its address and by loopback.
    let own = cluster.pod("shop/db-0")?;
    for to in [addr(db.v4, ports::WHO), addr([127, 0, 0, 1], ports::WHO)] {
        let report = own.connects(&format!("--to {to} --n 100"))?;
        assert_right("itself", &report, 100);
    }
    assert_eq!(lab.counter(Counter::InboundSteer)?, steered + 500);
    lab.end()
}

#[test]
fn listeners_are_followed_after_the_capture() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_apps()?;
    let pod = cluster.pod("shop/web-0")?.spec.clone();
    let mut lab = Lab::new(&cluster, "node-a")?;
    lab.capture("shop/web-0", true)?;
    let client = cluster.pod("shop/web-1")?;
    let dial =
        |port: u16| client.dial(&format!("--to {}:{port} --timeout 1", pod.v4)).map(|dialled| dialled.end);
    // The descriptor may be a moment longer in a child that another test is about to start.
    let closed = |port: u16| {
        wait::until_true("the port to be closed", Duration::from_secs(5), || {
            Ok(dial(port)? == "connect: refused")
        })
    };
    assert_eq!(dial(7777)?, "connect: refused");
    let target = cluster.pod("shop/web-0")?;
    for bind in ["0.0.0.0:7777", "[::]:7777", &format!("{}:7777", pod.v4)] {
        let first = listen(target, bind.parse()?)?;
        assert_ne!(dial(7777)?, "connect: refused", "{bind}");
        drop(first);
        closed(7777).with_context(|| format!("{bind} is closed"))?;
    }
    // Loopback listeners do not open the pod's address.
    let _loopback = listen(target, "127.0.0.1:7777".parse()?)?;
    assert_eq!(dial(7777)?, "connect: refused");
    // What Go's net.Listen opens by default: a Multipath TCP socket. Not every kernel has it.
    let multipath = target.netns.within(|| {
        let protocol = socket2::Protocol::from(libc::IPPROTO_MPTCP);
        let Ok(socket) = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, Some(protocol))
        else {
            return Ok(None);
        };
        socket.bind(&"0.0.0.0:7779".parse::<SocketAddr>()?.into())?;
        socket.listen(8)?;
        Ok(Some(socket))
    })?;
    if let Some(socket) = multipath {
        assert_ne!(dial(7779)?, "connect: refused");
        drop(socket);
        closed(7779)?;
    }
    // Two sockets on one port: the port closes with the second.
    let reuse = || {
        target.netns.within(|| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
            socket.set_reuse_port(true)?;
            socket.bind(&"0.0.0.0:7778".parse::<SocketAddr>()?.into())?;
            socket.listen(8)?;
            Ok(socket)
        })
    };
    let (first, second) = (reuse()?, reuse()?);
    drop(first);
    assert_ne!(dial(7778)?, "connect: refused");
    drop(second);
    closed(7778)?;
    lab.end()
}

#[test]
fn two_data_paths_on_one_kernel_do_not_disturb_each_other() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_apps()?;
    let (a, b) = (cluster.pod("shop/db-0")?.spec.clone(), cluster.pod("shop/pay-0")?.spec.clone());
    let service = format!("{}:80", vip::LEDGER);
    let mut labs = [Lab::new(&cluster, "node-a")?, Lab::new(&cluster, "node-b")?];
    for (lab, (client, backend)) in labs.iter_mut().zip([("shop/web-0", &a), ("shop/web-1", &b)]) {
        let backend = [addr(backend.v4, ports::WHO)];
        lab.frontend(&service, Protocol::Tcp, Verdict::Direct, &backend);
        lab.capture(client, false)?;
    }
    for (client, server) in [("shop/web-0", &a.name), ("shop/web-1", &b.name)] {
        let report = cluster.pod(client)?.connects(&format!("--to {service} --n 2000 --expect {server}"))?;
        assert_right(client, &report, 2000);
    }
    for lab in &labs {
        assert_eq!(lab.counter(Counter::ConnectDirect)?, 2000);
    }
    labs.into_iter().try_for_each(Lab::end)
}

#[test]
fn log_lines_follow_the_level_at_run_time() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_apps()?;
    let db = cluster.pod("shop/db-0")?.spec.clone();
    let lines = Lines::default();
    // The programs' lines come through the log crate, whose logger this sets; the loader keeps the one it finds.
    tracing_subscriber::fmt().with_ansi(false).with_writer(lines.clone()).init();
    let mut lab = Lab::new(&cluster, "node-a")?;
    let service = format!("{}:80", vip::LEDGER);
    lab.frontend(&service, Protocol::Tcp, Verdict::Direct, &[addr(db.v4, ports::WHO)]);
    lab.capture("shop/web-0", false)?;
    let web = cluster.pod("shop/web-0")?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.spawn(lab.datapath.take_logs().context("the log lines")?);

    web.connects(&format!("--to {service} --n 10"))?;
    lab.datapath.set_log_level(log_level::INFO).map_err(chain)?;
    web.connects(&format!("--to {service} --n 3"))?;
    let captured = |text: &str| text.lines().filter(|line| line.contains("captured proto 6")).count();
    wait::until_true("the lines", Duration::from_secs(5), || Ok(captured(&lines.text()) >= 3))?;
    let text = lines.text();
    assert_eq!(captured(&text), 3, "{text}");
    assert!(text.contains(&format!("to [::ffff:{}]:{}", db.v4, ports::WHO)), "{text}");
    lab.datapath.set_log_level(log_level::OFF).map_err(chain)?;
    web.connects(&format!("--to {service} --n 10"))?;
    assert_eq!(captured(&lines.text()), 3);
    lab.end()
}

/// What was logged.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().expect("not poisoned")).into_owned()
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("not poisoned").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl tracing_subscriber::fmt::MakeWriter<'_> for Lines {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[test]
fn a_new_data_path_takes_the_place_of_a_dead_one_and_unload_leaves_nothing() -> Result<()> {
    let cluster = bare()?;
    let pin_dir = cluster.run.bpffs().join("capture-node-a");
    // Dropped without unload: as after a crash, the pins stay.
    drop(Lab::new(&cluster, "node-a")?.datapath);
    let pinned = pin_dir.join(format!("v{}/connect4", mesh_common::ABI_VERSION));
    ensure!(pinned.exists());
    let lab = Lab::new(&cluster, "node-a")?;
    ensure!(Lab::new(&cluster, "node-a").is_err(), "the folder is in use");
    lab.end()?;
    ensure!(!pin_dir.exists(), "pins were left");
    Ok(())
}
