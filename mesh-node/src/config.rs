//! The configuration of `mesh-node run`: raw arguments (flags or environment) and what they mean once validated.
//!
//! Precedence: flag, then environment variable (`NODEMESH_*`), then default. All errors are reported at once.

use clap::{ArgAction, Args};
use std::{net::SocketAddr, path::PathBuf, time::Duration};

/// Arguments of `mesh-node run`, as given.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// The name of this node, as in Kubernetes.
    #[arg(long, env = "NODEMESH_NODE_NAME")]
    pub node_name: String,
    /// Where the control plane serves xDS and certificates, HOST:PORT.
    #[arg(long, env = "NODEMESH_XDS_ADDRESS", default_value = "mesh-control.nodemesh-system.svc:15012")]
    pub xds_address: String,
    /// The name that the control plane's certificate must have; the host of --xds-address when not given.
    #[arg(long, env = "NODEMESH_XDS_SERVER_NAME")]
    pub xds_server_name: Option<String>,
    /// PEM file with the roots that the control plane's certificate must chain to.
    #[arg(long, env = "NODEMESH_XDS_ROOT_CA", default_value = "/var/run/secrets/nodemesh/root-cert.pem")]
    pub xds_root_ca: PathBuf,
    /// File with this node's bearer token; read anew for every call.
    #[arg(long, env = "NODEMESH_TOKEN_FILE", default_value = "/var/run/secrets/tokens/nodemesh-token")]
    pub token_file: PathBuf,
    /// The cgroup2 directory to attach to; all pods must be below it. Found by itself when not given.
    #[arg(long, env = "NODEMESH_CGROUP_ROOT")]
    pub cgroup_root: Option<PathBuf>,
    /// The cgroup2 directory that holds all pods; processes outside of it are the host's, whose probes pass STRICT.
    #[arg(long, env = "NODEMESH_PODS_CGROUP")]
    pub pods_cgroup: Option<PathBuf>,
    /// Directory on a BPF file system for pinned links and maps.
    #[arg(long, env = "NODEMESH_PIN_DIR", default_value = "/sys/fs/bpf/nodemesh")]
    pub pin_dir: PathBuf,
    /// Directory of the sockets `cni.sock`, `admin.sock` and `takeover.sock`.
    #[arg(long, env = "NODEMESH_RUN_DIR", default_value = "/run/nodemesh")]
    pub run_dir: PathBuf,
    /// Directory where the last good configuration is kept, for a start without the control plane.
    #[arg(long, env = "NODEMESH_STATE_DIR", default_value = "/var/lib/nodemesh")]
    pub state_dir: PathBuf,
    /// Keep certificates and keys in --run-dir, so that a restarted daemon serves while the CA is away.
    #[arg(long, env = "NODEMESH_KEEP_CERTIFICATES", default_value_t = true, action = ArgAction::Set)]
    pub keep_certificates: bool,
    /// Address of /metrics and /healthz.
    #[arg(long, env = "NODEMESH_METRICS_ADDR", default_value = "0.0.0.0:15020")]
    pub metrics_addr: SocketAddr,
    /// Address of the admin interface; must be a loopback address.
    #[arg(long, env = "NODEMESH_ADMIN_ADDR", default_value = "127.0.0.1:15000")]
    pub admin_addr: SocketAddr,
    /// The trust domain of the mesh.
    #[arg(long, env = "NODEMESH_TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// The cluster's name in workload uids and metrics.
    #[arg(long, env = "NODEMESH_CLUSTER_ID", default_value = "Kubernetes")]
    pub cluster_id: String,
    /// Namespace of this daemon, for its xDS node id.
    #[arg(long, env = "NODEMESH_NAMESPACE", default_value = "nodemesh-system")]
    pub namespace: String,
    /// Name of this daemon's pod, for its xDS node id; `mesh-node-NODE` when not given.
    #[arg(long, env = "NODEMESH_POD_NAME")]
    pub pod_name: Option<String>,
    /// Namespaces whose pods start without waiting for the control plane to say whether they are in the mesh.
    #[arg(
        long,
        env = "NODEMESH_EXEMPT_NAMESPACES",
        value_delimiter = ',',
        default_value = "kube-system,nodemesh-system,istio-system"
    )]
    pub exempt_namespaces: Vec<String>,
    /// Worker threads for traffic; one per core when not given.
    #[arg(long, env = "NODEMESH_WORKERS")]
    pub workers: Option<usize>,
    /// Connections that one pod may have through this daemon at a time.
    #[arg(long, env = "NODEMESH_MAX_CONNECTIONS_PER_POD", default_value_t = 16_384)]
    pub max_connections_per_pod: usize,
    /// Whether pods of this node that may talk to each other do so without the daemon in between, once it has said
    /// yes to the first connection.
    #[arg(
        long,
        env = "NODEMESH_SAME_NODE_FAST_PATH",
        default_value_t = true,
        num_args = 0..=1,
        default_missing_value = "true",
        action = clap::ArgAction::Set
    )]
    pub same_node_fast_path: bool,
    /// Requested lifetime of workload certificates, in seconds.
    #[arg(long, env = "NODEMESH_CERT_TTL_SECONDS", default_value_t = 86_400)]
    pub cert_ttl_seconds: u64,
    /// Seconds that open connections may go on after SIGTERM.
    #[arg(long, env = "NODEMESH_DRAIN_SECONDS", default_value_t = 5)]
    pub drain_seconds: u64,
    /// Features of the kernel that are not used even if they are there, for diagnosis; `mesh-node check` lists them.
    #[arg(long, env = "NODEMESH_DISABLE_FEATURES", value_delimiter = ',', hide = true)]
    pub disable_features: Vec<String>,
    /// Take over from the daemon that runs on this node, if there is one: no connection is refused, and those that are
    /// open end in the old process.
    #[arg(long, env = "NODEMESH_TAKEOVER")]
    pub takeover: bool,
    /// Seconds that open connections may go on after another daemon has taken over.
    #[arg(long, env = "NODEMESH_TAKEOVER_DRAIN_SECONDS", default_value_t = 3600)]
    pub takeover_drain_seconds: u64,
    /// Whether DNS queries of captured pods (port 53) are answered for the mesh's names; all others are forwarded.
    #[arg(long, env = "NODEMESH_DNS", default_value_t = true, action = clap::ArgAction::Set)]
    pub dns: bool,
    /// The domain of the cluster's services and pods in DNS.
    #[arg(long, env = "NODEMESH_CLUSTER_DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Log filter, for example `info` or `mesh_node=debug`; `access` is the access log's target.
    #[arg(long, env = "NODEMESH_LOG", default_value = "info")]
    pub log: String,
}

