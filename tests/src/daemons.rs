//! Starting the real daemons and the real CNI plugin of a cluster.

use crate::{
    cgroup::Cgroup,
    cluster::{CONTROL_V4, Cluster, Node, Pod},
    metrics::{Scrape, http_get},
    proc::{Place, Proc, binary},
    wait,
};
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::{
    ffi::OsString,
    net::Ipv4Addr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

/// How long a daemon may take until it serves.
const START: Duration = Duration::from_secs(30);

/// The control plane of a cluster, in the fabric's namespace.
#[derive(Debug)]
pub struct Control {
    /// The process.
    pub proc: Proc,
    /// The directory of YAML that it serves; a copy, so that a test may edit it.
    pub config_dir: PathBuf,
    /// Its state: keys and the root certificate.
    pub data_dir: PathBuf,
}

impl Control {
    /// The root certificate (PEM), for nodes and for tests that speak to the mesh themselves.
    pub fn root_ca(&self) -> PathBuf {
        self.data_dir.join("root-cert.pem")
    }

    /// Writes a file of the configuration; the control plane reloads it by itself.
    pub fn write_config(&self, file: &str, yaml: &str) -> Result<()> {
        // Written aside and renamed: a half-written file must never be seen.
        let partial = self.config_dir.join(format!(".{file}.new"));
        std::fs::write(&partial, yaml)?;
        std::fs::rename(&partial, self.config_dir.join(file)).with_context(|| format!("write {file}"))
    }

    /// Removes a file of the configuration.
    pub fn remove_config(&self, file: &str) -> Result<()> {
        std::fs::remove_file(self.config_dir.join(file)).with_context(|| format!("remove {file}"))
    }
}

/// The daemon of one node.
#[derive(Debug)]
pub struct NodeDaemon {
    /// The process.
    pub proc: Proc,
}

/// What may differ between starts of a node daemon.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// `--log`.
    pub log: String,
    /// More flags.
    pub extra: Vec<String>,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self { log: "info".to_owned(), extra: Vec::new() }
    }
}

impl Node {
    /// The CNI socket of its daemon.
    pub fn cni_socket(&self) -> PathBuf {
        self.dir.join("cni.sock")
    }

    /// Where host processes (kubelet, the container runtime) run.
    pub fn host_place(&self) -> Place<'_> {
        Place { cgroup: &self.host_cgroup, netns: Some(&self.netns) }
    }

    /// The running daemon.
    pub fn daemon(&self) -> Result<&NodeDaemon> {
        self.daemon.as_ref().with_context(|| format!("node {} has no daemon", self.spec.name))
    }

    /// Scrapes the daemon's metrics.
    pub fn scrape(&self) -> Result<Scrape> {
        let (status, body) = self.http("/metrics")?;
        if status != 200 {
            bail!("/metrics of {} answered {status}", self.spec.name);
        }
        Scrape::parse(&body)
    }

    /// GET on the daemon's port 15020.
    pub fn http(&self, path: &str) -> Result<(u16, String)> {
        self.netns.within(|| http_get((Ipv4Addr::LOCALHOST, 15020).into(), path))
    }

    /// Polls the metrics until `probe` holds.
    pub fn until_metrics(&self, what: &str, mut probe: impl FnMut(&Scrape) -> bool) -> Result<Scrape> {
        wait::until(what, Duration::from_secs(10), || {
            let scrape = self.scrape()?;
            Ok(probe(&scrape).then_some(scrape))
        })
    }

    /// Runs the CNI plugin for a pod, as the container runtime of this node would: chained after the plugin that
    /// made the interface. Returns the plugin's standard output; its error object is the error.
    pub fn cni(&self, command: &str, pod: &Pod) -> Result<String> {
        let addresses = [format!("{}/24", pod.spec.v4), format!("{}/64", pod.spec.v6)];
        self.cni_call(command, pod, &addresses, &pod.netns.path())
    }

    /// [`Self::cni`] for a pod that was given these addresses.
    pub fn cni_with(&self, command: &str, pod: &Pod, addresses: &[String]) -> Result<String> {
        self.cni_call(command, pod, addresses, &pod.netns.path())
    }

    /// [`Self::cni`] with another path of the network namespace.
    pub fn cni_in(&self, command: &str, pod: &Pod, netns: &Path) -> Result<String> {
        let addresses = [format!("{}/24", pod.spec.v4), format!("{}/64", pod.spec.v6)];
        self.cni_call(command, pod, &addresses, netns)
    }

    fn cni_call(&self, command: &str, pod: &Pod, addresses: &[String], netns: &Path) -> Result<String> {
        let conf = cni_conf(&self.cni_socket(), pod, addresses);
        let spec = &pod.spec;
        let args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
            spec.namespace,
            spec.name,
            container_id(pod),
            spec.uid
        );
        let env: [(&str, OsString); 6] = [
            ("CNI_COMMAND", command.into()),
            ("CNI_CONTAINERID", container_id(pod).into()),
            ("CNI_NETNS", netns.into()),
            ("CNI_IFNAME", "eth0".into()),
            ("CNI_ARGS", args.into()),
            ("CNI_PATH", "/opt/cni/bin".into()),
        ];
        let no_args: [&str; 0] = [];
        let output = self.host_place().run(&binary("mesh-cni")?, &no_args, &env, conf.as_bytes(), START)?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!("mesh-cni {command} for {}: {}: {stdout} {stderr}", pod.key(), output.status);
        }
        Ok(stdout)
    }
}

