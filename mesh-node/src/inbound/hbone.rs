//! Tunnels that arrive on podIP:15008.

use super::{Inbound, Permit, leads_back};
use crate::{
    hbone::{self, ConnectRequest, HboneStream, Refusal, ServeOptions, Target},
    l4::HboneEnd,
    local::{Handshake, Limit, LocalPod, Slot},
    metrics::{Direction, Security},
    outcome::{Connection, End, Ends, chain},
    tls::{self, Peer},
};
use std::{net::SocketAddr, sync::Arc};
use tokio::net::TcpStream;

/// One accepted HBONE connection: which pod it came to, and from where.
struct Tunnel {
    inbound: Inbound,
    pod: Arc<LocalPod>,
    remote: SocketAddr,
}

/// A tunnel that was permitted and whose pod has answered.
struct Ready {
    record: Connection,
    permit: Permit,
    server: TcpStream,
    _slot: Slot,
}

impl Inbound {
    /// Serves one connection to a captured pod's port 15008, from the handshake to the end of its last tunnel.
    pub async fn hbone(&self, pod: Arc<LocalPod>, stream: TcpStream, remote: SocketAddr, begun: Handshake) {
        let local_ip = stream.local_addr().ok().map(|addr| addr.ip());
        let accepted = tokio::select! {
            accepted = tls::accept(stream, pod.tls(), tls::HANDSHAKE_TIMEOUT) => accepted,
            // Counted as a limit that was reached; a record for each would make a storm of log lines too.
            () = begun.evicted() => return,
        };
        let (tls, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(reject) => {
                let mut ends = self.ends(&pod, remote);
                ends.server = local_ip.map(|ip| SocketAddr::new(ip, hbone::HBONE_PORT));
                ends.source_id = None;
                let text = match &reject.presented {
                    Some(presented) => format!("{} (the peer presented {presented})", chain(&reject)),
                    None => chain(&reject),
                };
                let record = Connection::begin(self.metrics.clone(), Direction::Inbound, ends);
                record.finish(&End::refused("DPE", reject.reason.label(), text), 0, 0);
                return;
            }
        };
        begun.done();
        let Ok(_place) = pod.limits.tunnel() else {
            tracing::debug!(%remote, pod = %pod.name, "the pod has as many tunnels as it may");
            return;
        };
        let handler = Arc::new(Tunnel { inbound: self.clone(), pod, remote });
        let options = ServeOptions {
            local_ip,
            idle: hbone::SERVER_IDLE_TIMEOUT,
            crowded_idle: hbone::CROWDED_IDLE_TIMEOUT,
            drain: self.drain.begin.clone(),
        };
        let end = hbone::serve(tls, peer, handler, options).await;
        tracing::debug!(%remote, ?end, "an HBONE connection ended");
    }

    fn ends(&self, pod: &LocalPod, remote: SocketAddr) -> Ends {
        Ends {
            client: Some(remote),
            source: self.client_workload(remote),
            destination: self.workload(pod),
            destination_id: Some(pod.identity.clone()),
            security: Security::MutualTls,
            ..Ends::default()
        }
    }
}

impl Tunnel {
    /// Where the tunnel leads inside the pod. A host name is taken if it is a service's that this pod backs.
    fn resolve(&self, target: &Target) -> Result<SocketAddr, Refusal> {
        match target {
            Target::Addr(addr) => Ok(*addr),
            Target::Host(host, port) => {
                let workload = self.inbound.workload(&self.pod);
                let service = self.inbound.service_of(workload.as_deref(), host);
                let ports = service.as_ref().and_then(|s| workload.as_ref()?.services.get(&s.key()));
                let port = ports.and_then(|m| m.tcp.iter().find(|p| p.service_port == *port));
                match (port, self.pod.addrs.first()) {
                    (Some(port), Some(ip)) => Ok(SocketAddr::new(*ip, port.target_port)),
                    _ => Err(Refusal::Authority(target.to_string())),
                }
            }
        }
    }
}

