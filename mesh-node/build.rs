//! Builds the BPF object (package mesh-ebpf) into `OUT_DIR`, from where `bpf::datapath` embeds it.

// The build script uses a part of the file; xtask uses the rest.
#[allow(dead_code, unreachable_pub)]
#[path = "../xtask/src/toolchain.rs"]
mod toolchain;

use std::{env, error::Error, fs, path::Path, process::ExitCode};

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), Box<dyn Error>> {
    for path in ["mesh-ebpf", "mesh-common", "xtask/src/toolchain.rs", "Cargo.lock"] {
        println!("cargo:rerun-if-changed=../{path}");
    }
    let manifest = env::var("CARGO_MANIFEST_DIR")?;
    let workspace = Path::new(&manifest).parent().ok_or("mesh-node has no parent folder")?;
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    let out = env::var("OUT_DIR")?;
    // OUT_DIR is PROFILE/build/PACKAGE-HASH/out, and there is one for each set of features: they share the BPF build.
    let profile = Path::new(&out).ancestors().nth(3).ok_or("OUT_DIR is not below a profile's folder")?;
    let target_dir = profile.join("bpf");

    let chain = toolchain::find()?;
    let status = chain.cargo("build", workspace, &target_dir, &arch).status()?;
    if !status.success() {
        return Err(format!("the BPF object did not build with {chain}: {status}").into());
    }
    // A new file, not new content: a copied build folder may share the old one with another by a hard link.
    let object = Path::new(&out).join("mesh-ebpf.o");
    if object.exists() {
        fs::remove_file(&object)?;
    }
    fs::copy(toolchain::Toolchain::object(&target_dir), &object)?;
    Ok(())
}
