//! The thread that tells the kernel that the daemon serves.
//!
//! It beats only while every worker and the reconcile thread get on: a daemon that accepts and does nothing must look
//! dead to the kernel, which then does without it. Deliberately absent: judging single connections.

use crate::{
    bpf::Heartbeat as Heart,
    metrics::{Metrics, Sample},
    pulse::Pulse,
};
use std::{
    io,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Time between two beats; the programs wait several times as long before they act.
const PERIOD: Duration = Duration::from_millis(250);

/// How the thread ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The daemon ends: the kernel is told at once.
    Silence,
    /// A successor beats from now on.
    HandOver,
}

/// The running thread. Dropping it is an end without a word to the kernel, which notices by itself.
#[derive(Debug)]
pub struct Heartbeat {
    end: mpsc::Sender<End>,
    thread: JoinHandle<()>,
}

impl Heartbeat {
    /// Starts to beat. `threads` have names, for the log.
    pub fn start(heart: Heart, threads: Vec<(String, Pulse)>, metrics: &Metrics) -> io::Result<Self> {
        let last = Arc::new(Mutex::new(Instant::now()));
        let seen = last.clone();
        metrics.sample_gauges(
            "nodemesh_heartbeat_age_seconds",
            "Time since the daemon last told the kernel that it serves",
            move || {
                let at = *seen.lock().unwrap_or_else(PoisonError::into_inner);
                vec![Sample::new([], at.elapsed().as_secs_f64())]
            },
        );
        let (end, ended) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("heartbeat".into())
            .spawn(move || beat(&heart, &threads, &last, &ended))?;
        Ok(Self { end, thread })
    }

    /// The daemon ends. When this returns the kernel knows.
    pub fn end(self) {
        self.finish(End::Silence);
    }

    /// A successor beats from now on.
    pub fn hand_over(self) {
        self.finish(End::HandOver);
    }

    fn finish(self, end: End) {
        // An error means that the thread panicked, and said so; the kernel notices that nobody beats.
        let _ = self.end.send(end);
        let _ = self.thread.join();
    }
}

/// What is written to; the kernel, but for tests.
trait Beat {
    fn beat(&self) -> io::Result<()>;
    fn end(&self) -> io::Result<()>;
}

impl Beat for Heart {
    fn beat(&self) -> io::Result<()> {
        Heart::beat(self)
    }

    fn end(&self) -> io::Result<()> {
        Heart::end(self)
    }
}

fn beat(heart: &impl Beat, threads: &[(String, Pulse)], last: &Mutex<Instant>, ended: &mpsc::Receiver<End>) {
    let mut good = true;
    loop {
        let hung = threads.iter().find_map(|(name, pulse)| Some((name, pulse.hung()?)));
        match hung {
            Some((thread, silent)) if good => {
                tracing::error!(thread, ?silent, "a thread hangs; the kernel does without this daemon");
                good = false;
            }
            Some(_) => {}
            None => {
                match heart.beat() {
                    Ok(()) if !good => tracing::info!("all threads get on again"),
                    Ok(()) => {}
                    Err(error) if good => tracing::error!(%error, "the heartbeat cannot be written"),
                    Err(_) => {}
                }
                good = true;
                *last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
            }
        }
        match ended.recv_timeout(PERIOD) {
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Ok(End::Silence) => {
                if let Err(error) = heart.end() {
                    tracing::error!(%error, "the kernel could not be told that the daemon ends");
                }
                return;
            }
            Ok(End::HandOver) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Default)]
    struct Fake {
        beats: AtomicUsize,
        ends: AtomicUsize,
    }

    impl Beat for Fake {
        fn beat(&self) -> io::Result<()> {
            self.beats.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }

        fn end(&self) -> io::Result<()> {
            self.ends.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    /// One turn of the thread with these pulses, and then this end: (beats, ends).
    fn turn(threads: &[(String, Pulse)], end: Option<End>) -> (usize, usize) {
        let (fake, last) = (Fake::default(), Mutex::new(Instant::now()));
        let (sender, ended) = mpsc::channel();
        if let Some(end) = end {
            sender.send(end).unwrap();
        }
        drop(sender);
        beat(&fake, threads, &last, &ended);
        (fake.beats.into_inner(), fake.ends.into_inner())
    }

    #[test]
    fn a_thread_that_hangs_stops_the_heart_and_only_an_end_is_announced() {
        let good = vec![("worker-0".to_owned(), Pulse::default())];
        assert_eq!(turn(&good, Some(End::Silence)), (1, 1));
        assert_eq!(turn(&good, Some(End::HandOver)), (1, 0), "the successor beats already");
        assert_eq!(turn(&good, None), (1, 0), "the end of the process is not announced");
        let hung = vec![good[0].clone(), ("worker-1".to_owned(), Pulse::hanging())];
        assert_eq!(turn(&hung, Some(End::Silence)), (0, 1));
    }
}
