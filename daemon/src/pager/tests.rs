//! What the core decides in plain cases, told step by step. Histories of all kinds are in `model`.

use fmalloc_proto::PAGE;
use fmalloc_proto::messages::Advice;
use fmalloc_proto::ring::{BatchKind, Layout, PageResult};

use super::page::{Buffer, PageId, Slot, State};
use super::{Action, Content, Packed, Pager, Sizes, Source, Stop, Store, Transfer, warm};
use crate::arena::Arena;

const BASE: u64 = 0x10_0000;
const BATCH: u32 = 16;

/// Slots from first to last, none ever used again.
#[derive(Debug, Default)]
struct Endless {
    next: Slot,
    given: Vec<Slot>,
}

impl Store for Endless {
    fn take(&mut self, want: u32) -> Option<(Slot, u32)> {
        self.next += want;
        Some((self.next - want, want))
    }

    fn share(&mut self, _: Slot) -> bool {
        true
    }

    fn give(&mut self, slot: Slot) {
        self.given.push(slot);
    }

    fn claim_page(&mut self) -> bool {
        true
    }
}

/// A pager with one region, whose maps succeed at once. All other actions are kept.
struct Bench {
    pager: Pager<Endless>,
    /// First page and number of pages of each map.
    maps: Vec<(u64, u64, Source)>,
    actions: Vec<Action>,
    /// Page, and the first eight bytes from which it was unpacked.
    unpacked: Vec<(u64, u64)>,
}

impl Bench {
    fn new(frames: u64, pages: u64) -> Self {
        let ring = Layout::new(2, BATCH).unwrap();
        let mut sizes = Sizes { budget: 0, ring, read_buffers: 128, write_buffers: 32 };
        // Page tables take a little too.
        sizes.budget = sizes.overhead() + (frames + 4 * pages.div_ceil(512)) * PAGE;
        let mut pager = Pager::new(Endless::default(), Arena::new().unwrap(), sizes);
        assert_eq!(pager.register(BASE, pages * PAGE, true, String::new()), Ok(0));
        Self { pager, maps: Vec::new(), actions: Vec::new(), unpacked: Vec::new() }
    }

    fn run(&mut self) {
        while let Some(action) = self.pager.next_action() {
            if let Action::Map { page, pages, source, .. } = action {
                self.maps.push((page.index(), pages, source));
                self.pager.mapped(page, pages, pages, None);
            } else if let Action::Unpack { page, from: Packed::Bytes { offset, len }, .. } = action {
                let bytes = self.pager.packed_bytes(offset, len);
                self.unpacked.push((page.index(), u64::from_le_bytes(bytes[..8].try_into().unwrap())));
                self.pager.unpacked(page, true);
            } else {
                self.actions.push(action);
            }
        }
    }

    /// A fault on page `index`; gives what was mapped.
    fn fault(&mut self, index: u64) -> Vec<(u64, u64, Source)> {
        self.maps.clear();
        self.pager.fault(BASE + index * PAGE, false);
        self.run();
        self.maps.clone()
    }

    fn state(&self, index: u64) -> State {
        self.pager.word(PageId::new(0, index)).state()
    }

    /// The agent's batches that wait for an answer: number and pages.
    fn asked(&mut self) -> Vec<(u32, Vec<u64>)> {
        let asked = self.actions.extract_if(.., |action| matches!(action, Action::Ask { .. }));
        let batches: Vec<u32> = asked
            .map(|action| match action {
                Action::Ask { batch, kind: BatchKind::Evict } => batch,
                other => panic!("{other:?}"),
            })
            .collect();
        let pages = |batch| self.pager.batch_pages(batch).iter().map(|page| page.index()).collect();
        batches.iter().map(|batch| (*batch, pages(*batch))).collect()
    }

    /// Answers a batch: page `n` holds `content(n)`; zero is zeros.
    fn answer(&mut self, batch: u32, content: impl Fn(u64) -> u64) {
        for page in self.pager.batch_pages(batch).to_vec() {
            let buffer = self.pager.take_write_buffer().unwrap();
            let hash = content(page.index());
            let content = Content { hash, fill: (hash == 0).then_some(0) };
            if !self.pager.evicted(page, content, None, buffer) {
                self.pager.give_write_buffer(buffer);
            }
        }
        self.pager.batch_ended(batch);
        self.run();
    }

