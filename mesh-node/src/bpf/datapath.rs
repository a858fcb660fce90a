//! The loaded programs and their maps.
//!
//! [`Datapath::load`] attaches the cgroup programs; a pod is captured by [`Datapath::apply`] (outbound, from its
//! next connect) and [`Datapath::attach_inbound`]. The order for a new pod: `apply` with the pod in the intent,
//! `set_inbound_listener`, `sync_listeners`, `attach_inbound`. Deliberately absent: taking over
//! a predecessor's programs.

use super::{
    counters::{self, DirectStat},
    error::BpfError,
    events::DenyEvents,
    heartbeat::Heartbeat,
    intent::{CapturedPod, Intent},
    lower::lower,
    ops::{MapOps, Table},
    pins::{self, Pins},
    reconcile::{Reconciler, Report},
    sockmeta::SocketMeta,
    sys,
    verdicts::Verdicts,
};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapData, MapError, PerCpuArray, RingBuf},
    programs::{
        CgroupAttachMode, CgroupSockAddr, ProgramError, SkLookup, SockOps,
        links::{FdLink, LinkError, PinnedLink},
    },
};
use mesh_common::{
    ABI_VERSION,
    code::Counter,
    key, map,
    net::{Endpoint, Ip, NetPort},
    pod::Pod as _,
    value,
};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    os::{
        fd::{AsRawFd as _, BorrowedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
};

/// The object that the build script made.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-ebpf.o"));

/// The cgroup programs by their symbols; each name is also the name of its link's pin.
const SOCK_ADDR_PROGRAMS: [&str; 8] =
    ["connect4", "connect6", "sendmsg4", "sendmsg6", "recvmsg4", "recvmsg6", "getpeername4", "getpeername6"];

const SOCK_OPS_PROGRAM: &str = "sock_ops";
const SK_LOOKUP_PROGRAM: &str = "inbound";

/// The inode number of the root of a cgroup2 hierarchy (`kernel/cgroup/cgroup.c`).
const CGROUP_ROOT_INODE: u64 = 1;

/// Key and value sizes of the maps that are handled as bytes and are not the reconciler's.
const MAPS: [(&str, usize, usize); 18] = [
    (map::CONFIG, size_of::<u32>(), size_of::<value::Config>()),
    (map::HEARTBEAT, size_of::<u32>(), size_of::<value::Heartbeat>()),
    (map::GENERATION, size_of::<u32>(), size_of::<value::Generation>()),
    (map::VERDICTS, size_of::<key::Verdict>(), size_of::<value::Verdict>()),
    (map::LOCAL_FLOWS, size_of::<key::Probe>(), size_of::<value::LocalFlow>()),
    (map::AFFINITY, size_of::<key::Affinity>(), size_of::<value::Affinity>()),
    (map::SOCKET_FLOW, size_of::<u32>(), size_of::<value::SocketFlow>()),
    (map::ORIG_DST, size_of::<u32>(), size_of::<value::OriginalDst>()),
    (map::CLIENT, size_of::<u32>(), size_of::<Endpoint>()),
    (map::ORIG_DST_FLOWS, size_of::<key::Flow>(), size_of::<value::OriginalDst>()),
    (map::CLIENT_FLOWS, size_of::<key::Flow>(), size_of::<Endpoint>()),
    (map::PROBE_FLOWS, size_of::<key::Probe>(), size_of::<value::Probe>()),
    (map::INBOUND_SOCKETS, size_of::<Ip>(), size_of::<u32>()),
    (map::LISTENERS, size_of::<key::Listener>(), size_of::<value::Listener>()),
    (map::OLD_LISTENERS, size_of::<key::Listener>(), size_of::<value::Listener>()),
    (map::UDP_FLOWS, size_of::<key::Udp>(), size_of::<Endpoint>()),
    (map::UDP_STICKY, size_of::<key::Udp>(), size_of::<Endpoint>()),
    (map::DIRECT_STATS, size_of::<key::Direct>(), size_of::<value::Direct>()),
];

/// Where the programs are attached and whom they spare.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// The cgroup (v2) whose processes are captured: the root, or a subtree.
    pub cgroup_root: PathBuf,
    /// Folder for the pins, on a bpffs; one is mounted at its parent if there is none.
    pub pin_dir: PathBuf,
    /// The daemon's own cgroup, under `cgroup_root`; its sockets are never captured.
    pub daemon_cgroup: PathBuf,
    /// The cgroup above all pods (for example `kubepods.slice`). Host processes outside it are probes; without it no
    /// connection is exempted as a probe.
    pub pods_cgroup: Option<PathBuf>,
    /// Cookie of the network namespace that probes come from.
    pub host_netns_cookie: u64,
}

