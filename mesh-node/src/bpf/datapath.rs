//! The data path in force.
//!
//! [`Datapath::load`] attaches the cgroup programs, or adopts those of a predecessor; a pod is captured by
//! [`Datapath::apply`] (outbound, from its next connect) and [`Datapath::attach_inbound`]. The order for a new pod: `apply`
//! with the pod in the intent, `set_inbound_listener`, `sync_listeners`, `attach_inbound`. What a predecessor captured
//! stays captured, without a daemon behind it, until the intent names the pod or [`Datapath::let_predecessor_go`] is called.

use super::{
    counters::{self, DirectStat},
    daemons::Daemons,
    error::BpfError,
    events::DenyEvents,
    heartbeat::Heartbeat,
    intent::Intent,
    load::{self, LoadOptions, Loaded, LogPump, map_error},
    lower::{BpfState, lower},
    nameservers::Nameservers,
    ops::{MapOps, Table},
    pins::{self, Pins},
    reconcile::{Reconciler, Report},
    sockmeta::SocketMeta,
    sys,
    verdicts::Verdicts,
};
use crate::pulse::Pulse;
use aya::{
    Ebpf,
    maps::{Map, MapData, PerCpuArray, RingBuf},
};
use mesh_common::{
    ABI_VERSION,
    code::Counter,
    key, map,
    net::{Endpoint, Ip, NetPort},
    pod::Pod as _,
    value,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd},
    path::Path,
    sync::Arc,
};

/// The maps that the reconciler writes.
#[derive(Debug)]
struct KernelMaps {
    maps: [sys::Map; Table::ALL.len()],
    /// Shows that a long run gets on.
    pulse: Pulse,
}

impl MapOps for KernelMaps {
    fn rows(&mut self, table: Table) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        self.pulse.tick();
        rows(&self.maps[table.index()])
    }

    fn put(&mut self, table: Table, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.pulse.tick();
        self.maps[table.index()].update(key, value)
    }

    fn remove(&mut self, table: Table, key: &[u8]) -> io::Result<()> {
        self.pulse.tick();
        self.maps[table.index()].delete(key).map(drop)
    }
}

/// What the kernel holds for pods that a predecessor captured and this daemon has not yet: they must not lose it before
/// it is known what becomes of them.
#[derive(Debug, Default)]
struct Kept {
    pods: BTreeMap<key::Netns, value::Pod>,
    inbound: BTreeMap<Ip, value::Inbound>,
    ports: BTreeMap<Endpoint, value::InboundPort>,
}

impl Kept {
    fn read(maps: &KernelMaps) -> Result<Self, BpfError> {
        fn table<K: mesh_common::pod::Pod + Ord, V: mesh_common::pod::Pod>(
            maps: &KernelMaps,
            table: Table,
        ) -> Result<BTreeMap<K, V>, BpfError> {
            let rows = rows(&maps.maps[table.index()]).map_err(row_error(table.name()))?;
            Ok(rows.iter().filter_map(|(k, v)| Some((K::from_bytes(k)?, V::from_bytes(v)?))).collect())
        }
        Ok(Self {
            pods: table(maps, Table::Pods)?,
            inbound: table(maps, Table::Inbound)?,
            ports: table(maps, Table::InboundPorts)?,
        })
    }

    /// Adds what is kept to the desired state, but for pods that this has itself, and addresses that moved on.
    fn complete(&mut self, state: &mut BpfState) {
        self.pods.retain(|netns, _| !state.pods.contains_key(netns));
        self.inbound.retain(|ip, row| {
            self.pods.contains_key(&key::Netns::new(row.cookie)) && !state.inbound.contains_key(ip)
        });
        self.ports.retain(|endpoint, _| self.inbound.contains_key(&endpoint.addr));
        state.pods.extend(&self.pods);
        state.inbound.extend(&self.inbound);
        state.inbound_ports.extend(&self.ports);
    }
}

