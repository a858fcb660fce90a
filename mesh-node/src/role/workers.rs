//! Traffic workers: one thread and one single-threaded runtime each.
//!
//! A connection lives on one worker from accept to close, so nothing on its path is shared between threads. Each
//! pod's listeners belong to one worker; a connection is handed to another one only when that one is clearly less
//! busy. Within a worker each pod has its share (`fair`). Admin, xDS and certificates run on a runtime of their own, so
//! that a storm of traffic cannot starve them.

use crate::{fair, pulse::Pulse};
use std::{
    future::Future,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};
use tokio::{
    runtime::{Builder, Handle},
    sync::watch,
    time::MissedTickBehavior,
};

/// How often a worker shows that it gets on.
const TICK: Duration = Duration::from_millis(250);

/// How many more connections a pod's own worker may have before the least busy one takes over.
const IMBALANCE: usize = 8;

#[derive(Debug)]
struct Worker {
    handle: Handle,
    active: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
    pulse: Pulse,
}

/// The set of workers; dropping it stops them.
#[derive(Debug)]
pub struct Workers {
    workers: Vec<Worker>,
    stop: watch::Sender<bool>,
}

/// Counts a connection on its worker for as long as it lives.
#[derive(Debug)]
struct Active(Arc<AtomicUsize>);

/// Where a connection will run.
#[derive(Debug)]
pub struct Place {
    /// The worker's index.
    pub index: usize,
    /// Whether that is another worker than the one that accepted it.
    pub away: bool,
    active: Active,
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Workers {
    /// Starts `count` workers.
    pub fn start(count: usize) -> io::Result<Self> {
        let stop = watch::channel(false).0;
        let workers =
            (0..count.max(1)).map(|n| Worker::start(n, stop.subscribe())).collect::<io::Result<_>>()?;
        Ok(Self { workers, stop })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.workers.len()
    }

    /// Whether there are none; never true after [`Workers::start`].
    pub fn is_empty(&self) -> bool {
        self.workers.is_empty()
    }

    /// Live connections of each worker.
    pub fn active(&self) -> Vec<usize> {
        self.workers.iter().map(|w| w.active.load(Ordering::Relaxed)).collect()
    }

    /// The sign of life of each worker.
    pub fn pulses(&self) -> Vec<Pulse> {
        self.workers.iter().map(|w| w.pulse.clone()).collect()
    }

    /// The runtime of worker `index`, for its listeners.
    pub fn handle(&self, index: usize) -> &Handle {
        &self.workers[index % self.workers.len()].handle
    }

    /// Chooses a worker for a connection accepted on worker `home`.
    pub fn place(&self, home: usize) -> Place {
        let home = home % self.workers.len();
        let load = |n: usize| self.workers[n].active.load(Ordering::Relaxed);
        let least = (0..self.workers.len()).min_by_key(|n| load(*n)).unwrap_or(home);
        let index = if load(home) > load(least) + IMBALANCE { least } else { home };
        let active = self.workers[index].active.clone();
        active.fetch_add(1, Ordering::Relaxed);
        Place { index, away: index != home, active: Active(active) }
    }

    /// Runs a connection where it was placed.
    pub fn run(&self, place: Place, connection: impl Future<Output = ()> + Send + 'static) {
        let Place { index, active, .. } = place;
        self.workers[index].handle.spawn(async move {
            let _active = active;
            connection.await;
        });
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        for worker in &mut self.workers {
            // The last owner may be a task on one of the workers, which cannot wait for itself.
            let own = std::thread::current().id();
            if let Some(thread) = worker.thread.take().filter(|thread| thread.thread().id() != own) {
                // A worker that panicked has said so already.
                let _ = thread.join();
            }
        }
    }
}

impl Worker {
    fn start(index: usize, mut stop: watch::Receiver<bool>) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
            runtime.spawn(fair::dispatch());
            // An error means that the sender is gone, which is a stop as well.
            let _ = runtime.block_on(stop.wait_for(|stop| *stop));
        })?;
        let pulse = Pulse::default();
        handle.spawn({
            let pulse = pulse.clone();
            async move {
                let mut tick = tokio::time::interval(TICK);
                tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
                loop {
                    tick.tick().await;
                    pulse.tick();
                }
            }
        });
        Ok(Self { handle, active: Arc::default(), thread: Some(thread), pulse })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_busy_home_worker_gives_connections_away() {
        let workers = Workers::start(2).unwrap();
        let (sent, received) = mpsc::channel();
        let release = watch::channel(false).0;
        for _ in 0..40 {
            let (sent, mut release) = (sent.clone(), release.subscribe());
            let place = workers.place(0);
            let index = place.index;
            workers.run(place, async move {
                sent.send((index, std::thread::current().name().map(str::to_owned))).unwrap();
                let _ = release.wait_for(|go| *go).await;
            });
        }
        let ran: Vec<_> = received.iter().take(40).collect();
        assert!(ran.iter().all(|(n, name)| name.as_deref() == Some(&format!("worker-{n}"))));
        let home = ran.iter().filter(|(n, _)| *n == 0).count();
        assert!((20..=20 + IMBALANCE).contains(&home), "{home}");
        assert_eq!(workers.active().iter().sum::<usize>(), 40);
        release.send_replace(true);
        while workers.active().iter().sum::<usize>() > 0 {
            std::thread::yield_now();
        }
    }

    #[test]
    fn the_last_owner_may_be_a_task_on_a_worker() {
        let workers = Arc::new(Workers::start(2).unwrap());
        let (sent, received) = mpsc::channel();
        let (owner, place) = (workers.clone(), workers.place(1));
        let release = watch::channel(false).0;
        let mut released = release.subscribe();
        workers.run(place, async move {
            let _ = released.wait_for(|go| *go).await;
            drop(owner);
            sent.send(()).unwrap();
        });
        drop(workers);
        release.send_replace(true);
        received.recv_timeout(std::time::Duration::from_secs(10)).expect("the drop neither hangs nor panics");
    }
}
