//! What the conductor tells a child to do, and what the child says: one line of JSON each.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::graph::Graph;
use super::kinds::Workload;

/// All that a child needs to know.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// What the data is in.
    pub(crate) memory: Kind,
    /// Bytes of data.
    pub(crate) size: u64,
    /// Bytes of RAM of the scenario.
    pub(crate) ram: u64,
    /// Whether the data is all random.
    pub(crate) random: bool,
    /// Of one set, in order.
    pub(crate) workloads: Vec<Workload>,
    /// Operations of random workloads.
    pub(crate) ops: usize,
    /// Another for each run, the same for all peers.
    pub(crate) seed: u64,
    /// For BFS.
    pub(crate) graph: Option<Graph>,
    /// The daemon whose CPU time counts too.
    pub(crate) daemon: Option<u32>,
    /// Change one bit after the data was written, to see that it is noticed.
    pub(crate) flip: bool,
}

/// What the data is in.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// A region of fmalloc, paged by the daemon at this socket.
    Fmalloc {
        /// Where it listens.
        socket: PathBuf,
        /// RAM to ask for, in bytes: by itself it would leave its control group more room.
        budget: u64,
    },
    /// Private anonymous memory.
    Anonymous,
    /// A shared mapping of a new file.
    File {
        /// Where to make it; it has no name for long.
        directory: PathBuf,
        /// MADV_RANDOM.
        random: bool,
    },
}

/// What a child says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Said {
    /// Something that is not measured begins.
    Preparing(String),
    /// The clock runs. With it, the bytes, operations or edges that are to be handled.
    Begin(Workload, f64),
    /// So much of that has been handled: now and then, from workloads that take the same time for each operation.
    Progress(f64),
    /// What it took.
    Done(Measured),
    /// A byte was not what was written.
    Wrong(String),
    /// It could not be done.
    Failed(String),
    /// All was done and all data was right.
    End,
}

/// One workload, once.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// Which.
    pub(crate) workload: Workload,
    /// How long it took.
    pub(crate) seconds: f64,
    /// Bytes, operations or edges.
    pub(crate) amount: f64,
    /// Page faults of the child.
    pub(crate) faults: u64,
    /// CPU time of the child.
    pub(crate) client: Cpu,
    /// CPU time of the daemon.
    pub(crate) daemon: Cpu,
    /// Percentiles of single faults.
    pub(crate) latency: Option<Latency>,
}

/// CPU time in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Cpu {
    /// In the program.
    pub(crate) user: f64,
    /// In the kernel on its behalf.
    pub(crate) system: f64,
}

/// Times of single faults in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Latency {
    /// Faults that were timed.
    pub(crate) faults: usize,
    /// Half took no longer.
    pub(crate) p50: f64,
    /// 99 of 100 took no longer.
    pub(crate) p99: f64,
    /// 999 of 1000 took no longer.
    pub(crate) p999: f64,
}

impl Measured {
    /// In the workload's unit.
    pub(crate) fn rate(&self) -> f64 {
        self.amount / self.seconds / self.workload.unit().scale()
    }
}

impl std::ops::Sub for Cpu {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self { user: self.user - other.user, system: self.system - other.system }
    }
}

impl Cpu {
    /// All of it.
    pub(crate) fn total(self) -> f64 {
        self.user + self.system
    }
}
