//! Tests of paging within one process that hold on every system. Each takes a budget's pager and compares all bytes.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says so by ending")]
#![allow(dead_code, unreachable_pub, reason = "shared by two test programs")]

use std::io::{Read, Seek, SeekFrom};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use fmalloc_client::{Advice, Error, LocalOptions, PAGE_SIZE, Pager, Region};

/// The least that every unit of paging but the largest allows.
pub const BUDGET: u64 = 10 << 20;
/// Sixteen times the budget.
pub const LARGE: usize = 160 << 20;

/// A pager for the tests.
pub fn pager(budget: u64, swap_size: u64) -> Pager {
    Pager::local(&LocalOptions::new(budget, swap_size)).unwrap()
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.word() % u64::try_from(end).unwrap()).unwrap()
    }
}

/// Peak of RAM within the budget, by the pager's own count.
fn within_budget(pager: &Pager) {
    let stats = pager.stats().unwrap();
    let peak = stats.peak_held_bytes;
    assert!(peak <= stats.budget_bytes, "{peak} bytes at the peak: {stats:?}");
    assert!(stats.resident_pages <= stats.peak_resident_pages);
    assert_eq!(stats.io_errors, 0);
}

/// Fills sixteen times the budget and reads it all back, twice, with threads.
pub fn pattern(pager: &Pager, threads: usize) {
    let mut region = Region::new(pager, LARGE).unwrap();
    let words = region.as_mut_slice_of::<u64>();
    let part = words.len() / threads;
    let each = |words: &mut [u64], work: &(dyn Fn(u64, &mut [u64]) + Sync)| {
        thread::scope(|scope| {
            for (number, part) in (0_u64..).zip(words.chunks_mut(part)) {
                scope.spawn(move || work(number, part));
            }
        });
    };
    each(words, &|seed, part| {
        let mut rng = Rng(seed);
        part.fill_with(|| rng.word());
    });
    for _ in 0..2 {
        each(words, &|seed, part| {
            let mut rng = Rng(seed);
            for (index, word) in part.iter().enumerate() {
                assert_eq!(*word, rng.word(), "word {index} of part {seed}");
            }
        });
    }
    within_budget(pager);
    let stats = pager.stats().unwrap();
    assert!(stats.pages_out > 0 && stats.pages_in > 0, "{stats:?}");
}

