//! The whole path on loopback: a client's TCP, a tunnel over real TLS, a server's TCP; and TCP to TCP.

use super::*;
use crate::{
    hbone::{
        ConnectRequest, Dialer, Handler, HboneStream, Pool, PoolLimits, Refusal, STREAM_WINDOW, Target,
        tests::{CART, CountingDialer, LOOPBACK, Server, WEB, connect_to, eventually, key, server, within},
    },
    local::Buffered,
    tls::{Peer, testca::TestCa},
};
use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
};

/// The inbound side: connects to the address in the request and copies.
struct Inbound {
    outcomes: mpsc::UnboundedSender<CopyOutcome>,
    counters: Arc<ByteCounters>,
    crowd: Arc<AtomicUsize>,
}

impl Handler for Inbound {
    type Upstream = TcpStream;

    fn connections(&self) -> usize {
        self.crowd.load(SeqCst)
    }

    async fn connect(&self, _peer: &Arc<Peer>, request: ConnectRequest) -> Result<TcpStream, Refusal> {
        let Target::Addr(to) = request.target else { return Err(Refusal::Authority("host".into())) };
        TcpStream::connect(to).await.map_err(|source| Refusal::Unavailable { to, source })
    }

    async fn splice(&self, upstream: TcpStream, stream: HboneStream) {
        let never = std::future::pending();
        let outcome =
            copy(HboneEnd::new(stream), TcpEnd::new(upstream), &self.counters, Buffered::default(), never)
                .await;
        let _ = self.outcomes.send(outcome);
    }

    fn refused(&self, _peer: &Arc<Peer>, refusal: &Refusal) {
        panic!("{refusal}");
    }
}

/// Dials, and says how many connections its pod has.
#[derive(Clone)]
struct CrowdDialer(Arc<AtomicUsize>);

impl Dialer for CrowdDialer {
    async fn dial(&self, to: SocketAddr) -> io::Result<TcpStream> {
        TcpStream::connect(to).await
    }

    fn connections(&self) -> usize {
        self.0.load(SeqCst)
    }
}

/// What connects a test's client and server.
#[derive(Clone, Copy, Debug)]
enum Via {
    Tcp,
    Hbone,
}

/// A listening client side, joined by the data path to a listening server side.
struct Path {
    entry: SocketAddr,
    backend: TcpListener,
    stop: watch::Sender<Option<Stop>>,
    outbound: mpsc::UnboundedReceiver<CopyOutcome>,
    inbound: mpsc::UnboundedReceiver<CopyOutcome>,
    pool: Pool,
    crowd: Arc<AtomicUsize>,
    _server: Option<Server>,
    _entry_task: tokio::task::JoinHandle<()>,
}

impl Path {
    async fn new(via: Via) -> Self {
        let backend = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
        let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
        let entry = listener.local_addr().unwrap();
        let to = backend.local_addr().unwrap();
        let (stop, stopped) = watch::channel(None);
        let (report_out, outbound) = mpsc::unbounded_channel();
        let (report_in, inbound) = mpsc::unbounded_channel();
        let counters = Arc::new(ByteCounters::default());
        let ca = TestCa::new();
        let pool = Pool::new(PoolLimits::default());
        let crowd = Arc::new(AtomicUsize::new(1));
        let hbone = match via {
            Via::Tcp => None,
            Via::Hbone => {
                let inbound = Inbound { outcomes: report_in, counters: Arc::default(), crowd: crowd.clone() };
                Some(server(ca.identity(CART), Arc::new(inbound)).await)
            }
        };
        let tunnel = hbone.as_ref().map(|s| key(WEB, &[CART], s.addr));
        let (web, counting, pooled) = (ca.identity(WEB), counters, pool.clone());
        let dialer = CrowdDialer(crowd.clone());
        let entry_task = tokio::spawn(async move {
            loop {
                let Ok((client, _)) = listener.accept().await else { return };
                let (mut stopped, report) = (stopped.clone(), report_out.clone());
                let (tunnel, web, counters, pool) =
                    (tunnel.clone(), web.clone(), counting.clone(), pooled.clone());
                let dialer = dialer.clone();
                tokio::spawn(async move {
                    let stop = async move {
                        let stop = stopped.wait_for(Option::is_some).await.map(|stop| *stop);
                        match stop {
                            Ok(Some(stop)) => stop,
                            _ => std::future::pending().await,
                        }
                    };
                    let client = TcpEnd::new(client);
                    let outcome = match tunnel {
                        None => {
                            let upstream = TcpStream::connect(to).await.unwrap();
                            copy(client, TcpEnd::new(upstream), &counters, Buffered::default(), stop).await
                        }
                        Some(key) => {
                            let request = connect_to(&to.to_string());
                            let stream = pool.connect(&key, &web, &request, &dialer).await.unwrap();
                            copy(client, HboneEnd::new(stream), &counters, Buffered::default(), stop).await
                        }
                    };
                    let _ = report.send(outcome);
                });
            }
        });
        Self { entry, backend, stop, outbound, inbound, pool, crowd, _server: hbone, _entry_task: entry_task }
    }

