//! Every kind of bad input at once, at live daemons: each is refused with words that help, and everybody is served on.

use crate::support::{PROPAGATION, assert_right, growth, mesh, vip};
use anyhow::{Context, Result};
use mesh_tests::{
    app::ports,
    cluster::{CONTROL_V4, Cluster},
    peer::{Tunnel, open_tunnel, open_tunnel_with, send_over_tls, send_raw},
    pki::Ca,
    proc::binary,
    wait,
};
use std::{
    io::{Read, Write},
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

/// Files, and what has to be said of each.
const BROKEN: [(&str, &str, &str); 6] = [
    ("91-syntax.yaml", "kind: [", "91-syntax.yaml:2: error: not valid YAML"),
    (
        "92-kind.yaml",
        "apiVersion: v1\nkind: Gadget\nmetadata: {name: x}\n",
        "92-kind.yaml:2: warning: kind: v1 Gadget is not used by the mesh and was ignored; remove it",
    ),
    (
        "93-field.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: x, namespace: shop}\nspec:\n  clusterIP: 10.96.0.99\n  \
         ports: [{port: 0}]\n",
        "Service shop/x: spec.ports[0].port: 0 is not a port; use a number from 1 to 65535",
    ),
    (
        "94-twice.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: zz, namespace: shop}\nspec:\n  clusterIP: 10.96.0.13\n  \
         ports: [{port: 80}]\n",
        "Service shop/zz: spec.clusterIP: 10.96.0.13 belongs to Service shop/pay; this object is served without it; \
         give one of the two another address",
    ),
    (
        "95-empty.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: empty, namespace: shop}\nspec:\n  clusterIP: 10.96.0.98\n  \
         selector: {app: nobody}\n  ports: [{port: 80}]\n",
        "Service shop/empty: spec.selector: no pod has these labels, so the service has no endpoints; correct the selector",
    ),
    (
        "96-policy.yaml",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: x, namespace: legacy}\nspec:\n  \
         ruls: []\n",
        "AuthorizationPolicy legacy/x: spec.ruls: unknown field",
    ),
];

fn noise(len: u32) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn configuration(cluster: &Cluster) -> Result<()> {
    let control = cluster.control.as_ref().context("control")?;
    for (file, text, _) in BROKEN {
        control.write_config(file, text)?;
    }
    for (file, _, words) in BROKEN {
        wait::until_true(&format!("the log to say {words:?} of {file}"), PROPAGATION, || {
            Ok(control.proc.log().lines().any(|line| line.contains(file) && line.contains(words)))
        })?;
    }
    let host = cluster.node("node-a")?.host_place();
    let args = ["check".as_ref(), control.config_dir.as_os_str()];
    let checked = host.run(&binary("mesh-control")?, &args, &[], &[], Duration::from_secs(20))?;
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(!checked.status.success(), "{said}");
    for (file, _, words) in BROKEN {
        let hit = said.lines().any(|line| line.contains(file) && line.contains(words));
        assert!(hit, "{words:?} of {file} is not in\n{said}");
    }
    // What is good among it is in force: a service without endpoints refuses at once.
    wait::until_true("the empty service to refuse", PROPAGATION, || {
        Ok(cluster.pod("shop/web-0")?.dial("--to 10.96.0.98:80 --timeout 2")?.end == "connect: refused")
    })
}

/// Every listener of every daemon, with bytes that are no protocol.
fn listeners(cluster: &Cluster) -> Result<()> {
    let http = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec();
    let long = [b"GET /".as_slice(), &[b'a'; 200_000], b" HTTP/1.1\r\n\r\n"].concat();
    let pay = cluster.pod("shop/pay-0")?.spec.v4;
    let node = cluster.node("node-b")?;
    let from = &cluster.pod("shop/batch-0")?.netns;
    for bytes in [vec![], noise(5_000), vec![0; 5_000], http, long] {
        send_raw(&cluster.fabric, (CONTROL_V4, 15012).into(), &bytes)?;
        send_raw(from, (pay, 15008).into(), &bytes)?;
        for port in [15020, 15000] {
            send_raw(&node.netns, SocketAddr::from(([127, 0, 0, 1], port)), &bytes)?;
        }
        let mut cni = UnixStream::connect(node.cni_socket())?;
        cni.set_read_timeout(Some(Duration::from_secs(10)))?;
        // It may have answered before the end of the nonsense.
        let _ = cni.write_all(&bytes);
        cni.shutdown(std::net::Shutdown::Write)?;
        let _ = cni.read_to_end(&mut Vec::new());
    }
    Ok(())
}

