//! Tests of the whole plugin: against nobody, against daemons that misbehave, and against the real server.

use super::{Outcome, plugin};
use crate::{
    enroll::{
        LeaveReason, Limits, Membership,
        protocol::{self, Done, ErrorKind, Failure, Op, Request, Response},
        server,
        testing::enroller,
    },
    net::{fdpass, testing, unix},
};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    io::{Read, Write},
    os::fd::{AsFd, AsRawFd},
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};
use tokio_util::sync::CancellationToken;

type Env = BTreeMap<&'static str, String>;

fn env(command: &str) -> Env {
    BTreeMap::from([
        ("CNI_COMMAND", command.to_owned()),
        ("CNI_CONTAINERID", "c1".to_owned()),
        ("CNI_NETNS", "/proc/self/ns/net".to_owned()),
        ("CNI_IFNAME", "eth0".to_owned()),
        ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart;K8S_POD_UID=u1".to_owned()),
    ])
}

fn conf(socket: &Path) -> Value {
    json!({
        "cniVersion": "1.1.0", "name": "pods", "type": "mesh-cni", "socketPath": socket, "timeoutSeconds": 5,
        "unknownKey": { "is": "passed over" },
        "prevResult": {
            "cniVersion": "1.1.0",
            "interfaces": [{ "name": "eth0", "sandbox": "/proc/self/ns/net" }],
            "ips": [{ "address": "10.77.0.1/24", "interface": 0, "gateway": "10.77.0.254" }],
            "dns": { "nameservers": ["10.0.0.10"] },
        },
    })
}

fn run_raw(env: &Env, stdin: &[u8]) -> Outcome {
    plugin::run(&|name| env.get(name).cloned(), &mut &stdin[..])
}

fn run(env: &Env, conf: &Value) -> Outcome {
    run_raw(env, conf.to_string().as_bytes())
}

fn error(outcome: Outcome) -> (u64, String) {
    let Outcome::Failed(e) = outcome else { panic!("no error: {outcome:?}") };
    assert!(!e["details"].as_str().unwrap().is_empty(), "no details: {e}");
    assert!(super::VERSIONS.contains(&e["cniVersion"].as_str().unwrap()), "{e}");
    (
        e["code"].as_u64().unwrap(),
        format!("{} {}", e["msg"].as_str().unwrap(), e["details"].as_str().unwrap()),
    )
}

fn nowhere() -> PathBuf {
    "/nonexistent/cni.sock".into()
}

#[test]
fn wrong_environments() {
    let good = conf(&nowhere());
    for (command, variable, value, code) in [
        ("ADD", "CNI_COMMAND", None, 4),
        ("ADD", "CNI_COMMAND", Some("DESTROY"), 4),
        ("ADD", "CNI_CONTAINERID", None, 4),
        ("ADD", "CNI_CONTAINERID", Some("../x"), 4),
        ("ADD", "CNI_IFNAME", Some(""), 4),
        ("ADD", "CNI_NETNS", None, 4),
        ("ADD", "CNI_NETNS", Some("/nonexistent/netns"), 4),
        ("ADD", "CNI_NETNS", Some("/proc"), 4),
        ("ADD", "CNI_ARGS", None, 4),
        ("ADD", "CNI_ARGS", Some("K8S_POD_NAMESPACE=shop"), 4),
        ("CHECK", "CNI_NETNS", None, 4),
        ("CHECK", "CNI_ARGS", Some("x"), 4),
        ("DEL", "CNI_CONTAINERID", None, 4),
    ] {
        let mut env = env(command);
        match value {
            Some(value) => drop(env.insert(variable, value.to_owned())),
            None => drop(env.remove(variable)),
        }
        let (got, text) = error(run(&env, &good));
        assert_eq!(got, code, "{variable}={value:?}: {text}");
        assert!(text.contains(variable), "{variable} is not named: {text}");
    }
}

