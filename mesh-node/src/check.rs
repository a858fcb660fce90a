//! `mesh-node check`: can this host run the daemon?
//!
//! Reads files, and offers the kernel the programs as the daemon would, without attaching or keeping any. Deliberately
//! absent: a guess from the kernel's version where the kernel can be asked.

use crate::bpf::{self, Feature, Features};
use std::{
    collections::BTreeSet,
    error::Error,
    fmt, fs,
    path::{Path, PathBuf},
};

/// The oldest kernel with what nothing works without: `bpf_get_netns_cookie` in sockops came with 5.15.
const MIN_KERNEL: (u32, u32) = (5, 15);
/// `BPF_FS_MAGIC` of `linux/magic.h`.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
/// Numbers of `linux/capability.h`.
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_BPF: u32 = 39;

/// What is looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckConfig {
    /// Normally `/proc`.
    pub proc_root: PathBuf,
    /// Normally `/sys`.
    pub sys_root: PathBuf,
    /// Where cgroup2 should be mounted; found in the mount table if not given.
    pub cgroup_root: Option<PathBuf>,
    /// Where the daemon pins its maps; this folder or one above it has to be on bpffs.
    pub pin_dir: PathBuf,
    /// Features that count as missing.
    pub disabled: BTreeSet<Feature>,
}

impl Default for CheckConfig {
    fn default() -> Self {
        Self {
            proc_root: "/proc".into(),
            sys_root: "/sys".into(),
            cgroup_root: None,
            pin_dir: "/sys/fs/bpf/nodemesh".into(),
            disabled: BTreeSet::new(),
        }
    }
}

/// One line of the result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub what: &'static str,
    /// What was found, or what is wrong and what to do about it.
    pub result: Result<Found, Problem>,
}

/// Something that the daemon can work with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// As it should be.
    Good(String),
    /// Something is not there that the daemon can do without, and what that costs.
    Less(String),
}

impl From<String> for Found {
    fn from(text: String) -> Self {
        Self::Good(text)
    }
}

/// Something that is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What was found instead.
    pub found: String,
    /// What to do about it.
    pub remedy: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.result {
            Ok(Found::Good(found)) => write!(f, "ok    {:<14} {found}", self.what),
            Ok(Found::Less(cost)) => write!(f, "less  {:<14} {cost}", self.what),
            Err(p) => write!(f, "FAIL  {:<14} {}\n      {:<14} -> {}", self.what, p.found, "", p.remedy),
        }
    }
}

/// Looks at everything. The host can run the daemon if every result is `Ok`.
pub fn check(config: &CheckConfig) -> Vec<Finding> {
    let mut findings = files(config);
    findings.extend(programs(&config.disabled));
    findings
}

/// What the host's files say.
fn files(config: &CheckConfig) -> Vec<Finding> {
    let mounts = fs::read_to_string(config.proc_root.join("self/mounts")).unwrap_or_default();
    let status = fs::read_to_string(config.proc_root.join("self/status")).unwrap_or_default();
    let release = fs::read_to_string(config.proc_root.join("sys/kernel/osrelease")).unwrap_or_default();
    [
        ("kernel", kernel(release.trim())),
        ("BTF", btf(&config.sys_root.join("kernel/btf/vmlinux"))),
        ("cgroup2", cgroup2(&mounts, config.cgroup_root.as_deref())),
        ("bpffs", bpffs(&config.pin_dir)),
        ("capabilities", capabilities(&status)),
    ]
    .map(|(what, result)| Finding { what, result: result.map(Found::Good) })
    .into()
}

