//! Figures of one client, written by its fault thread alone and read by anybody.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use fmalloc_proto::messages::ClientStats;

use super::latency::Latency;

/// Declares the shared mirror of [`ClientStats`] so that no field is forgotten.
macro_rules! mirror {
    ($($field:ident),* $(,)?) => {
        /// The mirror of [`ClientStats`], plus what hinders the client at present.
        #[derive(Debug, Default)]
        pub struct SharedStats {
            $($field: AtomicU64,)*
            regions: AtomicU32,
            condition: AtomicU32,
            ended: AtomicBool,
            /// Where the time goes.
            pub latency: Latency,
        }

        impl SharedStats {
            /// A copy; fields may differ in age by microseconds.
            #[must_use]
            pub fn snapshot(&self) -> ClientStats {
                ClientStats { $($field: self.$field.load(Ordering::Relaxed),)* }
            }

            /// Publishes `stats` (fault thread only).
            pub fn publish(&self, stats: &ClientStats) {
                $(self.$field.store(stats.$field, Ordering::Relaxed);)*
            }
        }
    };
}

mirror!(
    budget_bytes,
    resident_pages,
    peak_resident_pages,
    overhead_bytes,
    swapped_pages,
    slots,
    claimed_pages,
    unevictable_pages,
    poisoned_pages,
    faults,
    faults_zero,
    faults_read,
    faults_rescued,
    faults_stalled,
    file_pages_in,
    file_pages_out,
    pages_in,
    pages_readahead,
    pages_out,
    pages_clean,
    pages_zero,
    io_errors,
    packed_pages,
    packed_bytes,
    faults_packed,
    pages_spilled,
    pages_readahead_unused,
    peak_held_bytes,
);

/// What hinders a client, if anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Condition {
    /// Nothing.
    Fine = 0,
    /// Its agent has not answered for seconds.
    AgentSilent = 1,
    /// Its agent is gone while the process lives.
    AgentGone = 2,
    /// Pages that cannot be evicted fill the budget.
    Unevictable = 3,
    /// The swap file cannot be written.
    WriteErrors = 4,
    /// Page tables fill the budget.
    Tables = 5,
    /// A mapped file cannot be written.
    FileErrors = 6,
}

impl Condition {
    /// For people; empty if nothing hinders.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::Fine => "",
            Self::AgentSilent => "agent does not answer",
            Self::AgentGone => "agent is gone",
            Self::Unevictable => "pinned, locked or protected pages fill the budget",
            Self::WriteErrors => "swap cannot be written",
            Self::Tables => "page tables fill the budget, give it more",
            Self::FileErrors => "a mapped file cannot be written",
        }
    }
}

impl SharedStats {
    /// Regions registered.
    #[must_use]
    pub fn regions(&self) -> u32 {
        self.regions.load(Ordering::Relaxed)
    }

    /// Publishes the number of regions (fault thread only).
    pub fn set_regions(&self, regions: u32) {
        self.regions.store(regions, Ordering::Relaxed);
    }

    /// What hinders the client.
    #[must_use]
    pub fn condition(&self) -> Condition {
        let number = self.condition.load(Ordering::Relaxed);
        use Condition::{AgentGone, AgentSilent, FileErrors, Tables, Unevictable, WriteErrors};
        [AgentSilent, AgentGone, Unevictable, WriteErrors, Tables, FileErrors]
            .into_iter()
            .find(|condition| *condition as u32 == number)
            .unwrap_or(Condition::Fine)
    }

    /// Publishes what hinders the client (fault thread only).
    pub fn set_condition(&self, condition: Condition) {
        self.condition.store(condition as u32, Ordering::Relaxed);
    }

    /// The fault thread has given everything back and ended.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Says that everything was given back (fault thread only).
    pub fn set_ended(&self) {
        self.ended.store(true, Ordering::Release);
    }
}
