//! Waiting for a condition with a deadline; the only way in which the harness and the tests wait.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// Polls `probe` until it returns `Ok(Some(value))`; an error or `None` is tried again until `deadline` has passed,
/// and the last error is then part of the message, after `what`.
pub fn until<T>(what: &str, deadline: Duration, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let started = Instant::now();
    let mut pause = Duration::from_millis(5);
    loop {
        let last = match probe() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if started.elapsed() >= deadline {
            crate::proc::print_logs_on_drop();
            match last {
                Some(error) => return Err(error.context(format!("waited {deadline:?} for {what}"))),
                None => bail!("waited {deadline:?} for {what}"),
            }
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(200));
    }
}

/// [`until`] for a plain condition.
pub fn until_true(what: &str, deadline: Duration, mut probe: impl FnMut() -> Result<bool>) -> Result<()> {
    until(what, deadline, || Ok(probe()?.then_some(())))
}
