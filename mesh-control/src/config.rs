//! Command line -> validated settings. All mistakes are reported at once. Deliberately absent: a configuration file.

use crate::{ca::Lifetimes, index::Settings};
use clap::{Args, Parser, Subcommand};
use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

/// The control plane of nodemesh.
#[derive(Debug, Parser)]
#[command(name = "mesh-control", version, about)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the nodes.
    Run(Box<RunArgs>),
    /// Check a configuration directory, print what is wrong, and exit with 1 if there is an error.
    Check(CheckArgs),
}

/// Settings of the mesh, the same for `run` and `check`.
#[derive(Clone, Debug, Args)]
pub struct MeshArgs {
    /// The trust domain of all identities.
    #[arg(long, default_value = "cluster.local")]
    pub trust_domain: String,
    /// The cluster's id in the names of workloads.
    #[arg(long, default_value = "Kubernetes")]
    pub cluster_id: String,
    /// The suffix of service host names.
    #[arg(long, default_value = "cluster.local")]
    pub cluster_domain: String,
    /// The namespace of mesh-wide policies.
    #[arg(long, default_value = "istio-system")]
    pub root_namespace: String,
}

/// Arguments of `check`.
#[derive(Clone, Debug, Args)]
pub struct CheckArgs {
    /// The directory with YAML files.
    pub dir: PathBuf,
    /// Settings of the mesh.
    #[command(flatten)]
    pub mesh: MeshArgs,
}

/// Arguments of `run`, as they are written.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// The directory with YAML files.
    #[arg(long)]
    pub config_dir: PathBuf,
    /// Where the CA keeps its keys. The root certificate for the nodes is written to root-cert.pem in it.
    #[arg(long)]
    pub data_dir: PathBuf,
    /// File with lines `NODE TOKEN`: the bearer tokens by which nodes are known. Mode 0600.
    #[arg(long)]
    pub node_tokens: PathBuf,
    /// xDS and CA over TLS.
    #[arg(long, default_value = "0.0.0.0:15012")]
    pub xds_addr: SocketAddr,
    /// xDS in plaintext and without tokens, on loopback only; off unless given (usually 127.0.0.1:15010).
    #[arg(long)]
    pub plaintext_xds_addr: Option<SocketAddr>,
    /// Health and debug pages.
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub admin_addr: SocketAddr,
    /// Metrics.
    #[arg(long, default_value = "0.0.0.0:15014")]
    pub metrics_addr: SocketAddr,
    /// A DNS name in the server's certificate; replaces the defaults (mesh-control.nodemesh-system.svc,
    /// istiod.istio-system.svc, localhost).
    #[arg(long = "dns-name", num_args = 1..)]
    pub dns_names: Vec<String>,
    /// An address in the server's certificate, besides those of loopback.
    #[arg(long = "ip-san", num_args = 1..)]
    pub ip_sans: Vec<IpAddr>,
    /// The longest life of a workload's certificate, for example 24h or 90m.
    #[arg(long, default_value = "24h", value_parser = duration)]
    pub workload_cert_ttl: Duration,
    /// Log filter, for example info or mesh_control=debug.
    #[arg(long, default_value = "info", env = "NODEMESH_LOG")]
    pub log: String,
    /// Log as JSON lines.
    #[arg(long)]
    pub log_json: bool,
    /// Settings of the mesh.
    #[command(flatten)]
    pub mesh: MeshArgs,
}

/// Checked settings of `run`.
#[derive(Clone, Debug)]
pub struct Config {
    /// The directory with YAML files.
    pub config_dir: PathBuf,
    /// Where the CA keeps its keys.
    pub data_dir: PathBuf,
    /// The file of node tokens.
    pub node_tokens: PathBuf,
    /// xDS and CA over TLS.
    pub xds_addr: SocketAddr,
    /// xDS in plaintext on loopback.
    pub plaintext_xds_addr: Option<SocketAddr>,
    /// Health and debug pages.
    pub admin_addr: SocketAddr,
    /// Metrics.
    pub metrics_addr: SocketAddr,
    /// DNS names in the server's certificate.
    pub dns_names: Vec<String>,
    /// Addresses in the server's certificate.
    pub ip_sans: Vec<IpAddr>,
    /// Lifetimes of certificates.
    pub lifetimes: Lifetimes,
    /// What the index is told.
    pub settings: Settings,
}

/// Everything that is wrong with the arguments.
#[derive(Debug, thiserror::Error)]
#[error("the arguments are not right:\n{}", .0.iter().map(|m| format!("  {m}")).collect::<Vec<_>>().join("\n"))]
pub struct ConfigError(pub Vec<String>);

const DEFAULT_NAMES: [&str; 3] = ["mesh-control.nodemesh-system.svc", "istiod.istio-system.svc", "localhost"];

