//! The raw `bpf(2)` calls that aya does not offer: maps whose keys are socket descriptors or plain bytes, pins of unknown
//! kind, and another program for a link.
//!
//! The only `unsafe` of this module tree. The types keep it sound: a [`Map`] knows its key and value sizes from the
//! kernel and refuses slices of another length, so that the kernel never reads or writes past one.
#![allow(unsafe_code)]

use aya::maps::MapData;
use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};
use tokio::io::{Interest, unix::AsyncFd};

/// Commands of bpf(2), from `include/uapi/linux/bpf.h`.
#[derive(Clone, Copy)]
#[repr(i32)]
enum Command {
    LookupElem = 1,
    UpdateElem = 2,
    DeleteElem = 3,
    GetNextKey = 4,
    ObjGet = 7,
    ObjGetInfoByFd = 15,
    LinkUpdate = 29,
}

/// The number of BPF_PROG_LOAD.
const PROG_LOAD: libc::c_int = 5;
/// `BPF_PROG_TYPE_CGROUP_SOCK_ADDR`.
const SOCK_ADDR: u32 = 18;

/// The part of `union bpf_attr` that loading a program uses.
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// Offers a program of the cgroup's socket-address hooks to the verifier and lets it go again.
pub(crate) fn try_sock_addr(expected_attach_type: u32, program: &[u64]) -> io::Result<()> {
    let license = c"Apache-2.0";
    let attr = ProgLoad {
        prog_type: SOCK_ADDR,
        insn_cnt: u32::try_from(program.len()).map_err(io::Error::other)?,
        insns: program.as_ptr().addr() as u64,
        license: license.as_ptr().addr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name: *b"nodemesh_probe\0\0",
        prog_ifindex: 0,
        expected_attach_type,
    };
    // SAFETY: attr is a live structure of the length given; its pointers are to instructions of the number given and to
    // a terminated string, which the kernel only reads.
    let fd =
        unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, std::ptr::from_ref(&attr), size_of::<ProgLoad>()) };
    let fd = RawFd::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given this descriptor, and nobody else has it.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(())
}

/// The part of `union bpf_attr` that map element commands use.
#[repr(C)]
struct MapElem {
    map_fd: u32,
    pad: u32,
    key: u64,
    value_or_next_key: u64,
    flags: u64,
}

/// The part of `union bpf_attr` that opening a pin uses.
#[repr(C)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

/// The part of `union bpf_attr` that asking for information uses.
#[repr(C)]
struct Info {
    fd: u32,
    len: u32,
    info: u64,
}

/// The part of `union bpf_attr` that changing a link uses.
#[repr(C)]
struct LinkChange {
    link: u32,
    new_program: u32,
    flags: u32,
    old_program: u32,
}

/// The beginning of `struct bpf_link_info`, with the union's part for cgroups.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    pad: u32,
    cgroup: u64,
}

/// `BPF_LINK_TYPE_CGROUP`.
const LINK_TYPE_CGROUP: u32 = 3;

/// The beginning of `struct bpf_map_info`.
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct MapInfo {
    /// `BPF_MAP_TYPE_*`.
    pub(super) kind: u32,
    id: u32,
    /// Size of a key in bytes.
    pub(super) key_size: u32,
    /// Size of a value in bytes.
    pub(super) value_size: u32,
    /// The bound.
    pub(super) max_entries: u32,
    /// `BPF_F_*`.
    pub(super) flags: u32,
}

/// What the kernel fills in when it is asked about an object: plain numbers from the start of its structure on.
trait Plain: Default {}
impl Plain for LinkInfo {}
impl Plain for MapInfo {}

/// Opens a pinned map or link.
pub(super) fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
    let attr = Object { path: path.as_ptr().addr() as u64, fd: 0, flags: 0 };
    let fd = bpf(Command::ObjGet, &attr)?;
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the call succeeded, so this is a new descriptor (close-on-exec) that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What a map looks like. What is asked about another object is not told apart from a map; its numbers make no sense.
pub(super) fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    info(map)
}

/// The id of the cgroup that a link is attached to; `None` for a link of another type.
pub(super) fn link_cgroup(link: BorrowedFd<'_>) -> io::Result<Option<u64>> {
    let info: LinkInfo = info(link)?;
    Ok((info.kind == LINK_TYPE_CGROUP).then_some(info.cgroup))
}

/// Puts another program in the place of a link's.
pub(super) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let attr = LinkChange {
        link: link.as_raw_fd().unsigned_abs(),
        new_program: program.as_raw_fd().unsigned_abs(),
        flags: 0,
        old_program: 0,
    };
    bpf(Command::LinkUpdate, &attr).map(drop)
}

fn info<T: Plain>(object: BorrowedFd<'_>) -> io::Result<T> {
    let mut found = T::default();
    let attr = Info {
        fd: object.as_raw_fd().unsigned_abs(),
        len: std::mem::size_of::<T>() as u32,
        info: std::ptr::from_mut(&mut found).addr() as u64,
    };
    bpf(Command::ObjGetInfoByFd, &attr)?;
    Ok(found)
}

