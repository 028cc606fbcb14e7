//! The disk fails now and then: once, for anybody, which must go unnoticed; or for good, for one client, which must be
//! told of every page that it loses.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fmalloc_tests::daemon::number;
use fmalloc_tests::failing::{FOR_EVER, Fault, Plan};
use fmalloc_tests::rng::Rng;
use fmalloc_tests::{Daemon, PATIENCE};

use crate::tally::{Tally, add};

/// A read that has failed is tried once more: two failures in a row would be a disk that fails for good.
const APART: Duration = Duration::from_secs(1);

/// Does so until it is told to end.
pub(crate) fn fail_now_and_then(
    daemon: &Daemon,
    plan: &Plan,
    mut rng: Rng,
    tally: &Tally,
    over: &AtomicBool,
) {
    while !over.load(Ordering::Relaxed) {
        if rng.below(4) == 0 {
            fail_for_good(daemon, plan, &mut rng, tally);
        } else {
            // A write that is lost unnoticed would be lost for good.
            let fault = Fault::ALL[rng.index(Fault::ALL.len() - 1)];
            plan.arm(fault, rng.below(50), 1, None);
            let begin = Instant::now();
            while plan.injected() == 0 && begin.elapsed() < APART && !over.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(20));
            }
            plan.disarm();
            add(&tally.injected, plan.injected());
        }
        thread::sleep(APART);
    }
}

fn fail_for_good(daemon: &Daemon, plan: &Plan, rng: &mut Rng, tally: &Tally) {
    let mut worker = daemon.worker();
    if worker.try_ask("connect 4M victim").is_err() {
        return add(&tally.refused, 1);
    }
    add(&tally.clients, 1);
    worker.ask("region a 8M");
    let fault = Fault::ALL[rng.index(Fault::ALL.len())];
    plan.arm(fault, rng.below(100), FOR_EVER, Some(worker.client()));
    worker.tell(&format!("endure a {} 300", rng.below(1 << 20)));
    // What cannot be written keeps it waiting until it can.
    let early = worker.answer(Duration::from_secs(3));
    plan.disarm();
    add(&tally.injected, plan.injected());
    match early.or_else(|| worker.answer(PATIENCE)) {
        Some(Ok(outcome)) => {
            let lost = number(&outcome, "lost");
            add(&tally.given_up, lost);
            add(&tally.verified, number(&outcome, "pages") - lost);
            if worker.stats("poisoned_pages") != lost {
                tally.failed(format!("{lost} pages are lost, {}", daemon.row(&mut worker)));
            }
        }
        Some(Err(failed)) => tally.lost(format!("with {fault:?} for good: {failed:?}")),
        None => tally.failed(format!("with {fault:?} for good: no end\n{}", daemon.row(&mut worker))),
    }
    worker.quit();
}
