//! The same-node fast path: what a cached verdict opens, for how long, and what is counted.

use super::{WAYS, lab::*};
use crate::support::{assert_right, bare, vip};
use anyhow::{Context, Result};
use mesh_common::code::Counter;
use mesh_node::{
    bpf::{Destination, LocalFlow, Verdict, Verdicts},
    net::ns::NetNs,
};
use mesh_tests::{
    app::ports,
    cluster::{Cluster, Pod},
    proc::{self, Proc},
    wait,
};
use mesh_xds::model::Protocol;
use std::{net::SocketAddr, time::Duration};

const SOON: Duration = Duration::from_secs(10);

/// A client and a strict server, with services for some of its ports, and no verdict yet.
fn scene(cluster: &Cluster) -> Result<(Lab<'_>, Verdicts, u64)> {
    let db = cluster.pod("shop/db-0")?.spec.clone();
    let mut lab = Lab::new(cluster, "node-a")?;
    let backends = [
        (vip::DB, addr(db.v4, ports::WHO)),
        (vip::DB_V6, addr(db.v6, ports::WHO)),
        (vip::DB, addr(db.v4, ports::BULK)),
        (vip::DB, addr(db.v4, ports::SLEEP)),
        (vip::DB, addr(db.v4, 9)),
    ];
    for (vip, backend) in backends {
        let service = format!("{vip}:{}", backend.port());
        lab.frontend(&service, Protocol::Tcp, Verdict::Proxy, &[backend]);
        lab.upstream.insert(service.parse()?, backend);
    }
    let away = mesh_node::bpf::Away::Deny;
    lab.intent.destinations.push(Destination { addr: db.v4.into(), verdict: Verdict::Proxy, away });
    lab.upstream.insert(addr(db.v4, ports::WHO), addr(db.v4, ports::WHO));
    lab.capture("shop/db-0", true)?;
    lab.capture("shop/web-0", false)?;
    let verdicts = lab.datapath.verdicts();
    let cookie = NetNs::open(&cluster.pod("shop/web-0")?.netns.path())?.cookie();
    Ok((lab, verdicts, cookie))
}

/// A connection that stays until the process is dropped.
fn hold(cluster: &Cluster, web: &Pod, to: &str) -> Result<Proc> {
    let args = ["dial", "--to", to, "--timeout", "120"];
    web.place().spawn("holder", &proc::binary("pod-app")?, &args, &cluster.run.dir().join("holder.log"))
}

fn await_flows(verdicts: &Verdicts, n: usize) -> Result<Vec<LocalFlow>> {
    wait::until(&format!("{n} live local connections"), SOON, || {
        let flows = verdicts.flows()?;
        Ok((flows.len() == n).then_some(flows))
    })
}

#[test]
fn a_verdict_opens_the_way_without_the_daemon_in_every_way_of_connecting() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_apps()?;
    let (mut lab, verdicts, cookie) = scene(&cluster)?;
    let db = cluster.pod("shop/db-0")?.spec.clone();
    let web = cluster.pod("shop/web-0")?;
    let generation = verdicts.bump()?;
    assert_eq!(verdicts.generation()?, generation);
    for ip in [db.v4.into(), db.v6.into()] {
        verdicts.allow(cookie, SocketAddr::new(ip, ports::WHO), generation)?;
    }
    // The daemon is away: it has no part in this.
    lab.heart.take().context("a heart")?.stop();
    lab.datapath.beat()?;
    lab.datapath.end_beat()?;

    let service = format!("{}:{}", vip::DB, ports::WHO);
    let mut total = 0;
    for (way, n) in WAYS {
        let n = n / 4;
        // The addresses on both sides are compared: the service for the client, the client itself for the server.
        let report = web.connects(&format!("--to {service} --n {n} --threads 4 {way} --expect db-0"))?;
        assert_right(way, &report, n);
        eprintln!("local {way}: {n} in {} ms", report.millis);
        total += n;
    }
    for to in [format!("{}:{}", vip::DB_V6, ports::WHO), addr(db.v4, ports::WHO).to_string()] {
        let report = web.connects(&format!("--to {to} --n 500 --threads 4 --expect db-0"))?;
        assert_right(&to, &report, 500);
        total += 500;
    }
    for (counter, expected) in [
        (Counter::ConnectLocal, total),
        (Counter::InboundFlow, total),
        (Counter::ConnectProxy, 0),
        (Counter::InboundSteer, 0),
        (Counter::LocalFlowsFull, 0),
    ] {
        assert_eq!(lab.counter(counter)?, expected, "{counter}");
    }
    await_flows(&verdicts, 0)?;
    let rows = lab.datapath.direct_stats().map_err(chain)?;
    assert!(rows.iter().all(|row| row.local && row.src_cookie == cookie), "{rows:?}");
    assert_eq!(rows.iter().map(|row| row.opened).sum::<u64>(), total);
    assert_eq!(rows.iter().map(|row| row.closed).sum::<u64>(), total);
    assert!(rows.iter().all(|row| row.rtt_us.is_some_and(|us| us > 0)), "{rows:?}");

    // What has no verdict is refused, since the daemon is away.
    let other = web.dial(&format!("--to {}:{} --timeout 20", vip::DB, ports::BULK))?;
    assert_eq!(other.end, "connect: refused");
    lab.end()
}

