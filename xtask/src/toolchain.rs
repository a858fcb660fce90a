//! Finds the tool chain that builds the BPF object, and makes the build command.
//!
//! mesh-node's build script includes this file by path, so it uses std only. Two tool chains are known:
//! the distribution's (Debian: `rustc-web` and `libstd-rust-web-dev-bpf`, which carry a `core` for
//! `bpfel-unknown-none`) and rustup's nightly with `rust-src` (`-Z build-std=core`). Both link with `bpf-linker`.
//! Deliberately absent: installing anything, which is what `cargo xtask setup` is for.

use std::{
    env,
    ffi::OsString,
    fmt, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The Rust target of the object; nodemesh supports little-endian machines only.
pub const BPF_TARGET: &str = "bpfel-unknown-none";

/// The package that the object is built from.
pub const BPF_PACKAGE: &str = "mesh-ebpf";

/// Where the distribution's compiler lives: not found through PATH, since rustup's proxy usually comes first there.
const DISTRO_RUSTC: &str = "/usr/bin/rustc";
const DISTRO_CARGO: &str = "/usr/bin/cargo";

/// The oldest distribution compiler that builds the workspace (its `rust-version`).
const MIN_MINOR: u32 = 95;

/// Which compiler builds the object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compiler {
    /// The distribution's stable compiler; `RUSTC_BOOTSTRAP` opens the unstable BPF assembly feature.
    Distro {
        /// Its `rustc`.
        rustc: PathBuf,
        /// Its `cargo`.
        cargo: PathBuf,
    },
    /// `rustup run nightly`, with `core` built from `rust-src`.
    Nightly,
}

/// A complete BPF tool chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toolchain {
    /// The compiler.
    pub compiler: Compiler,
    /// `bpf-linker`.
    pub linker: PathBuf,
    /// An LLVM installation (`/usr/lib/llvm-N`) for a bpf-linker that loads it at run time.
    pub llvm: Option<PathBuf>,
}

/// What is missing; its text names every part and the remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// One line for each missing part.
    pub parts: Vec<String>,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "the tool chain for the BPF object is not complete:")?;
        for part in &self.parts {
            writeln!(f, "  - {part}")?;
        }
        write!(f, "run `cargo xtask setup`")
    }
}

impl std::error::Error for Missing {}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.compiler {
            Compiler::Distro { rustc, .. } => write!(f, "{}", rustc.display())?,
            Compiler::Nightly => write!(f, "rustup's nightly with rust-src")?,
        }
        write!(f, " and {}", self.linker.display())
    }
}

/// Finds a complete tool chain, the distribution's first.
pub fn find() -> Result<Toolchain, Missing> {
    let mut parts = Vec::new();
    let compiler = match distro() {
        Ok(compiler) => Some(compiler),
        Err(distro_lacks) => match nightly() {
            Ok(compiler) => Some(compiler),
            Err(nightly_lacks) => {
                parts.push(format!("a compiler: {distro_lacks}; and {nightly_lacks}"));
                None
            }
        },
    };
    let linker = bpf_linker();
    if linker.is_none() {
        parts.push("bpf-linker: neither on PATH nor in cargo's bin folder".to_owned());
    }
    match (compiler, linker) {
        (Some(compiler), Some(linker)) => Ok(Toolchain { compiler, linker, llvm: newest_llvm() }),
        _ => Err(Missing { parts }),
    }
}

/// The distribution's compiler, or why it cannot be used.
fn distro() -> Result<Compiler, String> {
    let (rustc, cargo) = (Path::new(DISTRO_RUSTC), Path::new(DISTRO_CARGO));
    if !rustc.exists() || !cargo.exists() {
        return Err(format!("{DISTRO_RUSTC} or {DISTRO_CARGO} is not there"));
    }
    let mut version = Command::new(rustc);
    version.arg("--version");
    let version = output(&mut version).ok_or_else(|| format!("{DISTRO_RUSTC} does not run"))?;
    match minor_version(&version) {
        Some(minor) if minor >= MIN_MINOR => {}
        _ => return Err(format!("{DISTRO_RUSTC} is {version}, older than 1.{MIN_MINOR}")),
    }
    let sysroot = sysroot(Command::new(rustc)).ok_or_else(|| format!("{DISTRO_RUSTC} has no sysroot"))?;
    if sysroot.join("lib/rustlib").join(BPF_TARGET).join("lib").is_dir() {
        Ok(Compiler::Distro { rustc: rustc.to_owned(), cargo: cargo.to_owned() })
    } else {
        Err(format!("{DISTRO_RUSTC} has no standard library for {BPF_TARGET}"))
    }
}

