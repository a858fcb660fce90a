//! What one pod may take of its node: connections, descriptors, tunnels, half-open handshakes, buffered bytes.
//!
//! Every bound is per pod, so that a storm is the storming pod's own problem. Descriptors are the one thing that all
//! pods share; a pod gets another one only while what it holds is at most [`SHARE`] times what is still free, so that
//! however many pods take all they can, a newcomer finds some. Reaching a bound is counted by its name.
//!
//! What waits is left in the kernel's accept queue, where it costs the pod's own memory and not ours. Deliberately
//! absent: CPU (`fair`), flow-control windows (`hbone`), and rates: a bound on what is held at a time needs no clock.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::sync::Notify;

/// Descriptors that a pod may hold for each one that is free.
const SHARE: usize = 4;

/// Connections of a pod that are being set up (accepted, and not joined to the other side yet); more wait unaccepted.
pub const MAX_SETTING_UP: usize = 1024;

/// HBONE connections to a pod, with any number of streams.
pub const MAX_TUNNELS: usize = 1024;

/// TLS handshakes of one pod at a time.
pub const MAX_HANDSHAKES: usize = 512;

/// TLS handshakes of all pods at a time. Each takes some 20 KiB.
pub const MAX_HANDSHAKES_OF_NODE: usize = 4096;

/// A pod may always have this many, whatever the others do.
const HANDSHAKES_RESERVED: usize = 16;

/// A handshake that has had this long gives way when there is no room for a new one. An honest peer needs milliseconds.
const HANDSHAKE_GRACE: Duration = Duration::from_millis(250);

/// Payload that the connections of one pod may hold in our memory because a reader does not take it, in bytes.
pub const MAX_BUFFERED: usize = 128 << 20;

/// What one connection may hold even then, in bytes: traffic that moves always holds a little.
const BUFFERED_FREE: usize = 64 << 10;

/// Something that is bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Limit {
    /// Connections of a pod, in both directions: more are refused.
    Connections,
    /// Descriptors of this process: connections are refused.
    Descriptors,
    /// HBONE connections to a pod: more are refused.
    Tunnels,
    /// Half-open handshakes: old ones are ended.
    Handshakes,
    /// Connections being set up: more wait in the accept queue.
    SettingUp,
    /// Bytes held for readers that do not read: their connections are reset.
    Buffered,
    /// HBONE connections without streams: ended after a while.
    IdleTunnels,
}

impl Limit {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Connections,
        Self::Descriptors,
        Self::Tunnels,
        Self::Handshakes,
        Self::SettingUp,
        Self::Buffered,
        Self::IdleTunnels,
    ];

    /// A stable word for metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Descriptors => "descriptors",
            Self::Tunnels => "tunnels",
            Self::Handshakes => "handshakes",
            Self::SettingUp => "setting_up",
            Self::Buffered => "buffered_bytes",
            Self::IdleTunnels => "idle_tunnels",
        }
    }
}

/// What all pods share.
#[derive(Debug)]
pub struct NodeLimits {
    connections_per_pod: usize,
    descriptors: usize,
    held: AtomicUsize,
    handshakes: AtomicUsize,
    hits: [AtomicU64; Limit::ALL.len()],
}

impl NodeLimits {
    /// `process` is what the kernel lets this process open; a part of it is kept for everything but connections.
    pub fn new(connections_per_pod: usize, process: u64) -> Self {
        let process = usize::try_from(process).unwrap_or(usize::MAX);
        let reserve = (process / 8).max(256);
        Self {
            connections_per_pod,
            descriptors: process.saturating_sub(reserve),
            held: AtomicUsize::new(0),
            handshakes: AtomicUsize::new(0),
            hits: Default::default(),
        }
    }

    /// Descriptors that connections hold, and how many they may hold together.
    pub fn descriptors(&self) -> (usize, usize) {
        (self.held.load(Relaxed), self.descriptors)
    }

    /// Connections that one pod may have.
    pub fn connections_per_pod(&self) -> usize {
        self.connections_per_pod
    }

    /// Handshakes that are under way, all pods together.
    pub fn handshakes(&self) -> usize {
        self.handshakes.load(Relaxed)
    }

    /// How often each bound was reached.
    pub fn hits(&self) -> impl Iterator<Item = (Limit, u64)> {
        Limit::ALL.into_iter().map(|limit| (limit, self.hits[limit as usize].load(Relaxed)))
    }

    fn hit(&self, limit: Limit) {
        self.hits[limit as usize].fetch_add(1, Relaxed);
    }
}