#[test]
fn bytes_are_exact_and_what_never_came_about_is_not_counted() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_apps()?;
    let (lab, verdicts, cookie) = scene(&cluster)?;
    let db = cluster.pod("shop/db-0")?.spec.clone();
    let web = cluster.pod("shop/web-0")?;
    let generation = verdicts.bump()?;
    for port in [ports::BULK, 9] {
        verdicts.allow(cookie, addr(db.v4, port), generation)?;
    }
    // A closed port: the client hears of it at once, and nothing stays behind.
    let closed = web.dial(&format!("--to {}:9 --timeout 20", vip::DB))?;
    assert_eq!(closed.end, "connect: refused");
    await_flows(&verdicts, 0)?;
    assert_eq!(lab.counter(Counter::InboundFlow)?, 1, "it was let through");
    assert_eq!(lab.datapath.direct_stats().map_err(chain)?, []);

    let (up, down) = (3 << 20, 5 << 20);
    let bulk = web.bulk(&format!("--to {}:{} --up {up} --down {down}", vip::DB, ports::BULK))?;
    assert_eq!((bulk.server_verified, bulk.received), (up, down));
    let row = wait::until("the connection to be closed", SOON, || {
        let rows = lab.datapath.direct_stats().map_err(chain)?;
        Ok(rows.into_iter().find(|row| row.closed == 1))
    })?;
    assert_eq!((row.local, row.opened, row.backend), (true, 1, addr(db.v4, ports::BULK)));
    assert_eq!(row.vip, SocketAddr::new(vip::DB.parse()?, ports::BULK));
    // The protocol adds a header and a trailer of well under a kilobyte.
    assert!((up..up + 1024).contains(&row.sent_bytes), "{row:?}");
    assert!((down..down + 1024).contains(&row.received_bytes), "{row:?}");
    lab.end()
}

#[test]
fn a_new_generation_closes_the_way_for_new_connections_and_lists_the_old_ones() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_apps()?;
    let (lab, verdicts, cookie) = scene(&cluster)?;
    let db = cluster.pod("shop/db-0")?.spec.clone();
    let web = cluster.pod("shop/web-0")?;
    let (who, sleep) = (addr(db.v4, ports::WHO), addr(db.v4, ports::SLEEP));
    let service = format!("{}:{}", vip::DB, ports::WHO);
    let outcomes = || -> Result<(u64, u64)> {
        Ok((lab.counter(Counter::ConnectLocal)?, lab.counter(Counter::ConnectProxy)?))
    };
    let connects = |when: &str| -> Result<(u64, u64)> {
        let before = outcomes()?;
        let report = web.connects(&format!("--to {service} --n 200 --threads 4 --any-client"))?;
        assert_right(when, &report, 200);
        let now = outcomes()?;
        Ok((now.0 - before.0, now.1 - before.1))
    };
    assert_eq!(connects("no verdict")?, (0, 200));
    let old = verdicts.bump()?;
    verdicts.allow(cookie, who, old)?;
    verdicts.allow(cookie, sleep, old)?;
    assert_eq!(connects("allowed")?, (200, 0));

    let mut held = hold(&cluster, web, &format!("{}:{}", vip::DB, ports::SLEEP))?;
    let flow = await_flows(&verdicts, 1)?[0];
    assert_eq!((flow.server, flow.cookie, flow.generation), (sleep, cookie, old));
    assert_eq!(flow.dialled, SocketAddr::new(vip::DB.parse()?, ports::SLEEP));
    assert_eq!(flow.client.ip(), web.spec.v4);
    assert_eq!(verdicts.flow(flow.client, flow.server)?, Some(flow));

    // The policy changes.
    let new = verdicts.bump()?;
    assert_ne!(new, old);
    assert_eq!(connects("the old verdict")?, (0, 200));
    verdicts.allow(cookie, who, old)?;
    assert_eq!(connects("a verdict that came too late")?, (0, 200));
    assert_eq!(
        verdicts.flows()?,
        [flow],
        "established connections stay, with the generation that they are of"
    );
    held.check_running()?;

    // Its own verdict, and its end.
    verdicts.allow(cookie, who, new)?;
    assert_eq!(connects("allowed again")?, (200, 0));
    verdicts.deny(cookie, who)?;
    assert_eq!(connects("taken back")?, (0, 200));
    held.kill()?;
    await_flows(&verdicts, 0)?;

    // A flow that the kernel did not end; not one that has taken its place.
    verdicts.allow(cookie, sleep, new)?;
    let _held = hold(&cluster, web, &format!("{}:{}", vip::DB, ports::SLEEP))?;
    let flow = await_flows(&verdicts, 1)?[0];
    verdicts.forget(&LocalFlow { opened_ns: flow.opened_ns - 1, ..flow })?;
    assert_eq!(verdicts.flows()?, [flow]);
    verdicts.forget(&flow)?;
    assert_eq!(verdicts.flows()?, []);
    lab.end()
}