    /// A client's and a server's end of one connection.
    async fn open(&self) -> (TcpStream, TcpStream) {
        let (client, accepted) = tokio::join!(TcpStream::connect(self.entry), self.backend.accept());
        (client.unwrap(), accepted.unwrap().0)
    }
}

/// Pseudo-random bytes that no compression or repetition could hide an error in.
struct Pattern(u64);

impl Pattern {
    fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

async fn send_pattern(mut to: impl AsyncWriteExt + Unpin, seed: u64, mut len: usize) {
    let mut pattern = Pattern(seed);
    let mut buffer = vec![0; 64 << 10];
    while len > 0 {
        let n = len.min(buffer.len());
        pattern.fill(&mut buffer[..n]);
        to.write_all(&buffer[..n]).await.unwrap();
        len -= n;
    }
    to.shutdown().await.unwrap();
}

async fn expect_pattern(mut from: impl AsyncReadExt + Unpin, seed: u64, len: usize) {
    let mut pattern = Pattern(seed);
    let (mut expected, mut got) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    let mut seen = 0;
    while seen < len {
        let n = (len - seen).min(expected.len());
        pattern.fill(&mut expected[..n]);
        from.read_exact(&mut got[..n]).await.unwrap();
        assert!(expected[..n] == got[..n], "bytes differ after {seen}");
        seen += n;
    }
    assert_eq!(from.read(&mut got).await.unwrap(), 0, "more bytes than were sent");
}

#[tokio::test]
async fn sixty_four_mebibytes_both_ways_at_once() {
    for via in [Via::Tcp, Via::Hbone] {
        within(async {
            let mut path = Path::new(via).await;
            let (client, server) = path.open().await;
            let len = 64 << 20;
            let (client_read, client_write) = client.into_split();
            let (server_read, server_write) = server.into_split();
            tokio::join!(
                send_pattern(client_write, 1, len),
                expect_pattern(server_read, 1, len),
                send_pattern(server_write, 2, len),
                expect_pattern(client_read, 2, len),
            );
            let outcome = path.outbound.recv().await.unwrap();
            assert!(matches!(outcome.end, CopyEnd::Clean), "{via:?}: {}", outcome.end);
            assert_eq!((outcome.sent, outcome.received), (len as u64, len as u64), "{via:?}");
            if matches!(via, Via::Hbone) {
                let outcome = path.inbound.recv().await.unwrap();
                assert!(matches!(outcome.end, CopyEnd::Clean), "{}", outcome.end);
                assert_eq!((outcome.sent, outcome.received), (len as u64, len as u64));
                eventually("the stream is given back", || path.pool.stats().streams == 0).await;
            }
        })
        .await;
    }
}

#[tokio::test]
async fn bytes_are_right_while_the_windows_shrink_and_grow() {
    within(async {
        let path = Path::new(Via::Hbone).await;
        let (client, server) = path.open().await;
        let len = 32 << 20;
        let (client_read, client_write) = client.into_split();
        let (server_read, server_write) = server.into_split();
        let transfer = async {
            tokio::join!(
                send_pattern(client_write, 1, len),
                expect_pattern(server_read, 1, len),
                send_pattern(server_write, 2, len),
                expect_pattern(client_read, 2, len),
            );
        };
        let changes = async {
            for connections in [100_000, 1, 500, 5_000, 2].into_iter().cycle() {
                path.crowd.store(connections, SeqCst);
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
        };
        tokio::select! {
            () = transfer => {}
            () = changes => unreachable!("it cycles"),
        }
    })
    .await;
}

#[tokio::test]
async fn either_side_may_half_close_first() {
    for via in [Via::Tcp, Via::Hbone] {
        within(async {
            for client_first in [true, false] {
                let mut path = Path::new(via).await;
                let (client, server) = path.open().await;
                let (mut first, mut second) = if client_first { (client, server) } else { (server, client) };
                first.write_all(b"question").await.unwrap();
                first.shutdown().await.unwrap();
                let mut got = String::new();
                second.read_to_string(&mut got).await.unwrap();
                assert_eq!(got, "question");
                // The other direction lives on.
                for _ in 0..3 {
                    second.write_all(b"answer").await.unwrap();
                    let mut buffer = [0; 6];
                    first.read_exact(&mut buffer).await.unwrap();
                    assert_eq!(&buffer, b"answer");
                }
                drop(second);
                assert_eq!(first.read(&mut [0]).await.unwrap(), 0);
                let end = path.outbound.recv().await.unwrap().end;
                assert!(matches!(end, CopyEnd::Clean), "{via:?}, client first {client_first}: {end}");
            }
        })
        .await;
    }
}

async fn is_reset(stream: &mut TcpStream) -> bool {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer).await {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) => return error.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

#[tokio::test]
async fn a_reset_on_one_side_is_a_reset_on_the_other() {
    for via in [Via::Tcp, Via::Hbone] {
        within(async {
            for client_resets in [true, false] {
                let mut path = Path::new(via).await;
                let (client, server) = path.open().await;
                let (mut one, mut other) = if client_resets { (client, server) } else { (server, client) };
                one.write_all(b"x").await.unwrap();
                other.read_exact(&mut [0]).await.unwrap();
                one.set_zero_linger().unwrap();
                drop(one);
                assert!(
                    is_reset(&mut other).await,
                    "{via:?}, client resets {client_resets}: no reset came through"
                );
                let end = path.outbound.recv().await.unwrap().end;
                let as_expected = if client_resets {
                    matches!(end, CopyEnd::ResetByClient)
                } else {
                    matches!(end, CopyEnd::ResetByServer)
                };
                assert!(as_expected, "{via:?}, client resets {client_resets}: {end}");
                eventually("the stream is given back", || path.pool.stats().streams == 0).await;
            }
        })
        .await;
    }
}

#[tokio::test]
async fn a_reset_after_a_half_close_and_into_a_full_pipe_is_noticed() {
    for via in [Via::Tcp, Via::Hbone] {
        within(async {
            // The client half-closes, waits, and is reset while the server says nothing.
            let mut path = Path::new(via).await;
            let (mut client, mut server) = path.open().await;
            client.shutdown().await.unwrap();
            assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
            client.set_zero_linger().unwrap();
            drop(client);
            let end = path.outbound.recv().await.unwrap().end;
            assert!(matches!(end, CopyEnd::ResetByClient), "{via:?}: {end}");
            // The server's own write finds out.
            let found = async {
                while server.write_all(b"x").await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            found.await;
            // The client fills a pipe whose reader sleeps, and is reset.
            let (mut client, _sleeper) = path.open().await;
            let blocked = async {
                let chunk = vec![0; 64 << 10];
                while tokio::time::timeout(Duration::from_millis(300), client.write_all(&chunk)).await.is_ok()
                {
                }
            };
            blocked.await;
            client.set_zero_linger().unwrap();
            drop(client);
            let end = path.outbound.recv().await.unwrap().end;
            assert!(matches!(end, CopyEnd::ResetByClient), "{via:?}: {end}");
        })
        .await;
    }
}

#[tokio::test]
async fn a_sleeping_reader_stops_the_sender_and_harms_nobody_else() {
    for via in [Via::Tcp, Via::Hbone] {
        within(async {
            let path = Path::new(via).await;
            // More sleepers than a fixed connection window could bear.
            let mut sleepers = Vec::new();
            for _ in 0..6 {
                let (mut client, server) = path.open().await;
                let chunk = vec![7; 64 << 10];
                let mut accepted = 0usize;
                while tokio::time::timeout(Duration::from_millis(400), client.write(&chunk)).await.is_ok_and(
                    |n| {
                        accepted += n.unwrap();
                        true
                    },
                ) {
                    assert!(accepted < 64 << 20, "{via:?}: a sleeping reader does not stop the sender");
                }
                sleepers.push((client, server, accepted));
            }
            let (mut client, mut server) = path.open().await;
            client.write_all(b"lively").await.unwrap();
            let mut buffer = [0; 6];
            server.read_exact(&mut buffer).await.unwrap();
            assert_eq!(&buffer, b"lively");
            // What the sleepers were sent is all there when they wake up.
            for (client, mut server, accepted) in sleepers {
                drop(client);
                let mut left = Vec::new();
                server.read_to_end(&mut left).await.unwrap();
                // A write that was cut off by the timeout may or may not have been taken in part.
                assert!(left.len() >= accepted && left.len() <= accepted + (64 << 10), "{via:?}");
                assert!(left.iter().all(|b| *b == 7));
            }
        })
        .await;
    }
}

#[tokio::test]
async fn many_small_frames_to_a_sleeping_reader_break_nothing() {
    within(async {
        let ca = TestCa::new();
        let (report, _outcomes) = mpsc::unbounded_channel();
        let counters = Arc::<ByteCounters>::default();
        let inbound = Inbound { outcomes: report, counters: counters.clone(), crowd: Arc::default() };
        let server = server(ca.identity(CART), Arc::new(inbound)).await;
        let backend = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
        let request = connect_to(&backend.local_addr().unwrap().to_string());
        let (pool, dialer, web) =
            (Pool::new(PoolLimits::default()), CountingDialer::default(), ca.identity(WEB));
        let key = key(WEB, &[CART], server.addr);
        let mut stream = pool.connect(&key, &web, &request, &dialer).await.unwrap();
        let (mut sleeper, _) = backend.accept().await.unwrap();
        // Fill the workload's socket, so that the tunnel's end has to keep what comes after.
        let mut sent = 0;
        let stuck = async {
            let (mut before, mut unchanged) = (0, 0);
            while unchanged < 20 {
                if sent - before < 1 << 20 {
                    stream.send.send(bytes::Bytes::from_static(&[7; 64 << 10])).await.unwrap();
                    sent += 64 << 10;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
                let now = counters.get().0;
                unchanged = if now == before { unchanged + 1 } else { 0 };
                before = now;
            }
        };
        stuck.await;
        // One-byte frames: far more than HTTP/2 tolerates unread on one connection.
        let small = 50_000;
        for i in 0..small {
            stream.send.send(bytes::Bytes::from_static(&[7])).await.unwrap();
            if i % 64 == 0 {
                tokio::task::yield_now().await;
            }
        }
        stream.send.finish().unwrap();
        let mut other = pool.connect(&key, &web, &request, &dialer).await.unwrap();
        other.send.send(bytes::Bytes::from_static(b"lively")).await.unwrap();
        let (mut awake, _) = backend.accept().await.unwrap();
        let mut buffer = [0; 6];
        awake.read_exact(&mut buffer).await.unwrap();
        assert_eq!(dialer.dials.load(SeqCst), 1, "the connection was lost");
        let mut got = Vec::new();
        sleeper.read_to_end(&mut got).await.unwrap();
        assert_eq!(got.len() as u64, sent + small);
    })
    .await;
}

#[tokio::test]
async fn a_stop_resets_both_sides() {
    for via in [Via::Tcp, Via::Hbone] {
        within(async {
            for stop in [Stop::Revoked, Stop::Deadline] {
                let mut path = Path::new(via).await;
                let (mut client, mut server) = path.open().await;
                client.write_all(b"x").await.unwrap();
                server.read_exact(&mut [0]).await.unwrap();
                path.stop.send_replace(Some(stop));
                assert!(is_reset(&mut client).await, "{via:?}: the client was not reset");
                assert!(is_reset(&mut server).await, "{via:?}: the server was not reset");
                let outcome = path.outbound.recv().await.unwrap();
                let as_expected = match stop {
                    Stop::Revoked => matches!(outcome.end, CopyEnd::Revoked),
                    Stop::Deadline => matches!(outcome.end, CopyEnd::Deadline),
                };
                assert!(as_expected, "{via:?}: {}", outcome.end);
                assert_eq!((outcome.sent, outcome.received), (1, 0));
            }
        })
        .await;
    }
}

#[tokio::test]
async fn a_copy_that_is_dropped_is_no_clean_end() {
    within(async {
        let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let pair = async || {
            let (a, b) = tokio::join!(TcpStream::connect(addr), listener.accept());
            (a.unwrap(), b.unwrap().0)
        };
        let ((mut client, near), (far, mut server)) = (pair().await, pair().await);
        let task = tokio::spawn(async move {
            let counters = ByteCounters::default();
            copy(TcpEnd::new(near), TcpEnd::new(far), &counters, Buffered::default(), std::future::pending())
                .await
        });
        client.write_all(b"x").await.unwrap();
        server.read_exact(&mut [0]).await.unwrap();
        task.abort();
        assert!(is_reset(&mut client).await && is_reset(&mut server).await);
    })
    .await;
}

#[tokio::test]
async fn bytes_read_before_the_copy_come_first() {
    within(async {
        let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let pair = async || {
            let (a, b) = tokio::join!(TcpStream::connect(addr), listener.accept());
            (a.unwrap(), b.unwrap().0)
        };
        let ((mut client, near), (far, mut server)) = (pair().await, pair().await);
        let task = tokio::spawn(async move {
            let counters = ByteCounters::default();
            let end = TcpEnd::with_prefix(near, bytes::Bytes::from_static(b"GET "));
            copy(end, TcpEnd::new(far), &counters, Buffered::default(), std::future::pending()).await
        });
        client.write_all(b"/").await.unwrap();
        client.shutdown().await.unwrap();
        let mut got = String::new();
        server.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "GET /");
        drop(server);
        let outcome = task.await.unwrap();
        assert_eq!((outcome.sent, outcome.received), (5, 0));
    })
    .await;
}

/// Records what it is given, and never takes more than its window.
struct Windowed {
    queued: Arc<AtomicU64>,
    peak: Arc<Mutex<u64>>,
    left: usize,
}

impl Endpoint for Windowed {
    const READ_AHEAD: usize = STREAM_WINDOW as usize;

    fn poll_read(
        &mut self,
        _cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<Option<bytes::Bytes>, EndpointError>> {
        if self.left == 0 {
            return std::task::Poll::Pending;
        }
        self.left -= 1;
        let queued = self.queued.fetch_add(64 << 10, SeqCst) + (64 << 10);
        let mut peak = self.peak.lock().unwrap();
        *peak = (*peak).max(queued);
        std::task::Poll::Ready(Ok(Some(bytes::Bytes::from_static(&[0; 64 << 10]))))
    }

    fn consumed(&mut self, n: usize) {
        self.queued.fetch_sub(n as u64, SeqCst);
    }

    fn poll_write(
        &mut self,
        _cx: &mut std::task::Context<'_>,
        _queue: &mut super::endpoint::Queue,
    ) -> std::task::Poll<Result<usize, EndpointError>> {
        std::task::Poll::Pending
    }

    fn finish(&mut self) -> Result<(), EndpointError> {
        Ok(())
    }

    fn poll_failed(&mut self, _cx: &mut std::task::Context<'_>) -> std::task::Poll<EndpointError> {
        std::task::Poll::Pending
    }

    fn completed(&mut self) {}

    fn reset(&mut self) {}
}

#[tokio::test]
async fn reading_ahead_is_bounded() {
    let (queued, peak) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(0)));
    let end = || Windowed { queued: queued.clone(), peak: peak.clone(), left: 10_000 };
    let counters = ByteCounters::default();
    let stop = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        Stop::Deadline
    };
    let outcome = copy(end(), end(), &counters, Buffered::default(), stop).await;
    assert!(matches!(outcome.end, CopyEnd::Deadline));
    let peak = *peak.lock().unwrap();
    // Both directions, each at most one piece over its bound.
    assert!(peak <= 2 * (u64::from(STREAM_WINDOW) + (64 << 10)), "{peak} bytes were read ahead");
}

#[tokio::test]
async fn an_idle_copy_is_small() {
    within(async {
        let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (a, b) = tokio::join!(TcpStream::connect(addr), listener.accept());
        let counters = ByteCounters::default();
        let stop = std::future::pending::<Stop>();
        let future =
            copy(TcpEnd::new(a.unwrap()), TcpEnd::new(b.unwrap().0), &counters, Buffered::default(), stop);
        let size = size_of_val(&future);
        assert!(size <= 1024, "the future of a copy has {size} bytes");
    })
    .await;
}
