//! The benchmark, `fmalloc-bench`: fmalloc beside kernel swap and whatever else a user could pick, in one run.
//!
//! The program that is started is the conductor: it makes the swap file, sets each peer up, runs each group of
//! workloads in a child process (this program again, see `plan`) within a memory cgroup, and puts everything back.
//!
//! - `options`, `kinds`: the command line, and the words of the benchmark: scenarios, workloads, peers;
//! - `campaign`: what runs in which order; `job`: one child of one peer; `calibrate`: the first pass that finds
//!   out how much RAM a compressed pool takes;
//! - `peers`: setting up fmalloc's daemon, kernel swap, zswap, zram; `group`: memory cgroups; `undo`: the journal of
//!   what has to be put back, also after a crash;
//! - `plan`, `child`, `work`, `memory`, `content`, `graph`: what a child does, and the data that it does it to;
//! - `floors`: the disk itself; `busy`: whether others used the machine meanwhile; `machine`: what it is;
//! - `figures`, `report`, `table`: medians, the JSON, the tables.
//!
//! Other sets of figures, such as a heap's, are subcommands of their own: see `options::Command`.

mod busy;
mod calibrate;
mod campaign;
mod child;
mod content;
mod figures;
mod floors;
mod graph;
mod group;
mod job;
mod kinds;
mod machine;
mod memory;
mod options;
mod peers;
mod plan;
mod report;
mod table;
mod undo;
pub(crate) mod work;

use std::process::ExitCode;

use clap::Parser;

use options::{Cli, Command};

/// The whole program. 0: all rows have a figure of fmalloc; 1: not all, or the benchmark could not run; 130 and 143:
/// interrupted, with everything put back.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match &cli.command {
        Some(Command::Child { plan }) => child::run(plan).map(|()| true),
        None => campaign::run(&cli.options),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("fmalloc-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