/// rustup's nightly, or why it cannot be used.
fn nightly() -> Result<Compiler, String> {
    let mut rustc = Command::new("rustup");
    rustc.args(["run", "nightly", "rustc"]);
    let sysroot = sysroot(rustc).ok_or_else(|| "rustup has no nightly tool chain".to_owned())?;
    if sysroot.join("lib/rustlib/src/rust/library/core").is_dir() {
        Ok(Compiler::Nightly)
    } else {
        Err("rustup's nightly has no rust-src component".to_owned())
    }
}

fn sysroot(mut rustc: Command) -> Option<PathBuf> {
    rustc.args(["--print", "sysroot"]);
    output(&mut rustc).map(PathBuf::from)
}

/// Standard output of a command that succeeds, trimmed.
fn output(command: &mut Command) -> Option<String> {
    clean_environment(command);
    let out = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

/// The minor number out of `rustc 1.MINOR.PATCH (...)`.
fn minor_version(text: &str) -> Option<u32> {
    text.split_whitespace().nth(1)?.split('.').nth(1)?.parse().ok()
}

/// `bpf-linker` on PATH or in cargo's bin folder (which is not always on PATH in CI).
fn bpf_linker() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    env::split_paths(&path)
        .chain(cargo_home.map(|home| home.join("bin")))
        .map(|dir| dir.join("bpf-linker"))
        .find(|file| file.is_file())
}

/// The newest `/usr/lib/llvm-N`.
fn newest_llvm() -> Option<PathBuf> {
    fs::read_dir("/usr/lib")
        .ok()?
        .flatten()
        .filter_map(|entry| {
            let number: u32 = entry.file_name().to_str()?.strip_prefix("llvm-")?.parse().ok()?;
            entry.path().join("lib").is_dir().then(|| (number, entry.path()))
        })
        .max_by_key(|(number, _)| *number)
        .map(|(_, path)| path)
}

/// Removes what an outer cargo or build script set and what would leak the host's flags into the BPF build.
/// Registry and network settings (`CARGO_HOME`, `CARGO_NET_*`, ...) stay.
fn clean_environment(command: &mut Command) {
    const NAMES: &[&str] = &[
        "RUSTC",
        "RUSTDOC",
        "RUSTFLAGS",
        "RUSTDOCFLAGS",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_LINKER",
        "RUSTUP_TOOLCHAIN",
        "RUST_RECURSION_COUNT",
        "CARGO",
        "MAKEFLAGS",
        "MFLAGS",
        "OUT_DIR",
        "TARGET",
        "HOST",
        "PROFILE",
        "OPT_LEVEL",
        "DEBUG",
        "NUM_JOBS",
        "LD_LIBRARY_PATH",
        "CLIPPY_ARGS",
        "CLIPPY_CONF_DIR",
        "__CARGO_FIX_PLZ",
        "__CARGO_DEFAULT_LIB_METADATA",
    ];
    const PREFIXES: &[&str] = &[
        "CARGO_ENCODED_",
        "CARGO_BUILD_",
        "CARGO_TARGET_",
        "CARGO_PROFILE_",
        "CARGO_MANIFEST_",
        "CARGO_PKG_",
        "CARGO_CFG_",
        "CARGO_FEATURE_",
        "CARGO_MAKEFLAGS",
        "CARGO_BIN_",
        "CARGO_CRATE_",
        "CARGO_PRIMARY_",
        "CARGO_INCREMENTAL",
        "DEP_",
    ];
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if NAMES.contains(&text.as_ref()) || PREFIXES.iter().any(|prefix| text.starts_with(prefix)) {
            command.env_remove(&name);
        }
    }
}

