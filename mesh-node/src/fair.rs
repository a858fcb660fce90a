//! CPU shares: on a worker that has more to do than it can, each pod gets its turn, not each connection.
//!
//! The runtime serves ready tasks in order of their waking, so a pod with a thousand busy streams would take a
//! thousand turns for each of another pod. A [`Share`] around a task accounts for the time of its polls. A pod that has
//! used up its part of a round is not polled any further: its tasks wait in the pod's own queue until everything else
//! that was ready has run. Then the next round begins, so nothing is held back on a worker that would be idle.
//!
//! A round is short ([`QUANTUM`] per pod), and a pod that overdrew, since a poll cannot be interrupted, begins the next
//! one with a debt. Everything is local to a worker's thread; a thread without [`dispatch`] runs tasks as they come.
//! Deliberately absent: weights, and shares across workers (connections spread over them by themselves).

use std::{
    cell::RefCell,
    collections::VecDeque,
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

/// Time that the tasks of one pod may use in a round: the longest that another pod waits for each busy one.
pub const QUANTUM: Duration = Duration::from_millis(1);

/// Most that a pod may owe: a single poll that took long (a stolen core) must not shut it out for long.
const MAX_DEBT: i64 = -20 * quantum();

/// Accounts above which those without tasks in waiting are dropped: pods come and go.
const MAX_ACCOUNTS: usize = 1024;

const fn quantum() -> i64 {
    QUANTUM.as_nanos() as i64
}

/// One pod on one worker.
struct Account {
    key: u64,
    /// The round for which `left` holds.
    round: u64,
    /// Nanoseconds that it may still use; negative when it owes.
    left: i64,
    /// Tasks whose turn has not come, by ticket: the first one has `head`.
    waiting: VecDeque<Waker>,
    head: u64,
}

impl Account {
    /// Brings what it has in line with the present round.
    fn refresh(&mut self, round: u64) {
        let passed = i64::try_from(round - self.round).unwrap_or(i64::MAX);
        self.left = self.left.saturating_add(passed.saturating_mul(quantum())).min(quantum());
        self.round = round;
    }

    fn pop(&mut self) -> Option<Waker> {
        let waker = self.waiting.pop_front()?;
        self.head += 1;
        Some(waker)
    }
}

/// The accounts of one worker.
#[derive(Default)]
struct Worker {
    dispatching: bool,
    dispatcher: Option<Waker>,
    round: u64,
    accounts: Vec<Account>,
    /// Tasks in waiting, all accounts together.
    waiting: usize,
}

thread_local! {
    static WORKER: RefCell<Worker> = RefCell::default();
}

/// A task's claim on the worker.
struct Claim {
    key: u64,
    /// Where the account was last.
    at: usize,
    /// Its place in the account's queue, until it has run.
    ticket: Option<u64>,
}

enum Turn {
    /// Run; nobody accounts.
    Free,
    Run,
    Wait,
}

impl Worker {
    fn account(&mut self, claim: &mut Claim) -> usize {
        if self.accounts.get(claim.at).is_some_and(|account| account.key == claim.key) {
            return claim.at;
        }
        // Accounts have moved: the ticket is still good, since a queue that is not empty is never dropped.
        claim.at = self.accounts.iter().position(|account| account.key == claim.key).unwrap_or_else(|| {
            if self.accounts.len() >= MAX_ACCOUNTS {
                self.accounts.retain(|account| !account.waiting.is_empty());
            }
            self.accounts.push(Account {
                key: claim.key,
                round: self.round,
                left: quantum(),
                waiting: VecDeque::new(),
                head: 0,
            });
            claim.ticket = None;
            self.accounts.len() - 1
        });
        claim.at
    }

    fn enter(&mut self, claim: &mut Claim, cx: &Context<'_>) -> Turn {
        if !self.dispatching {
            return Turn::Free;
        }
        let at = self.account(claim);
        let account = &mut self.accounts[at];
        account.refresh(self.round);
        match claim.ticket {
            // Woken by something else while it waits.
            Some(ticket) if ticket >= account.head => {
                let place = usize::try_from(ticket - account.head).unwrap_or(usize::MAX);
                if let Some(waker) = account.waiting.get_mut(place) {
                    waker.clone_from(cx.waker());
                }
                return Turn::Wait;
            }
            Some(_) if account.left > 0 => {
                claim.ticket = None;
                return Turn::Run;
            }
            None if account.left > 0 && account.waiting.is_empty() => return Turn::Run,
            _ => {}
        }
        claim.ticket = Some(account.head + account.waiting.len() as u64);
        account.waiting.push_back(cx.waker().clone());
        self.waiting += 1;
        if let Some(dispatcher) = self.dispatcher.take() {
            dispatcher.wake();
        }
        Turn::Wait
    }

    /// Books a poll, and says who of the same pod is next.
    fn leave(&mut self, claim: &mut Claim, took: Duration) -> Option<Waker> {
        let at = self.account(claim);
        let account = &mut self.accounts[at];
        account.refresh(self.round);
        let took = i64::try_from(took.as_nanos()).unwrap_or(i64::MAX);
        account.left = account.left.saturating_sub(took).max(MAX_DEBT);
        let next = if account.left > 0 { account.pop() } else { None };
        self.waiting -= usize::from(next.is_some());
        next
    }

    /// Begins a round: the first task of every pod that does not owe.
    fn next_round(&mut self) -> Vec<Waker> {
        self.round += 1;
        let round = self.round;
        let mut next = vec![];
        for account in self.accounts.iter_mut().filter(|account| !account.waiting.is_empty()) {
            account.refresh(round);
            if account.left > 0 {
                next.extend(account.pop());
            }
        }
        self.waiting -= next.len();
        next
    }
}

/// A task that takes part in the shares of its worker, under the key of its pod.
pub struct Share<F> {
    claim: Claim,
    future: Pin<Box<F>>,
}

impl<F> Share<F> {
    /// Puts `future` under `key`, the netns cookie of a pod.
    pub fn new(key: u64, future: F) -> Self {
        // In a box of its own: moving a large future around costs more than finding it.
        Self { claim: Claim { key, at: usize::MAX, ticket: None }, future: Box::pin(future) }
    }
}

impl<F: Future> Future for Share<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        match WORKER.with_borrow_mut(|worker| worker.enter(&mut this.claim, cx)) {
            Turn::Free => return this.future.as_mut().poll(cx),
            Turn::Wait => return Poll::Pending,
            Turn::Run => {}
        }
        let started = Instant::now();
        let result = this.future.as_mut().poll(cx);
        let took = started.elapsed();
        if let Some(next) = WORKER.with_borrow_mut(|worker| worker.leave(&mut this.claim, took)) {
            next.wake();
        }
        result
    }
}

