//! The allocator against a simple model, by random operations, on backings that refuse now and then; all records checked.

#![allow(clippy::cast_possible_truncation, reason = "random numbers are cut to size")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use super::backing::{Backing, Plain, Unavailable};
use super::{BadPointer, Core, ReallocError};

const PAGE: usize = super::class::PAGE;

/// Plain memory that knows what is committed, and refuses one call in `refuse`.
struct Moody {
    plain: Plain,
    committed: super::lock::Guarded<Vec<bool>>,
    calls: AtomicU32,
    refuse: u32,
}

impl Moody {
    fn new(len: usize, refuse: u32) -> Self {
        let plain = Plain::new(len).unwrap();
        let committed = super::lock::Guarded::new(vec![false; len / PAGE]);
        Self { plain, committed, calls: AtomicU32::new(0), refuse }
    }

    fn note(&self, range: &Range<usize>, from: bool, to: bool) -> Result<(), Unavailable> {
        assert!(range.start.is_multiple_of(PAGE) && range.end.is_multiple_of(PAGE) && !range.is_empty());
        let mut committed = self.committed.lock();
        for page in &mut committed[range.start / PAGE..range.end / PAGE] {
            assert_eq!(*page, from);
        }
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        if self.refuse > 0 && call % self.refuse == self.refuse - 1 {
            return Err(Unavailable);
        }
        committed[range.start / PAGE..range.end / PAGE].fill(to);
        Ok(())
    }
}

// SAFETY: as `Plain`, and sometimes refuses without doing anything.
unsafe impl Backing for Moody {
    fn base(&self) -> NonNull<u8> {
        self.plain.base()
    }

    fn reserved(&self) -> usize {
        self.plain.reserved()
    }

    fn commit(&self, range: Range<usize>) -> Result<(), Unavailable> {
        self.note(&range, false, true)?;
        self.plain.commit(range)
    }

    unsafe fn discard(&self, range: Range<usize>) -> Result<(), Unavailable> {
        self.note(&range, true, true)?;
        // SAFETY: the caller's.
        unsafe { self.plain.discard(range) }
    }

    unsafe fn decommit(&self, range: Range<usize>) -> Result<(), Unavailable> {
        self.note(&range, true, false)?;
        // SAFETY: the caller's.
        unsafe { self.plain.decommit(range) }
    }
}

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
        (self.word() % end as u64) as usize
    }

    /// Mostly small, of all magnitudes.
    fn size(&mut self, largest: usize) -> usize {
        let magnitude = 1 << self.below(largest.ilog2() as usize + 1);
        self.below(magnitude + 1)
    }

    fn align(&mut self) -> usize {
        if self.below(4) == 0 { 1 << self.below(22) } else { 16 }
    }
}

#[derive(Debug, Clone, Copy)]
struct Known {
    size: usize,
    mark: u8,
}

/// What should be in the heap.
struct Model<'a, B> {
    core: &'a Core<B>,
    blocks: BTreeMap<usize, Known>,
    misuse: u64,
}

fn pointer<B: Backing>(core: &Core<B>, addr: usize) -> NonNull<u8> {
    NonNull::new(core.backing().base().as_ptr().with_addr(addr)).unwrap()
}

/// Writes both ends of a block, and a byte of each page.
fn write(block: NonNull<u8>, size: usize, mark: u8) {
    for at in spots(size) {
        // SAFETY: the block has that many bytes.
        unsafe { block.add(at).write(mark) };
    }
}

fn assert_holds(block: NonNull<u8>, size: usize, mark: u8) {
    for at in spots(size) {
        // SAFETY: as above.
        assert_eq!(unsafe { block.add(at).read() }, mark, "byte {at} of {size}");
    }
}

fn spots(size: usize) -> impl Iterator<Item = usize> {
    (0..size.min(40)).chain((40..size).step_by(PAGE)).chain(size.saturating_sub(40).max(40)..size)
}

