//! Loading: the object, its maps, its programs and where they are attached.
//!
//! A start that finds a predecessor's pins with the same maps adopts them: it loads its programs on these maps and puts
//! each in the place of the old one with one call per link, so that there is no moment without capture and nothing that
//! the kernel remembers is lost. Otherwise everything is staged, attached and renamed, and the old pins go. Damaged pins
//! are replaced; they are never a reason not to start. Deliberately absent: what is in the maps.

use super::{
    error::BpfError,
    ops::Table,
    pins::{self, Pins},
    probe::{Feature, Features},
    sys,
};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapData, MapError},
    programs::{
        CgroupAttachMode, CgroupSockAddr, Program, ProgramError, SkLookup, SockOps,
        links::{FdLink, LinkError},
    },
};
use mesh_common::{
    key, map,
    net::{Endpoint, Ip},
    value,
};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    future::Future,
    io,
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    pin::Pin,
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
const MAPS: [(&str, usize, usize); 20] = [
    (map::CONFIG, size_of::<u32>(), size_of::<value::Config>()),
    (map::DAEMONS, size_of::<key::Daemon>(), size_of::<value::Daemon>()),
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
    (map::NAMESERVERS, size_of::<key::Nameserver>(), size_of::<Endpoint>()),
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
    /// Features of the kernel that are not used even if they are there.
    pub disabled: BTreeSet<Feature>,
}

/// A future that forwards the programs' log lines to `log`'s logger until it is dropped.
pub type LogPump = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// The object with its maps taken out, and not attached yet.
pub(super) struct Loaded {
    ebpf: Ebpf,
    features: Features,
    maps: BTreeMap<&'static str, MapData>,
    /// Whether the maps are a predecessor's.
    pub(super) adopted: bool,
    /// Where the links are pinned: the folder in force, or the staging one.
    dir: PathBuf,
}

/// What a map of a predecessor has to look like to be used on.
#[derive(Debug, PartialEq, Eq)]
struct Layout {
    kind: u32,
    key: u32,
    value: u32,
    entries: u32,
    flags: u32,
}

impl Loaded {
    /// Loads the object, on a predecessor's maps if they fit. Nothing of what is attached changes.
    pub(super) fn new(pins: &Pins, disabled: &BTreeSet<Feature>) -> Result<Self, BpfError> {
        let features = Features::probe(disabled).map_err(BpfError::Probe)?;
        for feature in features.missing() {
            tracing::warn!(%feature, since = feature.since(), "the kernel lacks it: {}", feature.cost());
        }
        let current = pins.current();
        match adoptable(&current) {
            Ok(true) => match Self::load(&current, true, features.clone()) {
                Ok(loaded) => return Ok(loaded),
                Err(error) => {
                    tracing::error!(%error, "the pinned maps cannot be used; they are replaced");
                }
            },
            Ok(false) => {}
            Err(why) => tracing::warn!(why, "the pinned maps are not of this build; they are replaced"),
        }
        Self::load(&pins.stage()?, false, features)
    }

    /// Whether a predecessor's maps could be used on, for a look before anything is begun.
    pub(super) fn would_adopt(pins_dir: &Path) -> Result<bool, String> {
        adoptable(pins_dir)
    }

    fn load(dir: &Path, adopted: bool, features: Features) -> Result<Self, BpfError> {
        // The programs before the maps are taken out: a program is loaded with the descriptors of those it uses.
        let mut ebpf = load_object(&features, adopted.then_some(dir))?;
        let mut maps = BTreeMap::new();
        for name in map::ALL {
            let missing = || BpfError::Missing { what: "map", name: (*name).to_owned() };
            let (Map::Array(data)
            | Map::HashMap(data)
            | Map::LruHashMap(data)
            | Map::PerCpuArray(data)
            | Map::RingBuf(data)
            | Map::SkStorage(data)
            | Map::SockHash(data)) = ebpf.take_map(name).ok_or_else(missing)?
            else {
                return Err(missing());
            };
            if !adopted {
                let path = dir.join(name);
                data.pin(&path).map_err(|source| BpfError::Pin { path, source })?;
            }
            maps.insert(*name, data);
        }
        Ok(Self { ebpf, features, maps, adopted, dir: dir.to_owned() })
    }

