//! fork, exec, and closed descriptors.

use fmalloc_tests::{Daemon, Worker, process, wait_until};

fn filled() -> Option<(Daemon, Worker)> {
    let daemon = Daemon::start("16M", "128M")?;
    let mut worker = daemon.client("8M");
    worker.ask("region a 32M");
    worker.ask("fill a 1");
    Some((daemon, worker))
}

#[test]
fn forked_child_that_touches_a_region_dies_by_sigsegv_and_the_parent_goes_on() {
    let Some((daemon, mut worker)) = filled() else { return };
    let resident = worker.ask("resident a");
    for place in ["a_cold", "a_resident"] {
        let offset = resident[place].as_u64().unwrap();
        assert_eq!(worker.ask(&format!("fork-touch a {offset}")), "SIGSEGV", "{place}");
    }
    worker.ask("verify a 1");
    worker.ask("fill a 2 2");
    worker.ask("verify a 2");
    worker.quit();
    daemon.wait_until_empty();
}

#[test]
fn calls_in_a_forked_child_fail_clearly_and_the_parent_goes_on() {
    let Some((daemon, mut worker)) = filled() else { return };
    let code = worker.ask("fork-calls a");
    assert_eq!(code, "exit 0", "{}", worker.stderr());
    worker.ask("verify a 1");
    worker.ask("region b 1M");
    worker.ask("drop a");
    worker.quit();
    daemon.wait_until_empty();
}

#[test]
fn forked_child_can_have_a_pager_of_its_own() {
    let Some(daemon) = Daemon::start_with("16M", "128M", &["--default-budget", "4M"]) else { return };
    let mut worker = daemon.client("8M");
    worker.ask("region a 32M");
    worker.ask("start churn churn a 1 2 0");
    for _ in 0..5 {
        let code = worker.ask("fork-own");
        assert_eq!(code, "exit 0", "{}", worker.stderr());
    }
    worker.ask("stop churn");
    worker.quit();
    daemon.wait_until_empty();
}

#[test]
fn forks_during_evictions_change_nothing_for_the_parent() {
    let Some(daemon) = Daemon::start("8M", "128M") else { return };
    let mut worker = daemon.client("8M");
    worker.ask("region a 32M");
    worker.ask("start churn churn a 1 3 0");
    for _ in 0..50 {
        assert_eq!(worker.ask("fork-touch a 0"), "SIGSEGV");
    }
    println!("{}", worker.ask("stop churn"));
    worker.quit();
}

#[test]
fn hazard_03_program_that_becomes_another_gives_everything_back_though_the_process_lives() {
    let Some((daemon, mut worker)) = filled() else { return };
    let child = worker.ask("fork-pause").as_u64().unwrap();
    worker.tell("exec-sleep");
    daemon.wait_until_empty();
    assert!(process::is_alive(worker.pid()));
    assert!(process::is_alive(u32::try_from(child).unwrap()), "a forked child does not keep anything");
    worker.kill();
}

#[test]
fn program_that_becomes_another_user_works_on() {
    let Some((daemon, mut worker)) = filled() else { return };
    // Libc interrupts every thread for this, the library's too.
    worker.ask(&format!("become {}", process::NOBODY));
    worker.ask("verify a 1 2");
    worker.ask("fill a 2 2");
    worker.ask("region b 8M");
    worker.ask("fill b 3");
    worker.ask("discard b");
    worker.ask("verify a 2");
    worker.ask("zeros b");
    worker.quit();
    daemon.wait_until_empty();
}

#[test]
fn hazard_03_program_that_closes_all_descriptors_it_does_not_know_works_on() {
    let Some(daemon) = Daemon::start("16M", "128M") else { return };
    let mut worker = daemon.worker();
    // Once it answers it has no more descriptors than it needs.
    worker.refused("stats");
    let before = process::descriptors(worker.pid());
    worker.ask("connect 8M");
    worker.ask("region a 32M");
    worker.ask("fill a 1");
    assert_eq!(process::descriptors(worker.pid()), before, "the library's are in a table of their own");
    worker.ask("close-unknown");
    worker.ask("verify a 1");
    worker.ask("fill a 2 2");
    worker.ask("region b 8M");
    worker.ask("fill b 3");
    worker.ask("verify a 2 2");
    worker.ask("verify b 3");
    assert_eq!(worker.ask("health"), "Ok");
    worker.ask("drop a");
    wait_until("the claim is given back", || daemon.status("swap_claimed_bytes") == 8 << 20);
    worker.quit();
    daemon.wait_until_empty();
}