/// The maps that the reconciler writes.
#[derive(Debug)]
struct KernelMaps([sys::Map; Table::ALL.len()]);

impl MapOps for KernelMaps {
    fn rows(&mut self, table: Table) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        rows(&self.0[table.index()])
    }

    fn put(&mut self, table: Table, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.0[table.index()].update(key, value)
    }

    fn remove(&mut self, table: Table, key: &[u8]) -> io::Result<()> {
        self.0[table.index()].delete(key).map(drop)
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

/// A future that forwards the programs' log lines to `log`'s logger until it is dropped.
pub type LogPump = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// The loaded data path. Dropping it leaves the pins, and so the capture, in force; [`Datapath::unload`] ends it.
pub struct Datapath {
    ebpf: Ebpf,
    reconciler: Reconciler<KernelMaps>,
    pins: Pins,
    inbound_links: BTreeMap<u64, PinnedLink>,
    inbound_sockets: sys::Map,
    listeners: sys::Map,
    old_listeners: sys::Map,
    config_map: sys::Map,
    config: value::Config,
    counters: PerCpuArray<MapData, u64>,
    direct_stats: sys::Map,
    sockets: SocketMeta,
    heartbeat: Heartbeat,
    verdicts: Verdicts,
    events: Option<DenyEvents>,
    logs: Option<LogPump>,
}

impl Datapath {
    /// Loads, attaches and pins everything, then removes the pins of a dead predecessor. Needs root's capabilities.
    /// The logger of the programs' lines is the `log` crate's at this moment: set it (tracing's subscriber) before.
    pub fn load(options: &LoadOptions) -> Result<Self, BpfError> {
        let mut config = value::Config {
            daemon_cgroup: cgroup_id(&options.daemon_cgroup)?,
            host_netns: options.host_netns_cookie,
            abi_version: ABI_VERSION,
            ..value::Config::zeroed()
        };
        if let Some(pods) = &options.pods_cgroup {
            config.pods_cgroup = cgroup_id(pods)?;
            config.pods_level = cgroup_level(pods)?;
        }
        let root = File::open(&options.cgroup_root)
            .map_err(|source| BpfError::Cgroup { path: options.cgroup_root.clone(), source })?;
        let pins = Pins::open(&options.pin_dir)?;
        let staging = pins.stage()?;
        let mut ebpf = EbpfLoader::new().load(OBJECT).map_err(|error| BpfError::Load(Box::new(error)))?;

        // Before the maps are taken out: a program is loaded with the descriptors of those it uses.
        load_programs(&mut ebpf)?;
        let mut maps = Maps { ebpf: &mut ebpf, staging: &staging };
        let kernel_maps = KernelMaps(maps.tables()?);
        let mut others = BTreeMap::new();
        for (name, key, value) in MAPS {
            others.insert(name, maps.bytes(name, key, value)?);
        }
        // The maps that stay in `others` are the programs' alone: pinned and checked, nothing more.
        let mut other =
            |name| others.remove(name).ok_or(BpfError::Missing { what: "map", name: String::from(name) });
        let config_map = other(map::CONFIG)?;
        let inbound_sockets = other(map::INBOUND_SOCKETS)?;
        let listeners = other(map::LISTENERS)?;
        let old_listeners = other(map::OLD_LISTENERS)?;
        let direct_stats = other(map::DIRECT_STATS)?;
        let heartbeat = Heartbeat::new(Arc::new(other(map::HEARTBEAT)?));
        let verdicts =
            Verdicts::new(other(map::GENERATION)?, other(map::VERDICTS)?, other(map::LOCAL_FLOWS)?);
        let orig_dst = other(map::ORIG_DST)?;
        let client = other(map::CLIENT)?;
        let counters = PerCpuArray::try_from(Map::PerCpuArray(maps.data(map::COUNTERS)?))
            .map_err(|source| map_error(map::COUNTERS, source))?;
        let events = RingBuf::try_from(Map::RingBuf(maps.data(map::EVENTS)?))
            .map_err(|source| map_error(map::EVENTS, source))?;
        let logs = log_pump(&mut ebpf);
        write_config(&config_map, &config)?;

        attach_cgroup_programs(&mut ebpf, &root, &staging)?;
        pins.commit()?;

        Ok(Self {
            ebpf,
            reconciler: Reconciler::new(kernel_maps),
            pins,
            inbound_links: BTreeMap::new(),
            inbound_sockets,
            listeners,
            old_listeners,
            config_map,
            config,
            counters,
            direct_stats,
            sockets: SocketMeta::new(Arc::new(orig_dst), Arc::new(client)),
            heartbeat,
            verdicts,
            events: Some(DenyEvents::new(events)),
            logs,
        })
    }

    /// Makes the kernel do what the intent says. On an error the kernel's state is consistent, though between the old
    /// and the new one; the next call repairs it. Pods that leave the intent also lose their inbound part.
    pub fn apply(&mut self, intent: &Intent) -> Result<Report, BpfError> {
        let (state, issues) = lower(intent);
        let gone: Vec<u64> = self
            .inbound_links
            .keys()
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
        if self.inbound_links.contains_key(&cookie) {
            return Ok(());
        }
        let path = self.pins.current().join(pins::inbound(cookie));
        let sk_lookup: &mut SkLookup = program(&mut self.ebpf, SK_LOOKUP_PROGRAM)?;
        let link = sk_lookup
            .attach(netns)
            .and_then(|id| sk_lookup.take_link(id))
            .map_err(|source| program_error(SK_LOOKUP_PROGRAM, source))?;
        let pinned = FdLink::from(link).pin(&path).map_err(|source| BpfError::Pin { path, source })?;
        self.inbound_links.insert(cookie, pinned);
        // The new program selects sockets, which overrules the old one's refusals; from here on it is alone.
        Ok(self.pins.let_go(cookie)?)
    }

    /// Ends the inbound capture of a network namespace; established connections stay. No error if there was none.
    pub fn detach_inbound(&mut self, cookie: u64) -> Result<(), BpfError> {
        let Some(link) = self.inbound_links.remove(&cookie) else { return Ok(()) };
        let path = self.pins.current().join(pins::inbound(cookie));
        link.unpin().map(drop).map_err(|source| BpfError::Unpin { path, source })
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

    /// Lets go what a dead or stopped predecessor kept shut. To be called once every pod of the node was looked at:
    /// those that are in the mesh are captured anew by then, the others do not belong to it any more.
    pub fn let_predecessor_go(&mut self) -> Result<bool, BpfError> {
        Ok(self.pins.let_all_go()?)
    }

    /// Ends the outbound capture, and the inbound one of pods without a strict port. The others stay captured with
    /// nobody to steer to, so that their strict ports refuse: what nobody can check any more must not get in. The pins
    /// stay for that, until the next load takes their place or [`unload`](Self::unload) removes them. What is held for
    /// a predecessor stays as well: this daemon may have ended before it knew anything.
    pub fn retire(&mut self, intent: &Intent) -> Result<(), BpfError> {
        let is_strict = |pod: &&CapturedPod| pod.strict || pod.port_strict.values().any(|strict| *strict);
        let strict: Vec<CapturedPod> = intent.pods.iter().filter(is_strict).cloned().collect();
        if strict.is_empty() {
            self.detach_all_inbound()?;
            return Ok(self.pins.clear_own()?);
        }
        let keep: BTreeSet<u64> = strict.iter().map(|pod| pod.cookie).collect();
        let gone: Vec<u64> =
            self.inbound_links.keys().filter(|cookie| !keep.contains(cookie)).copied().collect();
        for cookie in gone {
            self.detach_inbound(cookie)?;
        }
        let (mut state, _) = lower(&Intent { pods: strict, ..Intent::default() });
        state.pods.clear();
        self.reconciler.apply(&state)?;
        Ok(())
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
        let cookies: Vec<u64> = self.inbound_links.keys().copied().collect();
        cookies.into_iter().try_for_each(|cookie| self.detach_inbound(cookie))
    }
}

/// Takes maps out of the loaded object, and pins and checks each.
struct Maps<'a> {
    ebpf: &'a mut Ebpf,
    staging: &'a Path,
}

impl Maps<'_> {
    fn data(&mut self, name: &'static str) -> Result<MapData, BpfError> {
        let missing = || BpfError::Missing { what: "map", name: name.to_owned() };
        let (Map::Array(data)
        | Map::HashMap(data)
        | Map::LruHashMap(data)
        | Map::PerCpuArray(data)
        | Map::RingBuf(data)
        | Map::SkStorage(data)
        | Map::SockHash(data)) = self.ebpf.take_map(name).ok_or_else(missing)?
        else {
            return Err(missing());
        };
        let path = self.staging.join(name);
        data.pin(&path).map_err(|source| BpfError::Pin { path, source })?;
        Ok(data)
    }

    /// A map handled as bytes, after its sizes were compared with those of the daemon's types.
    fn bytes(&mut self, name: &'static str, key: usize, value: usize) -> Result<sys::Map, BpfError> {
        let map = sys::Map::new(self.data(name)?).map_err(|source| map_error(name, source))?;
        if (map.key_size(), map.value_size()) != (key, value) {
            return Err(BpfError::Layout {
                name,
                key: map.key_size(),
                value: map.value_size(),
                expected: (key, value),
            });
        }
        Ok(map)
    }

    /// The reconciler's tables, in the order of [`Table::ALL`].
    fn tables(&mut self) -> Result<[sys::Map; Table::ALL.len()], BpfError> {
        let mut table = |table: Table| {
            let (key, value) = table.sizes();
            self.bytes(table.name(), key, value)
        };
        let [a, b, c, d, e, f, g, h] = Table::ALL;
        Ok([table(a)?, table(b)?, table(c)?, table(d)?, table(e)?, table(f)?, table(g)?, table(h)?])
    }
}