    /// Takes a map out.
    pub(super) fn data(&mut self, name: &'static str) -> Result<MapData, BpfError> {
        self.maps.remove(name).ok_or_else(|| BpfError::Missing { what: "map", name: name.to_owned() })
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
    pub(super) fn tables(&mut self) -> Result<[sys::Map; Table::ALL.len()], BpfError> {
        let mut table = |table: Table| {
            let (key, value) = table.sizes();
            self.bytes(table.name(), key, value)
        };
        let [a, b, c, d, e, f, g, h] = Table::ALL;
        Ok([table(a)?, table(b)?, table(c)?, table(d)?, table(e)?, table(f)?, table(g)?, table(h)?])
    }

    /// The other maps that are handled as bytes, by name.
    pub(super) fn others(&mut self) -> Result<BTreeMap<&'static str, sys::Map>, BpfError> {
        MAPS.into_iter().map(|(name, key, value)| Ok((name, self.bytes(name, key, value)?))).collect()
    }

    /// The forwarder of the programs' log lines. Doing without is better than not starting.
    pub(super) fn log_pump(&mut self) -> Option<LogPump> {
        let logger = aya_log::EbpfLogger::init(&mut self.ebpf)
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

    /// Puts the programs into force, in the place of a predecessor's. Returns the object, and the cookies of the network
    /// namespaces whose inbound side is captured already.
    pub(super) fn attach(
        mut self,
        options: &LoadOptions,
        pins: &Pins,
    ) -> Result<(Ebpf, BTreeSet<u64>), BpfError> {
        let root = File::open(&options.cgroup_root)
            .map_err(|source| BpfError::Cgroup { path: options.cgroup_root.clone(), source })?;
        let cgroup = cgroup_id(&options.cgroup_root)?;
        for name in std::iter::once(SOCK_OPS_PROGRAM).chain(SOCK_ADDR_PROGRAMS) {
            if !self.features.allow(name) {
                // A predecessor may have had it.
                pins::remove_file(&self.dir.join(name))?;
                continue;
            }
            if self.adopted {
                match self.replace(name, &self.dir.join(name), Some(cgroup)) {
                    Ok(()) => continue,
                    Err(error) => tracing::warn!(name, %error, "a pinned link is of no use; attaching anew"),
                }
            }
            let link = attach_to_cgroup(&mut self.ebpf, name, &root)?;
            pins.put(&self.dir.join(name), |path| {
                // The pin alone keeps the program attached.
                link.pin(path).map(drop).map_err(|source| BpfError::Pin { path: path.to_owned(), source })
            })?;
        }
        let mut inbound = BTreeSet::new();
        if self.adopted {
            for (cookie, path) in pins.inbound_pins(&self.dir)? {
                match self.replace(SK_LOOKUP_PROGRAM, &path, None) {
                    Ok(()) => _ = inbound.insert(cookie),
                    Err(error) => {
                        // The namespace is gone, with everything that was attached to it.
                        tracing::debug!(cookie, %error, "an inbound link leads nowhere any more");
                        pins::remove_file(&path)?;
                    }
                }
            }
            pins.sweep()?;
        } else {
            pins.commit()?;
        }
        Ok((self.ebpf, inbound))
    }

    /// Puts a program in the place of a pinned link's one.
    fn replace(&self, name: &str, pin: &Path, cgroup: Option<u64>) -> io::Result<()> {
        let program = self.ebpf.program(name).ok_or(io::ErrorKind::NotFound)?;
        let program = program.fd().map_err(io::Error::other)?;
        let link = sys::obj_get(pin)?;
        if let Some(cgroup) = cgroup
            && sys::link_cgroup(link.as_fd())? != Some(cgroup)
        {
            return Err(io::Error::other("it is attached to another cgroup"));
        }
        sys::link_update(link.as_fd(), program.as_fd())
    }
}

/// Whether the pins in `dir` are of a predecessor whose maps are laid out like this build's; an error says what is
/// different.
fn adoptable(dir: &Path) -> Result<bool, String> {
    if !dir.exists() {
        return Ok(false);
    }
    let object = aya_obj::Object::parse(OBJECT).map_err(|error| error.to_string())?;
    for name in map::ALL {
        let wanted = object.maps.get(*name).ok_or_else(|| format!("the object has no map {name}"))?;
        let wanted = Layout {
            kind: wanted.map_type(),
            key: wanted.key_size(),
            value: wanted.value_size(),
            entries: wanted.max_entries(),
            flags: wanted.map_flags(),
        };
        let found = sys::obj_get(&dir.join(name))
            .and_then(|map| sys::map_info(map.as_fd()))
            .map_err(|error| format!("the map {name} cannot be opened: {error}"))?;
        let found = Layout {
            kind: found.kind,
            key: found.key_size,
            value: found.value_size,
            entries: found.max_entries,
            flags: found.flags,
        };
        if found != wanted {
            return Err(format!("the map {name} is {found:?}, this build has {wanted:?}"));
        }
    }
    Ok(true)
}

/// Attaches to a network namespace and pins.
pub(super) fn attach_inbound(ebpf: &mut Ebpf, netns: BorrowedFd<'_>, path: &Path) -> Result<(), BpfError> {
    let sk_lookup: &mut SkLookup = program(ebpf, SK_LOOKUP_PROGRAM)?;
    let link = sk_lookup
        .attach(netns)
        .and_then(|id| sk_lookup.take_link(id))
        .map_err(|source| program_error(SK_LOOKUP_PROGRAM, source))?;
    let pin = |source| BpfError::Pin { path: path.to_owned(), source };
    FdLink::from(link).pin(path).map(drop).map_err(pin)
}

/// Offers every program to the verifier and lets all go again. The errors of those that are refused, or of the object.
pub fn try_load(features: &Features) -> Result<(), Vec<BpfError>> {
    let mut ebpf = load_maps(features, None).map_err(|error| vec![error])?;
    let refused: Vec<BpfError> =
        programs(features).filter_map(|name| load_program(&mut ebpf, name).err()).collect();
    if refused.is_empty() { Ok(()) } else { Err(refused) }
}

/// Makes the maps, or takes a predecessor's from where they are pinned.
fn load_maps(features: &Features, pinned: Option<&Path>) -> Result<Ebpf, BpfError> {
    let bits = features.bits();
    let mut loader = EbpfLoader::new();
    loader.override_global("FEATURES", &bits, true);
    if let Some(dir) = pinned {
        for name in map::ALL {
            loader.map_pin_path(name, dir.join(name));
        }
    }
    loader.load(OBJECT).map_err(|error| BpfError::Load(Box::new(error)))
}

/// The maps, and every program that this kernel can have.
fn load_object(features: &Features, pinned: Option<&Path>) -> Result<Ebpf, BpfError> {
    let mut ebpf = load_maps(features, pinned)?;
    for name in programs(features) {
        load_program(&mut ebpf, name)?;
    }
    Ok(ebpf)
}

/// The programs that this kernel can have.
fn programs(features: &Features) -> impl Iterator<Item = &'static str> {
    [SK_LOOKUP_PROGRAM, SOCK_OPS_PROGRAM]
        .into_iter()
        .chain(SOCK_ADDR_PROGRAMS)
        .filter(|name| features.allow(name))
}