/// One call of bpf(2). The pointers in `attr` must be valid for what the command does with them.
fn bpf<T>(command: Command, attr: &T) -> io::Result<libc::c_long> {
    // SAFETY: attr is a live structure of the length given. Its pointers, which only this module sets, come from
    // buffers that outlive the call: a path with its end, or a structure of plain numbers whose length is told to the
    // kernel, which writes no more than that.
    let done = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_int,
            std::ptr::from_ref(attr),
            std::mem::size_of::<T>(),
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done) }
}

/// A map whose keys and values are handled as bytes. Not for per-CPU maps, whose values have another size.
#[derive(Debug)]
pub(crate) struct Map {
    data: MapData,
    key_size: usize,
    value_size: usize,
}

impl Map {
    /// Takes the map and asks the kernel for its sizes.
    pub(crate) fn new(data: MapData) -> Result<Self, aya::maps::MapError> {
        let info = data.info()?;
        let (key_size, value_size) = (info.key_size() as usize, info.value_size() as usize);
        Ok(Self { data, key_size, value_size })
    }

    /// Size of a key in bytes.
    pub(crate) fn key_size(&self) -> usize {
        self.key_size
    }

    /// Size of a value in bytes.
    pub(crate) fn value_size(&self) -> usize {
        self.value_size
    }

    /// Copies the value into `value`; false when there is none.
    pub(crate) fn lookup(&self, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
        self.check(key.len(), Some(value.len()))?;
        let attr = self.attr(key.as_ptr(), value.as_mut_ptr().addr() as u64);
        absent_is_false(self.call(Command::LookupElem, &attr))
    }

    /// Inserts or replaces.
    pub(crate) fn update(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.check(key.len(), Some(value.len()))?;
        self.call(Command::UpdateElem, &self.attr(key.as_ptr(), value.as_ptr().addr() as u64))
    }

    /// Removes; false when there was nothing.
    pub(crate) fn delete(&self, key: &[u8]) -> io::Result<bool> {
        self.check(key.len(), None)?;
        absent_is_false(self.call(Command::DeleteElem, &self.attr(key.as_ptr(), 0)))
    }

    /// The key after `key`, or the first one; `None` at the end.
    pub(crate) fn next_key(&self, key: Option<&[u8]>) -> io::Result<Option<Vec<u8>>> {
        if let Some(key) = key {
            self.check(key.len(), None)?;
        }
        let mut next = vec![0; self.key_size];
        let key = key.map_or(std::ptr::null(), <[u8]>::as_ptr);
        let attr = self.attr(key, next.as_mut_ptr().addr() as u64);
        Ok(absent_is_false(self.call(Command::GetNextKey, &attr))?.then_some(next))
    }

    fn check(&self, key: usize, value: Option<usize>) -> io::Result<()> {
        if key != self.key_size || value.is_some_and(|value| value != self.value_size) {
            let text = format!(
                "a key of {key} and a value of {value:?} bytes for a map of {} and {}",
                self.key_size, self.value_size
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Ok(())
    }

    fn attr(&self, key: *const u8, value_or_next_key: u64) -> MapElem {
        let map_fd = self.data.fd().as_fd().as_raw_fd().unsigned_abs();
        MapElem { map_fd, pad: 0, key: key.addr() as u64, value_or_next_key, flags: 0 }
    }

    fn call(&self, command: Command, attr: &MapElem) -> io::Result<()> {
        // The pointers come from slices that outlive the call and whose lengths `check` compared with the map's sizes (a
        // buffer for the next key is made of the key size); the kernel reads and writes nothing beyond these sizes.
        bpf(command, attr).map(drop)
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.data.fd().as_fd()
    }
}

/// The clock of `bpf_ktime_get_ns`: monotonic, in nanoseconds.
pub(crate) fn monotonic_ns() -> io::Result<u64> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec to a live, exclusive place.
    if unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // The monotonic clock is never negative.
    Ok(now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs())
}

fn absent_is_false(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Waits for a ring buffer to become readable. Needs a tokio runtime.
pub(crate) fn readable<T: RingBuffer>(buffer: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: a ring buffer of aya owns its descriptor, hands out the same one each time and closes it only when it
    // is dropped, which the AsyncFd that owns it then does after deregistration.
    unsafe { AsyncFd::register_with_interest(buffer, Interest::READABLE) }.map_err(io::Error::from)
}

/// The owners of a ring buffer's descriptor that [`readable`] may rely on.
pub(crate) trait RingBuffer: AsRawFd {}

impl RingBuffer for aya::maps::RingBuf<MapData> {}
impl<L: 'static> RingBuffer for aya_log::EbpfLogger<L> where aya_log::EbpfLogger<L>: AsRawFd {}