/// Many threads touch the same page at once, over and over: each finds what the others wrote.
pub fn stampede(pager: &Pager, threads: usize) {
    let mut region = Region::new(pager, 4 * usize::try_from(BUDGET).unwrap()).unwrap();
    let pages = region.len() / PAGE_SIZE;
    let base = region.as_mut_ptr().expose_provenance();
    // SAFETY: aligned, within the region, and used as atomics only while the region is borrowed.
    let counter = |page: usize| unsafe {
        AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut::<u64>(base + page * PAGE_SIZE))
    };
    let barrier = Barrier::new(threads);
    thread::scope(|scope| {
        for thread in 0..threads {
            let barrier = &barrier;
            scope.spawn(move || {
                for page in (0..pages).step_by(37) {
                    barrier.wait();
                    if thread % 2 == 0 {
                        counter(page).fetch_add(1, Ordering::Relaxed);
                    } else {
                        counter(page).load(Ordering::Relaxed);
                        counter(page).fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    for page in (0..pages).step_by(37) {
        assert_eq!(counter(page).load(Ordering::Relaxed), u64::try_from(threads).unwrap(), "page {page}");
    }
    within_budget(pager);
}

/// Random reads, changes and discards against a copy in ordinary memory.
pub fn shadow(pager: &Pager, seed: u64) {
    let mut region = Region::new(pager, 3 * usize::try_from(BUDGET).unwrap() + 12345).unwrap();
    let len = region.len();
    let mut shadow = vec![0_u8; len];
    let mut rng = Rng(seed);
    for step in 0..6000_u32 {
        let start = rng.below(len);
        let range = start..(start + 1 + rng.below(9000)).min(len);
        match rng.below(100) {
            0 => {
                let wide = start..(start + rng.below(1 << 20)).min(len);
                region.discard(wide.clone()).unwrap();
                shadow[wide].fill(0);
            }
            1..4 => region.advise(range, Advice::Cold).unwrap(),
            4..6 => region.advise(range, Advice::WillNeed).unwrap(),
            6..50 => {
                for (byte, copy) in region[range.clone()].iter_mut().zip(&mut shadow[range]) {
                    *byte = byte.wrapping_mul(31).wrapping_add(7);
                    *copy = copy.wrapping_mul(31).wrapping_add(7);
                }
            }
            _ => assert!(
                region[range.clone()] == shadow[range.clone()],
                "step {step} of seed {seed}, {range:?}"
            ),
        }
    }
    assert!(*region == *shadow, "at the end of seed {seed}");
    within_budget(pager);
}

/// Two regions of one budget, both larger than it; then one is dropped and its swap used again, by one that has zeros.
pub fn two_regions(pager: &Pager) {
    let len = 2 * usize::try_from(BUDGET).unwrap();
    let mut first = Region::new(pager, len).unwrap();
    let mut second = Region::new(pager, len).unwrap();
    for (index, (a, b)) in
        (0_u64..).zip(first.as_mut_slice_of::<u64>().iter_mut().zip(second.as_mut_slice_of::<u64>()))
    {
        (*a, *b) = (index, !index);
    }
    drop(first);
    let third = Region::new(pager, len).unwrap();
    let error = Region::new(pager, usize::try_from(1_u64 << 40).unwrap()).unwrap_err();
    assert!(matches!(error, Error::SwapFull { .. } | Error::Invalid { .. }), "{error}");
    let expected = (0_u64..).map(|index| !index);
    assert!(second.as_slice_of::<u64>().iter().copied().eq(expected.take(len / 8)));
    assert!(third.as_slice_of::<u64>().iter().all(|word| *word == 0), "zeros at first");
    within_budget(pager);
}

/// Pages that were never written cost no transfer, however often they are read.
pub fn never_written(pager: &Pager) {
    let before = pager.stats().unwrap();
    let region = Region::new(pager, 4 * usize::try_from(BUDGET).unwrap()).unwrap();
    for _ in 0..2 {
        assert!(region.as_slice_of::<u64>().iter().all(|word| *word == 0));
    }
    let stats = pager.stats().unwrap();
    assert_eq!((stats.pages_in, stats.pages_out), (before.pages_in, before.pages_out), "{stats:?}");
    within_budget(pager);
}

/// What was written once and is only read since is written out once.
pub fn clean(pager: &Pager) {
    let mut region = Region::new(pager, 4 * usize::try_from(BUDGET).unwrap()).unwrap();
    region.iter_mut().step_by(512).for_each(|byte| *byte = 3);
    region.advise(0..region.len(), Advice::Cold).unwrap();
    let sum = |region: &Region| region.iter().step_by(512).map(|byte| u64::from(*byte)).sum::<u64>();
    let expected = 3 * u64::try_from(region.len() / 512).unwrap();
    assert_eq!(sum(&region), expected);
    let before = pager.stats().unwrap();
    for _ in 0..2 {
        assert_eq!(sum(&region), expected);
    }
    let after = pager.stats().unwrap();
    assert_eq!(after.pages_out, before.pages_out, "clean pages were written again");
    assert!(after.pages_in > before.pages_in && after.pages_clean > before.pages_clean);
}

/// A region of which parts are committed only.
pub fn sparse(pager: &Pager) {
    let unit = 1 << 20;
    let mut region = Region::sparse(pager, 32 * unit).unwrap();
    region.commit(unit..3 * unit).unwrap();
    region[unit..3 * unit].fill(7);
    region.commit(2 * unit..5 * unit).unwrap();
    assert!(region[unit..3 * unit].iter().all(|byte| *byte == 7), "what was usable stays as it is");
    assert!(region[3 * unit..5 * unit].iter().all(|byte| *byte == 0));
    region.decommit(2 * unit..4 * unit).unwrap();
    region.commit(2 * unit..4 * unit).unwrap();
    assert!(region[unit..2 * unit].iter().all(|byte| *byte == 7));
    assert!(region[2 * unit..5 * unit].iter().all(|byte| *byte == 0), "decommitted content is gone");
    assert!(matches!(region.commit(0..64 * unit), Err(Error::Invalid { .. })));
    within_budget(pager);
}

/// The budget goes down and up while there is content.
pub fn budgets(pager: &Pager) {
    let mut region = Region::new(pager, 3 * usize::try_from(BUDGET).unwrap()).unwrap();
    let check = |region: &Region| {
        assert!((0_u64..).zip(region.as_slice_of::<u64>()).all(|(index, word)| *word == index));
    };
    (0_u64..).zip(region.as_mut_slice_of::<u64>()).for_each(|(index, word)| *word = index);
    pager.set_budget(BUDGET * 2).unwrap();
    check(&region);
    // On Linux a part of the budget may hold compressed pages instead.
    assert!(!cfg!(windows) || pager.stats().unwrap().resident_pages * PAGE_SIZE as u64 > BUDGET);
    pager.set_budget(BUDGET).unwrap();
    let stats = pager.stats().unwrap();
    assert!(stats.resident_pages * PAGE_SIZE as u64 <= BUDGET, "{stats:?}");
    assert_eq!((stats.budget_bytes, pager.budget()), (BUDGET, BUDGET));
    check(&region);
    assert!(matches!(pager.set_budget(4096), Err(Error::Invalid { .. } | Error::Refused { .. })));
    check(&region);
}

/// A file is read into a region and written from it, more than the budget has.
pub fn files(pager: &Pager, file: &mut (impl Read + std::io::Write + Seek)) {
    let len = 2 * usize::try_from(BUDGET).unwrap() + 777;
    let mut region = Region::new(pager, len + 1000).unwrap();
    let mut rng = Rng(1);
    region.iter_mut().for_each(|byte| *byte = rng.word().to_le_bytes()[0]);
    region.write_from(500..500 + len, &mut *file).unwrap();
    let mut copy = Region::new(pager, len).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    copy.read_into(0..len, &mut *file).unwrap();
    assert!(*copy == region[500..500 + len]);
    let end = copy.read_into(0..1, &mut *file).unwrap_err();
    assert_eq!(end.kind(), std::io::ErrorKind::UnexpectedEof);
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut guard = copy.pin_mut(100..5000).unwrap();
    file.read_exact(&mut guard).unwrap();
    drop(guard);
    assert!(copy[100..5000] == region[500..5400]);
    assert!(copy.pin(5..len + 1).is_err(), "outside");
    assert_eq!(pager.stats().unwrap().unevictable_pages, 0);
}

/// Regions come and go while other threads fault in theirs.
pub fn coming_and_going(pager: &Pager, threads: usize) {
    thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                let mut rng = Rng(u64::try_from(thread).unwrap());
                for round in 0..12_u64 {
                    let len = PAGE_SIZE * (1 + rng.below(800));
                    let mut region = Region::new(pager, len).unwrap();
                    assert!(region.iter().step_by(1000).all(|byte| *byte == 0), "zeros at first");
                    let seed = rng.word();
                    let mut values = Rng(seed);
                    region
                        .as_mut_slice_of::<u64>()
                        .iter_mut()
                        .step_by(5)
                        .for_each(|word| *word = values.word());
                    let mut values = Rng(seed);
                    let same =
                        region.as_slice_of::<u64>().iter().step_by(5).all(|word| *word == values.word());
                    assert!(same, "round {round} of thread {thread}");
                }
            });
        }
    });
    within_budget(pager);
    let stats = pager.stats().unwrap();
    assert_eq!((stats.resident_pages, stats.claimed_pages, stats.swapped_pages), (0, 0, 0), "{stats:?}");
}
