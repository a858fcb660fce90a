//! ClientIP session affinity for connections that the daemon balances.
//!
//! Kubernetes semantics: a client sticks to its endpoint until it has not connected for the service's timeout, also
//! when better endpoints appear; it moves when the endpoint is gone. The kernel does the same for connections that
//! need no proxy. This is the one lock on the connection path, taken only for services that ask for affinity.

use crate::plan::Endpoint;
use mesh_xds::model::Service;
use rand::RngExt;
use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Mutex, PoisonError},
    time::Instant,
};

/// Entries kept at most; the stalest ones go first.
const CAPACITY: usize = 65_536;

type Key = (u64, String, u16);

/// Remembers which endpoint each client of a service with affinity uses.
#[derive(Debug, Default)]
pub struct Affinity {
    table: Mutex<HashMap<Key, (SocketAddr, Instant)>>,
}

impl Affinity {
    /// Picks an endpoint: the remembered one, or one at random by weight. `all` must not be empty.
    ///
    /// `client` is the client pod's netns cookie.
    pub fn pick(&self, client: u64, service: &Service, port: u16, all: &[Endpoint], now: Instant) -> usize {
        let Some(affinity) = service.session_affinity else { return weighted(all) };
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (client, service.key(), port);
        let known =
            table.get(&key).filter(|(_, used)| now.saturating_duration_since(*used) < affinity.timeout);
        let index = known.and_then(|(addr, _)| all.iter().position(|e| e.addr == *addr));
        let index = index.unwrap_or_else(|| weighted(all));
        if table.len() >= CAPACITY && !table.contains_key(&key) {
            evict(&mut table);
        }
        if let Some(endpoint) = all.get(index) {
            table.insert(key, (endpoint.addr, now));
        }
        index
    }

    /// How many clients are remembered.
    pub fn len(&self) -> usize {
        self.table.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Drops the older half, so that a full table costs one pass per 32,768 new clients.
fn evict(table: &mut HashMap<Key, (SocketAddr, Instant)>) {
    let mut times: Vec<Instant> = table.values().map(|(_, used)| *used).collect();
    let middle = times.len() / 2;
    let (_, median, _) = times.select_nth_unstable(middle);
    let median = *median;
    table.retain(|_, (_, used)| *used > median);
    if table.len() >= CAPACITY {
        table.clear();
    }
}

fn weighted(all: &[Endpoint]) -> usize {
    let total: u64 = all.iter().map(|e| u64::from(e.weight)).sum();
    let mut left = rand::rng().random_range(0..total.max(1));
    for (index, endpoint) in all.iter().enumerate() {
        match left.checked_sub(u64::from(endpoint.weight)) {
            Some(rest) => left = rest,
            None => return index,
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::testing::{pod, service};
    use mesh_xds::model::SessionAffinity;
    use std::{sync::Arc, time::Duration};

    fn endpoint(n: u8, weight: u32) -> Endpoint {
        let addr = format!("10.0.0.{n}");
        let workload = Arc::new(pod("p", "shop", &addr));
        Endpoint { workload, addr: SocketAddr::new(addr.parse().unwrap(), 80), weight }
    }

    #[test]
    fn weights_are_honoured() {
        let all = [endpoint(1, 1), endpoint(2, 3)];
        let second = (0..10_000).filter(|_| weighted(&all) == 1).count();
        // 7500 expected, standard deviation 43: six of them on either side.
        assert!((7_240..7_760).contains(&second), "{second}");
    }

    #[test]
    fn a_client_sticks_until_its_timeout_or_its_endpoint_is_gone() {
        let mut svc = service("cart", "shop", "10.96.0.1", &[(80, 80)]);
        svc.session_affinity = Some(SessionAffinity { timeout: Duration::from_secs(10) });
        let affinity = Affinity::default();
        let all: Vec<_> = (1..=50).map(|n| endpoint(n, 1)).collect();
        let start = Instant::now();
        let first = affinity.pick(7, &svc, 80, &all, start);
        for second in 1..30 {
            assert_eq!(affinity.pick(7, &svc, 80, &all, start + Duration::from_secs(second * 5)), first);
        }
        let after = start + Duration::from_secs(29 * 5 + 11);
        let moved = (0..20).any(|client| {
            affinity.table.lock().unwrap().insert((client, svc.key(), 80), (all[first].addr, start));
            affinity.pick(client, &svc, 80, &all, after) != first
        });
        assert!(moved, "an expired entry is not used");
        let without: Vec<_> = all.iter().filter(|e| e.addr != all[first].addr).cloned().collect();
        let other = affinity.pick(7, &svc, 80, &without, start);
        assert!(other < without.len());
    }

    #[test]
    fn the_table_is_bounded() {
        let mut svc = service("cart", "shop", "10.96.0.1", &[(80, 80)]);
        svc.session_affinity = Some(SessionAffinity { timeout: Duration::from_secs(10_800) });
        let (affinity, all, start) = (Affinity::default(), [endpoint(1, 1)], Instant::now());
        for client in 0..(CAPACITY as u64 + 10) {
            affinity.pick(client, &svc, 80, &all, start + Duration::from_micros(client));
        }
        assert!(affinity.len() <= CAPACITY);
        assert!(affinity.len() > CAPACITY / 4);
    }
}
