//! Forked children that go on with the regions: both sides see what was there at the fork, then each its own.

use std::time::Duration;

use fmalloc_tests::{Daemon, MIB, Worker, wait_until};

fn start(ram: &str, swap: &str, budget: &str) -> Option<(Daemon, Worker)> {
    let daemon = Daemon::start(ram, swap)?;
    let mut worker = daemon.worker();
    worker.ask(&format!("connect-inherit {budget}"));
    Some((daemon, worker))
}

fn gone(daemon: Daemon, worker: Worker) {
    worker.quit();
    daemon.wait_until_empty();
}

#[test]
fn child_and_parent_see_the_fork_and_then_their_own_writes() {
    let Some((daemon, mut worker)) = start("16M", "256M", "16M") else { return };
    worker.ask("region a 48M");
    worker.ask("fill a 1");
    worker.ask("fork child");
    worker.ask("child child verify a 1 4");
    worker.ask("fill a 2 2");
    worker.ask("child child verify a 1");
    worker.ask("child child fill a 3 2");
    worker.ask("verify a 2");
    worker.ask("child child verify a 3");
    assert_eq!(worker.ask("child-wait child"), "exit 0", "{}", worker.stderr());
    worker.ask("verify a 2 3");
    gone(daemon, worker);
}

#[test]
fn grandchildren_have_what_their_parents_had() {
    let Some((daemon, mut worker)) = start("32M", "512M", "32M") else { return };
    worker.ask("region a 48M");
    worker.ask("fill a 1");
    worker.ask("fork b");
    worker.ask("child b fill a 2 1 0 24M");
    worker.ask("child b fork c");
    worker.ask("child b child c fill a 3 1 0 12M");
    worker.ask("child b child c fork d");
    worker.ask("fill a 9");
    for (who, parts) in [
        ("", "9 1 0 48M"),
        ("child b ", "2 1 0 24M|1 1 24M 24M"),
        ("child b child c ", "3 1 0 12M|2 1 12M 12M|1 1 24M 24M"),
        ("child b child c child d ", "3 1 0 12M|2 1 12M 12M|1 1 24M 24M"),
    ] {
        for part in parts.split('|') {
            worker.ask(&format!("{who}verify a {part}"));
        }
    }
    // The parents go first.
    assert_eq!(worker.ask("child-kill b"), "SIGKILL");
    worker.ask("verify a 9");
    gone(daemon, worker);
}

#[test]
fn hazard_08_forks_under_eviction_by_many_threads_mix_nothing_up() {
    let Some((daemon, mut worker)) = start("16M", "256M", "16M") else { return };
    worker.ask("region a 32M");
    worker.ask("versions a");
    worker.ask("start writer write-versions a 8");
    std::thread::sleep(Duration::from_millis(200));
    for round in 0..6 {
        let child = format!("c{round}");
        worker.ask(&format!("fork {child}"));
        worker.ask(&format!("child {child} check-versions a"));
        // Once more, since the first look has evicted and brought back.
        worker.ask(&format!("child {child} check-versions a"));
        worker.ask(&format!("child {child} fill a 7 2"));
        worker.ask(&format!("child {child} verify a 7 2"));
        assert_eq!(worker.ask(&format!("child-wait {child}")), "exit 0", "{}", worker.stderr());
    }
    println!("{} pages written", worker.ask("stop writer"));
    worker.ask("check-versions a now");
    let gone_out = worker.stats("pages_out") + worker.stats("packed_pages") + worker.stats("faults_packed");
    assert!(gone_out > 0, "nothing was evicted");
    gone(daemon, worker);
}

#[test]
fn hazard_02_child_whose_daemon_dies_before_it_has_its_memory_ends_and_never_reads_zeros() {
    let Some((daemon, mut worker)) = start("16M", "256M", "8M") else { return };
    worker.ask("region a 32M");
    worker.ask("fill a 1");
    assert_eq!(worker.ask(&format!("fork-lost a {}", daemon.pid())), "SIGABRT");
    assert!(worker.stderr().contains("a forked child cannot get its memory"), "{}", worker.stderr());
    wait_until("the parent knows", || worker.ask("health") == "DaemonGone");
}

#[test]
fn hazard_14_fork_whose_swap_is_too_short_fails_and_loses_nothing() {
    let Some((daemon, mut worker)) = start("16M", "80M", "16M") else { return };
    worker.ask("region a 32M");
    worker.ask("region b 16M");
    worker.ask("fill a 1");
    worker.ask("fill b 2");
    let refused = worker.refused("fork child");
    assert_eq!(refused.kind, "SwapFull", "{refused:?}");
    assert_eq!(daemon.status("swap_claimed_bytes"), 48 * MIB);
    worker.ask("verify a 1");
    worker.ask("drop b");
    worker.ask("fork child");
    assert_eq!(daemon.status("swap_claimed_bytes"), 64 * MIB);
    worker.ask("fill a 3");
    worker.ask("child child verify a 1");
    worker.ask("child child fill a 4");
    worker.ask("verify a 3");
    worker.ask("child child verify a 4");
    assert_eq!(worker.ask("child-wait child"), "exit 0", "{}", worker.stderr());
    gone(daemon, worker);
}

