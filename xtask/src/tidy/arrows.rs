//! Which package may depend on which: `mesh-ebpf -> mesh-common <- mesh-node -> mesh-xds <- mesh-control`.

use super::Metadata;

/// Package, and the packages of the workspace that it may use.
const ALLOWED: [(&str, &[&str]); 7] = [
    ("mesh-common", &[]),
    ("mesh-ebpf", &["mesh-common"]),
    ("mesh-xds", &[]),
    ("mesh-node", &["mesh-common", "mesh-xds"]),
    ("mesh-control", &["mesh-xds"]),
    ("xtask", &[]),
    ("mesh-tests", &["mesh-common", "mesh-xds", "mesh-node", "mesh-control"]),
];

/// Packages that may use aya, besides the BPF crate's own `aya-ebpf`.
const AYA: [&str; 2] = ["mesh-node", "mesh-tests"];

pub(super) fn check(metadata: &Metadata) -> Vec<String> {
    let members: Vec<&str> = metadata.members().map(|package| package.name.as_str()).collect();
    let mut findings = Vec::new();
    for package in metadata.members() {
        let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| *name == package.name) else {
            findings.push(format!("package {}: give it a line in xtask/src/tidy/arrows.rs", package.name));
            continue;
        };
        for dependency in &package.dependencies {
            let name = dependency.name.as_str();
            if members.contains(&name) && !allowed.contains(&name) {
                findings.push(format!("package {} must not depend on {name}", package.name));
            }
            if name == "aya" && !AYA.contains(&package.name.as_str()) {
                findings.push(format!("package {} must not depend on aya", package.name));
            }
        }
        if package.name == "mesh-common" && package.dependencies.iter().any(|dep| dep.kind.is_none()) {
            findings.push(
                "package mesh-common must have no dependency: it is compiled for the kernel too".to_owned(),
            );
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::{Dependency, Package};
    use super::*;

    fn metadata(name: &str, dependencies: &[&str]) -> Metadata {
        let package = |name: &str, dependencies: &[&str]| Package {
            id: name.to_owned(),
            name: name.to_owned(),
            version: "0.1.0".to_owned(),
            license: None,
            license_file: None,
            dependencies: dependencies
                .iter()
                .map(|name| Dependency { name: (*name).to_owned(), kind: None })
                .collect(),
        };
        let packages =
            vec![package(name, dependencies), package("mesh-xds", &[]), package("mesh-control", &[])];
        let workspace_members = packages.iter().map(|package| package.id.clone()).collect();
        Metadata { packages, workspace_members }
    }

    #[test]
    fn wrong_arrows_are_found() {
        assert_eq!(check(&metadata("mesh-node", &["mesh-xds", "serde"])), Vec::<String>::new());
        assert_eq!(check(&metadata("mesh-node", &["mesh-control"])).len(), 1);
        assert_eq!(check(&metadata("mesh-ebpf", &["aya"])).len(), 1);
        assert_eq!(check(&metadata("mesh-common", &["serde"])).len(), 1);
        assert_eq!(check(&metadata("newcomer", &[])).len(), 1);
    }
}
