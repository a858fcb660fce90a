//! What enrolment asks the rest of the daemon.

use super::reconcile::{Command, InStep};
use crate::{
    enroll::{CaptureError, LeaveReason, LocalPod, Membership, Mesh, PodInfo},
    local::SharedLocals,
    state::Store,
};
use arc_swap::ArcSwap;
use mesh_xds::model::Workload;
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
    mpsc::SyncSender,
};
use tokio::sync::{oneshot, watch};

/// Answers from the world, and passes captures on to the reconcile thread.
pub struct NodeMesh {
    /// The world.
    pub store: Arc<Store>,
    /// The captured pods.
    pub locals: SharedLocals,
    /// The reconcile thread's queue.
    pub commands: SyncSender<Command>,
    /// Whether the kernel is in step.
    pub in_step: Arc<ArcSwap<InStep>>,
    /// Whether the control plane's first full answer has been applied.
    pub synced: Arc<AtomicBool>,
    /// Namespaces whose pods need not wait for the control plane.
    pub exempt: Vec<String>,
}

impl NodeMesh {
    fn find(&self, pod: &PodInfo) -> Option<Arc<Workload>> {
        let world = self.store.world();
        match pod.full_name() {
            Some(name) => world.workload_by_pod(&name).cloned(),
            None => pod.addrs.iter().find_map(|addr| world.workload_by_addr(addr)).cloned(),
        }
    }

    async fn send<T>(&self, command: Command, answer: oneshot::Receiver<T>) -> Result<T, CaptureError> {
        let commands = self.commands.clone();
        // The queue is bounded and its reader quick, but a full one must not block this runtime.
        let sent = tokio::task::spawn_blocking(move || commands.send(command).is_ok()).await;
        match sent {
            Ok(true) => answer.await.map_err(|_| CaptureError::ShuttingDown),
            _ => Err(CaptureError::ShuttingDown),
        }
    }
}

/// What a workload's description says about capturing it.
fn decide(workload: &Workload) -> Membership {
    if workload.host_network {
        Membership::Leave(LeaveReason::HostNetwork)
    } else if workload.native_tunnel {
        Membership::Leave(LeaveReason::NativeTunnel)
    } else if workload.in_mesh() {
        Membership::Enrol(workload.name.clone())
    } else {
        Membership::Leave(LeaveReason::NotInMesh)
    }
}

impl Mesh for NodeMesh {
    fn membership(&self, pod: &PodInfo) -> Membership {
        match self.find(pod) {
            // Until the first configuration is complete, a pod's policies may be missing.
            Some(workload) if self.synced.load(Ordering::Acquire) => decide(&workload),
            Some(_) => Membership::Unknown,
            None if self.exempt.contains(&pod.namespace) => Membership::Leave(LeaveReason::NotInMesh),
            None => Membership::Unknown,
        }
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.store.subscribe()
    }

    fn not_ready(&self) -> Option<String> {
        let in_step = self.in_step.load();
        if !self.synced.load(Ordering::Acquire) {
            Some("the control plane has not sent the configuration yet".to_owned())
        } else if !in_step.error.is_empty() {
            Some(format!("the kernel did not take the configuration: {}", in_step.error))
        } else {
            None
        }
    }

    async fn capture(&self, pod: LocalPod) -> Result<(), CaptureError> {
        let (done, answer) = oneshot::channel();
        self.send(Command::Capture(Box::new(pod), done), answer).await?
    }

    async fn release(&self, cookie: u64) {
        let (done, answer) = oneshot::channel();
        // An error means that the reconcile thread is gone, and with it every capture.
        let _ = self.send(Command::Release(cookie, done), answer).await;
    }

    async fn is_captured(&self, cookie: u64) -> bool {
        self.locals.load().by_cookie(cookie).is_some()
    }
}
