//! The accept loops of a captured pod: outbound, plaintext inbound, HBONE inbound.

use super::workers::Workers;
use crate::{
    dns::Dns,
    fair::Share,
    hbone::Pool,
    inbound::Inbound,
    local::{Handshake, LocalPod, SettingUp},
    net::accept_from,
    outbound::Outbound,
};
use futures::FutureExt as _;
use std::{
    io,
    net::{SocketAddr, TcpListener as StdListener, UdpSocket as StdSocket},
    sync::Arc,
};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio_util::sync::CancellationToken;

/// Everything an accepted connection is handed to.
pub struct Handlers {
    /// The workers that serve connections.
    pub workers: Workers,
    /// One tunnel pool per worker.
    pub pools: Vec<Pool>,
    /// The outbound side.
    pub outbound: Outbound,
    /// The inbound side.
    pub inbound: Inbound,
    /// DNS, unless it is switched off.
    pub dns: Option<Dns>,
}

/// Connections that an accept loop takes in a row before others of the worker have their turn.
const ACCEPTS: usize = 16;

/// Which of a pod's listeners a connection came in by.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// Redirected by connect.
    Outbound,
    /// Steered by sk_lookup.
    Plain,
    /// Dialled on 15008.
    Hbone,
}

/// The sockets that a pod is captured on.
#[derive(Clone, Debug, Default)]
pub struct Listening {
    /// What `connect` is redirected to.
    pub outbound: Vec<Arc<TcpListener>>,
    /// On 15006.
    pub inbound_plain: Vec<Arc<TcpListener>>,
    /// On 15008.
    pub inbound_hbone: Vec<Arc<TcpListener>>,
    /// UDP on 15053.
    pub dns: Vec<Arc<UdpSocket>>,
}

impl Listening {
    /// Those of one kind.
    pub fn of(&mut self, kind: Kind) -> &mut Vec<Arc<TcpListener>> {
        match kind {
            Kind::Outbound => &mut self.outbound,
            Kind::Plain => &mut self.inbound_plain,
            Kind::Hbone => &mut self.inbound_hbone,
        }
    }
}

/// The place of a connection among those of its pod that are not established yet.
enum Begun {
    Outbound(SettingUp),
    Plain(SettingUp),
    Hbone(Handshake),
}

impl Begun {
    fn new(kind: Kind, pod: &LocalPod) -> Self {
        match kind {
            Kind::Outbound => Self::Outbound(pod.limits.set_up()),
            Kind::Plain => Self::Plain(pod.limits.set_up()),
            Kind::Hbone => Self::Hbone(pod.limits.handshake()),
        }
    }
}

impl Handlers {
    /// Serves one listener of a pod until `stop`. Returns it, for a successor to go on with.
    pub fn listen(
        self: &Arc<Self>,
        pod: &Arc<LocalPod>,
        kind: Kind,
        listener: StdListener,
        stop: CancellationToken,
    ) -> io::Result<Arc<TcpListener>> {
        // All of a pod's listeners on one worker: its connections then share that worker's tunnels.
        let home = usize::try_from(pod.cookie % self.workers.len() as u64).unwrap_or(0);
        let (this, pod) = (self.clone(), pod.clone());
        let worker = self.workers.handle(home);
        let listener = {
            // A socket belongs to the reactor of the runtime that it is made in.
            let _worker = worker.enter();
            Arc::new(TcpListener::from_std(listener)?)
        };
        let shared = listener.clone();
        worker.spawn(async move {
            let mut accepts = 0;
            loop {
                accepts += 1;
                if accepts % ACCEPTS == 0 {
                    tokio::task::yield_now().await;
                }
                let accept = async {
                    // A pod that has enough under way keeps the rest in its accept queue, at its own expense.
                    match kind {
                        Kind::Outbound | Kind::Plain => pod.limits.may_set_up().await,
                        Kind::Hbone => pod.limits.may_shake_hands().await,
                    }
                    accept_from(&listener).await
                };
                tokio::select! {
                    () = stop.cancelled() => break,
                    accepted = accept => match accepted {
                        Ok((stream, client)) => this.accepted(home, &pod, kind, stream, client),
                        Err(error) => return tracing::error!(pod = %pod.name, ?kind, %error, "a listener broke"),
                    }
                }
            }
            // Who is in the queue already was told that the connection stands.
            while let Some(Ok((stream, client))) = listener.accept().now_or_never() {
                this.accepted(home, &pod, kind, stream, client);
            }
        });
        Ok(shared)
    }