/// Every row of a map that nobody else removes rows from.
fn rows(map: &sys::Map) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut rows = Vec::new();
    let mut next = map.next_key(None)?;
    while let Some(key) = next {
        let mut value = vec![0; map.value_size()];
        let found = map.lookup(&key, &mut value)?;
        next = map.next_key(Some(&key))?;
        if found {
            rows.push((key, value));
        }
    }
    Ok(rows)
}

/// The loaded data path. Dropping it leaves the pins, and so the capture, in force; [`Datapath::unload`] ends it.
pub struct Datapath {
    ebpf: Ebpf,
    reconciler: Reconciler<KernelMaps>,
    pins: Pins,
    adopted: bool,
    kept: Kept,
    /// Network namespaces with a pinned inbound link. The links are not held open: the pin alone keeps one.
    inbound_links: BTreeSet<u64>,
    inbound_sockets: sys::Map,
    listeners: sys::Map,
    old_listeners: sys::Map,
    config_map: sys::Map,
    config: value::Config,
    counters: PerCpuArray<MapData, u64>,
    direct_stats: sys::Map,
    sockets: SocketMeta,
    daemons: Daemons,
    nameservers: Nameservers,
    heartbeat: Heartbeat,
    verdicts: Verdicts,
    pulse: Pulse,
    events: Option<DenyEvents>,
    logs: Option<LogPump>,
}

impl Datapath {
    /// Loads, attaches and pins everything, in the place of a dead predecessor's. Needs root's capabilities.
    /// The logger of the programs' lines is the `log` crate's at this moment: set it (tracing's subscriber) before.
    pub fn load(options: &LoadOptions) -> Result<Self, BpfError> {
        Self::with_pins(options, Pins::open(&options.pin_dir)?)
    }

    /// [`Self::load`] beside a running predecessor that has handed its lock of the pins over.
    pub fn succeed(options: &LoadOptions, lock: OwnedFd) -> Result<Self, BpfError> {
        let pins = Pins::inherit(&options.pin_dir, lock)?;
        if let Some(why) = Self::cannot_adopt(&options.pin_dir) {
            return Err(BpfError::NotAdoptable(why));
        }
        Self::with_pins(options, pins)
    }

    /// Why a start would not go on with the maps that are pinned under `pin_dir`.
    pub fn cannot_adopt(pin_dir: &Path) -> Option<String> {
        match Loaded::would_adopt(&pins::current(pin_dir)) {
            Ok(true) => None,
            Ok(false) => Some("there are no pins of this version".to_owned()),
            Err(why) => Some(why),
        }
    }

