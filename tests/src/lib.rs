//! Support for the end-to-end tests in `tests/`: a real daemon, real client processes, and what is measured of both from
//! outside. Needs the binaries of the whole workspace, built beforehand: see `make test`.
//!
//! - [`mod@bench`]: the benchmark, `fmalloc-bench`: fmalloc beside kernel swap and whatever else a user could pick;
//! - [`daemon`]: starts `fmallocd` in a directory of its own, asks it by `fmallocctl`;
//! - [`failing`]: swap I/O that fails on demand, in the daemon `fmallocd-failing` of this package;
//! - [`worker`]: client processes, told line by line what to do: the binary `fmalloc-worker` of this package;
//! - [`pattern`]: the content of pages, such that any wrong byte shows; [`rng`]: random numbers that can be repeated;
//! - [`twins`]: two pages that a public hash cannot tell apart;
//! - [`realworld`]: programs of the distribution, and work for them; [`kernel_swap`]: what they would otherwise have;
//! - [`mod@replay`]: page accesses through the pager core, beside LRU and the optimum: `fmalloc-replay`;
//! - [`run`]: programs under `fmallocctl run`: the binary `fmalloc-program` of this package, and others;
//! - [`place`]: where binaries and temporary files are, and whether tests can run here at all;
//! - [`trace`]: what real programs allocate and free;
//! - [`process`]: what the kernel says about a process.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failure here is a failed test")]

pub mod bench;
pub mod daemon;
pub mod failing;
pub mod kernel_swap;
pub mod pattern;
pub mod place;
pub mod process;
pub mod realworld;
pub mod replay;
pub mod rng;
pub mod run;
pub mod trace;
pub mod twins;
pub mod worker;

use std::time::{Duration, Instant};

pub use daemon::Daemon;
pub use worker::Worker;

/// Bytes of a MiB.
pub const MIB: u64 = 1 << 20;

/// The longest that anything may take that is not a measurement.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Looks again and again until `done`; panics with `what` when that takes too long.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "waited for {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
