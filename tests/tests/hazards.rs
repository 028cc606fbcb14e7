//! Known ways to lose data or to hang, one by one, that no other file of tests covers. The numbers are those of
//! docs/hazards.md.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use fmalloc_tests::daemon::number;
use fmalloc_tests::rng::seed;
use fmalloc_tests::{Daemon, MIB, wait_until};

#[test]
fn hazard_04_region_at_addresses_that_were_unmapped_at_that_moment_keeps_its_content() {
    let Some(daemon) = Daemon::start("16M", "256M") else { return };
    // Each region that stays has page tables.
    let mut worker = daemon.client("12M");
    worker.ask("region pressure 16M");
    worker.ask("start pressure press pressure");
    let outcome = worker.ask(&format!("usurp {} 200", seed()));
    println!("{outcome}");
    assert!(number(&outcome, "usurped") > 10, "hardly any region got such addresses: this proves nothing");
    worker.ask("stop pressure");
    worker.quit();
    daemon.wait_until_empty();
}

#[test]
fn hazard_06_pages_of_equal_unkeyed_hash_are_told_apart() {
    let Some(daemon) = Daemon::start("16M", "64M") else { return };
    let mut worker = daemon.client("8M");
    worker.ask("region a 1M");
    let client = worker.client().to_string();
    let evict = || assert!(daemon.ctl(&["evict", &client]).status.success());
    worker.ask("twins a 3 first");
    evict();
    worker.ask("twins a 3 is-first");
    // The page is clean now, and its slot has the first twin. The second must not pass for it.
    worker.ask("twins a 3 second");
    evict();
    worker.ask("twins a 3 is-second");
    worker.ask("twins a 3 first");
    evict();
    worker.ask("twins a 3 is-first");
    worker.quit();
}

#[test]
fn hazard_09_faults_are_answered_though_nobody_tells_that_a_discard_has_ended() {
    let Some(daemon) = Daemon::start("8M", "128M") else { return };
    let mut worker = daemon.client("8M");
    worker.ask("region a 24M");
    println!("{} pages checked beside slow discards", worker.ask(&format!("slow-discard a {} 40", seed())));
    worker.quit();
    daemon.wait_until_empty();
}

#[test]
fn hazard_13_page_tables_that_fill_the_budget_are_named_and_a_larger_budget_helps() {
    let Some(daemon) = Daemon::start("32M", "2G") else { return };
    let mut worker = daemon.client("4M");
    worker.ask("region a 1G");
    // 6 MiB of tables by the time that all of it was touched.
    worker.ask("start touch zeros a");
    wait_until("it is said what hinders the client", || {
        let row = daemon.row(&mut worker);
        row["condition"].as_str().is_some_and(|text| text.contains("page tables"))
    });
    assert_eq!(worker.ask("finished touch"), false);
    let row = daemon.row(&mut worker);
    assert!(number(&row, "resident_bytes") + number(&row, "overhead_bytes") <= 4 * MIB + 16384, "{row}");
    let client = worker.client().to_string();
    assert!(daemon.ctl(&["limit", &client, "16M"]).status.success());
    worker.ask("finish touch");
    assert_eq!(daemon.row(&mut worker)["condition"], "");
    worker.quit();
    daemon.wait_until_empty();
}

#[test]
fn hazard_15_nothing_waits_for_a_pipe_that_a_fault_has_locked() {
    let Some(mut daemon) = Daemon::start("8M", "64M") else { return };
    let mut worker = daemon.client("8M");
    worker.ask("region a 32M");
    worker.ask("region b 4K");
    worker.ask("fill a 1");
    let cold = worker.ask("resident a")["a_cold"].as_u64().unwrap();
    daemon.kill();
    // The daemon is gone before this fault: stderr is locked for good, and a line is due on it.
    worker.ask(&format!("start hold hold-stderr a {cold}"));
    wait_until("the client notices", || worker.ask("health") == "DaemonGone");
    for call in ["stats", "region c 1M", "set-budget 16M"] {
        assert_eq!(worker.refused(call).kind, "DaemonGone", "{call}");
    }
    worker.ask("drop b");
    assert_eq!(worker.ask("finished hold"), false);
    worker.kill();
}

#[test]
fn core_of_a_client_leaves_regions_out() {
    let Some(daemon) = Daemon::start("8M", "64M") else { return };
    let mut worker = daemon.client("8M");
    worker.ask("region a 33M");
    let maps = std::fs::read_to_string(format!("/proc/{}/smaps", worker.pid())).unwrap();
    let (mut size, mut found) = (0, 0);
    for line in maps.lines() {
        if let Some(kib) = line.strip_prefix("Size:") {
            size = kib.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
        }
        if let Some(flags) = line.strip_prefix("VmFlags:")
            && size << 10 == 33 * MIB
        {
            found += 1;
            assert!(flags.split_whitespace().any(|flag| flag == "dd"), "a region would be dumped: {flags}");
        }
    }
    assert_eq!(found, 1);
    worker.quit();
}
