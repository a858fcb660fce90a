//! The laboratory of the capture tests: pods on one node, a data path of this process, and a relay of a few threads that
//! plays the daemon's outbound and inbound parts.

use anyhow::{Context, Result, ensure};
use mesh_common::code::Counter;
use mesh_node::{
    bpf::{
        Away, Backend, Balancing, CapturedPod, Datapath, Feature, Frontend, Heartbeat, Intent, LoadOptions,
        SocketMeta, Verdict,
    },
    net::ns::NetNs,
};
use mesh_tests::{
    cgroup,
    cluster::{Cluster, Pod},
};
use mesh_xds::model::Protocol;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd as _, BorrowedFd},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

/// Connects per outcome and way of connecting.
pub(super) const MANY: u64 = 20_000;
pub(super) const RELAY_THREADS: usize = 8;

const BEAT: Duration = Duration::from_millis(250);

/// The relay's view: connections without an original destination, or with a wrong one.
#[derive(Debug, Default)]
pub(super) struct Wrong {
    pub(super) missing: AtomicU64,
    pub(super) unexpected: AtomicU64,
}

/// A data path of this test and the pods it captures.
pub(super) struct Lab<'a> {
    pub(super) cluster: &'a Cluster,
    pub(super) datapath: Datapath,
    pub(super) intent: Intent,
    pub(super) wrong: Arc<Wrong>,
    /// Where the relay goes for an original destination.
    pub(super) upstream: BTreeMap<SocketAddr, SocketAddr>,
    pub(super) listeners: Vec<TcpListener>,
    /// Beats while it is there.
    pub(super) heart: Option<Heart>,
}

/// The heartbeat of the daemon that this process plays; it stops, without a word, when this is dropped.
pub(super) struct Heart {
    _stop: mpsc::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Heart {
    pub(super) fn start(heartbeat: Heartbeat) -> Result<Self> {
        heartbeat.beat()?;
        let (stop, stopped) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            while stopped.recv_timeout(BEAT) == Err(mpsc::RecvTimeoutError::Timeout) {
                if heartbeat.beat().is_err() {
                    break;
                }
            }
        });
        Ok(Self { _stop: stop, thread: Some(thread) })
    }

    /// After this there is not one beat more.
    pub(super) fn stop(mut self) {
        let thread = self.thread.take();
        drop(self);
        thread.map(JoinHandle::join);
    }
}

impl<'a> Lab<'a> {
    /// Loads the programs for a node of the cluster.
    pub(super) fn new(cluster: &'a Cluster, node: &str) -> Result<Self> {
        // So that every test here can be run as on an older kernel.
        let disabled = std::env::var("NODEMESH_DISABLE_FEATURES").unwrap_or_default();
        let disabled: Vec<String> = disabled.split(',').map(str::to_owned).collect();
        Self::without(cluster, node, &Feature::parse_all(&disabled)?)
    }

    /// Loads the programs without some features of the kernel.
    pub(super) fn without(cluster: &'a Cluster, node: &str, disabled: &BTreeSet<Feature>) -> Result<Self> {
        let node = cluster.node(node)?;
        let datapath = Datapath::load(&LoadOptions {
            // This process is the daemon and is not in the run's groups, which are killed at its end.
            cgroup_root: cgroup::mount_point()?,
            pin_dir: cluster.run.bpffs().join(format!("capture-{}", node.spec.name)),
            daemon_cgroup: own_cgroup()?,
            pods_cgroup: Some(node.pods_cgroup.path().to_owned()),
            host_netns_cookie: NetNs::open(&node.netns.path())?.cookie(),
            disabled: disabled.clone(),
        })
        .map_err(chain)?;
        let heart = Some(Heart::start(datapath.heartbeat())?);
        Ok(Self {
            cluster,
            datapath,
            intent: Intent::default(),
            wrong: Arc::default(),
            upstream: BTreeMap::new(),
            listeners: Vec::new(),
            heart,
        })
    }

    pub(super) fn frontend(&mut self, vip: &str, proto: Protocol, verdict: Verdict, backends: &[SocketAddr]) {
        let vip: SocketAddr = vip.parse().expect("a socket address");
        self.intent.frontends.push(Frontend {
            addr: vip.ip(),
            port: vip.port(),
            proto,
            verdict,
            away: Away::Deny,
            balancing: Balancing::Random,
            affinity: None,
            backends: backends.iter().map(|addr| Backend { addr: *addr, weight: 1 }).collect(),
        });
    }