#[test]
fn fork_beyond_the_limit_of_clients_is_refused_and_those_before_work_on() {
    let Some(daemon) =
        Daemon::start_with("32M", "512M", &["--max-clients", "10", "--max-clients-per-uid", "5"])
    else {
        return;
    };
    let mut worker = daemon.worker();
    worker.ask("connect-inherit 32M");
    worker.ask("region a 24M");
    worker.ask("fill a 1");
    for round in 0..3 {
        for n in 0..4 {
            // A child that has ended counts until the daemon has seen it off.
            wait_until("there is room for a child", || worker.try_ask(&format!("fork c{n}")).is_ok());
        }
        assert_eq!(worker.refused("fork more").kind, "Limit");
        for n in 0..4 {
            if n == round {
                assert_eq!(worker.ask(&format!("child-kill c{n}")), "SIGKILL");
            } else {
                worker.ask(&format!("child c{n} verify a 1"));
                assert_eq!(worker.ask(&format!("child-wait c{n}")), "exit 0", "{}", worker.stderr());
            }
        }
        wait_until("the children are gone", || daemon.status("clients") == 1);
    }
    worker.ask("verify a 1");
    gone(daemon, worker);
}

#[test]
fn fork_is_refused_where_another_process_does_not_fit_into_the_budget() {
    let Some((daemon, mut worker)) = start("16M", "256M", "4M") else { return };
    worker.ask("region a 16M");
    worker.ask("fill a 1");
    let mut children = 0;
    while worker.try_ask(&format!("fork c{children}")).is_ok() {
        children += 1;
        assert!(children < 5, "each takes a megabyte");
    }
    assert!(children > 0);
    for n in 0..children {
        worker.ask(&format!("child c{n} verify a 1"));
        worker.ask(&format!("child-wait c{n}"));
    }
    worker.ask("verify a 1");
    gone(daemon, worker);
}

#[test]
fn child_goes_on_when_its_parent_is_killed_and_gives_everything_back_in_the_end() {
    let Some((daemon, mut worker)) = start("16M", "256M", "16M") else { return };
    worker.ask("region a 48M");
    worker.ask("fill a 1");
    let file = daemon.dir().join("outcome");
    worker.ask("fork child");
    worker.ask(&format!("child-tell child outlive a 1 {}", file.display()));
    worker.ask("fill a 5 1 0 24M");
    worker.kill();
    wait_until("the child has done its work", || {
        std::fs::read_to_string(&file).is_ok_and(|text| !text.is_empty())
    });
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "good");
    daemon.wait_until_empty();
}

#[test]
fn children_that_run_another_program_leave_nothing_behind() {
    let Some((daemon, mut worker)) = start("16M", "256M", "16M") else { return };
    worker.ask("region a 48M");
    worker.ask("fill a 1");
    worker.ask("start writer nag");
    println!("{}", worker.ask("fork-exec 20"));
    worker.ask("stop writer");
    // Not announced: served nothing, but may do that.
    println!("{}", worker.ask("fork-exec 20 plain"));
    wait_until("the children are gone", || daemon.status("clients") == 1);
    wait_until("so are their claims", || daemon.status("swap_claimed_bytes") == 48 * MIB);
    worker.ask("verify a 1");
    gone(daemon, worker);
}

#[test]
fn fork_that_nobody_announced_never_reads_zeros() {
    let Some((daemon, mut worker)) = start("16M", "256M", "8M") else { return };
    worker.ask("region a 32M");
    worker.ask("fill a 1");
    let resident = worker.ask("resident a");
    let place = |worker: &mut Worker, place: &str| {
        let offset = resident[place].as_u64().unwrap();
        worker.ask(&format!("fork-raw {offset} a"))
    };
    assert_eq!(place(&mut worker, "a_resident"), "exit 0");
    assert_eq!(place(&mut worker, "a_cold"), "SIGKILL", "it waits until it is killed");
    worker.ask("verify a 1");
    worker.ask("fork child");
    worker.ask("child child verify a 1");
    worker.ask("child-wait child");
    gone(daemon, worker);
}

#[test]
fn forks_beside_threads_that_call_the_library_and_change_mappings() {
    let Some((daemon, mut worker)) = start("16M", "512M", "16M") else { return };
    for region in ["a", "b", "c"] {
        worker.ask(&format!("region {region} 16M"));
    }
    worker.ask("fill a 1");
    worker.ask("start nagging nag");
    worker.ask("start mixing mix b 1 2 6000");
    worker.ask("start wandering wander c 2 6000");
    for round in 0..10 {
        let child = format!("c{round}");
        worker.ask(&format!("fork {child}"));
        worker.ask(&format!("child {child} verify a 1"));
        worker.ask(&format!("child {child} fill a 2"));
        worker.ask(&format!("child {child} verify a 2"));
        assert_eq!(worker.ask(&format!("child-wait {child}")), "exit 0", "{}", worker.stderr());
    }
    worker.ask("stop nagging");
    worker.ask("stop mixing");
    worker.ask("stop wandering");
    worker.ask("verify a 1");
    gone(daemon, worker);
}

