//! The maps. Names, bounds and types are `mesh_common::map`'s.
//!
//! Hash maps are not preallocated: a map's memory follows its rows, and a value that was looked up stays readable
//! (RCU) while the program runs. LRU maps recycle at once, which is why [`copy`] takes their values out.

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf, SkStorage, SockHash},
    cty::c_void,
    helpers::{bpf_sk_storage_delete, bpf_sk_storage_get},
    macros::btf_map,
};
use mesh_common::{
    key,
    map::entries,
    net::{Endpoint, Ip},
    value,
};

const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map]
pub(crate) static CONFIG: Array<value::Config, { entries::CONFIG }> = Array::new();
#[btf_map]
pub(crate) static DAEMONS: HashMap<key::Daemon, value::Daemon, { entries::DAEMONS }, NO_PREALLOC> =
    HashMap::new();
#[btf_map]
pub(crate) static HEARTBEAT: Array<value::Heartbeat, { entries::HEARTBEAT }> = Array::new();
#[btf_map]
pub(crate) static GENERATION: Array<value::Generation, { entries::GENERATION }> = Array::new();
#[btf_map]
pub(crate) static VERDICTS: LruHashMap<key::Verdict, value::Verdict, { entries::VERDICTS }> =
    LruHashMap::new();
#[btf_map]
pub(crate) static LOCAL_FLOWS: HashMap<key::Probe, value::LocalFlow, { entries::LOCAL_FLOWS }, NO_PREALLOC> =
    HashMap::new();
#[btf_map]
pub(crate) static MAGLEV: HashMap<key::Maglev, value::MaglevChunk, { entries::MAGLEV }, NO_PREALLOC> =
    HashMap::new();
#[btf_map]
pub(crate) static PODS: HashMap<key::Netns, value::Pod, { entries::PODS }, NO_PREALLOC> = HashMap::new();
#[btf_map]
pub(crate) static FRONTENDS: HashMap<key::Frontend, value::Frontend, { entries::FRONTENDS }, NO_PREALLOC> =
    HashMap::new();
#[btf_map]
pub(crate) static BACKENDS: HashMap<key::Backend, value::Backend, { entries::BACKENDS }, NO_PREALLOC> =
    HashMap::new();
#[btf_map]
pub(crate) static MEMBERS: HashMap<key::Member, u32, { entries::MEMBERS }, NO_PREALLOC> = HashMap::new();
#[btf_map]
pub(crate) static DESTINATIONS: HashMap<Ip, value::Destination, { entries::DESTINATIONS }, NO_PREALLOC> =
    HashMap::new();
#[btf_map]
pub(crate) static AFFINITY: LruHashMap<key::Affinity, value::Affinity, { entries::AFFINITY }> =
    LruHashMap::new();
#[btf_map]
pub(crate) static SOCKET_FLOW: SkStorage<value::SocketFlow> = SkStorage::new();
#[btf_map]
pub(crate) static ORIG_DST: SkStorage<value::OriginalDst> = SkStorage::new();
#[btf_map]
pub(crate) static CLIENT: SkStorage<Endpoint> = SkStorage::new();
#[btf_map]
pub(crate) static ORIG_DST_FLOWS: LruHashMap<key::Flow, value::OriginalDst, { entries::ORIG_DST_FLOWS }> =
    LruHashMap::new();
#[btf_map]
pub(crate) static CLIENT_FLOWS: LruHashMap<key::Flow, Endpoint, { entries::CLIENT_FLOWS }> =
    LruHashMap::new();
#[btf_map]
pub(crate) static PROBE_FLOWS: LruHashMap<key::Probe, value::Probe, { entries::PROBE_FLOWS }> =
    LruHashMap::new();
#[btf_map]
pub(crate) static INBOUND: HashMap<Ip, value::Inbound, { entries::INBOUND }, NO_PREALLOC> = HashMap::new();
#[btf_map]
pub(crate) static INBOUND_PORTS: HashMap<
    Endpoint,
    value::InboundPort,
    { entries::INBOUND_PORTS },
    NO_PREALLOC,
> = HashMap::new();
#[btf_map]
pub(crate) static INBOUND_SOCKETS: SockHash<Ip, { entries::INBOUND_SOCKETS }> = SockHash::new();
#[btf_map]
pub(crate) static LISTENERS: HashMap<key::Listener, value::Listener, { entries::LISTENERS }, NO_PREALLOC> =
    HashMap::new();
#[btf_map]
pub(crate) static OLD_LISTENERS: HashMap<
    key::Listener,
    value::Listener,
    { entries::OLD_LISTENERS },
    NO_PREALLOC,
