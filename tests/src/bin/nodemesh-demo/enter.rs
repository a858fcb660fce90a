//! `nodemesh-demo exec`: the network namespace and the cgroup of a pod or node, as a container runtime's exec does.
//! Both are needed: capture is attached to the node's cgroup.

use anyhow::{Context, Result, bail};
use mesh_tests::{cluster::Cluster, netns::NetNs, proc::Place, run};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, convert::Infallible, os::unix::process::CommandExt, path::PathBuf};

#[derive(Serialize, Deserialize)]
struct Entry {
    netns: String,
    cgroup: PathBuf,
}

const FILE: &str = "places.json";

/// Notes where pods and nodes are, for `exec` of another process.
pub(crate) fn write_places(cluster: &Cluster) -> Result<()> {
    let nodes = cluster.nodes.iter().map(|node| (node.spec.name.clone(), &node.netns, &node.host_cgroup));
    let pods = cluster.pods.iter().map(|pod| (pod.key(), &pod.netns, &pod.cgroup));
    let places: BTreeMap<String, Entry> = nodes
        .chain(pods)
        .map(|(name, netns, cgroup)| {
            (name, Entry { netns: netns.name().to_owned(), cgroup: cgroup.path().to_owned() })
        })
        .collect();
    let file = cluster.run.dir().join(FILE);
    std::fs::write(&file, serde_json::to_vec(&places)?).with_context(|| format!("write {}", file.display()))
}

/// Becomes the command inside the place.
pub(crate) fn exec(place: &str, command: &[String]) -> Result<Infallible> {
    let mut found = None;
    for dir in run::live_dirs()? {
        let Ok(bytes) = std::fs::read(dir.join(FILE)) else { continue };
        let mut places: BTreeMap<String, Entry> = serde_json::from_slice(&bytes)?;
        if found.is_some() {
            bail!("more than one demo is up; end one of them first");
        }
        let known = places.keys().cloned().collect::<Vec<_>>().join(", ");
        found = Some(
            places.remove(place).with_context(|| format!("no pod or node {place}; there are: {known}"))?,
        );
    }
    let entry = found.context("no demo is up; start one with `cargo xtask demo`")?;
    let [program, args @ ..] = command else { bail!("no command") };
    let netns = NetNs::existing(&entry.netns);
    let cgroup = mesh_tests::cgroup::Cgroup::create(entry.cgroup)?;
    let mut command = Place { cgroup: &cgroup, netns: Some(&netns) }.command(program.as_ref(), args)?;
    // In the foreground of its terminal, unlike the harness's own children.
    command.process_group(nix::unistd::getpgrp().as_raw());
    Err(command.exec()).with_context(|| format!("run {program}"))
}
