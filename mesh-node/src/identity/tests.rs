//! The certificate manager against CAs that behave and CAs that do not.

use super::*;
use crate::tls::{RejectReason, testca::TestCa};
use futures::future::BoxFuture;
use mesh_xds::{delta::Backoff, model::SpiffeId};
use std::{
    collections::VecDeque,
    future::Future,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, SystemTime},
};
use tokio::{sync::Semaphore, time::timeout};

/// What the fake CA does with one request.
enum Answer {
    /// Signs for this long.
    Sign(Duration),
    /// Refuses.
    Refuse,
    /// Signs a request of its own instead: the certificate has another key.
    OtherKey,
    /// Certificate of another CA than the root it names.
    OtherRoot,
    /// Not PEM.
    Garbage,
    /// Never answers.
    Silence,
}

struct FakeCa {
    ca: TestCa,
    answers: Mutex<VecDeque<Answer>>,
    /// When the script is over.
    then: Duration,
    requests: AtomicUsize,
    csrs: Mutex<Vec<String>>,
    inside: AtomicUsize,
    most_inside: AtomicUsize,
    gate: Option<Semaphore>,
}

impl FakeCa {
    fn new(answers: impl IntoIterator<Item = Answer>) -> Self {
        Self {
            ca: TestCa::new(),
            answers: Mutex::new(answers.into_iter().collect()),
            then: Duration::from_secs(3600),
            requests: AtomicUsize::new(0),
            csrs: Mutex::default(),
            inside: AtomicUsize::new(0),
            most_inside: AtomicUsize::new(0),
            gate: None,
        }
    }

    async fn answer(&self, csr: String, id: &SpiffeId) -> Result<Vec<String>, CaError> {
        self.requests.fetch_add(1, SeqCst);
        self.csrs.lock().unwrap().push(csr.clone());
        let inside = self.inside.fetch_add(1, SeqCst) + 1;
        self.most_inside.fetch_max(inside, SeqCst);
        if let Some(gate) = &self.gate {
            gate.acquire().await.unwrap().forget();
        }
        self.inside.fetch_sub(1, SeqCst);
        let answer = self.answers.lock().unwrap().pop_front().unwrap_or(Answer::Sign(self.then));
        match answer {
            Answer::Sign(ttl) => Ok(self.ca.sign_csr(&csr, ttl)),
            Answer::Refuse => {
                Err(CaError::Rpc(Box::new(tonic::Status::permission_denied("not on your node"))))
            }
            Answer::OtherKey => {
                let key = rcgen::KeyPair::generate().unwrap();
                let mut params = rcgen::CertificateParams::default();
                params.subject_alt_names = vec![rcgen::SanType::URI(id.to_string().try_into().unwrap())];
                let other = params.serialize_request(&key).unwrap().pem().unwrap();
                Ok(self.ca.sign_csr(&other, Duration::from_secs(3600)))
            }
            Answer::OtherRoot => {
                let mut chain = self.ca.sign_csr(&csr, Duration::from_secs(3600));
                *chain.last_mut().unwrap() = crate::tls::testca::pem(&TestCa::new().root());
                Ok(chain)
            }
            Answer::Garbage => Ok(vec!["-----BEGIN CERTIFICATE-----\n???".into(), String::new()]),
            Answer::Silence => std::future::pending().await,
        }
    }
}

impl CaClient for FakeCa {
    fn sign<'a>(
        &'a self,
        csr_pem: String,
        id: &'a SpiffeId,
        _ttl: Duration,
    ) -> BoxFuture<'a, Result<Vec<String>, CaError>> {
        Box::pin(self.answer(csr_pem, id))
    }
}

fn options() -> CertOptions {
    CertOptions {
        sign_timeout: Duration::from_millis(200),
        backoff: Backoff { initial: Duration::from_millis(5), max: Duration::from_millis(20) },
        ..CertOptions::default()
    }
}

fn id(account: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", account).unwrap()
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), future).await.expect("the test hangs")
}

