//! The one thread that changes anything: the world, the kernel, and which pods are captured.
//!
//! Commands come in by a bounded queue. Configuration that waits is merged, then: additions are published, the kernel
//! is brought in step with the final state, removals are published. A kernel that refuses is asked again every second;
//! the last good state stays, and readiness says so. Deliberately absent: xDS, CNI and admin; they send commands.

use super::{
    backends::{Backends, Gone},
    flows::LocalFlows,
    listeners::{Handlers, Kind, Listening},
};
use crate::{
    bpf::{BpfError, CapturedPod, Datapath, Intent, ops::Table},
    enroll::{CaptureError, LocalPod as NewPod},
    identity::CertManager,
    local::{LocalPod, Locals, NodeLimits, SharedLocals},
    metrics::Metrics,
    outcome::chain,
    plan::{NodeView, Plaintext, intent},
    policy::PolicySet,
    pulse::Pulse,
    state::{Batch, Store, World},
};
use arc_swap::ArcSwap;
use mesh_xds::model::{NamespacedName, Workload};
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    os::fd::AsFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// Commands that may wait.
pub const QUEUE: usize = 1024;
/// How soon a refused change is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How often the kernel is compared with what it should hold, in case somebody else changed it.
const AUDIT: Duration = Duration::from_secs(30);

/// How often the pods' listening ports are read, for listeners that are older than the capture.
const LISTENERS: Duration = Duration::from_secs(5);

/// Something to change.
#[derive(Debug)]
pub enum Command {
    /// Configuration; answered when it is in force.
    Batch(Batch, oneshot::Sender<()>),
    /// A pod to capture; answered when the kernel does it.
    Capture(Box<NewPod>, oneshot::Sender<Result<(), CaptureError>>),
    /// A pod to let go, by its netns cookie.
    Release(u64, oneshot::Sender<()>),
    /// The configuration is complete: the kernel may be brought in step.
    Synced,
    /// Every pod of the node was looked at: what a predecessor captured beyond them goes.
    LetGo,
    /// A successor is about to take over: nothing is changed any more. Answered with the pods' listeners, by cookie.
    Freeze(oneshot::Sender<BTreeMap<u64, Listening>>),
    /// The successor is gone: things change again.
    Thaw,
    /// The successor serves: no connection is accepted any more. Policies go on to reach those that are open.
    Retire(oneshot::Sender<()>),
    /// The daemon ends. The kernel keeps what it has. The last command.
    Stop(oneshot::Sender<()>),
}

/// How kernel and world compare; read by readiness and status.
#[derive(Clone, Debug, Default)]
pub struct InStep {
    /// The generation of the world that the kernel was last brought in step with.
    pub generation: u64,
    /// Why the kernel refused the latest state; empty when it did not.
    pub error: String,
    /// Rows of each map, in the order of [`Table::ALL`], after the last run that succeeded.
    pub rows: [usize; Table::ALL.len()],
}

/// What the thread works on.
pub struct Reconcile {
    /// The kernel.
    pub datapath: Arc<Mutex<Datapath>>,
    /// The world.
    pub store: Arc<Store>,
    /// The captured pods, for the traffic path.
    pub locals: SharedLocals,
    /// Where this node is.
    pub node: Arc<ArcSwap<NodeView>>,
    /// Where accepted connections go.
    pub handlers: Arc<Handlers>,
    /// Identities.
    pub certs: Arc<CertManager>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// The result, for others to read.
    pub in_step: Arc<ArcSwap<InStep>>,
    /// This node's name.
    pub node_name: String,
    /// The runtime of certificates, xDS and admin.
    pub runtime: tokio::runtime::Handle,
    /// Whether the configuration is complete. Before that the kernel keeps what a predecessor left.
    pub synced: Arc<AtomicBool>,
    /// This thread's sign of life.
    pub pulse: Pulse,
    /// What a pod may hold of this node.
    pub limits: Arc<NodeLimits>,
    /// Whether a successor changes the kernel's state, and this thread must not.
    pub frozen: Cell<bool>,
    /// Connections between pods of this node that the kernel carries.
    pub flows: RefCell<LocalFlows>,
    /// Connections to backends.
    pub backends: Backends,
    /// Which ports take plaintext.
    pub plaintext: RefCell<Plaintext>,
}

