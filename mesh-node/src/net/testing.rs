//! Network namespaces for tests. They need root; without it the tests that use them say so and pass.

use super::NetNs;
use nix::sched::{CloneFlags, unshare};
use std::{process::Command, thread};

/// A new, empty network namespace that lives as long as the value; loopback is up.
pub(crate) fn fresh() -> Option<NetNs> {
    // On a thread of its own, which ends in the new namespace.
    let made = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).ok()?;
        Some(NetNs::current().unwrap())
    });
    let ns = made.join().unwrap();
    match &ns {
        Some(ns) => ip(ns, &["link", "set", "lo", "up"]),
        None => eprintln!("not tested: making a network namespace needs root"),
    }
    ns
}

/// A fresh namespace with `addrs` (with prefix lengths) on a link that is up.
pub(crate) fn with_addresses(addrs: &[&str]) -> Option<NetNs> {
    let ns = fresh()?;
    ip(&ns, &["link", "add", "eth0", "type", "veth", "peer", "name", "peer0"]);
    ip(&ns, &["link", "set", "peer0", "up"]);
    ip(&ns, &["link", "set", "eth0", "up"]);
    for addr in addrs {
        ip(&ns, &["addr", "add", addr, "dev", "eth0", "nodad"]);
    }
    Some(ns)
}

/// Runs `ip` inside the namespace: a child process inherits the namespace of the thread that forks it.
pub(crate) fn ip(ns: &NetNs, args: &[&str]) {
    let output = ns.run(|| Command::new("ip").args(args).output()).unwrap().unwrap();
    assert!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}
