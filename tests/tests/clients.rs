//! Many clients at once, and clients of other users.

use std::sync::Mutex;
use std::thread;

use fmalloc_tests::daemon::number;
use fmalloc_tests::process::NOBODY;
use fmalloc_tests::{Daemon, MIB, Worker};

#[test]
fn thirty_two_clients_that_share_the_pool_keep_every_byte_and_one_more_is_refused() {
    const CLIENTS: u64 = 32;
    let budget = |n: u64| (4 + n % 6) * MIB;
    let pool: u64 = (0..CLIENTS).map(budget).sum();
    let Some(daemon) = Daemon::start(&pool.to_string(), "1G") else { return };
    let mut workers: Vec<Worker> = (0..CLIENTS).map(|n| daemon.client(&budget(n).to_string())).collect();
    assert_eq!(daemon.status("pool_granted_bytes"), pool);
    assert_eq!(daemon.status("clients"), CLIENTS);

    let mut late = daemon.worker();
    let refused = late.refused("connect 4M");
    assert_eq!(refused.kind, "PoolFull");
    for figure in ["4 MiB", &fmalloc_proto::size::Size(pool).to_string()] {
        assert!(refused.text.contains(figure), "{}", refused.text);
    }

    // All have begun before the first one is waited for.
    for (worker, n) in workers.iter_mut().zip(0..) {
        worker.ask(&format!("region a {}", budget(n) * 4));
        worker.tell(&format!("fill a {} 2", n + 1));
    }
    for (worker, n) in workers.iter_mut().zip(1..) {
        assert!(worker.answer(fmalloc_tests::PATIENCE).is_some_and(|answer| answer.is_ok()), "client {n}");
        worker.tell(&format!("verify a {n} 2"));
    }
    for (worker, n) in workers.iter_mut().zip(1..) {
        let answer = worker.answer(fmalloc_tests::PATIENCE);
        assert!(answer.as_ref().is_some_and(Result::is_ok), "client {n}: {answer:?}");
    }
    workers.pop().into_iter().for_each(Worker::quit);
    late.ask("connect 4M");
    workers.into_iter().for_each(Worker::quit);
    late.quit();
    daemon.wait_until_empty();
}

#[test]
fn client_of_another_user_is_admitted_only_if_allowed() {
    let Some(daemon) = Daemon::start_with("8M", "16M", &["--socket-mode", "0666"]) else { return };
    let mut stranger = daemon.worker_of(NOBODY);
    let refused = stranger.refused("connect");
    assert_eq!(refused.kind, "Denied");
    assert!(refused.text.contains("--allow-uid"), "{}", refused.text);
    drop(daemon);

    let Some(daemon) = Daemon::start("8M", "16M") else { return };
    let mut stranger = daemon.worker_of(NOBODY);
    assert_eq!(stranger.refused("connect").kind, "Denied", "the socket's mode keeps others out");
}

#[test]
fn client_without_a_daemon_is_told_where_it_was_looked_for() {
    let Some(mut daemon) = Daemon::start("8M", "16M") else { return };
    let mut worker = daemon.worker();
    daemon.kill();
    let refused = worker.refused("connect");
    assert_eq!(refused.kind, "NoDaemon");
    for text in [&daemon.socket().display().to_string(), "systemctl start fmallocd", "FMALLOC_SOCKET"] {
        assert!(refused.text.contains(text), "{}", refused.text);
    }
}

#[test]
fn limits_on_clients_and_regions_are_kept_and_named() {
    let limits = ["--max-clients", "3", "--max-clients-per-uid", "2", "--max-regions", "2"];
    let Some(daemon) = Daemon::start_with("64M", "64M", &limits) else { return };
    let mut first = daemon.client("8M");
    let second = daemon.client("8M");
    let refused = daemon.worker().refused("connect 8M");
    assert_eq!(refused.kind, "Limit");
    assert!(refused.text.contains("max_clients_per_uid"), "{}", refused.text);
    second.quit();
    daemon.client("8M").quit();
    first.ask("region a 1M");
    first.ask("region b 1M");
    let refused = first.refused("region c 1M");
    assert_eq!(refused.kind, "Limit");
    assert!(refused.text.contains("max_regions"), "{}", refused.text);
    first.ask("drop a");
    first.ask("region c 1M");
    first.quit();
}

#[test]
fn process_with_two_pagers_keeps_their_budgets_apart() {
    let Some(daemon) = Daemon::start("24M", "128M") else { return };
    let mut worker = daemon.client("16M");
    worker.ask("region a 48M");
    worker.ask("connect 8M");
    worker.ask("region b 24M");
    assert_eq!(daemon.status("clients"), 2);
    worker.ask("start churn churn a 1 2 2000");
    worker.ask("churn b 2 2 2000");
    worker.ask("finish churn");
    let rows = daemon.json(&["clients"]);
    for (row, budget) in rows.as_array().unwrap().iter().zip([16 * MIB, 8 * MIB]) {
        let held = number(row, "peak_held_bytes");
        assert!(held <= budget && held > budget / 2, "{row}");
    }
    worker.ask("drop a");
    fmalloc_tests::wait_until("the first pager ends with its last region", || daemon.status("clients") == 1);
    worker.ask("disconnect");
    daemon.wait_until_empty();
}

#[test]
fn clients_that_come_and_go_at_once_leave_nothing() {
    let Some(daemon) = Daemon::start("64M", "256M") else { return };
    let failures = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for n in 1..=4 {
            let (daemon, failures) = (&daemon, &failures);
            scope.spawn(move || {
                let mut worker = daemon.worker();
                for round in 0..20 {
                    worker.ask("connect 6M");
                    worker.ask("region a 16M");
                    worker.ask(&format!("fill a {n}"));
                    worker.ask("region b 1M");
                    if let Err(failed) = worker.try_ask(&format!("verify a {n}")) {
                        failures.lock().unwrap().push((round, failed));
                    }
                    worker.ask(if round % 2 == 0 { "drop a" } else { "drop b" });
                    worker.ask("disconnect");
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{failures:?}");
    daemon.wait_until_empty();
}

#[test]
fn region_dropped_by_a_living_client_gives_slots_and_claim_back() {
    let Some(daemon) = Daemon::start("8M", "128M") else { return };
    let mut worker = daemon.client("8M");
    worker.ask("region a 32M");
    worker.ask("region b 32M");
    worker.ask("fill a 1");
    worker.ask("fill b 2");
    assert!(daemon.status("swap_used_bytes") > 50 * MIB);
    worker.ask("drop a");
    let used = daemon.status("swap_used_bytes");
    assert!(used <= 32 * MIB, "{used}");
    assert_eq!(daemon.status("swap_claimed_bytes"), 32 * MIB);
    worker.ask("verify b 2");
    worker.ask("drop b");
    assert_eq!((daemon.status("swap_used_bytes"), daemon.status("swap_claimed_bytes")), (0, 0));
    assert_eq!(worker.stats("resident_pages"), 0);
    worker.quit();
}
