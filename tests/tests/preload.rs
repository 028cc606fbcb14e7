//! `fmallocctl run`: programs that know nothing of fmalloc compute over more memory than their budget, through every call
//! of libc, also when they fork.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::os::unix::process::ExitStatusExt;

use fmalloc_tests::run::{Runs, program};
use fmalloc_tests::{daemon, wait_until};

#[test]
fn memory_of_several_times_the_budget_keeps_its_content() {
    let Some(runs) = Runs::new() else { return };
    let done = runs.run("24M", program(), &["memory", "96"]).succeeded().paged();
    assert_eq!(done.stdout(), "done\n");
    assert_eq!(done.stderr(), "");
    assert_eq!(daemon::number(&done.stats, "paged_processes"), 1);
}

#[test]
fn every_allocation_function_works_on_paged_memory() {
    let Some(runs) = Runs::new() else { return };
    let _ = runs.run("16M", program(), &["allocations"]).succeeded().paged();
}

#[test]
fn large_allocations_alone_are_paged_with_a_threshold() {
    let Some(runs) = Runs::new() else { return };
    let options = ["--ram", "16M", "--swap-size", "1G", "--threshold", "64K"];
    let _ = runs.run_with(&options, program(), &["allocations"]).succeeded().paged();
}

#[test]
fn threads_share_paged_memory() {
    let Some(runs) = Runs::new() else { return };
    let _ = runs.run("24M", program(), &["threads", "8", "96"]).succeeded().paged();
}

#[test]
fn mappings_are_paged_and_behave_as_the_kernel_s() {
    let Some(runs) = Runs::new() else { return };
    let _ = runs.run("16M", program(), &["maps"]).succeeded().paged();
    let _ = runs.run("16M", program(), &["reserve"]).succeeded().paged();
}

#[test]
fn allocations_in_odd_places_work() {
    let Some(runs) = Runs::new() else { return };
    let _ = runs.run("16M", program(), &["late"]).succeeded().paged();
}

#[test]
fn a_block_freed_twice_ends_the_program_with_a_word() {
    let Some(runs) = Runs::new() else { return };
    let done = runs.run("16M", program(), &["double-free"]);
    assert_eq!(done.output.status.signal(), Some(libc::SIGABRT), "{done}");
    assert!(done.stderr().contains("fmalloc: free(0x") && done.stderr().contains("not in use"), "{done}");
}

#[test]
fn parent_child_and_grandchild_write_while_memory_is_swapped_out() {
    let Some(runs) = Runs::new() else { return };
    let done = runs.run("32M", program(), &["fork", "64"]).succeeded().forked();
    assert_eq!(daemon::number(&done.stats, "paged_processes"), 3);
}

#[test]
fn a_fork_beside_busy_threads_works() {
    let Some(runs) = Runs::new() else { return };
    let _ = runs.run("32M", program(), &["fork-threads", "48"]).succeeded().forked();
}

#[test]
fn children_that_become_other_programs_work() {
    let Some(runs) = Runs::new() else { return };
    let _ = runs.run("24M", program(), &["fork-exec", "4"]).succeeded().forked();
}

#[test]
fn a_program_that_becomes_a_daemon_keeps_its_memory() {
    let Some(runs) = Runs::new() else { return };
    let path = runs.dir().join("word");
    let _ = runs.run("24M", program(), &["daemonise", "48", path.to_str().unwrap()]).succeeded();
    wait_until("the daemon has verified its memory", || path.exists());
    wait_until("it has written", || std::fs::read_to_string(&path).unwrap() == "all is well");
}

#[test]
fn a_whole_tree_shares_one_budget() {
    let Some(runs) = Runs::new() else { return };
    let program = program();
    let script = format!("for n in 1 2 3; do {} memory 32 & done; wait", program.display());
    let done = runs.run("48M", "sh", &["-c", &script]).succeeded().paged();
    assert_eq!(done.stdout(), "done\ndone\ndone\n");
    assert_eq!(daemon::number(&done.stats, "paged_processes"), 3, "the shell is not");
}
