//! A new daemon takes over from the running one: nobody notices.

use crate::support::{PROPAGATION, assert_right, mesh, vip};
use anyhow::{Context, Result, bail};
use mesh_node::takeover::{self, Channel, Message};
use mesh_tests::{
    app::{ConnectsReport, ports},
    cluster::{Cluster, Pod},
    daemons::NodeOptions,
    wait,
};
use std::{
    io::Write as _,
    os::unix::net::UnixStream,
    sync::atomic::{AtomicBool, Ordering},
    thread::{self, ScopedJoinHandle},
};

/// Connections that a client makes between two looks at the clock.
const CHUNK: u64 = 100;

/// How many takeovers follow each other; more by hand.
fn rounds() -> usize {
    std::env::var("NODEMESH_UPGRADES").ok().and_then(|n| n.parse().ok()).unwrap_or(5)
}

/// Takes a pod out of the cluster, to be used beside changes of the rest.
pub(crate) fn take(cluster: &mut Cluster, key: &str) -> Result<Pod> {
    let at = cluster.pods.iter().position(|pod| pod.key() == key).with_context(|| format!("no pod {key}"))?;
    Ok(cluster.pods.remove(at))
}

/// Connects to a service over and over until `stop`; at least once.
pub(crate) fn load<'s>(
    scope: &'s thread::Scope<'s, '_>,
    pod: &'s Pod,
    to: &str,
    stop: &'s AtomicBool,
) -> ScopedJoinHandle<'s, Result<(u64, ConnectsReport)>> {
    let args = format!("--to {to}:80 --n {CHUNK} --threads 2 --timeout 10");
    scope.spawn(move || {
        let (mut n, mut total) = (0, ConnectsReport::default());
        while n == 0 || !stop.load(Ordering::Relaxed) {
            total.merge(pod.connects(&args)?);
            n += CHUNK;
        }
        Ok((n, total))
    })
}

/// Sets a flag when it goes, so that threads end however a scope is left.
pub(crate) struct Stop<'a>(pub(crate) &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn join<T>(handle: ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    handle.join().map_err(|_| anyhow::anyhow!("a client panicked"))?
}

#[test]
fn a_chain_of_takeovers_under_load_loses_nothing() -> Result<()> {
    let mut cluster = mesh()?;
    let (client, server) = (take(&mut cluster, "shop/web-0")?, take(&mut cluster, "shop/pay-0")?);
    let stop = AtomicBool::new(false);
    let mut old = Vec::new();
    let bytes = 24 << 20;
    thread::scope(|scope| -> Result<()> {
        let ended = Stop(&stop);
        let services = [vip::PAY, vip::DB, vip::CART, vip::LEDGER];
        let clients = services.map(|service| (service, load(scope, &client, service, &stop)));
        // Over the daemons of both nodes, and in the kernel alone.
        let long = [vip::PAY, vip::LEDGER].map(|service| {
            let client = &client;
            let args =
                format!("--to {service}:{} --up {bytes} --down {bytes} --read-rate {}", ports::BULK, 2 << 20);
            (service, scope.spawn(move || client.bulk(&args)))
        });
        for round in 0..rounds() {
            let node = if round % 2 == 0 { "node-a" } else { "node-b" };
            old.push(cluster.take_over(node, &NodeOptions::default())?);
        }
        for (service, bulk) in long {
            let report = join(bulk).with_context(|| format!("the long connection to {service}"))?;
            assert_eq!((report.server_verified, report.received), (bytes, bytes), "{service}");
            assert_eq!(report.up_checksums.0, report.up_checksums.1, "{service}");
            assert_eq!(report.down_checksums.0, report.down_checksums.1, "{service}");
        }
        drop(ended);
        for (service, handle) in clients {
            let (n, report) = join(handle)?;
            println!("{service}: {n} connections, {} right, {:?}", report.ok, report.errors);
            assert_right(&format!("{service} during takeovers"), &report, n);
        }
        Ok(())
    })?;
    // With their last connection the old ones end.
    for mut daemon in old {
        wait::until_true("a daemon that was taken over from to end", PROPAGATION * 2, || {
            Ok(daemon.proc.ended()?.is_some())
        })?;
    }
    drop(server);
    Ok(())
}

#[test]
fn a_takeover_that_fails_leaves_the_old_daemon_serving() -> Result<()> {
    let mut cluster = mesh()?;
    // One that is killed somewhere on the way.
    let (mut successor, old) = cluster.begin_takeover("node-a", &NodeOptions::default())?;
    successor.until("the successor to have begun", PROPAGATION, |proc| {
        Ok(proc.log().contains("taking over from the running daemon"))
    })?;
    successor.kill()?;
    cluster.node_mut("node-a")?.daemon = Some(old);
    // One that gets everything and then goes: the old one has stood still and goes on.
    let socket = cluster.node("node-a")?.dir.join(takeover::SOCKET);
    let mut channel = Channel::call(&socket)?.context("the daemon listens")?;
    let hello = |protocol| Message::Hello {
        protocol,
        abi: mesh_common::ABI_VERSION,
        version: "9.9.9".to_owned(),
        node: "node-a".to_owned(),
    };
    channel.send(&hello(takeover::PROTOCOL), &[])?;
    assert!(matches!(channel.recv()?.0, Message::Welcome { .. }));
    channel.send(&Message::Freeze, &[])?;
    let Message::Frozen { certificates, pods, .. } = channel.recv()?.0 else { bail!("not frozen") };
    assert!(certificates > 0 && pods > 0);
    for _ in 0..certificates + pods {
        channel.recv()?;
    }
    drop(channel);
    cluster.node("node-a")?.cni("DEL", cluster.pod("shop/db-0")?)?;
    cluster.node("node-a")?.cni("ADD", cluster.pod("shop/db-0")?)?;
    let client = cluster.pod("shop/web-0")?;
    for service in [vip::PAY, vip::DB, vip::LEDGER] {
        let report = client.connects(&format!("--to {service}:80 --n 200 --threads 2"))?;
        assert_right(&format!("{service} after a takeover that was killed"), &report, 200);
    }
    // A predecessor is there, but it does not understand.
    for garbage in [&b"\0\0\0\x02{}"[..], b"\xff\xff\xff\xff", b"GET / HTTP/1.1\r\n\r\n"] {
        UnixStream::connect(&socket)?.write_all(garbage)?;
    }
    let mut channel = Channel::call(&socket)?.context("the daemon listens")?;
    channel.send(&hello(99), &[])?;
    let (Message::Refused { reason }, _) = channel.recv()? else { bail!("not refused") };
    assert!(reason.contains("99"), "{reason}");
    // And now for good; a pod that comes and one that goes meanwhile are right afterwards.
    let old = cluster.take_over("node-a", &NodeOptions::default())?;
    let client = cluster.pod("shop/web-0")?;
    cluster.node("node-a")?.cni("CHECK", client)?;
    cluster.node("node-a")?.cni("DEL", cluster.pod("shop/db-0")?)?;
    cluster.node("node-a")?.cni("ADD", cluster.pod("shop/db-0")?)?;
    for service in [vip::PAY, vip::DB, vip::LEDGER] {
        let report = client.connects(&format!("--to {service}:80 --n 200 --threads 2"))?;
        assert_right(&format!("{service} after the takeover"), &report, 200);
    }
    drop(old);
    Ok(())
}
