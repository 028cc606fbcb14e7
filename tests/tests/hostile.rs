//! Clients that break the rules: refused or contained, and nobody else notices.

use std::time::{Duration, Instant};

use fmalloc_tests::rng::seed;
use fmalloc_tests::{Daemon, Worker, process};
use nix::sys::signal::Signal;

/// A daemon, and a client that works all the time and must not be disturbed.
struct Scene {
    daemon: Daemon,
    bystander: Worker,
    descriptors: usize,
}

impl Scene {
    fn new() -> Option<Self> {
        let daemon = Daemon::start("64M", "512M")?;
        let mut bystander = daemon.client("8M");
        bystander.ask("region a 32M");
        bystander.ask("start churn churn a 1 2 0");
        let descriptors = process::descriptors(daemon.pid());
        Some(Self { daemon, bystander, descriptors })
    }

    fn hostile(&self, case: &str) -> serde_json::Value {
        self.daemon.worker().ask(&format!("hostile {case}"))
    }

    /// The bystander has lost nothing, and what hostile clients had is back.
    fn end(mut self) {
        println!("{}", self.bystander.ask("stop churn"));
        fmalloc_tests::wait_until("only the bystander is left", || self.daemon.status("clients") == 1);
        assert_eq!(self.daemon.status("swap_claimed_bytes"), 32 << 20);
        fmalloc_tests::wait_until("descriptors are closed", || {
            process::descriptors(self.daemon.pid()) == self.descriptors
        });
        assert!(!self.daemon.log().contains("panicked"), "{}", self.daemon.log());
        self.bystander.quit();
        self.daemon.wait_until_empty();
    }
}

#[test]
fn what_is_no_fresh_userfaultfd_is_refused() {
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
    let pages = scene.hostile("silent").as_u64().unwrap();
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
    worker.signal(Signal::SIGSTOP);
    let client = scene.daemon.json(&["clients"])[1]["client"].to_string();
    let begin = Instant::now();
    let less = scene.daemon.ctl(&["limit", &client, "5M"]);
    assert!(!less.status.success(), "a stopped client gives nothing back");
    assert!(begin.elapsed() < Duration::from_secs(20));
    assert_eq!(scene.daemon.status("pool_granted_bytes"), 24 << 20, "its budget stays");
    assert!(scene.daemon.client("8M").ask("region b 8M").is_u64(), "others come and go");
    worker.signal(Signal::SIGCONT);
    worker.ask("stop churn");
    worker.quit();
    scene.end();
}

#[test]
fn client_that_tampers_with_the_ring_harms_itself_only() {
    let Some(scene) = Scene::new() else { return };
    let seed = seed();
    for n in 0..3 {
        println!("{} pages", scene.hostile(&format!("tamper {}", seed + n)));
    }
    scene.end();
}

#[test]
fn client_that_makes_its_userfaultfd_block_holds_up_nobody() {
    let Some(scene) = Scene::new() else { return };
    assert!(scene.hostile("blocking").as_u64() > Some(0));
    scene.end();
}

#[test]
fn packets_without_sense_are_dropped() {
    let Some(scene) = Scene::new() else { return };
    scene.hostile(&format!("no-sense {}", seed()));
    scene.end();
}

#[test]
fn client_that_hangs_up_keeps_its_slots_until_it_ends() {
    let Some(scene) = Scene::new() else { return };
    let mut worker = scene.daemon.worker();
    worker.ask("hostile abandon");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(scene.daemon.status("clients"), 2, "its memory may still be needed");
    worker.kill();
    scene.end();
}