/// The id that the container runtime gave to the pod's sandbox: 64 hexadecimal digits, here from the UID.
pub fn container_id(pod: &Pod) -> String {
    let digits: String = pod.spec.uid.chars().filter(char::is_ascii_hexdigit).collect();
    format!("{digits:0<64}")
}

fn cni_conf(socket: &Path, pod: &Pod, addresses: &[String]) -> String {
    let ips: Vec<_> = addresses.iter().map(|address| json!({ "address": address, "interface": 0 })).collect();
    json!({
        "cniVersion": "1.1.0",
        "name": "pods",
        "type": "mesh-cni",
        "socketPath": socket,
        "prevResult": {
            "cniVersion": "1.1.0",
            "interfaces": [{ "name": "eth0", "sandbox": pod.netns.path() }],
            "ips": ips,
        },
    })
    .to_string()
}

impl Cluster {
    /// Starts the control plane on a copy of `config` and waits until its root certificate is there and xDS listens.
    pub fn start_control(&mut self, config: &Path) -> Result<()> {
        self.start_control_with(config, &[])
    }

    /// [`Self::start_control`] with more flags.
    pub fn start_control_with(&mut self, config: &Path, extra: &[&str]) -> Result<()> {
        let dir = self.run.dir().join("control");
        let (config_dir, data_dir) = (dir.join("config"), dir.join("data"));
        std::fs::create_dir_all(&config_dir)?;
        for entry in std::fs::read_dir(config).with_context(|| format!("read {}", config.display()))? {
            let entry = entry?;
            std::fs::copy(entry.path(), config_dir.join(entry.file_name()))?;
        }
        let tokens: String = self
            .nodes
            .iter()
            .map(|node| format!("{} {}\n", node.spec.name, token(&node.spec.name)))
            .collect();
        write_secret(&dir.join("node-tokens"), &tokens)?;
        self.launch_control(&config_dir, &data_dir, extra)
    }

    /// Starts the control plane again on the directories of [`Self::start_control`], for example after a kill.
    pub fn restart_control(&mut self) -> Result<()> {
        let control = self.control.take().context("no control plane was started")?;
        let (config_dir, data_dir) = (control.config_dir.clone(), control.data_dir.clone());
        drop(control);
        self.launch_control(&config_dir, &data_dir, &[])
    }

    fn launch_control(&mut self, config_dir: &Path, data_dir: &Path, extra: &[&str]) -> Result<()> {
        let dir = self.run.dir().join("control");
        let mut args: Vec<OsString> = vec![
            "run".into(),
            "--config-dir".into(),
            config_dir.into(),
            "--data-dir".into(),
            data_dir.into(),
            "--node-tokens".into(),
            dir.join("node-tokens").into(),
            "--xds-addr".into(),
            "0.0.0.0:15012".into(),
            "--admin-addr".into(),
            "127.0.0.1:8080".into(),
            "--metrics-addr".into(),
            "0.0.0.0:15014".into(),
            "--trust-domain".into(),
            "cluster.local".into(),
            "--cluster-id".into(),
            "Kubernetes".into(),
            "--ip-san".into(),
            CONTROL_V4.to_string().into(),
        ];
        args.extend(extra.iter().map(OsString::from));
        let cgroup = self.run.cgroup()?.child("control")?;
        let place = Place { cgroup: &cgroup, netns: Some(&self.fabric) };
        let proc =
            place.spawn("mesh-control", &binary("mesh-control")?, &args, &dir.join("mesh-control.log"))?;
        let mut control = Control { proc, config_dir: config_dir.to_owned(), data_dir: data_dir.to_owned() };
        let (fabric, root) = (&self.fabric, control.root_ca());
        control.proc.until("mesh-control to serve xDS", START, |_| {
            let listens = fabric.within(|| {
                let addr = (CONTROL_V4, 15012).into();
                Ok(std::net::TcpStream::connect_timeout(&addr, Duration::from_millis(200)).is_ok())
            })?;
            Ok(listens && root.exists())
        })?;
        self.control = Some(control);
        Ok(())
    }

    /// Starts the daemon of a node and waits until it is ready.
    pub fn start_node(&mut self, name: &str, options: &NodeOptions) -> Result<()> {
        self.launch_node(name, options)?;
        self.wait_node_ready(name)
    }