/// What the kernel's verifier says.
fn programs(disabled: &BTreeSet<Feature>) -> Vec<Finding> {
    let features = match Features::probe(disabled) {
        Ok(features) => features,
        Err(error) => {
            let result = problem(
                format!("the kernel does not take any program: {error}"),
                "run as root; if it is, look for a lockdown or a seccomp filter that forbids bpf(2)",
            );
            return vec![Finding { what: "programs", result }];
        }
    };
    let mut findings: Vec<Finding> = Feature::ALL
        .into_iter()
        .map(|feature| {
            let found = if features.has(feature) {
                Found::Good("there".to_owned())
            } else {
                Found::Less(format!("not there (Linux {} has it): {}", feature.since(), feature.cost()))
            };
            Finding { what: feature.name(), result: Ok(found) }
        })
        .collect();
    let remedy = "install a newer kernel; Linux 5.15 or later has what is needed";
    match bpf::try_load(&features) {
        Ok(()) => {
            let found = Found::Good("the verifier takes them".to_owned());
            findings.push(Finding { what: "programs", result: Ok(found) });
        }
        Err(refused) => findings.extend(
            refused.iter().map(|error| Finding { what: "programs", result: problem(chain(error), remedy) }),
        ),
    }
    findings
}

/// An error with its causes. The verifier's log, which is long, gives its last lines, which say why.
fn chain(error: &dyn Error) -> String {
    const LAST_LINES: usize = 6;
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    let lines: Vec<&str> = text.lines().collect();
    match lines.as_slice() {
        [first, rest @ ..] if rest.len() > LAST_LINES => {
            format!("{first} ... {}", rest[rest.len() - LAST_LINES..].join(" | "))
        }
        lines => lines.join(" | "),
    }
}

fn problem<T>(found: impl Into<String>, remedy: impl Into<String>) -> Result<T, Problem> {
    Err(Problem { found: found.into(), remedy: remedy.into() })
}

fn kernel(release: &str) -> Result<String, Problem> {
    let mut numbers = release.split(['.', '-']).map(|n| n.parse::<u32>().ok());
    let version = numbers.next().flatten().zip(numbers.next().flatten());
    match version {
        Some(v) if v >= MIN_KERNEL => Ok(format!("Linux {release}")),
        _ => problem(
            format!("Linux {release:?}"),
            format!("install Linux {}.{} or later", MIN_KERNEL.0, MIN_KERNEL.1),
        ),
    }
}

fn btf(path: &Path) -> Result<String, Problem> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() => Ok(path.display().to_string()),
        _ => problem(
            format!("{} is not there", path.display()),
            "boot a kernel with CONFIG_DEBUG_INFO_BTF=y (those of the distributions have it)",
        ),
    }
}

fn cgroup2(mounts: &str, wanted: Option<&Path>) -> Result<String, Problem> {
    let mounted: Vec<&str> = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let point = fields.next()?;
            (fields.next()? == "cgroup2").then_some(point)
        })
        .collect();
    let remedy = "mount it: mount -t cgroup2 none /sys/fs/cgroup/unified";
    match (wanted, mounted.as_slice()) {
        (Some(wanted), mounted) if mounted.iter().any(|m| Path::new(m) == wanted) => {
            Ok(wanted.display().to_string())
        }
        (Some(wanted), [first, ..]) => problem(
            format!("not mounted at {}, but at {first}", wanted.display()),
            format!("start the daemon with --cgroup-root {first}"),
        ),
        (None, [first, ..]) => Ok((*first).to_owned()),
        (_, []) => problem("not mounted", remedy),
    }
}

fn bpffs(pin_dir: &Path) -> Result<String, Problem> {
    // The daemon makes its folder itself, so the nearest one that is there counts.
    let existing = pin_dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    match nix::sys::statfs::statfs(existing) {
        // The field's type differs between architectures.
        #[allow(clippy::unnecessary_cast)]
        Ok(fs) if fs.filesystem_type().0 as i64 == BPF_FS_MAGIC => Ok(existing.display().to_string()),
        // The daemon mounts one above its folder, for which /sys/fs/bpf has to be there at least.
        Ok(_) if pin_dir.parent().is_some_and(Path::is_dir) => {
            Ok("not mounted yet; the daemon mounts it when it starts".to_owned())
        }
        _ => problem(
            format!("{} is not on bpffs", pin_dir.display()),
            "mount it: mount -t bpf bpf /sys/fs/bpf",
        ),
    }
}

