//! Swap I/O that fails: once, at every transfer of a small run, and from some transfer on for as long as it pleases. What
//! can be saved is saved, what is lost gives errors, everybody is told, and nothing leaks.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use fmalloc_tests::daemon::number;
use fmalloc_tests::failing::{FOR_EVER, Fault, Plan};
use fmalloc_tests::rng::seed;
use fmalloc_tests::{Daemon, MIB, Worker, place, wait_until};

/// A run on a region of 5 MiB with a budget of 4 MiB.
struct Run {
    worker: Worker,
    client: u64,
}

impl Run {
    fn new(daemon: &Daemon) -> Self {
        let mut run = Self { worker: daemon.worker(), client: 0 };
        run.begin();
        run
    }

    fn begin(&mut self) {
        self.worker.ask("connect 4M");
        self.worker.ask("region a 5M");
        self.client = self.worker.client();
    }

    /// Runs to the end and gives how many pages were lost. What the client is told of itself agrees with that.
    fn endure(&mut self, seed: u64) -> u64 {
        let outcome = self.worker.ask(&format!("endure a {seed} 10"));
        let lost = number(&outcome, "lost");
        assert_eq!(self.worker.stats("poisoned_pages"), lost);
        lost
    }

    /// Gives the memory back, for another run.
    fn clear(&mut self) {
        self.worker.ask("drop a");
        assert_eq!(self.worker.stats("slots"), 0, "slots have leaked");
        self.worker.ask("disconnect");
    }

    fn end(mut self, daemon: &Daemon) {
        self.clear();
        self.worker.quit();
        daemon.wait_until_empty();
    }
}

/// Transfers from one failure to the next: more than are under way at once, so that what is tried again succeeds.
const APART: u64 = 31;

/// Has single transfers fail, at every number that a run comes to: so many runs that each is struck in one of them.
/// Gives how many pages were lost in all.
fn fail_everywhere(fault: Fault) -> Option<u64> {
    let (daemon, plan) = Daemon::start_failing("8M", "64M", &[])?;
    let (mut struck, mut all_lost, seed) = (0, 0, seed());
    let mut run = Run::new(&daemon);
    for n in 0..APART {
        plan.arm_every(fault, n, APART, run.client);
        let lost = run.endure(seed);
        let injected = plan.injected();
        plan.disarm();
        (struck, all_lost) = (struck + injected, all_lost + lost);
        if fault != Fault::LostWrite {
            assert_eq!(lost, 0, "{fault:?} of transfer {n}: one failure alone loses nothing");
            let counted = run.worker.stats("io_errors");
            assert!(counted >= injected, "{fault:?}: {counted} errors counted of {injected}");
        }
        run.clear();
        run.begin();
    }
    run.end(&daemon);
    println!("{fault:?}: {struck} transfers struck in {APART} runs; {all_lost} pages lost");
    assert!(struck >= APART, "too few transfers to prove anything: {struck}");
    Some(all_lost)
}

#[test]
fn one_failed_read_at_any_transfer_loses_nothing() {
    fail_everywhere(Fault::ReadError);
}

#[test]
fn one_short_read_at_any_transfer_loses_nothing() {
    fail_everywhere(Fault::ShortRead);
}

#[test]
fn one_flipped_bit_at_any_read_loses_nothing() {
    fail_everywhere(Fault::FlippedBit);
}

#[test]
fn one_failed_write_at_any_transfer_loses_nothing() {
    fail_everywhere(Fault::WriteError);
}

#[test]
fn one_short_write_at_any_transfer_loses_nothing() {
    fail_everywhere(Fault::ShortWrite);
}

#[test]
fn one_write_to_a_full_disk_at_any_transfer_loses_nothing() {
    fail_everywhere(Fault::FullDisk);
}

#[test]
fn one_write_that_never_reached_the_disk_is_noticed_when_it_is_read() {
    let lost = fail_everywhere(Fault::LostWrite);
    assert_ne!(lost, Some(0), "what was never written cannot be there");
}

/// Somebody else's memory, in use all the time.
fn bystander(daemon: &Daemon) -> Worker {
    let mut worker = daemon.client("8M");
    worker.ask("region b 24M");
    worker.ask("start churn churn b 1 2 0");
    worker
}

#[test]
fn reads_that_fail_for_good_lose_pages_with_errors_and_never_give_wrong_bytes() {
    let Some((daemon, plan)) = Daemon::start_failing("16M", "128M", &[]) else { return };
    let mut bystander = bystander(&daemon);
    for fault in [Fault::ReadError, Fault::ShortRead, Fault::FlippedBit, Fault::LostWrite] {
        for first in [0, 7, 15] {
            let mut run = Run::new(&daemon);
            plan.arm(fault, first, FOR_EVER, Some(run.client));
            let lost = run.endure(first);
            println!("{fault:?} from transfer {first} on: {lost} pages lost");
            assert!(lost > 0);
            let row = daemon.row(&mut run.worker);
            assert_eq!(number(&row, "poisoned_bytes"), lost * 4096, "{row}");
            assert!(number(&row, "io_errors") >= lost, "{row}");
            // The disk is mended. What was lost stays so until it is discarded.
            plan.disarm();
            run.worker.ask("discard a");
            wait_until("nothing is lost any more", || run.worker.stats("poisoned_pages") == 0);
            assert_eq!(run.endure(99), 0);
            run.worker.ask("drop a");
            run.worker.quit();
        }
    }
    for text in ["a read of the swap file failed: EIO", "a check of the swap file failed", "is lost"] {
        assert!(daemon.log().contains(text), "{text}: {}", daemon.log());
    }
    bystander.ask("stop churn");
    assert_eq!(bystander.stats("io_errors"), 0);
    bystander.quit();
    daemon.wait_until_empty();
}

