//! A mesh for tests: its answers are set by the test, and it keeps what it is given.

use super::{CaptureError, Enroller, Limits, LocalPod, Membership, Mesh, PodInfo};
use crate::metrics::Metrics;
use mesh_xds::model::NamespacedName;
use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};
use tokio::sync::watch;

/// An enroller with a fake mesh behind it.
pub(crate) fn enroller(limits: Limits) -> (Arc<FakeMesh>, Arc<Enroller<FakeMesh>>) {
    let mesh = Arc::new(FakeMesh::new());
    let enroller = Enroller::new(Arc::clone(&mesh), Arc::new(Metrics::default()), limits).unwrap();
    (mesh, enroller)
}

pub(crate) struct FakeMesh {
    names: Mutex<BTreeMap<String, Membership>>,
    addrs: Mutex<BTreeMap<IpAddr, NamespacedName>>,
    changes: watch::Sender<u64>,
    pub(crate) held: Mutex<BTreeMap<u64, LocalPod>>,
    pub(crate) log: Mutex<Vec<String>>,
    /// Captures fail.
    pub(crate) fail: AtomicBool,
    /// Captures never end.
    pub(crate) hang: AtomicBool,
    pub(crate) not_ready: Mutex<Option<String>>,
}

impl FakeMesh {
    fn new() -> Self {
        Self {
            names: Mutex::default(),
            addrs: Mutex::default(),
            changes: watch::channel(0).0,
            held: Mutex::default(),
            log: Mutex::default(),
            fail: false.into(),
            hang: false.into(),
            not_ready: Mutex::default(),
        }
    }

    /// The answer for the pod `NAMESPACE/NAME`.
    pub(crate) fn say(&self, pod: &str, membership: Membership) {
        self.names.lock().unwrap().insert(pod.to_owned(), membership);
        self.changes.send_modify(|n| *n += 1);
    }

    pub(crate) fn enrol(&self, pod: &str) {
        let (namespace, name) = pod.split_once('/').unwrap();
        self.say(pod, Membership::Enrol(NamespacedName::new(namespace, name)));
    }

    /// Lets the pod with this address be known by a name.
    pub(crate) fn address(&self, addr: &str, pod: &str) {
        let (namespace, name) = pod.split_once('/').unwrap();
        self.addrs.lock().unwrap().insert(addr.parse().unwrap(), NamespacedName::new(namespace, name));
    }

    pub(crate) fn taken_log(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

impl Mesh for FakeMesh {
    fn membership(&self, pod: &PodInfo) -> Membership {
        let by_addr = || pod.addrs.iter().find_map(|a| self.addrs.lock().unwrap().get(a).cloned());
        let Some(name) = pod.full_name().or_else(by_addr) else { return Membership::Unknown };
        self.names.lock().unwrap().get(&name.to_string()).cloned().unwrap_or(Membership::Unknown)
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn not_ready(&self) -> Option<String> {
        self.not_ready.lock().unwrap().clone()
    }

    async fn capture(&self, pod: LocalPod) -> Result<(), CaptureError> {
        if self.hang.load(SeqCst) {
            std::future::pending::<()>().await;
        }
        if self.fail.load(SeqCst) {
            return Err(CaptureError::Datapath("no room in the map".into()));
        }
        self.log.lock().unwrap().push(format!("capture {}", pod.info));
        assert!(self.held.lock().unwrap().insert(pod.cookie, pod).is_none(), "captured twice");
        Ok(())
    }

    async fn release(&self, cookie: u64) {
        let pod = self.held.lock().unwrap().remove(&cookie);
        let name = pod.map_or("nothing".to_owned(), |pod| pod.info.to_string());
        self.log.lock().unwrap().push(format!("release {name}"));
    }

    async fn is_captured(&self, cookie: u64) -> bool {
        self.held.lock().unwrap().contains_key(&cookie)
    }
}
