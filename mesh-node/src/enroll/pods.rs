//! The records of this node's pods, one per network namespace, and the operations on them.
//!
//! Operations on one pod follow each other; different pods do not wait for each other. A removal makes an
//! addition that is still waiting give up. Deliberately absent: persistence. After a restart the scan and the
//! control plane say everything again.

use super::{
    EnrollError, LeaveReason, Listeners, LocalPod, Membership, Mesh, PodInfo, alive, listeners,
    scan::{self, ScanConfig},
};
use crate::{
    metrics::{Metrics, Sample},
    net::{NetNs, NetNsError, NsId},
};
use futures::{StreamExt, stream};
use std::{
    collections::{HashMap, HashSet},
    io,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::time::{Instant, MissedTickBehavior, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

/// Pods that are looked at side by side.
const PARALLEL: usize = 16;
/// Most addresses of a pod; Kubernetes gives one or two.
const MAX_ADDRS: usize = 16;
/// How often an address that is not usable yet is tried again.
const ADDR_RETRY: Duration = Duration::from_millis(50);
/// Sweeps in a row that have to find a namespace unused before its pod is released.
const SWEEPS_UNUSED: u32 = 2;

/// Bounds of enrolment.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most pods on this node.
    pub pods: usize,
    /// Longest wait for the control plane to say whether a pod is in the mesh.
    pub decide: Duration,
    /// Longest time for a capture, and for a release.
    pub capture: Duration,
    /// Time between two looks for pods that have vanished or whose capture failed.
    pub sweep: Duration,
    /// Whether pods get a socket for DNS.
    pub dns: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pods: 1024,
            decide: Duration::from_secs(20),
            capture: Duration::from_secs(10),
            sweep: Duration::from_secs(10),
            dns: true,
        }
    }
}

/// What became of an added pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// The kernel captures it.
    Captured,
    /// It is left alone.
    NotInMesh(LeaveReason),
}

/// Where a pod stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nobody has said yet whether it is in the mesh.
    Pending,
    /// The kernel captures it.
    Captured,
    /// It is left alone.
    Left(LeaveReason),
    /// It is in the mesh, but could not be captured; tried again at every sweep.
    Failed(String),
}

impl Phase {
    /// The phase as a metric label.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Captured => "captured",
            Self::Left(_) => "left",
            Self::Failed(_) => "failed",
        }
    }
}

/// A pod and where it stands, for status and dump.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodStatus {
    /// The pod.
    pub info: PodInfo,
    /// The cookie of its network namespace.
    pub cookie: u64,
    /// Where it stands.
    pub phase: Phase,
}

/// The record of a pod.
struct Slot {
    netns: Arc<NetNs>,
    view: Mutex<(PodInfo, Phase)>,
    /// Listeners that a predecessor handed over, until the pod is captured on them.
    handed: Mutex<Option<Listeners>>,
    /// Held by the operation on this pod.
    work: tokio::sync::Mutex<()>,
    /// Whether the capturer may hold anything of it.
    taken: AtomicBool,
    /// A removal has begun: the record is not used again.
    stop: CancellationToken,
    /// The removal is complete.
    gone: CancellationToken,
    /// Sweeps in a row that found the namespace unused.
    unused: AtomicU32,
}

impl Slot {
    fn new(info: PodInfo, netns: Arc<NetNs>) -> Self {
        Self {
            netns,
            view: Mutex::new((info, Phase::Pending)),
            handed: Mutex::default(),
            work: tokio::sync::Mutex::default(),
            taken: AtomicBool::new(false),
            stop: CancellationToken::new(),
            gone: CancellationToken::new(),
            unused: AtomicU32::new(0),
        }
    }

    fn view(&self) -> MutexGuard<'_, (PodInfo, Phase)> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_handed(&self) -> Option<Listeners> {
        self.handed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn info(&self) -> PodInfo {
        self.view().0.clone()
    }

    fn phase(&self) -> Phase {
        self.view().1.clone()
    }

    fn set_phase(&self, phase: Phase) {
        let view = &mut *self.view();
        if view.1 != phase {
            let (from, to) = (view.1.as_str(), phase.as_str());
            tracing::info!(pod = %view.0, cookie = self.netns.cookie(), from, to, "a pod has a new state");
        }
        view.1 = phase;
    }

