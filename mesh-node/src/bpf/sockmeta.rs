//! What the kernel remembers about single sockets: the original destination of an accepted one, and the client that
//! a dialling one stands for. Cheap to clone and usable from every thread.

use super::sys::Map;
use mesh_common::{code::flow, key, net::Endpoint, pod::Pod, value};
use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    sync::Arc,
};

/// Where a captured connection was to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OriginalDst {
    /// What the app dialled.
    pub dialled: SocketAddr,
    /// The endpoint that the kernel chose, if the address is a service's and the kernel knows endpoints.
    pub chosen: Option<SocketAddr>,
}

/// A pod's own socket that the kernel connected to a backend of the service that the pod dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalancedSocket {
    /// The service.
    pub service: SocketAddr,
    /// The backend.
    pub backend: SocketAddr,
}

/// Access to the socket storage maps.
#[derive(Clone, Debug)]
pub struct SocketMeta {
    orig_dst: Arc<Map>,
    client: Arc<Map>,
    flow: Arc<Map>,
    udp_flows: Arc<Map>,
}

impl SocketMeta {
    pub(super) fn new(orig_dst: Arc<Map>, client: Arc<Map>, flow: Arc<Map>, udp_flows: Arc<Map>) -> Self {
        Self { orig_dst, client, flow, udp_flows }
    }

    /// The storage map of client sockets, for a listing of TCP sockets with [`SocketMeta::balanced`] values.
    pub fn flows(&self) -> BorrowedFd<'_> {
        self.flow.as_fd()
    }

    /// The service that a connected UDP socket, named by its cookie, was balanced for, if `peer` is the backend that it
    /// got. `None` also when the kernel has forgotten it, which happens to the oldest of very many.
    pub fn udp_service(&self, cookie: u64, peer: SocketAddr) -> io::Result<Option<BalancedSocket>> {
        let mut value = vec![0; size_of::<Endpoint>()];
        let found = self.udp_flows.lookup(key::Udp::new(cookie, peer.into()).bytes(), &mut value)?;
        let service = if found { Endpoint::from_bytes(&value) } else { None };
        Ok(service.map(|service| BalancedSocket { service: service.into(), backend: peer }))
    }

    /// Reads a value of [`SocketMeta::flows`]. `None`: the socket goes to the daemon, or where the app said.
    pub fn balanced(value: &[u8]) -> Option<BalancedSocket> {
        let found = value::SocketFlow::from_bytes(value)?;
        let direct = [flow::DIRECT, flow::LOCAL].contains(&u8::try_from(found.kind).ok()?);
        (direct && found.original != found.actual)
            .then(|| BalancedSocket { service: found.original.into(), backend: found.actual.into() })
    }

    /// The address that the app dialled, of a socket accepted on a pod's outbound listener.
    /// `None`: the connection was not captured (somebody dialled the listener itself), and must be closed.
    pub fn original_dst(&self, accepted: BorrowedFd<'_>) -> io::Result<Option<OriginalDst>> {
        let found: Option<value::OriginalDst> = read(&self.orig_dst, accepted)?;
        Ok(found.map(|found| OriginalDst {
            dialled: found.original.into(),
            chosen: (found.chosen != Endpoint::NONE).then(|| found.chosen.into()),
        }))
    }

    /// The client that an accepted socket shows to its app instead of the peer, if any. For tests and diagnosis.
    pub fn shown_client(&self, accepted: BorrowedFd<'_>) -> io::Result<Option<SocketAddr>> {
        Ok(read::<Endpoint>(&self.client, accepted)?.map(SocketAddr::from))
    }

    /// Makes the accepting app see `client` as its peer. To be called before `dialling` connects.
    pub fn announce_client(&self, dialling: BorrowedFd<'_>, client: SocketAddr) -> io::Result<()> {
        self.client.update(dialling.as_raw_fd().unsigned_abs().bytes(), Endpoint::from(client).bytes())
    }
}

fn read<V: Pod>(map: &Map, socket: BorrowedFd<'_>) -> io::Result<Option<V>> {
    let mut value = vec![0; size_of::<V>()];
    if !map.lookup(socket.as_raw_fd().unsigned_abs().bytes(), &mut value)? {
        return Ok(None);
    }
    Ok(V::from_bytes(&value))
}
