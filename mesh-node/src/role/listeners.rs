//! The accept loops of a captured pod: outbound, plaintext inbound, HBONE inbound.

use super::workers::Workers;
use crate::{hbone::Pool, inbound::Inbound, local::LocalPod, net::accept_from, outbound::Outbound};
use std::{
    net::{SocketAddr, TcpListener as StdListener},
    sync::Arc,
};
use tokio::net::{TcpListener, TcpStream};
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
}

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

impl Handlers {
    /// Serves one listener of a pod until `stop`.
    pub fn listen(
        self: &Arc<Self>,
        pod: &Arc<LocalPod>,
        kind: Kind,
        listener: StdListener,
        stop: CancellationToken,
    ) {
        // All of a pod's listeners on one worker: its connections then share that worker's tunnels.
        let home = usize::try_from(pod.cookie % self.workers.len() as u64).unwrap_or(0);
        let (this, pod) = (self.clone(), pod.clone());
        self.workers.handle(home).spawn(async move {
            let listener = match TcpListener::from_std(listener) {
                Ok(listener) => listener,
                Err(error) => return tracing::error!(pod = %pod.name, ?kind, %error, "cannot listen"),
            };
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    accepted = accept_from(&listener) => match accepted {
                        Ok((stream, client)) => this.accepted(home, &pod, kind, stream, client),
                        Err(error) => return tracing::error!(pod = %pod.name, ?kind, %error, "a listener broke"),
                    }
                }
            }
        });
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
        if !place.away {
            self.workers.run(place, async move { this.serve(index, pod, kind, stream, client).await });
            return;
        }
        // A socket belongs to the reactor of the runtime it was made on; this one moves.
        let Ok(stream) = stream.into_std() else { return };
        self.workers.run(place, async move {
            match TcpStream::from_std(stream) {
                Ok(stream) => this.serve(index, pod, kind, stream, client).await,
                Err(error) => {
                    tracing::warn!(pod = %pod.name, %error, "a connection could not change workers");
                }
            }
        });
    }

    async fn serve(
        &self,
        index: usize,
        pod: Arc<LocalPod>,
        kind: Kind,
        stream: TcpStream,
        client: SocketAddr,
    ) {
        match kind {
            Kind::Outbound => self.outbound.serve(&self.pools[index], pod, stream, client).await,
            Kind::Plain => self.inbound.plain(pod, stream, client).await,
            Kind::Hbone => self.inbound.hbone(pod, stream, client).await,
        }
    }
}
