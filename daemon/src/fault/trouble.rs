//! Tells the log of failed swap I/O and of what was lost by it: what, and how often since the last line. One line of each
//! kind a second at most, since a disk that is broken has no end of them.

use std::fmt::Display;
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_secs(1);

/// See the module; one for each fault thread.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    failures: Throttle,
    losses: Throttle,
}

impl Trouble {
    /// A transfer has failed: a read, a write, or the check of what was read.
    pub(super) fn report(&mut self, client: u64, pid: u32, what: &str, failure: impl Display) {
        if let Some(more) = self.failures.admits(Instant::now()) {
            tracing::error!(client, pid, more, "a {what} of the swap file failed: {failure}");
        }
    }

    /// A page is lost.
    pub(super) fn lost(&mut self, client: u64, pid: u32, addr: u64) {
        if let Some(more) = self.losses.admits(Instant::now()) {
            tracing::error!(client, pid, more, "page at {addr:#x} is lost: the swap file failed");
        }
    }
}

/// Lets one line through per [`PAUSE`].
#[derive(Debug, Default)]
struct Throttle {
    told: Option<Instant>,
    untold: u64,
}

impl Throttle {
    /// Whether a line is due now; then how many were not told since the last one.
    fn admits(&mut self, now: Instant) -> Option<u64> {
        if self.told.is_some_and(|at| now.saturating_duration_since(at) < PAUSE) {
            self.untold += 1;
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_is_let_through_at_a_time_and_the_next_says_how_many_were_not() {
        let (mut throttle, start) = (Throttle::default(), Instant::now());
        assert_eq!(throttle.admits(start), Some(0));
        assert_eq!((0..7).filter_map(|_| throttle.admits(start)).count(), 0);
        assert_eq!(throttle.admits(start + PAUSE), Some(7));
        assert_eq!(throttle.admits(start + 2 * PAUSE), Some(0));
    }
}
