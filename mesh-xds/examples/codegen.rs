//! Writes `src/gen/` from `proto/`, or compares the two with `--check` (exit code 1 when they differ).
//!
//! A normal build generates nothing and needs no `protoc`: the output is checked in, and this program, which uses a
//! protobuf compiler written in Rust, is run when a proto changes.

use std::{collections::BTreeMap, error::Error, fs, path::Path, process::ExitCode};

const PROTOS: [&str; 6] = [
    "google/rpc/status.proto",
    "envoy/discovery.proto",
    "istio/workload.proto",
    "istio/authorization.proto",
    "istio/ca.proto",
    "nodemesh/v1.proto",
];

fn generate() -> Result<BTreeMap<String, String>, Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let descriptors = protox::compile(PROTOS, [&root])?;
    let out = tempfile::tempdir()?;
    tonic_prost_build::configure()
        .out_dir(out.path())
        .include_file("mod.rs")
        // Our own Any holds Bytes, so that one encoded resource is shared by all streams that send it.
        .extern_path(".google.protobuf.Any", "crate::wire::Any")
        .bytes(".")
        .btree_map(".istio")
        .btree_map(".nodemesh")
        .emit_rerun_if_changed(false)
        .compile_fds(descriptors)?;
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(out.path())? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        files.insert(name, fs::read_to_string(entry.path())?);
    }
    Ok(files)
}

fn checked_in(dir: &Path) -> Result<BTreeMap<String, String>, Box<dyn Error>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        files.insert(entry.file_name().to_string_lossy().into_owned(), fs::read_to_string(entry.path())?);
    }
    Ok(files)
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/gen");
    let wanted = generate()?;
    if std::env::args().any(|a| a == "--check") {
        let found = checked_in(&dir)?;
        if found == wanted {
            return Ok(ExitCode::SUCCESS);
        }
        for name in wanted.keys().chain(found.keys()) {
            if wanted.get(name) != found.get(name) {
                eprintln!("src/gen/{name} is not what proto/ gives; run: cargo xtask codegen");
            }
        }
        return Ok(ExitCode::FAILURE);
    }
    fs::create_dir_all(&dir)?;
    for name in checked_in(&dir)?.keys().filter(|n| !wanted.contains_key(*n)) {
        fs::remove_file(dir.join(name))?;
    }
    for (name, text) in &wanted {
        fs::write(dir.join(name), text)?;
    }
    println!("wrote {} files to {}", wanted.len(), dir.display());
    Ok(ExitCode::SUCCESS)
}
