//! The listeners that the daemon has inside a pod.

use super::{DNS_PORT, EnrollError, INBOUND_HBONE_PORT, INBOUND_PLAINTEXT_PORT, PodInfo};
use crate::net::NetNs;
use std::{
    io,
    net::{SocketAddr, TcpListener, UdpSocket},
};

/// The listeners of one pod, each list in the order of the pod's addresses.
#[derive(Debug, Default)]
pub struct Listeners {
    /// On a free port: what `connect` is redirected to.
    pub outbound: Vec<TcpListener>,
    /// On 15006.
    pub inbound_plain: Vec<TcpListener>,
    /// On 15008.
    pub inbound_hbone: Vec<TcpListener>,
    /// UDP on 15053. Empty when DNS is left alone.
    pub dns: Vec<UdpSocket>,
}

/// Opens all listeners, or none; those for DNS only with `dns`.
pub(super) fn open(pod: &PodInfo, netns: &NetNs, dns: bool) -> Result<Listeners, EnrollError> {
    let listen = |ip, port| {
        let addr = SocketAddr::new(ip, port);
        netns.listen(addr).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => EnrollError::PortBusy { pod: Box::new(pod.clone()), addr },
            _ => EnrollError::Listen { pod: Box::new(pod.clone()), addr, source },
        })
    };
    let mut listeners = Listeners::default();
    for &ip in &pod.addrs {
        // The fixed ports first: a free port must not happen to be one of them.
        listeners.inbound_hbone.push(listen(ip, INBOUND_HBONE_PORT)?);
        listeners.inbound_plain.push(listen(ip, INBOUND_PLAINTEXT_PORT)?);
        listeners.outbound.push(listen(ip, 0)?);
    }
    if dns {
        listeners.dns = dns_sockets(pod, netns);
    }
    Ok(listeners)
}

/// Listeners of a predecessor, with sockets for DNS if they are wanted: it may have served none, or be the last to.
pub(super) fn with_dns(mut handed: Listeners, pod: &PodInfo, netns: &NetNs, dns: bool) -> Listeners {
    if !dns {
        handed.dns.clear();
    } else if handed.dns.is_empty() {
        handed.dns = dns_sockets(pod, netns);
    }
    handed
}

/// A pod can do without the mesh's DNS: its queries then go where they went before. So a taken port is no reason to keep
/// the pod out.
fn dns_sockets(pod: &PodInfo, netns: &NetNs) -> Vec<UdpSocket> {
    let bound = pod.addrs.iter().map(|ip| netns.bind_udp(SocketAddr::new(*ip, DNS_PORT)));
    bound.collect::<io::Result<_>>().unwrap_or_else(|error| {
        tracing::warn!(
            %pod, %error, port = DNS_PORT,
            "the pod's DNS queries are left alone: its UDP port is taken; free it and restart the pod"
        );
        Vec::new()
    })
}

/// Whether an address is not usable yet: IPv6 is still looking for duplicates (RFC 4862, at most some
/// seconds).
pub(super) fn not_yet(e: &EnrollError) -> bool {
    matches!(e, EnrollError::Listen { source, .. } if source.kind() == io::ErrorKind::AddrNotAvailable)
}
