//! The daemon's part in connections that the kernel carries: verdicts, and sockets that had to be ended.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Protocol {
    protocol: &'static str,
}

/// Families about in-kernel connections.
#[derive(Debug, Default)]
pub struct FastPath {
    /// Verdicts given to the kernel.
    pub given: Counter,
    /// Generations of verdicts begun, each of which ended all verdicts before.
    pub generations: Counter,
    /// Live connections between pods of this node that the kernel carries.
    pub live: Gauge,
    /// Those ended since a change forbids them.
    pub destroyed: Counter,
    /// Those taken off the books since their socket was gone.
    pub forgotten: Counter,
    ended: Family<Protocol, Counter>,
}

impl FastPath {
    pub(super) fn register(&self, r: &mut Registry) {
        r.register("nodemesh_verdicts", "Verdicts given for the same-node fast path", self.given.clone());
        let help = "Times that all verdicts were ended by a change";
        r.register("nodemesh_verdict_generations", help, self.generations.clone());
        let help = "Live connections between pods of this node without the daemon, when last counted";
        r.register("nodemesh_local_flows", help, self.live.clone());
        let help = "Connections between pods of this node ended since a change forbids them";
        r.register("nodemesh_local_flows_destroyed", help, self.destroyed.clone());
        let help = "Connections between pods of this node whose end the kernel did not report";
        r.register("nodemesh_local_flows_forgotten", help, self.forgotten.clone());
        let help = "Sockets ended since the backend that they were balanced to is gone";
        r.register("nodemesh_backend_sockets_ended", help, self.ended.clone());
    }

    /// Counts a socket whose backend is gone.
    pub fn ended(&self, protocol: &'static str) {
        self.ended.get_or_create(&Protocol { protocol }).inc();
    }
}
