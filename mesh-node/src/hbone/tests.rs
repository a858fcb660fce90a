//! Client pool and server against each other, over real TLS on loopback.

use super::*;
use crate::tls::{self, LocalIdentity, Peer, RejectReason, testca::TestCa};
use bytes::Bytes;
use mesh_xds::model::SpiffeId;
use std::{
    collections::BTreeSet,
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

pub(crate) const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";
pub(crate) const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
pub(crate) const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const LIMIT: Duration = Duration::from_secs(10);

/// Fails a test that hangs.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(60), future).await.expect("the test hangs")
}

/// Polls a condition that other tasks bring about.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let poll = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(timeout(LIMIT, poll).await.is_ok(), "never came true: {what}");
}

/// Dials directly and counts.
#[derive(Clone, Default)]
pub(crate) struct CountingDialer {
    pub(crate) dials: Arc<AtomicUsize>,
}

impl Dialer for CountingDialer {
    async fn dial(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.dials.fetch_add(1, SeqCst);
        TcpStream::connect(to).await
    }
}

/// A server on loopback whose tunnels are served by `H`.
pub(crate) struct Server {
    pub(crate) addr: SocketAddr,
    pub(crate) drain: CancellationToken,
    pub(crate) rejects: Arc<Mutex<Vec<RejectReason>>>,
    pub(crate) accepted: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(crate) async fn server<H: Handler>(identity: Arc<LocalIdentity>, handler: Arc<H>) -> Server {
    let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let drain = CancellationToken::new();
    let rejects = Arc::new(Mutex::new(Vec::new()));
    let accepted = Arc::new(AtomicUsize::new(0));
    let task = {
        let (drain, rejects, accepted) = (drain.clone(), rejects.clone(), accepted.clone());
        tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let Ok((tcp, _)) = listener.accept().await else { return };
                accepted.fetch_add(1, SeqCst);
                tcp.set_nodelay(true).unwrap();
                let (identity, handler) = (identity.clone(), handler.clone());
                let (drain, rejects) = (drain.clone(), rejects.clone());
                connections.spawn(async move {
                    match tls::accept(tcp, &identity, LIMIT).await {
                        Ok((stream, peer)) => {
                            let options = ServeOptions {
                                local_ip: Some(LOOPBACK),
                                idle: SERVER_IDLE_TIMEOUT,
                                crowded_idle: Duration::from_millis(30),
                                drain,
                            };
                            serve(stream, peer, handler, options).await;
                        }
                        Err(reject) => rejects.lock().unwrap().push(reject.reason),
                    }
                });
            }
        })
    };
    Server { addr, drain, rejects, accepted, task }
}

pub(crate) fn key(source: &str, expected: &[&str], to: SocketAddr) -> PoolKey {
    PoolKey {
        source: source.parse().unwrap(),
        source_ip: LOOPBACK,
        expected: Arc::new(expected.iter().map(|id| id.parse().unwrap()).collect::<BTreeSet<SpiffeId>>()),
        to,
    }
}

pub(crate) fn connect_to(target: &str) -> Connect {
    Connect::to(Target::parse(target).unwrap())
}

/// Sends back what it receives; refuses certain ports; can be made to hold its answer.
#[derive(Default)]
struct Echo {
    requests: Mutex<Vec<ConnectRequest>>,
    refusals: Mutex<Vec<&'static str>>,
    hold: Option<Arc<Notify>>,
    waiting: AtomicUsize,
    given_up: Arc<AtomicUsize>,
}

struct GivenUp(Option<Arc<AtomicUsize>>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        if let Some(counter) = &self.0 {
            counter.fetch_add(1, SeqCst);
        }
    }
}

impl Handler for Echo {
    type Upstream = ();