    /// Takes over what a later report about the same namespace knows better.
    fn learn(&self, later: &PodInfo) {
        let info = &mut self.view().0;
        for (mine, theirs) in [
            (&mut info.namespace, &later.namespace),
            (&mut info.name, &later.name),
            (&mut info.uid, &later.uid),
            (&mut info.container_id, &later.container_id),
        ] {
            if !theirs.is_empty() {
                mine.clone_from(theirs);
            }
        }
        if !later.addrs.is_empty() {
            info.addrs.clone_from(&later.addrs);
        }
    }
}

/// Enrols the pods of one node.
pub struct Enroller<M> {
    mesh: Arc<M>,
    metrics: Arc<Metrics>,
    limits: Limits,
    /// The daemon's own namespace, which is no pod's.
    home: NsId,
    slots: Mutex<HashMap<NsId, Arc<Slot>>>,
    /// Whether a sweep has ever found a pod's namespace in use. Until then the daemon may not see the host's
    /// processes at all (a PID namespace of its own), and leaves releasing to CNI.
    sees_pods: AtomicBool,
}

impl<M: Mesh> Enroller<M> {
    /// An enroller without pods; registers the gauge `nodemesh_pods`.
    pub fn new(mesh: Arc<M>, metrics: Arc<Metrics>, limits: Limits) -> Result<Arc<Self>, NetNsError> {
        let home = NetNs::current()?.id();
        let this =
            Arc::new(Self { mesh, metrics, limits, home, slots: Mutex::default(), sees_pods: false.into() });
        let weak = Arc::downgrade(&this);
        this.metrics.sample_gauges("nodemesh_pods", "Pods of this node, by where they stand", move || {
            let pods = weak.upgrade().map(|this| this.pods()).unwrap_or_default();
            let count = |state: &str| pods.iter().filter(|p| p.phase.as_str() == state).count() as f64;
            ["pending", "captured", "left", "failed"].map(|s| Sample::new([("state", s)], count(s))).into()
        });
        Ok(this)
    }

    /// The metrics that enrolment counts in.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Why pods cannot be taken at the moment.
    pub fn not_ready(&self) -> Option<String> {
        self.mesh.not_ready()
    }

    /// All pods known, by name.
    pub fn pods(&self) -> Vec<PodStatus> {
        let mut pods: Vec<PodStatus> = self
            .all()
            .iter()
            .map(|slot| PodStatus { info: slot.info(), cookie: slot.netns.cookie(), phase: slot.phase() })
            .collect();
        pods.sort_by(|a, b| {
            let key = |p: &PodStatus| (p.info.namespace.clone(), p.info.name.clone(), p.info.uid.clone());
            key(a).cmp(&key(b))
        });
        pods
    }

    /// Adds a pod, or looks at one again: waits at most `wait` for the control plane to say whether it is in
    /// the mesh, and captures it if it is. Adding a captured pod again changes nothing. A pod that comes back
    /// with another namespace replaces its former self.
    pub async fn add(&self, info: PodInfo, netns: NetNs, wait: Duration) -> Result<Added, EnrollError> {
        let deadline = Instant::now() + wait.min(self.limits.decide);
        if netns.id() == self.home {
            return Err(EnrollError::HostNetwork { pod: Box::new(info) });
        }
        let netns = Arc::new(netns);
        let slot = loop {
            let slot = self.slot_for(&info, &netns)?;
            if !slot.stop.is_cancelled() {
                break slot;
            }
            // The namespace is just being released; its record must be gone before a new one can begin.
            tokio::select! {
                () = slot.gone.cancelled() => {}
                () = sleep_until(deadline) => return Err(EnrollError::Removed { pod: Box::new(info) }),
            }
        };
        for former in self.former_selves(&slot) {
            tracing::info!(pod = %former.info(), "the pod has a new network namespace");
            self.remove(&former).await;
        }
        let _work = slot.work.lock().await;
        self.settle(&slot, deadline).await
    }