fn capabilities(status: &str) -> Result<String, Problem> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    let has = |cap: u32| effective & (1 << cap) != 0;
    // CAP_SYS_ADMIN is needed for setns anyway, and stands for CAP_BPF where that does not exist yet.
    let missing: Vec<&str> = [
        ("CAP_BPF", has(CAP_BPF) || has(CAP_SYS_ADMIN)),
        ("CAP_NET_ADMIN", has(CAP_NET_ADMIN)),
        ("CAP_SYS_ADMIN", has(CAP_SYS_ADMIN)),
    ]
    .into_iter()
    .filter_map(|(name, held)| (!held).then_some(name))
    .collect();
    if missing.is_empty() {
        Ok("CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN".to_owned())
    } else {
        problem(
            format!("without {}", missing.join(" and ")),
            "run as root, or give these capabilities in the pod's securityContext",
        )
    }
}

/// All findings, one or two lines each.
pub fn render(findings: &[Finding]) -> String {
    findings.iter().map(|f| format!("{f}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels() {
        for (release, good) in [
            ("6.18.44-foo", true),
            ("5.15.0", true),
            ("5.15-rc1", true),
            ("10.0.1", true),
            ("5.14.21-default", false),
            ("4.19.0", false),
            ("", false),
            ("x.y", false),
        ] {
            assert_eq!(kernel(release).is_ok(), good, "{release}");
        }
    }

    #[test]
    fn cgroup2_is_found_and_the_right_flag_is_named() {
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let unified = Path::new("/sys/fs/cgroup/unified");
        assert_eq!(cgroup2(hybrid, None).unwrap(), "/sys/fs/cgroup/unified");
        assert!(cgroup2(hybrid, Some(unified)).is_ok());
        let wrong = cgroup2(hybrid, Some(Path::new("/sys/fs/cgroup"))).unwrap_err();
        assert!(wrong.remedy.contains("--cgroup-root /sys/fs/cgroup/unified"), "{}", wrong.remedy);
        assert!(cgroup2("cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n", None).is_err());
    }

    #[test]
    fn missing_capabilities_are_named() {
        assert!(capabilities("Name:\tx\nCapEff:\t000001ffffffffff\n").is_ok());
        let few = capabilities("CapEff:\t0000000000001000\n").unwrap_err();
        assert_eq!(few.found, "without CAP_BPF and CAP_SYS_ADMIN");
        assert!(capabilities("").is_err());
    }

    #[test]
    fn what_is_done_without_is_no_failure_but_is_said() {
        let finding = Finding { what: "getpeername", result: Ok(Found::Less("not there".to_owned())) };
        assert_eq!(render(&[finding]), "less  getpeername    not there\n");
    }

    #[test]
    fn a_long_verifier_log_gives_its_end() {
        let log: String = (0..100).map(|n| format!("{n}: (b7) r1 = 0\n")).collect();
        let text = chain(&std::io::Error::other(format!("the BPF program x was refused\n{log}unknown func")));
        assert!(text.starts_with("the BPF program x was refused ... 95:"), "{text}");
        assert!(text.ends_with("| unknown func"), "{text}");
    }

    #[test]
    fn every_problem_comes_with_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let config = CheckConfig {
            proc_root: dir.path().into(),
            sys_root: dir.path().into(),
            cgroup_root: None,
            pin_dir: dir.path().join("bpf/pins"),
            disabled: BTreeSet::new(),
        };
        let findings = files(&config);
        assert!(findings.iter().all(|f| f.result.is_err()), "{findings:?}");
        let text = render(&findings);
        assert_eq!(text.matches("FAIL").count(), 5, "{text}");
        assert_eq!(text.matches("-> ").count(), 5, "{text}");
    }
}
