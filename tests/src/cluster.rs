//! Nodes and pods: namespaces, cgroups, addresses, routes, and the processes in them.

use crate::{
    app::{BulkReport, ConnectsReport, HoldReport},
    cgroup::Cgroup,
    daemons::{Control, NodeDaemon},
    fixture::{Fixture, NodeSpec, PodSpec},
    netns::NetNs,
    proc::{Place, Proc, binary},
    run::Run,
    sniff::Capture,
};
use anyhow::{Context, Result, bail};
use std::{
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::Output,
    time::Duration,
};

/// Where the control plane listens on the fabric.
pub const CONTROL_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 254);
const CONTROL_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, 0xfe);

/// Deadline of a command in a pod unless said otherwise.
const COMMAND: Duration = Duration::from_secs(120);

/// A node's namespaces, groups, directories and daemon.
#[derive(Debug)]
pub struct Node {
    /// What it was made from.
    pub spec: NodeSpec,
    /// The node's own ("host") network namespace.
    pub netns: NetNs,
    /// The node's cgroup root.
    pub cgroup: Cgroup,
    /// The daemon's group.
    pub daemon_cgroup: Cgroup,
    /// The group of other host processes (kubelet, container runtime, CNI plugins).
    pub host_cgroup: Cgroup,
    /// The parent of the pods' groups.
    pub pods_cgroup: Cgroup,
    /// Sockets, logs and files of this node.
    pub dir: PathBuf,
    /// A bpffs directory for pins.
    pub pin_dir: PathBuf,
    /// The daemon, once started.
    pub daemon: Option<NodeDaemon>,
    /// How many daemons were started to take over.
    pub takeovers: usize,
}

/// A pod's namespace, group and process.
#[derive(Debug)]
pub struct Pod {
    /// What it was made from.
    pub spec: PodSpec,
    /// Its network namespace.
    pub netns: NetNs,
    /// Its group, named `pod<UID>`.
    pub cgroup: Cgroup,
    /// Its application, once started.
    pub app: Option<Proc>,
}

impl Pod {
    /// `NAMESPACE/NAME`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.spec.namespace, self.spec.name)
    }

    /// The same pod without its application, for threads that run clients in it.
    pub fn handle(&self) -> Self {
        Self { spec: self.spec.clone(), netns: self.netns.clone(), cgroup: self.cgroup.clone(), app: None }
    }

    /// Where its processes run.
    pub fn place(&self) -> Place<'_> {
        Place { cgroup: &self.cgroup, netns: Some(&self.netns) }
    }

    /// Runs `pod-app` in the pod to its end.
    pub fn app_output<S: AsRef<std::ffi::OsStr>>(&self, args: &[S], deadline: Duration) -> Result<Output> {
        self.place().run(&binary("pod-app")?, args, &[], &[], deadline)
    }

    /// Runs `pod-app` in the pod and parses its line of JSON. `args` is split at blanks.
    pub fn app_json<T: serde::de::DeserializeOwned>(&self, args: &str) -> Result<T> {
        self.app_json_within(args, COMMAND)
    }

    /// [`Self::app_json`] with another deadline.
    pub fn app_json_within<T: serde::de::DeserializeOwned>(
        &self,
        args: &str,
        deadline: Duration,
    ) -> Result<T> {
        let words: Vec<&str> = args.split_whitespace().collect();
        let output = self.app_output(&words, deadline)?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!("pod-app {args} in {}: {}: {}", self.key(), output.status, stderr.trim());
        }
        serde_json::from_slice(&output.stdout).with_context(|| format!("output of pod-app {args}"))
    }

    /// `pod-app connects ARGS`.
    pub fn connects(&self, args: &str) -> Result<ConnectsReport> {
        self.app_json(&format!("connects {args}"))
    }

    /// `pod-app udp ARGS`.
    pub fn udp(&self, args: &str) -> Result<ConnectsReport> {
        self.app_json(&format!("udp {args}"))
    }

    /// `pod-app bulk ARGS`.
    pub fn bulk(&self, args: &str) -> Result<BulkReport> {
        self.app_json_within(&format!("bulk {args}"), Duration::from_secs(300))
    }

    /// `pod-app hold`: a connection to `to` that stays busy while `file` exists. Fails if it breaks before.
    pub fn hold(&self, to: &str, file: &Path) -> Result<HoldReport> {
        self.app_json_within(&format!("hold --to {to} --while {}", file.display()), Duration::from_secs(600))
    }

    /// `pod-app dial ARGS`: how a single connection went.
    pub fn dial(&self, args: &str) -> Result<Dialled> {
        self.app_json(&format!("dial {args}"))
    }
}