    /// Takes a pod over from a predecessor, with the listeners that it was captured on. If nobody says yet whether it is
    /// in the mesh, the listeners wait for the answer.
    pub async fn adopt(
        &self,
        info: PodInfo,
        netns: NetNs,
        listeners: Option<Listeners>,
    ) -> Result<Added, EnrollError> {
        let slot = self.slot_for(&info, &Arc::new(netns))?;
        *slot.handed.lock().unwrap_or_else(PoisonError::into_inner) = listeners;
        let _work = slot.work.lock().await;
        self.settle(&slot, Instant::now()).await
    }

    /// Every pod with its network namespace, for a successor.
    pub fn handover(&self) -> Vec<(PodInfo, Arc<NetNs>)> {
        let all = self.all();
        all.iter().filter(|s| !s.stop.is_cancelled()).map(|s| (s.info(), Arc::clone(&s.netns))).collect()
    }

    /// The record of the namespace, made if there is none. It may be one that is being removed.
    fn slot_for(&self, info: &PodInfo, netns: &Arc<NetNs>) -> Result<Arc<Slot>, EnrollError> {
        let mut slots = self.slots();
        if let Some(slot) = slots.get(&netns.id()) {
            if !slot.stop.is_cancelled() {
                slot.learn(info);
            }
            return Ok(Arc::clone(slot));
        }
        if slots.len() >= self.limits.pods {
            return Err(EnrollError::TooManyPods { pod: Box::new(info.clone()), limit: self.limits.pods });
        }
        let slot = Arc::new(Slot::new(info.clone(), Arc::clone(netns)));
        slots.insert(netns.id(), Arc::clone(&slot));
        Ok(slot)
    }

    /// Records of the same pod with another namespace.
    fn former_selves(&self, slot: &Arc<Slot>) -> Vec<Arc<Slot>> {
        let info = slot.info();
        let same = |a: &str, b: &str| !a.is_empty() && a == b;
        let mut all = self.all();
        all.retain(|other| {
            let theirs = other.info();
            !Arc::ptr_eq(other, slot)
                && (same(&theirs.container_id, &info.container_id) || same(&theirs.uid, &info.uid))
        });
        all
    }

    /// Releases a pod, found by its container, or, if it was found by the scan, by its UID or namespace.
    /// Returns how many records went; a pod that is not known is no error.
    pub async fn del(&self, pod: &PodInfo, netns: Option<NsId>) -> usize {
        let mut gone = self.all();
        gone.retain(|slot| {
            let info = slot.info();
            if info.container_id.is_empty() {
                (!pod.uid.is_empty() && info.uid == pod.uid) || netns == Some(slot.netns.id())
            } else {
                info.container_id == pod.container_id
            }
        });
        self.remove_all(gone).await
    }

    /// Releases every pod that CNI has added and whose container is not in `keep`. Returns how many.
    pub async fn gc(&self, keep: &[String]) -> usize {
        let keep: HashSet<&str> = keep.iter().map(String::as_str).collect();
        let mut gone = self.all();
        gone.retain(|slot| {
            let id = slot.info().container_id;
            !id.is_empty() && !keep.contains(id.as_str())
        });
        self.remove_all(gone).await
    }

    /// Whether a pod that is in the mesh is captured, in the kernel too.
    pub async fn check(&self, pod: &PodInfo, netns: Option<NsId>) -> Result<(), EnrollError> {
        let slot = self.all().into_iter().find(|slot| {
            netns == Some(slot.netns.id())
                || (!pod.container_id.is_empty() && slot.info().container_id == pod.container_id)
        });
        let fail = |why: String| Err(EnrollError::NotCaptured { pod: Box::new(pod.clone()), why });
        let Some(slot) = slot else {
            return match self.mesh.membership(pod) {
                Membership::Enrol(_) => fail("mesh-node does not know it".to_owned()),
                Membership::Leave(_) | Membership::Unknown => Ok(()),
            };
        };
        match slot.phase() {
            Phase::Left(_) => Ok(()),
            Phase::Failed(why) => fail(why),
            Phase::Captured if self.mesh.is_captured(slot.netns.cookie()).await => Ok(()),
            Phase::Captured => fail("the kernel has no entry for it".to_owned()),
            Phase::Pending => match self.mesh.membership(&slot.info()) {
                Membership::Enrol(_) => fail("it is still being enrolled".to_owned()),
                Membership::Leave(_) | Membership::Unknown => Ok(()),
            },
        }
    }

