//! Workloads that touch pages: in order, at random, by Zipf. They share one filling of the memory. Writes add to the
//! counter of a page, so that their sum can be checked afterwards whatever the order was in which threads ran.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::Result;
use fmalloc_proto::PAGE_SIZE;
use fmalloc_proto::num::{to_u64, to_usize};
use nix::sys::resource::{UsageWho, getrusage};

use super::zipf::Zipf;
use super::{Tally, check, on_threads, share};
use crate::bench::child::Desk;
use crate::bench::content::{COUNTER, Content, WORDS};
use crate::bench::kinds::Workload;
use crate::bench::memory::Memory;
use crate::bench::plan::Latency;
use crate::rng::Rng;

/// YCSB's exponent.
const THETA: f64 = 0.99;
/// Of the operations by Zipf, one in so many writes.
const ONE_WRITE_IN: usize = 5;
/// The part of the RAM that the set has that fits: a budget also holds tables and buffers.
const FITS: (u64, u64) = (3, 4);
/// Passes over it: one takes milliseconds.
const PASSES: usize = 10;

/// One access to memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Touch {
    /// The page.
    pub(super) page: usize,
    /// The word to read; never the counter.
    pub(super) word: usize,
    /// Add one to the counter.
    pub(super) write: bool,
}

/// Fill, and what the plan wants of the rest, in order.
///
/// # Errors
/// A wrong byte, or what reporting says.
pub(crate) fn all(desk: &Desk, memory: &mut Memory) -> Result<()> {
    let bytes = memory.words().len() * 8;
    if desk.wants(Workload::Fill) {
        desk.measure(Workload::Fill, bytes, || {
            fill(&desk.content, memory.words());
            Ok(())
        })?;
    } else {
        desk.preparing("filling")?;
        fill(&desk.content, memory.words());
    }
    flip(desk, memory.words());
    if desk.wants(Workload::SeqRead) {
        desk.measure(Workload::SeqRead, bytes, || verify(&desk.content, memory.words(), None))?;
    }
    let pages = bytes / PAGE_SIZE;
    let mut written = vec![0_u32; pages];
    for workload in
        [Workload::RandRead1, Workload::Latency, Workload::RandRead8, Workload::RandWrite1, Workload::ZipfRw4]
    {
        if desk.wants(workload) {
            let threads = Threads::new(desk, workload, pages);
            let shared = memory.shared();
            desk.measure_faults(workload, threads.ops, || {
                if workload == Workload::Latency {
                    return threads.time_faults(&desk.content, shared).map(Some);
                }
                on_threads(threads.count, |thread| {
                    let mut tally = Tally::new(&desk.done);
                    threads.each(thread, |touch| {
                        tally.add();
                        apply(&desk.content, shared, touch)
                    })
                })
                .map(|()| None)
            })?;
            for thread in 0..threads.count {
                threads.each(thread, |touch| {
                    written[touch.page] += u32::from(touch.write);
                    Ok(())
                })?;
            }
        }
    }
    desk.preparing("verifying")?;
    verify(&desk.content, memory.words(), Some(&written))
}

/// Reads a set that fits into RAM again and again.
///
/// # Errors
/// A wrong byte, or what reporting says.
pub(crate) fn small(desk: &Desk, memory: &mut Memory) -> Result<()> {
    desk.preparing("filling")?;
    let set = to_usize(desk.plan.ram / FITS.1 * FITS.0) / PAGE_SIZE * WORDS;
    let words = &mut memory.words()[..set];
    fill(&desk.content, words);
    verify(&desk.content, words, None)?;
    flip(desk, words);
    desk.measure(Workload::Reread, PASSES * set * 8, || {
        (0..PASSES).try_for_each(|_| verify(&desk.content, words, None))
    })
}

/// Writes every page for the first time.
pub(super) fn fill(content: &Content, words: &mut [u64]) {
    words.chunks_exact_mut(WORDS).enumerate().for_each(|(index, page)| content.write(index, page));
}

/// Checks every byte; `added` is what has been added to each page's counter.
///
/// # Errors
/// The first page that is wrong.
pub(super) fn verify(content: &Content, words: &[u64], added: Option<&[u32]>) -> Result<()> {
    words.chunks_exact(WORDS).enumerate().try_for_each(|(index, page)| {
        let added = added.map_or(0, |added| u64::from(added[index]));
        check(content.is(index, page, added), || format!("page {index} is not what was written"))
    })
}

