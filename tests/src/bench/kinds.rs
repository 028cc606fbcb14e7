//! The words of the benchmark, as the command line, the JSON and the tables have them.

use std::fmt;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// What the data is like, and how much of it RAM holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Scenario {
    /// Half-compressible data, four times the RAM: neither fits, compressed or not
    Disk,
    /// Half-compressible data in three quarters of its size: everything fits compressed
    Compressed,
    /// Random data, four times the RAM
    Incompressible,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Workload {
    /// Write all of it in order, for the first time
    Fill,
    /// Read all of it in order
    SeqRead,
    /// Read pages at random, one thread
    #[value(name = "rand-read-1")]
    #[serde(rename = "rand-read-1")]
    RandRead1,
    /// The time of single faults of random reads
    Latency,
    /// Read pages at random, eight threads
    #[value(name = "rand-read-8")]
    #[serde(rename = "rand-read-8")]
    RandRead8,
    /// Change a word of pages at random, one thread
    #[value(name = "rand-write-1")]
    #[serde(rename = "rand-write-1")]
    RandWrite1,
    /// Zipf 0.99, four reads to one write, four threads
    #[value(name = "zipf-rw-4")]
    #[serde(rename = "zipf-rw-4")]
    ZipfRw4,
    /// Read a set that fits the RAM, again and again
    Reread,
    /// Sort u64s, one thread
    Sort,
    /// Sort u64s in place, four threads
    ParallelSort,
    /// STREAM: copy, scale, add, triad over three arrays, four threads
    Stream,
    /// Breadth-first search of an R-MAT graph, four threads
    Bfs,
    /// A set in steady use while uniform reads of the rest push it out, four threads
    Churn,
}

/// Workloads that share one child process and its data, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Set {
    /// Fill, and whatever reads and writes its pages.
    Pages,
    /// A set that fits.
    Small,
    /// One thread sorts.
    Sort,
    /// Four threads sort.
    ParallelSort,
    /// STREAM.
    Stream,
    /// BFS.
    Bfs,
    /// Churn.
    Churn,
}

/// What a user could pick.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Peer {
    /// fmalloc itself: always there
    #[value(skip)]
    Fmalloc,
    /// Kernel swap on the same file
    KernelSwap,
    /// Kernel swap with zswap in front of it
    Zswap,
    /// Kernel swap on zram
    Zram,
    /// A shared mapping of a file
    FileMmap,
    /// The same with MADV_RANDOM
    FileMmapRandom,
    /// Memory without a limit: a floor, not a peer
    #[value(skip)]
    Native,
}

impl Scenario {
    /// Whether all bytes of the data are random.
    pub(crate) fn is_random(self) -> bool {
        self == Self::Incompressible
    }
}

impl Workload {
    /// The set that it belongs to.
    pub(crate) fn set(self) -> Set {
        match self {
            Self::Reread => Set::Small,
            Self::Sort => Set::Sort,
            Self::ParallelSort => Set::ParallelSort,
            Self::Stream => Set::Stream,
            Self::Bfs => Set::Bfs,
            Self::Churn => Set::Churn,
            _ => Set::Pages,
        }
    }

    /// The unit of its figures. More is always better.
    pub(crate) fn unit(self) -> Unit {
        match self {
            Self::Fill | Self::SeqRead | Self::Reread | Self::Sort | Self::ParallelSort | Self::Stream => {
                Unit::Megabytes
            }
            Self::Bfs => Unit::Edges,
            _ => Unit::Operations,
        }
    }
}

/// Units of rates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Millions of bytes per second.
    Megabytes,
    /// Thousands of operations per second.
    Operations,
    /// Millions of edges per second.
    Edges,
}

impl Unit {
    /// What to divide an amount per second by.
    pub(crate) fn scale(self) -> f64 {
        match self {
            Self::Megabytes | Self::Edges => 1e6,
            Self::Operations => 1e3,
        }
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Megabytes => "MB/s",
            Self::Operations => "k op/s",
            Self::Edges => "M edges/s",
        })
    }
}

/// The name as the JSON has it.
macro_rules! display_as_serialized {
    ($($kind:ty),*) => {$(
        impl fmt::Display for $kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let name = serde_json::to_value(self).map_err(|_| fmt::Error)?;
                f.pad(name.as_str().unwrap_or_default())
            }
        }
    )*};
}
display_as_serialized!(Scenario, Workload, Peer);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_on_the_command_line_are_those_of_the_json() {
        for workload in Workload::value_variants() {
            assert_eq!(workload.to_possible_value().unwrap().get_name(), workload.to_string());
        }
        for peer in Peer::value_variants() {
            assert_eq!(peer.to_possible_value().unwrap().get_name(), peer.to_string());
        }
        for scenario in Scenario::value_variants() {
            assert_eq!(scenario.to_possible_value().unwrap().get_name(), scenario.to_string());
        }
    }
}