    fn with_pins(options: &LoadOptions, pins: Pins) -> Result<Self, BpfError> {
        let mut config = value::Config {
            host_netns: options.host_netns_cookie,
            abi_version: ABI_VERSION,
            ..value::Config::zeroed()
        };
        if let Some(pods) = &options.pods_cgroup {
            config.pods_cgroup = load::cgroup_id(pods)?;
            config.pods_level = load::cgroup_level(pods)?;
        }
        let daemon = load::cgroup_id(&options.daemon_cgroup)?;
        let mut loaded = Loaded::new(&pins, &options.disabled)?;
        let pulse = Pulse::default();
        let kernel_maps = KernelMaps { maps: loaded.tables()?, pulse: pulse.clone() };
        let mut others = loaded.others()?;
        // The maps that stay in `others` are the programs' alone: pinned and checked, nothing more.
        let mut other =
            |name| others.remove(name).ok_or(BpfError::Missing { what: "map", name: String::from(name) });
        let config_map = other(map::CONFIG)?;
        let daemons = other(map::DAEMONS)?;
        let heartbeat = Heartbeat::new(Arc::new(other(map::HEARTBEAT)?));
        let verdicts =
            Verdicts::new(other(map::GENERATION)?, other(map::VERDICTS)?, other(map::LOCAL_FLOWS)?);
        let inbound_sockets = other(map::INBOUND_SOCKETS)?;
        let listeners = other(map::LISTENERS)?;
        let old_listeners = other(map::OLD_LISTENERS)?;
        let direct_stats = other(map::DIRECT_STATS)?;
        let orig_dst = other(map::ORIG_DST)?;
        let client = other(map::CLIENT)?;
        let (socket_flow, udp_flows) = (other(map::SOCKET_FLOW)?, Arc::new(other(map::UDP_FLOWS)?));
        let nameservers = Nameservers::new(Arc::new(other(map::NAMESERVERS)?), udp_flows.clone());
        let counters = PerCpuArray::try_from(Map::PerCpuArray(loaded.data(map::COUNTERS)?))
            .map_err(|source| map_error(map::COUNTERS, source))?;
        let events = RingBuf::try_from(Map::RingBuf(loaded.data(map::EVENTS)?))
            .map_err(|source| map_error(map::EVENTS, source))?;
        let logs = loaded.log_pump();
        let adopted = loaded.adopted;
        let kept = if adopted { Kept::read(&kernel_maps)? } else { Kept::default() };
        write_config(&config_map, &config)?;
        let daemons = Daemons::enter(daemons, daemon).map_err(row_error(map::DAEMONS))?;

        let (ebpf, inbound_links) = loaded.attach(options, &pins)?;
        tracing::info!(
            adopted,
            pods = kept.pods.len(),
            inbound = inbound_links.len(),
            "the programs are in force"
        );
        Ok(Self {
            ebpf,
            reconciler: Reconciler::new(kernel_maps),
            pins,
            adopted,
            kept,
            inbound_links,
            inbound_sockets,
            listeners,
            old_listeners,
            config_map,
            config,
            counters,
            direct_stats,
            sockets: SocketMeta::new(Arc::new(orig_dst), Arc::new(client), Arc::new(socket_flow), udp_flows),
            daemons,
            nameservers,
            heartbeat,
            verdicts,
            pulse,
            events: Some(DenyEvents::new(events)),
            logs,
        })
    }

    /// Whether the maps are a predecessor's.
    pub fn adopted(&self) -> bool {
        self.adopted
    }

    /// Ticks with every operation on a map.
    pub fn pulse(&self) -> Pulse {
        self.pulse.clone()
    }

