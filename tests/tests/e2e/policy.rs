//! Policy in force and changed at run time: authorization, STRICT and PERMISSIVE, hot reload of the configuration.

use crate::support::{PROPAGATION, assert_right, mesh, vip};
use anyhow::{Context, Result};
use mesh_tests::{app::ports, cluster::Cluster, daemons::Control, wait};

fn control(cluster: &Cluster) -> Result<&Control> {
    cluster.control.as_ref().context("no control plane")
}

fn answers(cluster: &Cluster, client: &str, to: &str) -> Result<bool> {
    let dialled = cluster.pod(client)?.dial(&format!("--to {to} --send hello --shutdown --timeout 3"))?;
    Ok(dialled.received.starts_with("hello "))
}

fn until_answers(cluster: &Cluster, client: &str, to: &str, wanted: bool) -> Result<()> {
    let what = format!("{client} -> {to} to be {}", if wanted { "allowed" } else { "denied" });
    wait::until_true(&what, PROPAGATION, || Ok(answers(cluster, client, to)? == wanted))
}

#[test]
fn authorization_is_by_identity_and_follows_edits() -> Result<()> {
    let cluster = mesh()?;
    let pay = format!("{}:80", vip::PAY);
    assert!(answers(&cluster, "shop/web-0", &pay)?);
    assert!(answers(&cluster, "shop/web-1", &pay)?, "from the same node too");
    assert!(!answers(&cluster, "shop/guest-0", &pay)?);

    let file = "30-policy.yaml";
    let old = std::fs::read_to_string(control(&cluster)?.config_dir.join(file))?;
    let guest_too = old.replace("sa/web\"", "sa/web\", \"cluster.local/ns/shop/sa/guest\"");
    assert_ne!(old, guest_too);
    control(&cluster)?.write_config(file, &guest_too)?;
    until_answers(&cluster, "shop/guest-0", &pay, true)?;
    control(&cluster)?.write_config(file, &old)?;
    until_answers(&cluster, "shop/guest-0", &pay, false)?;
    assert!(answers(&cluster, "shop/web-0", &pay)?);
    Ok(())
}

#[test]
fn deny_by_port_and_namespace() -> Result<()> {
    let cluster = mesh()?;
    control(&cluster)?.write_config(
        "90-deny.yaml",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no-echo, namespace: shop}\nspec:\n  \
         selector: {matchLabels: {app: cart}}\n  action: DENY\n  rules:\n    - from: [{source: {namespaces: [shop]}}]\n      \
         to: [{operation: {ports: [\"9001\"]}}]\n",
    )?;
    let cart = cluster.pod("shop/cart-1")?.spec.v4;
    let client = cluster.pod("shop/web-0")?;
    wait::until_true("the denied port to be closed", PROPAGATION, || {
        Ok(client.dial(&format!("--to {cart}:{} --send hello --shutdown", ports::ECHO))?.received.is_empty())
    })?;
    // The other port of the same pod, and the same port from a peer without the namespace, stay open.
    assert!(answers(&cluster, "shop/web-0", &format!("{cart}:{}", ports::WHO))?);
    let outside =
        cluster.pod("shop/batch-0")?.dial(&format!("--to {cart}:{} --send hello --shutdown", ports::ECHO))?;
    assert_eq!(outside.received, "hello\nbye\n");
    Ok(())
}

#[test]
fn a_live_connection_ends_when_policy_forbids_it() -> Result<()> {
    let cluster = mesh()?;
    let client = cluster.pod("shop/web-0")?;
    let banner = format!("dial --to {}:{} --timeout 30", vip::PAY, ports::BANNER);
    let words: Vec<&str> = banner.split(' ').collect();
    let log = cluster.run.dir().join("live.log");
    let mut live = client.place().spawn("live dial", &mesh_tests::proc::binary("pod-app")?, &words, &log)?;
    // Another one over the same path tells when the policy is in force.
    wait::until_true("the service to answer", PROPAGATION, || {
        answers(&cluster, "shop/web-0", &format!("{}:80", vip::PAY))
    })?;
    control(&cluster)?.write_config(
        "90-deny.yaml",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: nobody, namespace: shop}\nspec:\n  \
         selector: {matchLabels: {app: pay}}\n  action: DENY\n  rules: [{}]\n",
    )?;
    until_answers(&cluster, "shop/web-0", &format!("{}:80", vip::PAY), false)?;
    wait::until_true("the live connection to be ended", PROPAGATION, || Ok(live.ended()?.is_some()))?;
    assert!(!live.log().contains("timeout"), "{}", live.log());
    Ok(())
}

#[test]
fn strict_and_permissive_follow_edits() -> Result<()> {
    let cluster = mesh()?;
    let cart = cluster.pod("shop/cart-1")?.spec.v4;
    let to = format!("{cart}:{}", ports::WHO);
    assert!(answers(&cluster, "shop/batch-0", &to)?);
    let strict = |mode: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: cart, namespace: shop}}\n\
             spec:\n  selector: {{matchLabels: {{app: cart}}}}\n  mtls: {{mode: {mode}}}\n"
        )
    };
    control(&cluster)?.write_config("90-cart.yaml", &strict("STRICT"))?;
    until_answers(&cluster, "shop/batch-0", &to, false)?;
    assert!(answers(&cluster, "shop/web-0", &to)?, "mutual TLS goes on");
    control(&cluster)?.write_config("90-cart.yaml", &strict("PERMISSIVE"))?;
    until_answers(&cluster, "shop/batch-0", &to, true)?;
    Ok(())
}

#[test]
fn a_broken_file_disturbs_nothing_else() -> Result<()> {
    let cluster = mesh()?;
    control(&cluster)?.write_config("20-legacy.yaml", "kind: Service\nmetadata: {name: [broken\n")?;
    // A change in another file is the sign that the reload has happened.
    control(&cluster)?.write_config(
        "90-deny.yaml",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no-db, namespace: shop}\nspec:\n  \
         selector: {matchLabels: {app: db}}\n  action: DENY\n  rules: [{}]\n",
    )?;
    until_answers(&cluster, "shop/web-0", &format!("{}:80", vip::DB), false)?;
    let report = cluster.pod("shop/web-0")?.connects(&format!("--to {}:80 --n 100", vip::LEDGER))?;
    assert_right("a service of the broken file, last good version", &report, 100);
    Ok(())
}

#[test]
fn endpoints_follow_readiness() -> Result<()> {
    let cluster = mesh()?;
    let file = "20-legacy.yaml";
    let old = std::fs::read_to_string(control(&cluster)?.config_dir.join(file))?;
    let (before, after) = old.split_once("name: ledger-1").context("ledger-1 in the file")?;
    let unready =
        format!("{before}name: ledger-1{}", after.replacen("status: \"True\"", "status: \"False\"", 1));
    let client = cluster.pod("shop/web-0")?;
    let backends = || Ok(client.connects(&format!("--to {}:80 --n 60", vip::LEDGER))?.by_backend.len());
    assert_eq!(backends().map_err(|error: anyhow::Error| error.to_string()), Ok(2));
    control(&cluster)?.write_config(file, &unready)?;
    wait::until_true("the unready pod to get nothing", PROPAGATION, || Ok(backends()? == 1))?;
    let report =
        client.connects(&format!("--to {}:80 --n 500 --threads 4 --expect ledger-0", vip::LEDGER))?;
    assert_right("only the ready pod", &report, 500);
    control(&cluster)?.write_config(file, &old)?;
    wait::until_true("both pods to answer again", PROPAGATION, || Ok(backends()? == 2))?;
    Ok(())
}
