//! Daemons that a program starts for itself.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::fs;
use std::os::unix::fs::PermissionsExt;

use fmalloc_tests::process::NOBODY;
use fmalloc_tests::{Worker, place, process, wait_until};
use tempfile::TempDir;

/// A worker of root, or of somebody else, that starts its own daemon with swap in the directory `swap` beside it.
struct Private {
    worker: Worker,
    dir: TempDir,
}

impl Private {
    fn new(uid: Option<u32>) -> Option<Self> {
        place::can_page().then(|| {
            let dir = place::directory();
            let swap = dir.path().join("swap");
            fs::create_dir(&swap).unwrap();
            fs::set_permissions(&swap, fs::Permissions::from_mode(0o777)).unwrap();
            let daemon = place::share("fmallocd", dir.path());
            let binary = place::share("fmalloc-worker", dir.path());
            let variables = [("FMALLOC_DAEMON", daemon.to_str().unwrap())];
            Self { worker: Worker::start(dir.path(), &binary, uid, &variables), dir }
        })
    }

    fn command(&self, options: &str) -> String {
        format!("private 8M {} 128M {options}", self.dir.path().join("swap").display())
    }

    /// The daemon, by the directory that it was told about.
    fn daemons(&self) -> Vec<u32> {
        process::with_argument(&self.dir.path().join("swap").display().to_string())
    }

    fn assert_nothing_left(&self) {
        wait_until("the daemon ends with its client", || self.daemons().is_empty());
        let files = fs::read_dir(self.dir.path().join("swap")).unwrap().count();
        assert_eq!(files, 0, "files are left");
    }
}

#[test]
fn private_daemon_of_root_pages_and_ends_with_the_pager() {
    let Some(mut private) = Private::new(None) else { return };
    let mut times = Vec::new();
    for round in 0..5 {
        let command = private.command("");
        times.push(private.worker.ask(&command).as_u64().unwrap());
        private.worker.ask("children");
        assert_eq!(private.daemons().len(), 1);
        let files = fs::read_dir(private.dir.path().join("swap")).unwrap().count();
        assert_eq!(files, 0, "the swap file has a name");
        private.worker.ask("region a 32M");
        private.worker.ask(&format!("fill a {round} 2"));
        private.worker.ask(&format!("verify a {round} 2"));
        private.worker.ask("disconnect");
        private.assert_nothing_left();
    }
    println!("ready after {times:?} ms");
    assert!(times.iter().min() < Some(&200), "ready only after {times:?} ms");
    private.worker.ask("children");
}

#[test]
fn private_daemon_ends_when_its_client_exits_or_is_killed() {
    let Some(mut private) = Private::new(None) else { return };
    private.worker.ask(&private.command(""));
    private.worker.ask("region a 32M");
    private.worker.ask("fill a 1");
    let daemon = private.daemons()[0];
    private.worker.kill();
    private.assert_nothing_left();
    assert!(!process::is_alive(daemon));

    let Some(mut private) = Private::new(None) else { return };
    private.worker.ask(&private.command(""));
    private.worker.ask("region a 32M");
    private.worker.ask("fill a 1");
    let Private { worker, dir } = private;
    worker.quit();
    let swap = dir.path().join("swap").display().to_string();
    wait_until("the daemon ends with its client", || process::with_argument(&swap).is_empty());
}

#[test]
fn hazard_12_private_daemon_survives_what_ends_the_thread_that_started_it() {
    let Some(mut private) = Private::new(None) else { return };
    // Every command of a job runs on a thread that ends with it.
    let command = private.command("");
    private.worker.ask(&format!("start begin {command}"));
    private.worker.ask("finish begin");
    private.worker.ask("region a 32M");
    private.worker.ask("fill a 1");
    private.worker.ask("verify a 1");
    private.worker.ask("disconnect");
    private.assert_nothing_left();
}

#[test]
fn hazard_12_private_daemon_of_an_unprivileged_user_is_refused_with_what_would_help() {
    if restricted_userfaultfd_is_off() {
        return;
    }
    let Some(mut private) = Private::new(Some(NOBODY)) else { return };
    let command = private.command("");
    let refused = private.worker.refused(&command);
    assert_eq!(refused.kind, "NoUserfaultfd");
    for remedy in ["fmallocd service", "group", "vm.unprivileged_userfaultfd", "user_mode_only"] {
        assert!(refused.text.contains(remedy), "{}", refused.text);
    }
    private.assert_nothing_left();
}

#[test]
fn hazard_12_private_daemon_of_an_unprivileged_user_pages_in_user_mode_if_that_is_wanted() {
    let Some(mut private) = Private::new(Some(NOBODY)) else { return };
    let command = private.command("user-mode-only");
    private.worker.ask(&command);
    private.worker.ask("region a 32M");
    private.worker.ask("fill a 1 4");
    private.worker.ask("verify a 1 4");
    private.worker.ask("disconnect");
    private.assert_nothing_left();
}

/// Whether the system lets everybody have what this test wants to be refused.
fn restricted_userfaultfd_is_off() -> bool {
    let allowed = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
    allowed.trim() == "1"
}