impl Tunnel {
    /// Takes a place, asks the policies, and connects to the pod.
    async fn open(
        &self,
        peer: &Peer,
        client: SocketAddr,
        to: SocketAddr,
    ) -> Result<(Permit, TcpStream, Slot), Refusal> {
        let overloaded = |limit: Limit| Refusal::Overloaded(limit.label());
        let slot = self.pod.limits.slot(1).map_err(overloaded)?;
        let permit = Permit::check(&self.pod, Some(&peer.id), client, to)
            .map_err(|denied| Refusal::Denied { by: denied.by })?;
        let server =
            self.inbound.dial(&permit).await.map_err(|source| Refusal::Unavailable { to, source })?;
        Ok((permit, server, slot))
    }
}

impl hbone::Handler for Tunnel {
    type Upstream = Ready;

    fn share(&self) -> u64 {
        self.pod.cookie
    }

    fn connections(&self) -> usize {
        self.pod.limits.connections()
    }

    fn crowded(&self) -> bool {
        self.pod.limits.crowded()
    }

    fn idled(&self) {
        self.pod.limits.hit(Limit::IdleTunnels);
    }

    async fn connect(&self, peer: &Arc<Peer>, request: ConnectRequest) -> Result<Self::Upstream, Refusal> {
        let to = self.resolve(&request.target)?;
        if leads_back(to) {
            return Err(Refusal::Authority(format!("{to}, which is a port of the mesh itself,")));
        }
        // The peer's node is trusted to tell the client's port, never its address.
        let told = request.forwarded.as_ref().filter(|f| f.client.ip() == self.remote.ip());
        let client = told.map_or(self.remote, |f| f.client);
        let mut ends = self.inbound.ends(&self.pod, client);
        ends.source_id = Some(peer.id.clone());
        ends.server = Some(to);
        let host = request.forwarded.as_ref().and_then(|f| f.host.as_deref());
        ends.service = host.and_then(|host| self.inbound.service_of(ends.destination.as_deref(), host));
        let record = Connection::begin(self.inbound.metrics.clone(), Direction::Inbound, ends);
        match self.open(peer, client, to).await {
            Ok((permit, server, slot)) => {
                record.opened();
                Ok(Ready { record, permit, server, _slot: slot })
            }
            Err(refusal) => {
                record.finish(&end_of(&refusal), 0, 0);
                Err(refusal)
            }
        }
    }

    async fn splice(&self, ready: Ready, stream: HboneStream) {
        let Ready { record, permit, server, _slot } = ready;
        let (outcome, end) = self.inbound.splice(HboneEnd::new(stream), server, permit).await;
        record.finish(&end, outcome.received, outcome.sent);
    }

    fn refused(&self, peer: &Arc<Peer>, refusal: &Refusal) {
        // What `open` refused has been recorded with all that was known.
        if matches!(refusal, Refusal::Denied { .. } | Refusal::Unavailable { .. } | Refusal::Overloaded(_)) {
            return;
        }
        let mut ends = self.inbound.ends(&self.pod, self.remote);
        ends.source_id = Some(peer.id.clone());
        let record = Connection::begin(self.inbound.metrics.clone(), Direction::Inbound, ends);
        record.finish(&end_of(refusal), 0, 0);
    }
}

fn end_of(refusal: &Refusal) -> End {
    let flags = match refusal {
        Refusal::Denied { .. } => "RBAC",
        Refusal::Unavailable { .. } => "UF",
        Refusal::Overloaded(_) => "UO",
        _ => "DPE",
    };
    End::refused(flags, refusal.label(), chain(refusal))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hbone::Handler;

    fn connecting<F>(_: impl FnOnce(&'static Tunnel, &'static Arc<Peer>, ConnectRequest) -> F) -> usize {
        size_of::<F>()
    }

    fn splicing<F>(_: impl FnOnce(&'static Tunnel, Ready, HboneStream) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn a_stream_is_small() {
        let connect = connecting(|tunnel, peer, request| tunnel.connect(peer, request));
        let splice = splicing(|tunnel, ready, stream| tunnel.splice(ready, stream));
        assert!(connect <= 3072, "connecting a stream takes {connect} bytes");
        assert!(splice <= 3072, "carrying a stream takes {splice} bytes");
    }
}
