//! Which network namespaces are in use by anybody but this daemon.
//!
//! The daemon's own sockets and descriptors keep a pod's namespace alive, so its end cannot be seen from the
//! namespace itself. A namespace is in use while a process is in it or a bind mount (the container runtime's)
//! holds it. Deliberately absent: asking a container runtime.

use crate::net::NsId;
use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// The numeric folders of `/proc`.
pub(super) fn processes(proc_root: &Path) -> io::Result<impl Iterator<Item = PathBuf>> {
    Ok(fs::read_dir(proc_root)?.filter_map(|entry| {
        let entry = entry.ok()?;
        let name = entry.file_name();
        name.to_str()?.bytes().all(|b| b.is_ascii_digit()).then(|| entry.path())
    }))
}

/// The network namespace of the process at `proc_dir`; `None` when the process is gone or is a zombie.
pub(super) fn netns_of(proc_dir: &Path) -> Option<NsId> {
    let meta = fs::metadata(proc_dir.join("ns/net")).ok()?;
    Some(NsId { dev: meta.dev(), ino: meta.ino() })
}

/// Every network namespace that a process is in or that is bind-mounted where this process or process 1 can
/// see it.
pub fn namespaces_in_use(proc_root: &Path) -> io::Result<HashSet<NsId>> {
    let mut found: HashSet<NsId> = processes(proc_root)?.filter_map(|dir| netns_of(&dir)).collect();
    for process in ["self", "1"] {
        if let Ok(mounts) = fs::read_to_string(proc_root.join(process).join("mountinfo")) {
            found.extend(mounts.lines().filter_map(mounted_netns));
        }
    }
    Ok(found)
}

/// The namespace that a line of `/proc/PID/mountinfo` (proc(5)) is a bind mount of.
fn mounted_netns(line: &str) -> Option<NsId> {
    let (front, back) = line.split_once(" - ")?;
    if back.split(' ').next()? != "nsfs" {
        return None;
    }
    let mut fields = front.split(' ').skip(2);
    let (major, minor) = fields.next()?.split_once(':')?;
    let ino = fields.next()?.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()?;
    Some(NsId { dev: nix::sys::stat::makedev(major.parse().ok()?, minor.parse().ok()?), ino })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_network_namespaces_are_told_from_others() {
        let line = "742 24 0:4 net:[4026532288] /run/netns/cni-1 rw shared:190 - nsfs nsfs rw";
        assert_eq!(mounted_netns(line), Some(NsId { dev: 4, ino: 4026532288 }));
        for other in [
            "743 24 0:4 mnt:[4026532289] /run/x rw - nsfs nsfs rw",
            "24 1 0:22 / /run rw,nosuid - tmpfs tmpfs rw",
            "24 1 0:22 net:[1] /run rw,nosuid - tmpfs tmpfs rw",
            "742 24 0:4 net:[x] /run/netns/cni-1 rw - nsfs nsfs rw",
            "",
        ] {
            assert_eq!(mounted_netns(other), None, "{other}");
        }
    }

    #[test]
    fn the_namespace_of_this_process_is_in_use() {
        let used = namespaces_in_use(Path::new("/proc")).unwrap();
        assert!(used.contains(&netns_of(Path::new("/proc/self")).unwrap()));
    }
}