    async fn connect(&self, peer: &Arc<Peer>, request: ConnectRequest) -> Result<(), Refusal> {
        assert_eq!(peer.id.to_string(), WEB);
        let mut given_up = GivenUp(Some(self.given_up.clone()));
        let target = request.target.clone();
        self.requests.lock().unwrap().push(request);
        if let Some(hold) = &self.hold {
            self.waiting.fetch_add(1, SeqCst);
            hold.notified().await;
        }
        given_up.0 = None;
        match target {
            Target::Addr(addr) if addr.port() == 401 => Err(Refusal::Denied { by: "shop/deny".into() }),
            Target::Addr(to) if to.port() == 503 => {
                Err(Refusal::Unavailable { to, source: io::ErrorKind::ConnectionRefused.into() })
            }
            _ => Ok(()),
        }
    }

    async fn splice(&self, (): (), mut stream: HboneStream) {
        while let Ok(Some(data)) = stream.recv.data().await {
            stream.recv.release(data.len());
            if stream.send.send(data).await.is_err() {
                return;
            }
        }
        let _ = stream.send.finish();
    }

    fn refused(&self, _peer: &Arc<Peer>, refusal: &Refusal) {
        self.refusals.lock().unwrap().push(refusal.label());
    }
}

async fn echo(stream: &mut HboneStream, text: &'static str) {
    stream.send.send(Bytes::from_static(text.as_bytes())).await.unwrap();
    let mut got = Vec::new();
    while got.len() < text.len() {
        let data = stream.recv.data().await.unwrap().expect("the stream ended");
        stream.recv.release(data.len());
        got.extend_from_slice(&data);
    }
    assert_eq!(got, text.as_bytes());
}

#[tokio::test]
async fn a_tunnel_carries_bytes_headers_and_identities() {
    within(async {
        let ca = TestCa::new();
        let handler = Arc::new(Echo::default());
        let server = server(ca.identity(CART), handler.clone()).await;
        let (pool, dialer, web) =
            (Pool::new(PoolLimits::default()), CountingDialer::default(), ca.identity(WEB));
        let mut request = connect_to("127.0.0.1:8080");
        request.forwarded =
            Some(Forwarded { client: "10.0.0.9:4711".parse().unwrap(), host: Some("cart.shop".into()) });
        request.baggage = Some(Baggage { service: "web".into(), ..Baggage::default() });
        request.traceparent = Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into());
        let key = key(WEB, &[CART], server.addr);
        let mut stream = pool.connect(&key, &web, &request, &dialer).await.unwrap();
        assert_eq!(stream.peer.id.to_string(), CART);
        echo(&mut stream, "hello").await;
        assert_eq!((pool.stats().connections, pool.stats().streams), (1, 1));
        stream.send.finish().unwrap();
        assert!(stream.recv.data().await.unwrap().is_none(), "no half-close came back");
        drop(stream);
        assert_eq!(pool.stats().streams, 0);
        let seen = handler.requests.lock().unwrap()[0].clone();
        assert_eq!(seen.target, request.target);
        assert_eq!(seen.forwarded, request.forwarded);
        assert_eq!(seen.baggage.unwrap().service, "web");
        assert_eq!(seen.traceparent, request.traceparent);
    })
    .await;
}

#[tokio::test]
async fn refusals_have_their_status() {
    within(async {
        let ca = TestCa::new();
        let handler = Arc::new(Echo::default());
        let server = server(ca.identity(CART), handler.clone()).await;
        let (pool, dialer, web) =
            (Pool::new(PoolLimits::default()), CountingDialer::default(), ca.identity(WEB));
        let key = key(WEB, &[CART], server.addr);
        for (target, status, label, blame, retryable) in [
            ("127.0.0.1:401", 401, "denied", Blame::Policy, false),
            ("127.0.0.1:503", 503, "unavailable", Blame::Peer, true),
            ("127.0.0.2:80", 400, "address_mismatch", Blame::Peer, false),
        ] {
            let error = pool.connect(&key, &web, &connect_to(target), &dialer).await.unwrap_err();
            assert!(
                matches!(error, HboneError::Status { status: s, .. } if s == status),
                "{target}: {error}"
            );
            assert_eq!((error.blame(), error.retryable()), (blame, retryable), "{target}");
            assert_eq!(handler.refusals.lock().unwrap().pop(), Some(label));
        }
        assert_eq!(dialer.dials.load(SeqCst), 1, "a refused request cost a connection");
        assert_eq!(pool.stats().streams, 0);
    })
    .await;
}

