//! The new daemon's side of a takeover.

use crate::{
    config::Config,
    enroll::{Enroller, Listeners, PodInfo},
    identity::Exported,
    net::NetNs,
    takeover::{Channel, Message, PATIENCE, PROTOCOL, SOCKET, Server, TakeoverError, unexpected},
};
use futures::{StreamExt as _, stream};
use mesh_common::ABI_VERSION;
use std::{
    net::{TcpListener, UdpSocket},
    os::fd::OwnedFd,
    sync::Arc,
};

/// Pods that are captured side by side.
const PARALLEL: usize = 16;

/// A predecessor that is willing to hand over.
pub struct Succession {
    channel: Channel,
    lock: Option<OwnedFd>,
}

/// What the predecessor has.
pub struct Estate {
    /// The identities' keys and certificates.
    pub certificates: Vec<Exported>,
    /// The pods.
    pub pods: Vec<Inherited>,
    /// The sockets of its servers.
    pub servers: Vec<(Server, OwnedFd)>,
}

/// A pod of the predecessor's.
pub struct Inherited {
    info: PodInfo,
    netns: OwnedFd,
    listeners: Option<Listeners>,
}

impl Succession {
    /// Calls the running daemon; `None` when there is none.
    pub fn begin(config: &Config) -> Result<Option<Self>, TakeoverError> {
        let Some(mut channel) = Channel::call(&config.args.run_dir.join(SOCKET))? else { return Ok(None) };
        let hello = Message::Hello {
            protocol: PROTOCOL,
            abi: ABI_VERSION,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: config.args.node_name.clone(),
        };
        channel.send(&hello, &[])?;
        match channel.recv()? {
            (Message::Welcome { version }, mut fds) if fds.len() == 1 => {
                tracing::info!(version, "taking over from the running daemon");
                Ok(Some(Self { channel, lock: fds.pop() }))
            }
            (other, _) => Err(unexpected(&other, "a welcome with the lock")),
        }
    }

    /// The lock of the pins; `None` after the first call.
    pub fn take_lock(&mut self) -> Option<OwnedFd> {
        self.lock.take()
    }

    /// Makes the predecessor stand still, and gets what it has.
    pub fn inherit(&mut self) -> Result<Estate, TakeoverError> {
        self.channel.send(&Message::Freeze, &[])?;
        // It lets the CNI requests in progress end first.
        self.channel.wait_up_to(PATIENCE * 2)?;
        let (certificates, pods, servers) = match self.channel.recv()? {
            (Message::Frozen { certificates, pods, servers }, fds) if servers.len() == fds.len() => {
                (certificates, pods, servers.into_iter().zip(fds).collect())
            }
            (other, _) => return Err(unexpected(&other, "a list of what there is")),
        };
        self.channel.wait_up_to(PATIENCE)?;
        let mut estate = Estate { certificates: vec![], pods: vec![], servers };
        for _ in 0..certificates {
            match self.channel.recv()? {
                (Message::Certificate { certificate }, _) => estate.certificates.push(certificate),
                (other, _) => return Err(unexpected(&other, "a certificate")),
            }
        }
        for _ in 0..pods {
            let (pod, fds) = match self.channel.recv()? {
                (Message::Pod { pod }, fds)
                    if fds.len() == 1 + pod.outbound + pod.inbound_plain + pod.inbound_hbone + pod.dns =>
                {
                    (pod, fds)
                }
                (other, _) => return Err(unexpected(&other, "a pod with its sockets")),
            };
            let mut fds = fds.into_iter();
            let Some(netns) = fds.next() else { continue };
            let mut take = |n| fds.by_ref().take(n).map(TcpListener::from).collect::<Vec<_>>();
            let (outbound, inbound_plain, inbound_hbone) =
                (take(pod.outbound), take(pod.inbound_plain), take(pod.inbound_hbone));
            let dns = fds.map(UdpSocket::from).collect();
            let listeners =
                (!outbound.is_empty()).then_some(Listeners { outbound, inbound_plain, inbound_hbone, dns });
            estate.pods.push(Inherited { info: pod.info(), netns, listeners });
        }
        Ok(estate)
    }

    /// Says that this daemon serves. The predecessor accepts nothing any more when this returns.
    pub fn commit(mut self) -> Result<(), TakeoverError> {
        self.channel.send(&Message::Commit, &[])?;
        match self.channel.recv()? {
            (Message::Done, _) => Ok(()),
            (other, _) => Err(unexpected(&other, "the end")),
        }
    }
}

/// Enrols the predecessor's pods on their sockets. How many are captured.
pub async fn adopt<M: crate::enroll::Mesh>(enroller: &Arc<Enroller<M>>, pods: Vec<Inherited>) -> usize {
    let captured = stream::iter(pods).map(async |pod| {
        let Inherited { info, netns, listeners } = pod;
        let name = info.to_string();
        let netns = match NetNs::from_fd(netns) {
            Ok(netns) => netns,
            Err(error) => {
                tracing::warn!(pod = name, %error, "a pod was handed over without its namespace");
                return false;
            }
        };
        match enroller.adopt(info, netns, listeners).await {
            Ok(added) => added == crate::enroll::Added::Captured,
            Err(error) => {
                tracing::warn!(pod = name, error = error.full_message(), "a pod is not taken over yet");
                false
            }
        }
    });
    captured.buffer_unordered(PARALLEL).filter(|captured| std::future::ready(*captured)).count().await
}
