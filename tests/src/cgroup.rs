//! The cgroup tree of a run: finding cgroup2, creating groups, ending what runs in them, removing them.

use anyhow::{Context, Result, bail};
use std::{
    fs::File,
    path::{Path, PathBuf},
    time::Duration,
};

/// The mount point of cgroup2: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on hybrid machines.
pub fn mount_point() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    find_cgroup2(&mounts)
        .context("no cgroup2 is mounted; `mount -t cgroup2 none /sys/fs/cgroup/unified` makes one")
}

fn find_cgroup2(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, target, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(target))
    })
}

/// A cgroup (version 2) directory that the harness created.
#[derive(Clone, Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Creates the directory with its parents.
    pub fn create(path: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&path).with_context(|| format!("create cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    /// Creates a child group; `name` may have several components.
    pub fn child(&self, name: &str) -> Result<Self> {
        Self::create(self.path.join(name))
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens `cgroup.procs` for joining.
    pub fn procs(&self) -> Result<File> {
        let path = self.path.join("cgroup.procs");
        File::options().write(true).open(&path).with_context(|| format!("open {}", path.display()))
    }

    /// Moves this process into the group.
    pub fn join(&self) -> Result<()> {
        std::fs::write(self.path.join("cgroup.procs"), "0")
            .with_context(|| format!("join {}", self.path.display()))
    }
}

/// Ends every process below `root` and removes the tree. A missing tree is fine.
pub fn remove_tree(root: &Path) -> Result<()> {
    if !root.exists() {
        return Ok(());
    }
    std::fs::write(root.join("cgroup.kill"), "1")
        .with_context(|| format!("cgroup.kill of {}", root.display()))?;
    crate::wait::until_true("processes of the run to end", Duration::from_secs(20), || {
        let events = std::fs::read_to_string(root.join("cgroup.events"))?;
        Ok(events.lines().any(|line| line == "populated 0"))
    })?;
    remove_dirs(root)
}

fn remove_dirs(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_dirs(&entry.path())?;
        }
    }
    // A process that has just ended may keep its group busy for a moment.
    let gone =
        crate::wait::until_true(
            "the cgroup to be free",
            Duration::from_secs(5),
            || match std::fs::remove_dir(dir) {
                Ok(()) => Ok(true),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(true),
                Err(error) => Err(error.into()),
            },
        );
    if let Err(error) = gone {
        bail!("remove cgroup {}: {error:#}", dir.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_cgroup2_on_unified_and_hybrid_machines() {
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(find_cgroup2(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        let unified = "cgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0\n";
        assert_eq!(find_cgroup2(unified), Some(PathBuf::from("/sys/fs/cgroup")));
        assert_eq!(find_cgroup2("cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n"), None);
    }
}