#[tokio::test]
async fn other_methods_and_bad_authorities_are_bad_requests() {
    within(async {
        let ca = TestCa::new();
        let handler = Arc::new(Echo::default());
        let server = server(ca.identity(CART), handler.clone()).await;
        let web = ca.identity(WEB);
        let tcp = TcpStream::connect(server.addr).await.unwrap();
        let expected = BTreeSet::from([CART.parse().unwrap()]);
        let (stream, _) = tls::connect(tcp, &web, &expected, LOOPBACK, LIMIT).await.unwrap();
        let (send, connection) = h2::client::handshake(stream).await.unwrap();
        let driver = tokio::spawn(connection);
        let get = http::Request::get("https://127.0.0.1:80/").body(()).unwrap();
        let bare = http::Request::connect("127.0.0.1").body(()).unwrap();
        for (request, label) in [(get, "bad_method"), (bare, "bad_authority")] {
            let mut send = send.clone().ready().await.unwrap();
            let (response, _) = send.send_request(request, true).unwrap();
            assert_eq!(response.await.unwrap().status(), 400);
            assert_eq!(handler.refusals.lock().unwrap().pop(), Some(label));
        }
        driver.abort();
    })
    .await;
}

fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&len[1..], &[kind, flags, 0, 0, 0, stream], payload].concat()
}

/// HPACK: a literal that is not indexed, with a name of the static table or one spelt out.
fn header(name: Result<u8, &str>, value: &str) -> Vec<u8> {
    let text = |t: &str| [&[u8::try_from(t.len()).unwrap()], t.as_bytes()].concat();
    match name {
        Ok(index) => [vec![index], text(value)].concat(),
        Err(name) => [vec![0], text(name), text(value)].concat(),
    }
}

/// A peer with a good certificate that then says anything but a good request. Nothing of it reaches the workload, the
/// connection ends or the request does, and the next peer is served.
#[tokio::test]
async fn what_is_not_http_2_harms_nobody() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    const AUTHORITY: u8 = 1;
    const METHOD: u8 = 2;
    within(async {
        let ca = TestCa::new();
        let handler = Arc::new(Echo::default());
        let server = server(ca.identity(CART), handler.clone()).await;
        let web = ca.identity(WEB);
        let settings = frame(4, 0, 0, &[]);
        let preface = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), &settings].concat();
        let headers = |block: &[u8]| [preface.clone(), frame(1, 4, 1, block)].concat();
        let connect = header(Ok(METHOD), "CONNECT");
        let to = header(Ok(AUTHORITY), "127.0.0.1:80");
        let many: Vec<u8> = std::iter::once([connect.clone(), to.clone()].concat())
            .chain((0..400).map(|i| header(Err(&format!("x-{i}")), &"v".repeat(100))))
            .flatten()
            .collect();
        let oversize = {
            let mut chunks = many.chunks(16_000).enumerate().peekable();
            let mut bytes = preface.clone();
            while let Some((i, chunk)) = chunks.next() {
                let end = if chunks.peek().is_none() { 4 } else { 0 };
                bytes.extend(frame(if i == 0 { 1 } else { 9 }, end, 1, chunk));
            }
            bytes
        };
        let cases: Vec<(&str, Vec<u8>)> = vec![
            ("HTTP/1.1", b"CONNECT 127.0.0.1:80 HTTP/1.1\r\nhost: x\r\n\r\n".to_vec()),
            ("zeros", vec![0; 4096]),
            ("noise", (0..4096u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()),
            ("half a preface and nonsense", b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n".to_vec()),
            ("noise after the preface", [preface.clone(), vec![0xff; 64]].concat()),
            ("no settings", [&preface[..24], &frame(6, 0, 0, &[0; 8])].concat()),
            (
                "a frame that is too large",
                [preface.clone(), vec![0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1]].concat(),
            ),
            ("data without a request", [preface.clone(), frame(0, 0, 1, b"hello")].concat()),
            (
                "an even stream",
                [preface.clone(), frame(1, 4, 2, &[connect.clone(), to.clone()].concat())].concat(),
            ),
            ("broken compression", headers(&[0xff, 0xff, 0xff, 0xff, 0xff])),
            (
                "a header list that never ends",
                [preface.clone(), frame(1, 0, 1, &connect), settings.clone()].concat(),
            ),
            ("CONNECT without authority", headers(&connect)),
            ("CONNECT with a path", headers(&[connect.clone(), to.clone(), header(Ok(4), "/x")].concat())),
            (
                "a pseudo header that comes late",
                headers(&[header(Err("a"), "b"), connect.clone(), to.clone()].concat()),
            ),
            (
                "a name in upper case",
                headers(&[connect.clone(), to.clone(), header(Err("X-A"), "b")].concat()),
            ),
            (
                "an authority that is none",
                headers(&[connect.clone(), header(Ok(AUTHORITY), "a b:80")].concat()),
            ),
            ("headers that are too large", oversize),
        ];
        for (name, bytes) in cases {
            let tcp = TcpStream::connect(server.addr).await.unwrap();
            let expected = BTreeSet::from([CART.parse().unwrap()]);
            let (mut stream, _) = tls::connect(tcp, &web, &expected, LOOPBACK, LIMIT).await.unwrap();
            // The other side may have had enough before the end of it.
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            assert_eq!(handler.requests.lock().unwrap().len(), 0, "{name} reached the workload");
        }
        let pool = Pool::new(PoolLimits::default());
        let (key, dialer) = (key(WEB, &[CART], server.addr), CountingDialer::default());
        let mut stream = pool.connect(&key, &web, &connect_to("127.0.0.1:80"), &dialer).await.unwrap();
        echo(&mut stream, "hello").await;
    })
    .await;
}

