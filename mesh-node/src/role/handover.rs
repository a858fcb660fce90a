//! The running daemon's side of a takeover: it shows what it has, steps aside when the successor serves, and goes on as
//! if nothing had been when the successor does not get that far.

use super::{mesh::NodeMesh, reconcile::Command};
use crate::{
    bpf::Datapath,
    enroll::{self, Enroller},
    identity::CertManager,
    net,
    outcome::chain,
    takeover::{Channel, Message, PROTOCOL, Pod, Server, TakeoverError, unexpected},
};
use mesh_common::ABI_VERSION;
use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, PoisonError, mpsc::SyncSender},
    time::Duration,
};
use tokio::{net::UnixListener, runtime::Handle, sync::oneshot, task::JoinHandle};
use tokio_util::sync::CancellationToken;

/// How long a successor may take to load its programs and to get its configuration.
const CONFIGURATION: Duration = Duration::from_secs(180);
/// How long it may take to capture the pods.
const CAPTURE: Duration = Duration::from_secs(120);
/// Pause after an error to accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The server for `mesh-cni`, which can be stopped and started again on the same socket.
pub struct CniServer {
    socket: OwnedFd,
    enroller: Arc<Enroller<NodeMesh>>,
    stop: CancellationToken,
    running: Option<(CancellationToken, JoinHandle<()>)>,
}

impl CniServer {
    /// Starts to serve on a listening socket, until `stop`.
    pub fn start(
        socket: OwnedFd,
        enroller: Arc<Enroller<NodeMesh>>,
        stop: CancellationToken,
    ) -> io::Result<Self> {
        let mut this = Self { socket, enroller, stop, running: None };
        this.resume()?;
        Ok(this)
    }

    fn resume(&mut self) -> io::Result<()> {
        let listener = net::unix::adopt(self.socket.try_clone()?)?;
        let stop = self.stop.child_token();
        let serving = enroll::server::serve(listener, self.enroller.clone(), stop.clone());
        self.running = Some((stop, tokio::spawn(serving)));
        Ok(())
    }

    /// Accepts no request any more, and lets those in progress end.
    async fn pause(&mut self) {
        if let Some((stop, serving)) = self.running.take() {
            stop.cancel();
            // A panic has been reported already.
            let _ = serving.await;
        }
    }
}

/// What is there to hand over.
pub struct Outgoing {
    /// This node's name.
    pub node: String,
    /// The reconcile thread's queue.
    pub commands: SyncSender<Command>,
    /// The kernel.
    pub datapath: Arc<Mutex<Datapath>>,
    /// The pods.
    pub enroller: Arc<Enroller<NodeMesh>>,
    /// The identities.
    pub certs: Arc<CertManager>,
    /// The sockets of the other servers.
    pub servers: Vec<(Server, OwnedFd)>,
    /// The CNI plugin's server.
    pub cni: CniServer,
}

/// Waits for a successor, until `stop`. Whether one has taken over.
pub async fn serve(listener: UnixListener, mut outgoing: Outgoing, stop: CancellationToken) -> bool {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => {
                outgoing.cni.pause().await;
                return false;
            }
        };
        let stream = match accepted.and_then(|(stream, _)| stream.into_std()) {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a takeover");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let runtime = Handle::current();
        let talk = tokio::task::spawn_blocking(move || {
            let result = outgoing.hand_over(stream, &runtime);
            (outgoing, result)
        });
        match talk.await {
            Ok((_, Ok(()))) => return true,
            Ok((back, Err(error))) => {
                tracing::warn!(error = %chain(&error), "a takeover has failed; this daemon serves on");
                outgoing = back;
            }
            // It panicked, and said so. What it owned is gone: no takeover any more.
            Err(_) => {
                stop.cancelled().await;
                return false;
            }
        }
    }
}

