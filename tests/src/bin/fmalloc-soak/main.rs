//! The soak: for some minutes a crowd of clients, well-behaved and not, is started, stopped and killed at random against
//! one daemon, whose swap I/O fails now and then. What well-behaved clients wrote is verified all the while. Ends with a
//! table, and with an error if anything was lost, leaked or taken beyond a budget.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failure here is a failed test")]

mod crowd;
mod disk;
mod tally;
mod watch;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use fmalloc_tests::rng::{Rng, seed};
use fmalloc_tests::{Daemon, place};

use tally::Tally;

/// Clients that come and go at once.
const CROWD: u64 = 6;
/// Clients that stay from the beginning to the end.
const STAYERS: u64 = 2;

/// Runs the soak.
#[derive(Debug, Parser)]
struct Options {
    /// How long.
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Has the same clients do the same things in the same order.
    #[arg(long)]
    seed: Option<u64>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if !place::can_page() {
        return ExitCode::SUCCESS;
    }
    let seed = options.seed.unwrap_or_else(seed);
    println!("soak: {} minutes, seed {seed}", options.minutes);
    let (daemon, plan) = Daemon::start_failing("256M", "2G", &[]).expect("a daemon");
    let (tally, over, watched) = (Tally::default(), AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let (daemon, plan, tally, over) = (&daemon, &plan, &tally, &over);
        scope.spawn(|| watch::watch(daemon, tally, &watched));
        let mut actors: Vec<_> = (0..CROWD)
            .map(|n| scope.spawn(move || crowd::come_and_go(daemon, n, Rng::new(seed + n), tally, over)))
            .collect();
        actors.extend((0..STAYERS).map(|n| {
            let rng = Rng::new(seed + CROWD + n);
            scope.spawn(move || crowd::stay(daemon, rng, tally, over))
        }));
        let rng = Rng::new(!seed);
        actors.push(scope.spawn(move || disk::fail_now_and_then(daemon, plan, rng, tally, over)));
        let (begin, time) = (Instant::now(), Duration::from_secs_f64(options.minutes * 60.0));
        while begin.elapsed() < time && tally.failures() == 0 {
            thread::sleep(Duration::from_millis(100));
        }
        over.store(true, Ordering::Relaxed);
        for actor in actors {
            if actor.join().is_err() {
                tally.failed("a part of the soak itself panicked, see above".to_owned());
            }
        }
        tally.look_for_leaks(daemon);
        watched.store(true, Ordering::Relaxed);
    });
    if daemon.log().contains("panicked") {
        tally.failed(format!("the daemon panicked:\n{}", daemon.log()));
    }
    println!("{}", tally.table());
    if tally.failures() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
