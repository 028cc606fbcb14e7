//! Clients that break the rules, or have bad luck: refused or contained, and nobody else notices. During each case a
//! well-behaved client's data is checked, and how long it waits for its faults is measured and printed beside what it
//! was before.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fmalloc_tests::daemon::number;
use fmalloc_tests::process::NOBODY;
use fmalloc_tests::rng::seed;
use fmalloc_tests::{Daemon, MIB, Worker, process, wait_until};
use nix::sys::signal::Signal;
use serde_json::Value;

/// One case at a time, for the sake of what is measured.
static ALONE: Mutex<()> = Mutex::new(());
/// How long the well-behaved client is watched before anything happens, and after.
const QUIET: Duration = Duration::from_millis(700);
/// A fault that took longer was held up by somebody.
const STALLED: u64 = 1_000_000;

/// A daemon, and two clients that work all the time and must not be disturbed: one is measured, one rewrites its memory
/// beside a shadow copy.
struct Scene {
    daemon: Daemon,
    measured: Worker,
    bystander: Worker,
    descriptors: usize,
    quiet: Value,
    _alone: MutexGuard<'static, ()>,
}

impl Scene {
    fn new() -> Option<Self> {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let daemon = Daemon::start_with("128M", "512M", &["--allow-uid", &NOBODY.to_string()])?;
        let mut bystander = daemon.client("8M");
        bystander.ask("region a 32M");
        bystander.ask("start churn churn a 1 1 0");
        let mut measured = daemon.client("8M");
        measured.ask("region m 24M");
        measured.ask("fill m 1");
        measured.ask("start meter meter m 1");
        std::thread::sleep(QUIET);
        let quiet = measured.ask("stop meter");
        measured.ask("start meter meter m 1");
        let descriptors = process::descriptors(daemon.pid());
        Some(Self { daemon, measured, bystander, descriptors, quiet, _alone: alone })
    }

    fn hostile(&self, case: &str) -> Value {
        self.daemon.worker().ask(&format!("hostile {case}"))
    }

    /// The well-behaved clients have lost nothing and were not held up, and what the others had is back.
    fn end(mut self) {
        std::thread::sleep(QUIET);
        let during = self.measured.ask("stop meter");
        println!("latency of faults, in µs: quiet {}, beside this {during}", self.quiet);
        assert!(number(&during, "faults") > 10, "{during}");
        assert!(number(&during, "max") < STALLED, "somebody held others up: {during}");
        println!("{}", self.bystander.ask("stop churn"));
        wait_until("only the well-behaved are left", || self.daemon.status("clients") == 2);
        assert_eq!(self.daemon.status("swap_claimed_bytes"), 56 * MIB);
        wait_until("descriptors are closed", || process::descriptors(self.daemon.pid()) == self.descriptors);
        assert!(!self.daemon.log().contains("panicked"), "{}", self.daemon.log());
        for worker in [&mut self.measured, &mut self.bystander] {
            assert_eq!((worker.stats("poisoned_pages"), worker.stats("io_errors")), (0, 0));
        }
        self.measured.quit();
        self.bystander.quit();
        self.daemon.wait_until_empty();
    }
}

#[test]
fn hazard_20_what_is_no_fresh_userfaultfd_is_refused() {
    let Some(scene) = Scene::new() else { return };
    let pipe = scene.hostile("attach-pipe");
    assert_eq!(pipe["code"], "Protocol", "{pipe}");
    let used = scene.hostile("attach-used");
    assert_eq!(used["code"], "Unsupported", "{used}");
    assert!(used["text"].as_str().unwrap().contains("done before"), "{used}");
    let staged = scene.hostile("attach-staged");
    assert_eq!(staged["early"]["code"], "Protocol", "{staged}");
    assert_eq!(staged["twice"]["code"], "Protocol", "{staged}");
    scene.end();
}

#[test]
fn hazard_20_userfaultfd_of_another_process_harms_those_two_only() {
    let Some(scene) = Scene::new() else { return };
    println!("{}", scene.hostile("attach-foreign"));
    scene.end();
}

#[test]
fn hazard_20_crowd_of_connections_locks_out_its_own_user_only() {
    let Some(scene) = Scene::new() else { return };
    let mut crowd = scene.daemon.worker_of(NOBODY);
    crowd.tell("hostile crowd 3000");
    std::thread::sleep(Duration::from_millis(500));
    let mut late = scene.daemon.client("8M");
    late.ask("region b 1M");
    late.ask("fill b 1");
    late.quit();
    let held = crowd.answer(fmalloc_tests::PATIENCE).unwrap().unwrap();
    println!("{held} connections of 3000");
    drop(crowd);
    scene.end();
}

#[test]
fn hazard_20_regions_past_the_limit_are_refused() {
    let Some(scene) = Scene::new() else { return };
    let got = scene.hostile("hoard 5000");
    println!("{got}");
    assert_eq!(got["regions"], 4096);
    assert_eq!(got["refusal"]["code"], "Limit", "{got}");
    scene.end();
}

#[test]
fn ranges_that_are_not_the_clients_own_free_memory_are_refused() {
    let Some(scene) = Scene::new() else { return };
    let answers = scene.hostile("ranges");
    for (what, answer) in answers.as_object().unwrap() {
        let expected = match what.as_str() {
            "good" => continue,
            "no region" => "NotFound",
            "more than there is" => "SwapFull",
            _ => "Invalid",
        };
        assert_eq!(answer["code"], expected, "{what}: {answer}");
    }
    assert!(answers["good"].as_str().unwrap().contains("Registered"), "{answers}");
    scene.end();
}