/// Hands a program to the verifier.
fn load_program(ebpf: &mut Ebpf, name: &str) -> Result<(), BpfError> {
    let loaded = match name {
        SK_LOOKUP_PROGRAM => program::<SkLookup>(ebpf, name)?.load(),
        SOCK_OPS_PROGRAM => program::<SockOps>(ebpf, name)?.load(),
        _ => program::<CgroupSockAddr>(ebpf, name)?.load(),
    };
    loaded.map_err(|source| program_error(name, source))
}

fn attach_to_cgroup(ebpf: &mut Ebpf, name: &str, root: &File) -> Result<FdLink, BpfError> {
    // The kernel adds a link to the cgroup's others in any mode; Single is the mode without flags.
    let mode = CgroupAttachMode::Single;
    let link = if name == SOCK_OPS_PROGRAM {
        let sock_ops: &mut SockOps = program(ebpf, name)?;
        let link = sock_ops.attach(root, mode).and_then(|id| sock_ops.take_link(id));
        FdLink::try_from(link.map_err(|source| program_error(name, source))?)
    } else {
        let sock_addr: &mut CgroupSockAddr = program(ebpf, name)?;
        let link = sock_addr.attach(root, mode).and_then(|id| sock_addr.take_link(id));
        FdLink::try_from(link.map_err(|source| program_error(name, source))?)
    };
    link.map_err(|source: LinkError| BpfError::Link { program: name.to_owned(), source })
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P, BpfError>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let missing = || BpfError::Missing { what: "program", name: name.to_owned() };
    let program = ebpf.program_mut(name).ok_or_else(missing)?;
    program.try_into().map_err(|source| program_error(name, source))
}

fn program_error(name: &str, source: ProgramError) -> BpfError {
    BpfError::Program { program: name.to_owned(), source: Box::new(source) }
}

pub(super) fn map_error(name: &'static str, source: MapError) -> BpfError {
    BpfError::Map { name, source: Box::new(source) }
}

/// The id that `bpf_get_current_cgroup_id` gives: the folder's inode number.
pub(super) fn cgroup_id(path: &Path) -> Result<u64, BpfError> {
    check_cgroup(path)
        .and_then(|()| fs::metadata(path))
        .map(|metadata| metadata.ino())
        .map_err(|source| BpfError::Cgroup { path: path.to_owned(), source })
}

/// How deep the cgroup is below the hierarchy's root, which has inode 1.
pub(super) fn cgroup_level(path: &Path) -> Result<u32, BpfError> {
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
