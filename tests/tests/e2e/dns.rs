//! DNS of captured pods: mesh names from the daemon, the rest from the nameserver that was asked.

use crate::support::{PROPAGATION, mesh, vip};
use anyhow::{Context, Result, ensure};
use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RecordType},
};
use mesh_tests::{
    app::{Exchanged, Resolved, from_hex, to_hex},
    cluster::{Cluster, Pod},
    daemons::NodeOptions,
    nameserver::{BIG, Nameserver},
    wait,
};
use std::net::IpAddr;

/// A virtual address of the nameservers, and a headless service.
const SERVICES: &str = "apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: legacy}
spec:
  selector: {app: ledger}
  clusterIP: 10.96.0.53
  ports:
  - {name: dns, port: 53, protocol: UDP}
  - {name: dns-tcp, port: 53, protocol: TCP}
---
apiVersion: v1
kind: Service
metadata: {name: carts, namespace: shop}
spec:
  selector: {app: cart}
  clusterIP: None
  ports:
  - {name: who, port: 80, targetPort: tcp-who}
";
const KUBE_DNS: &str = "10.96.0.53";
const SEARCH: &str = "--search shop.svc.cluster.local --search svc.cluster.local --search cluster.local";
const CLIENT: &str = "shop/web-0";

fn resolve(pod: &Pod, args: &str) -> Result<Resolved> {
    pod.app_json(&format!("resolve {args}"))
}

fn exchange(pod: &Pod, args: &str) -> Result<Exchanged> {
    pod.app_json(&format!("exchange {args}"))
}

fn query(name: &str, kind: RecordType, id: u16) -> Message {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    let mut name = Name::from_ascii(name).expect("a name");
    name.set_fqdn(true);
    message.add_query(Query::query(name, kind));
    message
}

fn hex(message: &Message) -> Result<String> {
    Ok(to_hex(&message.to_vec()?))
}

fn parse(answer: &(String, String)) -> Result<Message> {
    Ok(Message::from_vec(&from_hex(&answer.0).context("hexadecimal")?)?)
}

/// The only answer's data.
fn data(exchanged: &Exchanged) -> Result<(ResponseCode, Vec<String>)> {
    let [answer] = &exchanged.answers[..] else { anyhow::bail!("not one answer: {exchanged:?}") };
    let message = parse(answer)?;
    Ok((message.metadata.response_code, message.answers.iter().map(|r| r.data.to_string()).collect()))
}

fn nameserver(cluster: &Cluster, pod: &str, tag: u8) -> Result<(Nameserver, String, String)> {
    let pod = cluster.pod(pod)?;
    let (v4, v6) = (pod.spec.v4, pod.spec.v6);
    let started = Nameserver::start(&pod.netns, &[IpAddr::V4(v4), IpAddr::V6(v6)], tag)?;
    Ok((started, v4.to_string(), v6.to_string()))
}

/// Everything running, with the services above known to the client's node.
fn with_services() -> Result<Cluster> {
    let cluster = mesh()?;
    cluster.control.as_ref().context("control")?.write_config("70-dns.yaml", SERVICES)?;
    let question = hex(&query("carts.shop.svc.cluster.local", RecordType::A, 1))?;
    wait::until_true("the headless service to be answered", PROPAGATION, || {
        let asked =
            exchange(cluster.pod(CLIENT)?, &format!("--to {KUBE_DNS}:53 --hex {question} --timeout 500"))?;
        Ok(data(&asked).is_ok_and(|(_, found)| found.len() == 3))
    })?;
    Ok(cluster)
}