#[test]
fn wrong_configurations() {
    for (stdin, code, named) in [
        (b"not json".to_vec(), 6, "cannot be decoded"),
        (b"".to_vec(), 6, "cannot be decoded"),
        (b"[]".to_vec(), 6, "cannot be decoded"),
        (vec![b' '; 2 * 1024 * 1024], 6, "1048576"),
        (b"{}".to_vec(), 6, "cniVersion"),
        (br#"{"cniVersion":"0.2.0"}"#.to_vec(), 1, "0.2.0"),
        (br#"{"cniVersion":"2.0.0"}"#.to_vec(), 1, "2.0.0"),
        (br#"{"cniVersion":"1.1.0"}"#.to_vec(), 7, "prevResult"),
        (br#"{"cniVersion":"1.1.0","prevResult":[]}"#.to_vec(), 7, "prevResult"),
        (br#"{"cniVersion":"1.1.0","socketPath":"x.sock"}"#.to_vec(), 7, "socketPath"),
        (br#"{"cniVersion":"1.1.0","timeoutSeconds":0}"#.to_vec(), 7, "timeoutSeconds"),
        (br#"{"cniVersion":"1.1.0","timeoutSeconds":9999}"#.to_vec(), 7, "timeoutSeconds"),
        (br#"{"cniVersion":"1.1.0","timeoutSeconds":"x"}"#.to_vec(), 6, "cannot be decoded"),
        (
            br#"{"cniVersion":"1.1.0","prevResult":{"ips":[{"address":"x/24"}]}}"#.to_vec(),
            7,
            "prevResult.ips",
        ),
        (br#"{"cniVersion":"1.1.0","prevResult":{"ips":7}}"#.to_vec(), 7, "prevResult.ips"),
    ] {
        let (got, text) = error(run_raw(&env("ADD"), &stdin));
        let shown = String::from_utf8_lossy(&stdin[..stdin.len().min(80)]).into_owned();
        assert_eq!(got, code, "{shown}: {text}");
        assert!(text.contains(named), "{shown}: {text}");
    }
}

#[test]
fn versions_are_told_and_commands_need_theirs() {
    let Outcome::Done(Some(v)) = run_raw(&env("VERSION"), br#"{"cniVersion":"0.4.0"}"#) else { panic!() };
    assert_eq!(v["cniVersion"], "0.4.0");
    assert_eq!(v["supportedVersions"], json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
    assert!(matches!(run_raw(&env("VERSION"), b""), Outcome::Done(Some(_))));
    for (command, version) in [("CHECK", "0.3.1"), ("STATUS", "1.0.0"), ("GC", "1.0.0")] {
        let mut conf = conf(&nowhere());
        conf["cniVersion"] = version.into();
        let (code, text) = error(run(&env(command), &conf));
        assert_eq!(code, 1, "{command} {version}: {text}");
    }
}

#[test]
fn a_daemon_that_is_away() {
    let conf = conf(&nowhere());
    for (command, code) in [("ADD", 11), ("CHECK", 11), ("STATUS", 50)] {
        let (got, text) = error(run(&env(command), &conf));
        assert_eq!(got, code, "{command}: {text}");
        assert!(text.contains("DaemonSet"), "{text}");
    }
    assert!(matches!(run(&env("DEL"), &conf), Outcome::Unfinished(_)), "DEL must not fail");
    // Nor when the namespace is gone, and the runtime passes less than for ADD.
    let mut bare = env("DEL");
    bare.remove("CNI_NETNS");
    bare.remove("CNI_ARGS");
    assert!(matches!(run(&bare, &conf), Outcome::Unfinished(_)));
}

#[test]
fn excluded_namespaces_do_not_need_the_daemon() {
    let mut env = env("ADD");
    env.insert("CNI_ARGS", "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=dns".to_owned());
    let conf = conf(&nowhere());
    let Outcome::Done(Some(result)) = run(&env, &conf) else { panic!() };
    assert_eq!(result, conf["prevResult"]);
    let mut none = conf.clone();
    none["excludeNamespaces"] = json!([]);
    assert_eq!(error(run(&env, &none)).0, 11);
}

/// A daemon that answers every request with what `answer` returns, and otherwise does nothing right.
fn daemon(answer: impl Fn(Request, bool) -> Vec<u8> + Send + 'static) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cni.sock");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut prefix = [0; 4];
            let (n, fd) = fdpass::recv(&stream, &mut prefix).unwrap();
            assert_eq!(n, 4);
            let mut json = vec![0; protocol::length(prefix).unwrap()];
            stream.read_exact(&mut json).unwrap();
            let answer = answer(serde_json::from_slice(&json).unwrap(), fd.is_some());
            let _ = stream.write_all(&answer);
            if answer.is_empty() {
                // Hangs until the client gives up.
                let _ = stream.read(&mut [0]);
            }
        }
    });
    (dir, path)
}

fn ok(done: Done) -> Vec<u8> {
    protocol::encode(&Response::Ok(done)).unwrap()
}

#[test]
fn what_the_daemon_is_asked() {
    let (sender, requests) = std::sync::mpsc::channel();
    let (_dir, socket) = daemon(move |request, fd| {
        sender.send((request.op, fd)).unwrap();
        ok(Done::Nothing)
    });
    let mut conf = conf(&socket);
    conf["cni.dev/valid-attachments"] = json!([
        { "containerID": "c2", "ifname": "eth0" }, { "containerID": "c1", "ifname": "eth0" },
        { "containerID": "c2", "ifname": "eth1" },
    ]);
    let Outcome::Done(Some(result)) = run(&env("ADD"), &conf) else { panic!() };
    assert_eq!(result, conf["prevResult"], "prevResult is not passed on unchanged");
    for command in ["DEL", "CHECK", "STATUS", "GC"] {
        assert!(matches!(run(&env(command), &conf), Outcome::Done(None)), "{command}");
    }
    let sandbox = protocol::Sandbox {
        container_id: "c1".into(),
        namespace: "shop".into(),
        name: "cart".into(),
        uid: "u1".into(),
    };
    let addresses = vec!["10.77.0.1".parse().unwrap()];
    let expected = [
        (Op::Add { sandbox: sandbox.clone(), addresses, timeout_ms: 4500 }, true),
        (Op::Del { sandbox: sandbox.clone() }, true),
        (Op::Check { sandbox }, true),
        (Op::Status, false),
        (Op::Gc { keep: vec!["c1".into(), "c2".into()] }, false),
    ];
    assert_eq!(requests.try_iter().collect::<Vec<_>>(), expected);

    conf.as_object_mut().unwrap().remove("cni.dev/valid-attachments");
    let (code, text) = error(run(&env("GC"), &conf));
    assert!(code == 7 && text.contains("valid-attachments"), "{code} {text}");
}

#[test]
fn addresses_of_the_sandbox_only() {
    let ips = |prev: Value| super::conf::pod_addresses(&prev, Path::new("/run/netns/a")).unwrap();
    let interfaces = json!([
        { "name": "cni0" }, { "name": "veth1", "sandbox": "" }, { "name": "eth0", "sandbox": "/run/netns/a" },
        { "name": "eth0", "sandbox": "/run/netns/b" },
    ]);
    let prev = json!({ "interfaces": interfaces, "ips": [
        { "address": "10.0.0.1/24", "interface": 0 }, { "address": "10.0.0.2/24", "interface": 1 },
        { "address": "10.0.0.3/24", "interface": 2 }, { "address": "fd00::3/64", "interface": 2 },
        { "address": "10.0.0.4/24", "interface": 3 }, { "address": "10.0.0.5/24" },
        { "address": "fe80::1/64", "interface": 2 }, { "address": "10.0.0.3/24", "interface": 2 },
        { "address": "10.0.0.9/24", "interface": 99 },
    ]});
    let expected: Vec<std::net::IpAddr> =
        ["10.0.0.3", "fd00::3", "10.0.0.5"].map(|ip| ip.parse().unwrap()).into();
    assert_eq!(ips(prev), expected);
    // The runtime may write the namespace's path differently.
    let other = json!({ "interfaces": [{ "name": "eth0", "sandbox": "/var/run/netns/a" }],
                        "ips": [{ "address": "10.0.0.3/24", "interface": 0 }] });
    assert_eq!(ips(other).len(), 1);
    assert!(ips(json!({})).is_empty());
    assert!(ips(json!({ "ips": null })).is_empty());
}

#[test]
fn daemons_that_misbehave() {
    let failure = |kind| {
        let failure = Failure { kind, message: "pod shop/cart: no".into(), remedy: "do this".into() };
        protocol::encode(&Response::Error(failure)).unwrap()
    };
    for (answer, code, named) in [
        (Vec::new(), 11, "no answer within 1000 ms"),
        (b"\0\0".to_vec(), 11, "no answer within"),
        (b"\xff\xff\xff\xff".to_vec(), 11, "4294967295 bytes"),
        (b"\0\0\0\x02[]".to_vec(), 11, "not the expected JSON"),
        (failure(ErrorKind::TryAgain), 11, "do this"),
        (failure(ErrorKind::Invalid), 4, "do this"),
        (failure(ErrorKind::Failed), 100, "pod shop/cart: no"),
        (failure(ErrorKind::NotReady), 50, "do this"),
        (failure(ErrorKind::Version), 101, "do this"),
    ] {
        let hangs = answer == b"\0\0";
        let sent = answer.clone();
        let (_dir, socket) = daemon(move |_, _| {
            if hangs {
                thread::sleep(std::time::Duration::from_secs(2));
                return b"\0\0".to_vec();
            }
            sent.clone()
        });
        let mut conf = conf(&socket);
        conf["timeoutSeconds"] = 1.into();
        let (got, text) = error(run(&env("ADD"), &conf));
        assert_eq!(got, code, "{answer:?}: {text}");
        assert!(text.contains(named), "{answer:?}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn against_the_real_server() {
    let ns = testing::with_addresses(&["10.77.0.1/24"]);
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("cni.sock");
    let (mesh, enroller) = enroller(Limits::default());
    let stop = CancellationToken::new();
    let serving =
        tokio::spawn(server::serve(unix::listen(&socket).unwrap(), Arc::clone(&enroller), stop.clone()));

    let netns = format!("/proc/{}/fd/{}", std::process::id(), ns.as_fd().as_raw_fd());
    let plugin = |command: &str, change: &dyn Fn(&mut Env, &mut Value)| {
        let (mut env, mut conf) = (env(command), conf(&socket));
        env.insert("CNI_NETNS", netns.clone());
        change(&mut env, &mut conf);
        tokio::task::spawn_blocking(move || run(&env, &conf))
    };
    let as_is = |_: &mut Env, _: &mut Value| {};

    // Nobody has said anything yet: a clear answer, in time.
    let quick = |_: &mut Env, conf: &mut Value| conf["timeoutSeconds"] = 1.into();
    let (code, text) = error(plugin("ADD", &quick).await.unwrap());
    assert!(code == 11 && text.contains("ms whether pod shop/cart is in the mesh"), "{code} {text}");

    // ADD waits for the control plane.
    let adding = plugin("ADD", &as_is);
    mesh.enrol("shop/cart");
    let Outcome::Done(Some(result)) = adding.await.unwrap() else { panic!() };
    assert_eq!(result["ips"][0]["address"], "10.77.0.1/24");
    assert_eq!(mesh.taken_log(), ["capture shop/cart"]);
    let pods = enroller.pods();
    assert_eq!((pods[0].info.container_id.as_str(), pods[0].info.uid.as_str()), ("c1", "u1"));
    assert_eq!(pods[0].cookie, ns.cookie());
    assert!(matches!(plugin("CHECK", &as_is).await.unwrap(), Outcome::Done(None)));

    // The kernel lost it.
    let lost = mesh.held.lock().unwrap().remove(&ns.cookie()).unwrap();
    let (code, text) = error(plugin("CHECK", &as_is).await.unwrap());
    assert!(code == 100 && text.contains("shop/cart"), "{code} {text}");
    mesh.held.lock().unwrap().insert(ns.cookie(), lost);

    let gc = |_: &mut Env, conf: &mut Value| {
        conf["cni.dev/valid-attachments"] = json!([{ "containerID": "c1", "ifname": "eth0" }]);
    };
    assert!(matches!(plugin("GC", &gc).await.unwrap(), Outcome::Done(None)));
    assert_eq!(enroller.pods().len(), 1);
    for _ in 0..2 {
        assert!(matches!(plugin("DEL", &as_is).await.unwrap(), Outcome::Done(None)));
    }
    assert!(enroller.pods().is_empty());
    assert_eq!(mesh.taken_log(), ["release shop/cart"]);

    // A pod that is none of the mesh's passes.
    mesh.say("shop/cart", Membership::Leave(LeaveReason::NotInMesh));
    assert!(matches!(plugin("ADD", &as_is).await.unwrap(), Outcome::Done(Some(_))));

    // A regular file, and the host's own namespace.
    for (path, named) in
        [("/proc/self/stat", "not a network namespace"), ("/proc/self/ns/net", "host's network")]
    {
        let wrong = |env: &mut Env, _: &mut Value| drop(env.insert("CNI_NETNS", path.to_owned()));
        let (code, text) = error(plugin("ADD", &wrong).await.unwrap());
        assert!(code == 4 && text.contains(named), "{path}: {code} {text}");
    }

    assert!(matches!(plugin("STATUS", &as_is).await.unwrap(), Outcome::Done(None)));
    *mesh.not_ready.lock().unwrap() = Some("BPF is not loaded".to_owned());
    let (code, text) = error(plugin("STATUS", &as_is).await.unwrap());
    assert!(code == 50 && text.contains("BPF is not loaded"), "{code} {text}");

    let metrics = enroller.metrics().render().unwrap();
    assert!(
        metrics.contains("nodemesh_enroll_total{operation=\"add\",outcome=\"captured\"} 1\n"),
        "{metrics}"
    );
    stop.cancel();
    serving.await.unwrap();
    assert_eq!(error(plugin("ADD", &as_is).await.unwrap()).0, 11);
}

#[tokio::test]
async fn requests_that_the_server_cannot_read() {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixStream,
    };
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("cni.sock");
    let (_, enroller) = enroller(Limits::default());
    let serving =
        tokio::spawn(server::serve(unix::listen(&socket).unwrap(), enroller, CancellationToken::new()));
    for (request, expected) in [
        (&b"\0\0\0\x02[]"[..], Some(ErrorKind::Invalid)),
        (b"\xff\xff\xff\xff", Some(ErrorKind::Invalid)),
        (b"\0\0\0\x19{\"version\":9,\"op\":\"warp\"}", Some(ErrorKind::Version)),
        (b"\0\0\0\x19{\"version\":1,\"op\":\"warp\"}", Some(ErrorKind::Invalid)),
        (b"\0\0", None),
    ] {
        let mut stream = UnixStream::connect(&socket).await.unwrap();
        stream.write_all(request).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        match expected {
            None => assert!(answer.is_empty(), "{request:?}"),
            Some(kind) => match serde_json::from_slice(&answer[4..]).unwrap() {
                Response::Error(failure) => assert_eq!(failure.kind, kind, "{request:?}"),
                other => panic!("{request:?}: {other:?}"),
            },
        }
    }
    // A request that is well formed, for a pod whose namespace is missing, or is something else.
    let sandbox = protocol::Sandbox {
        container_id: "c1".into(),
        namespace: "shop".into(),
        name: "cart".into(),
        uid: "u1".into(),
    };
    let request = |op| protocol::encode(&Request { version: protocol::VERSION, op }).unwrap();
    let add = request(Op::Add { sandbox: sandbox.clone(), addresses: vec![], timeout_ms: 100 });
    let pidns = std::fs::File::open("/proc/self/ns/pid").unwrap();
    let file = std::fs::File::open("/proc/self/maps").unwrap();
    for (name, fd, words) in [
        ("nothing", None, "no network namespace came with the request for pod shop/cart"),
        ("another namespace", Some(&pidns), "shop/cart"),
        ("a file", Some(&file), "shop/cart"),
    ] {
        let stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        match fd {
            Some(fd) => drop(fdpass::send(&stream, &add, Some(std::os::fd::AsFd::as_fd(fd))).unwrap()),
            None => std::io::Write::write_all(&mut &stream, &add).unwrap(),
        }
        stream.set_nonblocking(true).unwrap();
        let mut stream = UnixStream::from_std(stream).unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        match serde_json::from_slice(&answer[4..]).unwrap() {
            Response::Error(failure) => {
                assert!(failure.message.contains(words) && !failure.remedy.is_empty(), "{name}: {failure:?}");
            }
            other => panic!("{name}: {other:?}"),
        }
    }
    serving.abort();
}