#[tokio::test]
async fn concurrent_requests_share_dials_and_connections() {
    within(async {
        let ca = TestCa::new();
        let server = server(ca.identity(CART), Arc::new(Echo::default())).await;
        let limits = PoolLimits { streams_per_connection: 10, ..PoolLimits::default() };
        let (pool, dialer, web) = (Pool::new(limits), CountingDialer::default(), ca.identity(WEB));
        let key = key(WEB, &[CART], server.addr);
        let mut tasks = JoinSet::new();
        for _ in 0..95 {
            let (pool, dialer, web, key) = (pool.clone(), dialer.clone(), web.clone(), key.clone());
            tasks.spawn(async move {
                pool.connect(&key, &web, &connect_to("127.0.0.1:80"), &dialer).await.unwrap()
            });
        }
        let mut streams = tasks.join_all().await;
        for stream in &mut streams {
            echo(stream, "x").await;
        }
        let dials = dialer.dials.load(SeqCst);
        assert!((10..=12).contains(&dials), "{dials} dials for 95 streams at 10 per connection");
        assert_eq!(server.accepted.load(SeqCst), dials);
        assert_eq!((pool.stats().streams, pool.stats().connections), (95, dials as u64));
        drop(streams);
        assert_eq!(pool.stats().streams, 0);
        let _again = pool.connect(&key, &web, &connect_to("127.0.0.1:80"), &dialer).await.unwrap();
        assert_eq!(dialer.dials.load(SeqCst), dials, "a free connection was not used");
    })
    .await;
}