#[test]
fn a_resolver_in_a_pod_finds_the_mesh_and_the_rest_of_the_world() -> Result<()> {
    let cluster = with_services()?;
    let (first, v4, v6) = nameserver(&cluster, "legacy/ledger-0", 1)?;
    let (second, ..) = nameserver(&cluster, "legacy/ledger-1", 2)?;
    let pod = cluster.pod(CLIENT)?;
    let cart = ["10.96.0.10".to_owned(), "fd00:10:96::a".to_owned()];
    for server in [v4.as_str(), v6.as_str(), KUBE_DNS] {
        for name in [
            "cart",
            "cart.shop",
            "cart.shop.svc",
            "cart.shop.svc.cluster.local",
            "CART.shop.svc.cluster.local.",
        ] {
            let found = resolve(pod, &format!("--nameserver {server} {SEARCH} {name}"))?;
            assert_eq!(found.addresses, cart, "{name} by {server}: {found:?}");
        }
    }
    let headless = resolve(pod, &format!("--nameserver {v4} {SEARCH} carts"))?;
    assert_eq!(headless.addresses.len(), 6, "{headless:?}");

    // The world: through all search domains, with an answer too large for a datagram, and not there at all.
    let found = resolve(pod, &format!("--nameserver {v4} {SEARCH} tag.test"))?;
    assert_eq!(found.addresses, ["192.0.2.1"], "{found:?}");
    ensure!(first.asked("tag.test.shop.svc.cluster.local.").len() == 2, "A and AAAA of the search domain");
    let big = resolve(pod, &format!("--nameserver {v4} big.test."))?;
    assert_eq!(big.addresses.len(), BIG as usize, "{big:?}");
    ensure!(first.asked("big.test.").iter().any(|asked| asked.tcp));
    let missing = resolve(pod, &format!("--nameserver {v4} {SEARCH} missing.test"))?;
    assert!(
        missing.addresses.is_empty() && missing.error.contains("Name or service not known"),
        "{missing:?}"
    );
    let external = resolve(pod, &format!("--nameserver {v4} {SEARCH} alias"))?;
    assert_eq!(
        external.addresses,
        ["192.0.2.1"],
        "what only the nameserver knows below the cluster's domain"
    );
    let forged = resolve(pod, &format!("--nameserver {v4} forged.test."))?;
    assert_eq!(forged.addresses, ["192.0.2.1"], "an answer with another id is not taken");

    // What was answered once is not asked again, and each nameserver's answers are its own.
    let before = first.asked("tag.test.").len();
    let found = resolve(pod, &format!("--nameserver {v4} tag.test."))?;
    assert_eq!((found.addresses, first.asked("tag.test.").len()), (vec!["192.0.2.1".to_owned()], before));
    let other = cluster.pod("legacy/ledger-1")?.spec.v4;
    let found = resolve(pod, &format!("--nameserver {other} tag.test."))?;
    assert_eq!(
        (found.addresses, second.asked("tag.test.").is_empty()),
        (vec!["192.0.2.2".to_owned()], false)
    );

    // From the pod's own address, byte for byte, and answered in the nameserver's name.
    let mut message = query("verbatim.silent.test", RecordType::TXT, 0xbeef);
    let mut edns = Edns::new();
    edns.set_max_payload(1777).set_dnssec_ok(true);
    message.set_edns(edns);
    let question = hex(&message)?;
    exchange(pod, &format!("--to {v4}:53 --hex {question} --timeout 300"))?;
    let asked = first.asked("verbatim.silent.test.");
    ensure!(asked.len() == 1 && to_hex(&asked[0].message) == question, "{asked:?}");
    assert_eq!(asked[0].from.ip(), IpAddr::V4(pod.spec.v4));
    let question = hex(&query("pay.shop.svc.cluster.local", RecordType::A, 7))?;
    for (server, way) in [
        (format!("{v4}:53"), "--connected"),
        (format!("{v4}:53"), ""),
        (format!("[{v6}]:53"), "--connected"),
        (format!("[{v6}]:53"), ""),
        (format!("{KUBE_DNS}:53"), "--connected"),
        (format!("{KUBE_DNS}:53"), "--tcp"),
        (format!("{v4}:53"), "--tcp"),
        (format!("[{v6}]:53"), "--tcp"),
    ] {
        let answer = exchange(pod, &format!("--to {server} --hex {question} {way}"))?;
        assert_eq!(data(&answer)?.1, [vip::PAY], "{server} {way}: {answer:?}");
        assert_eq!(answer.answers[0].1, server, "the sender that the app sees ({way})");
        assert!(answer.peer.is_empty() || answer.peer == server, "{answer:?}");
    }
    for way in ["--connected", "", "--tcp"] {
        let answer = exchange(pod, &format!("--to {v4}:53 --hex {question} --mapped {way}"))?;
        assert_eq!(answer.answers[0].1, format!("[::ffff:{v4}]:53"), "{way}");
    }
    assert!(first.asked("pay.shop.svc.cluster.local.").is_empty(), "a mesh name went to the nameserver");

    let scrape = cluster
        .node("node-a")?
        .until_metrics("no query to be waiting", |scrape| scrape.sum("nodemesh_dns_waiting", &[]) == 0.0)?;
    for outcome in ["mesh", "forwarded", "cached"] {
        assert!(scrape.sum("nodemesh_dns_queries_total", &[("outcome", outcome)]) > 0.0, "{outcome}");
    }
    assert!(scrape.sum("nodemesh_dns_cache_entries", &[]) > 0.0);
    Ok(())
}

