//! Tests of the pods' records, in real network namespaces.

use super::{
    scan::ScanConfig,
    testing::{self as testing_mesh, FakeMesh},
    *,
};
use crate::net::{NetNs, testing};
use std::{
    fs,
    os::fd::AsFd,
    os::unix::fs::symlink,
    path::Path,
    sync::atomic::Ordering::SeqCst,
    time::{Duration, Instant},
};

const LONG: Duration = Duration::from_secs(20);
const ADDR: &str = "10.77.0.1";

type TestEnroller = Arc<Enroller<FakeMesh>>;

fn enroller() -> (Arc<FakeMesh>, TestEnroller) {
    testing_mesh::enroller(Limits::default())
}

fn pod(name: &str, uid: &str, container: &str) -> PodInfo {
    PodInfo {
        namespace: "shop".into(),
        name: name.into(),
        uid: uid.into(),
        container_id: container.into(),
        addrs: Vec::new(),
    }
}

fn cart() -> PodInfo {
    pod("cart", "u1", "c1")
}

fn same(ns: &NetNs) -> NetNs {
    NetNs::from_fd(ns.as_fd().try_clone_to_owned().unwrap()).unwrap()
}

fn phases(enroller: &TestEnroller) -> Vec<&'static str> {
    enroller.pods().iter().map(|p| p.phase.as_str()).collect()
}