/// Tasks of this thread that wait for their pod's turn, for tests.
#[cfg(test)]
fn waiting() -> usize {
    WORKER.with_borrow(|worker| worker.waiting)
}

/// Begins rounds on this thread for as long as it runs; one per worker.
pub async fn dispatch() {
    WORKER.with_borrow_mut(|worker| worker.dispatching = true);
    loop {
        poll_fn(|cx| {
            WORKER.with_borrow_mut(|worker| {
                if worker.waiting > 0 {
                    return Poll::Ready(());
                }
                worker.dispatcher = Some(cx.waker().clone());
                Poll::Pending
            })
        })
        .await;
        // Comes back when all that was ready has run and the reactor has been asked who else is.
        tokio::task::yield_now().await;
        for waker in WORKER.with_borrow_mut(Worker::next_round) {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{cell::Cell, rc::Rc};
    use tokio::task::{LocalSet, yield_now};

    /// A task that always has work: `slice` per poll.
    async fn busy(slice: Duration, used: Rc<Cell<Duration>>) {
        loop {
            let started = Instant::now();
            while started.elapsed() < slice {
                std::hint::spin_loop();
            }
            used.set(used.get() + started.elapsed());
            wake_again().await;
        }
    }

    /// Ready again at once, by way of the run queue and not of the reactor.
    async fn wake_again() {
        let mut first = true;
        poll_fn(|cx| {
            if std::mem::take(&mut first) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Poll::Ready(())
        })
        .await;
    }

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        LocalSet::new().block_on(&runtime, test);
    }

    async fn contend(shares: bool) -> (Duration, Duration) {
        let (hog, victim) = (Rc::<Cell<Duration>>::default(), Rc::<Cell<Duration>>::default());
        if shares {
            tokio::task::spawn_local(dispatch());
            yield_now().await;
        }
        let mut tasks: Vec<_> = (0..200)
            .map(|_| tokio::task::spawn_local(Share::new(1, busy(Duration::from_micros(100), hog.clone()))))
            .collect();
        tasks.push(tokio::task::spawn_local(Share::new(2, busy(Duration::from_micros(100), victim.clone()))));
        while hog.get() + victim.get() < Duration::from_millis(400) {
            yield_now().await;
        }
        tasks.iter().for_each(|task| task.abort());
        (hog.get(), victim.get())
    }

    #[test]
    fn two_hundred_busy_tasks_of_one_pod_get_no_more_than_the_one_of_another() {
        run(async {
            let (hog, victim) = contend(true).await;
            let part = victim.as_secs_f64() / (hog + victim).as_secs_f64();
            assert!((0.35..=0.65).contains(&part), "the single task got {part:.2} of the worker");
            // The thread's accounts outlive this: the next test of this thread begins anew.
            WORKER.with_borrow_mut(|worker| *worker = Worker::default());
            let (hog, victim) = contend(false).await;
            assert!(victim * 20 < hog, "without shares it is one of 201");
        });
    }

    #[test]
    fn a_pod_alone_has_the_whole_worker_and_all_of_its_tasks_run() {
        run(async {
            tokio::task::spawn_local(dispatch());
            yield_now().await;
            let used: Vec<_> = (0..50).map(|_| Rc::<Cell<Duration>>::default()).collect();
            let tasks: Vec<_> = used
                .iter()
                .map(|used| {
                    tokio::task::spawn_local(Share::new(7, busy(Duration::from_micros(50), used.clone())))
                })
                .collect();
            let started = Instant::now();
            let total = || used.iter().map(|used| used.get()).sum::<Duration>();
            while total() < Duration::from_millis(200) {
                yield_now().await;
            }
            let wall = started.elapsed();
            // Preempted by other processes perhaps, but never idle by itself: the spin measures wall time as well.
            assert!(total() * 2 > wall, "{:?} of {wall:?}", total());
            let least = used.iter().map(|used| used.get()).min().unwrap();
            assert!(least > Duration::ZERO, "a task never ran");
            tasks.iter().for_each(|task| task.abort());
        });
    }

    #[test]
    fn a_waiting_task_that_is_dropped_or_woken_again_breaks_nothing() {
        run(async {
            tokio::task::spawn_local(dispatch());
            yield_now().await;
            let used = Rc::<Cell<Duration>>::default();
            let spawn = || {
                let used = used.clone();
                tokio::task::spawn_local(Share::new(3, busy(Duration::from_millis(2), used)))
            };
            let tasks: Vec<_> = (0..8).map(|_| spawn()).collect();
            while waiting() < 4 {
                yield_now().await;
            }
            tasks.iter().take(4).for_each(|task| task.abort());
            let done = Share::new(3, async { 5 });
            assert_eq!(done.await, 5);
            let before = used.get();
            while used.get() < before + Duration::from_millis(20) {
                yield_now().await;
            }
            tasks.iter().for_each(|task| task.abort());
            while waiting() > 0 {
                yield_now().await;
            }
        });
    }

    /// What a poll costs when nobody contends: printed, not judged.
    #[test]
    #[ignore = "a measurement: cargo test --release -p mesh-node --lib fair:: -- --ignored --nocapture"]
    fn the_cost_of_a_poll() {
        async fn polls(n: u32) {
            for _ in 0..n {
                wake_again().await;
            }
        }
        let n = 2_000_000;
        run(async {
            let started = Instant::now();
            tokio::task::spawn_local(async move { Box::pin(polls(n)).await }).await.unwrap();
            let plain = started.elapsed();
            tokio::task::spawn_local(dispatch());
            yield_now().await;
            let started = Instant::now();
            tokio::task::spawn_local(Share::new(1, polls(n))).await.unwrap();
            let shared = started.elapsed();
            println!("per poll: {:?} plain, {:?} shared", plain / n, shared / n);
        });
    }
}