    /// Captures a pod as enrolment does, with a relay for its outbound connections, and for the inbound ones too.
    pub(super) fn capture(&mut self, key: &str, strict: bool) -> Result<()> {
        let pod = self.cluster.pod(key)?;
        let netns = NetNs::open(&pod.netns.path())?;
        let addrs = [IpAddr::V4(pod.spec.v4), IpAddr::V6(pod.spec.v6)];
        let outbound = addrs.map(|addr| listen(pod, SocketAddr::new(addr, 0)));
        let outbound = outbound.into_iter().collect::<Result<Vec<_>>>()?;
        let inbound = addrs.map(|addr| listen(pod, SocketAddr::new(addr, 15006)));
        let inbound = inbound.into_iter().collect::<Result<Vec<_>>>()?;
        self.intent.pods.push(CapturedPod {
            cookie: netns.cookie(),
            addrs: addrs.to_vec(),
            outbound_v4: Some(outbound[0].local_addr()?.port()),
            outbound_v6: Some(outbound[1].local_addr()?.port()),
            dns: false,
            strict,
            port_strict: BTreeMap::new(),
        });
        self.apply()?;
        for (addr, listener) in addrs.iter().zip(&inbound) {
            self.datapath.set_inbound_listener(*addr, listener.as_fd()).map_err(chain)?;
        }
        let old = netns.tcp_listeners()?;
        self.datapath.sync_listeners(netns.cookie(), &old).map_err(chain)?;
        let file = File::open(pod.netns.path())?;
        self.datapath.attach_inbound(file.as_fd(), netns.cookie()).map_err(chain)?;
        for listener in outbound {
            self.relay(&listener, pod, true)?;
            self.listeners.push(listener);
        }
        for listener in inbound {
            self.relay(&listener, pod, false)?;
            self.listeners.push(listener);
        }
        Ok(())
    }

    pub(super) fn apply(&mut self) -> Result<()> {
        let report = self.datapath.apply(&self.intent).map_err(chain)?;
        ensure!(report.issues.is_empty(), "{:?}", report.issues);
        Ok(())
    }

    /// Starts the relay's threads on a listener. They end with the process.
    pub(super) fn relay(&self, listener: &TcpListener, pod: &Pod, outbound: bool) -> Result<()> {
        for _ in 0..RELAY_THREADS {
            let listener = listener.try_clone()?;
            let sockets = self.datapath.sockets();
            let upstream = self.upstream.clone();
            let wrong = self.wrong.clone();
            let pod = pod.netns.clone();
            std::thread::spawn(move || {
                // All sockets of this thread are made in the pod.
                let result = pod.within(|| {
                    for client in listener.incoming() {
                        let Ok(client) = client else { continue };
                        drop(serve(&client, &sockets, &upstream, &wrong, outbound));
                    }
                    Ok(())
                });
                drop(result);
            });
        }
        Ok(())
    }

    pub(super) fn counter(&self, counter: Counter) -> Result<u64> {
        let all = self.datapath.counters().map_err(chain)?;
        Ok(all.into_iter().find(|(name, _)| *name == counter).map_or(0, |(_, count)| count))
    }

    pub(super) fn assert_no_wrong_destination(&self, what: &str) {
        let wrong = &self.wrong;
        let counts = (wrong.missing.load(Ordering::Relaxed), wrong.unexpected.load(Ordering::Relaxed));
        assert_eq!(counts, (0, 0), "{what}: original destinations (missing, unexpected)");
    }

    pub(super) fn end(mut self) -> Result<()> {
        self.datapath.unload().map_err(chain)
    }
}

/// The group of this process, which plays the daemon.
pub(super) fn own_cgroup() -> Result<PathBuf> {
    let groups = std::fs::read_to_string("/proc/self/cgroup")?;
    let path = groups
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .context("no cgroup2 in /proc/self/cgroup")?;
    Ok(cgroup::mount_point()?.join(path))
}

/// The whole chain of causes; the data path's errors are structured.
pub(super) fn chain(error: mesh_node::bpf::BpfError) -> anyhow::Error {
    anyhow::Error::new(error)
}

pub(super) fn listen(pod: &Pod, addr: SocketAddr) -> Result<TcpListener> {
    pod.netns.within(|| TcpListener::bind(addr).with_context(|| format!("listen on {addr}")))
}

/// Carries one connection whose sides take turns, as the `who` protocol does.
pub(super) fn serve(
    client: &TcpStream,
    sockets: &SocketMeta,
    upstream: &BTreeMap<SocketAddr, SocketAddr>,
    wrong: &Wrong,
    outbound: bool,
) -> io::Result<()> {
    let target = if outbound {
        let Some(original) = sockets.original_dst(client.as_fd())? else {
            wrong.missing.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        };
        let Some(target) = upstream.get(&original.dialled) else {
            wrong.unexpected.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        };
        // As the daemon does: the kernel's choice first.
        original.chosen.unwrap_or(*target)
    } else {
        client.local_addr()?
    };
    let announced = client.peer_addr()?;
    let announce = |socket: BorrowedFd<'_>| match outbound {
        true => Ok(()),
        false => sockets.announce_client(socket, announced),
    };
    let mut server = dial(target, announce)?;
    let mut buffer = [0; 4096];
    let mut reader = client;
    loop {
        let n = reader.read(&mut buffer)?;
        if n == 0 {
            return server.shutdown(Shutdown::Write);
        }
        server.write_all(&buffer[..n])?;
        let n = server.read(&mut buffer)?;
        if n == 0 {
            return client.shutdown(Shutdown::Write);
        }
        let mut writer = client;
        writer.write_all(&buffer[..n])?;
    }
}

pub(super) fn dial(
    to: SocketAddr,
    before: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
) -> io::Result<TcpStream> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
    before(socket.as_fd())?;
    socket.connect(&to.into())?;
    Ok(socket.into())
}

pub(super) fn addr(ip: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(ip.into(), port)
}
