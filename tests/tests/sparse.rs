//! Regions of which only parts are in use, and hints.

use std::os::unix::process::ExitStatusExt;

use fmalloc_tests::{Daemon, MIB, wait_until};

#[test]
fn sparse_region_claims_what_is_committed_and_gives_it_back() {
    let Some(daemon) = Daemon::start("8M", "128M") else { return };
    let mut worker = daemon.client("8M");
    worker.ask("sparse s 64G");
    assert_eq!(daemon.status("swap_claimed_bytes"), 0);
    worker.ask("commit s 1G 32M");
    worker.ask("commit s 32G 16M");
    assert_eq!(daemon.status("swap_claimed_bytes"), 48 * MIB);
    worker.ask("commit s 1G 40M");
    assert_eq!(daemon.status("swap_claimed_bytes"), 56 * MIB, "what overlaps counts once");
    worker.ask("fill s 1 2 1G 40M");
    worker.ask("fill s 2 2 32G 16M");
    worker.ask("verify s 1 2 1G 40M");
    worker.ask("decommit s 1G 32M");
    assert_eq!(daemon.status("swap_claimed_bytes"), 24 * MIB);
    assert!(daemon.status("swap_used_bytes") <= 24 * MIB);
    let rest = 1024 + 32;
    worker.ask(&format!("verify s 1 2 {rest}M 8M"));
    worker.ask("verify s 2 2 32G 16M");
    worker.ask("commit s 1G 4M");
    worker.ask("zeros s 1G 4M");
    worker.ask("drop s");
    assert_eq!((daemon.status("swap_claimed_bytes"), daemon.status("swap_used_bytes")), (0, 0));
    worker.quit();
}

#[test]
fn touch_outside_what_is_committed_is_sigsegv() {
    let Some(daemon) = Daemon::start("16M", "64M") else { return };
    for (prepare, touch) in [("commit s 0 1M", "touch s 1M"), ("decommit s 0 0", "touch s 0")] {
        let mut worker = daemon.client("8M");
        worker.ask("sparse s 1G");
        worker.ask(prepare);
        let status = worker.dies(touch);
        assert_eq!(status.signal(), Some(libc::SIGSEGV), "{status}");
    }
    let mut worker = daemon.client("8M");
    worker.ask("sparse s 1G");
    worker.ask("commit s 0 8M");
    worker.ask("fill s 1 1 0 8M");
    worker.ask("decommit s 4M 4M");
    worker.ask("verify s 1 1 0 4M");
    assert_eq!(worker.dies("touch s 4M").signal(), Some(libc::SIGSEGV));
    daemon.wait_until_empty();
}

#[test]
fn willneed_brings_pages_in_and_cold_takes_them_out() {
    let Some(daemon) = Daemon::start("32M", "128M") else { return };
    let mut worker = daemon.client("32M");
    worker.ask("region a 16M");
    worker.ask("fill a 1");
    worker.ask("advise a cold");
    wait_until("all is evicted", || worker.ask("resident a")["pages"] == 0);
    assert_eq!(worker.stats("resident_pages"), 0);
    worker.ask("advise a willneed 4M 4M");
    wait_until("a part is back", || worker.ask("resident a 4M 4M")["pages"] == 1024);
    assert_eq!(worker.ask("resident a")["pages"], 1024);
    let faults = worker.stats("faults");
    worker.ask("verify a 1 1 4M 4M");
    assert_eq!(worker.stats("faults"), faults, "what was brought in needs no fault");
    worker.ask("verify a 1");
    worker.quit();
}

#[test]
fn sequential_and_random_advice_change_what_is_read_ahead_and_no_content() {
    let Some(daemon) = Daemon::start("16M", "128M") else { return };
    let mut worker = daemon.client("16M");
    worker.ask("region a 64M");
    worker.ask("fill a 1");
    let faults_of = |advice: &str, worker: &mut fmalloc_tests::Worker| {
        worker.ask(&format!("advise a {advice}"));
        let before = worker.stats("faults");
        worker.ask("verify a 1");
        worker.stats("faults") - before
    };
    let sequential = faults_of("sequential", &mut worker);
    let random = faults_of("random", &mut worker);
    let normal = faults_of("normal", &mut worker);
    println!("faults: sequential {sequential}, normal {normal}, random {random}");
    assert!(sequential * 10 < random && normal * 10 < random);
    worker.quit();
}

#[test]
fn discard_gives_zeros_frames_and_slots_back() {
    let Some(daemon) = Daemon::start("8M", "128M") else { return };
    let mut worker = daemon.client("8M");
    worker.ask("region a 32M");
    worker.ask("fill a 1");
    worker.ask("discard a 0 24M");
    assert!(daemon.status("swap_used_bytes") <= 8 * MIB);
    worker.ask("zeros a 0 24M");
    worker.ask("verify a 1 1 24M 8M");
    worker.ask("discard a");
    assert_eq!(daemon.status("swap_used_bytes"), 0);
    wait_until("no frame is in use", || worker.stats("resident_pages") == 0);
    assert_eq!(worker.ask("resident a")["pages"], 0);
    assert_eq!(daemon.status("swap_claimed_bytes"), 32 * MIB);
    worker.ask("zeros a");
    worker.quit();
}
