//! Which nameservers pods meant before their DNS queries were sent to the daemon.

use super::sys::Map;
use mesh_common::{key, net::Endpoint, pod::Pod as _};
use std::{net::SocketAddr, sync::Arc};

/// Access to what the programs remember of DNS queries; cheap to clone.
#[derive(Clone, Debug)]
pub struct Nameservers {
    servers: Arc<Map>,
    flows: Arc<Map>,
}

impl Nameservers {
    pub(super) fn new(servers: Arc<Map>, flows: Arc<Map>) -> Self {
        Self { servers, flows }
    }

    /// All that the pod of a network namespace has used, as far as they are remembered.
    pub fn of_pod(&self, netns: u64) -> Vec<SocketAddr> {
        self.all(key::Nameserver::of_pod(netns))
    }

    /// All that a socket, by its cookie, has used.
    pub fn of_socket(&self, socket: u64) -> Vec<SocketAddr> {
        self.all(key::Nameserver::of_socket(socket))
    }

    /// The one that a socket last meant when it was sent to `listener`.
    pub fn last_of_socket(&self, socket: u64, listener: SocketAddr) -> Option<SocketAddr> {
        let mut row = vec![0; size_of::<Endpoint>()];
        let key = key::Udp::new(socket, listener.into());
        let found = self.flows.lookup(key.bytes(), &mut row).unwrap_or(false);
        Endpoint::from_bytes(&row).filter(|_| found).map(SocketAddr::from)
    }

    fn all(&self, mut key: key::Nameserver) -> Vec<SocketAddr> {
        let mut row = vec![0; size_of::<Endpoint>()];
        let mut servers = vec![];
        while key.slot < key::NAMESERVERS_PER_OWNER {
            // A map that cannot be read is as good as one without the row: the query fails and is counted.
            if !self.servers.lookup(key.bytes(), &mut row).unwrap_or(false) {
                break;
            }
            servers.extend(Endpoint::from_bytes(&row).map(SocketAddr::from));
            key.slot += 1;
        }
        servers
    }
}