impl<B: Backing> Model<'_, B> {
    fn step(&mut self, rng: &mut Rng, largest: usize, most: usize) {
        // Rarely in large heaps, which would have nothing in them otherwise.
        let trims = most / 100 + 1;
        let pick = |rng: &mut Rng, blocks: &BTreeMap<usize, Known>| {
            let near = self.core.backing().base().addr().get() + rng.below(self.core.backing().reserved());
            let found = blocks.range(near..).next().or_else(|| blocks.first_key_value());
            found.map(|(addr, known)| (*addr, *known))
        };
        match rng.below(100) {
            0..50 if self.blocks.len() < most => {
                let (size, align) = (rng.size(largest), rng.align());
                let mark = rng.word() as u8;
                let zeroed = rng.below(3) == 0;
                let made =
                    if zeroed { self.core.alloc_zeroed(size, align) } else { self.core.alloc(size, align) };
                let Ok(block) = made else { return };
                if zeroed {
                    assert_holds(block, size, 0);
                }
                self.add(block, size, align, mark);
            }
            50..60 if !self.blocks.is_empty() => {
                let (addr, known) = pick(rng, &self.blocks).unwrap();
                let (size, align) = (rng.size(largest), rng.align());
                let old = pointer(self.core, addr);
                // SAFETY: nobody else knows the block.
                let made = unsafe { self.core.realloc(old, size, align) };
                assert!(!matches!(made, Err(ReallocError::BadPointer(_))));
                let Ok(block) = made else {
                    return assert_holds(old, known.size, known.mark);
                };
                self.blocks.remove(&addr);
                let same = known.size.min(size);
                (0..same.min(40)).for_each(|at| {
                    // SAFETY: the block has that many bytes.
                    assert_eq!(unsafe { block.add(at).read() }, known.mark);
                });
                self.add(block, size, align, known.mark);
            }
            60..95 if !self.blocks.is_empty() => {
                let (addr, known) = pick(rng, &self.blocks).unwrap();
                let block = pointer(self.core, addr);
                assert_holds(block, known.size, known.mark);
                self.blocks.remove(&addr);
                // SAFETY: nobody else knows the block.
                unsafe { self.core.free(block) }.unwrap();
                // SAFETY: the block is not in use, which is what shall be found.
                assert_eq!(unsafe { self.core.free(block) }, Err(BadPointer::NotInUse));
                assert!(self.core.usable_size(block).is_err());
                self.misuse += 1;
            }
            95..98 if !self.blocks.is_empty() => {
                let (addr, known) = pick(rng, &self.blocks).unwrap();
                let usable = self.core.usable_size(pointer(self.core, addr)).unwrap();
                assert!(usable >= known.size);
                let inside = pointer(self.core, addr + 1 + rng.below(usable - 1));
                // SAFETY: no block begins there, which is what shall be found.
                let bad = unsafe { self.core.free(inside) }.unwrap_err();
                // What is noted for a page inside of a large block is old, and may lead to anything.
                assert!(bad == BadPointer::NoBlock || usable > PAGE && bad == BadPointer::NotInUse);
                self.misuse += 1;
            }
            98 if rng.below(trims) == 0 => self.core.trim(rng.size(largest)),
            _ => {}
        }
    }

    fn add(&mut self, block: NonNull<u8>, size: usize, align: usize, mark: u8) {
        let addr = block.addr().get();
        assert!(addr.is_multiple_of(align.max(16)));
        let usable = self.core.usable_size(block).unwrap();
        assert!(usable >= size.max(1) && self.core.owns(block.as_ptr()));
        let before = self.blocks.range(..=addr).next_back();
        assert!(before.is_none_or(|(before, known)| before + known.size.max(1) <= addr));
        let behind = self.blocks.range(addr..).next();
        assert!(behind.is_none_or(|(behind, _)| addr + usable <= *behind));
        write(block, size, mark);
        self.blocks.insert(addr, Known { size, mark });
    }

    fn verify(&self) {
        self.core.check().unwrap();
        let stats = self.core.stats();
        assert_eq!(stats.used_blocks, self.blocks.len());
        assert_eq!(stats.misuse, self.misuse);
        let usable = |addr: &usize| self.core.usable_size(pointer(self.core, *addr)).unwrap();
        assert_eq!(stats.used_bytes, self.blocks.keys().map(usable).sum::<usize>());
        for (addr, known) in &self.blocks {
            assert_holds(pointer(self.core, *addr), known.size, known.mark);
        }
    }

    fn empty(mut self) {
        while let Some((addr, known)) = self.blocks.pop_first() {
            let block = pointer(self.core, addr);
            assert_holds(block, known.size, known.mark);
            // SAFETY: nobody else knows the block.
            unsafe { self.core.free(block) }.unwrap();
        }
        self.core.check().unwrap();
    }
}

