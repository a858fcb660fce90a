//! The daemon away: what the programs do without it, and by what they know.

use super::lab::*;
use crate::support::{assert_right, bare, vip};
use anyhow::{Context, Result, ensure};
use mesh_common::code::{Counter, DenyReason};
use mesh_node::bpf::{Away, Destination, Verdict};
use mesh_tests::{app::ports, wait};
use mesh_xds::model::Protocol;
use std::{
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

/// Connects of one kind.
const N: u64 = 500;

/// Longer than the programs believe a heartbeat.
const STALE: Duration = Duration::from_secs(10);

/// A client, a permissive server and a strict one, each behind a service and dialled by its own address.
struct Scene<'a> {
    lab: Lab<'a>,
    open: [SocketAddr; 3],
    shut: [SocketAddr; 3],
}

impl<'a> Scene<'a> {
    fn new(cluster: &'a mesh_tests::cluster::Cluster) -> Result<Self> {
        let (cart, db) = (cluster.pod("shop/cart-0")?.spec.clone(), cluster.pod("shop/db-0")?.spec.clone());
        let mut lab = Lab::new(cluster, "node-a")?;
        let open = [
            SocketAddr::new(vip::CART.parse()?, 80),
            SocketAddr::new("fd00:10:96::a".parse()?, 80),
            addr(cart.v4, ports::WHO),
        ];
        let shut = [
            SocketAddr::new(vip::DB.parse()?, 80),
            format!("{}:80", vip::DB_V6).parse()?,
            addr(db.v4, ports::WHO),
        ];
        for (service, pod, away) in [(&open, &cart, Away::Direct), (&shut, &db, Away::Deny)] {
            let backends = [addr(pod.v4, ports::WHO), addr(pod.v6, ports::WHO)];
            for (vip, backend) in service.iter().zip(backends) {
                lab.frontend(&vip.to_string(), Protocol::Tcp, Verdict::Proxy, &[backend]);
                if let Some(frontend) = lab.intent.frontends.last_mut() {
                    frontend.away = away;
                }
                lab.upstream.insert(*vip, backend);
            }
            lab.intent.destinations.push(Destination { addr: pod.v4.into(), verdict: Verdict::Proxy, away });
            lab.upstream.insert(service[2], service[2]);
        }
        for (pod, strict) in [("shop/cart-0", false), ("shop/db-0", true), ("shop/web-0", false)] {
            lab.capture(pod, strict)?;
        }
        Ok(Self { lab, open, shut })
    }

    /// Everything goes through the daemon.
    fn assert_proxied(&self, when: &str) -> Result<()> {
        let web = self.lab.cluster.pod("shop/web-0")?;
        let before = self.lab.counter(Counter::ConnectProxy)?;
        for to in self.open.iter().chain(&self.shut) {
            let report = web.connects(&format!("--to {to} --n {N} --threads 4 --any-client"))?;
            assert_right(&format!("{when}: {to}"), &report, N);
        }
        ensure!(self.lab.counter(Counter::ConnectProxy)? == before + 6 * N, "{when}");
        self.lab.assert_no_wrong_destination(when);
        Ok(())
    }

    /// What takes plaintext is reached directly, the rest is refused at once; not one connect goes to the listener.
    fn assert_away(&mut self, when: &str) -> Result<()> {
        let counters = [Counter::AwayDirect, Counter::AwayDeny, Counter::ConnectProxy, Counter::ConnectDeny];
        let lab = &self.lab;
        let read = || -> Result<Vec<u64>> { counters.into_iter().map(|c| lab.counter(c)).collect() };
        let before = read()?;
        let web = lab.cluster.pod("shop/web-0")?;
        for to in &self.open {
            // The server sees the client itself: nothing is in between.
            let report = web.connects(&format!("--to {to} --n {N} --threads 4 --expect cart-0"))?;
            assert_right(&format!("{when}: {to}"), &report, N);
        }
        for to in &self.shut {
            let start = Instant::now();
            let report = web.connects(&format!("--to {to} --n {N} --threads 4 --timeout 20"))?;
            let refused: u64 =
                report.errors.iter().filter(|(text, _)| text.contains("refused")).map(|(_, n)| n).sum();
            assert_eq!((report.ok, refused), (0, N), "{when}: {to}: {report:?}");
            // Not a measurement: one that hung would have taken as long as the client waits.
            ensure!(start.elapsed() < Duration::from_secs(20), "{when}: a refused connect hung");
        }
        let grown: Vec<u64> = read()?.iter().zip(&before).map(|(now, before)| now - before).collect();
        assert_eq!(grown, [3 * N, 3 * N, 0, 0], "{when}: {counters:?}");
        Ok(())
    }
}

#[test]
fn permissive_goes_direct_and_strict_is_refused_at_once() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_apps()?;
    let mut scene = Scene::new(&cluster)?;
    let mut events = scene.lab.datapath.take_events().context("the events")?;
    let heartbeat = scene.lab.datapath.heartbeat();
    scene.assert_proxied("there")?;

    // It has said that it ends. Its listeners are still there.
    scene.lab.heart.take().context("a heart")?.stop();
    heartbeat.end()?;
    scene.assert_away("ended")?;
    let event = events.try_next().context("an event")?;
    assert_eq!((event.reason, event.inbound), (DenyReason::DaemonAway, false));

    // It is there again.
    scene.lab.heart = Some(Heart::start(heartbeat)?);
    scene.assert_proxied("again")?;

    // It hangs: its listeners are there, the heart is still, nobody has said so.
    scene.lab.heart.take().context("a heart")?.stop();
    let web = cluster.pod("shop/web-0")?;
    wait::until_true("the heartbeat to be stale", STALE, || {
        let before = scene.lab.counter(Counter::AwayDirect)?;
        web.connects(&format!("--to {} --any-client", scene.open[0]))?;
        Ok(scene.lab.counter(Counter::AwayDirect)? > before)
    })?;
    scene.assert_away("hanging")?;
    inbound_without_the_daemon(&scene)?;

    // Its heart beats, but the listeners are gone: it died a moment ago.
    scene.lab.heart = Some(Heart::start(scene.lab.datapath.heartbeat())?);
    scene.assert_proxied("before it dies")?;
    for pod in &mut scene.lab.intent.pods {
        (pod.outbound_v4, pod.outbound_v6) = (Some(1), Some(1));
    }
    scene.lab.apply()?;
    scene.assert_away("dead")?;
    scene.lab.end()
}

/// Plaintext from outside: refused by the strict pod, for a reason that is said; the permissive one is reached.
fn inbound_without_the_daemon(scene: &Scene<'_>) -> Result<()> {
    let outside = scene.lab.cluster.pod("shop/web-1")?;
    let reached: Ipv4Addr = scene.lab.cluster.pod("shop/cart-0")?.spec.v4;
    let (steered, dropped) =
        (scene.lab.counter(Counter::InboundSteer)?, scene.lab.counter(Counter::InboundDrop)?);
    let report = outside.connects(&format!("--to {reached}:{} --n {N} --expect cart-0", ports::WHO))?;
    assert_right("permissive", &report, N);
    let refused = outside.dial(&format!("--to {} --timeout 20", scene.shut[2]))?;
    assert_eq!(refused.end, "connect: refused", "{refused:?}");
    ensure!(scene.lab.counter(Counter::InboundSteer)? == steered, "steered to a daemon that hangs");
    ensure!(scene.lab.counter(Counter::InboundDrop)? == dropped + 1);
    Ok(())
}
