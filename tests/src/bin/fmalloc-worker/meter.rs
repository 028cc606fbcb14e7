//! How long a well-behaved client waits for its faults, with its data checked all the while.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use fmalloc_proto::num::to_u64;
use fmalloc_tests::pattern;
use fmalloc_tests::rng::Rng;
use serde_json::json;

use crate::Outcome;
use crate::state::{Args, State};

/// Accesses that took less met no fault.
const FAULT: Duration = Duration::from_micros(3);
/// Between two accesses, so that other threads get on.
const PAUSE: Duration = Duration::from_micros(200);

/// `meter NAME SEED`: touches pages of a region that was filled with the pattern at random, and checks them, until it is
/// stopped. Gives the latencies of accesses that met a fault, in microseconds.
pub(crate) fn meter(state: &State, args: &mut Args<'_>, stop: &AtomicBool) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let seed = args.number()?;
    let mut rng = Rng::new(seed);
    let mut latencies = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let index = rng.index(memory.pages());
        let begin = Instant::now();
        std::hint::black_box(memory.page(index)[0]);
        let time = begin.elapsed();
        if time > FAULT {
            latencies.push(time);
        }
        pattern::check(seed, to_u64(index), memory.page(index)).map_err(|text| anyhow!(text))?;
        thread::sleep(PAUSE);
    }
    latencies.sort_unstable();
    let at =
        |part: usize| latencies.get((latencies.len() * part / 100).min(latencies.len().saturating_sub(1)));
    let micros =
        |time: Option<&Duration>| time.map_or(0, |time| time.as_micros().try_into().unwrap_or(u64::MAX));
    Ok(json!({
        "faults": latencies.len(),
        "p50": micros(at(50)),
        "p99": micros(at(99)),
        "max": micros(latencies.last()),
    }))
}