fn seed() -> u64 {
    let given = std::env::var("FMALLOC_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let now = || std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    let seed = given.unwrap_or_else(now);
    println!("FMALLOC_TEST_SEED={seed}");
    seed
}

/// Picks blocks by address: the first at or after a random one, so `reserved` should not be far beyond what is used.
fn run(reserved: usize, refuse: u32, steps: usize, check_every: usize, largest: usize, most: usize) {
    let mut rng = Rng(seed());
    let core = Core::new(Moody::new(reserved, refuse)).unwrap();
    core.set_dirty_limit(rng.size(reserved / 4));
    let mut model = Model { core: &core, blocks: BTreeMap::new(), misuse: 0 };
    for step in 0..steps {
        model.step(&mut rng, largest, most);
        if step % check_every == 0 {
            model.verify();
        }
    }
    model.verify();
    model.empty();
    let all_given_back = |core: &Core<Moody>| {
        let stats = core.stats();
        (stats.used_blocks, stats.kept_bytes, stats.slab_bytes, stats.dirty_bytes, stats.committed_bytes)
    };
    // A backing that refuses may need several tries.
    for _ in 0..100 {
        core.trim(0);
    }
    assert_eq!(all_given_back(&core), (0, 0, 0, 0, 0));
    assert!(core.backing().committed.lock().iter().all(|page| !page));
}

#[test]
fn every_step_of_a_small_heap_leaves_records_that_agree() {
    run(3 << 20, 0, 20_000, 1, 300 << 10, 150);
}

#[test]
fn a_backing_that_refuses_costs_memory_but_never_order() {
    run(8 << 20, 3, 20_000, 7, 1 << 20, 300);
}

#[test]
fn blocks_of_all_sizes_agree_with_the_model() {
    run(256 << 20, 0, 100_000, 10_000, 1 << 20, 3000);
}

#[test]
fn two_million_operations_on_small_blocks_agree_with_the_model() {
    run(64 << 20, 1000, 2_000_000, 50_000, 2 << 10, 20_000);
}

#[test]
fn impossible_sizes_are_refused() {
    let core = Core::new(Plain::new(64 << 20).unwrap()).unwrap();
    for size in [65 << 20, usize::MAX, usize::MAX - 4095, isize::MAX as usize, 1 << 45, usize::MAX / 2] {
        for align in [1, 16, 4096, 2 << 20, 1 << 40, 1 << 63] {
            assert_eq!(core.alloc(size, align), Err(Unavailable), "{size} at {align}");
            assert_eq!(core.alloc_zeroed(size, align), Err(Unavailable), "{size} at {align}");
        }
    }
    assert_eq!(core.alloc(1, 1 << 63), Err(Unavailable));
    assert_eq!(core.alloc(1, 0), Err(Unavailable));
    assert_eq!(core.alloc(1, 48), Err(Unavailable));
    let block = core.alloc(100, 16).unwrap();
    // SAFETY: nobody else knows the block.
    let refused = unsafe { core.realloc(block, usize::MAX, 16) };
    assert_eq!(refused, Err(ReallocError::Unavailable(Unavailable)));
    assert_eq!(core.usable_size(block), Ok(112));
    core.check().unwrap();
}

#[test]
fn large_alignments_are_kept() {
    let core = Core::new(Plain::new(1 << 30).unwrap()).unwrap();
    for align in [8192, 64 << 10, 2 << 20, 64 << 20] {
        let block = core.alloc(100, align).unwrap();
        assert!(block.addr().get().is_multiple_of(align));
        assert_eq!(core.usable_size(block), Ok(4096));
    }
    core.check().unwrap();
}

#[test]
fn foreign_pointers_are_told_from_bad_ones() {
    let core = Core::new(Plain::new(1 << 20).unwrap()).unwrap();
    let mut local = 0_u8;
    let foreign = NonNull::from(&mut local);
    // SAFETY: no block begins at any of these, which is what shall be found.
    unsafe {
        assert_eq!(core.free(foreign), Err(BadPointer::Foreign));
        assert_eq!(core.realloc(foreign, 1, 1), Err(ReallocError::BadPointer(BadPointer::Foreign)));
        assert_eq!(core.free(core.backing().base()), Err(BadPointer::NotInUse));
        let end = NonNull::new(core.backing().base().as_ptr().wrapping_add(1 << 20)).unwrap();
        assert_eq!(core.free(end), Err(BadPointer::Foreign));
    }
    assert_eq!(core.stats().misuse, 4);
}

#[test]
fn blocks_of_one_size_share_pages_in_order() {
    let core = Core::new(Plain::new(64 << 20).unwrap()).unwrap();
    let blocks: Vec<usize> = (0..1000).map(|_| core.alloc(64, 16).unwrap().addr().get()).collect();
    let pages: std::collections::BTreeSet<usize> = blocks.iter().map(|addr| addr / PAGE).collect();
    assert!(pages.len() <= 1000_usize.div_ceil(64) + 1, "{} pages", pages.len());
    // Freed last, used first: it is most likely in RAM.
    let block = pointer(&core, blocks[500]);
    // SAFETY: nobody else knows the block.
    unsafe { core.free(block) }.unwrap();
    assert_eq!(core.alloc(64, 16), Ok(block));
}

#[test]
fn growing_at_the_top_or_into_free_pages_does_not_move() {
    let core = Core::new(Plain::new(256 << 20).unwrap()).unwrap();
    let block = core.alloc(1 << 20, 16).unwrap();
    write(block, 1 << 20, 7);
    for size in [2 << 20, 100 << 20, 30 << 10, 5 << 20] {
        // SAFETY: nobody else knows the block.
        assert_eq!(unsafe { core.realloc(block, size, 16) }, Ok(block));
        core.check().unwrap();
    }
    for at in (40..30 << 10).step_by(PAGE) {
        // SAFETY: the block has that many bytes, and these were written.
        assert_eq!(unsafe { block.add(at).read() }, 7);
    }
    assert_eq!(core.usable_size(block), Ok(5 << 20));
}

#[test]
fn memory_that_was_freed_is_dropped_beyond_the_limit() {
    let core = Core::new(Plain::new(256 << 20).unwrap()).unwrap();
    core.set_dirty_limit(1 << 20);
    let blocks: Vec<_> = (0..64).map(|_| core.alloc(1 << 20, 16).unwrap()).collect();
    for block in blocks {
        write(block, 1 << 20, 1);
        // SAFETY: nobody else knows the block.
        unsafe { core.free(block) }.unwrap();
        assert!(core.stats().dirty_bytes <= 1 << 20);
    }
    let zeros = core.alloc_zeroed(64 << 20, 16).unwrap();
    assert_holds(zeros, 64 << 20, 0);
}

/// The end of a scope waits for the work only; the heap takes over what a thread had when the thread itself has ended.
fn all_end(threads: Vec<std::thread::ScopedJoinHandle<'_, ()>>) {
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// Passes blocks between threads, each block filled with a pattern that is checked where it is freed.
#[test]
fn threads_get_different_blocks_and_free_those_of_others() {
    const THREADS: usize = 8;
    let core = Core::new(Plain::new(1 << 30).unwrap()).unwrap();
    core.set_dirty_limit(1 << 20);
    let first = seed();
    let mailboxes: Vec<std::sync::Mutex<Vec<(usize, usize, u8)>>> =
        (0..THREADS).map(|_| Default::default()).collect();
    // Two generations, so that slots are taken over.
    for generation in 0..3 {
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for thread in 0..THREADS {
                let (core, mailboxes) = (&core, &mailboxes);
                threads.push(scope.spawn(move || {
                    let mut rng = Rng(first ^ (thread + generation * THREADS) as u64);
                    let mut own: Vec<(usize, usize, u8)> = Vec::new();
                    let free = |(addr, size, mark): (usize, usize, u8)| {
                        let block = pointer(core, addr);
                        assert_holds(block, size, mark);
                        // SAFETY: whoever has the entry owns the block.
                        unsafe { core.free(block) }.unwrap();
                    };
                    for _ in 0..60_000 {
                        match rng.below(10) {
                            0..5 if own.len() < 2000 => {
                                let (size, mark) = (rng.size(100 << 10), rng.word() as u8);
                                let block = core.alloc(size, 16).unwrap();
                                write(block, size, mark);
                                own.push((block.addr().get(), size, mark));
                            }
                            0..7 if !own.is_empty() => {
                                let at = rng.below(own.len());
                                free(own.swap_remove(at));
                            }
                            7 | 8 if !own.is_empty() => {
                                let at = rng.below(own.len());
                                let entry = own.swap_remove(at);
                                mailboxes[rng.below(THREADS)].lock().unwrap().push(entry);
                            }
                            _ => {
                                let entries = std::mem::take(&mut *mailboxes[thread].lock().unwrap());
                                entries.into_iter().for_each(free);
                            }
                        }
                    }
                    own.into_iter().for_each(free);
                }));
            }
            all_end(threads);
        });
        core.check().unwrap();
    }
    for mailbox in mailboxes {
        for (addr, size, mark) in mailbox.into_inner().unwrap() {
            assert_holds(pointer(&core, addr), size, mark);
            // SAFETY: whoever has the entry owns the block.
            unsafe { core.free(pointer(&core, addr)) }.unwrap();
        }
    }
    core.check().unwrap();
    core.trim(0);
    let stats = core.stats();
    assert_eq!((stats.used_blocks, stats.committed_bytes, stats.misuse), (0, 0, 0), "{stats:?}");
    assert!(stats.slots <= 2 * THREADS + 2, "slots of threads that ended are used again: {}", stats.slots);
}

