//! Churn, as in UMap's tests: a set in steady use, which stays in RAM only if the pager notices, while reads all over the
//! rest push it out. An operation is one read of the rest and some accesses to the set.

use anyhow::Result;
use fmalloc_proto::PAGE_SIZE;
use fmalloc_proto::num::{to_u64, to_usize};

use super::pages::{Touch, apply, fill, flip, verify};
use super::{THREADS, Tally, on_threads, share};
use crate::bench::child::Desk;
use crate::bench::content::{COUNTER, WORDS};
use crate::bench::kinds::Workload;
use crate::bench::memory::Memory;
use crate::rng::Rng;

/// The set is this part of the RAM.
const SET: u64 = 4;
/// Accesses to the set after each read of the rest.
const ACCESSES: usize = 16;
/// One in so many of them writes.
const ONE_WRITE_IN: usize = 4;

/// Fills, churns, verifies.
///
/// # Errors
/// A wrong byte, or what reporting says.
pub(crate) fn all(desk: &Desk, memory: &mut Memory) -> Result<()> {
    desk.preparing("filling")?;
    fill(&desk.content, memory.words());
    flip(desk, memory.words());
    let pages = memory.words().len() / WORDS;
    let set = to_usize(desk.plan.ram / SET) / PAGE_SIZE;
    let shared = memory.shared();
    desk.measure(Workload::Churn, desk.plan.ops, || {
        on_threads(THREADS, |thread| {
            let mut tally = Tally::new(&desk.done);
            each(desk, pages, set, thread, |touch| {
                if touch.page >= set {
                    tally.add();
                }
                apply(&desk.content, shared, touch)
            })
        })
    })?;
    desk.preparing("verifying")?;
    let mut written = vec![0_u32; pages];
    for thread in 0..THREADS {
        each(desk, pages, set, thread, |touch| {
            written[touch.page] += u32::from(touch.write);
            Ok(())
        })?;
    }
    verify(&desk.content, memory.words(), Some(&written))
}

/// Calls `act` with each access of a thread in turn, the same whenever they are asked for.
fn each(
    desk: &Desk,
    pages: usize,
    set: usize,
    thread: usize,
    mut act: impl FnMut(Touch) -> Result<()>,
) -> Result<()> {
    let mut rng = Rng::new(Rng::new(desk.plan.seed ^ to_u64(thread) << 40).word());
    share(desk.plan.ops, THREADS, thread).try_for_each(|_| {
        let page = set + rng.index(pages - set);
        act(Touch { page, word: rng.index(COUNTER), write: false })?;
        (0..ACCESSES).try_for_each(|n| {
            let write = n % ONE_WRITE_IN == 0;
            act(Touch { page: rng.index(set), word: rng.index(COUNTER), write })
        })
    })
}