#[tokio::test]
async fn keys_do_not_share_connections() {
    within(async {
        let ca = TestCa::new();
        let server = server(ca.identity(CART), Arc::new(Echo::default())).await;
        let (pool, dialer, web) =
            (Pool::new(PoolLimits::default()), CountingDialer::default(), ca.identity(WEB));
        let one = key(WEB, &[CART], server.addr);
        let wider = key(WEB, &[CART, WEB], server.addr);
        let other_pod = PoolKey { source_ip: "127.0.0.5".parse().unwrap(), ..one.clone() };
        let mut streams = Vec::new();
        for key in [&one, &wider, &other_pod, &one] {
            streams.push(pool.connect(key, &web, &connect_to("127.0.0.1:80"), &dialer).await.unwrap());
        }
        assert_eq!(dialer.dials.load(SeqCst), 3);
        pool.forget_source(LOOPBACK);
        assert_eq!(pool.stats().connections, 1);
        // Open streams of a forgotten source go on.
        echo(&mut streams[0], "still here").await;
        let _new = pool.connect(&one, &web, &connect_to("127.0.0.1:80"), &dialer).await.unwrap();
        assert_eq!(dialer.dials.load(SeqCst), 4);
    })
    .await;
}

#[tokio::test]
async fn bounds_hold_and_idle_connections_give_way() {
    within(async {
        let ca = TestCa::new();
        let server = server(ca.identity(CART), Arc::new(Echo::default())).await;
        let limits = PoolLimits {
            streams_per_connection: 1,
            connections_per_key: 2,
            connections: 3,
            ..PoolLimits::default()
        };
        let (pool, dialer, web) = (Pool::new(limits), CountingDialer::default(), ca.identity(WEB));
        let request = connect_to("127.0.0.1:80");
        let pod = |n: u8| PoolKey {
            source_ip: Ipv4Addr::new(127, 0, 0, n).into(),
            ..key(WEB, &[CART], server.addr)
        };
        let first = pool.connect(&pod(1), &web, &request, &dialer).await.unwrap();
        let _second = pool.connect(&pod(1), &web, &request, &dialer).await.unwrap();
        let error = pool.connect(&pod(1), &web, &request, &dialer).await.unwrap_err();
        assert!(matches!(error, HboneError::Full { .. }), "{error}");
        assert_eq!((error.blame(), error.retryable()), (Blame::Local, false));
        let _third = pool.connect(&pod(2), &web, &request, &dialer).await.unwrap();
        let error = pool.connect(&pod(3), &web, &request, &dialer).await.unwrap_err();
        assert!(matches!(error, HboneError::Full { .. }), "{error}");
        drop(first);
        let _fourth = pool.connect(&pod(3), &web, &request, &dialer).await.unwrap();
        assert_eq!((pool.stats().connections, pool.stats().evicted), (3, 1));
    })
    .await;
}

#[tokio::test]
async fn one_pod_cannot_take_all_connections_of_a_worker() {
    within(async {
        let ca = TestCa::new();
        let server = server(ca.identity(CART), Arc::new(Echo::default())).await;
        let limits = PoolLimits { connections_per_source: 2, ..PoolLimits::default() };
        let (pool, dialer, web) = (Pool::new(limits), CountingDialer::default(), ca.identity(WEB));
        let request = connect_to("127.0.0.1:80");
        // Another set of expected identities is another key, as another destination would be.
        let others = ["spiffe://cluster.local/ns/a/sa/a", "spiffe://cluster.local/ns/a/sa/b"];
        let keys = [vec![CART], vec![CART, others[0]], vec![CART, others[1]]];
        let keys = keys.map(|expected| key(WEB, &expected, server.addr));
        let _first = pool.connect(&keys[0], &web, &request, &dialer).await.unwrap();
        let second = pool.connect(&keys[1], &web, &request, &dialer).await.unwrap();
        let error = pool.connect(&keys[2], &web, &request, &dialer).await.unwrap_err();
        assert!(matches!(error, HboneError::Full { .. }), "{error}");
        let other = PoolKey { source_ip: Ipv4Addr::new(127, 0, 0, 9).into(), ..keys[2].clone() };
        let _other = pool.connect(&other, &web, &request, &dialer).await.unwrap();
        drop(second);
        let _third = pool.connect(&keys[2], &web, &request, &dialer).await.unwrap();
        assert_eq!((pool.stats().connections, pool.stats().evicted), (3, 1));
    })
    .await;
}