    /// Evicts all that a drain of `pages` pages of the region chooses; gives the pages in the order in which they went.
    fn evict(&mut self, pages: u64, content: impl Fn(u64) -> u64) -> Vec<u64> {
        self.pager.drain(1, None, pages);
        self.run();
        let mut gone = Vec::new();
        loop {
            let asked = self.asked();
            if asked.is_empty() {
                return gone;
            }
            for (batch, pages) in asked {
                gone.extend(pages);
                self.answer(batch, &content);
                self.end_writes();
            }
        }
    }

    /// Evicts one hot page with these bytes; gives its state then.
    fn evict_packed(&mut self, index: u64, hash: u64, packed: Option<&[u8]>) -> State {
        self.pager.drain(u64::MAX, Some((0, index..index + 1)), 1);
        self.run();
        for (batch, _) in self.asked() {
            let buffer = self.pager.take_write_buffer().unwrap();
            let page = PageId::new(0, index);
            if !self.pager.evicted(page, Content { hash, fill: None }, packed, buffer) {
                self.pager.give_write_buffer(buffer);
            }
            self.pager.batch_ended(batch);
        }
        self.run();
        self.state(index)
    }

    fn transfers(&mut self, write: bool) -> Vec<Transfer> {
        let wanted = |action: &mut Action| match action {
            Action::Read(_) => !write,
            Action::Write(_) => write,
            _ => false,
        };
        let found: Vec<Action> = self.actions.extract_if(.., wanted).collect();
        let transfer = |action| match action {
            Action::Read(transfer) | Action::Write(transfer) => transfer,
            other => panic!("{other:?}"),
        };
        found.into_iter().map(transfer).collect()
    }

    fn end_writes(&mut self) -> u32 {
        let mut pages = 0;
        for transfer in self.transfers(true) {
            pages += transfer.pages;
            self.pager.write_ended(transfer.op, true);
        }
        self.run();
        pages
    }

    /// Ends all reads; gives the pages that each brought.
    fn end_reads(&mut self) -> Vec<Vec<u64>> {
        let transfers = self.transfers(false);
        let mut all = Vec::new();
        for transfer in transfers {
            let pages: Vec<u64> = self.pager.op_pages(transfer.op).iter().map(|page| page.index()).collect();
            (0..pages.len()).for_each(|n| self.pager.page_read(transfer.op, n, true));
            self.pager.read_ended(transfer.op);
            all.push(pages);
        }
        self.run();
        all
    }

    /// Pages 0 to `pages`, written by the program and evicted to neighbouring slots.
    fn with_cold(frames: u64, pages: u64) -> Self {
        let mut bench = Self::new(frames, pages.max(1024));
        bench.pager.advise(0, 0..1024, Advice::Random);
        (0..pages).for_each(|index| drop(bench.fault(index)));
        bench.evict(u64::MAX, |index| index + 1);
        assert!((0..pages).all(|index| bench.state(index) == State::Cold));
        bench.pager.advise(0, 0..1024, Advice::Normal);
        bench
    }
}

#[test]
fn first_touches_in_sequence_are_mapped_in_growing_batches() {
    let mut bench = Bench::new(4096, 2048);
    let mut next = 0;
    let mut batches = Vec::new();
    while next < 1000 {
        let maps = bench.fault(next);
        assert_eq!(maps.len(), 1);
        assert_eq!((maps[0].0, maps[0].2), (next, Source::Zeros));
        batches.push(maps[0].1);
        next += maps[0].1;
    }
    assert_eq!(batches, [1, 8, 16, 32, 64, 128, 256, 256, 256]);
}

#[test]
fn scattered_first_touches_are_mapped_one_by_one() {
    let mut bench = Bench::new(4096, 2048);
    for index in [500, 3, 1000, 77, 502] {
        assert_eq!(bench.fault(index), [(index, 1, Source::Zeros)]);
    }
}