/// The owner of a slab collects what others free while they are at it: that is no second free.
#[test]
fn a_free_that_is_collected_at_once_succeeds() {
    const BLOCKS: usize = 400_000;
    let core = Core::new(Plain::new(256 << 20).unwrap()).unwrap();
    let (give, take) = std::sync::mpsc::sync_channel::<usize>(64);
    std::thread::scope(|scope| {
        let core = &core;
        let others = scope.spawn(move || {
            for addr in take {
                // SAFETY: whoever has the address owns the block.
                unsafe { core.free(pointer(core, addr)) }.unwrap();
            }
        });
        // Slabs of few blocks, so that they are soon used up and looked through again.
        for _ in 0..BLOCKS {
            give.send(core.alloc(8000, 16).unwrap().addr().get()).unwrap();
        }
        drop(give);
        all_end(vec![others]);
    });
    core.check().unwrap();
    assert_eq!((core.stats().used_blocks, core.stats().misuse), (0, 0));
}

/// All threads free the same blocks at the same time; each block must be freed once, whoever allocated it.
#[test]
fn of_frees_at_the_same_time_one_succeeds() {
    const THREADS: usize = 4;
    let core = Core::new(Plain::new(256 << 20).unwrap()).unwrap();
    let barrier = std::sync::Barrier::new(THREADS);
    let blocks = std::sync::Mutex::new(Vec::new());
    let freed = AtomicU32::new(0);
    let rounds = 300_u32;
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for thread in 0..THREADS {
            let (core, barrier, blocks, freed) = (&core, &barrier, &blocks, &freed);
            threads.push(scope.spawn(move || {
                for round in 0..rounds {
                    if round as usize % THREADS == thread {
                        let sizes = [16, 48, 64, 1024, 16 << 10, 20 << 10];
                        *blocks.lock().unwrap() =
                            (0..60).map(|n| core.alloc(sizes[n % 6], 16).unwrap().addr().get()).collect();
                    }
                    barrier.wait();
                    let all: Vec<usize> = blocks.lock().unwrap().clone();
                    barrier.wait();
                    for addr in all {
                        // SAFETY: nobody uses the blocks.
                        let done = unsafe { core.free(pointer(core, addr)) }.is_ok();
                        freed.fetch_add(done.into(), Ordering::Relaxed);
                    }
                    barrier.wait();
                }
            }));
        }
        all_end(threads);
    });
    let stats = core.stats();
    // Where the owner and another thread free in the same instant both may believe that they did; what counts is that the
    // block is free once, and that it was noticed in the end.
    core.trim(0);
    assert_eq!(core.stats().used_blocks, 0);
    core.check().unwrap();
    let (all, each) = (u64::from(rounds) * 60 * THREADS as u64, u64::from(rounds) * 60);
    let succeeded = u64::from(freed.load(Ordering::Relaxed));
    assert!(succeeded >= each, "{succeeded} of {each}: {stats:?}");
    assert!(core.stats().misuse >= all - succeeded);
    assert_eq!(core.stats().committed_bytes, 0);
}
