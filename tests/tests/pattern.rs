//! Clients that work on more memory than their budget allows keep every byte, and the budget holds as seen from outside.

use fmalloc_tests::daemon::number;
use fmalloc_tests::rng::seed;
use fmalloc_tests::{Daemon, MIB, Worker, process};

const BUDGET: u64 = 32 * MIB;
/// What a process may hold beyond its budget.
const ALLOWANCE: u64 = 16 * MIB;

/// What client and daemon held before there were regions.
struct Baseline {
    client: u64,
    daemon: u64,
}

impl Baseline {
    fn of(daemon: &Daemon, worker: &Worker) -> Self {
        Self { client: process::peak_resident(worker.pid()), daemon: process::peak_resident(daemon.pid()) }
    }

    /// Peak of the client, together with what the daemon holds for it by its own account or as measured.
    fn assert_within_budget(&self, daemon: &Daemon, worker: &mut Worker) {
        let client = process::peak_resident(worker.pid()) - self.client;
        let accounted = number(&daemon.row(worker), "overhead_bytes");
        let measured = process::peak_resident(daemon.pid()) - self.daemon;
        println!(
            "client {} KiB, daemon {} KiB by its account, {} KiB measured",
            client >> 10,
            accounted >> 10,
            measured >> 10
        );
        assert!(client + accounted.max(measured) <= BUDGET + ALLOWANCE);
        assert!(client > BUDGET / 2, "a budget that is not used proves nothing");
    }
}

fn fill_and_verify(threads: usize) {
    let Some(daemon) = Daemon::start("32M", "256M") else { return };
    let mut worker = daemon.client("32M");
    let baseline = Baseline::of(&daemon, &worker);
    worker.ask("region a 256M");
    for seed in 1..=2 {
        worker.ask(&format!("fill a {seed} {threads}"));
        worker.ask(&format!("verify a {seed} {threads}"));
    }
    baseline.assert_within_budget(&daemon, &mut worker);
    let row = daemon.row(&mut worker);
    assert!(number(&row, "swapped_bytes") > 220 * MIB, "{row}");
    assert_eq!((number(&row, "poisoned_bytes"), number(&row, "io_errors")), (0, 0));
    worker.quit();
    daemon.wait_until_empty();
}

#[test]
fn one_thread_on_eight_times_the_budget_keeps_every_byte_within_it() {
    fill_and_verify(1);
}

#[test]
fn eight_threads_on_eight_times_the_budget_keep_every_byte_within_it() {
    fill_and_verify(8);
}

#[test]
fn hazard_13_reading_memory_that_was_never_written_stays_within_the_budget() {
    let Some(daemon) = Daemon::start("32M", "256M") else { return };
    let mut worker = daemon.client("32M");
    let baseline = Baseline::of(&daemon, &worker);
    worker.ask("region a 256M");
    worker.ask("zeros a");
    baseline.assert_within_budget(&daemon, &mut worker);
    assert_eq!(daemon.status("swap_used_bytes"), 0, "zeros take no slots");
    worker.quit();
}

#[test]
fn random_rewriting_by_threads_that_share_pages_equals_a_shadow_copy() {
    let Some(daemon) = Daemon::start("8M", "64M") else { return };
    let mut worker = daemon.client("8M");
    worker.ask("region a 64M");
    let seed = seed();
    for threads in [6, 1] {
        let done = worker.ask(&format!("churn a {} {threads} 5000", seed + threads));
        println!("{threads} threads: {done}");
    }
    worker.quit();
    daemon.wait_until_empty();
}

#[test]
fn random_rewriting_without_io_uring_equals_a_shadow_copy() {
    let Some(daemon) = Daemon::start_with("8M", "64M", &["--no-io-uring"]) else { return };
    assert_eq!(daemon.json(&["status"])["io_uring"], false);
    let mut worker = daemon.client("8M");
    worker.ask("region a 64M");
    println!("{}", worker.ask(&format!("churn a {} 4 4000", seed())));
    worker.quit();
}

#[test]
fn smallest_budget_with_many_threads_makes_progress() {
    let Some(daemon) = Daemon::start("4M", "64M") else { return };
    let mut worker = daemon.client("4M");
    worker.ask("region a 64M");
    worker.ask("fill a 1 32");
    worker.ask("verify a 1 32");
    worker.quit();
}

#[test]
fn pages_that_did_not_change_are_not_written_again() {
    let Some(daemon) = Daemon::start("16M", "128M") else { return };
    let mut worker = daemon.client("16M");
    worker.ask("region a 64M");
    worker.ask("fill a 1");
    worker.ask("verify a 1");
    let before = worker.stats("pages_out");
    worker.ask("verify a 1");
    // Rewriting the same bytes is no change.
    worker.ask("fill a 1");
    worker.ask("verify a 1");
    let written = worker.stats("pages_out") - before;
    assert!(written < 1000, "{written} pages were written for nothing");
    assert!(worker.stats("pages_clean") > 16384);
    worker.quit();
}