/// The configuration after validation.
#[derive(Clone, Debug)]
pub struct Config {
    /// The arguments, all of them valid.
    pub args: RunArgs,
    /// Name to verify the control plane's certificate against.
    pub xds_server_name: String,
    /// Where to attach.
    pub cgroup_root: PathBuf,
    /// Number of traffic workers, at least 1.
    pub workers: usize,
    /// Requested certificate lifetime.
    pub cert_ttl: Duration,
    /// Drain deadline.
    pub drain: Duration,
    /// Drain deadline after a takeover.
    pub takeover_drain: Duration,
}

/// One wrong argument.
#[derive(Debug, thiserror::Error)]
#[error("--{flag} {value:?}: {problem}; {remedy}")]
pub struct ConfigError {
    flag: &'static str,
    value: String,
    problem: &'static str,
    remedy: &'static str,
}

impl Config {
    /// Checks every argument; returns all problems at once.
    pub fn validate(args: RunArgs) -> Result<Self, Vec<ConfigError>> {
        let mut errors = vec![];
        let mut wrong = |flag, value: &str, problem, remedy| {
            errors.push(ConfigError { flag, value: value.to_owned(), problem, remedy });
        };
        if args.node_name.is_empty() {
            wrong("node-name", "", "is empty", "set it to the Kubernetes node name (spec.nodeName)");
        }
        let host = match args.xds_address.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p != 0) => {
                host.trim_matches(['[', ']']).to_owned()
            }
            _ => {
                wrong(
                    "xds-address",
                    &args.xds_address,
                    "is not HOST:PORT",
                    "give for example 10.0.0.5:15012",
                );
                String::new()
            }
        };
        if !args.admin_addr.ip().is_loopback() {
            let remedy = "use 127.0.0.1 or [::1]: the admin interface has no authentication";
            wrong("admin-addr", &args.admin_addr.to_string(), "is not a loopback address", remedy);
        }
        if mesh_xds::model::SpiffeId::new(&args.trust_domain, "n", "s").is_err() {
            let remedy = "use letters, digits, '.', '-' and '_' only";
            wrong("trust-domain", &args.trust_domain, "cannot be part of a SPIFFE ID", remedy);
        }
        let cgroup_root = args.cgroup_root.clone().or_else(find_cgroup2);
        if cgroup_root.as_ref().is_none_or(|dir| !dir.join("cgroup.procs").exists()) {
            let shown = args.cgroup_root.as_ref().map_or(String::new(), |d| d.display().to_string());
            wrong(
                "cgroup-root",
                &shown,
                "is not a cgroup2 directory",
                "mount cgroup2 or name its mount point",
            );
        }
        if let Some(dir) = args.pods_cgroup.as_ref().filter(|dir| !dir.join("cgroup.procs").exists()) {
            let remedy = "name the parent of the pods' cgroups, for example /sys/fs/cgroup/kubepods.slice";
            wrong("pods-cgroup", &dir.display().to_string(), "is not a cgroup2 directory", remedy);
        }
        if args.workers == Some(0) || args.workers.is_some_and(|n| n > 256) {
            wrong("workers", &args.workers.unwrap_or(0).to_string(), "is out of range", "use 1 to 256");
        }
        if !is_domain(&args.cluster_domain) {
            let remedy = "give the cluster's DNS domain, for example cluster.local";
            wrong("cluster-domain", &args.cluster_domain, "is not a domain name", remedy);
        }
        if args.max_connections_per_pod == 0 {
            wrong("max-connections-per-pod", "0", "lets no connection through", "use at least 1");
        }
        if args.cert_ttl_seconds < 60 {
            let remedy = "use at least 60, or certificates expire before they are rotated";
            wrong("cert-ttl-seconds", &args.cert_ttl_seconds.to_string(), "is too short", remedy);
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        Ok(Self {
            xds_server_name: args.xds_server_name.clone().unwrap_or(host),
            cgroup_root: cgroup_root.unwrap_or_default(),
            workers: args.workers.unwrap_or(cores),
            cert_ttl: Duration::from_secs(args.cert_ttl_seconds),
            drain: Duration::from_secs(args.drain_seconds),
            takeover_drain: Duration::from_secs(args.takeover_drain_seconds),
            args,
        })
    }

    /// The name of this daemon's pod, for its xDS node id.
    pub fn pod_name(&self) -> String {
        self.args.pod_name.clone().unwrap_or_else(|| format!("mesh-node-{}", self.args.node_name))
    }

    /// The cgroup2 directory of this process, from /proc/self/cgroup (cgroups(7)).
    pub fn own_cgroup() -> std::io::Result<PathBuf> {
        let unknown = || std::io::Error::other("this process is in no cgroup2 hierarchy, or none is mounted");
        let mount = find_cgroup2().ok_or_else(unknown)?;
        let text = std::fs::read_to_string("/proc/self/cgroup")?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::")).ok_or_else(unknown)?;
        Ok(mount.join(path.trim_start_matches('/')))
    }
}

