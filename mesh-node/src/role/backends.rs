//! The end of sockets that the kernel balanced to a backend which is gone.
//!
//! A connected UDP socket would send into the void, or to whoever gets the address next, and an idle TCP connection
//! would not notice for hours. The kernel knows what a socket was balanced to: of TCP sockets sock_diag shows the BPF
//! storage, of UDP sockets the cookie. So connections that an app made to the pod's own address are never touched. Deliberately absent: unready backends, whose connections go
//! on, and connections that the daemon carries.

use crate::{
    bpf::{BalancedSocket, DirectStat, SocketMeta},
    enroll::DNS_PORT,
    local::{LocalPod, Locals},
    metrics::Metrics,
    plan::still_backs,
    state::World,
};
use mesh_xds::model::{Protocol, Workload};
use std::{
    collections::{HashMap, HashSet},
    io,
    net::SocketAddr,
    sync::Arc,
};

/// Endpoints that left, each with the services that it left.
#[derive(Debug, Default)]
pub struct Gone {
    tcp: HashMap<SocketAddr, HashSet<String>>,
    udp: HashMap<SocketAddr, HashSet<String>>,
}

impl Gone {
    /// What `complete` lacks of `before`, as far as the workloads named in `changed` tell. The two results: endpoints whose address and port now belong to another
    /// workload of the same service (sockets of before can be told from new ones only until the kernel knows the new
    /// one), and all others.
    pub fn of(before: &World, changed: &[String], complete: &World) -> (Self, Self) {
        let (mut replaced, mut others) = (Self::default(), Self::default());
        for uid in changed {
            let Some(old) = before.workload(uid) else { continue };
            let stays = complete.workload(uid).map(|w| endpoints(w)).unwrap_or_default();
            for left in endpoints(old).difference(&stays) {
                let (protocol, key, addr) = left;
                let again = complete.service(key).is_some_and(|service| {
                    let mut ports = service.ports.iter().filter(|port| port.protocol == *protocol);
                    ports.any(|port| still_backs(complete, service, port, *addr))
                });
                let gone = if again { &mut replaced } else { &mut others };
                let by_addr = if *protocol == Protocol::Udp { &mut gone.udp } else { &mut gone.tcp };
                by_addr.entry(*addr).or_default().insert((*key).to_owned());
            }
        }
        (replaced, others)
    }

    /// Whether nothing left.
    pub fn is_empty(&self) -> bool {
        self.tcp.is_empty() && self.udp.is_empty()
    }

    fn of_protocol(&self, protocol: Protocol) -> &HashMap<SocketAddr, HashSet<String>> {
        match protocol {
            Protocol::Tcp => &self.tcp,
            Protocol::Udp => &self.udp,
        }
    }

    /// Whether a socket was balanced to one of these, through a service that it left.
    fn has(&self, protocol: Protocol, socket: &BalancedSocket, before: &World, complete: &World) -> bool {
        let Some(services) = self.of_protocol(protocol).get(&socket.backend) else { return false };
        match before.service_port(&socket.service.ip(), socket.service.port(), protocol) {
            Some(found) => services.contains(&found.service.key()),
            // The service went earlier than its endpoint.
            None => complete.workloads_at(&socket.backend.ip()).is_empty(),
        }
    }
}

/// Every address and port through which a workload backs a service.
fn endpoints(w: &Workload) -> HashSet<(Protocol, &str, SocketAddr)> {
    let mut all = HashSet::new();
    for (key, membership) in &w.services {
        for (protocol, ports) in [(Protocol::Tcp, &membership.tcp), (Protocol::Udp, &membership.udp)] {
            for (port, ip) in ports.iter().flat_map(|port| w.addresses.iter().map(move |ip| (port, ip))) {
                all.insert((protocol, key.as_str(), SocketAddr::new(*ip, port.target_port)));
            }
        }
    }
    all
}

/// What ending sockets needs.
pub struct Backends {
    /// Tells which sockets the kernel balanced.
    pub meta: SocketMeta,
    /// Counts.
    pub metrics: Arc<Metrics>,
}

impl Backends {
    /// Ends the captured pods' sockets that were balanced to an endpoint in `gone`. `rows` tells which pods have open
    /// TCP connections to which backend, so that only those pods' sockets are listed.
    pub fn end(
        &self,
        gone: &Gone,
        locals: &Locals,
        before: &World,
        complete: &World,
        rows: impl FnOnce() -> Vec<DirectStat>,
    ) {
        if !gone.tcp.is_empty() {
            let live = |row: &&DirectStat| row.opened != row.closed && gone.tcp.contains_key(&row.backend);
            let clients: HashSet<u64> = rows().iter().filter(live).map(|row| row.src_cookie).collect();
            for pod in clients.iter().filter_map(|cookie| locals.by_cookie(*cookie)) {
                self.end_of(pod, Protocol::Tcp, |socket| gone.has(Protocol::Tcp, socket, before, complete));
            }
        }
        if !gone.udp.is_empty() {
            for pod in locals.iter() {
                self.end_of(pod, Protocol::Udp, |socket| gone.has(Protocol::Udp, socket, before, complete));
            }
        }
    }