/// Result of `pod-app dial`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
pub struct Dialled {
    /// What came back.
    pub received: String,
    /// How many bytes were taken (`--fill`).
    pub taken: u64,
    /// How it ended: `eof`, `connect: refused`, `read: reset`, `read: timeout`, ...
    pub end: String,
}

/// A cluster on one kernel. Dropping it ends and removes everything.
#[derive(Debug)]
pub struct Cluster {
    // Fields are dropped in this order: processes before the run that removes what they use.
    /// The pods, in fixture order.
    pub pods: Vec<Pod>,
    /// The nodes, by number.
    pub nodes: Vec<Node>,
    /// The control plane, once started.
    pub control: Option<Control>,
    /// The wire between the nodes; the control plane lives here too.
    pub fabric: NetNs,
    /// What owns it all.
    pub run: Run,
    /// How many pods were ever made, for names that are not used twice.
    pods_made: usize,
}

impl Cluster {
    /// Makes the namespaces and groups of all nodes and pods of a fixture. No process is started.
    pub fn new(fixture: &Fixture) -> Result<Self> {
        let run = Run::begin()?;
        let fabric = NetNs::create(&run.name("fabric"))?;
        fabric.ip(&format!(
            "link add br0 type bridge\naddr add {CONTROL_V4}/24 dev br0\naddr add {CONTROL_V6}/64 dev br0 nodad\n\
             link set br0 up\n"
        ))?;
        let mut cluster =
            Self { pods: Vec::new(), nodes: Vec::new(), control: None, fabric, run, pods_made: 0 };
        for spec in &fixture.nodes {
            let node = cluster.make_node(spec, &fixture.nodes)?;
            cluster.nodes.push(node);
        }
        for spec in &fixture.pods {
            cluster.add_pod(spec)?;
        }
        Ok(cluster)
    }

    fn make_node(&self, spec: &NodeSpec, all: &[NodeSpec]) -> Result<Node> {
        let netns = NetNs::create(&self.run.name(&spec.name))?;
        // Without an address of its own a bridge takes its lowest port's, and loses it with that pod.
        let mut batch = format!(
            "link add eth0 type veth peer name n{number} netns {fabric}\n\
             addr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\nlink set eth0 up\n\
             link add cni0 address 02:00:00:00:00:{number:02x} type bridge\naddr add {gw4}/24 dev cni0\naddr add {gw6}/64 dev cni0 nodad\n\
             link set cni0 up\n",
            number = spec.number,
            fabric = self.fabric.name(),
            v4 = spec.v4(),
            v6 = spec.v6(),
            gw4 = spec.gateway_v4(),
            gw6 = spec.gateway_v6(),
        );
        for other in all.iter().filter(|other| other.number != spec.number) {
            batch += &format!(
                "route add {}/24 via {}\nroute add {}/64 via {}\n",
                other.pod_v4(0),
                other.v4(),
                other.pod_v6(0),
                other.v6()
            );
        }
        netns.sysctl("net/ipv4/ip_forward", "1")?;
        netns.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        netns.ip(&batch)?;
        self.fabric.ip(&format!("link set n{} master br0 up\n", spec.number))?;

        let cgroup = self.run.cgroup()?.child(&spec.name)?;
        let dir = self.run.dir().join(&spec.name);
        std::fs::create_dir_all(&dir)?;
        let pin_dir = self.run.bpffs().join(&spec.name);
        std::fs::create_dir_all(&pin_dir).with_context(|| format!("create {}", pin_dir.display()))?;
        Ok(Node {
            spec: spec.clone(),
            netns,
            daemon_cgroup: cgroup.child("daemon")?,
            host_cgroup: cgroup.child("host")?,
            pods_cgroup: cgroup.child("pods")?,
            cgroup,
            dir,
            pin_dir,
            daemon: None,
            takeovers: 0,
        })
    }