/// A client that can evict nothing, since nothing can be written.
fn stuck(daemon: &Daemon, plan: &Plan, fault: Fault, first: u64) -> Run {
    let mut run = Run::new(daemon);
    plan.arm(fault, first, FOR_EVER, Some(run.client));
    run.worker.ask(&format!("start endure endure a {first} 10"));
    wait_until("the client is hindered", || {
        daemon.row(&mut run.worker)["condition"] == "swap cannot be written"
    });
    run
}

#[test]
fn client_waits_while_swap_cannot_be_written_and_goes_on_without_loss() {
    let Some((daemon, plan)) = Daemon::start_failing("16M", "128M", &[]) else { return };
    let mut bystander = bystander(&daemon);
    for (fault, why) in
        [(Fault::WriteError, "EIO"), (Fault::ShortWrite, "ended after"), (Fault::FullDisk, "ENOSPC")]
    {
        for first in [0, 5] {
            let mut run = stuck(&daemon, &plan, fault, first);
            let row = daemon.row(&mut run.worker);
            let held = number(&row, "resident_bytes") + number(&row, "overhead_bytes");
            assert!(held <= 4 * MIB, "{row}");
            assert!(number(&row, "io_errors") > 0, "{row}");
            assert!(daemon.log().contains(why), "{}", daemon.log());
            assert_eq!(run.worker.ask("finished endure"), false);
            plan.disarm();
            let outcome = run.worker.ask("finish endure");
            assert_eq!(number(&outcome, "lost"), 0, "{outcome}");
            wait_until("nothing hinders it", || daemon.row(&mut run.worker)["condition"] == "");
            run.worker.ask("drop a");
            run.worker.quit();
        }
    }
    bystander.ask("stop churn");
    bystander.quit();
    daemon.wait_until_empty();
}

#[test]
fn client_that_dies_while_swap_cannot_be_written_gives_everything_back() {
    let Some((daemon, plan)) = Daemon::start_failing("16M", "64M", &[]) else { return };
    for fault in [Fault::WriteError, Fault::ShortWrite] {
        let mut run = stuck(&daemon, &plan, fault, 3);
        run.worker.kill();
        daemon.wait_until_empty();
    }
    let mut run = Run::new(&daemon);
    plan.disarm();
    assert_eq!(run.endure(1), 0);
    run.end(&daemon);
}

#[test]
fn failures_without_io_uring_are_survived_as_well() {
    let Some((daemon, plan)) = Daemon::start_failing("8M", "64M", &["--no-io-uring"]) else { return };
    for fault in Fault::ALL {
        for first in [0, 3, 11] {
            let mut run = Run::new(&daemon);
            plan.arm(fault, first, 2, Some(run.client));
            let lost = run.endure(first);
            assert!(plan.injected() > 0);
            assert!(lost == 0 || fault.is_of_reads() || fault == Fault::LostWrite, "{fault:?}: {lost}");
            plan.disarm();
            run.end(&daemon);
        }
    }
}

/// A small file system of its own.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Of 160 MiB, below `dir`; None where nothing can be mounted.
    fn new(dir: &Path) -> Option<Self> {
        let (image, target) = (dir.join("image"), dir.join("disk"));
        fs::create_dir(&target).unwrap();
        fs::File::create(&image).unwrap().set_len(160 * MIB).unwrap();
        let run = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
        let made = run(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&image))
            && run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&target));
        if !made {
            assert!(std::env::var_os("CI").is_none(), "this test needs mkfs.ext4 and a loop device");
            eprintln!("skipped: needs mkfs.ext4 and a loop device");
        }
        made.then_some(Self(target))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // A daemon that is just ending may have its swap file there.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn full_disk_refuses_memory_with_figures_and_nothing_that_was_promised_is_lost() {
    if !place::can_page() {
        return;
    }
    let dir = place::directory();
    let Some(disk) = SmallDisk::new(dir.path()) else { return };
    let daemon = place::binary("fmallocd");
    let variables = [("FMALLOC_DAEMON", daemon.to_str().unwrap())];
    let mut worker = Worker::start(dir.path(), &place::binary("fmalloc-worker"), None, &variables);
    // The swap file may grow to more than the disk has.
    worker.ask(&format!("private 6M {} 1G", disk.0.display()));
    worker.ask("region a 16M");
    worker.ask("fill a 1");
    // Something else takes the rest.
    let ballast = disk.0.join("ballast");
    let filled = Command::new("dd").arg("if=/dev/zero").arg(format!("of={}", ballast.display())).output();
    assert!(!filled.unwrap().status.success(), "the disk is not full");
    let refused = worker.refused("region b 256M");
    assert_eq!(refused.kind, "SwapFull", "{}", refused.text);
    assert!(refused.text.contains("256 MiB") || refused.text.contains("available"), "{}", refused.text);
    worker.ask("verify a 1");
    worker.ask("fill a 2 4");
    worker.ask("verify a 2");
    fs::remove_file(ballast).unwrap();
    worker.ask("region b 8M");
    worker.ask("fill b 3");
    worker.ask("verify b 3");
    worker.ask("verify a 2");
    worker.quit();
}