    /// Takes in the pods that run already. Returns how many were found.
    pub async fn scan(&self, config: &ScanConfig) -> io::Result<usize> {
        let config = config.clone();
        let found =
            tokio::task::spawn_blocking(move || scan::scan(&config)).await.map_err(io::Error::other)??;
        let n = found.len();
        stream::iter(found)
            .for_each_concurrent(PARALLEL, async |found| {
                let start = Instant::now();
                let info = PodInfo { uid: found.uid, ..PodInfo::default() };
                let outcome = match self.add(info, found.netns, Duration::ZERO).await {
                    Ok(Added::Captured) => "captured",
                    Ok(Added::NotInMesh(_)) => "not_in_mesh",
                    // Decided as soon as the control plane tells.
                    Err(e @ EnrollError::Undecided { .. }) => e.label(),
                    Err(e) => {
                        tracing::warn!(
                            error = e.full_message(),
                            remedy = e.remedy(),
                            "a running pod is not enrolled"
                        );
                        e.label()
                    }
                };
                self.metrics.enrolled("scan", outcome, start.elapsed());
            })
            .await;
        Ok(n)
    }

    /// Looks at every pod again: membership may have changed, or a capture that failed may work now.
    pub async fn reevaluate(&self) {
        stream::iter(self.all())
            .for_each_concurrent(PARALLEL, async |slot| {
                // A pod that is being worked on watches for changes itself.
                let Ok(_work) = slot.work.try_lock() else { return };
                let before = slot.phase();
                let Err(e) = self.settle(&slot, Instant::now()).await else { return };
                // Said once, not at every try.
                if slot.phase() != before {
                    let error = e.full_message();
                    tracing::warn!(error, remedy = e.remedy(), "a pod is not enrolled");
                }
            })
            .await;
    }

    /// Releases pods whose namespace nobody but the daemon holds any more. Returns how many.
    pub async fn sweep(&self, proc_root: &Path) -> io::Result<usize> {
        let root = proc_root.to_owned();
        let used = tokio::task::spawn_blocking(move || alive::namespaces_in_use(&root))
            .await
            .map_err(io::Error::other)??;
        let (kept, mut gone): (Vec<_>, Vec<_>) =
            self.all().into_iter().partition(|slot| used.contains(&slot.netns.id()));
        for slot in &kept {
            self.sees_pods.store(true, Relaxed);
            slot.unused.store(0, Relaxed);
        }
        if !self.sees_pods.load(Relaxed) {
            return Ok(0);
        }
        gone.retain(|slot| slot.unused.fetch_add(1, Relaxed) + 1 >= SWEEPS_UNUSED);
        for slot in &gone {
            tracing::info!(pod = %slot.info(), "the pod has vanished without a CNI DEL");
        }
        Ok(self.remove_all(gone).await)
    }