/// A pod's part.
#[derive(Debug)]
pub struct PodLimits {
    node: Arc<NodeLimits>,
    connections: AtomicUsize,
    descriptors: AtomicUsize,
    tunnels: AtomicUsize,
    setting_up: AtomicUsize,
    /// Told when there is room to accept again.
    room: Notify,
    buffered: AtomicUsize,
    handshakes: Mutex<Handshakes>,
}

#[derive(Debug, Default)]
struct Handshakes {
    /// Oldest first, so ordered by number too.
    open: VecDeque<(u64, Instant, Arc<Notify>)>,
    next: u64,
}

impl PodLimits {
    /// Nothing held yet.
    pub fn new(node: Arc<NodeLimits>) -> Self {
        Self {
            node,
            connections: AtomicUsize::new(0),
            descriptors: AtomicUsize::new(0),
            tunnels: AtomicUsize::new(0),
            setting_up: AtomicUsize::new(0),
            room: Notify::new(),
            buffered: AtomicUsize::new(0),
            handshakes: Mutex::default(),
        }
    }

    /// What it holds of each thing that is bounded.
    pub fn current(&self) -> [(Limit, usize); 6] {
        [
            (Limit::Connections, self.connections()),
            (Limit::Descriptors, self.descriptors.load(Relaxed)),
            (Limit::Tunnels, self.tunnels.load(Relaxed)),
            (Limit::Handshakes, self.handshakes().open.len()),
            (Limit::SettingUp, self.setting_up.load(Relaxed)),
            (Limit::Buffered, self.buffered.load(Relaxed)),
        ]
    }

    /// Live connections, both directions.
    pub fn connections(&self) -> usize {
        self.connections.load(Relaxed)
    }

    /// Notes that a bound was reached.
    pub fn hit(&self, limit: Limit) {
        self.node.hit(limit);
    }

    /// Takes a place for one more connection with `descriptors` sockets of its own.
    pub fn slot(self: &Arc<Self>, descriptors: usize) -> Result<Slot, Limit> {
        let mut slot = Slot { limits: self.clone(), descriptors: 0 };
        if self.connections.fetch_add(1, Relaxed) >= self.node.connections_per_pod {
            self.hit(Limit::Connections);
            return Err(Limit::Connections);
        }
        slot.more(descriptors)?;
        Ok(slot)
    }

    /// Takes a place for one more HBONE connection.
    pub fn tunnel(self: &Arc<Self>) -> Result<Tunnel, Limit> {
        let taken = self.tunnels.fetch_add(1, Relaxed);
        let tunnel = Tunnel(self.clone());
        if taken >= MAX_TUNNELS {
            self.hit(Limit::Tunnels);
            return Err(Limit::Tunnels);
        }
        Ok(tunnel)
    }

    /// Whether HBONE connections that carry nothing should make room.
    pub fn crowded(&self) -> bool {
        self.tunnels.load(Relaxed) > MAX_TUNNELS / 2
    }

    /// Waits until another connection may be accepted for setting up.
    pub async fn may_set_up(&self) {
        let mut counted = false;
        loop {
            // Made before the look, so that room which is made right after it is not missed.
            let room = self.room.notified();
            if self.setting_up.load(Relaxed) < MAX_SETTING_UP {
                return;
            }
            if !std::mem::replace(&mut counted, true) {
                self.hit(Limit::SettingUp);
            }
            room.await;
        }
    }

    /// Counts a connection as being set up.
    pub fn set_up(self: &Arc<Self>) -> SettingUp {
        self.setting_up.fetch_add(1, Relaxed);
        SettingUp(self.clone())
    }

    /// Waits until another handshake may begin: there is room, or one that is too old to be honest makes it.
    pub async fn may_shake_hands(&self) {
        loop {
            let oldest = {
                let handshakes = self.handshakes();
                if !self.full(&handshakes) {
                    return;
                }
                handshakes.open.front().map(|(_, since, _)| *since)
            };
            let age = oldest.map_or(HANDSHAKE_GRACE, |since| since.elapsed());
            if age >= HANDSHAKE_GRACE {
                return;
            }
            tokio::time::sleep((HANDSHAKE_GRACE - age).min(Duration::from_millis(10))).await;
        }
    }

    /// Counts a handshake; the oldest one is told to end if there is no room.
    pub fn handshake(self: &Arc<Self>) -> Handshake {
        let evicted = Arc::new(Notify::new());
        let mut handshakes = self.handshakes();
        if self.full(&handshakes)
            && let Some((_, _, oldest)) = handshakes.open.pop_front()
        {
            self.node.handshakes.fetch_sub(1, Relaxed);
            oldest.notify_one();
            self.hit(Limit::Handshakes);
        }
        let id = handshakes.next;
        handshakes.next += 1;
        handshakes.open.push_back((id, Instant::now(), evicted.clone()));
        self.node.handshakes.fetch_add(1, Relaxed);
        drop(handshakes);
        self.hold(1);
        Handshake { limits: self.clone(), id, evicted }
    }