/// Hands every program to the verifier.
fn load_programs(ebpf: &mut Ebpf) -> Result<(), BpfError> {
    let sk_lookup: &mut SkLookup = program(ebpf, SK_LOOKUP_PROGRAM)?;
    sk_lookup.load().map_err(|source| program_error(SK_LOOKUP_PROGRAM, source))?;
    let sock_ops: &mut SockOps = program(ebpf, SOCK_OPS_PROGRAM)?;
    sock_ops.load().map_err(|source| program_error(SOCK_OPS_PROGRAM, source))?;
    for name in SOCK_ADDR_PROGRAMS {
        let sock_addr: &mut CgroupSockAddr = program(ebpf, name)?;
        sock_addr.load().map_err(|source| program_error(name, source))?;
    }
    Ok(())
}

/// Attaches and pins the programs of the cgroup.
fn attach_cgroup_programs(ebpf: &mut Ebpf, root: &File, staging: &Path) -> Result<(), BpfError> {
    let pin = |name: &str, link: Result<FdLink, LinkError>| {
        let link = link.map_err(|source| BpfError::Link { program: name.to_owned(), source })?;
        let path = staging.join(name);
        // The pin alone keeps the program attached.
        link.pin(&path).map(drop).map_err(|source| BpfError::Pin { path, source })
    };
    // The kernel adds a link to the cgroup's others in any mode; Single is the mode without flags.
    let mode = CgroupAttachMode::Single;
    let sock_ops: &mut SockOps = program(ebpf, SOCK_OPS_PROGRAM)?;
    let link = sock_ops
        .attach(root, mode)
        .and_then(|id| sock_ops.take_link(id))
        .map_err(|source| program_error(SOCK_OPS_PROGRAM, source))?;
    pin(SOCK_OPS_PROGRAM, FdLink::try_from(link))?;
    for name in SOCK_ADDR_PROGRAMS {
        let sock_addr: &mut CgroupSockAddr = program(ebpf, name)?;
        let link = sock_addr
            .attach(root, mode)
            .and_then(|id| sock_addr.take_link(id))
            .map_err(|source| program_error(name, source))?;
        pin(name, FdLink::try_from(link))?;
    }
    Ok(())
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P, BpfError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    let missing = || BpfError::Missing { what: "program", name: name.to_owned() };
    let program = ebpf.program_mut(name).ok_or_else(missing)?;
    program.try_into().map_err(|source| program_error(name, source))
}