/// Whether this is a host name of RFC 1123, with or without the final dot.
fn is_domain(text: &str) -> bool {
    let text = text.strip_suffix('.').unwrap_or(text);
    text.len() <= 200
        && text.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
}

/// The first cgroup2 mount of this host, from /proc/self/mounts (proc(5)).
pub fn find_cgroup2() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, dir, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(dir))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        run: RunArgs,
    }

    #[test]
    fn every_wrong_argument_is_named_at_once() {
        let args = Cli::parse_from([
            "x",
            "--node-name=",
            "--xds-address=nohost",
            "--admin-addr=0.0.0.0:15000",
            "--trust-domain=a/b",
            "--cgroup-root=/nonexistent",
            "--workers=0",
            "--cluster-domain=cluster..local",
            "--cert-ttl-seconds=1",
        ]);
        let errors = Config::validate(args.run).unwrap_err();
        let text: Vec<String> = errors.iter().map(ToString::to_string).collect();
        for flag in [
            "node-name",
            "xds-address",
            "admin-addr",
            "trust-domain",
            "cgroup-root",
            "workers",
            "cluster-domain",
            "cert-ttl-seconds",
        ] {
            assert!(
                text.iter().any(|t| t.starts_with(&format!("--{flag} "))),
                "{flag} is missing in {text:?}"
            );
        }
    }

    #[test]
    fn the_server_name_defaults_to_the_host() {
        let args = Cli::parse_from(["x", "--node-name=n1", "--xds-address=[fd00::1]:15012"]);
        assert_eq!(Config::validate(args.run).unwrap().xds_server_name, "fd00::1");
    }
}