    /// The lock on the pins, for a successor; `None` when it has been handed over.
    pub fn lock(&self) -> Option<BorrowedFd<'_>> {
        self.pins.lock()
    }

    /// Leaves the pins to the successor that was given the lock.
    pub fn let_lock_go(&mut self) {
        self.pins.let_lock_go();
    }

    /// This process's sockets are captured like any other's from now on; for one that has drained after a takeover.
    pub fn leave(&self) -> Result<(), BpfError> {
        self.daemons.leave().map_err(row_error(map::DAEMONS))
    }

    /// Takes back what is believed about the maps and links: somebody else has changed them.
    pub fn forget(&mut self) -> Result<(), BpfError> {
        self.reconciler.maps_mut();
        self.inbound_links =
            self.pins.inbound_pins(&self.pins.current())?.into_iter().map(|(c, _)| c).collect();
        Ok(())
    }

    /// Makes the kernel do what the intent says. On an error the kernel's state is consistent, though between the old
    /// and the new one; the next call repairs it. Pods that leave the intent also lose their inbound part.
    pub fn apply(&mut self, intent: &Intent) -> Result<Report, BpfError> {
        let (mut state, issues) = lower(intent);
        self.kept.complete(&mut state);
        let gone: Vec<u64> = self
            .inbound_links
            .iter()
            .filter(|cookie| !state.pods.contains_key(&key::Netns::new(**cookie)))
            .copied()
            .collect();
        for cookie in gone {
            self.detach_inbound(cookie)?;
        }
        let report = self.reconciler.apply(&state)?;
        let captured = |key: &key::Listener| state.pods.contains_key(&key::Netns::new(key.cookie));
        for (name, map) in [(map::LISTENERS, &self.listeners), (map::OLD_LISTENERS, &self.old_listeners)] {
            remove_listeners(name, map, |key, _| !captured(key))?;
        }
        Ok(Report { issues, ..report })
    }

    /// Captures what arrives in a network namespace, as far as the intent names its addresses.
    pub fn attach_inbound(&mut self, netns: BorrowedFd<'_>, cookie: u64) -> Result<(), BpfError> {
        if self.inbound_links.contains(&cookie) {
            return Ok(());
        }
        load::attach_inbound(&mut self.ebpf, netns, &self.pins.current().join(pins::inbound(cookie)))?;
        self.inbound_links.insert(cookie);
        // The new program selects sockets, which overrules the old one's refusals; from here on it is alone.
        Ok(self.pins.let_go(cookie)?)
    }

    /// Ends the inbound capture of a network namespace; established connections stay. No error if there was none.
    pub fn detach_inbound(&mut self, cookie: u64) -> Result<(), BpfError> {
        if self.inbound_links.remove(&cookie) {
            pins::remove_link(&self.pins.current().join(pins::inbound(cookie)))?;
        }
        Ok(())
    }

    /// Names the socket (listening on port 15006 of `addr`) that plaintext to the pod's address is steered to. The
    /// kernel forgets it when the socket closes.
    pub fn set_inbound_listener(&mut self, addr: IpAddr, listener: BorrowedFd<'_>) -> Result<(), BpfError> {
        let fd = listener.as_raw_fd().unsigned_abs();
        self.inbound_sockets
            .update(Ip::from(addr).bytes(), fd.bytes())
            .map_err(row_error(map::INBOUND_SOCKETS))
    }

    /// Tells the kernel which addresses the sockets of a pod listen on, for those that are older than the capture (it
    /// sees newer ones itself). `listening` is the whole list; to be called once after the pod's first
    /// [`Datapath::apply`] and then every few seconds, since the end of an old listener is not seen otherwise.
    pub fn sync_listeners(&mut self, cookie: u64, listening: &[SocketAddr]) -> Result<(), BpfError> {
        let listening: BTreeSet<key::Listener> = listening
            .iter()
            .map(|addr| key::Listener::new(cookie, addr.ip().into(), NetPort::new(addr.port())))
            .collect();
        // Ports that came and went leave a row with count 0.
        remove_listeners(map::LISTENERS, &self.listeners, |key, row| {
            key.cookie == cookie && row.count == 0 && !listening.contains(key)
        })?;
        remove_listeners(map::OLD_LISTENERS, &self.old_listeners, |key, _| {
            key.cookie == cookie && !listening.contains(key)
        })?;
        for key in listening {
            let mut count = [0; size_of::<value::Listener>()];
            let known = self.listeners.lookup(key.bytes(), &mut count).map_err(row_error(map::LISTENERS))?
                && value::Listener::from_bytes(&count).is_some_and(|row| row.count > 0);
            let old = &self.old_listeners;
            if known {
                old.delete(key.bytes()).map_err(row_error(map::OLD_LISTENERS))?;
            } else {
                let row = value::Listener { count: 1 };
                old.update(key.bytes(), row.bytes()).map_err(row_error(map::OLD_LISTENERS))?;
            }
        }
        Ok(())
    }

    /// Access to single sockets, for the threads that carry connections.
    pub fn sockets(&self) -> SocketMeta {
        self.sockets.clone()
    }

    /// Access to the nameservers that pods meant.
    pub fn nameservers(&self) -> Nameservers {
        self.nameservers.clone()
    }

    /// Access to the heartbeat, for the thread that keeps it up: while there is none, nothing goes to the daemon.
    pub fn heartbeat(&self) -> Heartbeat {
        self.heartbeat.clone()
    }

    /// Tells the programs that the daemon serves now; to be repeated well within `decide::HEARTBEAT_TTL_NS`.
    pub fn beat(&self) -> io::Result<()> {
        self.heartbeat.beat()
    }

    /// Tells the programs that the daemon does not serve any more.
    pub fn end_beat(&self) -> io::Result<()> {
        self.heartbeat.end()
    }

    /// Access to the verdict cache of the same-node fast path.
    pub fn verdicts(&self) -> Verdicts {
        self.verdicts.clone()
    }

    /// The outcomes since the programs were loaded, summed over the CPUs.
    pub fn counters(&self) -> Result<Vec<(Counter, u64)>, BpfError> {
        counters::counters(&self.counters).map_err(|source| map_error(map::COUNTERS, source))
    }

    /// The statistics of direct connections since the programs were loaded.
    pub fn direct_stats(&self) -> Result<Vec<DirectStat>, BpfError> {
        counters::direct_stats(&self.direct_stats).map_err(row_error(map::DIRECT_STATS))
    }

    /// Removes rows of the statistics to which nothing is added any more, so that the table does not fill with pods that
    /// are gone. `counted` is what [`Datapath::direct_stats`] gave and the caller has counted. Returns how many.
    pub fn forget_direct_stats(&self, counted: &[DirectStat]) -> Result<usize, BpfError> {
        let pods = &self.reconciler.maps().maps[Table::Pods.index()];
        let is_captured = |cookie| {
            let mut row = [0; size_of::<value::Pod>()];
            pods.lookup(key::Netns::new(cookie).bytes(), &mut row)
        };
        counters::forget(&self.direct_stats, counted, is_captured).map_err(row_error(map::DIRECT_STATS))
    }

    /// The reading end of the denials; `None` after the first call.
    pub fn take_events(&mut self) -> Option<DenyEvents> {
        self.events.take()
    }

    /// The forwarder of the programs' log lines, to be spawned; `None` after the first call.
    pub fn take_logs(&mut self) -> Option<LogPump> {
        self.logs.take()
    }

    /// Changes the level of the programs' log lines at run time: a `mesh_common::code::log_level`.
    pub fn set_log_level(&mut self, level: u32) -> Result<(), BpfError> {
        self.config.log_level = level;
        write_config(&self.config_map, &self.config)
    }

    /// Lets go what a predecessor captured and this daemon did not; whether there was anything. To be called once every
    /// pod of the node was looked at: those that are in the mesh are captured anew by then, the others do not belong to
    /// it any more. The next [`apply`](Self::apply) removes their rows.
    pub fn let_predecessor_go(&mut self) -> Result<bool, BpfError> {
        let kept = !std::mem::take(&mut self.kept).pods.is_empty();
        Ok(self.pins.let_all_go()? || kept)
    }

    /// How many rows each mirrored map has, read from the kernel, and how many it may have.
    pub fn tables(&mut self) -> Result<Vec<(Table, usize, usize)>, BpfError> {
        let maps = self.reconciler.maps_mut();
        let read = |table: Table| {
            let rows = maps.rows(table).map_err(row_error(table.name()))?;
            Ok((table, rows.len(), table.capacity()))
        };
        Table::ALL.into_iter().map(read).collect()
    }

    /// Ends the capture: detaches everything and removes the pins.
    pub fn unload(&mut self) -> Result<(), BpfError> {
        self.detach_all_inbound()?;
        Ok(self.pins.clear()?)
    }

    fn detach_all_inbound(&mut self) -> Result<(), BpfError> {
        let cookies: Vec<u64> = self.inbound_links.iter().copied().collect();
        cookies.into_iter().try_for_each(|cookie| self.detach_inbound(cookie))
    }
}

fn write_config(map: &sys::Map, config: &value::Config) -> Result<(), BpfError> {
    map.update(0_u32.bytes(), config.bytes()).map_err(row_error(map::CONFIG))
}

/// Removes the listener rows that `is_stale` picks.
fn remove_listeners(
    name: &'static str,
    map: &sys::Map,
    is_stale: impl Fn(&key::Listener, &value::Listener) -> bool,
) -> Result<(), BpfError> {
    for (raw, row) in rows(map).map_err(row_error(name))? {
        if let (Some(key), Some(row)) = (key::Listener::from_bytes(&raw), value::Listener::from_bytes(&row))
            && is_stale(&key, &row)
        {
            map.delete(&raw).map_err(row_error(name))?;
        }
    }
    Ok(())
}

fn row_error(name: &'static str) -> impl Fn(io::Error) -> BpfError {
    move |source| BpfError::Row { name, source }
}
