//! Metrics that are read when they are asked for.

use super::{listeners::Handlers, view::View};
use crate::{
    dns::Dns,
    hbone::Pool,
    metrics::{Metrics, Sample},
    outbound::Affinity,
};
use std::sync::Arc;

/// Registers them.
pub(super) fn sampled(
    metrics: &Arc<Metrics>,
    view: &Arc<View>,
    handlers: &Arc<Handlers>,
    affinity: &Arc<Affinity>,
) {
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
    if let Some(dns) = &handlers.dns {
        sampled_dns(metrics, dns);
    }
    let weak = Arc::downgrade(affinity);
    #[expect(clippy::cast_precision_loss, reason = "at most 65,536")]
    metrics.sample_gauges(
        "nodemesh_affinity_entries",
        "Clients with session affinity in the daemon",
        move || vec![Sample::new([], weak.upgrade().map_or(0.0, |a| a.len() as f64))],
    );
}

fn sampled_dns(metrics: &Metrics, dns: &Dns) {
    let outcomes = dns.clone();
    let help = "DNS queries of captured pods, by what became of them";
    metrics.sample_counters("nodemesh_dns_queries", help, move || outcomes.outcomes());
    let families = [
        ("nodemesh_dns_cache_entries", "Answers of nameservers that are kept"),
        ("nodemesh_dns_cache_bytes", "Bytes of these answers"),
        ("nodemesh_dns_waiting", "DNS queries that wait for nameservers"),
    ];
    for (n, (name, help)) in families.into_iter().enumerate() {
        let dns = dns.clone();
        metrics.sample_gauges(name, help, move || vec![Sample::new([], dns.sizes()[n])]);
    }
}