async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let poll = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(timeout(Duration::from_secs(20), poll).await.is_ok(), "never came true: {what}");
}

#[tokio::test]
async fn a_request_names_the_identity_and_nothing_else() {
    within(async {
        let ca = Arc::new(FakeCa::new([]));
        let manager = CertManager::new(ca.clone(), options());
        let cert = manager.acquire(&id("cart")).unwrap().ready().await;
        assert_eq!(cert.id(), &id("cart"));
        let csr = ca.csrs.lock().unwrap()[0].clone();
        let (_, pem) = x509_parser::pem::parse_x509_pem(csr.as_bytes()).unwrap();
        use x509_parser::prelude::FromDer;
        let (_, csr) =
            x509_parser::certification_request::X509CertificationRequest::from_der(&pem.contents).unwrap();
        assert_eq!(csr.certification_request_info.subject.iter().count(), 0, "the subject is not empty");
        let names: Vec<String> = csr
            .requested_extensions()
            .unwrap()
            .filter_map(|e| match e {
                x509_parser::extensions::ParsedExtension::SubjectAlternativeName(san) => {
                    Some(san.general_names.iter().map(ToString::to_string).collect::<Vec<_>>())
                }
                _ => None,
            })
            .flatten()
            .collect();
        assert_eq!(names, [format!("URI({})", id("cart"))]);
        let key = csr.certification_request_info.subject_pki.parsed().unwrap();
        let x509_parser::public_key::PublicKey::EC(point) = key else { panic!("not an elliptic curve key") };
        assert_eq!(point.key_size(), 256);
    })
    .await;
}

#[tokio::test]
async fn pods_of_one_identity_share_one_request_and_the_last_one_ends_it() {
    within(async {
        let ca = Arc::new(FakeCa::new([]));
        let manager = CertManager::new(ca.clone(), options());
        let handles: Vec<_> = (0..20).map(|_| manager.acquire(&id("cart")).unwrap()).collect();
        for handle in &handles {
            handle.ready().await;
        }
        assert_eq!(ca.requests.load(SeqCst), 1);
        let status = &manager.snapshot()[0];
        assert_eq!((status.users, status.issued, status.failures), (20, 1, 0));
        assert!(status.serial.is_some() && status.next_attempt > Some(SystemTime::now()));
        let last = handles[0].clone();
        drop(handles);
        assert!(manager.get(&id("cart")).is_some());
        drop(last);
        assert!(manager.get(&id("cart")).is_none() && manager.snapshot().is_empty());
        manager.acquire(&id("cart")).unwrap().ready().await;
        assert_eq!(ca.requests.load(SeqCst), 2, "a certificate outlived its pods");
    })
    .await;
}

#[tokio::test]
async fn bad_answers_are_never_installed_and_tried_again() {
    within(async {
        let bad = [Answer::Refuse, Answer::OtherKey, Answer::OtherRoot, Answer::Garbage, Answer::Silence];
        let count = bad.len();
        let ca = Arc::new(FakeCa::new(bad));
        let manager = CertManager::new(ca.clone(), options());
        let handle = manager.acquire(&id("cart")).unwrap();
        let mut errors = std::collections::BTreeSet::new();
        let ready = handle.ready();
        tokio::pin!(ready);
        loop {
            tokio::select! {
                _ = &mut ready => break,
                () = tokio::time::sleep(Duration::from_millis(1)) => {
                    errors.extend(manager.snapshot()[0].last_error.clone());
                }
            }
        }
        assert_eq!(ca.requests.load(SeqCst), count + 1);
        assert_eq!((manager.stats().issued, manager.stats().failed), (1, count as u64));
        let all = errors.into_iter().collect::<Vec<_>>().join("\n");
        for part in
            ["not on your node", "does not belong to our key", "does not verify", "PEM", "did not answer"]
        {
            assert!(all.contains(part), "{part:?} is missing in:\n{all}");
        }
        let status = &manager.snapshot()[0];
        assert_eq!((status.failures, status.last_error.clone()), (0, None));
    })
    .await;
}