#[test]
fn sequential_reads_fetch_windows_whose_first_page_is_held() {
    let mut bench = Bench::with_cold(2048, 600);
    // Two faults make a stream.
    bench.fault(0);
    assert_eq!(bench.end_reads(), [[0]]);
    bench.fault(1);
    let reads = bench.end_reads();
    assert_eq!(reads[0], [1]);
    // Page 2 comes next anyway: the first window has no tripwire, the second has.
    assert_eq!(reads[1..], [(2..10).collect::<Vec<_>>(), (10..26).collect()]);
    assert!((2..10).chain(11..26).all(|index| bench.state(index) == State::Hot));
    assert_eq!(bench.state(10), State::Held);
    // The reader comes to the tripwire: it is mapped at once, and the next window is read.
    assert_eq!(bench.fault(10).len(), 1);
    assert_eq!(bench.state(10), State::Hot);
    assert_eq!(bench.end_reads(), [(26..58).collect::<Vec<_>>()]);
    assert_eq!(bench.state(26), State::Held);
    assert_eq!(bench.fault(26).len(), 1);
    assert_eq!(bench.end_reads(), [(58..90).collect::<Vec<_>>()]);
}

#[test]
fn random_advice_switches_readahead_off() {
    let mut bench = Bench::with_cold(2048, 100);
    bench.pager.advise(0, 0..100, Advice::Random);
    for index in 0..10 {
        bench.fault(index);
        assert_eq!(bench.end_reads(), [[index]]);
    }
}

#[test]
fn willneed_reads_a_range_and_maps_it() {
    let mut bench = Bench::with_cold(2048, 300);
    bench.pager.advise(0, 0..300, Advice::WillNeed);
    bench.run();
    while !bench.end_reads().is_empty() {}
    assert!((0..300).all(|index| bench.state(index) == State::Hot));
}

#[test]
fn readers_that_never_come_do_not_keep_the_buffers() {
    let mut bench = Bench::with_cold(2048, 900);
    for start in (0..880).step_by(30) {
        for index in [start, start + 1] {
            bench.fault(index);
            bench.end_reads();
            assert_eq!(bench.state(index), State::Hot);
        }
    }
    assert!((0..900).filter(|index| bench.state(*index) == State::Held).count() <= 32);
}

#[test]
fn clean_pages_are_not_written_again() {
    let mut bench = Bench::with_cold(256, 4);
    let slots = bench.pager.store.next;
    for index in 0..4 {
        bench.fault(index);
        bench.end_reads();
    }
    bench.pager.drain(1, None, 10);
    bench.run();
    // Page 2 has changed.
    for (batch, _) in bench.asked() {
        bench.answer(batch, |index| if index == 2 { 99 } else { index + 1 });
    }
    assert_eq!(bench.end_writes(), 1);
    assert_eq!(bench.pager.store.next, slots + 1);
    assert_eq!(bench.pager.store.given, [2]);
    assert_eq!(bench.pager.stats().pages_clean, 3);
    assert!((0..4).all(|index| bench.state(index) == State::Cold));
}

#[test]
fn zero_pages_take_no_slot() {
    let mut bench = Bench::new(256, 64);
    (0..10).for_each(|index| drop(bench.fault(index)));
    bench.evict(100, |_| 0);
    assert!((0..10).all(|index| bench.state(index) == State::Zero));
    assert_eq!((bench.pager.store.next, bench.pager.stats().pages_out), (0, 0));
    assert_eq!(bench.pager.stats().resident_pages, 0);
}

#[test]
fn pages_leave_in_the_order_in_which_they_came() {
    let mut bench = Bench::new(256, 2048);
    let order = [700, 3, 1500, 42, 0, 900, 77, 5];
    order.iter().for_each(|index| drop(bench.fault(*index)));
    assert_eq!(bench.evict(3, |index| index + 1), [700, 3, 1500]);
    // What comes back soon is worth more than what is new.
    bench.fault(3);
    bench.end_reads();
    bench.fault(1000);
    assert_eq!(bench.evict(100, |index| index + 1), [42, 0, 900, 77, 5, 1000, 3]);
}

#[test]
fn pages_in_use_survive_a_scan() {
    let mut bench = Bench::new(256, 4096);
    bench.pager.advise(0, 0..4096, Advice::Random);
    let answer = |bench: &mut Bench| {
        for (batch, _) in bench.asked() {
            bench.answer(batch, |index| index + 1);
        }
        bench.end_writes();
        bench.end_reads();
    };
    // A working set that has been evicted once and came back, then many pages that are touched once.
    for round in 0..2 {
        (0..64).for_each(|index| drop(bench.fault(index)));
        answer(&mut bench);
        if round == 0 {
            assert_eq!(bench.evict(64, |index| index + 1).len(), 64);
        }
    }
    for index in 100..2000 {
        bench.fault(index);
        answer(&mut bench);
    }
    assert!((0..64).all(|index| bench.state(index) == State::Hot));
}

