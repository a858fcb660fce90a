//! One certificate per identity, for as long as somebody needs it.

use super::{
    ca::{CaClient, CaError},
    exported::{Exported, ImportError},
};
use crate::tls::{CertError, LocalIdentity, TlsReject, WorkloadCert};
use mesh_xds::{delta::Backoff, model::SpiffeId};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType, string::Ia5String};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};
use tokio::{
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Identities that one node may have at once: far above what its pods can have.
pub const MAX_IDENTITIES: usize = 4096;

/// Certificates in a chain, roots included.
const MAX_CHAIN: usize = 32;

/// Longest sleep without a look at the clock, which may be set in the meantime.
const CLOCK_CHECK: Duration = Duration::from_secs(30);

/// How certificates are asked for.
#[derive(Clone, Copy, Debug)]
pub struct CertOptions {
    /// Life time to ask for.
    pub ttl: Duration,
    /// Requests in flight at once.
    pub max_parallel: usize,
    /// How long the CA may take.
    pub sign_timeout: Duration,
    /// Pause after failures in a row, with jitter.
    pub backoff: Backoff,
}

impl Default for CertOptions {
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(24 * 3600),
            max_parallel: 16,
            sign_timeout: Duration::from_secs(10),
            backoff: Backoff { initial: Duration::from_millis(200), max: Duration::from_secs(15) },
        }
    }
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The CA gave none.
    #[error("no certificate for {id}")]
    Ca {
        /// For whom.
        id: SpiffeId,
        /// Why.
        #[source]
        source: CaError,
    },
    /// The CA did not answer.
    #[error("no certificate for {id}: the CA did not answer within {} ms", .after.as_millis())]
    Timeout {
        /// For whom.
        id: SpiffeId,
        /// The limit.
        after: Duration,
    },
    /// The request could not be made.
    #[error("no request for a certificate for {id} can be made")]
    Request {
        /// For whom.
        id: SpiffeId,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// The answer is not certificates in PEM, or too many of them.
    #[error("the CA's answer for {id} is not a chain of at most {MAX_CHAIN} certificates in PEM: {detail}")]
    Answer {
        /// For whom.
        id: SpiffeId,
        /// The parser's words.
        detail: String,
    },
    /// The certificate is not what we asked for.
    #[error("the CA's certificate is of no use")]
    Certificate(#[source] CertError),
    /// TLS cannot be configured.
    #[error("TLS cannot be configured for {id}")]
    Tls {
        /// For whom.
        id: SpiffeId,
        /// Why.
        #[source]
        source: TlsReject,
    },
    /// Too many identities.
    #[error("this node has {MAX_IDENTITIES} identities already; {id} gets no certificate")]
    TooMany {
        /// Who is turned away.
        id: SpiffeId,
    },
}

/// One identity's state, for metrics and dumps.
#[derive(Clone, Debug)]
pub struct CertStatus {
    /// Whose.
    pub id: SpiffeId,
    /// Handles out.
    pub users: usize,
    /// The serial number in force, in hexadecimal.
    pub serial: Option<String>,
    /// Start of the validity of the certificate in force.
    pub not_before: Option<SystemTime>,
    /// End of the validity of the certificate in force.
    pub not_after: Option<SystemTime>,
    /// When the next request is due.
    pub next_attempt: Option<SystemTime>,
    /// Certificates received.
    pub issued: u64,
    /// Requests that failed since the last one that did not.
    pub failures: u64,
    /// The last failure, with its causes, until a request succeeds.
    pub last_error: Option<String>,
}

/// Counters of a manager. They only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CertStats {
    /// Certificates received.
    pub issued: u64,
    /// Requests that failed.
    pub failed: u64,
}

#[derive(Default)]
struct Progress {
    next_attempt: Option<SystemTime>,
    issued: u64,
    failures: u64,
    last_error: Option<String>,
}

struct Slot {
    identity: Arc<LocalIdentity>,
    users: usize,
    progress: Arc<Mutex<Progress>>,
    stop: CancellationToken,
}