#[test]
fn dead_nameservers_do_not_stop_mesh_names_and_each_one_of_several_is_asked() -> Result<()> {
    let cluster = with_services()?;
    let (dead, v4, _) = nameserver(&cluster, "legacy/ledger-0", 1)?;
    let (good, other, _) = nameserver(&cluster, "legacy/ledger-1", 2)?;
    dead.set_silent(true);
    let pod = cluster.pod(CLIENT)?;
    // The name with its own dot is looked up as cart.shop.shop.svc... first, which nobody answers.
    for name in ["cart", "cart.shop", "cart.shop.svc"] {
        let found = resolve(pod, &format!("--nameserver {v4} {SEARCH} {name}"))?;
        assert_eq!(found.addresses.len(), 2, "{name}: {found:?}");
    }
    let missing = hex(&query("cart.shop.shop.svc.cluster.local", RecordType::A, 8))?;
    let told = exchange(pod, &format!("--to {v4}:53 --hex {missing} --timeout 4000"))?;
    assert_eq!(data(&told)?.0, ResponseCode::NXDomain, "{told:?}");
    let unknown = hex(&query("tag.silent.test", RecordType::A, 9))?;
    let failed = exchange(pod, &format!("--to {v4}:53 --hex {unknown}"))?;
    assert_eq!(data(&failed)?.0, ResponseCode::ServFail, "{failed:?}");

    // Two nameservers, one after the other (glibc) and side by side from one socket (musl).
    let found =
        resolve(pod, &format!("--nameserver {v4} --nameserver {other} --option timeout:1 tag.test."))?;
    assert_eq!(found.addresses, ["192.0.2.2"], "{found:?}");
    ensure!(!dead.asked("tag.test.").is_empty() && !good.asked("tag.test.").is_empty());
    let question = hex(&query("forged.test", RecordType::A, 10))?;
    for order in [format!("--to {v4}:53 --to {other}:53"), format!("--to {other}:53 --to {v4}:53")] {
        let answer = exchange(pod, &format!("{order} --hex {question} --answers 1"))?;
        let expected = (ResponseCode::NoError, vec!["192.0.2.2".to_owned()]);
        assert_eq!(data(&answer)?, expected, "{order}: {answer:?}");
    }
    ensure!(!dead.asked("forged.test.").is_empty(), "the silent one was not asked");

    // A client that sends again is sent again.
    let again = hex(&query("again.silent.test", RecordType::A, 11))?;
    exchange(
        pod,
        &format!("--to {other}:53 --connected --hex {again} --hex {again} --answers 1 --timeout 3000"),
    )?;
    wait::until_true("the second copy", PROPAGATION, || Ok(good.asked("again.silent.test.").len() == 2))?;
    ensure!(dead.asked("again.silent.test.").is_empty(), "it went to another nameserver");
    Ok(())
}

#[test]
fn without_the_daemon_queries_go_where_they_went_without_the_mesh() -> Result<()> {
    let mut cluster = mesh()?;
    let (server, v4, v6) = nameserver(&cluster, "legacy/ledger-0", 1)?;
    let name = "cart.shop.svc.cluster.local";
    let question = hex(&query(name, RecordType::A, 1))?;
    let ways = [
        format!("--to {v4}:53"),
        format!("--to {v4}:53 --connected"),
        format!("--to [{v6}]:53"),
        format!("--to {v4}:53 --tcp"),
    ];
    let by_the_daemon = |cluster: &Cluster| -> Result<Vec<bool>> {
        let pod = cluster.pod(CLIENT)?;
        let all = ways.iter().map(|way| {
            let answer = exchange(pod, &format!("{way} --hex {question} --timeout 2000"))?;
            match data(&answer)? {
                (ResponseCode::NoError, found) if found == [vip::CART] => Ok(true),
                (ResponseCode::NXDomain, _) => Ok(false),
                other => anyhow::bail!("{way}: {other:?}"),
            }
        });
        all.collect()
    };
    assert_eq!(by_the_daemon(&cluster)?, [true; 4]);
    cluster.node_mut("node-a")?.daemon.as_mut().context("daemon")?.proc.kill()?;
    // At once, not after the heartbeat is missed: the socket has gone with the daemon.
    assert_eq!(by_the_daemon(&cluster)?, [false; 4]);
    assert_eq!(server.asked(&format!("{name}.")).len(), 4);
    for (extra, expected) in [(vec![], true), (vec!["--dns=false".to_owned()], false)] {
        let node = cluster.node_mut("node-a")?;
        if let Some(mut old) = node.daemon.take() {
            let _ = old.proc.kill();
        }
        cluster.start_node("node-a", &NodeOptions { extra, ..NodeOptions::default() })?;
        wait::until_true(&format!("DNS to be {expected} again"), PROPAGATION, || {
            Ok(by_the_daemon(&cluster)? == [expected; 4])
        })?;
    }
    Ok(())
}