/// Port 15008, from a stranger and from a right peer who talks nonsense.
fn tunnels(cluster: &Cluster) -> Result<()> {
    let ca = Ca::of_mesh(cluster.control.as_ref().context("control")?)?;
    let pay = cluster.pod("shop/pay-0")?.spec.v4;
    let to = SocketAddr::from((pay, 15008));
    let from = &cluster.pod("shop/batch-0")?.netns;
    let before = cluster.node("node-b")?.scrape()?;
    send_raw(from, to, b"GET / HTTP/1.1\r\n\r\n")?;
    open_tunnel(from, None, to, &format!("{pay}:{}", ports::WHO), "ping")?;
    for alpn in [&[b"http/1.1".as_slice()][..], &[]] {
        send_over_tls(from, Some(ca.issue(WEB)?), to, alpn, b"GET / HTTP/1.1\r\n\r\n")?;
    }
    for bytes in [noise(5_000), b"CONNECT x HTTP/1.1\r\n\r\n".to_vec(), vec![0; 100]] {
        let answer = send_over_tls(from, Some(ca.issue(WEB)?), to, &[b"h2"], &bytes)?;
        assert!(!String::from_utf8_lossy(&answer).contains("pay-0"), "it reached the application");
    }
    let tunnel = |authority: &str, padding| {
        open_tunnel_with(from, Some(ca.issue(WEB)?), to, authority, "ping", padding)
    };
    assert_eq!(tunnel(&pay.to_string(), 0)?, Tunnel::Status(400), "an authority without a port");
    let oversize = tunnel(&format!("{pay}:{}", ports::WHO), 1 << 20)?;
    assert!(!matches!(oversize, Tunnel::Answered(_)), "{oversize:?}");
    for reason in ["not_tls", "no_certificate", "bad_alpn", "bad_authority"] {
        wait::until_true(&format!("a refusal for {reason}"), PROPAGATION, || {
            let now = cluster.node("node-b")?.scrape()?;
            Ok(growth(&before, &now, "nodemesh_refusals_total", &[("reason", reason)]) >= 1.0)
        })?;
    }
    let Tunnel::Answered(answer) = tunnel(&format!("{pay}:{}", ports::WHO), 0)? else {
        panic!("a right request is not served any more");
    };
    assert!(answer.starts_with("ping pay-0 "), "{answer}");
    Ok(())
}

fn cni(cluster: &Cluster) -> Result<()> {
    let (node, pod) = (cluster.node("node-b")?, cluster.pod("shop/pay-0")?);
    for (netns, words) in [
        ("/run/netns/none-of-that-name", "CNI_NETNS"),
        ("/proc/self/ns/pid", "not a network namespace"),
        ("/proc/self/maps", "not a network namespace"),
    ] {
        let result = node.cni_in("ADD", pod, Path::new(netns));
        let error = result.err().map(|error| format!("{error:#}")).unwrap_or_default();
        assert!(error.contains(words) && error.contains("shop/pay-0"), "{netns}: {error}");
        assert!(error.contains("\"code\":4"), "{netns}: {error}");
    }
    Ok(())
}

#[test]
fn nothing_that_is_said_to_the_daemons_keeps_them_from_serving() -> Result<()> {
    let mut cluster = mesh()?;
    let pids = |cluster: &Cluster| -> Result<Vec<u32>> {
        let control = cluster.control.as_ref().context("control")?;
        Ok(vec![
            control.proc.pid(),
            cluster.node("node-a")?.daemon()?.proc.pid(),
            cluster.node("node-b")?.daemon()?.proc.pid(),
        ])
    };
    let before = pids(&cluster)?;
    configuration(&cluster)?;
    listeners(&cluster)?;
    tunnels(&cluster)?;
    cni(&cluster)?;
    cluster.control.as_mut().context("control")?.proc.check_running()?;
    for name in ["node-a", "node-b"] {
        cluster.node_mut(name)?.daemon.as_mut().context("daemon")?.proc.check_running()?;
        let node = cluster.node(name)?;
        assert_eq!(node.http("/healthz/ready")?, (200, "ok\n".to_owned()), "{name}");
        assert_eq!(node.scrape()?.sum("nodemesh_xds_connected", &[]), 1.0, "{name}");
        let log = node.daemon()?.proc.log();
        assert!(!log.contains("panicked"), "{name} panicked");
    }
    assert_eq!(pids(&cluster)?, before);
    for service in [vip::PAY, vip::DB, vip::CART, vip::LEDGER] {
        let report =
            cluster.pod("shop/web-0")?.connects(&format!("--to {service}:80 --n 100 --threads 4"))?;
        assert_right(service, &report, 100);
    }
    Ok(())
}