/// Changes a bit if the plan says so, as a faulty pager would.
pub(super) fn flip(desk: &Desk, words: &mut [u64]) {
    if desk.plan.flip {
        words[words.len() / 2] ^= 1;
    }
}

/// Does one access and checks what it reads.
///
/// # Errors
/// A wrong word.
pub(super) fn apply(content: &Content, words: &[AtomicU64], touch: Touch) -> Result<()> {
    let page = &words[touch.page * WORDS..][..WORDS];
    if touch.write {
        page[COUNTER].fetch_add(1, Ordering::Relaxed);
    }
    let right = page[touch.word].load(Ordering::Relaxed) == content.word(touch.page, touch.word);
    check(right, || format!("word {} of page {} is not what was written", touch.word, touch.page))
}

/// The accesses of a random workload: the same whenever they are asked for.
struct Threads {
    workload: Workload,
    pages: usize,
    seed: u64,
    ops: usize,
    count: usize,
    zipf: Option<Zipf>,
}

impl Threads {
    fn new(desk: &Desk, workload: Workload, pages: usize) -> Self {
        let count = match workload {
            Workload::RandRead8 => 8,
            Workload::ZipfRw4 => 4,
            _ => 1,
        };
        let zipf = (workload == Workload::ZipfRw4).then(|| Zipf::new(pages, THETA));
        // Percentiles do not need as many as a mean that others are compared with.
        let ops = if workload == Workload::Latency { desk.plan.ops / 4 } else { desk.plan.ops };
        Self { workload, pages, seed: desk.plan.seed, ops: ops.max(1), count, zipf }
    }

    /// Calls `act` with each access of a thread in turn.
    fn each(&self, thread: usize, mut act: impl FnMut(Touch) -> Result<()>) -> Result<()> {
        let name = to_u64(thread) << 8 | self.workload as u64;
        let mut rng = Rng::new(Rng::new(self.seed ^ name << 32).word());
        share(self.ops, self.count, thread).try_for_each(|_| {
            let page = match &self.zipf {
                Some(zipf) => zipf.page(&mut rng),
                None => rng.index(self.pages),
            };
            let write = match self.workload {
                Workload::RandWrite1 => true,
                Workload::ZipfRw4 => rng.index(ONE_WRITE_IN) == 0,
                _ => false,
            };
            act(Touch { page, word: rng.index(COUNTER), write })
        })
    }

    /// Times each access that faults, by the kernel's count.
    fn time_faults(&self, content: &Content, words: &[AtomicU64]) -> Result<Latency> {
        // Touched now: else keeping a time would itself fault.
        let mut nanoseconds = vec![1; self.ops];
        nanoseconds.clear();
        let mut before = faults()?;
        self.each(0, |touch| {
            let begin = Instant::now();
            let outcome = apply(content, words, touch);
            let elapsed = begin.elapsed();
            let after = faults()?;
            if after != before {
                nanoseconds.push(u32::try_from(elapsed.as_nanos()).unwrap_or(u32::MAX));
            }
            before = after;
            outcome
        })?;
        Ok(percentiles(&mut nanoseconds))
    }
}

fn faults() -> Result<i64> {
    let usage = getrusage(UsageWho::RUSAGE_THREAD)?;
    Ok(usage.minor_page_faults() + usage.major_page_faults())
}

fn percentiles(nanoseconds: &mut [u32]) -> Latency {
    nanoseconds.sort_unstable();
    // The smallest time that so many of a thousand do not exceed.
    let at = |thousandths: usize| {
        let rank = (nanoseconds.len() * thousandths).div_ceil(1000);
        nanoseconds.get(rank.saturating_sub(1)).map_or(0.0, |ns| f64::from(*ns) / 1e3)
    };
    Latency { faults: nanoseconds.len(), p50: at(500), p99: at(990), p999: at(999) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_ranks() {
        let mut times: Vec<u32> = (1..=1000).rev().map(|n| n * 1000).collect();
        let latency = percentiles(&mut times);
        assert_eq!((latency.p50, latency.p99, latency.p999), (500.0, 990.0, 999.0));
        assert_eq!(percentiles(&mut []).p50, 0.0);
    }
}