#[test]
fn garbage_slow_clients_and_strangers_get_nothing() -> Result<()> {
    let cluster = with_services()?;
    let (_server, v4, _) = nameserver(&cluster, "legacy/ledger-0", 1)?;
    let pod = cluster.pod(CLIENT)?;
    let good = query("cart.shop.svc.cluster.local", RecordType::A, 21).to_vec()?;
    let with = |at: usize, byte: u8| {
        let mut message = good.clone();
        message[at] = byte;
        message
    };
    let looping = [&good[..12], &[0xc0, 12, 0, 1, 0, 1]].concat();
    for (what, message, expected) in [
        ("short", good[..5].to_vec(), None),
        ("an answer", with(2, 0x81), None),
        ("two questions", with(5, 2), Some(ResponseCode::FormErr)),
        ("a compression loop", looping, Some(ResponseCode::FormErr)),
        ("a cut name", good[..20].to_vec(), Some(ResponseCode::FormErr)),
        ("5,000 bytes", [&good[..], &[0; 5000]].concat(), Some(ResponseCode::FormErr)),
    ] {
        let text = to_hex(&message);
        let udp = exchange(pod, &format!("--to {v4}:53 --hex {text} --timeout 300"))?;
        let code = udp.answers.first().map(parse).transpose()?.map(|m| m.metadata.response_code);
        assert_eq!(code, expected, "{what}: {udp:?}");
        ensure!(udp.answers.iter().all(|(answer, _)| answer.len() <= text.len()), "{what} is amplified");
    }
    // The largest frame, after which the connection is still good.
    let large = [&good[..], &vec![0; 65_535 - good.len()]].concat();
    let (large, question) = (to_hex(&large), to_hex(&good));
    let tcp = exchange(pod, &format!("--to {v4}:53 --tcp --hex {large} --hex {question}"))?;
    assert_eq!(tcp.answers.len(), 2, "{}", tcp.error);
    assert_eq!(parse(&tcp.answers[1])?.answers.len(), 1);

    // Nobody but the pod itself.
    let listener = format!("{}:15053", pod.spec.v4);
    let stranger = exchange(
        cluster.pod("legacy/ledger-1")?,
        &format!("--to {listener} --hex {question} --timeout 500"),
    )?;
    assert_eq!(stranger.answers, [], "{stranger:?}");

    // Clients that begin a query and do not go on, many of them, and one that is in no hurry.
    let dial = |text: &str| pod.dial(&format!("--to {v4}:53 {text} --timeout 1"));
    std::thread::scope(|scope| {
        let idle: Vec<_> = (0..8).map(|_| scope.spawn(|| dial("--send x"))).collect();
        let answer = exchange(pod, &format!("--to {v4}:53 --tcp --hex {question}"))?;
        assert_eq!(data(&answer)?.1, [vip::CART]);
        for handle in idle {
            let dialled = handle.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
            assert_eq!(dialled.received, "", "{dialled:?}");
        }
        anyhow::Ok(())
    })?;
    let answer = exchange(pod, &format!("--to {v4}:53 --hex {question}"))?;
    assert_eq!(data(&answer)?.1, [vip::CART], "after all that");
    let scrape = cluster.node("node-a")?.scrape()?;
    assert!(scrape.sum("nodemesh_dns_queries_total", &[("outcome", "ignored")]) >= 3.0);
    Ok(())
}