#[test]
fn private_daemon_serves_forked_children() {
    if !fmalloc_tests::place::can_page() {
        return;
    }
    let dir = fmalloc_tests::place::directory();
    let binary = fmalloc_tests::place::binary("fmalloc-worker");
    let daemon = fmalloc_tests::place::binary("fmallocd");
    let variables = [("FMALLOC_DAEMON", daemon.to_str().unwrap())];
    let mut worker = Worker::start(dir.path(), &binary, None, &variables);
    worker.ask(&format!("private-inherit 16M {} 256M", dir.path().display()));
    worker.ask("region a 48M");
    worker.ask("fill a 1");
    worker.ask("fork child");
    worker.ask("fill a 2");
    worker.ask("child child verify a 1");
    worker.ask("child child fork grandchild");
    worker.ask("child child fill a 3");
    worker.ask("child child child grandchild verify a 1");
    worker.ask("verify a 2");
    assert_eq!(worker.ask("child-kill child"), "SIGKILL");
    worker.quit();
    wait_until("the daemon has ended", || {
        fmalloc_tests::process::with_argument(&dir.path().display().to_string()).is_empty()
    });
}

#[test]
fn many_children_work_at_once_within_one_budget() {
    let Some((daemon, mut worker)) = start("64M", "1G", "32M") else { return };
    worker.ask("region a 64M");
    worker.ask("fill a 1");
    let names: Vec<String> = (0..5).map(|n| format!("c{n}")).collect();
    for name in &names {
        worker.ask(&format!("fork {name}"));
        worker.ask(&format!("child {name} start job press a"));
    }
    std::thread::sleep(Duration::from_secs(2));
    let rows = daemon.json(&["clients"]);
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 6);
    let first = rows[0]["client"].as_u64().unwrap();
    for row in rows {
        assert_eq!(row["group"], first);
        assert_eq!(row["budget_bytes"], 32 * MIB);
    }
    assert!(rows[1..].iter().all(|row| row["parent"] == first));
    // What all inherited has been evicted by now.
    wait_until("all are within the budget", || {
        let rows = daemon.json(&["clients"]);
        let held = |row: &serde_json::Value| {
            row["resident_bytes"].as_u64().unwrap() + row["overhead_bytes"].as_u64().unwrap()
        };
        rows.as_array().unwrap().iter().map(held).sum::<u64>() <= 32 * MIB
    });
    assert_eq!(daemon.status("pool_granted_bytes"), 32 * MIB);
    for name in &names {
        worker.ask(&format!("child {name} stop job"));
        assert_eq!(worker.ask(&format!("child-wait {name}")), "exit 0", "{}", worker.stderr());
    }
    worker.ask("verify a 1");
    gone(daemon, worker);
}

#[test]
fn programs_that_join_a_group_share_its_budget_and_its_figures_stay() {
    let Some(daemon) = Daemon::start("32M", "512M") else { return };
    let mut maker = daemon.worker();
    let token = maker.ask("new-group 16M").as_str().unwrap().to_owned();
    assert_eq!(daemon.status("pool_granted_bytes"), 16 * MIB);
    let mut workers: Vec<Worker> = (0..2).map(|_| daemon.worker()).collect();
    for worker in &mut workers {
        worker.ask(&format!("connect-group {token}"));
        worker.ask("region a 32M");
        worker.ask("fill a 1 2");
    }
    // One that is idle gives what it has.
    workers[1].ask("fork child");
    workers[1].ask("child child verify a 1");
    workers[0].ask("verify a 1 2");
    workers[0].ask("verify a 1 2");
    workers[1].ask("verify a 1");
    assert_eq!(daemon.status("pool_granted_bytes"), 16 * MIB);
    let stats = |maker: &mut Worker, field: &str| {
        fmalloc_tests::daemon::number(&maker.ask(&format!("group-stats {token}")), field)
    };
    assert_eq!((stats(&mut maker, "members"), stats(&mut maker, "members_ever")), (3, 3));
    let out = stats(&mut maker, "pages_out");
    workers[1].ask("child-wait child");
    workers.into_iter().for_each(Worker::quit);
    wait_until("the members have ended", || stats(&mut maker, "members") == 0);
    assert_eq!(daemon.status("pool_granted_bytes"), 16 * MIB, "held by its maker");
    assert!(stats(&mut maker, "pages_out") >= out && out > 0);
    assert!(stats(&mut maker, "peak_resident_pages") > 0);
    assert_eq!(stats(&mut maker, "budget_bytes"), 16 * MIB);
    let mut late = daemon.worker();
    late.ask(&format!("connect-group {token}"));
    maker.kill();
    late.ask("region a 8M");
    late.ask("fill a 1");
    late.ask("verify a 1");
    gone(daemon, late);
}

#[test]
fn nobody_joins_a_group_without_its_token() {
    let Some(daemon) = Daemon::start("32M", "64M") else { return };
    let mut worker = daemon.worker();
    worker.ask("new-group 8M");
    let refused = worker.refused("connect-group 00000000000000000000000000000000");
    assert_eq!(refused.kind, "NotFound", "{refused:?}");
}
