//! What the demo prints: steps with their time, then a line for each check.

use anyhow::Result;
use std::{
    io::{IsTerminal, Write},
    time::{Duration, Instant},
};

/// Runs one step of the preparation, showing it while it runs.
pub(crate) fn step<T>(what: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
    print!("  {what} ... ");
    let _ = std::io::stdout().flush();
    let started = Instant::now();
    let result = run();
    match &result {
        Ok(_) => println!("{:.1} s", started.elapsed().as_secs_f64()),
        Err(_) => println!("failed"),
    }
    result
}

/// The lines printed so far.
#[derive(Debug, Default)]
pub(crate) struct Table {
    held: usize,
    failed: usize,
}

impl Table {
    /// Runs a check and prints its line: what is claimed, and what was seen.
    pub(crate) fn line(&mut self, claim: &str, check: impl FnOnce() -> Result<String>) {
        if self.held + self.failed == 0 {
            println!("  {:<4} {:<34} seen\n  {:-<4} {:-<34} {:-<60}", "", "claim", "", "", "");
        }
        let terminal = std::io::stdout().is_terminal();
        if terminal {
            print!("  ...  {claim}");
            let _ = std::io::stdout().flush();
        }
        let (mark, seen) = match check() {
            Ok(seen) => {
                self.held += 1;
                ("ok", seen)
            }
            Err(error) => {
                self.failed += 1;
                ("FAIL", format!("{error:#}"))
            }
        };
        if terminal {
            print!("\r");
        }
        for (number, seen) in seen.lines().enumerate() {
            let (mark, claim) = if number == 0 { (mark, claim) } else { ("", "") };
            println!("  {mark:<4} {claim:<34} {seen}");
        }
        let _ = std::io::stdout().flush();
    }

    /// Whether every line held, and there was one.
    pub(crate) fn all_held(&self) -> bool {
        self.failed == 0 && self.held > 0
    }

    /// The closing line.
    pub(crate) fn summary(&self, took: Duration) {
        println!("\n  {} held, {} failed; {:.1} s in all\n", self.held, self.failed, took.as_secs_f64());
    }
}
