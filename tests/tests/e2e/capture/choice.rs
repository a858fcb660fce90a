//! Which backend the kernel chooses: for the daemon too, and by consistent hash.

use super::lab::*;
use crate::support::{assert_right, bare, vip};
use anyhow::{Context, Result, ensure};
use mesh_common::{
    code::{Counter, proto},
    decide, key,
    net::{Ip, NetPort},
};
use mesh_node::bpf::{Backend, Balancing, Frontend, Verdict, lower::lower};
use mesh_tests::{app::ports, cluster::Cluster};
use mesh_xds::model::Protocol;
use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

#[test]
fn the_kernel_chooses_for_the_daemon_with_weight_and_affinity() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_apps()?;
    let (a, b) = (cluster.pod("shop/db-0")?.spec.clone(), cluster.pod("shop/pay-0")?.spec.clone());
    let mut lab = Lab::new(&cluster, "node-a")?;
    let service = format!("{}:80", vip::LEDGER);
    lab.frontend(&service, Protocol::Tcp, Verdict::Proxy, &[addr(a.v4, ports::WHO), addr(b.v4, ports::WHO)]);
    lab.intent.frontends[0].backends[0].weight = 3;
    // What the relay would do if the kernel had not chosen: nobody is there.
    lab.upstream.insert(service.parse()?, addr(a.v4, 9));
    lab.capture("shop/web-0", false)?;
    let web = cluster.pod("shop/web-0")?;
    let connects = |n: u64| web.connects(&format!("--to {service} --n {n} --threads 4 --any-client"));
    let report = connects(4000)?;
    assert_right("weighted", &report, 4000);
    let share = report.by_backend[&a.name] as f64 / 4000.0;
    assert!((0.70..0.80).contains(&share), "{:?}", report.by_backend);

    lab.intent.frontends[0].affinity = Some(Duration::from_secs(3600));
    lab.apply()?;
    let report = connects(500)?;
    assert_right("sticky", &report, 500);
    assert_eq!(report.by_backend.len(), 1, "{report:?}");
    ensure!(lab.counter(Counter::ConnectProxy)? == 4500);
    lab.assert_no_wrong_destination("chosen");
    lab.end()
}

/// The endpoint that the table names for a client.
fn predicted(lab: &Lab<'_>, frontend: &Frontend, client: IpAddr) -> Result<SocketAddr> {
    let state = lower(&lab.intent).0;
    let ip_proto = if frontend.proto == Protocol::Tcp { proto::TCP } else { proto::UDP };
    let service = key::Frontend::new(frontend.addr.into(), NetPort::new(frontend.port), ip_proto);
    let row = state.frontends.get(&service).context("the service's row")?;
    let set = state.sets.get(&row.set).context("its set")?;
    let place = decide::maglev_position(&Ip::from(client), &service, row.maglev);
    let chunk = &set.maglev[(place / decide::MAGLEV_CHUNK) as usize];
    let slot = chunk.slots[(place % decide::MAGLEV_CHUNK) as usize];
    Ok(set.slots[usize::from(slot)].endpoint.into())
}

/// What the two clients got of each service, after checking that it is what the tables say.
fn choices(
    cluster: &Cluster,
    lab: &Lab<'_>,
    names: &BTreeMap<IpAddr, String>,
) -> Result<Vec<(String, String, SocketAddr)>> {
    let mut all = vec![];
    for client in ["shop/web-0", "shop/web-1"] {
        let pod = cluster.pod(client)?;
        for frontend in &lab.intent.frontends {
            let to = SocketAddr::new(frontend.addr, frontend.port);
            let own = if to.is_ipv4() { pod.spec.v4.into() } else { pod.spec.v6.into() };
            let expected = predicted(lab, frontend, own)?;
            let name = &names[&expected.ip()];
            let reports = match frontend.proto {
                Protocol::Tcp => {
                    vec![
                        pod.connects(&format!("--to {to} --n 100 --threads 4 --any-client --expect {name}"))?,
                    ]
                }
                // A new socket each: it is the client that is hashed, not the socket.
                Protocol::Udp => ["", "--connected"]
                    .into_iter()
                    .map(|how| pod.udp(&format!("--to {to} --n 100 --fresh --expect {name} {how}")))
                    .collect::<Result<_>>()?,
            };
            for report in reports {
                assert_right(&format!("{client} to {to} {:?}", frontend.proto), &report, 100);
            }
            all.push((client.to_owned(), format!("{to} {:?}", frontend.proto), expected));
        }
    }
    Ok(all)
}

#[test]
fn maglev_keeps_a_client_on_its_backend_when_others_come_and_go() -> Result<()> {
    let mut cluster = bare()?;
    cluster.start_apps()?;
    let servers = ["shop/cart-0", "shop/cart-1", "shop/cart-2", "shop/db-0", "shop/pay-0"];
    let specs = servers.map(|key| cluster.pod(key).map(|pod| pod.spec.clone()));
    let specs = specs.into_iter().collect::<Result<Vec<_>>>()?;
    let names: BTreeMap<IpAddr, String> = specs
        .iter()
        .flat_map(|spec| [(spec.v4.into(), spec.name.clone()), (spec.v6.into(), spec.name.clone())])
        .collect();
    let mut lab = Lab::new(&cluster, "node-a")?;
    let v4 = |port| specs.iter().map(|spec| addr(spec.v4, port)).collect::<Vec<_>>();
    let v6: Vec<_> = specs.iter().map(|spec| addr(spec.v6, ports::WHO)).collect();
    lab.frontend(&format!("{}:80", vip::LEDGER), Protocol::Tcp, Verdict::Direct, &v4(ports::WHO));
    lab.frontend(&format!("{}:80", vip::LEDGER_V6), Protocol::Tcp, Verdict::Direct, &v6);
    lab.frontend(&format!("{}:53", vip::LEDGER), Protocol::Udp, Verdict::Direct, &v4(ports::UDP));
    lab.frontend(&format!("{}:80", vip::CART), Protocol::Tcp, Verdict::Proxy, &v4(ports::WHO));
    lab.upstream.insert(format!("{}:80", vip::CART).parse()?, addr(specs[0].v4, 9));
    for frontend in &mut lab.intent.frontends {
        frontend.balancing = Balancing::Maglev;
    }
    lab.capture("shop/web-0", false)?;
    lab.capture("shop/web-1", false)?;

    let all = lab.intent.clone();
    let before = choices(&cluster, &lab, &names)?;
    let (mut kept, mut lost) = (0, 0);
    for gone in &specs {
        let is_gone = |backend: &Backend| backend.addr.ip() == gone.v4 || backend.addr.ip() == gone.v6;
        for frontend in &mut lab.intent.frontends {
            frontend.backends.retain(|backend| !is_gone(backend));
        }
        lab.apply()?;
        for (old, new) in before.iter().zip(choices(&cluster, &lab, &names)?) {
            if old.2.ip() == gone.v4 || old.2.ip() == gone.v6 {
                assert_ne!(old.2, new.2);
            } else {
                *(if old.2 == new.2 { &mut kept } else { &mut lost }) += 1;
            }
        }
        lab.intent.frontends = all.frontends.clone();
        lab.apply()?;
    }
    assert_eq!(choices(&cluster, &lab, &names)?, before, "the same backends, the same choice");
    // 4 services, 2 clients, 4 of the 5 changes: a few of 100 clients move without need, so that one of 32 may.
    assert!(kept + lost == 32 && lost <= 6, "{kept} kept, {lost} lost");
    eprintln!("maglev: {kept} choices kept, {lost} lost while another backend was gone");
    lab.end()
}
