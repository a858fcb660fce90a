//! The raw `bpf(2)` map calls, which aya does not offer for keys that are socket descriptors or plain bytes.
//!
//! The only `unsafe` of this module tree. The types keep it sound: a [`Map`] knows its key and value sizes from the
//! kernel and refuses slices of another length, so that the kernel never reads or writes past one.
#![allow(unsafe_code)]

use aya::maps::MapData;
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
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
        // SAFETY: attr is a live structure of the length given. Its pointers come from slices that outlive the call
        // and whose lengths `check` compared with the map's sizes (a buffer for the next key is made of the key
        // size); the kernel reads and writes nothing beyond these sizes.
        let done = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                command as libc::c_int,
                std::ptr::from_ref(attr),
                std::mem::size_of::<MapElem>(),
            )
        };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
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
