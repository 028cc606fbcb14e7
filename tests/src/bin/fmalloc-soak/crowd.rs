//! The clients of the soak.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use fmalloc_tests::rng::Rng;
use fmalloc_tests::{Daemon, PATIENCE, Worker, place};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::tally::{Tally, add};

/// Clients that come and go, one after the other, until it is over.
pub(crate) fn come_and_go(daemon: &Daemon, place: u64, mut rng: Rng, tally: &Tally, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        let visit = || {
            if rng.below(4) == 0 {
                hostile(daemon, &mut rng, tally)
            } else {
                well_behaved(daemon, place, &mut rng, tally)
            }
        };
        if catch_unwind(AssertUnwindSafe(visit)).is_err() {
            tally.failed("a client ended, or hung, where it should not: see above".to_owned());
            return;
        }
    }
}

/// One client that works on one region from the beginning to the end.
pub(crate) fn stay(daemon: &Daemon, mut rng: Rng, tally: &Tally, over: &AtomicBool) {
    let mut worker = daemon.client("8M");
    add(&tally.clients, 1);
    worker.ask("region a 40M");
    worker.ask(&format!("start churn churn a {} 2 0", rng.word() >> 8));
    while !over.load(Ordering::Relaxed) && worker.ask("finished churn") == false {
        thread::sleep(Duration::from_millis(200));
    }
    check(&mut worker, "stop churn", tally);
    worker.quit();
}

/// What a client does, step by step; each verifies what it wrote.
fn script(daemon: &Daemon, place: u64, rng: &mut Rng) -> Vec<String> {
    let (seed, time) = (rng.below(1 << 30) + 1, 300 + rng.below(2500));
    let file = daemon.dir().join(format!("file-{place}"));
    let file = file.display();
    let size = 6 + rng.below(26);
    let mut steps = vec![format!("connect {}M", 4 + rng.below(9)), format!("region a {size}M")];
    let press = ["region p 10M", "start press press p"];
    let more = match rng.below(if place::disabled().move_pages { 8 } else { 10 }) {
        0 => vec![format!("churn a {seed} {} {time}", 1 + rng.below(4))],
        1 => vec![format!("fill a {seed} 3"), format!("verify a {seed} 2"), format!("verify a {seed}")],
        2 => vec![press[0].into(), press[1].into(), format!("mix a {seed} 2 {time}"), "stop press".into()],
        3 => vec![press[0].into(), press[1].into(), format!("wander a {seed} {time}"), "stop press".into()],
        4 => vec![
            format!("pipe-in a {seed}"),
            format!("pipe-out a {seed}"),
            format!("file-out a {seed} {file}"),
            "madvise a dontneed".into(),
            "zeros a".into(),
        ],
        5 => vec![
            format!("start churn churn a {seed} 1 0"),
            format!("fork-storm 32 {time}"),
            "stop churn".into(),
        ],
        6 => vec![
            "region s 8M".into(),
            format!("slow-discard s {seed} 20"),
            format!("churn a {seed} 2 {time}"),
        ],
        7 => vec![press[0].into(), press[1].into(), format!("usurp {seed} 50"), "stop press".into()],
        8 => vec![
            press[0].into(),
            press[1].into(),
            format!("direct a {seed} 20 2 {file}"),
            "stop press".into(),
        ],
        _ => vec![
            format!("fill a {seed}"),
            "pin a 1M 512K".into(),
            press[0].into(),
            press[1].into(),
            format!("verify a {seed} 2"),
            "unpin".into(),
            format!("verify a {seed}"),
            "stop press".into(),
        ],
    };
    steps.extend(more);
    steps
}

/// A client whose data must be right whatever happens around it. Some are stopped for a while, some are killed.
fn well_behaved(daemon: &Daemon, place: u64, rng: &mut Rng, tally: &Tally) {
    let steps = script(daemon, place, rng);
    let fate = rng.below(6);
    let fatal = rng.index(steps.len());
    let mut worker = daemon.worker();
    add(&tally.clients, 1);
    for (n, step) in steps.iter().enumerate() {
        if fate < 2 && n == fatal {
            worker.tell(step);
            thread::sleep(Duration::from_micros(rng.below(800_000)));
            worker.kill();
            return add(&tally.kills, 1);
        }
        if fate == 2 && n == fatal {
            worker.tell(step);
            thread::sleep(Duration::from_micros(rng.below(100_000)));
            worker.signal(Signal::SIGSTOP);
            thread::sleep(Duration::from_micros(rng.below(1_500_000)));
            worker.signal(Signal::SIGCONT);
            add(&tally.stops, 1);
            match worker.answer(PATIENCE).unwrap_or_else(|| panic!("no answer after a stop: {step}")) {
                Ok(outcome) => count(step, &outcome, tally),
                Err(failed) if failed.kind == "PoolFull" => return add(&tally.refused, 1),
                Err(failed) => return tally.lost(format!("{step}, after a stop: {failed:?}\n{steps:?}")),
            }
            continue;
        }
        match worker.try_ask(step) {
            Ok(outcome) => count(step, &outcome, tally),
            Err(failed) if failed.kind == "PoolFull" => return add(&tally.refused, 1),
            Err(failed) => return tally.lost(format!("{step}: {failed:?}\n{steps:?}")),
        }
    }
    worker.quit();
}

fn check(worker: &mut Worker, step: &str, tally: &Tally) {
    match worker.try_ask(step) {
        Ok(outcome) => count(step, &outcome, tally),
        Err(failed) => tally.lost(format!("{step}: {failed:?}")),
    }
}

/// Adds up what a step has verified, which it answers with.
fn count(step: &str, outcome: &Value, tally: &Tally) {
    let verified = match step.split(' ').next() {
        Some("verify" | "mix" | "wander" | "slow-discard") => outcome.as_u64(),
        Some("pipe-out" | "file-out") => outcome.as_u64().map(|bytes| bytes / 4096),
        Some("churn" | "stop") => outcome["operations"].as_u64(),
        Some("usurp") => outcome["usurped"].as_u64(),
        _ => None,
    };
    add(&tally.verified, verified.unwrap_or(0));
}

/// A client that breaks the rules, or lies.
fn hostile(daemon: &Daemon, rng: &mut Rng, tally: &Tally) {
    let seed = rng.below(1 << 30);
    let case = match rng.below(10) {
        0 => "silent".to_owned(),
        1 => format!("tamper {seed}"),
        2 => "blocking".to_owned(),
        3 => format!("no-sense {seed}"),
        4 => "abandon".to_owned(),
        5 => "attach-foreign".to_owned(),
        6 => "ranges".to_owned(),
        7 => "hoard 300".to_owned(),
        8 => "crowd 200".to_owned(),
        _ => "attach-used".to_owned(),
    };
    let mut worker = daemon.worker();
    add(&tally.clients, 1);
    add(&tally.hostile, 1);
    worker.tell(&format!("hostile {case}"));
    // Whatever it is told: it may be refused for want of room, too.
    let _ = worker.answer(Duration::from_micros(rng.below(3_000_000)));
    worker.kill();
    add(&tally.kills, 1);
}