    fn full(&self, handshakes: &Handshakes) -> bool {
        let own = handshakes.open.len();
        own >= MAX_HANDSHAKES
            || (own >= HANDSHAKES_RESERVED && self.node.handshakes() >= MAX_HANDSHAKES_OF_NODE)
    }

    fn handshakes(&self) -> MutexGuard<'_, Handshakes> {
        self.handshakes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Books `n` more descriptors without asking.
    fn hold(&self, n: usize) {
        self.descriptors.fetch_add(n, Relaxed);
        self.node.held.fetch_add(n, Relaxed);
    }

    fn release(&self, n: usize) {
        self.descriptors.fetch_sub(n, Relaxed);
        self.node.held.fetch_sub(n, Relaxed);
    }
}

/// A place among a pod's connections, given back when dropped.
#[derive(Debug)]
pub struct Slot {
    limits: Arc<PodLimits>,
    descriptors: usize,
}

impl Slot {
    /// Takes more descriptors for the same connection.
    pub fn more(&mut self, n: usize) -> Result<(), Limit> {
        let (node, pod) = (&self.limits.node, &self.limits);
        let own = pod.descriptors.load(Relaxed) + n;
        let free = node.descriptors.saturating_sub(node.held.load(Relaxed));
        if own > free.saturating_mul(SHARE) {
            pod.hit(Limit::Descriptors);
            return Err(Limit::Descriptors);
        }
        pod.hold(n);
        self.descriptors += n;
        Ok(())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.limits.connections.fetch_sub(1, Relaxed);
        self.limits.release(self.descriptors);
    }
}

/// A place among the HBONE connections to a pod.
#[derive(Debug)]
pub struct Tunnel(Arc<PodLimits>);

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.0.tunnels.fetch_sub(1, Relaxed);
    }
}

/// A connection that is being set up.
#[derive(Debug)]
pub struct SettingUp(Arc<PodLimits>);

impl Drop for SettingUp {
    fn drop(&mut self) {
        if self.0.setting_up.fetch_sub(1, Relaxed) >= MAX_SETTING_UP {
            self.0.room.notify_waiters();
        }
    }
}

/// A handshake under way. It holds a descriptor, which the connection keeps for as long as this lives.
#[derive(Debug)]
pub struct Handshake {
    limits: Arc<PodLimits>,
    id: u64,
    evicted: Arc<Notify>,
}

impl Handshake {
    /// Resolves when it has to give way.
    pub async fn evicted(&self) {
        self.evicted.notified().await;
    }

    /// It has ended well: only the descriptor is held from here on.
    pub fn done(&self) {
        let mut handshakes = self.limits.handshakes();
        if let Ok(at) = handshakes.open.binary_search_by_key(&self.id, |(id, _, _)| *id) {
            handshakes.open.remove(at);
            self.limits.node.handshakes.fetch_sub(1, Relaxed);
        }
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.done();
        self.limits.release(1);
    }
}

/// What one connection holds for a slow reader, as a part of its pod's sum.
#[derive(Debug, Default)]
pub struct Buffered {
    limits: Option<Arc<PodLimits>>,
    held: usize,
}

impl Buffered {
    /// Counts with `limits`.
    pub fn of(limits: &Arc<PodLimits>) -> Self {
        Self { limits: Some(limits.clone()), held: 0 }
    }

    /// Says what is held now. False when that is more than the pod may hold: the connection has to go.
    #[must_use]
    pub fn set(&mut self, held: usize) -> bool {
        let before = std::mem::replace(&mut self.held, held);
        let Some(limits) = self.limits.as_ref().filter(|_| held != before) else { return true };
        if held < before {
            limits.buffered.fetch_sub(before - held, Relaxed);
            return true;
        }
        let sum = limits.buffered.fetch_add(held - before, Relaxed) + held - before;
        let good = sum <= MAX_BUFFERED || held <= BUFFERED_FREE;
        if !good {
            limits.hit(Limit::Buffered);
        }
        good
    }
}