    /// Serves one socket of a pod for DNS until `stop`. Returns it, for a successor to go on with.
    pub fn datagrams(
        &self,
        pod: &Arc<LocalPod>,
        socket: StdSocket,
        stop: CancellationToken,
    ) -> io::Result<Option<Arc<UdpSocket>>> {
        let Some(dns) = self.dns.clone() else { return Ok(None) };
        let home = usize::try_from(pod.cookie % self.workers.len() as u64).unwrap_or(0);
        let worker = self.workers.handle(home);
        let socket = {
            let _worker = worker.enter();
            Arc::new(UdpSocket::from_std(socket)?)
        };
        worker.spawn(Share::new(pod.cookie, dns.datagrams(pod.clone(), socket.clone(), stop)));
        Ok(Some(socket))
    }

    fn accepted(
        self: &Arc<Self>,
        home: usize,
        pod: &Arc<LocalPod>,
        kind: Kind,
        stream: TcpStream,
        client: SocketAddr,
    ) {
        let place = self.workers.place(home);
        let (this, pod, index) = (self.clone(), pod.clone(), place.index);
        let (key, begun) = (pod.cookie, Begun::new(kind, &pod));
        if !place.away {
            let connection = async move { this.serve(index, pod, begun, stream, client).await };
            self.workers.run(place, Share::new(key, connection));
            return;
        }
        // A socket belongs to the reactor of the runtime it was made on; this one moves.
        let Ok(stream) = stream.into_std() else { return };
        let connection = async move {
            match TcpStream::from_std(stream) {
                Ok(stream) => this.serve(index, pod, begun, stream, client).await,
                Err(error) => {
                    tracing::warn!(pod = %pod.name, %error, "a connection could not change workers");
                }
            }
        };
        self.workers.run(place, Share::new(key, connection));
    }

    async fn serve(
        &self,
        index: usize,
        pod: Arc<LocalPod>,
        begun: Begun,
        stream: TcpStream,
        client: SocketAddr,
    ) {
        // Each in a box of its size: together they would all be as large as the largest.
        match begun {
            Begun::Outbound(begun) => {
                let dialled = self.outbound.original_dst(&stream);
                if let Some(dns) = &self.dns
                    && let Ok(Some(found)) = &dialled
                    && dns.takes(&pod, found.dialled)
                {
                    // It has limits of its own, and nothing to be joined to.
                    drop(begun);
                    return Box::pin(dns.stream(pod, stream, client, found.dialled)).await;
                }
                Box::pin(self.outbound.serve(&self.pools[index], pod, stream, client, dialled, begun)).await;
            }
            Begun::Plain(begun) => Box::pin(self.inbound.plain(pod, stream, client, begun)).await,
            Begun::Hbone(begun) => Box::pin(self.inbound.hbone(pod, stream, client, begun)).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The size of the future that a call makes; the call itself is never made.
    fn size<F>(
        _: impl FnOnce(&'static Handlers, Arc<LocalPod>, TcpStream, SocketAddr, Handshake, SettingUp) -> F,
    ) -> usize {
        size_of::<F>()
    }

    #[test]
    fn a_connection_is_small() {
        // An idle connection is this, its sockets' state in the runtime, and its stream's in h2.
        let outbound = size(|h, pod, stream, client, _, begun| {
            h.outbound.serve(&h.pools[0], pod, stream, client, Ok(None), begun)
        });
        let plain = size(|h, pod, stream, client, _, begun| h.inbound.plain(pod, stream, client, begun));
        let hbone = size(|h, pod, stream, client, begun, _| h.inbound.hbone(pod, stream, client, begun));
        let all =
            size(|h, pod, stream, client, _, begun| h.serve(0, pod, Begun::Outbound(begun), stream, client));
        assert!(all <= 512, "what they have in common takes {all} bytes");
        assert!(outbound <= 4096, "an outbound connection takes {outbound} bytes");
        assert!(plain <= 3072, "a plaintext connection takes {plain} bytes");
        assert!(hbone <= 9 << 10, "an HBONE connection, shared by many streams, takes {hbone} bytes");
    }
}
