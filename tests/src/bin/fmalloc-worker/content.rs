//! Workloads that write memory and check it.

use std::hint::black_box;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use fmalloc_client::PAGE_SIZE;
use fmalloc_proto::num::to_u64;
use fmalloc_tests::pattern::{self, WORDS};
use fmalloc_tests::rng::Rng;
use serde_json::{Value, json};

use crate::Outcome;
use crate::state::{Args, State};

/// Words of a cell: several of them share a page, and belong to different threads.
const CELL: usize = 8;

/// `fill NAME SEED [THREADS [OFFSET LENGTH]]`: writes the pattern.
pub(crate) fn fill(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let (seed, threads) = (args.number()?, args.number_or(1)?);
    let pages = whole_pages(&args.part(&memory)?);
    divided(threads, pages, |index| {
        pattern::write(seed, to_u64(index), memory.page(index));
        Ok(())
    })
}

/// `verify NAME SEED [THREADS [OFFSET LENGTH]]`: checks the pattern.
pub(crate) fn verify(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let (seed, threads) = (args.number()?, args.number_or(1)?);
    let pages = whole_pages(&args.part(&memory)?);
    divided(threads, pages, |index| pattern::check(seed, to_u64(index), memory.page(index)))
}

/// `zeros NAME [OFFSET LENGTH]`: checks that nothing is there.
pub(crate) fn zeros(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    for index in whole_pages(&args.part(&memory)?) {
        if let Some(at) = memory.page(index).iter().position(|word| *word != 0) {
            bail!("word {at} of page {index} is {:#x}", memory.page(index)[at]);
        }
    }
    Ok(Value::Null)
}

/// `touch NAME OFFSET`: reads a word.
pub(crate) fn touch(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let offset = args.bytes()?;
    Ok(black_box(memory.page(offset / PAGE_SIZE)[offset % PAGE_SIZE / 8]).into())
}

fn whole_pages(bytes: &Range<usize>) -> Range<usize> {
    bytes.start / PAGE_SIZE..bytes.end / PAGE_SIZE
}

/// Does something with each page, on some threads that have a stretch each.
fn divided(
    threads: usize,
    pages: Range<usize>,
    work: impl Fn(usize) -> Result<(), String> + Sync,
) -> Outcome {
    let (first, count, work) = (pages.start, pages.len(), &work);
    let stretch = |n: usize| first + count * n / threads..first + count * (n + 1) / threads;
    thread::scope(|scope| {
        let running: Vec<_> =
            (0..threads).map(|n| scope.spawn(move || stretch(n).try_for_each(work))).collect();
        running.into_iter().try_for_each(|thread| thread.join().unwrap())
    })
    .map_err(|text| anyhow!(text))?;
    Ok(count.into())
}

/// `churn NAME SEED THREADS MILLISECONDS`: reads, checks and rewrites cells at random and in stretches, each thread its
/// own, beside a shadow copy in other memory; then compares all of both. 0 goes on until it is stopped.
pub(crate) fn churn(state: &State, args: &mut Args<'_>, stop: &AtomicBool) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let (seed, threads, time): (u64, usize, u64) = (args.number()?, args.number()?, args.number()?);
    let mut shadow = memory.shadow.lock().unwrap();
    shadow.resize(memory.pages() * WORDS, 0);
    let cells = shadow.len() / CELL;
    let (region, copy) = (Words(memory.base()), Words(shadow.as_mut_ptr().expose_provenance()));
    let begin = Instant::now();
    let operations = AtomicU64::new(0);
    let work = |thread: usize| {
        let mut rng = Rng::new(seed ^ to_u64(thread) << 32);
        let own = cells / threads;
        let (mut at, mut done) = (0, 0);
        while !stop.load(Ordering::Relaxed) && (time == 0 || begin.elapsed() < Duration::from_millis(time)) {
            at = if rng.below(4) == 0 { rng.index(own) } else { (at + 1) % own };
            let cell = at * threads + thread;
            let (ours, theirs) = (region.cell(cell), copy.cell(cell));
            if ours != theirs {
                return Err(format!("cell {cell}: {ours:x?} instead of {theirs:x?}"));
            }
            let word = rng.index(CELL);
            ours[word] = rng.word();
            theirs[word] = ours[word];
            done += 1;
        }
        operations.fetch_add(done, Ordering::Relaxed);
        Ok(())
    };
    thread::scope(|scope| {
        let work = &work;
        let running: Vec<_> = (0..threads).map(|n| scope.spawn(move || work(n))).collect();
        running.into_iter().try_for_each(|thread| thread.join().unwrap())
    })
    .map_err(|text: String| anyhow!(text))?;
    for index in 0..memory.pages() {
        if *memory.page(index) != shadow[index * WORDS..(index + 1) * WORDS] {
            bail!("page {index} differs from the shadow copy");
        }
    }
    Ok(json!({ "operations": operations.into_inner() }))
}

/// Memory that threads share cell by cell.
struct Words(usize);

impl Words {
    #[allow(clippy::mut_from_ref, reason = "each cell is one thread's")]
    fn cell(&self, cell: usize) -> &mut [u64] {
        // SAFETY: callers stay within the memory, and each cell is used by one thread only.
        unsafe {
            std::slice::from_raw_parts_mut(
                std::ptr::with_exposed_provenance_mut(self.0 + cell * CELL * 8),
                CELL,
            )
        }
    }
}

/// `press NAME`: rewrites the region again and again so that everything else is evicted, and checks it each time, until
/// it is stopped.
pub(crate) fn press(state: &State, args: &mut Args<'_>, stop: &AtomicBool) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let mut round = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        for index in 0..memory.pages() {
            let page = memory.page(index);
            if round > 0 {
                pattern::check(round, to_u64(index), page).map_err(|text| anyhow!(text))?;
            }
            pattern::write(round + 1, to_u64(index), page);
            if stop.load(Ordering::Relaxed) {
                break;
            }
        }
        round += 1;
    }
    Ok(round.into())
}
