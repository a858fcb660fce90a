//! The node's bounds at start, and their metrics.

use crate::{
    config::Config,
    local::{self, Limit, NodeLimits, SharedLocals},
    memory,
    metrics::{Metrics, Sample},
    net,
};
use std::sync::Arc;

/// What a process may open where nobody knows: the kernel's default for services.
const USUAL_DESCRIPTORS: u64 = 1024;

/// Raises what can be raised, and says what the rest allows.
pub fn start(config: &Config) -> Arc<NodeLimits> {
    let descriptors = net::raise_descriptor_limit().unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot raise the limit on open files (RLIMIT_NOFILE)");
        USUAL_DESCRIPTORS
    });
    let limits = NodeLimits::new(config.args.max_connections_per_pod, descriptors);
    let (_, connections) = limits.descriptors();
    tracing::info!(
        descriptors,
        for_connections = connections,
        connections_per_pod = limits.connections_per_pod(),
        "limits"
    );
    if connections < 2 * limits.connections_per_pod() {
        tracing::warn!(
            descriptors,
            "a pod cannot have --max-connections-per-pod with this limit on open files: raise it (LimitNOFILE)"
        );
    }
    Arc::new(limits)
}

/// Registers the metrics of the bounds and of memory.
#[expect(clippy::cast_precision_loss, reason = "counts and bytes well below 2^53")]
pub fn export(metrics: &Metrics, limits: &Arc<NodeLimits>, locals: &SharedLocals) {
    let hits = limits.clone();
    metrics.sample_counters("nodemesh_limit_hits", "How often a bound was reached, by bound", move || {
        hits.hits().map(|(limit, n)| Sample::new([("limit", limit.label())], n)).collect()
    });
    let pods = locals.clone();
    metrics.sample_gauges(
        "nodemesh_limit_current",
        "What a pod holds of each thing that is bounded; without a line it holds nothing",
        move || {
            let locals = pods.load();
            let samples = locals.iter().flat_map(|pod| {
                let held = pod.limits.current();
                held.into_iter().filter(|(_, n)| *n > 0).map(|(limit, n)| {
                    let pod = pod.name.to_string();
                    Sample::new([("limit", limit.label()), ("pod", pod.as_str())], n as f64)
                })
            });
            samples.collect()
        },
    );
    let node = limits.clone();
    metrics.sample_gauges("nodemesh_limit_max", "The bounds, by pod or of the node", move || {
        let of = |scope, limit: Limit, n: usize| {
            Sample::new([("scope", scope), ("limit", limit.label())], n as f64)
        };
        vec![
            of("pod", Limit::Connections, node.connections_per_pod()),
            of("pod", Limit::Tunnels, local::MAX_TUNNELS),
            of("pod", Limit::Handshakes, local::MAX_HANDSHAKES),
            of("pod", Limit::SettingUp, local::MAX_SETTING_UP),
            of("pod", Limit::Buffered, local::MAX_BUFFERED),
            of("node", Limit::Handshakes, local::MAX_HANDSHAKES_OF_NODE),
            of("node", Limit::Descriptors, node.descriptors().1),
        ]
    });
    metrics.sample_gauges("nodemesh_memory_bytes", "What the allocator has, by state", || {
        let stats = memory::stats();
        let of = |state, n: usize| Sample::new([("state", state)], n as f64);
        vec![of("allocated", stats.allocated), of("active", stats.active), of("resident", stats.resident)]
    });
}