async fn until(what: &str, probe: impl Fn() -> bool) {
    let end = Instant::now() + LONG;
    while !probe() {
        assert!(Instant::now() < end, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_pod_gets_its_listeners_and_adding_it_again_changes_nothing() {
    let ns = testing::with_addresses(&["10.77.0.1/24", "fd77::1/64"]);
    let (mesh, enroller) = enroller();
    mesh.enrol("shop/cart");
    for _ in 0..2 {
        assert_eq!(enroller.add(cart(), same(&ns), LONG).await.unwrap(), Added::Captured);
    }
    assert_eq!(mesh.taken_log(), ["capture shop/cart"]);
    {
        let held = mesh.held.lock().unwrap();
        let local = &held[&ns.cookie()];
        let addrs: Vec<IpAddr> = vec![ADDR.parse().unwrap(), "fd77::1".parse().unwrap()];
        assert_eq!(local.info, PodInfo { addrs: addrs.clone(), ..cart() });
        let bound = |l: &Vec<TcpListener>| l.iter().map(|l| l.local_addr().unwrap()).collect::<Vec<_>>();
        for (listeners, port) in [(&local.inbound_plain, 15006), (&local.inbound_hbone, 15008)] {
            let expected: Vec<_> = addrs.iter().map(|ip| (*ip, port).into()).collect();
            assert_eq!(bound(listeners), expected);
        }
        assert_eq!(bound(&local.outbound).iter().map(|a| a.ip()).collect::<Vec<_>>(), addrs);
    }
    enroller.check(&cart(), Some(ns.id())).await.unwrap();
    assert_eq!(enroller.del(&cart(), None).await, 1);
    assert_eq!(enroller.del(&cart(), None).await, 0);
    assert_eq!(mesh.taken_log(), ["release shop/cart"]);
    assert!(enroller.pods().is_empty());
    assert_eq!(ns.tcp_listeners().unwrap(), [], "a listener was left in the pod");
}

#[tokio::test]
async fn only_the_given_addresses_are_used() {
    let ns = testing::with_addresses(&["10.77.0.1/24", "10.77.0.2/24"]);
    let (mesh, enroller) = enroller();
    mesh.enrol("shop/cart");
    let info = PodInfo { addrs: vec!["10.77.0.2".parse().unwrap()], ..cart() };
    enroller.add(info, same(&ns), LONG).await.unwrap();
    assert_eq!(mesh.held.lock().unwrap()[&ns.cookie()].inbound_hbone.len(), 1);
}

#[tokio::test]
async fn the_decision_is_waited_for_until_the_deadline() {
    let ns = testing::with_addresses(&["10.77.0.1/24"]);
    let (mesh, enroller) = enroller();
    let e = enroller.add(cart(), same(&ns), Duration::from_millis(30)).await.unwrap_err();
    assert!(matches!(e, EnrollError::Undecided { .. }), "{e}");
    assert_eq!(e.kind(), protocol::ErrorKind::TryAgain);
    assert_eq!(phases(&enroller), ["pending"]);

    let adding = tokio::spawn({
        let (enroller, ns) = (Arc::clone(&enroller), same(&ns));
        async move { enroller.add(cart(), ns, LONG).await }
    });
    // Changes about others do not end the wait.
    mesh.enrol("shop/other");
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!adding.is_finished());
    mesh.enrol("shop/cart");
    assert_eq!(adding.await.unwrap().unwrap(), Added::Captured);
}

#[tokio::test]
async fn a_removal_ends_the_wait() {
    let ns = testing::with_addresses(&["10.77.0.1/24"]);
    let (mesh, enroller) = enroller();
    let adding = tokio::spawn({
        let (enroller, ns) = (Arc::clone(&enroller), same(&ns));
        async move { enroller.add(cart(), ns, LONG).await }
    });
    until("the record", || enroller.pods().len() == 1).await;
    assert_eq!(enroller.del(&cart(), None).await, 1);
    let e = adding.await.unwrap().unwrap_err();
    assert!(matches!(e, EnrollError::Removed { .. }), "{e}");
    mesh.enrol("shop/cart");
    enroller.reevaluate().await;
    assert_eq!(mesh.taken_log(), Vec::<String>::new(), "a removed pod was captured");
    assert_eq!(enroller.add(cart(), same(&ns), LONG).await.unwrap(), Added::Captured);
}

#[tokio::test]
async fn membership_may_change_at_any_time() {
    let ns = testing::with_addresses(&["10.77.0.1/24"]);
    let (mesh, enroller) = enroller();
    mesh.say("shop/cart", Membership::Leave(LeaveReason::NotInMesh));
    let added = enroller.add(cart(), same(&ns), LONG).await.unwrap();
    assert_eq!(added, Added::NotInMesh(LeaveReason::NotInMesh));
    assert_eq!(ns.tcp_listeners().unwrap(), []);
    enroller.check(&cart(), None).await.unwrap();

    let stop = tokio_util::sync::CancellationToken::new();
    let running = tokio::spawn({
        let (enroller, stop) = (Arc::clone(&enroller), stop.clone());
        async move { enroller.run(Path::new("/proc"), stop).await }
    });
    mesh.enrol("shop/cart");
    until("enrolment by a change", || phases(&enroller) == ["captured"]).await;
    // The control plane forgets a pod that is being deleted; its capture lasts until CNI says DEL.
    mesh.say("shop/cart", Membership::Unknown);
    enroller.reevaluate().await;
    assert_eq!(phases(&enroller), ["captured"]);
    mesh.say("shop/cart", Membership::Leave(LeaveReason::NativeTunnel));
    until("release by a change", || phases(&enroller) == ["left"]).await;
    assert_eq!(mesh.taken_log(), ["capture shop/cart", "release shop/cart"]);
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test]
async fn a_busy_port_is_named_with_the_pod_and_nothing_is_left() {
    let ns = testing::with_addresses(&["10.77.0.1/24"]);
    let (mesh, enroller) = enroller();
    mesh.enrol("shop/cart");
    let sidecar = ns.listen("10.77.0.1:15006".parse().unwrap()).unwrap();
    let e = enroller.add(cart(), same(&ns), LONG).await.unwrap_err();
    assert_eq!(e.to_string(), "10.77.0.1:15006 is in use inside pod shop/cart");
    assert_eq!(ns.tcp_listeners().unwrap(), ["10.77.0.1:15006".parse().unwrap()]);
    let e = enroller.check(&cart(), None).await.unwrap_err();
    assert!(e.to_string().contains("10.77.0.1:15006 is in use"), "{e}");
    // It is tried again, and works once the port is free.
    drop(sidecar);
    enroller.reevaluate().await;
    assert_eq!(phases(&enroller), ["captured"]);
}

#[tokio::test]
async fn failing_and_hanging_captures() {
    let ns = testing::with_addresses(&["10.77.0.1/24"]);
    let (mesh, enroller) =
        testing_mesh::enroller(Limits { capture: Duration::from_millis(50), ..Limits::default() });
    mesh.enrol("shop/cart");
    mesh.fail.store(true, SeqCst);
    let e = enroller.add(cart(), same(&ns), LONG).await.unwrap_err();
    assert_eq!(
        e.full_message(),
        "pod shop/cart cannot be captured: the data path refused the pod: no room in the map"
    );
    mesh.fail.store(false, SeqCst);
    mesh.hang.store(true, SeqCst);
    let e = enroller.add(cart(), same(&ns), LONG).await.unwrap_err();
    assert!(matches!(e, EnrollError::CaptureTimeout { .. }), "{e}");
    assert_eq!(mesh.taken_log(), ["release nothing"], "what a broken-off capture left must be released");
    mesh.hang.store(false, SeqCst);
    assert_eq!(enroller.add(cart(), same(&ns), LONG).await.unwrap(), Added::Captured);
}

#[tokio::test]
async fn a_new_sandbox_replaces_the_old_one_and_a_late_del_does_not_hurt_it() {
    let old = testing::with_addresses(&["10.77.0.1/24"]);
    let new = testing::with_addresses(&["10.77.0.1/24"]);
    let (mesh, enroller) = enroller();
    mesh.enrol("shop/cart");
    enroller.add(cart(), same(&old), LONG).await.unwrap();
    enroller.add(pod("cart", "u1", "c2"), same(&new), LONG).await.unwrap();
    assert_eq!(mesh.taken_log(), ["capture shop/cart", "release shop/cart", "capture shop/cart"]);
    assert_eq!(enroller.pods().len(), 1);
    assert_eq!(enroller.del(&cart(), Some(old.id())).await, 0);
    assert_eq!(enroller.pods()[0].cookie, new.cookie());
}

#[tokio::test]
async fn what_cannot_be_enrolled() {
    let (mesh, enroller) = testing_mesh::enroller(Limits { pods: 1, ..Limits::default() });
    mesh.enrol("shop/cart");
    let e = enroller.add(cart(), NetNs::current().unwrap(), LONG).await.unwrap_err();
    assert!(matches!(e, EnrollError::HostNetwork { .. }), "{e}");
    let (empty, second) = (testing::fresh(), testing::fresh());
    let e = enroller.add(cart(), same(&empty), LONG).await.unwrap_err();
    assert!(matches!(e, EnrollError::NoAddress { .. }), "{e}");
    let e = enroller.add(pod("two", "u2", "c2"), second, LONG).await.unwrap_err();
    assert_eq!(e.to_string(), "pod shop/two is one too many: this node's limit is 1");
}

#[tokio::test]
async fn gc_releases_what_cni_has_added_and_nothing_else() {
    let (a, b, c) = (
        testing::with_addresses(&["10.77.0.1/24"]),
        testing::with_addresses(&["10.77.0.2/24"]),
        testing::with_addresses(&["10.77.0.3/24"]),
    );
    let (mesh, enroller) = enroller();
    for name in ["a", "b", "scanned"] {
        mesh.enrol(&format!("shop/{name}"));
    }
    enroller.add(pod("a", "u1", "c1"), a, LONG).await.unwrap();
    enroller.add(pod("b", "u2", "c2"), b, LONG).await.unwrap();
    enroller.add(pod("scanned", "u3", ""), c, LONG).await.unwrap();
    assert_eq!(enroller.gc(&["c2".to_owned()]).await, 1);
    let left: Vec<String> = enroller.pods().iter().map(|p| p.info.name.clone()).collect();
    assert_eq!(left, ["b", "scanned"]);
    // A pod found by the scan goes by its UID.
    assert_eq!(enroller.del(&pod("scanned", "u3", "c3"), None).await, 1);
}

/// A `/proc` with one process in the namespace and cgroup given, beside process 1 in the daemon's namespace.
fn fake_proc(dir: &Path, ns: &NetNs, cgroup: &str) {
    use std::os::fd::AsRawFd;
    let own = format!("/proc/{}", std::process::id());
    for (pid, netns, cgroup) in [
        ("self", format!("{own}/ns/net"), "0::/init.scope"),
        ("1", format!("{own}/ns/net"), cgroup),
        ("77", format!("{own}/fd/{}", ns.as_fd().as_raw_fd()), cgroup),
        ("78", format!("{own}/fd/{}", ns.as_fd().as_raw_fd()), cgroup),
    ] {
        fs::create_dir_all(dir.join(pid).join("ns")).unwrap();
        symlink(netns, dir.join(pid).join("ns/net")).unwrap();
        fs::write(dir.join(pid).join("cgroup"), cgroup).unwrap();
    }
    fs::create_dir(dir.join("sys")).unwrap();
}

#[tokio::test]
async fn running_pods_are_found_named_by_address_and_given_up_when_they_vanish() {
    let ns = testing::with_addresses(&["10.77.0.1/24"]);
    let proc_root = tempfile::tempdir().unwrap();
    fake_proc(proc_root.path(), &ns, "0::/kubepods/burstable/poduid-1/c");
    let config = ScanConfig { proc_root: proc_root.path().into(), ..ScanConfig::default() };
    let (mesh, enroller) = enroller();

    assert_eq!(enroller.scan(&config).await.unwrap(), 1, "two processes are one pod, the host's is none");
    assert_eq!(phases(&enroller), ["pending"]);
    mesh.address(ADDR, "shop/cart");
    mesh.enrol("shop/cart");
    enroller.reevaluate().await;
    let pods = enroller.pods();
    assert_eq!(pods[0].phase, Phase::Captured);
    assert_eq!(pods[0].info.full_name().unwrap().to_string(), "shop/cart");
    assert_eq!(pods[0].info.uid, "uid-1");
    assert_eq!(enroller.scan(&config).await.unwrap(), 1);
    assert_eq!(mesh.taken_log(), ["capture shop/cart"], "a second scan captured the pod again");

    assert_eq!(enroller.sweep(proc_root.path()).await.unwrap(), 0);
    for pid in ["77", "78"] {
        fs::remove_dir_all(proc_root.path().join(pid)).unwrap();
    }
    assert_eq!(enroller.sweep(proc_root.path()).await.unwrap(), 0, "one look is not enough");
    assert_eq!(enroller.sweep(proc_root.path()).await.unwrap(), 1);
    assert_eq!(mesh.taken_log(), ["release shop/cart"]);
}

#[tokio::test]
async fn a_daemon_that_sees_no_processes_releases_nothing() {
    let ns = testing::with_addresses(&["10.77.0.1/24"]);
    let (mesh, enroller) = enroller();
    mesh.enrol("shop/cart");
    enroller.add(cart(), ns, LONG).await.unwrap();
    let empty = tempfile::tempdir().unwrap();
    for _ in 0..4 {
        assert_eq!(enroller.sweep(empty.path()).await.unwrap(), 0);
    }
    assert_eq!(phases(&enroller), ["captured"]);
}

#[tokio::test]
async fn pods_do_not_wait_for_each_other_and_the_gauge_counts_them() {
    let (mesh, enroller) = enroller();
    let mut adding = Vec::new();
    for i in 1..=20 {
        let ns = testing::with_addresses(&[&format!("10.77.0.{i}/24")]);
        let enroller = Arc::clone(&enroller);
        let info = pod(&format!("p{i}"), &format!("u{i}"), &format!("c{i}"));
        adding.push(tokio::spawn(async move { enroller.add(info, ns, LONG).await }));
    }
    until("all records", || enroller.pods().len() == 20).await;
    // Decided in the reverse order of their coming.
    for i in (1..=20).rev() {
        mesh.enrol(&format!("shop/p{i}"));
    }
    for add in adding {
        assert_eq!(add.await.unwrap().unwrap(), Added::Captured);
    }
    let text = enroller.metrics().render().unwrap();
    assert!(text.contains("nodemesh_pods{state=\"captured\"} 20.0\n"), "{text}");
}
