//! System calls on swapped memory, for a client without privileges.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use fmalloc_tests::process::NOBODY;
use fmalloc_tests::rng::seed;
use fmalloc_tests::{Daemon, Worker, place, process};

fn unprivileged() -> Option<(Daemon, Worker, PathBuf)> {
    let daemon = Daemon::start_with("8M", "256M", &["--allow-uid", &NOBODY.to_string()])?;
    let open = daemon.dir().join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    let mut worker = daemon.worker_of(NOBODY);
    worker.ask("connect 8M");
    let status = fs::read_to_string(format!("/proc/{}/status", worker.pid())).unwrap();
    assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
    assert!(process::is_alive(worker.pid()));
    Some((daemon, worker, open))
}

#[test]
fn write_from_and_read_into_swapped_memory_work_for_an_unprivileged_client() {
    let Some((_daemon, mut worker, dir)) = unprivileged() else { return };
    worker.ask("region a 48M");
    worker.ask("region b 48M");
    worker.ask("fill a 1 4");
    worker.ask("pipe-out a 1");
    worker.ask("pipe-in b 2");
    worker.ask("verify b 2");
    worker.ask(&format!("file-out a 1 {}", dir.join("out").display()));
    worker.ask(&format!("file-in b 3 {}", dir.join("in").display()));
    worker.ask("verify b 3");
    worker.ask("verify a 1");
    worker.quit();
}

#[test]
fn hazard_01_o_direct_beside_evictions_loses_nothing_for_an_unprivileged_client() {
    if !place::can_move() {
        return;
    }
    let Some((daemon, mut worker, dir)) = unprivileged() else { return };
    worker.ask("region a 32M");
    worker.ask("region b 32M");
    worker.ask("start pressure press b");
    worker.ask(&format!("direct a {} 150 4 {}", seed(), dir.join("file").display()));
    let rounds = worker.ask("stop pressure");
    println!("{rounds} rounds of pressure, {}", daemon.row(&mut worker));
    worker.ask("drop a");
    worker.ask("drop b");
    worker.quit();
    daemon.wait_until_empty();
}
