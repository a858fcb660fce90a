//! Finds the pods that run already when the daemon starts, by their processes: a pod's UID is in the path of
//! its cgroup, in the form of kubelet's systemd or cgroupfs driver, or as `podUID` below a folder of the
//! operator's choice (nodes without a kubelet).
//!
//! Deliberately absent: names of pods. The control plane knows a pod by its addresses, which are read in the
//! namespace.

use super::alive::{netns_of, processes};
use crate::net::{NetNs, NetNsError, NsId};
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

/// Where to look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScanConfig {
    /// Normally `/proc`; of the host, if the daemon has a PID namespace of its own.
    pub proc_root: PathBuf,
    /// Where the cgroup2 hierarchy is mounted.
    pub cgroup_root: PathBuf,
    /// The folder of that hierarchy (or its path within it) that holds the pods as `podUID`. With it, only
    /// processes below it count; without it, kubelet's folders are recognised.
    pub pods_cgroup: Option<PathBuf>,
}

impl Default for ScanConfig {
    fn default() -> Self {
        Self { proc_root: "/proc".into(), cgroup_root: "/sys/fs/cgroup".into(), pods_cgroup: None }
    }
}

/// A running pod.
#[derive(Debug)]
pub struct Found {
    /// Its UID.
    pub uid: String,
    /// Its network namespace.
    pub netns: NetNs,
}

/// Finds running pods with a network namespace of their own, each namespace once.
pub fn scan(config: &ScanConfig) -> io::Result<Vec<Found>> {
    let root = config.pods_cgroup.as_ref().map(|path| within(path, &config.cgroup_root));
    let hosts: Vec<NsId> = ["self", "1"].iter().filter_map(|p| netns_of(&config.proc_root.join(p))).collect();
    let mut pods: BTreeMap<NsId, Found> = BTreeMap::new();
    for dir in processes(&config.proc_root)? {
        // A process may end at any moment; it is then simply not there.
        let Some(id) = netns_of(&dir) else { continue };
        if hosts.contains(&id) || pods.contains_key(&id) {
            continue;
        }
        let Ok(cgroups) = fs::read_to_string(dir.join("cgroup")) else { continue };
        let Some(uid) = pod_uid(&cgroups, root.as_deref()) else { continue };
        match NetNs::open(&dir.join("ns/net")) {
            Ok(netns) if netns.id() == id => drop(pods.insert(id, Found { uid, netns })),
            Ok(_) | Err(NetNsError::Open { .. }) => {}
            Err(e) => tracing::warn!(uid, error = %e, "a running pod cannot be looked at"),
        }
    }
    Ok(pods.into_values().collect())
}

/// `path` as `/proc/PID/cgroup` shows it: within the hierarchy, without a slash at the end.
fn within(path: &Path, cgroup_root: &Path) -> String {
    let inner = path.strip_prefix(cgroup_root).unwrap_or(path);
    format!("/{}", inner.to_string_lossy().trim_matches('/'))
}

/// The pod UID in the text of `/proc/PID/cgroup` (cgroups(7)), on any hierarchy.
pub fn pod_uid(cgroups: &str, pods_cgroup: Option<&str>) -> Option<String> {
    cgroups.lines().find_map(|line| {
        let path = line.splitn(3, ':').nth(2)?;
        match pods_cgroup {
            Some(root) => below_root(path, root),
            None => kubelets(path),
        }
    })
}

/// `ROOT/.../podUID/...`
fn below_root(path: &str, root: &str) -> Option<String> {
    let inner = match root {
        "/" => path,
        _ => path.strip_prefix(root).filter(|rest| rest.starts_with('/'))?,
    };
    inner.split('/').find_map(|name| name.strip_prefix("pod").and_then(valid_uid))
}

