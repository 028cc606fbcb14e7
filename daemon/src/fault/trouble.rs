//! Tells the log of failed swap I/O: what failed, and how often since the last line. One line a second at most, since a
//! client can cause any number of them from a disk that is broken.

use std::fmt::Display;
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_secs(1);

/// See the module; one for each fault thread.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    told: Option<Instant>,
    untold: u64,
}

impl Trouble {
    /// A transfer has failed: a read, a write, or the check of what was read.
    pub(super) fn report(&mut self, client: u64, pid: u32, what: &str, failure: impl Display) {
        if self.told.is_some_and(|at| at.elapsed() < PAUSE) {
            self.untold += 1;
            return;
        }
        let more = std::mem::take(&mut self.untold);
        self.told = Some(Instant::now());
        tracing::error!(client, pid, more, "a {what} of the swap file failed: {failure}");
    }
}
