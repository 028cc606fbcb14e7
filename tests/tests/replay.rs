//! How well the pager core chooses what to evict, counted on traces; see `fmalloc_tests::replay`.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use fmalloc_tests::replay::{Misses, replay, traces};

fn misses(name: &str, part: u64) -> Misses {
    let pages = 4096;
    let trace = traces(pages, 7).into_iter().find(|trace| trace.name == name).unwrap();
    replay(&trace, pages / part)
}

#[test]
fn nothing_beats_the_optimum_and_nothing_is_much_worse_than_first_in_first_out() {
    for trace in traces(2048, 3) {
        for part in [8, 4, 2] {
            let misses = replay(&trace, 2048 / part);
            assert!(
                misses.optimum <= misses.fmalloc.min(misses.lru).min(misses.fifo),
                "{} {misses:?}",
                trace.name
            );
            let most = misses.fifo + misses.fifo / 6 + trace.accesses.len() as u64 / 100;
            assert!(misses.fmalloc <= most, "{} {misses:?}", trace.name);
        }
    }
}

#[test]
fn pages_in_steady_use_survive_a_stream_of_others() {
    for part in [4, 2] {
        let misses = misses("churn", part);
        assert!(misses.fmalloc < misses.fifo, "{misses:?}");
    }
}

#[test]
fn skewed_use_gets_on_better_than_with_first_in_first_out() {
    for name in ["zipf", "zipf+scan"] {
        let misses = misses(name, 4);
        assert!(misses.fmalloc < misses.fifo, "{name} {misses:?}");
    }
}