/// cgroupfs driver: `/kubepods/burstable/podUID/CONTAINER`; systemd driver:
/// `/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID_WITH_UNDERSCORES.slice/cri-...scope`.
/// kubelet's `--cgroup-root` may put folders or a prefix (`kubelet-kubepods...`) before either.
fn kubelets(path: &str) -> Option<String> {
    let mut below_kubepods = false;
    for name in path.split('/') {
        if let Some(slice) = name.strip_suffix(".slice") {
            if let Some((front, uid)) = slice.rsplit_once("-pod")
                && front.contains("kubepods")
            {
                return valid_uid(&uid.replace('_', "-"));
            }
        } else if below_kubepods && let Some(uid) = name.strip_prefix("pod") {
            return valid_uid(uid);
        }
        below_kubepods |= name == "kubepods";
    }
    None
}

/// A UUID, or the hash that static pods have instead.
fn valid_uid(uid: &str) -> Option<String> {
    let ok = (1..=64).contains(&uid.len()) && uid.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    ok.then(|| uid.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "6a1f3e0c-8d55-4c1e-9a6b-0d6f0f5d7c11";
    const UNDERSCORED: &str = "6a1f3e0c_8d55_4c1e_9a6b_0d6f0f5d7c11";

    #[test]
    fn kubelets_forms() {
        for (cgroups, expected) in [
            (
                format!(
                    "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNDERSCORED}.slice/cri-containerd-77.scope\n"
                ),
                Some(UID),
            ),
            (format!("0::/kubepods.slice/kubepods-pod{UNDERSCORED}.slice/crio-77.scope\n"), Some(UID)),
            (
                format!("0::/../../kubepods-besteffort-pod{UNDERSCORED}.slice/cri-containerd-77.scope\n"),
                Some(UID),
            ),
            (
                format!(
                    "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{UNDERSCORED}.slice/x.scope"
                ),
                Some(UID),
            ),
            (format!("0::/kubepods/burstable/pod{UID}/77aa\n"), Some(UID)),
            (format!("0::/kubepods/pod{UID}/77aa\n"), Some(UID)),
            (
                format!(
                    "12:cpu,cpuacct:/kubepods/besteffort/pod{UID}/77\n3:memory:/x\n0::/system.slice/containerd.service\n"
                ),
                Some(UID),
            ),
            (
                "0::/kubepods/burstable/pod0123456789abcdef0123456789abcdef/1\n".into(),
                Some("0123456789abcdef0123456789abcdef"),
            ),
            ("0::/system.slice/podman.service\n".into(), None),
            ("0::/user.slice/user-0.slice/podracer\n".into(), None),
            (format!("0::/pod{UID}/x\n"), None),
            ("0::/kubepods/burstable\n".into(), None),
            ("0::/kubepods/burstable/pod/x\n".into(), None),
            ("0::/\n".into(), None),
            ("garbage".into(), None),
            (String::new(), None),
        ] {
            assert_eq!(pod_uid(&cgroups, None).as_deref(), expected, "{cgroups}");
        }
    }

    #[test]
    fn below_a_folder_of_ones_own() {
        let root = Some("/mesh/node-a/pods");
        for (cgroups, expected) in [
            ("0::/mesh/node-a/pods/podabc-1", Some("abc-1")),
            ("0::/mesh/node-a/pods/podabc-1/app", Some("abc-1")),
            ("0::/mesh/node-a/pods", None),
            ("0::/mesh/node-a/pods-other/podabc-1", None),
            ("0::/mesh/node-b/pods/podabc-1", None),
            ("0::/kubepods/burstable/podabc-1/x", None),
        ] {
            assert_eq!(pod_uid(cgroups, root).as_deref(), expected, "{cgroups}");
        }
        assert_eq!(pod_uid("0::/podabc", Some("/")).as_deref(), Some("abc"));
    }

    #[test]
    fn the_folder_may_be_given_either_way() {
        let root = Path::new("/sys/fs/cgroup/unified");
        for given in ["/sys/fs/cgroup/unified/mesh/pods", "/mesh/pods/", "mesh/pods"] {
            assert_eq!(within(Path::new(given), root), "/mesh/pods");
        }
        assert_eq!(within(root, root), "/");
    }
}