    /// Follows membership and sweeps, until `stop`. Pods stay captured after that.
    pub async fn run(&self, proc_root: &Path, stop: CancellationToken) {
        let mut changes = self.mesh.changes();
        let mut tick = tokio::time::interval(self.limits.sweep);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                changed = changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                _ = tick.tick() => {
                    if let Err(e) = self.sweep(proc_root).await {
                        tracing::warn!(error = %e, "cannot look for vanished pods");
                    }
                }
            }
            self.reevaluate().await;
        }
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<NsId, Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all(&self) -> Vec<Arc<Slot>> {
        self.slots().values().cloned().collect()
    }

    async fn remove_all(&self, gone: Vec<Arc<Slot>>) -> usize {
        let n = gone.len();
        stream::iter(gone).for_each_concurrent(PARALLEL, async |slot| self.remove(&slot).await).await;
        n
    }

    /// Ends a pod's record. The record stays in the map until the release is complete, so that the same
    /// namespace is never released after it was captured anew.
    async fn remove(&self, slot: &Arc<Slot>) {
        slot.stop.cancel();
        let _work = slot.work.lock().await;
        if slot.gone.is_cancelled() {
            return;
        }
        self.let_go(slot).await;
        self.slots().remove(&slot.netns.id());
        slot.gone.cancel();
    }

    /// Brings a pod to where the mesh says it belongs. The caller holds `slot.work`.
    async fn settle(&self, slot: &Slot, deadline: Instant) -> Result<Added, EnrollError> {
        if slot.info().addrs.is_empty() {
            let mut addrs = slot.netns.addresses().unwrap_or_default();
            addrs.truncate(MAX_ADDRS);
            slot.view().0.addrs = addrs;
        }
        let membership = self.decide(slot, deadline).await?;
        let captured = slot.phase() == Phase::Captured;
        match membership {
            Membership::Enrol(_) if captured => Ok(Added::Captured),
            // What is captured stays so while nobody says otherwise.
            Membership::Unknown => Ok(Added::Captured),
            Membership::Enrol(name) => {
                {
                    let mut view = slot.view();
                    view.0.namespace = name.namespace;
                    view.0.name = name.name;
                }
                match self.capture(slot, deadline).await {
                    Ok(()) => {
                        slot.set_phase(Phase::Captured);
                        Ok(Added::Captured)
                    }
                    Err(e) => {
                        slot.set_phase(Phase::Failed(e.full_message()));
                        Err(e)
                    }
                }
            }
            Membership::Leave(reason) => {
                slot.take_handed();
                self.let_go(slot).await;
                slot.set_phase(Phase::Left(reason));
                Ok(Added::NotInMesh(reason))
            }
        }
    }

    /// Waits for the mesh to know the pod. `Unknown` comes back only for a pod that is captured.
    async fn decide(&self, slot: &Slot, deadline: Instant) -> Result<Membership, EnrollError> {
        let start = Instant::now();
        let mut changes = self.mesh.changes();
        loop {
            if slot.stop.is_cancelled() {
                return Err(EnrollError::Removed { pod: Box::new(slot.info()) });
            }
            changes.mark_unchanged();
            let membership = self.mesh.membership(&slot.info());
            if membership != Membership::Unknown || slot.phase() == Phase::Captured {
                return Ok(membership);
            }
            let undecided = || EnrollError::Undecided { pod: Box::new(slot.info()), waited: start.elapsed() };
            tokio::select! {
                () = sleep_until(deadline) => return Err(undecided()),
                () = slot.stop.cancelled() => {}
                // No sender any more: the daemon is ending.
                changed = changes.changed() => changed.map_err(|_| undecided())?,
            }
        }
    }

    async fn capture(&self, slot: &Slot, deadline: Instant) -> Result<(), EnrollError> {
        let info = slot.info();
        if info.addrs.is_empty() {
            return Err(EnrollError::NoAddress { pod: Box::new(info) });
        }
        let listeners = match slot.take_handed() {
            Some(handed) => listeners::with_dns(handed, &info, &slot.netns, self.limits.dns),
            None => loop {
                match listeners::open(&info, &slot.netns, self.limits.dns) {
                    Err(e) if listeners::not_yet(&e) && Instant::now() + ADDR_RETRY < deadline => {
                        sleep(ADDR_RETRY).await;
                    }
                    result => break result?,
                }
            },
        };
        let cookie = slot.netns.cookie();
        let pod = LocalPod {
            info: info.clone(),
            cookie,
            netns: Arc::clone(&slot.netns),
            outbound: listeners.outbound,
            inbound_plain: listeners.inbound_plain,
            inbound_hbone: listeners.inbound_hbone,
            dns: listeners.dns,
        };
        slot.taken.store(true, Relaxed);
        match timeout(self.limits.capture, self.mesh.capture(pod)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source)) => {
                slot.taken.store(false, Relaxed);
                Err(EnrollError::Capture { pod: Box::new(info), source })
            }
            Err(_) => {
                self.let_go(slot).await;
                Err(EnrollError::CaptureTimeout { pod: Box::new(info), after: self.limits.capture })
            }
        }
    }

    /// Has the capturer give up whatever it holds of the pod.
    async fn let_go(&self, slot: &Slot) {
        if !slot.taken.swap(false, Relaxed) {
            return;
        }
        if timeout(self.limits.capture, self.mesh.release(slot.netns.cookie())).await.is_err() {
            let limit = self.limits.capture;
            tracing::error!(pod = %slot.info(), ?limit, "a pod was not released in time");
        }
    }
}
