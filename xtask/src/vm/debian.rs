//! Kernels of Debian's archive, fetched with apt into a folder of its own: the machine's sources, lists and packages
//! stay as they are, and apt checks the signatures with Debian's keyring.

use super::Kernel;
use crate::commands::{output, run};
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Fetches the cloud kernel of a suite, or finds the one that was fetched before.
pub(super) fn fetch(suite: &str, base: &Path) -> Result<Kernel> {
    let name = |c: char| c.is_ascii_alphanumeric() || c == '-';
    ensure!(!suite.is_empty() && suite.chars().all(name), "{suite:?} is no name of a Debian suite");
    let place = base.join("debian").join(suite);
    if let Some(kernel) = unpacked(&place) {
        return Ok(kernel);
    }
    let apt = Apt::new(&place, suite)?;
    run(apt.command("apt-get").args(["--quiet", "update"]))?;
    let target = format!("linux-image-cloud-amd64/{suite}");
    let image = depends(&output(apt.command("apt-cache").args(["show", &target]))?, "linux-image-")
        .into_iter()
        .next()
        .with_context(|| format!("{target} names no kernel"))?;
    // Newer packages are split in two.
    let shown = output(apt.command("apt-cache").args(["show", &image]))?;
    let mut packages = depends(&shown, "linux-binary-");
    packages.extend(depends(&shown, "linux-modules-"));
    if packages.is_empty() {
        packages.push(image);
    }
    let debs = place.join("debs");
    fs::create_dir_all(&debs)?;
    run(apt.command("apt-get").arg("download").args(&packages).current_dir(&debs))?;
    let tree = place.join("tree");
    for entry in fs::read_dir(&debs)? {
        run(Command::new("dpkg-deb").arg("-x").arg(entry?.path()).arg(&tree))?;
    }
    unpacked(&place).with_context(|| format!("no kernel in {}", tree.display()))
}

/// The kernel below a folder that [`fetch`] filled.
fn unpacked(place: &Path) -> Option<Kernel> {
    let tree = place.join("tree");
    let modules = ["lib/modules", "usr/lib/modules"]
        .iter()
        .filter_map(|dir| fs::read_dir(tree.join(dir)).ok()?.flatten().next())
        .map(|entry| entry.path())
        .next()?;
    let release = modules.file_name()?.to_str()?;
    let image = [tree.join(format!("boot/vmlinuz-{release}")), modules.join("vmlinuz")]
        .into_iter()
        .find(|image| image.is_file())?;
    Some(Kernel { image, modules })
}

/// Dependencies of the first paragraph of `apt-cache show` whose names begin with `prefix`.
fn depends(shown: &str, prefix: &str) -> Vec<String> {
    let paragraph = shown.split("\n\n").next().unwrap_or_default();
    let line = paragraph.lines().find_map(|line| line.strip_prefix("Depends:")).unwrap_or_default();
    line.split([',', '|'])
        .filter_map(|part| part.split_whitespace().next())
        .filter(|name| name.starts_with(prefix))
        .map(str::to_owned)
        .collect()
}

/// The mirror that this machine gets its own Debian from; it has the other suites too.
fn mirror() -> Result<String> {
    let mut targets = Command::new("apt-get");
    targets.args(["indextargets", "--format", "$(SITE) $(RELEASE)", "Created-By: Packages"]);
    mirror_of(&output(&mut targets)?)
        .context("apt knows no mirror of Debian; add one to its sources, or give the kernel by --kernel")
}

/// The site of the first suite that is a release of its own, not the updates or the security of one.
fn mirror_of(targets: &str) -> Option<String> {
    let mut sites = targets.lines().filter_map(|line| line.split_once(' '));
    sites
        .find(|(site, suite)| site.ends_with("/debian") && !suite.contains('-'))
        .map(|(site, _)| site.to_owned())
}

/// apt with its own sources and lists.
struct Apt {
    dir: PathBuf,
}

impl Apt {
    fn new(place: &Path, suite: &str) -> Result<Self> {
        let dir = place.join("apt");
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(part)).with_context(|| format!("create {}", dir.display()))?;
        }
        let dir = dir.canonicalize()?;
        let mirror = mirror()?;
        fs::write(dir.join("sources.list"), format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n"))?;
        Ok(Self { dir })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for (option, path) in [
            ("Dir::Etc::sourcelist", self.dir.join("sources.list")),
            ("Dir::Etc::sourceparts", self.dir.join("none")),
            ("Dir::State::lists", self.dir.join("lists")),
            ("Dir::Cache", self.dir.join("cache")),
        ] {
            command.arg("-o").arg(format!("{option}={}", path.display()));
        }
        command.args(["-o", "APT::Sandbox::User=root"]);
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_that_of_the_release_itself() {
        let targets = "https://a.example/tools stable\nhttps://b.example/debian-security x-security\n\
                       https://c.example/debian x-updates\nhttps://d.example/debian x\n";
        assert_eq!(mirror_of(targets).as_deref(), Some("https://d.example/debian"));
        assert_eq!(mirror_of(""), None);
    }

    #[test]
    fn dependencies_of_the_first_paragraph() {
        let shown = "Package: a\nDepends: linux-image-6.1.0-50-cloud-amd64 (= 6.1.176-1), x | y\n\n\
                     Package: a\nDepends: linux-image-5\n";
        assert_eq!(depends(shown, "linux-image-"), ["linux-image-6.1.0-50-cloud-amd64"]);
        assert!(depends(shown, "linux-modules-").is_empty());
    }
}