/// A captured pod's parts that only this thread needs.
struct Captured {
    pod: Arc<LocalPod>,
    workload: Arc<Workload>,
    outbound_v4: Option<u16>,
    outbound_v6: Option<u16>,
    listening: Listening,
    dns: bool,
    stop: CancellationToken,
}

impl Reconcile {
    /// Runs until [`Command::Stop`], or until all senders are gone.
    pub fn run(self, commands: &mpsc::Receiver<Command>) {
        let mut captured = BTreeMap::new();
        let mut dirty = false;
        let (mut audited, mut listed) = (Instant::now(), Instant::now());
        // Certificates are fetched by tasks of this runtime.
        let _runtime = self.runtime.enter();
        // What a predecessor said yes to is asked again.
        self.verdicts_end(&self.locals.load());
        loop {
            self.pulse.tick();
            match commands.recv_timeout(RETRY) {
                Ok(first) => {
                    let _busy = self.pulse.busy();
                    let mut waiting: Vec<_> =
                        std::iter::once(first).chain(commands.try_iter().take(QUEUE)).collect();
                    let stop = waiting.iter().position(|c| matches!(c, Command::Stop(_)));
                    let stop = stop.map(|at| waiting.swap_remove(at));
                    dirty = !self.handle(waiting, &mut captured) || dirty;
                    if let Some(Command::Stop(done)) = stop {
                        let _ = done.send(());
                        break;
                    }
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
            let _busy = self.pulse.busy();
            if !self.frozen.get() {
                self.flows.borrow_mut().tick(&self.locals.load());
            }
            if listed.elapsed() >= LISTENERS {
                self.sync_listeners(&captured);
                listed = Instant::now();
            }
            if dirty || audited.elapsed() >= AUDIT {
                dirty = !self.bring_in_step(&self.store.world(), &captured);
                audited = Instant::now();
            }
        }
        for pod in captured.into_values() {
            pod.stop.cancel();
        }
    }

    /// Handles commands in order, merging configuration; whether the kernel took everything.
    fn handle(&self, commands: Vec<Command>, captured: &mut BTreeMap<u64, Captured>) -> bool {
        let (mut batch, mut waiting, mut others) = (Batch::default(), vec![], vec![]);
        for command in commands {
            match command {
                Command::Batch(more, done) => {
                    batch.merge(more);
                    waiting.push(done);
                }
                other => others.push(other),
            }
        }
        let mut good = true;
        if !waiting.is_empty() {
            good &= self.configure(batch, captured);
            for done in waiting {
                // Nobody waits any more: the stream is gone.
                let _ = done.send(());
            }
        }
        for command in others {
            match command {
                Command::Capture(pod, done) => {
                    let name = pod.info.full_name();
                    let result = self.capture(*pod, captured);
                    if let (Err(error), Some(name)) = (&result, name) {
                        tracing::warn!(pod = %name, error = %chain(error), "a pod could not be captured");
                    }
                    let _ = done.send(result);
                }
                Command::Release(cookie, done) => {
                    good &= self.release(cookie, captured);
                    let _ = done.send(());
                }
                Command::Synced => good &= self.bring_in_step(&self.store.world(), captured),
                Command::LetGo => good &= self.let_predecessor_go(captured),
                Command::Freeze(done) => {
                    self.frozen.set(true);
                    let _ = done.send(captured.iter().map(|(c, pod)| (*c, pod.listening.clone())).collect());
                }
                Command::Thaw => {
                    self.frozen.set(false);
                    if let Err(error) = self.datapath().forget() {
                        tracing::error!(error = %chain(&error), "cannot see what the successor left behind");
                    }
                    self.verdicts_end(&self.locals.load());
                    good &= self.bring_in_step(&self.store.world(), captured);
                }
                Command::Retire(done) => {
                    for pod in captured.values_mut() {
                        pod.stop.cancel();
                        pod.listening = Listening::default();
                    }
                    let _ = done.send(());
                }
                // Taken above, and by `run`.
                Command::Batch(..) | Command::Stop(_) => {}
            }
        }
        good
    }

    fn configure(&self, batch: Batch, captured: &mut BTreeMap<u64, Captured>) -> bool {
        let policies = batch.touches_policies();
        let (before, changed) = (self.store.world(), batch.changed_addresses());
        let staged = self.store.stage(batch);
        self.store.publish(staged.additions.clone());
        self.node.store(Arc::new(NodeView::of(&staged.complete, &self.node_name)));
        // Policies before anything else that a batch brings: a pod must not serve a moment without its new ones.
        let mut verdicts = false;
        for pod in captured.values_mut() {
            verdicts |= pod.refresh(&staged.complete, policies);
        }
        if verdicts {
            self.verdicts_end(&self.locals.load());
        }
        let (replaced, gone) = Gone::of(&before, &changed, &staged.complete);
        self.end_sockets(&replaced, &before, &staged.complete);
        let good = self.bring_in_step(&staged.complete, captured);
        self.end_sockets(&gone, &before, &staged.complete);
        self.store.publish(staged.complete);
        good
    }

    /// Policies or captured pods have changed; `before` is how the latter were.
    fn verdicts_end(&self, before: &Locals) {
        if self.frozen.get() {
            // The successor judges.
            return;
        }
        self.flows.borrow_mut().changed(before, &self.locals.load());
    }

    fn end_sockets(&self, gone: &Gone, before: &World, complete: &World) {
        if self.frozen.get() || gone.is_empty() {
            return;
        }
        let rows = || {
            self.datapath().direct_stats().unwrap_or_else(|error| {
                tracing::warn!(error = %chain(&error), "nobody can tell which sockets go to a backend that is gone");
                vec![]
            })
        };
        self.backends.end(gone, &self.locals.load(), before, complete, rows);
    }

    /// Makes the kernel hold what follows from `world` and the captured pods.
    fn bring_in_step(&self, world: &World, captured: &BTreeMap<u64, Captured>) -> bool {
        if !self.synced.load(Ordering::Acquire) {
            // A part of the configuration would take away what the rest of it wants.
            return false;
        }
        if self.frozen.get() {
            return true;
        }
        let started = Instant::now();
        let intent = self.intent(world, captured);
        let result = self.datapath().apply(&intent);
        let took = started.elapsed();
        match result {
            Ok(report) => {
                for issue in &report.issues {
                    tracing::warn!(%issue, "the kernel cannot do a part of the configuration");
                }
                let operations = (report.written + report.removed) as u64;
                self.metrics.reconciled("ok", operations, took);
                tracing::debug!(generation = world.generation(), operations, ?took, "the kernel is in step");
                let state =
                    InStep { generation: world.generation(), error: String::new(), rows: report.rows };
                self.in_step.store(Arc::new(state));
                true
            }
            Err(error) => {
                let error = chain(&error);
                self.metrics.reconciled("error", 0, took);
                tracing::error!(%error, "the kernel did not take the configuration; trying again");
                let before = InStep::clone(&self.in_step.load());
                self.in_step.store(Arc::new(InStep { error, ..before }));
                false
            }
        }
    }

    fn intent(&self, world: &World, captured: &BTreeMap<u64, Captured>) -> Intent {
        let pods = captured.values().map(Captured::desired).collect();
        intent(world, &self.node.load(), pods, &mut self.plaintext.borrow_mut())
    }

    fn capture(&self, new: NewPod, captured: &mut BTreeMap<u64, Captured>) -> Result<(), CaptureError> {
        if self.frozen.get() {
            return Err(CaptureError::ShuttingDown);
        }
        let cookie = new.cookie;
        if captured.contains_key(&cookie) {
            self.release(cookie, captured);
        }
        let world = self.store.world();
        let name = NamespacedName::new(new.info.namespace.clone(), new.info.name.clone());
        let unknown =
            || CaptureError::Datapath(format!("the control plane has taken back workload {name}").into());
        let workload = world.workload_by_pod(&name).ok_or_else(unknown)?.clone();
        let identity = workload.identity().map_err(|e| CaptureError::Datapath(e.into()))?;
        let policies = Arc::new(PolicySet::for_workload(&workload, world.policies()));
        let certificate = self.certs.acquire(&identity).map_err(|e| CaptureError::Datapath(e.into()))?;
        let addrs = new.info.addrs.clone();
        let pod = LocalPod::new(name, addrs, new.netns.clone(), certificate, policies, self.limits.clone());
        let pod = Arc::new(pod);
        let port = |v4: bool| {
            let addrs = new.outbound.iter().filter_map(|l| l.local_addr().ok());
            addrs.filter(|a| a.is_ipv4() == v4).map(|a| a.port()).next()
        };
        let mut entry = Captured {
            pod: pod.clone(),
            workload,
            outbound_v4: port(true),
            outbound_v6: port(false),
            listening: Listening::default(),
            dns: !new.dns.is_empty(),
            stop: CancellationToken::new(),
        };
        let result = self.take(new, &mut entry, captured);
        match result {
            Ok(()) => {
                tracing::info!(pod = %pod.name, cookie, identity = %pod.identity, "captured");
                captured.insert(cookie, entry);
                self.backends.end_stale(&pod, &world);
                Ok(())
            }
            Err(error) => {
                self.undo(&entry);
                Err(error)
            }
        }
    }

    /// Accept loops first, then the outbound side, then the inbound side: at no moment is a connection sent where nobody
    /// listens. The list of listening ports is read after the kernel has begun to keep it, so that none is missed.
    fn take(
        &self,
        new: NewPod,
        entry: &mut Captured,
        captured: &BTreeMap<u64, Captured>,
    ) -> Result<(), CaptureError> {
        let failed = |e: BpfError| CaptureError::Datapath(e.into());
        let pod = &entry.pod.clone();
        self.update_locals(|locals| locals.insert(pod.clone()));
        for listener in &new.inbound_plain {
            let addr = listener.local_addr().map_err(|e| CaptureError::Datapath(e.into()))?;
            self.datapath().set_inbound_listener(addr.ip(), listener.as_fd()).map_err(failed)?;
        }
        let kinds = [
            (Kind::Outbound, new.outbound),
            (Kind::Plain, new.inbound_plain),
            (Kind::Hbone, new.inbound_hbone),
        ];
        for (kind, listeners) in kinds {
            for listener in listeners {
                let shared = self.handlers.listen(pod, kind, listener, entry.stop.clone());
                entry.listening.of(kind).push(shared.map_err(|e| CaptureError::Datapath(e.into()))?);
            }
        }
        for socket in new.dns {
            let shared = self.handlers.datagrams(pod, socket, entry.stop.clone());
            entry.listening.dns.extend(shared.map_err(|e| CaptureError::Datapath(e.into()))?);
        }
        let mut all: Vec<CapturedPod> = captured.values().map(Captured::desired).collect();
        all.push(entry.desired());
        let plaintext = &mut self.plaintext.borrow_mut();
        let intent = intent(&self.store.world(), &self.node.load(), all, plaintext);
        self.datapath().apply(&intent).map_err(failed)?;
        let listening = pod.netns.tcp_listeners().map_err(|e| CaptureError::Datapath(e.into()))?;
        let mut datapath = self.datapath();
        datapath.sync_listeners(pod.cookie, &listening).map_err(failed)?;
        datapath.attach_inbound(pod.netns.as_fd(), pod.cookie).map_err(failed)
    }

    /// Tells the kernel which of the older listeners are still there; it does not see their end.
    fn sync_listeners(&self, captured: &BTreeMap<u64, Captured>) {
        if self.frozen.get() {
            return;
        }
        for entry in captured.values() {
            let pod = &entry.pod;
            let synced = pod.netns.tcp_listeners().map_err(|e| chain(&e)).and_then(|listening| {
                self.datapath().sync_listeners(pod.cookie, &listening).map_err(|e| chain(&e))
            });
            if let Err(error) = synced {
                tracing::warn!(pod = %pod.name, %error, "cannot read the listening ports of a pod");
            }
        }
    }

    /// The kernel first: connections go back to where they went without the mesh, then the listeners close.
    fn release(&self, cookie: u64, captured: &mut BTreeMap<u64, Captured>) -> bool {
        let Some(entry) = captured.remove(&cookie) else { return true };
        let good = self.bring_in_step(&self.store.world(), captured);
        self.undo(&entry);
        tracing::info!(pod = %entry.pod.name, cookie, "released");
        good
    }

    fn let_predecessor_go(&self, captured: &BTreeMap<u64, Captured>) -> bool {
        if self.frozen.get() {
            return true;
        }
        let gone = self.datapath().let_predecessor_go();
        match gone {
            Ok(true) => tracing::info!("what a predecessor captured and this daemon did not is let go"),
            Ok(false) => return true,
            Err(error) => tracing::error!(error = %chain(&error), "the predecessor's pins stay"),
        }
        self.bring_in_step(&self.store.world(), captured)
    }

    fn undo(&self, entry: &Captured) {
        let pod = &entry.pod;
        if !self.frozen.get()
            && let Err(error) = self.datapath().detach_inbound(pod.cookie)
        {
            tracing::warn!(pod = %pod.name, error = %chain(&error), "cannot detach from a network namespace");
        }
        entry.stop.cancel();
        self.update_locals(|locals| {
            locals.remove(pod.cookie);
        });
        for pool in &self.handlers.pools {
            pod.addrs.iter().for_each(|addr| pool.forget_source(*addr));
        }
    }

    fn update_locals(&self, change: impl FnOnce(&mut Locals)) {
        let before = self.locals.load_full();
        let mut locals = Locals::clone(&before);
        change(&mut locals);
        self.locals.store(Arc::new(locals));
        self.verdicts_end(&before);
    }

    fn datapath(&self) -> std::sync::MutexGuard<'_, Datapath> {
        self.datapath.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Captured {
    fn desired(&self) -> CapturedPod {
        let strictness = self.pod.policies.borrow().strictness();
        CapturedPod {
            cookie: self.pod.cookie,
            addrs: self.pod.addrs.clone(),
            outbound_v4: self.outbound_v4,
            outbound_v6: self.outbound_v6,
            dns: self.dns,
            strict: strictness.all,
            port_strict: strictness.ports,
        }
    }

    /// Takes over what the world now says about the pod's policies. A pod that the world does not know any more keeps
    /// its last policies until it is released. Whether they differ from those of before.
    fn refresh(&mut self, world: &World, policies_changed: bool) -> bool {
        let workload = world.workload_by_pod(&self.pod.name).unwrap_or(&self.workload).clone();
        if !policies_changed && Arc::ptr_eq(&workload, &self.workload) {
            return false;
        }
        let set = PolicySet::for_workload(&workload, world.policies());
        let same = set.same(&self.pod.policies.borrow());
        if !same {
            self.pod.policies.send_replace(Arc::new(set));
        }
        self.workload = workload;
        !same
    }
}