fn program_error(name: &str, source: ProgramError) -> BpfError {
    BpfError::Program { program: name.to_owned(), source: Box::new(source) }
}

fn map_error(name: &'static str, source: MapError) -> BpfError {
    BpfError::Map { name, source: Box::new(source) }
}

fn row_error(name: &'static str) -> impl Fn(io::Error) -> BpfError {
    move |source| BpfError::Row { name, source }
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

/// The forwarder of the programs' log lines. Doing without is better than not starting.
fn log_pump(ebpf: &mut Ebpf) -> Option<LogPump> {
    let logger = aya_log::EbpfLogger::init(ebpf)
        .inspect_err(|error| tracing::warn!(%error, "no log lines from the BPF programs"))
        .ok()?;
    Some(Box::pin(async move {
        let mut poll = sys::readable(logger)?;
        loop {
            let mut ready = poll.readable_mut().await?;
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    }))
}

/// The id that `bpf_get_current_cgroup_id` gives: the folder's inode number.
fn cgroup_id(path: &Path) -> Result<u64, BpfError> {
    check_cgroup(path)
        .and_then(|()| fs::metadata(path))
        .map(|metadata| metadata.ino())
        .map_err(|source| BpfError::Cgroup { path: path.to_owned(), source })
}

/// How deep the cgroup is below the hierarchy's root, which has inode 1.
fn cgroup_level(path: &Path) -> Result<u32, BpfError> {
    let walk = || {
        let path = path.canonicalize()?;
        for (level, ancestor) in (0..).zip(path.ancestors()) {
            check_cgroup(ancestor)?;
            if fs::metadata(ancestor)?.ino() == CGROUP_ROOT_INODE {
                return Ok(level);
            }
        }
        Err(io::Error::from(io::ErrorKind::NotFound))
    };
    walk().map_err(|source| BpfError::Cgroup { path: path.to_owned(), source })
}

fn check_cgroup(path: &Path) -> io::Result<()> {
    let kind = statfs(path)?.filesystem_type();
    if kind == CGROUP2_SUPER_MAGIC {
        Ok(())
    } else {
        Err(io::Error::other("it is not on a cgroup2 file system"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The object's BTF says how large the programs' keys and values are; they have to be the daemon's types.
    #[test]
    fn the_object_has_the_layout_of_the_daemons_types() {
        let object = aya_obj::Object::parse(OBJECT).unwrap();
        let size = |name: &str| {
            let map = object.maps.get(name).unwrap_or_else(|| panic!("the object has no map {name}"));
            (map.key_size() as usize, map.value_size() as usize)
        };
        for table in Table::ALL {
            assert_eq!(size(table.name()), table.sizes(), "{table}");
        }
        for (name, key, value) in MAPS {
            assert_eq!(size(name), (key, value), "{name}");
        }
        assert_eq!(size(map::COUNTERS), (4, 8));
        let named = Table::ALL.iter().map(|table| table.name()).chain(MAPS.iter().map(|(name, ..)| *name));
        let mut named: Vec<&str> = named.chain([map::COUNTERS, map::EVENTS]).collect();
        named.sort_unstable();
        let mut all = map::ALL.to_vec();
        all.sort_unstable();
        assert_eq!(named, all, "every map is named once");
    }

    #[test]
    fn a_folder_outside_of_cgroup2_is_refused_by_name() {
        let error = cgroup_id(Path::new("/proc")).unwrap_err();
        assert!(error.to_string().contains("/proc"), "{error}");
    }
}