#[tokio::test]
async fn renewal_at_half_life_while_the_old_one_serves() {
    within(async {
        let ca =
            Arc::new(FakeCa::new([Answer::Sign(Duration::from_secs(5)), Answer::Refuse, Answer::Refuse]));
        let manager = CertManager::new(ca.clone(), options());
        let handle = manager.acquire(&id("cart")).unwrap();
        let first = handle.ready().await;
        eventually("a renewal fails", || manager.snapshot()[0].failures > 0 || ca.requests.load(SeqCst) > 3)
            .await;
        assert!(SystemTime::now() < first.not_after(), "renewal began after the end");
        eventually("the renewal succeeds", || {
            handle.identity().cell().current().is_some_and(|c| c.serial() != first.serial())
        })
        .await;
        assert!(first.is_valid_at(SystemTime::now()), "there was a time without a valid certificate");
        assert_eq!(ca.requests.load(SeqCst), 4);
        let csrs = ca.csrs.lock().unwrap();
        let different: std::collections::BTreeSet<_> = csrs.iter().collect();
        assert_eq!(different.len(), csrs.len(), "a key was used twice");
    })
    .await;
}

#[tokio::test]
async fn requests_in_flight_are_bounded() {
    within(async {
        let mut ca = FakeCa::new([]);
        ca.gate = Some(Semaphore::new(0));
        let ca = Arc::new(ca);
        let options = CertOptions { max_parallel: 3, sign_timeout: Duration::from_secs(20), ..options() };
        let manager = CertManager::new(ca.clone(), options);
        let handles: Vec<_> = (0..12).map(|i| manager.acquire(&id(&format!("sa{i}"))).unwrap()).collect();
        eventually("three are in flight", || ca.inside.load(SeqCst) == 3).await;
        ca.gate.as_ref().unwrap().add_permits(100);
        for handle in &handles {
            handle.ready().await;
        }
        assert_eq!(ca.most_inside.load(SeqCst), 3);
        assert_eq!(manager.snapshot().len(), 12);
    })
    .await;
}

#[tokio::test]
async fn without_a_certificate_nothing_is_served() {
    let ca = Arc::new(FakeCa::new([Answer::Silence]));
    let manager = CertManager::new(ca, options());
    let handle = manager.acquire(&id("cart")).unwrap();
    assert_eq!(handle.identity().valid_cert().unwrap_err().reason, RejectReason::OwnCertificate);
}

#[tokio::test]
async fn the_token_file_is_read_each_time_and_its_faults_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("token");
    let token = TokenFile(path.clone());
    let error = token.bearer().await.unwrap_err();
    assert!(error.to_string().contains("token"), "{error}");
    std::fs::write(&path, "one\n").unwrap();
    assert_eq!(token.bearer().await.unwrap().to_str().unwrap(), "Bearer one");
    std::fs::write(&path, "two").unwrap();
    let value = token.bearer().await.unwrap();
    assert_eq!(value.to_str().unwrap(), "Bearer two");
    assert!(value.is_sensitive(), "the token would be logged");
    for bad in ["", "\n", "a\nb", "\u{1}"] {
        std::fs::write(&path, bad).unwrap();
        assert!(matches!(token.bearer().await, Err(CaError::BadToken { .. })), "{bad:?}");
    }
}

