//! The verdict cache of the same-node fast path, and the live connections that it let through.
//!
//! A verdict lets one client pod go straight to one port of a pod of this node. It holds in the generation that it was
//! given in; [`Verdicts::bump`] begins the next one, which ends all verdicts with a single write: for new connects, and
//! for SYNs that are on their way. Connections that are established are listed by [`Verdicts::flows`]; ending those that
//! a change forbids is the caller's. Deliberately absent: the policy that says yes.

use super::sys::Map;
use mesh_common::{key, map, pod::Pod, value};
use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

/// Access to the verdict cache; cheap to clone and usable from every thread.
#[derive(Clone, Debug)]
pub struct Verdicts {
    generation: Arc<Map>,
    /// Held while a generation follows another.
    bumping: Arc<Mutex<()>>,
    verdicts: Arc<Map>,
    flows: Arc<Map>,
}

/// A live connection from pod to pod of this node without the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalFlow {
    /// The client pod's side.
    pub client: SocketAddr,
    /// The server pod's side.
    pub server: SocketAddr,
    /// What the client dialled: a service, or the same as `server`.
    pub dialled: SocketAddr,
    /// The client pod, by its network namespace's cookie.
    pub cookie: u64,
    /// The generation of its verdict.
    pub generation: u64,
    /// When it was dialled, by the monotonic clock, in nanoseconds.
    pub opened_ns: u64,
}

impl Verdicts {
    pub(super) fn new(generation: Map, verdicts: Map, flows: Map) -> Self {
        Self {
            generation: Arc::new(generation),
            bumping: Arc::default(),
            verdicts: Arc::new(verdicts),
            flows: Arc::new(flows),
        }
    }

    /// The generation in force.
    pub fn generation(&self) -> io::Result<u64> {
        Ok(read::<value::Generation>(&self.generation, 0_u32.bytes())?.map_or(0, |row| row.number))
    }

    /// Lets the pod `cookie` go straight to `dst`, a port of a pod of this node. `generation` is the one that was in
    /// force before the policy was asked: if it has ended since, the verdict has no effect.
    pub fn allow(&self, cookie: u64, dst: SocketAddr, generation: u64) -> io::Result<()> {
        let key = key::Verdict::new(cookie, dst.into());
        self.verdicts.update(key.bytes(), value::Verdict { generation }.bytes())
    }

    /// Takes one verdict back.
    pub fn deny(&self, cookie: u64, dst: SocketAddr) -> io::Result<()> {
        self.verdicts.delete(key::Verdict::new(cookie, dst.into()).bytes()).map(drop)
    }

    /// Ends all verdicts. Returns the new generation.
    pub fn bump(&self) -> io::Result<u64> {
        let _alone = self.bumping.lock().unwrap_or_else(PoisonError::into_inner);
        let number = self.generation()?.wrapping_add(1);
        self.generation.update(0_u32.bytes(), value::Generation { number }.bytes())?;
        Ok(number)
    }

    /// Every live connection that a verdict let through, of all generations. One that comes or goes meanwhile may or may
    /// not be among them: a list that must not miss any is read after [`bump`](Self::bump).
    pub fn flows(&self) -> io::Result<Vec<LocalFlow>> {
        let mut flows = Vec::new();
        let mut next = self.flows.next_key(None)?;
        // The bound ends a walk that the kernel restarts over and over because of concurrent deletions.
        for _ in 0..2 * map::entries::LOCAL_FLOWS {
            let Some(raw) = next else { break };
            if let Some(key) = key::Probe::from_bytes(&raw)
                && let Some(flow) = self.get(&key)?
            {
                flows.push(flow);
            }
            next = self.flows.next_key(Some(&raw))?;
        }
        // A walk that began anew has seen some twice.
        flows.sort_unstable_by_key(|flow| (flow.client, flow.server));
        flows.dedup();
        Ok(flows)
    }

    /// The connection between these two ends, if it is one that a verdict let through, of whatever generation. Its
    /// client is beyond doubt, also where its SYN was steered to the daemon since the generation had ended.
    pub fn flow(&self, client: SocketAddr, server: SocketAddr) -> io::Result<Option<LocalFlow>> {
        self.get(&key::Probe::new(client.into(), server.into()))
    }

    /// Removes a connection whose socket is gone without the kernel having said so. Not one that took its place.
    pub fn forget(&self, flow: &LocalFlow) -> io::Result<()> {
        let key = key::Probe::new(flow.client.into(), flow.server.into());
        if self.get(&key)?.is_some_and(|now| now.opened_ns == flow.opened_ns) {
            self.flows.delete(key.bytes())?;
        }
        Ok(())
    }

    fn get(&self, key: &key::Probe) -> io::Result<Option<LocalFlow>> {
        Ok(read::<value::LocalFlow>(&self.flows, key.bytes())?.map(|row| LocalFlow {
            client: key.source.into(),
            server: key.destination.into(),
            dialled: row.original.into(),
            cookie: row.cookie,
            generation: row.generation,
            opened_ns: row.opened_ns,
        }))
    }
}

fn read<V: Pod>(map: &Map, key: &[u8]) -> io::Result<Option<V>> {
    let mut value = vec![0; map.value_size()];
    Ok(if map.lookup(key, &mut value)? { V::from_bytes(&value) } else { None })
}