struct Inner {
    ca: Arc<dyn CaClient>,
    options: CertOptions,
    slots: Mutex<HashMap<SpiffeId, Slot>>,
    /// Certificates of a former daemon that no pod has asked for yet; at most [`MAX_IDENTITIES`].
    imported: Mutex<HashMap<SpiffeId, WorkloadCert>>,
    changed: watch::Sender<()>,
    requests: Semaphore,
    tasks: TaskTracker,
    issued: AtomicU64,
    failed: AtomicU64,
}

/// Keeps the node's certificates. Cheap to clone.
#[derive(Clone)]
pub struct CertManager {
    inner: Arc<Inner>,
}

impl fmt::Debug for CertManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertManager").field("options", &self.inner.options).finish_non_exhaustive()
    }
}

/// Keeps an identity's certificate alive and renewed until it is dropped.
#[derive(Debug)]
pub struct IdentityHandle {
    identity: Arc<LocalIdentity>,
    manager: CertManager,
}

impl IdentityHandle {
    /// The identity, with its current certificate and TLS configurations.
    pub fn identity(&self) -> &Arc<LocalIdentity> {
        &self.identity
    }

    /// Waits for a valid certificate. The caller sets the deadline.
    pub async fn ready(&self) -> Arc<WorkloadCert> {
        self.identity.cell().ready().await
    }
}

impl Clone for IdentityHandle {
    fn clone(&self) -> Self {
        if let Some(slot) = self.manager.slots().get_mut(self.identity.id()) {
            slot.users += 1;
        }
        Self { identity: self.identity.clone(), manager: self.manager.clone() }
    }
}

impl Drop for IdentityHandle {
    fn drop(&mut self) {
        let mut slots = self.manager.slots();
        let Some(slot) = slots.get_mut(self.identity.id()) else { return };
        slot.users -= 1;
        if slot.users == 0 {
            slot.stop.cancel();
            slots.remove(self.identity.id());
            self.manager.inner.changed.send_replace(());
        }
    }
}

