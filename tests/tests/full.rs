//! A swap file that is full.

use fmalloc_tests::{Daemon, MIB};

#[test]
fn region_that_does_not_fit_into_swap_is_refused_and_others_lose_nothing() {
    let Some(daemon) = Daemon::start("8M", "64M") else { return };
    let mut worker = daemon.client("8M");
    worker.ask("region a 48M");
    worker.ask("fill a 1");
    let refused = worker.refused("region b 32M");
    assert_eq!(refused.kind, "SwapFull");
    for figure in ["32 MiB", "16 MiB", "64 MiB"] {
        assert!(refused.text.contains(figure), "{}", refused.text);
    }
    worker.ask("sparse s 64M");
    assert_eq!(worker.refused("commit s 0 17M").kind, "SwapFull");
    assert_eq!(daemon.status("swap_claimed_bytes"), 48 * MIB, "a refusal claims nothing");
    assert_eq!(daemon.status("regions"), 2);
    worker.ask("verify a 1");
    worker.ask("region b 16M");
    worker.ask("fill b 2");
    worker.ask("drop a");
    worker.ask("commit s 0 48M");
    worker.ask("verify b 2");
    worker.quit();
    daemon.wait_until_empty();
}

#[test]
fn swap_claimed_to_the_last_page_takes_every_page_rewritten_again_and_again() {
    let Some(daemon) = Daemon::start("6M", "32M") else { return };
    let mut worker = daemon.client("6M");
    worker.ask("region a 32M");
    assert_eq!(daemon.status("swap_claimed_bytes"), daemon.status("swap_bytes"));
    for seed in 1..=5 {
        worker.ask(&format!("fill a {seed} 4"));
        worker.ask(&format!("verify a {seed} 3"));
    }
    println!("{}", worker.ask("start churn churn a 1 4 0"));
    worker.ask("zeros a 0 0");
    worker.kill();
    daemon.wait_until_empty();
}