impl Toolchain {
    /// A cargo command (`build` or `clippy`) for the BPF package, complete but for further arguments.
    ///
    /// `workspace` is the root folder, `target_dir` a folder of its own (an outer cargo holds the lock of the usual
    /// one), `arch` the machine's architecture in Rust's spelling (`x86_64`).
    pub fn cargo(&self, subcommand: &str, workspace: &Path, target_dir: &Path, arch: &str) -> Command {
        let mut command = match &self.compiler {
            Compiler::Distro { cargo, .. } => Command::new(cargo),
            Compiler::Nightly => {
                let mut command = Command::new("rustup");
                command.args(["run", "nightly", "cargo"]);
                command
            }
        };
        clean_environment(&mut command);
        command.current_dir(workspace).arg(subcommand);
        command.args(["--package", BPF_PACKAGE, "--bins", "--release", "--target", BPF_TARGET]);
        command.arg("--target-dir").arg(target_dir);
        match &self.compiler {
            Compiler::Distro { rustc, .. } => {
                command.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
            }
            Compiler::Nightly => {
                command.args(["-Z", "build-std=core"]);
            }
        }
        if let Some(llvm) = &self.llvm {
            command.env("LLVM_PREFIX", llvm).env("PATH", prepend_path(&llvm.join("bin")));
        }
        let flags = [
            format!("-Clinker={}", self.linker.display()),
            format!("--cfg=bpf_target_arch=\"{arch}\""),
            // The object's BTF, which the kernel needs for the map types, comes from the debug information.
            "-Cdebuginfo=2".to_owned(),
            "-Clink-arg=--btf".to_owned(),
        ];
        command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        // The workspace's release profile is made for the host; bpf-linker does the whole-program step itself.
        command
            .env("CARGO_PROFILE_RELEASE_DEBUG", "2")
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
            .env("CARGO_PROFILE_RELEASE_PANIC", "abort");
        command
    }

    /// Where [`Toolchain::cargo`]`("build", ..)` leaves the object.
    pub fn object(target_dir: &Path) -> PathBuf {
        target_dir.join(BPF_TARGET).join("release").join(BPF_PACKAGE)
    }
}

fn prepend_path(dir: &Path) -> OsString {
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs = std::iter::once(dir.to_owned()).chain(env::split_paths(&path));
    env::join_paths(dirs).unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(
            minor_version("rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)"),
            Some(96)
        );
        assert_eq!(minor_version("rustc 1.63.0"), Some(63));
        assert_eq!(minor_version("nonsense"), None);
    }

    #[test]
    fn what_is_missing_is_named_with_the_remedy() {
        let text = Missing { parts: vec!["bpf-linker: not there".to_owned()] }.to_string();
        assert!(text.contains("bpf-linker: not there") && text.contains("cargo xtask setup"), "{text}");
    }

    #[test]
    fn the_command_builds_for_bpf_only() {
        let chain = Toolchain {
            compiler: Compiler::Distro { rustc: DISTRO_RUSTC.into(), cargo: DISTRO_CARGO.into() },
            linker: "/opt/bin/bpf-linker".into(),
            llvm: None,
        };
        let command = chain.cargo("build", Path::new("/src"), Path::new("/out"), "x86_64");
        let args: Vec<_> = command.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
        assert!(args.windows(2).any(|w| w == ["--target", BPF_TARGET]), "{args:?}");
        assert!(args.windows(2).any(|w| w == ["--target-dir", "/out"]), "{args:?}");
        let env: Vec<_> = command.get_envs().filter(|(k, _)| *k == "CARGO_ENCODED_RUSTFLAGS").collect();
        let flags = env[0].1.map(|v| v.to_string_lossy().into_owned()).unwrap_or_default();
        assert!(
            flags.contains("-Clinker=/opt/bin/bpf-linker") && flags.contains("bpf_target_arch=\"x86_64\"")
        );
        assert_eq!(
            Toolchain::object(Path::new("/out")),
            Path::new("/out/bpfel-unknown-none/release/mesh-ebpf")
        );
    }
}
