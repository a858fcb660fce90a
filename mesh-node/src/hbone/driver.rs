//! What keeps a connection alive besides its streams: PING, window growth, and the client's driver task.

use super::{
    CONNECTION_WINDOW, MAX_CONNECTION_WINDOW, MIN_STREAM_WINDOW, PING_INTERVAL, PING_TIMEOUT, POD_WINDOW,
    STREAM_WINDOW,
    fault::Fault,
    pool::{Closed, ConnShared},
};
use bytes::Bytes;
use h2::{Ping, PingPong, client};
use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, Interval, MissedTickBehavior, interval_at},
};

/// Asks the peer whether it is still there. Without it, a node that vanished would hold its streams until TCP gives up.
pub(super) struct KeepAlive {
    pings: Option<PingPong>,
    ticker: Interval,
    sent: Option<Instant>,
}

impl KeepAlive {
    pub(super) fn new(pings: Option<PingPong>) -> Self {
        Self { pings, ticker: ticker(PING_INTERVAL), sent: None }
    }

    /// Ready when the peer has not answered in time.
    pub(super) fn poll_dead(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(pings) = &mut self.pings else { return Poll::Pending };
        loop {
            if self.sent.is_some()
                && let Poll::Ready(Ok(_)) = pings.poll_pong(cx)
            {
                self.sent = None;
            }
            if self.ticker.poll_tick(cx).is_pending() {
                return Poll::Pending;
            }
            match self.sent {
                Some(sent) if sent.elapsed() >= PING_TIMEOUT => return Poll::Ready(()),
                Some(_) => {}
                // An error here means that the connection is ending, which its own poll reports.
                None => self.sent = pings.send_ping(Ping::opaque()).is_ok().then(Instant::now),
            }
        }
    }
}

fn ticker(every: Duration) -> Interval {
    let mut ticker = interval_at(Instant::now() + every, every);
    ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticker
}

/// The connection window for a number of open streams: room for each to fill its own, within the bound.
pub(super) fn window_for(streams: usize) -> u32 {
    let wanted = u32::try_from(streams).unwrap_or(u32::MAX).saturating_add(1).saturating_mul(STREAM_WINDOW);
    wanted.clamp(CONNECTION_WINDOW, MAX_CONNECTION_WINDOW)
}

/// The window for each stream of a pod with a number of connections. In powers of two, so that it seldom changes.
pub(super) fn stream_window_for(connections: usize) -> u32 {
    let connections = u32::try_from(connections.max(1)).unwrap_or(u32::MAX);
    let sharers = connections.checked_next_power_of_two().unwrap_or(u32::MAX);
    (POD_WINDOW / sharers).clamp(MIN_STREAM_WINDOW, STREAM_WINDOW)
}

/// Drives a client connection to its end and says what ended it. Calls `sweep` now and then so that the pool can let
/// an idle connection go.
pub(super) async fn drive<IO>(
    mut connection: client::Connection<IO, Bytes>,
    fault: Fault,
    shared: Arc<ConnShared>,
    connections: impl Fn() -> usize,
    sweep_every: Duration,
    mut sweep: impl FnMut(),
) -> Closed
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let mut alive = KeepAlive::new(connection.ping_pong());
    let mut sweeper = ticker(sweep_every);
    let mut window = CONNECTION_WINDOW;
    let mut stream_window = stream_window_for(connections());
    poll_fn(|cx| {
        let wanted = window_for(shared.streams());
        if wanted > window {
            window = wanted;
            connection.set_target_window_size(window);
        }
        let wanted = stream_window_for(connections());
        // Refused while the peer has not acknowledged the last change; then it is tried again.
        if wanted != stream_window && connection.set_initial_window_size(wanted).is_ok() {
            stream_window = wanted;
        }
        if alive.poll_dead(cx).is_ready() {
            let detail = format!("no answer to a PING within {} s", PING_TIMEOUT.as_secs());
            return Poll::Ready(Closed { detail, tls: None });
        }
        while sweeper.poll_tick(cx).is_ready() {
            sweep();
        }
        Pin::new(&mut connection).poll(cx).map(|result| match result {
            Ok(()) => Closed { detail: "the peer closed the connection".into(), tls: None },
            // A server that refuses our certificate says so only after the client's side of the handshake is done.
            Err(error) => Closed { detail: error.to_string(), tls: fault.get().cloned() },
        })
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_more_connections_a_pod_has_the_less_each_may_have_in_flight() {
        assert_eq!(stream_window_for(0), STREAM_WINDOW);
        assert_eq!(stream_window_for(64), STREAM_WINDOW);
        assert_eq!(stream_window_for(65), STREAM_WINDOW / 2);
        assert_eq!(stream_window_for(1000), 256 << 10);
        assert_eq!(stream_window_for(usize::MAX), MIN_STREAM_WINDOW);
        for connections in [1, 100, 1000, 5000, 8192] {
            assert!(connections as u64 * u64::from(stream_window_for(connections)) <= u64::from(POD_WINDOW));
        }
    }

    #[test]
    fn the_window_grows_with_the_streams_and_stays_bounded() {
        assert_eq!(window_for(0), CONNECTION_WINDOW);
        assert_eq!(window_for(3), CONNECTION_WINDOW);
        assert_eq!(window_for(10), 11 * STREAM_WINDOW);
        assert_eq!(window_for(usize::MAX), MAX_CONNECTION_WINDOW);
    }
}
