//! Whether paging works, as one word that any thread may read.

#[cfg(unix)]
use std::sync::atomic::{AtomicU8, Ordering};

/// Whether a pager can still do its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Health {
    /// All is well.
    Ok,
    /// The daemon has ended. Resident memory works; threads that touch other memory wait, and never read zeros.
    DaemonGone,
    /// The agent thread has failed. Faults are still served, as long as the budget lasts; nothing is evicted.
    AgentFailed,
    /// On Windows: the swap file could not be read or written at least once. A thread that needed the page got
    /// `EXCEPTION_IN_PAGE_ERROR`; what could not be written is still in RAM, outside the budget.
    DiskFailed,
    /// This is a forked child: the pager belongs to its parent.
    Forked,
}

/// A [`Health`] that only ever gets worse.
#[cfg(unix)]
#[derive(Debug, Default)]
pub(crate) struct HealthCell(AtomicU8);

#[cfg(unix)]
impl HealthCell {
    pub(crate) fn get(&self) -> Health {
        match self.0.load(Ordering::Acquire) {
            0 => Health::Ok,
            1 => Health::DaemonGone,
            _ => Health::AgentFailed,
        }
    }

    /// Notes a failure; the first one stays.
    pub(crate) fn fail(&self, health: Health) {
        let word = if health == Health::DaemonGone { 1 } else { 2 };
        let _ = self.0.compare_exchange(0, word, Ordering::AcqRel, Ordering::Acquire);
    }
}