    /// Makes one more pod and returns its index.
    pub fn add_pod(&mut self, spec: &PodSpec) -> Result<usize> {
        self.pods_made += 1;
        let made = self.pods_made;
        let node = self.node(&spec.node)?;
        let netns = NetNs::create(&self.run.name(&format!("{}-{}", spec.namespace, spec.name)))?;
        let veth = format!("p{made}");
        netns.ip(&format!(
            "link add eth0 address {} type veth peer name {veth} netns {}\n\
             addr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\nlink set eth0 up\n\
             route add default via {}\nroute add default via {}\n",
            mac(spec.v4),
            node.netns.name(),
            spec.v4,
            spec.v6,
            node.spec.gateway_v4(),
            node.spec.gateway_v6(),
        ))?;
        node.netns.ip(&format!("link set {veth} master cni0 up\n"))?;
        let cgroup = node.pods_cgroup.child(&format!("pod{}", spec.uid))?;
        self.pods.push(Pod { spec: spec.clone(), netns, cgroup, app: None });
        Ok(self.pods.len() - 1)
    }

    /// Ends a pod's application and removes the pod, its group and its namespace, as the container runtime does after
    /// CNI DEL (which is the caller's).
    pub fn remove_pod(&mut self, key: &str) -> Result<PodSpec> {
        let at =
            self.pods.iter().position(|pod| pod.key() == key).with_context(|| format!("no pod {key}"))?;
        let Pod { spec, netns, cgroup, app } = self.pods.remove(at);
        drop(app);
        // As the plugin that made it does: sockets of the daemon may keep the namespace for a while, and it must not
        // answer for an address that another pod may have by then.
        netns.ip("link delete eth0\n")?;
        netns.remove()?;
        crate::cgroup::remove_tree(cgroup.path())?;
        Ok(spec)
    }

    /// A node by name.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes.iter().find(|node| node.spec.name == name).with_context(|| format!("no node {name}"))
    }

    /// A node by name, to be changed.
    pub fn node_mut(&mut self, name: &str) -> Result<&mut Node> {
        self.nodes.iter_mut().find(|node| node.spec.name == name).with_context(|| format!("no node {name}"))
    }

    /// A pod by `NAMESPACE/NAME`.
    pub fn pod(&self, key: &str) -> Result<&Pod> {
        self.pods.iter().find(|pod| pod.key() == key).with_context(|| format!("no pod {key}"))
    }

    /// Starts the applications of all pods that have one and waits until they serve.
    pub fn start_apps(&mut self) -> Result<()> {
        let program = binary("pod-app")?;
        let logs = self.run.dir();
        for pod in self.pods.iter_mut().filter(|pod| !pod.spec.args.is_empty() && pod.app.is_none()) {
            pod.app = Some(start_app(pod, &program, &logs)?);
        }
        for pod in &mut self.pods {
            let name = format!("the application of {}", pod.key());
            let serves = pod.spec.args.first().is_some_and(|command| command == "serve");
            if let Some(app) = pod.app.as_mut().filter(|_| serves) {
                app.until(&name, Duration::from_secs(10), |app| Ok(app.log().contains("ready")))?;
            }
        }
        Ok(())
    }

    /// Begins a packet capture of everything between the nodes.
    pub fn capture(&self) -> Result<Capture> {
        Capture::start(&self.fabric)
    }
}

/// The address of a pod's interface. From its IPv4 address, so that neighbours need not forget an old one when an address
/// comes again (the plugins announce it; here nobody does).
fn mac(v4: Ipv4Addr) -> String {
    let [a, b, c, d] = v4.octets();
    format!("02:00:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

fn start_app(pod: &Pod, program: &Path, logs: &Path) -> Result<Proc> {
    let log = logs.join(format!("app-{}-{}.log", pod.spec.namespace, pod.spec.name));
    let proc = pod.place().spawn(&format!("app of {}", pod.key()), program, &pod.spec.args, &log)?;
    Ok(proc.quiet())
}