impl CertManager {
    /// A manager that asks `ca`.
    pub fn new(ca: Arc<dyn CaClient>, options: CertOptions) -> Self {
        Self {
            inner: Arc::new(Inner {
                ca,
                options,
                slots: Mutex::default(),
                imported: Mutex::default(),
                changed: watch::Sender::new(()),
                requests: Semaphore::new(options.max_parallel.max(1)),
                tasks: TaskTracker::new(),
                issued: AtomicU64::new(0),
                failed: AtomicU64::new(0),
            }),
        }
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<SpiffeId, Slot>> {
        self.inner.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an interest in an identity. The first one starts the request for its certificate, on the runtime that this
    /// is called from; all others share it.
    pub fn acquire(&self, id: &SpiffeId) -> Result<IdentityHandle, IdentityError> {
        let mut slots = self.slots();
        if let Some(slot) = slots.get_mut(id) {
            slot.users += 1;
            return Ok(IdentityHandle { identity: slot.identity.clone(), manager: self.clone() });
        }
        if slots.len() >= MAX_IDENTITIES {
            return Err(IdentityError::TooMany { id: id.clone() });
        }
        let identity =
            LocalIdentity::new(id.clone()).map_err(|source| IdentityError::Tls { id: id.clone(), source })?;
        let identity = Arc::new(identity);
        let stop = CancellationToken::new();
        let now = SystemTime::now();
        let kept = self.imported().remove(id).filter(|cert| cert.is_valid_at(now));
        let due = kept.map(|cert| {
            let due = renew_kept(&cert, now, rand::random_range(-0.1..0.1));
            tracing::info!(%id, serial = cert.serial(), "a certificate of the former daemon is used again");
            identity.cell().install(cert);
            due
        });
        let progress = Arc::new(Mutex::new(Progress { next_attempt: due, ..Progress::default() }));
        let task = {
            let (inner, identity, progress) = (self.inner.clone(), identity.clone(), progress.clone());
            async move { inner.keep(&identity, &progress, due).await }
        };
        let stopped = stop.clone();
        self.inner.tasks.spawn(async move { stopped.run_until_cancelled(task).await });
        slots.insert(id.clone(), Slot { identity: identity.clone(), users: 1, progress, stop });
        Ok(IdentityHandle { identity, manager: self.clone() })
    }

    fn imported(&self) -> MutexGuard<'_, HashMap<SpiffeId, WorkloadCert>> {
        self.inner.imported.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every valid certificate with its key: those in force, and imported ones that nobody has asked for yet.
    pub fn export(&self) -> Vec<Exported> {
        let now = SystemTime::now();
        let current: Vec<_> = self.slots().values().filter_map(|slot| slot.identity.cell().valid()).collect();
        let mut all: Vec<Exported> = current.iter().map(|cert| Exported::of(cert)).collect();
        all.extend(self.imported().values().filter(|cert| cert.is_valid_at(now)).map(Exported::of));
        all.sort_by(|a, b| a.identity().cmp(b.identity()));
        all
    }

    /// Takes certificates of a former daemon. Each is put in force when a pod with that identity comes, or at once if
    /// one is waiting for a certificate. Gives how many were taken, and why others were not.
    pub fn import(&self, all: Vec<Exported>) -> (usize, Vec<ImportError>) {
        let (mut taken, mut errors) = (0, vec![]);
        for exported in all {
            let cert = match exported.open() {
                Ok(cert) => cert,
                Err(error) => {
                    errors.push(error);
                    continue;
                }
            };
            let waiting = self.slots().get(cert.id()).map(|slot| slot.identity.clone());
            match waiting {
                // Its own request goes on, and renews this one.
                Some(identity) if identity.cell().valid().is_none() => identity.cell().install(cert),
                Some(_) => {}
                None => {
                    let mut imported = self.imported();
                    if imported.len() >= MAX_IDENTITIES && !imported.contains_key(cert.id()) {
                        errors.push(ImportError::TooMany { id: cert.id().clone() });
                        continue;
                    }
                    imported.insert(cert.id().clone(), cert);
                }
            }
            taken += 1;
        }
        (taken, errors)
    }

    /// Drops imported certificates that no pod has asked for: once all pods of the node are known, nobody will.
    pub fn forget_imported(&self) -> usize {
        let forgotten = std::mem::take(&mut *self.imported()).len();
        if forgotten > 0 {
            self.inner.changed.send_replace(());
        }
        forgotten
    }

    /// Told whenever [`export`](Self::export) may give something else.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.inner.changed.subscribe()
    }

    /// The identity, if somebody holds it.
    pub fn get(&self, id: &SpiffeId) -> Option<Arc<LocalIdentity>> {
        self.slots().get(id).map(|slot| slot.identity.clone())
    }

    /// Every identity's state, in order.
    pub fn snapshot(&self) -> Vec<CertStatus> {
        let mut all: Vec<_> = self
            .slots()
            .iter()
            .map(|(id, slot)| {
                let cert = slot.identity.cell().current();
                let progress = slot.progress.lock().unwrap_or_else(PoisonError::into_inner);
                CertStatus {
                    id: id.clone(),
                    users: slot.users,
                    serial: cert.as_ref().map(|c| c.serial().to_owned()),
                    not_before: cert.as_ref().map(|c| c.not_before()),
                    not_after: cert.as_ref().map(|c| c.not_after()),
                    next_attempt: progress.next_attempt,
                    issued: progress.issued,
                    failures: progress.failures,
                    last_error: progress.last_error.clone(),
                }
            })
            .collect();
        all.sort_by(|a, b| a.id.cmp(&b.id));
        all
    }

    /// Counters.
    pub fn stats(&self) -> CertStats {
        CertStats { issued: self.inner.issued.load(Relaxed), failed: self.inner.failed.load(Relaxed) }
    }
}

impl Inner {
    /// Requests and renews one certificate until it is cancelled. With `due`, one is in force already.
    async fn keep(&self, identity: &LocalIdentity, progress: &Mutex<Progress>, due: Option<SystemTime>) {
        let id = identity.id();
        let planned = |at| progress.lock().unwrap_or_else(PoisonError::into_inner).next_attempt = Some(at);
        if let Some(due) = due {
            until(due).await;
        }
        let mut failures = 0u32;
        loop {
            match self.request(id).await {
                Ok(cert) => {
                    failures = 0;
                    self.issued.fetch_add(1, Relaxed);
                    let pause = renew_after(&cert, SystemTime::now(), rand::random_range(-0.1..0.1));
                    tracing::info!(%id, serial = cert.serial(), renew_in = ?pause, "certificate received");
                    identity.cell().install(cert);
                    {
                        let mut progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
                        progress.issued += 1;
                        progress.failures = 0;
                        progress.last_error = None;
                    }
                    self.changed.send_replace(());
                    let due = SystemTime::now() + pause;
                    planned(due);
                    until(due).await;
                }
                Err(error) => {
                    failures = failures.saturating_add(1);
                    self.failed.fetch_add(1, Relaxed);
                    let pause = self.options.backoff.jittered(failures, rand::random());
                    let error = chain(&error);
                    let serving = identity.cell().valid().is_some();
                    tracing::warn!(%id, failures, serving, retry_in = ?pause, error, "no certificate");
                    {
                        let mut progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
                        progress.failures += 1;
                        progress.last_error = Some(error);
                    }
                    planned(SystemTime::now() + pause);
                    sleep(pause).await;
                }
            }
        }
    }

