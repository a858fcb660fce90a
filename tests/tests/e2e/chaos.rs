//! Everything at once, at random: pods come and go (and take each other's addresses), policies flip, daemons are killed,
//! stopped and upgraded, the control plane goes away, the wire loses and delays packets. Meanwhile clients connect
//! without a pause, and each answer is checked for its destination, its identity and its payload.
//!
//! What may never happen, whatever else does: an answer by another service's pod, another payload or client address, a
//! client let in that policy or STRICT keep out, an exchange without an end, a lost exchange with a service outside the
//! mesh. Refusals of mesh services are counted only. At the end, all of it works again.
//!
//! `NODEMESH_CHAOS_SEED` and `NODEMESH_CHAOS_SECONDS` choose another run; a failure names its seed.

use crate::support::{PROPAGATION, assert_right, bare, quickstart, vip};
use anyhow::{Context, Result, ensure};
use mesh_tests::{
    app::{ConnectsReport, ports},
    cluster::{Cluster, Pod},
    daemons::{NodeDaemon, NodeOptions},
    faults,
    fixture::PodSpec,
    relay::Relay,
    wait,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use std::{
    collections::BTreeMap,
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

const SEED: u64 = 20_260_821;
const SECONDS: u64 = 40;

/// How long one exchange may take before it counts as one that has no end: longer than three lost SYNs and the deadline
/// of the daemon's own dialling.
const EXCHANGE: u64 = 25;

/// Pods beside those of the quickstart that live at one time at most.
const EXTRA_PODS: usize = 4;

/// Host parts of their addresses; fewer than there are pods over time, so that addresses are used again.
const HOSTS: [u8; 3] = [100, 101, 102];

/// What a client may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    /// Answers by pods with this prefix; refusals may happen.
    Service(&'static str),
    /// The same, and no exchange is ever lost: it does not go through a daemon.
    Always(&'static str),
    /// Never an answer.
    Never,
}

/// One stream of exchanges.
struct Check {
    client: &'static str,
    to: String,
    expect: Expect,
}

fn checks(cluster: &Cluster) -> Result<Vec<Check>> {
    let service = |client, vip: &str, expect| Check { client, to: format!("{vip}:80"), expect };
    let pay = cluster.pod("shop/pay-0")?.spec.v4;
    Ok(vec![
        service("shop/web-0", vip::CART, Expect::Service("cart-")),
        service("shop/web-1", vip::CART, Expect::Service("cart-")),
        service("shop/web-1", vip::DB, Expect::Service("db-")),
        service("shop/web-0", vip::PAY, Expect::Service("pay-")),
        service("shop/guest-0", vip::DB, Expect::Service("db-")),
        service("shop/web-0", vip::LEDGER, Expect::Always("ledger-")),
        service("shop/guest-0", vip::PAY, Expect::Never),
        Check { client: "shop/batch-0", to: format!("{pay}:{}", ports::WHO), expect: Expect::Never },
    ])
}

impl Check {
    /// Adds what a report shows that must not be.
    fn judge(&self, report: &ConnectsReport, wrong: &mut Vec<String>) {
        let mut say = |what: String| wrong.push(format!("{self}: {what}: {report:?}"));
        if report.wrong_peer > 0 || report.wrong_client > 0 {
            say("wrong addresses".to_owned());
        }
        if report.examples.iter().any(|example| example.starts_with("sent ")) {
            say("a wrong payload".to_owned());
        }
        // A refusal is a reset, and a reset that the wire loses is not sent again: who waits for an answer then waits.
        let lost_reset = |message: &str| self.expect == Expect::Never && message.starts_with("read: ");
        let end = report.errors.keys().find(|message| endless(message) && !lost_reset(message));
        if let Some(message) = end {
            say(format!("an exchange without an end ({message})"));
        }
        let prefix = match self.expect {
            Expect::Service(prefix) => prefix,
            Expect::Always(prefix) => {
                if report.lost > 0 {
                    say("lost".to_owned());
                }
                prefix
            }
            Expect::Never => "nobody",
        };
        if let Some(name) = report.by_backend.keys().find(|name| !name.starts_with(prefix)) {
            say(format!("answered by {name}"));
        }
    }

    /// Exchanges until `stop`; returns the sum and what was wrong.
    fn run(&self, pod: &Pod, stop: &AtomicBool) -> Result<(ConnectsReport, Vec<String>)> {
        let (mut total, mut wrong) = (ConnectsReport::default(), vec![]);
        while !stop.load(Ordering::Relaxed) {
            let report =
                pod.connects(&format!("--to {} --n 10 --threads 2 --timeout {EXCHANGE}", self.to))?;
            self.judge(&report, &mut wrong);
            total.merge(report);
            // Nothing to learn from ten refusals a millisecond, and others need the processor.
            thread::sleep(Duration::from_millis(20));
        }
        Ok((total, wrong))
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}", self.client, self.to)
    }
}

/// A blocking socket whose timeout passes says EAGAIN or EINPROGRESS, a retransmission without answer ETIMEDOUT.
fn endless(message: &str) -> bool {
    ["os error 11", "os error 115", "os error 110"].iter().any(|code| message.contains(&format!("({code})")))
}

/// The state that the actions change.
struct Chaos {
    cluster: Cluster,
    random: StdRng,
    relays: BTreeMap<&'static str, Relay>,
    /// Pods that come and go, oldest first.
    extra: Vec<PodSpec>,
    made: u32,
    denied: bool,
    /// Daemons that were taken over from, until the last of their connections ends.
    draining: Vec<NodeDaemon>,
    story: Vec<String>,
    counts: BTreeMap<&'static str, u32>,
}

const NODES: [&str; 2] = ["node-a", "node-b"];

impl Chaos {
    fn new(seed: u64) -> Result<Self> {
        let mut cluster = bare()?;
        let mut relays = BTreeMap::new();
        for node in NODES {
            let port = format!("n{}", cluster.node(node)?.spec.number);
            relays.insert(node, Relay::insert(&cluster.fabric, &port)?);
        }
        cluster.start_mesh(&quickstart())?;
        Ok(Self {
            cluster,
            random: StdRng::seed_from_u64(seed),
            relays,
            extra: vec![],
            made: 0,
            denied: false,
            draining: vec![],
            story: vec![],
            counts: BTreeMap::new(),
        })
    }

    fn node(&mut self) -> &'static str {
        NODES[self.random.random_range(0..NODES.len())]
    }

    /// One action, at random.
    fn act(&mut self) -> Result<()> {
        let began = Instant::now();
        let (what, result) = match self.random.random_range(0..100) {
            0..30 if self.extra.len() < EXTRA_PODS => ("pod added", self.add_pod()),
            0..40 if !self.extra.is_empty() => ("pod removed", self.remove_pod()),
            0..55 => ("policy changed", self.change_policy()),
            55..64 => ("daemon killed", self.restart_daemon(true)),
            64..68 => ("daemon stopped", self.restart_daemon(false)),
            68..74 => ("daemon upgraded", self.upgrade_daemon()),
            74..82 => ("control plane away", self.control_away()),
            82..91 => ("packets lost", self.loss()),
            _ => ("packets delayed", self.delay()),
        };
        *self.counts.entry(what).or_default() += 1;
        self.story.push(format!("{what} ({:?})", began.elapsed()));
        result.context(what)
    }

    fn control(&self) -> Result<&mesh_tests::daemons::Control> {
        self.cluster.control.as_ref().context("no control plane")
    }

    fn add_pod(&mut self) -> Result<()> {
        let node = self.node();
        let app = ["cart", "db"][self.random.random_range(0..2_usize)];
        let number = self.cluster.node(node)?.spec.clone();
        let used: Vec<u8> =
            self.extra.iter().filter(|pod| pod.node == node).map(|pod| pod.v4.octets()[3]).collect();
        let Some(host) = HOSTS.into_iter().find(|host| !used.contains(host)) else { return Ok(()) };
        self.made += 1;
        let name = format!("{app}-x{}", self.made);
        let spec = PodSpec {
            namespace: "shop".to_owned(),
            uid: format!("5a3c0de0-0000-4000-9000-{:012x}", self.made),
            node: node.to_owned(),
            v4: number.pod_v4(host),
            v6: number.pod_v6(host),
            args: ["serve", "--name", &name, "--who", "9000"].map(str::to_owned).to_vec(),
            name,
        };
        // As in a cluster: the pod is known, then its network is made, then it runs, then it is ready.
        self.control()?.write_config(&file(&spec), &manifest(&spec, app, false))?;
        self.cluster.add_pod(&spec)?;
        let key = format!("shop/{}", spec.name);
        wait::until_true("the CNI plugin to add the pod", PROPAGATION * 3, || {
            self.cluster.node(node)?.cni("ADD", self.cluster.pod(&key)?).map(|_| true)
        })?;
        self.cluster.start_apps()?;
        self.control()?.write_config(&file(&spec), &manifest(&spec, app, true))?;
        self.extra.push(spec);
        Ok(())
    }

    fn remove_pod(&mut self) -> Result<()> {
        let spec = self.extra.remove(0);
        self.control()?.remove_config(&file(&spec))?;
        thread::sleep(Duration::from_millis(self.random.random_range(0..500)));
        let key = format!("shop/{}", spec.name);
        let pod = self.cluster.pod(&key)?.handle();
        self.cluster.node(&spec.node)?.cni("DEL", &pod)?;
        self.cluster.remove_pod(&key).map(drop)
    }

    fn change_policy(&mut self) -> Result<()> {
        self.denied = !self.denied;
        let action = if self.denied { "DENY" } else { "ALLOW" };
        self.control()?.write_config(
            "60-db.yaml",
            &format!(
                "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: db, namespace: shop}}\nspec:\n  \
                 selector: {{matchLabels: {{app: db}}}}\n  action: {action}\n  rules:\n    - from: [{{source: \
                 {{principals: [\"cluster.local/ns/shop/sa/guest\"{}]}}}}]\n",
                if self.denied { "" } else { ", \"cluster.local/ns/shop/sa/web\"" }
            ),
        )
    }

    fn restart_daemon(&mut self, kill: bool) -> Result<()> {
        let name = self.node();
        let mut daemon = self.cluster.node_mut(name)?.daemon.take().context("daemon")?;
        if kill {
            daemon.proc.kill()?;
        } else {
            daemon.proc.stop(PROPAGATION * 3)?;
        }
        drop(daemon);
        thread::sleep(Duration::from_millis(self.random.random_range(0..1000)));
        self.cluster.start_node(name, &NodeOptions::default())
    }

    fn upgrade_daemon(&mut self) -> Result<()> {
        let name = self.node();
        let old = self.cluster.take_over(name, &NodeOptions::default())?;
        self.draining.push(old);
        Ok(())
    }

    fn control_away(&mut self) -> Result<()> {
        self.cluster.control.as_mut().context("control")?.proc.kill()?;
        let pause = self.random.random_range(500..3000);
        if self.random.random_range(0..3) == 0 {
            // Worse: a daemon dies meanwhile, and comes back without a control plane.
            let name = self.node();
            self.cluster.node_mut(name)?.daemon.as_mut().context("daemon")?.proc.kill()?;
            self.cluster.launch_node(name, &NodeOptions::default())?;
        }
        thread::sleep(Duration::from_millis(pause));
        self.cluster.restart_control()?;
        for name in NODES {
            self.cluster.wait_node_ready(name)?;
        }
        Ok(())
    }

    fn loss(&mut self) -> Result<()> {
        let (name, percent) = (self.node(), self.random.random_range(1..6));
        let netns = self.cluster.node(name)?.netns.clone();
        faults::set_loss(&netns, percent)?;
        thread::sleep(Duration::from_millis(self.random.random_range(500..2500)));
        faults::set_loss(&netns, 0)
    }

    fn delay(&mut self) -> Result<()> {
        let (name, delay) = (self.node(), self.random.random_range(1..60));
        let relay = self.relays.get(name).context("relay")?;
        relay.set_delay(Duration::from_millis(delay));
        thread::sleep(Duration::from_millis(self.random.random_range(500..2500)));
        relay.set_delay(Duration::ZERO);
        Ok(())
    }

    /// Without faults, everything works again, and the last policy is in force.
    fn healed(&mut self) -> Result<()> {
        let cart = |cluster: &Cluster, client: &str, vip: &str, n| {
            cluster.pod(client)?.connects(&format!("--to {vip}:80 --n {n} --threads 2 --timeout {EXCHANGE}"))
        };
        let mut services = vec![
            ("shop/web-0", vip::CART),
            ("shop/web-1", vip::CART),
            ("shop/web-0", vip::PAY),
            ("shop/web-1", vip::PAY),
            ("shop/web-0", vip::LEDGER),
            ("shop/web-0", vip::DB),
        ];
        if !self.denied {
            services.push(("shop/guest-0", vip::DB));
        }
        for (client, vip) in services {
            // Twice in a row: the first one may still meet what was.
            wait::until_true(&format!("{client} -> {vip} to heal"), PROPAGATION * 2, || {
                Ok(cart(&self.cluster, client, vip, 20)?.all_right(20))
            })?;
            assert_right(&format!("{client} -> {vip}, healed"), &cart(&self.cluster, client, vip, 100)?, 100);
        }
        for mut daemon in self.draining.drain(..) {
            wait::until_true("a daemon that was taken over from to end", PROPAGATION * 2, || {
                Ok(daemon.proc.ended()?.is_some())
            })?;
        }
        let guest = cart(&self.cluster, "shop/guest-0", vip::DB, 20)?;
        ensure!(guest.by_backend.is_empty() == self.denied, "the policy of db is not in force: {guest:?}");
        Ok(())
    }
}

fn file(spec: &PodSpec) -> String {
    format!("50-{}.yaml", spec.name)
}

fn manifest(spec: &PodSpec, app: &str, ready: bool) -> String {
    let PodSpec { namespace, name, uid, node, v4, v6, .. } = spec;
    let ready = if ready { "True" } else { "False" };
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, uid: {uid}, labels: {{app: {app}}}}}\n\
         spec:\n  nodeName: {node}\n  serviceAccountName: {app}\n  containers:\n    - name: app\n      image: nodemesh/pod-app\n      \
         ports: [{{name: tcp-who, containerPort: 9000}}]\n\
         status:\n  phase: Running\n  podIP: {v4}\n  podIPs: [{{ip: {v4}}}, {{ip: \"{v6}\"}}]\n  \
         conditions: [{{type: Ready, status: \"{ready}\"}}]\n"
    )
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn chaos_never_misleads_a_connection() -> Result<()> {
    let (seed, seconds) = (setting("NODEMESH_CHAOS_SEED", SEED), setting("NODEMESH_CHAOS_SECONDS", SECONDS));
    let mut chaos = Chaos::new(seed)?;
    let checks = checks(&chaos.cluster)?;
    let pods: Vec<Pod> =
        checks.iter().map(|c| Ok(chaos.cluster.pod(c.client)?.handle())).collect::<Result<_>>()?;
    let stop = AtomicBool::new(false);
    let (acted, results) = thread::scope(|scope| {
        let clients: Vec<_> =
            checks.iter().zip(&pods).map(|(check, pod)| scope.spawn(|| check.run(pod, &stop))).collect();
        let end = Instant::now() + Duration::from_secs(seconds);
        let mut acted = Ok(());
        while acted.is_ok() && Instant::now() < end {
            thread::sleep(Duration::from_millis(chaos.random.random_range(50..600)));
            acted = chaos.act();
        }
        stop.store(true, Ordering::Relaxed);
        let results: Vec<_> = clients.into_iter().map(thread::ScopedJoinHandle::join).collect();
        (acted, results)
    });
    let story = format!("seed {seed}: {:?}\n{}", chaos.counts, chaos.story.join("\n"));
    acted.with_context(|| story.clone())?;
    let mut wrong = vec![];
    for (check, result) in checks.iter().zip(results) {
        let (report, mut found) = result.map_err(|_| anyhow::anyhow!("a client panicked"))??;
        println!("{check}: {} right, {} lost, {:?}", report.ok, report.lost, report.errors);
        wrong.append(&mut found);
        if check.expect == Expect::Never {
            ensure!(report.lost > 0, "{check}: nothing was tried");
        } else {
            ensure!(report.ok > 0, "{check}: nothing worked\n{story}");
        }
    }
    println!("{:?}; {} frames relayed", chaos.counts, chaos.relays.values().map(Relay::carried).sum::<u64>());
    ensure!(wrong.is_empty(), "{}\n{story}", wrong.join("\n"));
    chaos.healed().context(story)
}
