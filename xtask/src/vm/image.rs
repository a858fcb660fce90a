//! The initramfs of a test machine.

use super::Kernel;
use crate::commands::{output, root, run, target_dir};
use anyhow::{Context, Result, ensure};
use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The first process of the machine.
const INIT: &str = include_str!("init.sh");

/// Where the programs are in the machine. The tests look for the daemons one folder above their own.
const PROGRAMS: &str = "nodemesh/debug";

/// What the harness runs and the tests use, from this machine; `nft` and `iptables` where they are.
const TOOLS: [&str; 3] = ["ip", "nft", "iptables"];

/// Parts of the kernel's modules that the tests can need, below `kernel/`.
const MODULES: [&str; 9] = [
    "net/",
    "lib/",
    "crypto/",
    "arch/x86/crypto/",
    "drivers/net/veth",
    "drivers/net/dummy",
    "drivers/net/net_failover",
    "fs/overlayfs",
    "drivers/char/hw_random",
];

/// Makes the image and returns its path.
pub(super) fn make(place: &Path, kernel: &Kernel, tests: &Path, variables: &str) -> Result<PathBuf> {
    let tree = place.join("root");
    if tree.exists() {
        fs::remove_dir_all(&tree).with_context(|| format!("remove {}", tree.display()))?;
    }
    for dir in ["bin", "sbin", "usr/bin", "usr/sbin", "proc", "sys", "dev", "run", "tmp", "etc", PROGRAMS] {
        fs::create_dir_all(tree.join(dir))?;
    }
    fs::create_dir_all(tree.join(PROGRAMS).join("deps"))?;
    copy(&program("busybox")?, &tree.join("bin/busybox"))?;

    let mut libraries = BTreeSet::new();
    let mut add = |from: &Path, to: &str| {
        libraries.extend(libraries_of(from)?);
        copy(from, &tree.join(to))
    };
    for name in ["mesh-node", "mesh-control", "mesh-cni", "pod-app", "nodemesh-demo"] {
        add(&target_dir().join("debug").join(name), &format!("{PROGRAMS}/{name}"))?;
    }
    add(tests, &format!("{PROGRAMS}/deps/e2e"))?;
    for name in TOOLS {
        if let Ok(path) = program(name) {
            add(&path, &format!("usr/sbin/{name}"))?;
        }
    }
    for library in libraries {
        copy(&library, &tree.join(library.strip_prefix("/").unwrap_or(&library)))?;
    }
    // The extensions of iptables are libraries that it opens by name.
    for dir in ["/usr/lib/x86_64-linux-gnu/xtables", "/lib/x86_64-linux-gnu/xtables"] {
        copy_files(Path::new(dir), &tree, |name| name.contains("DNAT") || name.contains("standard"))?;
    }
    // The tests know the manifests and the demo by the paths that they have here.
    let examples = root().join("deploy/examples/quickstart");
    copy_files(&examples.canonicalize()?, &tree, |_| true)?;
    for path in [examples, root().join("tests")] {
        fs::create_dir_all(inside(&tree, &path))?;
    }
    let demo = inside(&tree, &target_dir().join("debug/nodemesh-demo"));
    fs::create_dir_all(demo.parent().unwrap_or(&tree))?;
    symlink(Path::new("/").join(PROGRAMS).join("nodemesh-demo"), &demo).context("link the demo")?;

    modules(kernel, &tree)?;
    fs::write(tree.join("vm.conf"), variables)?;
    fs::write(tree.join("init"), INIT)?;
    fs::set_permissions(tree.join("init"), fs::Permissions::from_mode(0o755))?;
    pack(&tree, &place.join("initrd.gz"))
}

/// The path of this machine's `path` inside the image.
fn inside(tree: &Path, path: &Path) -> PathBuf {
    tree.join(path.strip_prefix("/").unwrap_or(path))
}

/// Copies the files (not the folders) of a folder to the same path in the image.
fn copy_files(dir: &Path, tree: &Path, wanted: impl Fn(&str) -> bool) -> Result<()> {
    let Ok(entries) = fs::read_dir(dir) else { return Ok(()) };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_file() && wanted(&entry.file_name().to_string_lossy()) {
            copy(&entry.path(), &inside(tree, &entry.path()))?;
        }
    }
    Ok(())
}

/// The modules, unpacked, with their index.
fn modules(kernel: &Kernel, tree: &Path) -> Result<()> {
    let release = kernel.release();
    let to = tree.join("lib/modules").join(&release);
    fs::create_dir_all(&to)?;
    copy_files_flat(&kernel.modules, &to)?;
    let mut stack = vec![kernel.modules.join("kernel")];
    while let Some(dir) = stack.pop() {
        for entry in fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                stack.push(path);
                continue;
            }
            let below = path.strip_prefix(&kernel.modules).unwrap_or(&path).to_owned();
            let name = below.to_string_lossy();
            let inner = name.strip_prefix("kernel/").unwrap_or(&name);
            if !MODULES.iter().any(|part| inner.starts_with(part)) {
                continue;
            }
            let copied = to.join(&below);
            copy(&path, &copied)?;
            if name.ends_with(".xz") {
                run(Command::new("xz").arg("-d").arg(&copied))?;
            } else if name.ends_with(".zst") {
                run(Command::new("zstd").args(["-q", "-d", "--rm"]).arg(&copied))?;
            }
        }
    }
    run(Command::new("busybox").arg("depmod").arg("-b").arg(tree).arg(&release))
}

/// The lists that come with the modules: which are built in, and in which order.
fn copy_files_flat(from: &Path, to: &Path) -> Result<()> {
    for name in ["modules.builtin", "modules.order"] {
        if from.join(name).is_file() {
            copy(&from.join(name), &to.join(name))?;
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let dir = to.parent().unwrap_or(to);
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    fs::copy(from, to).map(drop).with_context(|| format!("copy {} to {}", from.display(), to.display()))
}

/// Where a program of this machine is.
fn program(name: &str) -> Result<PathBuf> {
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("no program {name}"))
}

/// The libraries and the loader of a program, by the paths that it knows them by.
fn libraries_of(path: &Path) -> Result<Vec<PathBuf>> {
    let listed = output(Command::new("ldd").arg(path).stderr(Stdio::null()))?;
    Ok(listed.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

/// Packs the tree in the form that the kernel reads.
fn pack(tree: &Path, image: &Path) -> Result<PathBuf> {
    let script = "find . -print0 | cpio --null --create --format=newc --quiet | gzip -1 > \"$1\"";
    let status = Command::new("sh")
        .args(["-c", script, "sh"])
        .arg(image.canonicalize().unwrap_or_else(|_| image.to_owned()))
        .current_dir(tree)
        .status()
        .context("pack the initramfs")?;
    ensure!(status.success() && image.is_file(), "the initramfs could not be packed: {status}");
    Ok(image.to_owned())
}