#[tokio::test]
async fn of_many_idle_connections_to_one_place_one_stays() {
    within(async {
        let ca = TestCa::new();
        let server = server(ca.identity(CART), Arc::new(Echo::default())).await;
        let spare_idle = Duration::from_millis(40);
        let limits = PoolLimits { streams_per_connection: 1, spare_idle, ..PoolLimits::default() };
        let (pool, dialer, web) = (Pool::new(limits), CountingDialer::default(), ca.identity(WEB));
        let (key, request) = (key(WEB, &[CART], server.addr), connect_to("127.0.0.1:80"));
        let mut streams = vec![];
        for _ in 0..4 {
            streams.push(pool.connect(&key, &web, &request, &dialer).await.unwrap());
        }
        assert_eq!(pool.stats().connections, 4);
        drop(streams);
        eventually("the spare ones are let go", || pool.stats().connections == 1).await;
        tokio::time::sleep(3 * spare_idle).await;
        assert_eq!((pool.stats().connections, pool.stats().evicted), (1, 3));
    })
    .await;
}

/// A workload with very many connections, none of which reads.
#[derive(Default)]
struct Crowded {
    idled: AtomicUsize,
}

impl Handler for Crowded {
    type Upstream = ();

    async fn connect(&self, _: &Arc<Peer>, _: ConnectRequest) -> Result<(), Refusal> {
        Ok(())
    }

    async fn splice(&self, _: (), mut stream: HboneStream) {
        std::future::poll_fn(|cx| stream.send.poll_reset(cx)).await;
    }

    fn connections(&self) -> usize {
        1_000_000
    }

    fn crowded(&self) -> bool {
        true
    }

    fn idled(&self) {
        self.idled.fetch_add(1, SeqCst);
    }

    fn refused(&self, _: &Arc<Peer>, refusal: &Refusal) {
        panic!("{refusal}");
    }
}

#[tokio::test]
async fn a_crowded_pod_gives_little_window_and_no_time_to_idle_tunnels() {
    within(async {
        let ca = TestCa::new();
        let handler = Arc::new(Crowded::default());
        let server = server(ca.identity(CART), handler.clone()).await;
        let (pool, dialer, web) =
            (Pool::new(PoolLimits::default()), CountingDialer::default(), ca.identity(WEB));
        let key = key(WEB, &[CART], server.addr);
        let mut stream = pool.connect(&key, &web, &connect_to("127.0.0.1:80"), &dialer).await.unwrap();
        let mut taken = 0;
        let mut data = Bytes::from(vec![0; 1 << 20]);
        while let Ok(sent) = timeout(
            Duration::from_millis(200),
            std::future::poll_fn(|cx| stream.send.poll_send(cx, &mut data)),
        )
        .await
        {
            taken += sent.unwrap();
        }
        assert_eq!(taken, MIN_STREAM_WINDOW as usize, "a reader that does not read costs no more");
        assert_eq!(handler.idled.load(SeqCst), 0, "a tunnel with a stream is not idle");
        drop(stream);
        eventually("the idle tunnel is ended", || handler.idled.load(SeqCst) == 1).await;
    })
    .await;
}

#[tokio::test]
async fn idle_connections_are_let_go() {
    within(async {
        let ca = TestCa::new();
        let server = server(ca.identity(CART), Arc::new(Echo::default())).await;
        let limits = PoolLimits { idle: Duration::from_millis(40), ..PoolLimits::default() };
        let (pool, dialer, web) = (Pool::new(limits), CountingDialer::default(), ca.identity(WEB));
        let key = key(WEB, &[CART], server.addr);
        let stream = pool.connect(&key, &web, &connect_to("127.0.0.1:80"), &dialer).await.unwrap();
        tokio::time::sleep(Duration::from_millis(150)).await;
        assert_eq!(pool.stats().connections, 1, "a connection in use was evicted");
        drop(stream);
        eventually("the idle connection is evicted", || pool.stats().connections == 0).await;
        assert_eq!(pool.stats().evicted, 1);
    })
    .await;
}