    async fn request(&self, id: &SpiffeId) -> Result<WorkloadCert, IdentityError> {
        // The semaphore is never closed.
        let _permit = self.requests.acquire().await;
        let bad = |source| IdentityError::Request { id: id.clone(), source };
        let key = KeyPair::generate().map_err(bad)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(id.to_string()).map_err(bad)?)];
        let csr = params.serialize_request(&key).and_then(|csr| csr.pem()).map_err(bad)?;
        let after = self.options.sign_timeout;
        let answer = timeout(after, self.ca.sign(csr, id, self.options.ttl))
            .await
            .map_err(|_| IdentityError::Timeout { id: id.clone(), after })?
            .map_err(|source| IdentityError::Ca { id: id.clone(), source })?;
        let (chain, roots) = parse(id, &answer)?;
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        WorkloadCert::new(id, chain, key, &roots).map_err(IdentityError::Certificate)
    }
}

type Certificates = Vec<CertificateDer<'static>>;

/// Splits an answer: the last text has the roots, the others the chain, leaf first.
fn parse(id: &SpiffeId, answer: &[String]) -> Result<(Certificates, Certificates), IdentityError> {
    let bad = |detail: String| IdentityError::Answer { id: id.clone(), detail };
    let certificates = |text: &String| {
        CertificateDer::pem_slice_iter(text.as_bytes())
            .collect::<Result<Certificates, _>>()
            .map_err(|e| bad(e.to_string()))
    };
    let Some((roots, chain)) = answer.split_last() else { return Err(bad("it is empty".into())) };
    let roots = certificates(roots)?;
    let mut all = Vec::new();
    for text in chain {
        all.extend(certificates(text)?);
    }
    if all.len() + roots.len() > MAX_CHAIN {
        return Err(bad(format!("it has {} certificates", all.len() + roots.len())));
    }
    Ok((all, roots))
}

/// Half of what is left of a new certificate's life, give or take `jitter` (a fraction), but not at once: a CA that
/// issues certificates of no length must not be asked in a loop.
fn renew_after(cert: &WorkloadCert, now: SystemTime, jitter: f64) -> Duration {
    let left = cert.not_after().duration_since(now).unwrap_or(Duration::ZERO);
    left.mul_f64(0.5 * (1.0 + jitter)).max(Duration::from_secs(1))
}

/// When a certificate of a former daemon is to be renewed: at half of its whole life, give or take `jitter`.
fn renew_kept(cert: &WorkloadCert, now: SystemTime, jitter: f64) -> SystemTime {
    let life = cert.not_after().duration_since(cert.not_before()).unwrap_or(Duration::ZERO);
    (cert.not_before() + life.mul_f64(0.5 * (1.0 + jitter))).max(now)
}

/// Waits for a time of day. Sleeping stops with the machine and does not see the clock being set; certificates go by
/// the clock.
async fn until(due: SystemTime) {
    while let Ok(rest) = due.duration_since(SystemTime::now())
        && !rest.is_zero()
    {
        sleep(rest.min(CLOCK_CHECK)).await;
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
