//! A daemon that is told to end.

use std::time::Duration;

use fmalloc_tests::Daemon;
use nix::sys::signal::Signal;

#[test]
fn daemon_without_clients_ends_at_the_first_signal() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let Some(mut daemon) = Daemon::start("8M", "16M") else { return };
        daemon.signal(signal);
        let status = daemon.wait();
        assert!(status.success(), "{status}");
        assert!(!daemon.socket().exists(), "the socket is left behind");
    }
}

#[test]
fn daemon_that_shall_end_serves_its_clients_refuses_new_ones_and_ends_with_the_last() {
    let Some(mut daemon) = Daemon::start("16M", "64M") else { return };
    let mut worker = daemon.client("8M");
    worker.ask("region a 32M");
    worker.ask("fill a 1");
    let mut idle = daemon.client("4M");
    let mut late = daemon.worker();
    daemon.signal(Signal::SIGTERM);
    fmalloc_tests::wait_until("the daemon is draining", || daemon.json(&["status"])["draining"] == true);
    let refused = late.refused("connect 4M");
    assert_eq!(refused.kind, "Draining", "{}", refused.text);
    worker.ask("verify a 1");
    worker.ask("fill a 2 4");
    worker.ask("verify a 2 4");
    assert!(daemon.log().contains(&format!("pid={}", worker.pid())), "who it waits for is in the log");
    assert!(daemon.stays(Duration::from_millis(300)));
    worker.quit();
    let status = daemon.wait();
    assert!(status.success(), "{status}");
    assert_eq!(idle.ask("client"), 2);
}

#[test]
fn daemon_ends_at_the_second_signal_though_a_client_holds_memory() {
    let Some(mut daemon) = Daemon::start("8M", "64M") else { return };
    let mut worker = daemon.client("8M");
    worker.ask("region a 32M");
    worker.ask("fill a 1");
    daemon.signal(Signal::SIGTERM);
    fmalloc_tests::wait_until("the daemon is draining", || daemon.json(&["status"])["draining"] == true);
    daemon.signal(Signal::SIGTERM);
    let status = daemon.wait();
    println!("{status}");
    fmalloc_tests::wait_until("the client notices", || worker.ask("health") == "DaemonGone");
    let cold = worker.ask("resident a")["a_cold"].as_u64().unwrap();
    worker.ask(&format!("start cold touch a {cold}"));
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(worker.ask("finished cold"), false, "a cold page was answered by nobody");
}
