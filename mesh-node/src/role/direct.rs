//! In-kernel connections in the metrics: the kernel counts them, here they get their labels.
//!
//! Those to a backend outside of the mesh have the client's side only; those between two pods of this node both sides, as
//! through the daemon.

use crate::{
    bpf::DirectStat,
    local::SharedLocals,
    metrics::{Metrics, Reporter, Security},
    outcome::Ends,
    state::Store,
};
use mesh_xds::model::Protocol;
use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

/// Source, dialled address, backend, and whether a verdict stood in for the daemon.
type Key = (u64, SocketAddr, SocketAddr, bool);

/// Opened, closed, sent, received, retransmits, round-trip times and their number.
type Totals = [u64; 7];

/// Turns the kernel's running totals into increments of the TCP series.
pub struct DirectMetrics {
    store: Arc<Store>,
    locals: SharedLocals,
    metrics: Arc<Metrics>,
    /// The totals that were counted already. As large as the kernel's table at most: rows that left it are dropped.
    counted: Mutex<HashMap<Key, Totals>>,
}

impl DirectMetrics {
    /// Nothing counted yet.
    pub fn new(store: Arc<Store>, locals: SharedLocals, metrics: Arc<Metrics>) -> Self {
        Self { store, locals, metrics, counted: Mutex::default() }
    }

    /// Takes what is in the table as counted already.
    pub fn skip(&self, rows: &[DirectStat]) {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        counted.extend(rows.iter().map(|row| (key(row), totals(row))));
    }

    /// Counts what has come since the last call. `rows` is the whole table.
    pub fn count(&self, rows: &[DirectStat]) {
        let (world, locals) = (self.store.world(), self.locals.load());
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let mut now = HashMap::with_capacity(rows.len());
        for row in rows {
            let (key, totals) = (key(row), totals(row));
            let before = counted.get(&key).copied().unwrap_or_default();
            now.insert(key, totals);
            // A smaller total is a row that the kernel evicted and began anew.
            let fresh = totals.iter().zip(&before).any(|(n, b)| n < b);
            let delta = |i: usize| if fresh { totals[i] } else { totals[i] - before[i] };
            if totals == before {
                continue;
            }
            let source = locals.by_cookie(row.src_cookie);
            let local = row.local.then(|| locals.by_addr(&row.backend.ip())).flatten();
            let found = world.service_port(&row.vip.ip(), row.vip.port(), Protocol::Tcp);
            let ends = Ends {
                source: source.and_then(|pod| world.workload_by_pod(&pod.name)).cloned(),
                source_id: source.map(|pod| pod.identity.clone()),
                destination: world.workload_by_addr(&row.backend.ip()).cloned(),
                service: found.map(|f| f.service),
                destination_id: local.map(|pod| pod.identity.clone()),
                security: if row.local { Security::NodeLocal } else { Security::None },
                ..Ends::default()
            };
            let sides = [Reporter::Source, Reporter::Destination];
            for side in &sides[..if row.local { 2 } else { 1 }] {
                // The client's bytes are what the destination received.
                let series = self.metrics.tcp(&ends.labels(*side, "-"));
                series.add(delta(0), delta(1), delta(3), delta(2));
                series.add_direct(delta(4), delta(5), delta(6));
            }
        }
        *counted = now;
    }
}

fn key(row: &DirectStat) -> Key {
    (row.src_cookie, row.vip, row.backend, row.local)
}

fn totals(row: &DirectStat) -> Totals {
    let (rtt, samples) = row.rtt_sum_us;
    [row.opened, row.closed, row.sent_bytes, row.received_bytes, row.retransmits, rtt, samples]
}

#[cfg(test)]
mod tests {
    use super::*;
    use arc_swap::ArcSwap;

    #[test]
    fn only_increments_are_counted_and_a_restarted_row_counts_whole() {
        let metrics = Arc::new(Metrics::default());
        let locals = Arc::new(ArcSwap::default());
        let direct = DirectMetrics::new(Arc::default(), locals, metrics.clone());
        let row = |opened, sent_bytes| DirectStat {
            src_cookie: 1,
            vip: "10.96.0.1:80".parse().unwrap(),
            backend: "10.0.0.1:8080".parse().unwrap(),
            local: false,
            opened,
            closed: opened,
            sent_bytes,
            received_bytes: 0,
            retransmits: 0,
            rtt_us: None,
            rtt_sum_us: (0, 0),
        };
        for rows in [[row(3, 100)], [row(5, 150)], [row(5, 150)], [row(1, 10)]] {
            direct.count(&rows);
        }
        let text = metrics.render().unwrap();
        let value = |name: &str| -> u64 {
            let line = text.lines().find(|l| l.starts_with(&format!("{name}_total{{"))).unwrap();
            line.rsplit(' ').next().unwrap().parse().unwrap()
        };
        assert_eq!(value("istio_tcp_connections_opened"), 6);
        assert_eq!(value("istio_tcp_connections_closed"), 6);
        assert_eq!(value("istio_tcp_received_bytes"), 160);
        assert_eq!(value("istio_tcp_sent_bytes"), 0);
    }
}