impl Outgoing {
    fn hand_over(&mut self, stream: UnixStream, runtime: &Handle) -> Result<(), TakeoverError> {
        let mut channel = Channel::new(stream)?;
        let hello = channel.recv();
        let refusal = match &hello {
            Ok((Message::Hello { protocol, abi, node, .. }, _)) => self.refusal(*protocol, *abi, node),
            // Told as well: it may be a version that says hello in another way.
            Ok((other, _)) => Some(unexpected(other, "a hello").to_string()),
            Err(error @ TakeoverError::Unexpected { .. }) => Some(error.to_string()),
            Err(_) => None,
        };
        if let Some(reason) = refusal {
            channel.send(&Message::Refused { reason: reason.clone() }, &[])?;
            return Err(TakeoverError::Refused(reason));
        }
        if let (Message::Hello { version, .. }, _) = hello? {
            tracing::info!(version, "a successor wants to take over");
        }
        let lock = self.datapath().lock().map(|lock| lock.try_clone_to_owned());
        let lock = match lock {
            Some(Ok(lock)) => lock,
            Some(Err(source)) => return Err(TakeoverError::Io { doing: "sharing the lock", source }),
            None => return Err(TakeoverError::Refused("it has been taken over already".to_owned())),
        };
        channel.send(&Message::Welcome { version: env!("CARGO_PKG_VERSION").to_owned() }, &[lock.as_fd()])?;
        drop(lock);
        channel.wait_up_to(CONFIGURATION)?;
        match channel.recv()? {
            (Message::Freeze, _) => {}
            (other, _) => return Err(unexpected(&other, "a freeze")),
        }
        runtime.block_on(self.cni.pause());
        let result = self.give(&mut channel);
        if result.is_err() {
            self.thaw(runtime);
        }
        result
    }

    fn refusal(&self, protocol: u32, abi: u32, node: &str) -> Option<String> {
        if protocol != PROTOCOL {
            return Some(format!("it speaks version {PROTOCOL} of the protocol, not {protocol}"));
        }
        if abi != ABI_VERSION {
            return Some(format!("its maps are of version {ABI_VERSION}, not {abi}"));
        }
        (node != self.node).then(|| format!("it is the daemon of node {}, not of {node}", self.node))
    }

    /// Everything from the freeze to the commit. An error means that the successor does not serve.
    fn give(&mut self, channel: &mut Channel) -> Result<(), TakeoverError> {
        let ending = || TakeoverError::Refused("it is just ending".to_owned());
        let (done, frozen) = oneshot::channel();
        self.commands.send(Command::Freeze(done)).map_err(|_| ending())?;
        let listening = frozen.blocking_recv().map_err(|_| ending())?;
        let (certificates, pods) = (self.certs.export(), self.enroller.handover());
        let mut servers: Vec<(Server, BorrowedFd<'_>)> =
            self.servers.iter().map(|(server, socket)| (*server, socket.as_fd())).collect();
        servers.push((Server::Cni, self.cni.socket.as_fd()));
        let (names, sockets): (Vec<_>, Vec<_>) = servers.into_iter().unzip();
        let frozen = Message::Frozen { certificates: certificates.len(), pods: pods.len(), servers: names };
        channel.send(&frozen, &sockets)?;
        for certificate in certificates {
            channel.send(&Message::Certificate { certificate }, &[])?;
        }
        for (info, netns) in &pods {
            let mut pod = Pod::new(info);
            let mut fds = vec![netns.as_fd()];
            if let Some(listening) = listening.get(&netns.cookie()) {
                (pod.outbound, pod.inbound_plain, pod.inbound_hbone) =
                    (listening.outbound.len(), listening.inbound_plain.len(), listening.inbound_hbone.len());
                let all = [&listening.outbound, &listening.inbound_plain, &listening.inbound_hbone];
                fds.extend(all.into_iter().flatten().map(|listener| listener.as_fd()));
                pod.dns = listening.dns.len();
                fds.extend(listening.dns.iter().map(|socket| socket.as_fd()));
            }
            channel.send(&Message::Pod { pod }, &fds)?;
        }
        drop(listening);
        channel.wait_up_to(CAPTURE)?;
        match channel.recv()? {
            (Message::Commit, _) => {}
            (other, _) => return Err(unexpected(&other, "a commit")),
        }
        let (done, retired) = oneshot::channel();
        if self.commands.send(Command::Retire(done)).is_ok() {
            // An error means that the thread is gone, and the listeners with it.
            let _ = retired.blocking_recv();
        }
        self.datapath().let_lock_go();
        if let Err(error) = channel.send(&Message::Done, &[]) {
            tracing::warn!(error = %chain(&error), "the successor does not hear that it has taken over");
        }
        Ok(())
    }

    fn thaw(&mut self, runtime: &Handle) {
        // An error means that the daemon is ending.
        let _ = self.commands.send(Command::Thaw);
        let _runtime = runtime.enter();
        if let Err(error) = self.cni.resume() {
            tracing::error!(%error, "the CNI plugin is not served any more; restart mesh-node");
        }
    }

    fn datapath(&self) -> std::sync::MutexGuard<'_, Datapath> {
        self.datapath.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