impl MeshArgs {
    /// Checks the settings of the mesh.
    pub fn settings(&self) -> Result<Settings, ConfigError> {
        let mut wrong = Vec::new();
        if mesh_xds::model::SpiffeId::new(&self.trust_domain, "ns", "sa").is_err() {
            wrong.push(format!(
                "--trust-domain {:?}: use letters, digits, '.', '-' and '_'",
                self.trust_domain
            ));
        }
        for (flag, value) in [
            ("--cluster-id", &self.cluster_id),
            ("--cluster-domain", &self.cluster_domain),
            ("--root-namespace", &self.root_namespace),
        ] {
            if value.is_empty() || value.contains('/') {
                wrong.push(format!("{flag} {value:?}: give a name without slashes"));
            }
        }
        if !wrong.is_empty() {
            return Err(ConfigError(wrong));
        }
        Ok(Settings {
            cluster_id: self.cluster_id.clone(),
            trust_domain: self.trust_domain.clone(),
            cluster_domain: self.cluster_domain.clone(),
            root_namespace: self.root_namespace.clone(),
        })
    }
}

impl RunArgs {
    /// Checks all arguments.
    pub fn config(&self) -> Result<Config, ConfigError> {
        let mut wrong = Vec::new();
        let settings = self.mesh.settings().unwrap_or_else(|e| {
            wrong.extend(e.0);
            Settings::default()
        });
        if let Some(addr) = self.plaintext_xds_addr.filter(|a| !a.ip().is_loopback()) {
            wrong.push(format!(
                "--plaintext-xds-addr {addr}: it has no TLS and no tokens; use a loopback address"
            ));
        }
        let (least, most) = (Duration::from_secs(10), Duration::from_hours(24 * 90));
        if !(least..=most).contains(&self.workload_cert_ttl) {
            wrong.push("--workload-cert-ttl: use ten seconds to 90 days".to_owned());
        }
        let dns_names: Vec<String> = match self.dns_names.as_slice() {
            [] => DEFAULT_NAMES.map(str::to_owned).to_vec(),
            given => given.to_vec(),
        };
        for name in dns_names.iter().filter(|n| rustls_pki_types::DnsName::try_from(n.as_str()).is_err()) {
            wrong.push(format!("--dns-name {name:?}: it is not a DNS name"));
        }
        if !wrong.is_empty() {
            return Err(ConfigError(wrong));
        }
        let mut ip_sans = self.ip_sans.clone();
        ip_sans.extend([IpAddr::from([127, 0, 0, 1]), IpAddr::from(std::net::Ipv6Addr::LOCALHOST)]);
        ip_sans.sort();
        ip_sans.dedup();
        Ok(Config {
            config_dir: self.config_dir.clone(),
            data_dir: self.data_dir.clone(),
            node_tokens: self.node_tokens.clone(),
            xds_addr: self.xds_addr,
            plaintext_xds_addr: self.plaintext_xds_addr,
            admin_addr: self.admin_addr,
            metrics_addr: self.metrics_addr,
            dns_names,
            ip_sans,
            lifetimes: Lifetimes { workload: self.workload_cert_ttl, ..Lifetimes::default() },
            settings,
        })
    }
}

/// Reads `24h`, `90m`, `30s`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration; write a number and s, m, h or d, for example 24h");
    let split = text.len().checked_sub(1).filter(|at| text.is_char_boundary(*at)).ok_or_else(wrong)?;
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(more: &[&str]) -> Result<Config, ConfigError> {
        let args = ["mesh-control", "run", "--config-dir", "c", "--data-dir", "d", "--node-tokens", "t"];
        match Cli::try_parse_from(args.iter().chain(more)).unwrap().command {
            Command::Run(args) => args.config(),
            Command::Check(_) => unreachable!(),
        }
    }

    #[test]
    fn defaults() {
        let config = run(&[]).unwrap();
        assert_eq!(config.xds_addr, "0.0.0.0:15012".parse().unwrap());
        assert!(config.plaintext_xds_addr.is_none());
        assert!(config.admin_addr.ip().is_loopback());
        assert_eq!(config.lifetimes.workload, Duration::from_hours(24));
        assert!(config.dns_names.contains(&"istiod.istio-system.svc".to_owned()));
        assert_eq!(config.settings, Settings::default());
    }

    #[test]
    fn all_mistakes_at_once() {
        let error = run(&[
            "--plaintext-xds-addr",
            "0.0.0.0:15010",
            "--trust-domain",
            "a b",
            "--workload-cert-ttl",
            "1s",
            "--dns-name",
            "not a name",
        ])
        .unwrap_err();
        for flag in ["--plaintext-xds-addr", "--trust-domain", "--workload-cert-ttl", "--dns-name"] {
            assert!(error.0.iter().any(|m| m.starts_with(flag)), "{flag}: {error}");
        }
        assert_eq!(error.0.len(), 4, "{error}");
    }

    #[test]
    fn durations() {
        assert_eq!(duration("90m"), Ok(Duration::from_mins(90)));
        for wrong in
            ["", "h", "5", "5w", "-1h", "1.5h", "é", "99999999999999999999h", "18446744073709551615d"]
        {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