    /// Starts the daemon of a node without waiting.
    pub fn launch_node(&mut self, name: &str, options: &NodeOptions) -> Result<()> {
        let proc = self.spawn_node(name, options, &self.node(name)?.daemon_cgroup, "mesh-node.log")?;
        self.node_mut(name)?.daemon = Some(NodeDaemon { proc });
        Ok(())
    }

    /// Starts one more daemon on a node, which takes over from the running one, in a cgroup of its own as another pod
    /// would have. Returns the old one once the new one runs.
    pub fn take_over(&mut self, name: &str, options: &NodeOptions) -> Result<NodeDaemon> {
        let (mut proc, old) = self.begin_takeover(name, options)?;
        let ready = proc.until(&format!("the successor on {name} to run"), START * 2, |proc| {
            Ok(proc.log().contains("mesh_node::role::node: running"))
        });
        self.node_mut(name)?.daemon = Some(NodeDaemon { proc });
        ready?;
        Ok(old)
    }

    /// Starts a daemon that is to take over, and takes the running one from its node. The caller puts back the one that
    /// serves in the end.
    pub fn begin_takeover(&mut self, name: &str, options: &NodeOptions) -> Result<(Proc, NodeDaemon)> {
        let node = self.node_mut(name)?;
        node.takeovers += 1;
        let number = node.takeovers;
        let cgroup = node.cgroup.child(&format!("daemon-{number}"))?;
        let mut options = options.clone();
        options.extra.push("--takeover".to_owned());
        let proc = self.spawn_node(name, &options, &cgroup, &format!("mesh-node-{number}.log"))?;
        let old = self.node_mut(name)?.daemon.take().context("no daemon to take over from")?;
        Ok((proc, old))
    }

    fn spawn_node(&self, name: &str, options: &NodeOptions, cgroup: &Cgroup, log: &str) -> Result<Proc> {
        let control = self.control.as_ref().context("start the control plane first")?;
        let node = self.node(name)?;
        let token_file = node.dir.join("token");
        write_secret(&token_file, &token(name))?;
        let mut args: Vec<OsString> = vec!["run".into()];
        let flags: [(&str, OsString); 14] = [
            ("--node-name", name.into()),
            ("--xds-address", format!("{CONTROL_V4}:15012").into()),
            ("--xds-root-ca", control.root_ca().into()),
            ("--token-file", token_file.into()),
            ("--cgroup-root", node.cgroup.path().into()),
            ("--pods-cgroup", node.pods_cgroup.path().into()),
            ("--pin-dir", node.pin_dir.clone().into()),
            ("--run-dir", node.dir.clone().into()),
            ("--state-dir", node.dir.join("state").into()),
            ("--metrics-addr", "0.0.0.0:15020".into()),
            ("--admin-addr", "127.0.0.1:15000".into()),
            ("--trust-domain", "cluster.local".into()),
            ("--cluster-id", "Kubernetes".into()),
            ("--log", options.log.clone().into()),
        ];
        for (flag, value) in flags {
            args.extend([flag.into(), value]);
        }
        args.extend(options.extra.iter().map(OsString::from));
        let place = Place { cgroup, netns: Some(&node.netns) };
        place.spawn(&format!("mesh-node {name}"), &binary("mesh-node")?, &args, &node.dir.join(log))
    }

    /// Waits until the daemon of a node says that it is ready.
    pub fn wait_node_ready(&mut self, name: &str) -> Result<()> {
        let node = self.node_mut(name)?;
        let mut daemon = node.daemon.take().with_context(|| format!("node {name} has no daemon"))?;
        let ready = daemon.proc.until(&format!("mesh-node {name} to be ready"), START, |_| {
            let (status, body) = node.http("/healthz/ready")?;
            anyhow::ensure!(status == 200, "/healthz/ready answers {status}: {}", body.trim());
            Ok(true)
        });
        let ready = ready.with_context(|| format!("mesh-node {name} did not become ready"));
        node.daemon = Some(daemon);
        ready
    }

    /// Enrols all pods through the CNI plugin of their node, as a container runtime does at their start. Pods that
    /// the configuration leaves out are offered too: the daemon decides.
    pub fn enrol_all(&self) -> Result<()> {
        for pod in &self.pods {
            self.node(&pod.spec.node)?.cni("ADD", pod)?;
        }
        Ok(())
    }

    /// Everything at once: control plane on `config`, a daemon per node, every pod enrolled, applications started.
    pub fn start_mesh(&mut self, config: &Path) -> Result<()> {
        self.start_control(config)?;
        let names: Vec<String> = self.nodes.iter().map(|node| node.spec.name.clone()).collect();
        for name in &names {
            self.launch_node(name, &NodeOptions::default())?;
        }
        for name in &names {
            self.wait_node_ready(name)?;
        }
        self.enrol_all()?;
        self.start_apps()
    }
}

/// The bootstrap token of a node. Not a secret worth the name: it lives as long as the run and in its files only.
pub fn token(node: &str) -> String {
    format!("test-token-{node}-0123456789abcdef")
}

fn write_secret(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?)
}