#[tokio::test]
async fn a_draining_server_finishes_streams_and_takes_no_new_ones() {
    within(async {
        let ca = TestCa::new();
        let server = server(ca.identity(CART), Arc::new(Echo::default())).await;
        let successor = super::tests::server(ca.identity(CART), Arc::new(Echo::default())).await;
        let (pool, web) = (Pool::new(PoolLimits::default()), ca.identity(WEB));
        // After the drain, the same address is served by somebody else, as in an upgrade.
        #[derive(Clone)]
        struct Switch(Arc<Mutex<SocketAddr>>);
        impl Dialer for Switch {
            async fn dial(&self, _: SocketAddr) -> io::Result<TcpStream> {
                let to = *self.0.lock().unwrap();
                TcpStream::connect(to).await
            }
        }
        let dialer = Switch(Arc::new(Mutex::new(server.addr)));
        let key = key(WEB, &[CART], server.addr);
        let mut old = pool.connect(&key, &web, &connect_to("127.0.0.1:80"), &dialer).await.unwrap();
        echo(&mut old, "before").await;
        *dialer.0.lock().unwrap() = successor.addr;
        server.drain.cancel();
        // Until the GOAWAY is here, requests may still meet the old server; none may fail.
        for _ in 0..100 {
            let mut new = pool.connect(&key, &web, &connect_to("127.0.0.1:80"), &dialer).await.unwrap();
            echo(&mut new, "new").await;
        }
        assert!(successor.accepted.load(SeqCst) > 0, "requests still go to the draining server");
        echo(&mut old, "after").await;
        assert_eq!(pool.stats().streams, 1);
    })
    .await;
}

#[tokio::test]
async fn a_dead_pooled_connection_costs_no_request() {
    within(async {
        let ca = TestCa::new();
        let first = server(ca.identity(CART), Arc::new(Echo::default())).await;
        let addr = first.addr;
        let (pool, dialer, web) =
            (Pool::new(PoolLimits::default()), CountingDialer::default(), ca.identity(WEB));
        let key = key(WEB, &[CART], addr);
        drop(pool.connect(&key, &web, &connect_to("127.0.0.1:80"), &dialer).await.unwrap());
        drop(first);
        // With its server gone the address refuses; then there is a clean error, and not a hang.
        let error = pool.connect(&key, &web, &connect_to("127.0.0.1:80"), &dialer).await.unwrap_err();
        assert!(matches!(error, HboneError::Dial { .. }), "{error}");
        assert!(error.retryable());
        assert_eq!(pool.stats().connections, 0);
    })
    .await;
}

#[tokio::test]
async fn the_peers_stream_limit_opens_another_connection() {
    within(async {
        let ca = TestCa::new();
        let cart = ca.identity(CART);
        let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        // A server that takes two streams per connection and holds them.
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let cart = cart.clone();
                connections.spawn(async move {
                    let (stream, _) = tls::accept(tcp, &cart, LIMIT).await.unwrap();
                    let mut connection = h2::server::Builder::new()
                        .max_concurrent_streams(2)
                        .handshake::<_, Bytes>(stream)
                        .await
                        .unwrap();
                    let mut held = Vec::new();
                    while let Some(Ok((request, mut respond))) = connection.accept().await {
                        let send = respond.send_response(http::Response::new(()), false).unwrap();
                        held.push((request, send));
                    }
                });
            }
        });
        let (pool, dialer, web) =
            (Pool::new(PoolLimits::default()), CountingDialer::default(), ca.identity(WEB));
        let key = key(WEB, &[CART], addr);
        let mut streams = Vec::new();
        for _ in 0..7 {
            streams.push(pool.connect(&key, &web, &connect_to("127.0.0.1:80"), &dialer).await.unwrap());
        }
        assert_eq!(dialer.dials.load(SeqCst), 4);
        task.abort();
    })
    .await;
}

