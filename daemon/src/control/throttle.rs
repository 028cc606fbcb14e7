//! A bound on log lines that a client can provoke, so that nobody fills the disk through the log.

use std::cell::Cell;
use std::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_secs(10);
const LINES: u32 = 100;

/// Lets [`LINES`] lines through per [`WINDOW`] and says how many it held back. Control thread only.
#[derive(Debug)]
pub(crate) struct Throttle {
    since: Cell<Instant>,
    seen: Cell<u32>,
}

impl Throttle {
    pub(crate) fn new() -> Self {
        Self { since: Cell::new(Instant::now()), seen: Cell::new(0) }
    }

    /// Whether a line may be logged now.
    pub(crate) fn allows(&self) -> bool {
        self.allows_at(Instant::now())
    }

    fn allows_at(&self, now: Instant) -> bool {
        if now.saturating_duration_since(self.since.get()) >= WINDOW {
            let held_back = self.seen.get().saturating_sub(LINES);
            if held_back > 0 {
                tracing::warn!("{held_back} log lines about clients were held back");
            }
            self.since.set(now);
            self.seen.set(0);
        }
        self.seen.set(self.seen.get().saturating_add(1));
        self.seen.get() <= LINES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_beyond_the_bound_wait_for_the_next_window() {
        let throttle = Throttle::new();
        let start = throttle.since.get();
        assert_eq!((0..LINES * 3).filter(|_| throttle.allows_at(start)).count(), 100);
        assert!(throttle.allows_at(start + WINDOW));
    }
}
