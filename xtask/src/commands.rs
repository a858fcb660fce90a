//! Running other programs from the root of the workspace.

use anyhow::{Context, Result, ensure};
use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The root folder of the workspace.
pub(crate) fn root() -> &'static Path {
    // xtask is run from its checkout by `cargo xtask`: its manifest is one level below the root.
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest)
}

/// The build folder.
pub(crate) fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// `cargo` with arguments, in the root.
pub(crate) fn cargo<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).args(args);
    command
}

/// Runs a command to success; the error names it.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start {}", describe(command)))?;
    ensure!(status.success(), "{}: {status}", describe(command));
    Ok(())
}

/// Standard output of a command that succeeds.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let out =
        command.stderr(Stdio::inherit()).output().with_context(|| format!("start {}", describe(command)))?;
    ensure!(out.status.success(), "{}: {}", describe(command), out.status);
    String::from_utf8(out.stdout).with_context(|| format!("output of {}", describe(command)))
}

/// The command as one would type it.
pub(crate) fn describe(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// Whether a program is on PATH.
pub(crate) fn on_path(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    // Debian keeps administration tools out of a user's PATH.
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .any(|dir| dir.join(program).is_file())
}

/// `cargo xtask build`.
pub(crate) fn build() -> Result<()> {
    run(&mut cargo(["build", "--workspace", "--bins"]))
}

/// `cargo xtask codegen`.
pub(crate) fn codegen(check: bool) -> Result<()> {
    let mut command = cargo(["run", "--quiet", "--package", "mesh-xds", "--example", "codegen"]);
    if check {
        command.args(["--", "--check"]);
    }
    run(&mut command)
}