impl Drop for Buffered {
    fn drop(&mut self) {
        let _ = self.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(node: &Arc<NodeLimits>) -> Arc<PodLimits> {
        Arc::new(PodLimits::new(node.clone()))
    }

    fn hits(node: &NodeLimits, limit: Limit) -> u64 {
        node.hits().find(|(l, _)| *l == limit).unwrap().1
    }

    #[test]
    fn a_pod_has_as_many_connections_as_it_may_and_places_come_back() {
        let node = Arc::new(NodeLimits::new(3, 1 << 20));
        let (greedy, other) = (pod(&node), pod(&node));
        let mut slots: Vec<_> = (0..3).map(|_| greedy.slot(1).unwrap()).collect();
        assert_eq!(greedy.slot(1).unwrap_err(), Limit::Connections);
        assert_eq!((greedy.connections(), hits(&node, Limit::Connections)), (3, 1));
        assert!(other.slot(1).is_ok(), "another pod is not concerned");
        slots.pop();
        assert!(greedy.slot(1).is_ok());
        slots.clear();
        assert_eq!((greedy.connections(), node.descriptors().0), (0, 0));
    }

    #[test]
    fn however_many_pods_take_all_descriptors_that_they_can_a_newcomer_finds_some() {
        let node = Arc::new(NodeLimits::new(usize::MAX, 20_000));
        let (_, all) = node.descriptors();
        let mut slots = vec![];
        for greedy in 1..=4 {
            let pod = pod(&node);
            while let Ok(slot) = pod.slot(2) {
                slots.push(slot);
            }
            let free = all - node.descriptors().0;
            let own = pod.descriptors.load(Relaxed);
            assert!(own > 0 && own >= (free - 2) * SHARE, "pod {greedy} has {own}, {free} are free");
            assert!(free > 0);
        }
        let newcomer = pod(&node);
        assert!(newcomer.slot(2).is_ok());
        assert_eq!(hits(&node, Limit::Descriptors), 4);
        drop(slots);
        assert_eq!(node.descriptors().0, 0);
    }

    #[tokio::test]
    async fn an_old_handshake_gives_way_and_a_young_one_is_waited_for() {
        let node = Arc::new(NodeLimits::new(10, 1 << 20));
        let pod = pod(&node);
        let mut open: Vec<_> = (0..MAX_HANDSHAKES).map(|_| pod.handshake()).collect();
        let wait = tokio::time::timeout(Duration::from_millis(5), pod.may_shake_hands());
        assert!(wait.await.is_err(), "all of them are young");
        // One that ends makes room.
        open.pop();
        pod.may_shake_hands().await;
        open.push(pod.handshake());
        assert_eq!(hits(&node, Limit::Handshakes), 0);
        // The clock of the entries is the real one.
        std::thread::sleep(HANDSHAKE_GRACE);
        pod.may_shake_hands().await;
        let newest = pod.handshake();
        open[0].evicted().await;
        let others = tokio::time::timeout(Duration::from_millis(1), open[1].evicted());
        assert!(others.await.is_err(), "only the oldest gives way");
        assert_eq!((hits(&node, Limit::Handshakes), node.handshakes()), (1, MAX_HANDSHAKES));
        newest.done();
        assert_eq!(node.handshakes(), MAX_HANDSHAKES - 1);
        assert_eq!(node.descriptors().0, MAX_HANDSHAKES + 1, "until its socket is closed");
        drop((open, newest));
        assert_eq!((node.handshakes(), node.descriptors().0), (0, 0));
    }

    #[tokio::test]
    async fn a_storm_waits_in_the_accept_queue_until_there_is_room() {
        let node = Arc::new(NodeLimits::new(10, 1 << 20));
        let pod = pod(&node);
        let mut places: Vec<_> = (0..MAX_SETTING_UP).map(|_| pod.set_up()).collect();
        let waiting = tokio::spawn({
            let pod = pod.clone();
            async move { pod.may_set_up().await }
        });
        while hits(&node, Limit::SettingUp) == 0 {
            tokio::task::yield_now().await;
        }
        assert!(!waiting.is_finished());
        places.pop();
        tokio::time::timeout(Duration::from_secs(5), waiting).await.expect("room was made").unwrap();
    }

    #[test]
    fn readers_that_do_not_read_lose_their_connections_when_the_pod_holds_too_much() {
        let node = Arc::new(NodeLimits::new(10, 1 << 20));
        let pod = pod(&node);
        let (mut big, mut small) = (Buffered::of(&pod), Buffered::of(&pod));
        assert!(big.set(MAX_BUFFERED));
        assert!(small.set(BUFFERED_FREE), "what moves may always hold a little");
        assert!(!small.set(BUFFERED_FREE + 1));
        assert!(big.set(MAX_BUFFERED / 2), "less is always good");
        assert_eq!(hits(&node, Limit::Buffered), 1);
        drop((big, small));
        assert_eq!(pod.buffered.load(Relaxed), 0);
    }
}