#[test]
fn backward_and_strided_readers_are_read_ahead_for() {
    for (step, start) in [(-1, 900_u64), (3, 10), (-7, 900)] {
        let mut bench = Bench::new(2048, 1024);
        bench.pager.advise(0, 0..1024, Advice::Random);
        (0..1000).for_each(|index| drop(bench.fault(index)));
        bench.evict(2000, |index| index + 1);
        bench.pager.advise(0, 0..1024, Advice::Normal);
        let mut waits = 0;
        for n in 0..100 {
            let index = start.checked_add_signed(n * step).unwrap();
            if bench.state(index) != State::Hot {
                waits += u32::from(bench.state(index) == State::Cold);
                bench.fault(index);
                while !bench.end_reads().is_empty() {}
            }
            assert_eq!(bench.state(index), State::Hot);
        }
        assert!(waits <= 4, "step {step}: waited {waits} times");
    }
}

#[test]
fn packed_pages_come_back_without_the_swap_file_and_leave_it_when_the_pool_shrinks() {
    let mut bench = Bench::new(1024, 1024);
    bench.pager.advise(0, 0..1024, Advice::Random);
    bench.pager.warm_limit = 400_000 / warm::SEGMENT;
    (0..200).for_each(|index| drop(bench.fault(index)));
    bench.pager.drain(u64::MAX, None, 200);
    bench.run();
    loop {
        let asked = bench.asked();
        if asked.is_empty() {
            break;
        }
        for (batch, _) in asked {
            for page in bench.pager.batch_pages(batch).to_vec() {
                let buffer = bench.pager.take_write_buffer().unwrap();
                let hash = page.index() + 1;
                assert!(bench.pager.wants_packed(page, hash));
                let packed = hash.to_le_bytes().repeat(200);
                assert!(!bench.pager.evicted(page, Content { hash, fill: None }, Some(&packed), buffer));
                bench.pager.give_write_buffer(buffer);
            }
            bench.pager.batch_ended(batch);
            bench.run();
        }
    }
    assert!((0..200).all(|index| bench.state(index) == State::Warm));
    let stats = bench.pager.stats();
    assert_eq!(
        (stats.packed_pages, stats.swapped_pages, stats.resident_pages, stats.slots),
        (200, 200, 0, 0)
    );
    assert!(stats.packed_bytes >= 200 * 1600 && stats.packed_bytes < 200 * 2000, "{stats:?}");
    bench.fault(7);
    assert_eq!((bench.state(7), bench.unpacked.clone()), (State::Hot, vec![(7, 8)]));
    assert_eq!(bench.pager.stats().faults_packed, 1);
    // Evicted again and unchanged, the copy still serves: nothing is packed anew.
    assert_eq!(bench.evict_packed(7, 8, None), State::Warm);
    bench.fault(7);
    assert_eq!(bench.evict_packed(7, 9, Some(&[9; 400])), State::Warm);
    // Without a share, all of it goes to the swap file.
    bench.pager.set_warm_pages(0);
    bench.run();
    while bench.end_writes() > 0 {}
    let left: Vec<_> = (0..200)
        .map(|index| (index, bench.state(index)))
        .filter(|(_, state)| *state != State::Cold)
        .collect();
    assert!(left.is_empty(), "{left:?}, {:?} {:?}", bench.pager.emptying, bench.actions);
    let stats = bench.pager.stats();
    assert_eq!((stats.packed_pages, stats.packed_bytes, stats.slots), (0, 0, 200));
}

#[test]
fn frames_are_kept_free_ahead_of_faults() {
    let mut bench = Bench::new(256, 2048);
    bench.pager.advise(0, 0..2048, Advice::Random);
    let mut most = 0;
    for index in 0..1000 {
        bench.fault(index);
        for (batch, _) in bench.asked() {
            bench.answer(batch, |index| index + 1);
        }
        bench.end_writes();
        most = most.max(bench.pager.stats().resident_pages);
        assert_eq!(bench.state(index), State::Hot);
    }
    assert!((240..=bench.pager.frames()).contains(&most), "{most}");
    assert_eq!(bench.pager.stats().faults_stalled, 0);
}