/// The gRPC form against a real tonic server.
mod grpc {
    use super::*;
    use mesh_xds::wire::ca::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer},
    };
    use tonic::{Request, Response, Status, transport::Channel};

    /// The two headers, the identity and the life time of a request.
    type Seen = (String, String, String, i64);

    struct Service {
        ca: TestCa,
        seen: Arc<Mutex<Vec<Seen>>>,
    }

    #[tonic::async_trait]
    impl IstioCertificateService for Service {
        async fn create_certificate(
            &self,
            request: Request<IstioCertificateRequest>,
        ) -> Result<Response<IstioCertificateResponse>, Status> {
            let header = |name| {
                request.metadata().get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
            };
            let (authorization, cluster) = (header("authorization"), header("clusterid"));
            let request = request.into_inner();
            let identity = request
                .metadata
                .as_ref()
                .and_then(|m| m.fields.get("ImpersonatedIdentity"))
                .and_then(|v| match &v.kind {
                    Some(prost_types::value::Kind::StringValue(s)) => Some(s.clone()),
                    _ => None,
                })
                .ok_or_else(|| Status::invalid_argument("no identity"))?;
            let seen = (authorization, cluster, identity, request.validity_duration);
            self.seen.lock().unwrap().push(seen);
            let cert_chain = self.ca.sign_csr(&request.csr, Duration::from_secs(3600));
            Ok(Response::new(IstioCertificateResponse { cert_chain }))
        }
    }

    #[tokio::test]
    async fn the_request_carries_token_cluster_and_identity() {
        within(async {
            let seen = Arc::new(Mutex::new(Vec::new()));
            let service = Service { ca: TestCa::new(), seen: seen.clone() };
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let addr = listener.local_addr().unwrap();
            let server = tokio::spawn(
                tonic::transport::Server::builder()
                    .add_service(IstioCertificateServiceServer::new(service))
                    .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener)),
            );
            let dir = tempfile::tempdir().unwrap();
            let token = dir.path().join("token");
            std::fs::write(&token, "secret").unwrap();
            let channel = Channel::from_shared(format!("http://{addr}")).unwrap().connect_lazy();
            let ca = IstioCa::new(channel, Some(TokenFile(token)), "Kubernetes").unwrap();
            let manager = CertManager::new(Arc::new(ca), CertOptions::default());
            let cert = manager.acquire(&id("cart")).unwrap().ready().await;
            assert_eq!(cert.id(), &id("cart"));
            let expected =
                ("Bearer secret".to_owned(), "Kubernetes".to_owned(), id("cart").to_string(), 24 * 3600);
            assert_eq!(*seen.lock().unwrap(), [expected]);
            server.abort();
        })
        .await;
    }
}

/// Certificates of one daemon in the next one.
mod handover {
    use super::*;
    use crate::tls::testca::Leaf;

    /// As a daemon would export it, from parts that need not fit together.
    fn exported(identity: &str, ca: &TestCa, leaf: &Leaf, other_key: bool) -> Exported {
        use base64::{Engine, engine::general_purpose::STANDARD};
        let (chain, mut key) = ca.issue(leaf);
        if other_key {
            key = ca.issue(leaf).1;
        }
        let text = |der: &[u8]| STANDARD.encode(der);
        serde_json::from_value(serde_json::json!({
            "identity": identity,
            "key": text(key.secret_der()),
            "chain": chain.iter().map(|c| text(c)).collect::<Vec<_>>(),
            "roots": [text(&ca.root())],
        }))
        .unwrap()
    }

    #[tokio::test]
    async fn a_successor_serves_at_once_and_asks_nobody() {
        within(async {
            let former = CertManager::new(Arc::new(FakeCa::new([])), options());
            let handle = former.acquire(&id("cart")).unwrap();
            let cert = handle.ready().await;
            let text = serde_json::to_string(&former.export()).unwrap();
            assert!(!format!("{:?}", former.export()).contains("key"));

            let ca = Arc::new(FakeCa::new([]));
            let next = CertManager::new(ca.clone(), options());
            assert_eq!(next.import(serde_json::from_str(&text).unwrap()).0, 1);
            assert_eq!(next.export(), former.export(), "what nobody has asked for yet is not lost");
            let handle = next.acquire(&id("cart")).unwrap();
            assert_eq!(handle.ready().await.serial(), cert.serial());
            assert_eq!(next.export(), former.export());
            let status = next.snapshot().remove(0);
            assert!(status.next_attempt > Some(SystemTime::now()), "{status:?}");
            assert_eq!(ca.requests.load(SeqCst), 0);
            drop(handle);
            assert!(next.export().is_empty(), "it outlived its pods");
        })
        .await;
    }