#[tokio::test]
async fn a_client_that_gives_up_ends_the_handlers_work() {
    within(async {
        let ca = TestCa::new();
        let handler = Arc::new(Echo { hold: Some(Arc::new(Notify::new())), ..Echo::default() });
        let server = server(ca.identity(CART), handler.clone()).await;
        let limits = PoolLimits { response_timeout: Duration::from_millis(100), ..PoolLimits::default() };
        let (pool, dialer, web) = (Pool::new(limits), CountingDialer::default(), ca.identity(WEB));
        let key = key(WEB, &[CART], server.addr);
        let error = pool.connect(&key, &web, &connect_to("127.0.0.1:80"), &dialer).await.unwrap_err();
        assert!(matches!(error, HboneError::Timeout { .. }), "{error}");
        assert_eq!(handler.waiting.load(SeqCst), 1);
        eventually("the handler is dropped", || handler.given_up.load(SeqCst) == 1).await;
        assert_eq!(pool.stats().streams, 0);
    })
    .await;
}

#[tokio::test]
async fn tls_refusals_reach_the_caller_typed_from_either_side() {
    within(async {
        let (ca, other) = (TestCa::new(), TestCa::new());
        let server = server(ca.identity(CART), Arc::new(Echo::default())).await;
        let (pool, dialer) = (Pool::new(PoolLimits::default()), CountingDialer::default());
        let request = connect_to("127.0.0.1:80");
        // We refuse the server.
        let key_wrong = key(WEB, &[WEB], server.addr);
        let error = pool.connect(&key_wrong, &ca.identity(WEB), &request, &dialer).await.unwrap_err();
        let HboneError::Tls { reject, .. } = &error else { panic!("{error}") };
        assert_eq!(reject.reason, RejectReason::WrongIdentity);
        assert_eq!(reject.presented.as_deref(), Some(CART));
        // The server refuses us: same roots for our side, another CA for our certificate.
        let id: SpiffeId = WEB.parse().unwrap();
        let mallory = LocalIdentity::new(id.clone()).unwrap();
        let (chain, private) = other.issue(&tls::testca::Leaf::of(WEB));
        let roots = [other.root(), ca.root()];
        mallory.cell().install(tls::WorkloadCert::new(&id, chain, private, &roots).unwrap());
        let key = key(WEB, &[CART], server.addr);
        let error = pool.connect(&key, &Arc::new(mallory), &request, &dialer).await.unwrap_err();
        let HboneError::Tls { reject, .. } = &error else { panic!("{error}") };
        assert_eq!(reject.reason, RejectReason::PeerRefused, "{error}");
        eventually("the server has counted it", || {
            server.rejects.lock().unwrap().contains(&RejectReason::UnknownCa)
        })
        .await;
        assert_eq!(dialer.dials.load(SeqCst), 2, "a refusal by TLS was tried again");
    })
    .await;
}

#[tokio::test]
async fn no_new_streams_once_a_certificate_has_expired() {
    within(async {
        let ca = TestCa::new();
        let server = server(ca.identity(CART), Arc::new(Echo::default())).await;
        let (pool, dialer) = (Pool::new(PoolLimits::default()), CountingDialer::default());
        let id: SpiffeId = WEB.parse().unwrap();
        let web = Arc::new(LocalIdentity::new(id.clone()).unwrap());
        let leaf = tls::testca::Leaf::of(WEB).lasting(Duration::from_millis(1500));
        let (chain, private) = ca.issue(&leaf);
        web.cell().install(tls::WorkloadCert::new(&id, chain, private, &[ca.root()]).unwrap());
        let until = web.cell().current().unwrap().not_after();
        let key = key(WEB, &[CART], server.addr);
        let request = connect_to("127.0.0.1:80");
        let mut old = pool.connect(&key, &web, &request, &dialer).await.unwrap();
        web.cell().install(ca.cert(&id));
        eventually("the first certificate expires", || std::time::SystemTime::now() > until).await;
        let mut new = pool.connect(&key, &web, &request, &dialer).await.unwrap();
        assert_eq!(dialer.dials.load(SeqCst), 2, "a stream went over an identity that has expired");
        echo(&mut new, "new").await;
        echo(&mut old, "rotation drops nothing").await;
    })
    .await;
}