#[test]
fn a_write_goes_to_neighbouring_slots_in_one_piece() {
    let mut bench = Bench::new(256, 64);
    (0..16).for_each(|index| drop(bench.fault(index)));
    bench.pager.drain(1, None, 16);
    bench.run();
    for (batch, _) in bench.asked() {
        bench.answer(batch, |index| index + 1);
    }
    let writes = bench.transfers(true);
    assert_eq!(writes.len(), 1);
    assert_eq!((writes[0].slot, writes[0].pages), (0, 16));
}

#[test]
fn a_run_that_crosses_mappings_of_the_kernel_is_mapped_page_by_page() {
    let mut bench = Bench::new(4096, 2048);
    bench.fault(0);
    bench.pager.fault(BASE + PAGE, false);
    let Some(Action::Map { page, pages: 8, .. }) = bench.pager.next_action() else { panic!() };
    bench.pager.mapped(page, 8, 0, Some(Stop::NoRange));
    bench.run();
    assert_eq!(bench.maps[1..], (1..9).map(|index| (index, 1, Source::Zeros)).collect::<Vec<_>>());
    assert_eq!(bench.pager.take_unclaimed(), 0);
}

#[test]
fn a_page_that_the_program_may_still_empty_is_left_alone() {
    let mut bench = Bench::new(256, 64);
    bench.fault(0);
    bench.pager.discard(BASE, PAGE);
    assert_eq!(bench.evict(10, |_| 1), [0; 0]);
    bench.pager.set_now(super::DISCARD_GRACE_MS);
    bench.run();
    let Some(Action::Ask { batch, kind: BatchKind::Probe }) = bench.actions.pop() else { panic!() };
    bench.pager.probed(batch, 0, PageId::new(0, 0), true);
    bench.pager.batch_ended(batch);
    assert_eq!(bench.evict(10, |_| 1), [0]);
}

#[test]
fn a_fault_on_a_page_on_its_way_out_is_answered_from_the_buffer() {
    let mut bench = Bench::new(256, 64);
    bench.fault(0);
    bench.pager.drain(1, None, 1);
    bench.run();
    let (batch, pages) = bench.asked().remove(0);
    assert_eq!(pages, [0]);
    assert_eq!(bench.fault(0), []);
    bench.answer(batch, |_| 7);
    let buffers: Vec<Buffer> = bench
        .maps
        .iter()
        .filter_map(|map| match map.2 {
            Source::Buffer(buffer) => Some(buffer),
            Source::Zeros => None,
        })
        .collect();
    assert_eq!(buffers.len(), 1);
    assert_eq!((bench.state(0), bench.pager.write_buffers.free()), (State::Hot, 32));
}

#[test]
fn drains_end_although_evictions_never_do() {
    let mut bench = Bench::new(64, 2048);
    bench.pager.advise(0, 0..2048, Advice::Random);
    (0..40).for_each(|index| drop(bench.fault(index)));
    bench.pager.drain(5, None, 3);
    bench.run();
    let mut waiting: std::collections::VecDeque<_> = bench.asked().into();
    for index in 40..300 {
        // There is always a batch that was asked later.
        bench.fault(index);
        waiting.extend(bench.asked());
        if waiting.len() > 1 {
            let (batch, _) = waiting.pop_front().unwrap();
            bench.answer(batch, |index| index + 1);
            bench.end_writes();
            waiting.extend(bench.asked());
        }
    }
    assert!(bench.pager.drained().iter().any(|(token, _)| *token == 5));
}

#[test]
fn pages_that_cannot_be_moved_are_counted_and_tried_again() {
    let mut bench = Bench::new(256, 64);
    bench.fault(0);
    bench.pager.drain(1, None, 1);
    bench.run();
    let (batch, _) = bench.asked().remove(0);
    bench.pager.not_evicted(PageId::new(0, 0), PageResult::Busy);
    bench.pager.batch_ended(batch);
    assert_eq!(bench.pager.stats().unevictable_pages, 1);
    assert_eq!(bench.evict(1, |_| 1), [0; 0]);
    bench.pager.set_now(1000);
    assert_eq!(bench.evict(1, |_| 1), [0]);
    assert_eq!(bench.pager.stats().unevictable_pages, 0);
}
