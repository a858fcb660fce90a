//! What the kernel remembers about single sockets: the original destination of an accepted one, and the client that
//! a dialling one stands for. Cheap to clone and usable from every thread.

use super::sys::Map;
use mesh_common::{net::Endpoint, pod::Pod, value};
use std::{
    io,
    net::SocketAddr,
    os::fd::{AsRawFd as _, BorrowedFd},
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

/// Access to the socket storage maps.
#[derive(Clone, Debug)]
pub struct SocketMeta {
    orig_dst: Arc<Map>,
    client: Arc<Map>,
}

impl SocketMeta {
    pub(super) fn new(orig_dst: Arc<Map>, client: Arc<Map>) -> Self {
        Self { orig_dst, client }
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
