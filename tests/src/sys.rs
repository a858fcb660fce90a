//! The only unsafe code of the harness: entering a network namespace and a cgroup between fork and exec, binding packet
//! sockets, loading and attaching small BPF programs, and a termination handler.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd as _, IntoRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::Command,
    sync::atomic::{AtomicI32, Ordering},
};

/// Makes the child of `command` join the cgroup whose `cgroup.procs` is given, then the network namespace.
///
/// The files stay open in the parent for as long as `command` lives.
pub(crate) fn join_before_exec(command: &mut Command, procs: File, netns: Option<File>) {
    let hook = move || -> io::Result<()> {
        // SAFETY: `procs` is an open file owned by the closure; write(2) is async-signal-safe and reads one byte
        // of a static string.
        if unsafe { libc::write(procs.as_raw_fd(), b"0".as_ptr().cast(), 1) } != 1 {
            return Err(io::Error::last_os_error());
        }
        if let Some(netns) = &netns {
            // SAFETY: `netns` is an open file owned by the closure; setns(2) takes no pointer.
            if unsafe { libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the hook runs in the forked child and makes only the two async-signal-safe system calls above; it
    // allocates nothing and takes no lock (`last_os_error` reads errno).
    unsafe { command.pre_exec(hook) };
}

/// Binds a packet socket to one interface, without what that interface sends, with the frames' offload state before
/// each of them (packet(7): `PACKET_VNET_HDR`, `PACKET_IGNORE_OUTGOING`).
pub(crate) fn bind_packet(socket: &impl AsRawFd, index: u32) -> io::Result<()> {
    let on: libc::c_int = 1;
    for option in [libc::PACKET_VNET_HDR, libc::PACKET_IGNORE_OUTGOING] {
        // SAFETY: the option's value is a live local of the size given.
        let done = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                option,
                std::ptr::from_ref(&on).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let addr = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
        sll_ifindex: index.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the address is a live local of the size given.
    let done = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            std::ptr::from_ref(&addr).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if done != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The part of `union bpf_attr` that loading a program uses (`include/uapi/linux/bpf.h`).
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log: [u64; 2],
    version_and_flags: u64,
    name: [u64; 2],
    ifindex: u32,
    expected_attach_type: u32,
}

/// Loads a BPF program.
pub(crate) fn bpf_load(prog_type: u32, expected_attach_type: u32, program: &[u64]) -> io::Result<OwnedFd> {
    let attr = ProgLoad {
        prog_type,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        log: [0; 2],
        version_and_flags: 0,
        name: [0; 2],
        ifindex: 0,
        expected_attach_type,
    };
    const PROG_LOAD: libc::c_int = 5;
    // SAFETY: attr is a live structure of the length given; its pointers are to instructions of the number given and to
    // a terminated string, which the kernel only reads.
    descriptor(unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const attr, size_of::<ProgLoad>()) })
}

/// Attaches a BPF program to a cgroup or a network namespace for as long as the link is open.
pub(crate) fn bpf_link(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    let attr: [u32; 4] = [program.as_raw_fd() as u32, target.as_raw_fd() as u32, attach_type, 0];
    const LINK_CREATE: libc::c_int = 28;
    // SAFETY: attr is a live array of the length given, without pointers in it.
    descriptor(unsafe { libc::syscall(libc::SYS_bpf, LINK_CREATE, attr.as_ptr(), size_of_val(&attr)) })
}

/// Attaches (or detaches) a BPF program to a cgroup the older way, as long as both exist.
pub(crate) fn bpf_attach(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: u32,
    attach: bool,
) -> io::Result<()> {
    const ALLOW_MULTI: u32 = 2;
    let (command, flags): (libc::c_int, u32) = if attach { (8, ALLOW_MULTI) } else { (9, 0) };
    let attr: [u32; 4] = [target.as_raw_fd() as u32, program.as_raw_fd() as u32, attach_type, flags];
    // SAFETY: attr is a live array of the length given, without pointers in it.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_ptr(), size_of_val(&attr)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(result).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given this descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

static PIPE: AtomicI32 = AtomicI32::new(-1);

extern "C" fn on_signal(signal: libc::c_int) {
    let byte = [signal as u8];
    // SAFETY: write(2) is async-signal-safe; the buffer is a live local of one byte; a bad descriptor only fails.
    unsafe { libc::write(PIPE.load(Ordering::Relaxed), byte.as_ptr().cast(), 1) };
}

/// Calls `cleanup` on a thread of its own at the first SIGINT, SIGTERM or SIGHUP, then ends the process with
/// status 128 + signal. To be called once.
pub(crate) fn on_termination(cleanup: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let (reader, writer) = io::pipe()?;
    PIPE.store(writer.into_raw_fd(), Ordering::Relaxed);
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: `on_signal` is an extern "C" function that only calls async-signal-safe functions, and it
        // lives for the whole program.
        if unsafe { libc::signal(signal, on_signal as *const () as libc::sighandler_t) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    std::thread::spawn(move || {
        let mut byte = [0u8];
        if io::Read::read_exact(&mut &reader, &mut byte).is_ok() {
            cleanup();
            std::process::exit(128 + i32::from(byte[0]));
        }
    });
    Ok(())
}
