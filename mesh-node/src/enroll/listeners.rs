//! The listeners that the daemon has inside a pod.

use super::{EnrollError, INBOUND_HBONE_PORT, INBOUND_PLAINTEXT_PORT, PodInfo};
use crate::net::NetNs;
use std::{
    io,
    net::{SocketAddr, TcpListener},
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
}

/// Opens all listeners, or none.
pub(super) fn open(pod: &PodInfo, netns: &NetNs) -> Result<Listeners, EnrollError> {
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
    Ok(listeners)
}

/// Whether an address is not usable yet: IPv6 is still looking for duplicates (RFC 4862, at most some
/// seconds).
pub(super) fn not_yet(e: &EnrollError) -> bool {
    matches!(e, EnrollError::Listen { source, .. } if source.kind() == io::ErrorKind::AddrNotAvailable)
}
