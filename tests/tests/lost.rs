//! A daemon that is killed.

use std::time::{Duration, Instant};

use fmalloc_tests::{Daemon, wait_until};

#[test]
fn hazard_07_client_of_a_killed_daemon_waits_instead_of_reading_zeros_and_can_be_killed() {
    let Some(mut daemon) = Daemon::start("8M", "64M") else { return };
    let mut worker = daemon.client("8M");
    worker.ask("region a 64M");
    worker.ask("fill a 1");
    let resident = worker.ask("resident a");
    let (cold, hot) = (resident["a_cold"].as_u64().unwrap(), resident["a_resident"].as_u64().unwrap());
    daemon.kill();
    wait_until("the client notices", || worker.ask("health") == "DaemonGone");
    worker.ask(&format!("start cold touch a {cold}"));
    worker.ask("start again fill a 2 1 0 1M");
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(worker.ask("finished cold"), false, "a cold page was answered by nobody");
    assert_eq!(worker.ask("finished again"), false);
    worker.ask(&format!("verify a 1 1 {hot} 4K"));
    for call in ["stats", "region b 1M", "set-budget 16M", "discard a 0 4K", "advise a willneed"] {
        let refused = worker.refused(call);
        assert_eq!(refused.kind, "DaemonGone", "{call}: {}", refused.text);
    }
    let stderr = worker.stderr();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains("fmalloc") && stderr.contains("gone"), "{stderr}");
    let begin = Instant::now();
    worker.kill();
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn client_with_stderr_closed_and_nobody_waiting_ends_normally_without_its_daemon() {
    let Some(mut daemon) = Daemon::start("8M", "64M") else { return };
    let mut worker = daemon.client("8M");
    worker.ask("region a 1M");
    worker.ask("fill a 1");
    daemon.kill();
    wait_until("the client notices", || worker.ask("health") == "DaemonGone");
    worker.ask("drop a");
    worker.ask("disconnect");
    worker.quit();
}