    #[tokio::test]
    async fn an_old_one_is_renewed_at_once_and_serves_while_the_ca_is_away() {
        within(async {
            let ca = Arc::new(FakeCa::new([Answer::Refuse, Answer::Refuse]));
            let manager = CertManager::new(ca.clone(), options());
            let mut leaf = Leaf::of(&id("cart").to_string());
            leaf.from = SystemTime::now() - Duration::from_secs(3600);
            leaf.until = SystemTime::now() + Duration::from_secs(60);
            let (taken, errors) =
                manager.import(vec![exported(&id("cart").to_string(), &ca.ca, &leaf, false)]);
            assert_eq!((taken, errors.len()), (1, 0));
            let handle = manager.acquire(&id("cart")).unwrap();
            let first = handle.identity().valid_cert().unwrap();
            eventually("it is renewed", || {
                handle.identity().valid_cert().is_ok_and(|c| c.serial() != first.serial())
            })
            .await;
            assert_eq!(ca.requests.load(SeqCst), 3);
        })
        .await;
    }

    #[tokio::test]
    async fn one_that_comes_late_is_used_and_one_that_nobody_wants_is_forgotten() {
        let ca = Arc::new(FakeCa::new([Answer::Silence]));
        let manager = CertManager::new(ca.clone(), options());
        let handle = manager.acquire(&id("cart")).unwrap();
        let of = |account: &str| {
            let name = id(account).to_string();
            exported(&name, &ca.ca, &Leaf::of(&name), false)
        };
        assert_eq!(manager.import(vec![of("cart"), of("gone")]).0, 2);
        assert!(handle.identity().valid_cert().is_ok());
        assert_eq!(manager.export().len(), 2);
        let mut changes = manager.changes();
        assert_eq!(manager.forget_imported(), 1);
        assert!(
            changes.has_changed().unwrap() && {
                changes.mark_unchanged();
                true
            }
        );
        assert_eq!(
            manager.export().iter().map(Exported::identity).collect::<Vec<_>>(),
            [id("cart").to_string()]
        );
    }

    #[tokio::test]
    async fn what_does_not_hold_is_refused_with_its_name() {
        let (ca, other) = (TestCa::new(), TestCa::new());
        let cart = id("cart").to_string();
        let good = exported(&cart, &ca, &Leaf::of(&cart), false);
        let edit = |field: &str, value: serde_json::Value| {
            let mut json = serde_json::to_value(&good).unwrap();
            json[field] = value;
            serde_json::from_value::<Exported>(json).unwrap()
        };
        let roots = serde_json::to_value(exported(&cart, &other, &Leaf::of(&cart), false)).unwrap();
        let cases = [
            ("no identity", edit("identity", "cart".into()), "is not a SPIFFE ID"),
            ("another's", edit("identity", id("admin").to_string().into()), "carries the identity"),
            ("another key", exported(&cart, &ca, &Leaf::of(&cart), true), "does not belong to our key"),
            ("expired", exported(&cart, &ca, &Leaf::of(&cart).expired(), false), "does not verify"),
            ("another root", edit("roots", roots["roots"].clone()), "does not verify"),
            ("no root", edit("roots", serde_json::json!([])), "no root certificate"),
            ("no chain", edit("chain", serde_json::json!([])), "is empty"),
            ("not base64", edit("key", "***".into()), "key that is not base64"),
            ("not a certificate", edit("chain", serde_json::json!(["AAAA"])), "does not parse"),
        ];
        for (name, bad, words) in cases {
            let manager = CertManager::new(Arc::new(FakeCa::new([Answer::Silence])), options());
            let (taken, errors) = manager.import(vec![bad]);
            let text: Vec<String> = errors.iter().map(|e| all_causes(e)).collect();
            assert!(taken == 0 && text.len() == 1 && text[0].contains(words), "{name}: {taken} {text:?}");
            assert!(manager.export().is_empty(), "{name}");
        }
    }
}