> = HashMap::new();
#[btf_map]
pub(crate) static UDP_FLOWS: LruHashMap<key::Udp, Endpoint, { entries::UDP_FLOWS }> = LruHashMap::new();
#[btf_map]
pub(crate) static UDP_STICKY: LruHashMap<key::Udp, Endpoint, { entries::UDP_STICKY }> = LruHashMap::new();
#[btf_map]
pub(crate) static NAMESERVERS: LruHashMap<key::Nameserver, Endpoint, { entries::NAMESERVERS }> =
    LruHashMap::new();
#[btf_map]
pub(crate) static DIRECT_STATS: HashMap<key::Direct, value::Direct, { entries::DIRECT_STATS }, NO_PREALLOC> =
    HashMap::new();
#[btf_map]
pub(crate) static COUNTERS: PerCpuArray<u64, { entries::COUNTERS }> = PerCpuArray::new();
#[btf_map]
pub(crate) static EVENTS: RingBuf<value::DenyEvent, { entries::EVENTS }> = RingBuf::new();

/// The one row of CONFIG.
#[inline(always)]
pub(crate) fn config() -> Option<&'static value::Config> {
    CONFIG.get(0)
}

/// Copies a value out of an LRU map, which may reuse its memory for another key at any time.
#[inline(always)]
pub(crate) fn copy<V: Copy>(found: Option<*const V>) -> Option<V> {
    // SAFETY: the verifier knows the pointer as a live map value after the null check; the bytes are plain data, and
    // a concurrent reuse gives another valid value at worst, which the callers' checks of members and times tolerate.
    found.map(|value| unsafe { *value })
}

/// Looks a value up in a hash map without preallocation.
#[macro_export]
macro_rules! find {
    ($map:expr, $key:expr) => {
        match (&$map, $key) {
            // SAFETY: the map is not preallocated: the value's memory is not reused before the program ends (RCU).
            (map, key) => unsafe { map.get(key) },
        }
    };
}

/// A socket storage map whose sockets come as raw pointers from any kind of context.
pub(crate) trait Storage<T> {
    /// The value of a socket, if it has one.
    fn of(&self, sk: *mut bpf_sock) -> Option<&'static mut T>;
    /// The value of a socket, made of zeros if need be; `None` when the kernel has no memory.
    fn slot(&self, sk: *mut bpf_sock) -> Option<&'static mut T>;
    /// Sets the value of a socket; false when the kernel has no memory.
    fn set(&self, sk: *mut bpf_sock, value: T) -> bool;
    /// Removes the value of a socket.
    fn clear(&self, sk: *mut bpf_sock);
}

impl<T: Copy + 'static> Storage<T> for SkStorage<T> {
    #[inline(always)]
    fn of(&self, sk: *mut bpf_sock) -> Option<&'static mut T> {
        // SAFETY: the map's address is what the loader patches into a reference to the map, and sk is a socket that
        // the context gave and that was checked for null. The storage lives as long as the socket does.
        unsafe {
            let found = bpf_sk_storage_get(address(self), sk.cast(), core::ptr::null_mut(), 0);
            found.cast::<T>().as_mut()
        }
    }

    #[inline(always)]
    fn slot(&self, sk: *mut bpf_sock) -> Option<&'static mut T> {
        let create = BPF_SK_STORAGE_GET_F_CREATE as u64;
        // SAFETY: as above; without an initial value the kernel gives zeroed memory of the value's size.
        unsafe {
            let place = bpf_sk_storage_get(address(self), sk.cast(), core::ptr::null_mut(), create);
            place.cast::<T>().as_mut()
        }
    }

    #[inline(always)]
    fn set(&self, sk: *mut bpf_sock, value: T) -> bool {
        match self.slot(sk) {
            Some(place) => {
                *place = value;
                true
            }
            None => false,
        }
    }

    #[inline(always)]
    fn clear(&self, sk: *mut bpf_sock) {
        // SAFETY: as above. There being nothing to remove is no error.
        unsafe { bpf_sk_storage_delete(address(self), sk.cast()) };
    }
}

#[inline(always)]
fn address<M>(map: &M) -> *mut c_void {
    core::ptr::from_ref(map).cast_mut().cast()
}

/// A number in a map that programs on all CPUs change.
pub(crate) struct Shared(pub *mut u64);

impl Shared {
    /// Adds atomically. In assembly, since `core` has no read-modify-write atomics for this target.
    #[inline(always)]
    pub(crate) fn add(&self, number: i64) {
        // SAFETY: the pointer is to a live, aligned field of a map value, which the verifier checks.
        unsafe {
            core::arch::asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) self.0, in(reg) number);
        }
    }

    /// The number now.
    #[inline(always)]
    pub(crate) fn load(&self) -> u64 {
        // SAFETY: as above; aligned reads of 64 bits are whole.
        unsafe { core::ptr::read_volatile(self.0) }
    }
}