    /// Ends what became stale while no daemon was there: the sockets of a pod whose service does not have their backend
    /// any more.
    pub fn end_stale(&self, pod: &LocalPod, world: &World) {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            self.end_of(pod, protocol, |socket| {
                let found = world.service_port(&socket.service.ip(), socket.service.port(), protocol);
                found.is_some_and(|found| !still_backs(world, &found.service, &found.port, socket.backend))
            });
        }
    }

    fn end_of(&self, pod: &LocalPod, protocol: Protocol, gone: impl Fn(&BalancedSocket) -> bool) {
        match self.try_end(pod, protocol, gone) {
            Ok(0) => {}
            Ok(ended) => {
                tracing::info!(pod = %pod.name, ?protocol, ended, "ended sockets whose backend is gone");
            }
            Err(error) => {
                tracing::warn!(pod = %pod.name, ?protocol, %error, "sockets whose backend is gone live on");
            }
        }
    }

    fn try_end(
        &self,
        pod: &LocalPod,
        protocol: Protocol,
        gone: impl Fn(&BalancedSocket) -> bool,
    ) -> io::Result<usize> {
        let diag = pod.netns.diag()?;
        let (sockets, label) = match protocol {
            Protocol::Tcp => {
                let wanted = |value: &[u8]| SocketMeta::balanced(value).is_some_and(|socket| gone(&socket));
                (diag.tcp_with_storage(self.meta.flows(), wanted)?, "tcp")
            }
            Protocol::Udp => {
                let mut failed = Ok(());
                let sockets =
                    diag.udp(|socket| match self.meta.udp_service(socket.cookie(), socket.remote) {
                        // The daemon's own socket for DNS is no backend.
                        Ok(_)
                            if socket.remote.port() == DNS_PORT
                                && pod.addrs.contains(&socket.remote.ip()) =>
                        {
                            false
                        }
                        Ok(balanced) => balanced.is_some_and(|socket| gone(&socket)),
                        Err(error) => {
                            failed = Err(error);
                            false
                        }
                    })?;
                failed?;
                (sockets, "udp")
            }
        };
        let mut ended = 0;
        for socket in sockets {
            if diag.destroy(&socket)? {
                self.metrics.fast_path.ended(label);
                ended += 1;
            }
        }
        Ok(ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{
        Batch, Store,
        testing::{backs, pod, service},
    };

    fn apply(store: &Store, batch: Batch) -> (Gone, Gone, Arc<World>, Arc<World>) {
        let before = store.world();
        let changed = batch.changed_addresses();
        let complete = store.stage(batch).complete;
        store.publish(complete.clone());
        let (replaced, others) = Gone::of(&before, &changed, &complete);
        (replaced, others, before, complete)
    }

    #[test]
    fn what_left_is_told_by_service_address_and_port() {
        let (a, b) =
            (service("a", "s", "10.96.0.1", &[(80, 8080)]), service("b", "s", "10.96.0.2", &[(80, 8080)]));
        let store = Store::default();
        let both = backs(backs(pod("p", "s", "10.0.0.1"), &a), &b);
        let services = vec![a.clone(), b.clone()];
        apply(&store, Batch { workloads: vec![both.clone()], services, ..Batch::default() });
        let via = |vip: &str| BalancedSocket {
            service: vip.parse().unwrap(),
            backend: "10.0.0.1:8080".parse().unwrap(),
        };
        let has = |gone: &Gone, vip: &str, before: &World, complete: &World| {
            gone.has(Protocol::Tcp, &via(vip), before, complete)
        };

        // Merely unready: nothing left.
        let mut unready = both.clone();
        unready.health = mesh_xds::model::Health::Unhealthy;
        let (replaced, others, ..) = apply(&store, Batch { workloads: vec![unready], ..Batch::default() });
        assert!(replaced.is_empty() && others.is_empty());

        // Out of one service, still in the other.
        let only_b = backs(pod("p", "s", "10.0.0.1"), &b);
        let (replaced, others, before, complete) =
            apply(&store, Batch { workloads: vec![only_b], ..Batch::default() });
        assert!(replaced.is_empty());
        assert!(has(&others, "10.96.0.1:80", &before, &complete));
        assert!(!has(&others, "10.96.0.2:80", &before, &complete));

        // Gone, and the address reused by another pod of the same service in the same breath.
        let batch = Batch {
            workloads: vec![backs(pod("q", "s", "10.0.0.1"), &b)],
            removed_addresses: vec!["c1//Pod/s/p".into()],
            ..Batch::default()
        };
        let (replaced, others, before, complete) = apply(&store, batch);
        assert!(others.is_empty());
        assert!(has(&replaced, "10.96.0.2:80", &before, &complete));

        // Gone after its service.
        apply(&store, Batch { removed_addresses: vec![b.key()], ..Batch::default() });
        let batch = Batch { removed_addresses: vec!["c1//Pod/s/q".into()], ..Batch::default() };
        let (_, others, before, complete) = apply(&store, batch);
        assert!(has(&others, "10.96.0.2:80", &before, &complete));
    }
}