/// Every pause is at least the shortest one, whatever the jitter; the longest is the back-off's own test.
#[tokio::test]
async fn a_ca_that_is_away_is_not_asked_in_a_hot_loop() {
    within(async {
        let ca = Arc::new(FakeCa::new((0..10).map(|_| Answer::Refuse)));
        let backoff = Backoff { initial: Duration::from_millis(20), max: Duration::from_millis(40) };
        let manager = CertManager::new(ca.clone(), CertOptions { backoff, ..options() });
        let start = std::time::Instant::now();
        manager.acquire(&id("cart")).unwrap().ready().await;
        assert!(start.elapsed() >= backoff.initial * 10, "{:?}", start.elapsed());
        assert_eq!(manager.stats().failed, 10);
    })
    .await;
}

fn all_causes(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |e| e.source()).map(|e| e.to_string() + "; ").collect()
}

/// The file between two daemons.
mod keep {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt, path::Path};
    use tokio_util::sync::CancellationToken;

    fn entries(path: &Path) -> usize {
        let Ok(bytes) = fs::read(path) else { return 0 };
        let kept: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        kept["certificates"].as_array().unwrap().len()
    }

    #[tokio::test]
    async fn the_file_follows_the_pods_and_serves_the_next_daemon() {
        within(async {
            let dir = tempfile::tempdir().unwrap();
            let keeper = CertKeeper::new(dir.path()).unwrap();
            let first = CertManager::new(Arc::new(FakeCa::new([])), options());
            let stop = CancellationToken::new();
            let running = tokio::spawn(keeper.clone().run(first.clone(), stop.clone()));
            let (cart, pay) = (first.acquire(&id("cart")).unwrap(), first.acquire(&id("pay")).unwrap());
            eventually("both are kept", || entries(keeper.path()) == 2).await;
            let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
            assert_eq!((mode(keeper.path()), mode(keeper.path().parent().unwrap())), (0o600, 0o700));
            drop(pay);
            eventually("a pod that is gone leaves nothing", || entries(keeper.path()) == 1).await;
            let serial = cart.ready().await.serial().to_owned();
            // The end of a daemon: everything lets go.
            stop.cancel();
            drop(cart);
            running.await.unwrap();
            assert_eq!(entries(keeper.path()), 1, "the next daemon finds nothing");

            let ca = Arc::new(FakeCa::new([Answer::Silence]));
            let next = CertManager::new(ca.clone(), options());
            assert_eq!(CertKeeper::new(dir.path()).unwrap().load(&next), 1);
            let cart = next.acquire(&id("cart")).unwrap();
            assert_eq!(cart.ready().await.serial(), serial);
            assert_eq!(ca.requests.load(SeqCst), 0);
            CertKeeper::remove(dir.path()).unwrap();
            assert!(!keeper.path().exists());
        })
        .await;
    }

    #[tokio::test]
    async fn a_file_that_is_not_as_written_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let keeper = CertKeeper::new(dir.path()).unwrap();
        let manager = CertManager::new(Arc::new(FakeCa::new([])), options());
        let handle = manager.acquire(&id("cart")).unwrap();
        handle.ready().await;
        let good = serde_json::json!({ "format": 1, "certificates": manager.export() }).to_string();
        let taken = |text: &[u8], mode: u32| {
            fs::write(keeper.path(), text).unwrap();
            fs::set_permissions(keeper.path(), fs::Permissions::from_mode(mode)).unwrap();
            keeper.load(&CertManager::new(Arc::new(FakeCa::new([])), options()))
        };
        assert_eq!(taken(good.as_bytes(), 0o600), 1);
        let half = good.len() / 2;
        for (name, text, mode) in [
            ("empty", &b""[..], 0o600),
            ("garbage", &b"\xff\x00\x01"[..], 0o600),
            ("half", &good.as_bytes()[..half], 0o600),
            ("another format", good.replace("\"format\":1", "\"format\":2").as_bytes(), 0o600),
            ("a list", &b"[]"[..], 0o600),
            ("readable for others", good.as_bytes(), 0o644),
        ] {
            assert_eq!(taken(text, mode), 0, "{name}");
        }
    }
}
