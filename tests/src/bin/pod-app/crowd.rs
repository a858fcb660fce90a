//! Connections that stay: many idle ones, and the server for them; readers that never read.

use crate::options::Crowd;
use anyhow::{Context, Result};
use socket2::SockRef;
use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

/// How long an exchange may take.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A reader that has taken nothing for this long does not read.
const STALLED: Duration = Duration::from_millis(1500);

/// Echoes on `port` with a task and not a thread per connection.
pub(crate) fn serve_many(port: u16) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener =
            TcpListener::bind(("0.0.0.0", port)).await.with_context(|| format!("listen on {port}"))?;
        println!("ready");
        loop {
            let Ok((mut stream, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            tokio::spawn(async move {
                let mut buffer = [0; 64];
                while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                    if stream.write_all(&buffer[..n]).await.is_err() {
                        return;
                    }
                }
            });
        }
    })
}

/// Opens the connections, prints one line of JSON with how many there are, and keeps them until it is ended.
pub(crate) fn crowd(args: &Crowd) -> Result<()> {
    let next = AtomicU64::new(0);
    let open = thread::scope(|scope| {
        let workers: Vec<_> = (0..args.threads.max(1))
            .map(|_| {
                scope.spawn(|| {
                    let mut open = Vec::new();
                    while next.fetch_add(1, Relaxed) < args.n {
                        open.extend(one(args.to, args.fill).ok());
                    }
                    open
                })
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap_or_default()).collect::<Vec<_>>()
    });
    let taken: u64 = open.iter().map(|(_, taken)| taken).sum();
    println!(
        "{}",
        serde_json::json!({ "open": open.len(), "failed": args.n - open.len() as u64, "taken": taken })
    );
    loop {
        thread::park();
    }
}

fn one(to: SocketAddr, fill: bool) -> Result<(TcpStream, u64)> {
    let mut stream = TcpStream::connect_timeout(&to, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    if fill {
        return Ok((stream.try_clone()?, fill_up(&stream)?));
    }
    stream.write_all(b"x\n")?;
    let n = stream.read(&mut [0; 512])?;
    anyhow::ensure!(n > 0, "closed");
    Ok((stream, 0))
}

/// Writes until nothing more is taken.
fn fill_up(mut stream: &TcpStream) -> Result<u64> {
    // A small buffer of its own, so that what is taken is in the mesh and not here.
    SockRef::from(stream).set_send_buffer_size(64 << 10)?;
    stream.set_write_timeout(Some(STALLED))?;
    let (zeros, mut taken, started) = ([0; 64 << 10], 0, Instant::now());
    while started.elapsed() < TIMEOUT {
        match stream.write(&zeros) {
            Ok(n) => taken += n as u64,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(taken)
}
