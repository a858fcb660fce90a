//! The data path on a kernel that lacks something: the capture with each feature masked, and with all of them.

use super::lab::*;
use crate::support::{assert_right, bare, vip};
use anyhow::{Context, Result, ensure};
use mesh_common::code::{Counter, DenyReason};
use mesh_node::{
    bpf::{Feature, Features, Verdict},
    check,
};
use mesh_tests::{app::ports, cluster::Cluster};
use mesh_xds::model::Protocol;
use std::{collections::BTreeSet, net::SocketAddr};

/// Connects per way.
const N: u64 = 500;

fn masks() -> Vec<BTreeSet<Feature>> {
    let mut masks: Vec<_> = Feature::ALL.into_iter().map(|feature| BTreeSet::from([feature])).collect();
    masks.push(Feature::ALL.into());
    masks
}

/// A data path that captures `shop/web-0`: a direct, a proxied, an empty and a forbidden service.
fn lab<'a>(cluster: &'a Cluster, mask: &BTreeSet<Feature>) -> Result<Lab<'a>> {
    let db = &cluster.pod("shop/db-0")?.spec;
    let mut lab = Lab::without(cluster, "node-a", mask)?;
    let backend = [addr(db.v4, ports::WHO)];
    let proxied: SocketAddr = format!("{}:80", vip::DB).parse()?;
    lab.frontend(&format!("{}:80", vip::LEDGER), Protocol::Tcp, Verdict::Direct, &backend);
    lab.frontend(&proxied.to_string(), Protocol::Tcp, Verdict::Proxy, &[]);
    lab.upstream.insert(proxied, backend[0]);
    lab.frontend(&format!("{}:80", vip::PAY), Protocol::Tcp, Verdict::Direct, &[]);
    lab.frontend(&format!("{}:80", vip::PAY_V6), Protocol::Tcp, Verdict::Deny(DenyReason::Policy), &[]);
    lab.frontend(&format!("{}:53", vip::QUOTES), Protocol::Udp, Verdict::Proxy, &[]);
    lab.capture("shop/web-0", false)?;
    lab.capture("shop/db-0", false)?;
    Ok(lab)
}

#[test]
fn what_is_left_works_with_any_feature_masked() -> Result<()> {
    for mask in masks() {
        // A new one each time: the relay's threads end with the process only.
        let mut cluster = bare()?;
        cluster.start_apps()?;
        let lab = lab(&cluster, &mask)?;
        let web = cluster.pod("shop/web-0")?;
        let named = !mask.contains(&Feature::Peername);
        for (service, way) in [
            (vip::LEDGER, "--mode plain"),
            (vip::LEDGER, "--mode tfo"),
            (vip::DB, "--mode plain --any-client"),
            (vip::DB, "--mode nonblock --mapped --any-client"),
        ] {
            let to = format!("{service}:80");
            let report = web.connects(&format!("--to {to} --n {N} --threads 4 {way} --expect db-0"))?;
            let what = format!("{to} {way} without {mask:?}");
            if named {
                assert_right(&what, &report, N);
            } else {
                // Every connection comes to the right server, and the client sees whom it really speaks with.
                let wrong = (report.lost, report.wrong_backend, report.by_backend.len());
                assert_eq!((wrong, report.wrong_peer), ((0, 0, 1), N), "{what}: {report:#?}");
            }
        }
        // From outside: through the inbound capture.
        let to = addr(cluster.pod("shop/db-0")?.spec.v4, ports::WHO);
        let report = cluster.pod("shop/web-1")?.connects(&format!("--to {to} --n {N} --threads 4"))?;
        if named {
            assert_right("inbound", &report, N);
        } else {
            assert_eq!((report.lost, report.wrong_client), (0, N), "{report:#?}");
        }
        ensure!(lab.counter(Counter::ConnectProxy)? >= 2 * N, "without {mask:?}");
        ensure!(lab.counter(Counter::ConnectDirect)? >= 2 * N, "without {mask:?}");
        lab.assert_no_wrong_destination(&format!("without {mask:?}"));
        lab.end()?;
    }
    Ok(())
}

#[test]
fn refusals_are_refusals_with_any_feature_masked() -> Result<()> {
    for mask in masks() {
        // A new one each time: the relay's threads end with the process only.
        let mut cluster = bare()?;
        cluster.start_apps()?;
        let mut lab = lab(&cluster, &mask)?;
        let mut events = lab.datapath.take_events().context("the events")?;
        let web = cluster.pod("shop/web-0")?;
        for (to, reason) in [
            (format!("{}:80", vip::PAY), DenyReason::NoEndpoints),
            (format!("{}:80", vip::PAY_V6), DenyReason::Policy),
        ] {
            // Not even a slow one: that would end with a timeout.
            assert_eq!(web.dial(&format!("--to {to}"))?.end, "connect: refused", "{to} without {mask:?}");
            let event = events.try_next().context("an event")?;
            assert_eq!((event.reason, event.dst.to_string()), (reason, to), "without {mask:?}");
            let report = web.connects(&format!("--to {} --n 50 --mode nonblock", event.dst))?;
            assert_eq!((report.ok, report.lost), (0, 50), "{report:?}");
            ensure!(report.errors.keys().all(|error| error.contains("refused")), "{report:?}");
            while events.try_next().is_some() {}
        }
        let report = web.udp(&format!("--to {}:53 --n 1 --timeout 1", vip::QUOTES))?;
        assert_eq!(report.ok, 0, "without {mask:?}: {report:?}");
        let event = events.try_next().context("no event for the denied datagram")?;
        assert_eq!(event.reason, DenyReason::UdpNotProxied);
        lab.end()?;
    }
    Ok(())
}

/// What `check` says is what loading finds, here with everything that this kernel has and with nothing that it can lack.
#[test]
fn check_says_what_is_missing_and_what_that_costs() -> Result<()> {
    for mask in [BTreeSet::new(), Feature::ALL.into()] {
        let there = Features::probe(&mask)?;
        let text = check::render(&check::check(&check::CheckConfig {
            disabled: mask,
            ..check::CheckConfig::default()
        }));
        for feature in Feature::ALL {
            let word = if there.has(feature) { "ok  " } else { "less" };
            let line = text.lines().find(|line| line.contains(feature.name())).context("no line")?;
            ensure!(line.starts_with(word), "{feature}: {text}");
            ensure!(there.has(feature) || line.contains(feature.cost()), "{feature}: {text}");
        }
        let programs = text.lines().find(|line| line.contains("programs")).context("no line")?;
        ensure!(programs.starts_with("ok "), "{text}");
    }
    Ok(())
}