#[test]
fn client_that_never_evicts_gets_no_more_than_its_budget() {
    let Some(scene) = Scene::new() else { return };
    let mut silent = scene.daemon.worker();
    silent.tell("hostile silent");
    wait_until("it is shown what hinders the client", || {
        let rows = scene.daemon.json(&["clients"]);
        rows.as_array().unwrap().iter().any(|row| row["condition"] == "agent does not answer")
    });
    let pages = silent.answer(fmalloc_tests::PATIENCE).unwrap().unwrap().as_u64().unwrap();
    drop(silent);
    println!("{pages} pages");
    assert!(pages <= 2048, "{pages} pages for a budget of 2048");
    assert!(pages > 1000, "{pages} pages only");
    scene.end();
}

#[test]
fn stopped_client_holds_up_nobody_and_goes_on_afterwards() {
    let Some(scene) = Scene::new() else { return };
    let mut worker = scene.daemon.client("16M");
    worker.ask("region a 32M");
    worker.ask("start churn churn a 1 3 0");
    std::thread::sleep(Duration::from_millis(200));
    let client = worker.client().to_string();
    worker.signal(Signal::SIGSTOP);
    let begin = Instant::now();
    let less = scene.daemon.ctl(&["limit", &client, "5M"]);
    assert!(!less.status.success(), "a stopped client gives nothing back");
    assert!(begin.elapsed() < Duration::from_secs(20));
    assert_eq!(scene.daemon.status("pool_granted_bytes"), 32 * MIB, "its budget stays");
    assert!(scene.daemon.client("8M").ask("region b 8M").is_u64(), "others come and go");
    worker.signal(Signal::SIGCONT);
    worker.ask("stop churn");
    worker.quit();
    scene.end();
}

/// A memory control group, of either version.
struct Group(PathBuf);

impl Group {
    fn new(bytes: u64) -> Option<Self> {
        let name = format!("fmalloc-test-{}", std::process::id());
        for (root, file) in [
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            ("/sys/fs/cgroup", "memory.max"),
            ("/sys/fs/cgroup/unified", "memory.max"),
        ] {
            let dir = PathBuf::from(root).join(&name);
            let made = fs::create_dir(&dir).is_ok();
            let group = made.then_some(Self(dir));
            if let Some(group) = group
                && fs::write(group.0.join(file), bytes.to_string()).is_ok()
            {
                return Some(group);
            }
        }
        eprintln!("skipped: no control group with a memory limit can be made here");
        None
    }

    fn add(&self, worker: &Worker) {
        fs::write(self.0.join("cgroup.procs"), worker.pid().to_string()).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Empty as soon as its processes are gone for good.
        for _ in 0..200 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn hazard_16_client_at_the_limit_of_its_control_group_harms_itself_only() {
    let Some(scene) = Scene::new() else { return };
    let Some(group) = Group::new(20 * MIB) else { return scene.end() };
    // With a budget that fits, nothing happens to it.
    let mut fits = scene.daemon.worker();
    group.add(&fits);
    fits.ask("connect 8M");
    fits.ask("region a 32M");
    fits.ask("fill a 1 2");
    fits.ask("verify a 1 2");
    fits.quit();
    // With one that does not, what the daemon maps for it is refused, or the kernel ends it.
    let mut greedy = scene.daemon.worker();
    group.add(&greedy);
    greedy.ask("connect 64M");
    greedy.ask("region a 64M");
    greedy.tell("fill a 1 2");
    std::thread::sleep(Duration::from_secs(2));
    println!("process alive: {}", process::is_alive(greedy.pid()));
    greedy.kill();
    scene.end();
    drop(group);
}

#[test]
fn hazard_17_client_that_makes_its_userfaultfd_block_holds_up_nobody() {
    let Some(scene) = Scene::new() else { return };
    assert!(scene.hostile("blocking").as_u64() > Some(0));
    scene.end();
}

#[test]
fn hazard_18_client_that_keeps_its_address_space_busy_holds_up_nobody() {
    let Some(scene) = Scene::new() else { return };
    let mut worker = scene.daemon.client("8M");
    worker.ask("region a 24M");
    worker.ask("start churn churn a 1 1 0");
    println!("{} forks", worker.ask("fork-storm 256 2000"));
    worker.ask("stop churn");
    worker.quit();
    scene.end();
}

#[test]
fn hazard_19_client_that_tampers_with_the_ring_harms_itself_only() {
    let Some(scene) = Scene::new() else { return };
    let seed = seed();
    for n in 0..2 {
        println!("{} pages", scene.hostile(&format!("tamper {}", seed + n)));
    }
    scene.end();
}

#[test]
fn packets_without_sense_are_dropped() {
    let Some(scene) = Scene::new() else { return };
    scene.hostile(&format!("no-sense {}", seed()));
    scene.end();
}

#[test]
fn hazard_03_client_that_hangs_up_keeps_its_slots_until_it_ends() {
    let Some(scene) = Scene::new() else { return };
    let mut worker = scene.daemon.worker();
    worker.ask("hostile abandon");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(scene.daemon.status("clients"), 3, "its memory may still be needed");
    worker.kill();
    scene.end();
}
