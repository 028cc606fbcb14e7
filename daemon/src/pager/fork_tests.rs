//! Random histories of a parent and its forked child: two pagers on one disk, two memories, an agent for each. The fork
//! copies the memory at one moment and is told of at a later one; in between batches come back, and the parent writes.
//! Whatever happens, each side must find what was there at the fork and what it wrote since.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::rc::Rc;

use fmalloc_proto::PAGE;
use fmalloc_proto::ring::{BatchKind, Layout, PageResult};
use proptest::prelude::*;

use super::model::rng::Rng;
use super::page::{FRESH, PageId, Slot, State};
use super::{Action, Content, Packed, Pager, Sizes, Source, Stop, Store, Transfer};
use crate::arena::Arena;

const BASE: u64 = 0x100_0000;
const PAGES: u64 = 700;

#[derive(Debug, Default)]
struct Disk {
    /// Owners and content of each slot.
    slots: Vec<(u32, u64)>,
}

#[derive(Debug, Clone, Default)]
struct SharedDisk(Rc<RefCell<Disk>>);

impl Store for SharedDisk {
    fn take(&mut self, want: u32) -> Option<(Slot, u32)> {
        let slots = &mut self.0.borrow_mut().slots;
        let first = slots.iter().position(|slot| slot.0 == 0).unwrap_or(slots.len());
        let mut count = 0;
        while count < want as usize && slots.get(first + count).is_none_or(|slot| slot.0 == 0) {
            if first + count == slots.len() {
                slots.push((0, 0));
            }
            slots[first + count] = (1, u64::MAX);
            count += 1;
        }
        Some((Slot::try_from(first).unwrap(), u32::try_from(count).unwrap()))
    }

    fn share(&mut self, slot: Slot) -> bool {
        let slot = &mut self.0.borrow_mut().slots[slot as usize];
        assert!(slot.0 > 0, "a free slot was shared");
        slot.0 += 1;
        true
    }

    fn give(&mut self, slot: Slot) {
        let slot = &mut self.0.borrow_mut().slots[slot as usize];
        assert!(slot.0 > 0, "a slot was given back twice");
        slot.0 -= 1;
    }

    fn claim_page(&mut self) -> bool {
        true
    }
}

/// A batch that the agent has; what it has moved, once it has.
struct Batch {
    number: u32,
    kind: BatchKind,
    moved: Option<Vec<Option<u64>>>,
}

/// One process and its pager.
struct Side {
    pager: Pager<SharedDisk>,
    disk: SharedDisk,
    memory: HashMap<u64, u64>,
    expected: Vec<u64>,
    buffers: Vec<u64>,
    reads: VecDeque<Transfer>,
    writes: VecDeque<(Transfer, Vec<u64>)>,
    batches: VecDeque<Batch>,
    lost: HashSet<u64>,
    /// An event waits to be read.
    changing: bool,
}

impl Side {
    fn new(pager: Pager<SharedDisk>, disk: SharedDisk) -> Self {
        let buffers = vec![u64::MAX; pager.buffers()];
        Self {
            pager,
            disk,
            memory: HashMap::new(),
            expected: vec![0; usize::try_from(PAGES).unwrap()],
            buffers,
            reads: VecDeque::new(),
            writes: VecDeque::new(),
            batches: VecDeque::new(),
            lost: HashSet::new(),
            changing: false,
        }
    }

    fn run(&mut self) {
        while let Some(action) = self.pager.next_action() {
            match action {
                Action::Map { page, pages, source, .. } => {
                    let (done, stop) = self.map(page.index(), pages, source);
                    self.pager.mapped(page, pages, done, stop);
                }
                Action::Wake { .. } => {}
                Action::Poison { page, .. } => {
                    self.lost.insert(page.index());
                    self.pager.poisoned(page, None);
                }
                Action::Read(transfer) => self.reads.push_back(transfer),
                Action::Write(transfer) => {
                    let first = usize::from(transfer.buffer);
                    let tokens = self.buffers[first..first + transfer.pages as usize].to_vec();
                    self.writes.push_back((transfer, tokens));
                }
                Action::Ask { batch, kind } => {
                    self.batches.push_back(Batch { number: batch, kind, moved: None });
                }
                Action::Unpack { page, buffer, from } => {
                    self.buffers[usize::from(buffer)] = match from {
                        Packed::Fill(word) => word,
                        Packed::Bytes { offset, len } => {
                            u64::from_ne_bytes(self.pager.packed_bytes(offset, len).try_into().unwrap())
                        }
                    };
                    self.pager.unpacked(page, true);
                }
                Action::Assist { .. } => panic!("the agent never faults here"),
                Action::ReadFile(_) | Action::WriteFile(_) => panic!("no region has a file here"),
            }
        }
    }

    fn map(&mut self, first: u64, pages: u64, source: Source) -> (u64, Option<Stop>) {
        if self.changing {
            return (0, Some(Stop::Again));
        }
        for n in 0..pages {
            let token = match source {
                Source::Zeros => 0,
                Source::Buffer(buffer) => self.buffers[usize::from(buffer) + usize::try_from(n).unwrap()],
            };
            if self.memory.contains_key(&(first + n)) {
                return (n, Some(Stop::Exists));
            }
            self.memory.insert(first + n, token);
        }
        (pages, None)
    }

    /// One thing that goes on by itself. False if there is none.
    fn step(&mut self, rng: &mut Rng) -> bool {
        match rng.below(4) {
            0 if !self.reads.is_empty() => self.end_read(),
            1 if !self.writes.is_empty() => self.end_write(rng),
            2 | 3 if !self.batches.is_empty() => {
                let place = rng.index(self.batches.len());
                self.serve_batch(place, rng);
            }
            _ => return !(self.reads.is_empty() && self.writes.is_empty() && self.batches.is_empty()),
        }
        self.run();
        true
    }

    fn end_read(&mut self) {
        let Some(transfer) = self.reads.pop_front() else { return };
        for n in 0..transfer.pages as usize {
            let page = self.pager.op_pages(transfer.op)[n];
            let buffer = self.pager.op_buffer(transfer.op, n);
            let (owners, content) = self.disk.0.borrow().slots[transfer.slot as usize + n];
            assert!(owners > 0, "a slot was freed while it is read");
            self.buffers[usize::from(buffer)] = content;
            let good = self.pager.slot_hash(page) == content;
            self.pager.page_read(transfer.op, n, good);
        }
        self.pager.read_ended(transfer.op);
    }

    fn end_write(&mut self, rng: &mut Rng) {
        let Some((transfer, tokens)) = self.writes.pop_front() else { return };
        let good = !rng.one_in(20);
        if good {
            for (n, token) in tokens.into_iter().enumerate() {
                let slot = &mut self.disk.0.borrow_mut().slots[transfer.slot as usize + n];
                assert_eq!(slot.0, 1, "a slot was shared or freed while it is written");
                slot.1 = token;
            }
        }
        self.pager.write_ended(transfer.op, good);
    }

    /// The agent moves what it was asked for, and later its answer is taken.
    fn serve_batch(&mut self, place: usize, rng: &mut Rng) {
        let batch = &mut self.batches[place];
        let pages = self.pager.batch_pages(batch.number).to_vec();
        if batch.moved.is_none() {
            let evicts = batch.kind == BatchKind::Evict;
            let look = |page: &PageId| match evicts {
                // Now and then a page cannot be moved.
                true if rng.one_in(30) => None,
                true => self.memory.remove(&page.index()),
                false => self.memory.get(&page.index()).copied(),
            };
            batch.moved = Some(pages.iter().map(look).collect());
            return;
        }
        let batch = self.batches.remove(place).unwrap();
        for ((n, page), moved) in pages.into_iter().enumerate().zip(batch.moved.unwrap()) {
            match (batch.kind, moved) {
                (BatchKind::Evict, Some(token)) => {
                    let buffer = self.pager.take_write_buffer().unwrap();
                    self.buffers[usize::from(buffer)] = token;
                    // Some hold the same eight bytes again and again; most can be packed.
                    let fill = token.is_multiple_of(7).then_some(token);
                    let content = Content { fill, hash: if fill.is_some() { 0 } else { token } };
                    let bytes = token.to_ne_bytes();
                    let packs = fill.is_none() && self.pager.wants_packed(page, token);
                    let packed = (packs && !token.is_multiple_of(5)).then_some(&bytes[..]);
                    if !self.pager.evicted(page, content, packed, buffer) {
                        self.pager.give_write_buffer(buffer);
                    }
                }
                (BatchKind::Evict, None) => self.pager.not_evicted(page, PageResult::Busy),
                (_, moved) => self.pager.probed(batch.number, n, page, moved.is_some()),
            }
        }
        self.pager.batch_ended(batch.number);
        if !self.changing {
            self.pager.events_drained();
        }
    }

    fn touch(&mut self, index: u64) -> bool {
        if !self.memory.contains_key(&index) {
            self.pager.fault(BASE + index * PAGE, false);
            self.run();
        }
        self.memory.contains_key(&index)
    }

    /// Reads a page, or waits for it.
    fn read(&mut self, index: u64) {
        if self.touch(index) {
            let (found, expected) = (self.memory[&index], self.expected[usize::try_from(index).unwrap()]);
            assert_eq!(found, expected, "page {index}");
        }
    }

    fn write(&mut self, index: u64, token: u64) {
        if self.touch(index) {
            self.memory.insert(index, token);
            self.expected[usize::try_from(index).unwrap()] = token;
        }
    }

    /// The program discards a range; the kernel is done with it before anybody looks.
    fn discard(&mut self, first: u64, pages: u64) {
        if self.pager.evicting() > 0 {
            return;
        }
        self.pager.discard(BASE + first * PAGE, pages * PAGE);
        for index in first..first + pages {
            self.memory.remove(&index);
            self.expected[usize::try_from(index).unwrap()] = 0;
        }
        self.run();
    }

    fn act(&mut self, rng: &mut Rng, next: &mut u64) {
        let index = rng.below(PAGES);
        match rng.below(16) {
            0..=3 => self.read(index),
            4..=8 => {
                *next += 1;
                self.write(index, if rng.one_in(8) { 0 } else { *next });
            }
            9 => (0..rng.below(40)).for_each(|n| self.read((index + n) % PAGES)),
            10 if rng.one_in(4) => self.discard(index, rng.below(20).min(PAGES - index)),
            _ => drop(self.step(rng)),
        }
        self.pager.retry();
    }

    fn check_all(&mut self, rng: &mut Rng) {
        let mut now = 1_000_000;
        for index in 0..PAGES {
            let mut turns = 0;
            while !self.touch(index) {
                turns += 1;
                now += 200;
                self.pager.set_now(now);
                assert!(
                    turns < 100_000,
                    "page {index} never comes: {:?}",
                    self.pager.word(PageId::new(0, index))
                );
                assert!(!self.lost.contains(&index), "page {index} is lost");
                self.pager.retry();
                self.step(rng);
                self.run();
            }
            self.read(index);
        }
    }

    fn end(mut self) {
        let mut rng = Rng::new(1);
        while !(self.reads.is_empty() && self.writes.is_empty() && self.batches.is_empty()) {
            self.step(&mut rng);
        }
        self.pager.close(0);
        self.pager.unregister(0);
    }
}

fn sizes(frames: u64) -> Sizes {
    let ring = Layout::new(3, 16).unwrap();
    let mut sizes = Sizes { budget: 0, ring, read_buffers: 40, write_buffers: 48 };
    sizes.budget = sizes.overhead() + (frames + 16) * PAGE;
    sizes
}

/// Forks while the parent is in the middle of anything.
fn fork(parent: &mut Side, rng: &mut Rng, next: &mut u64) -> Side {
    // The kernel copies.
    parent.changing = true;
    let (memory, expected) = (parent.memory.clone(), parent.expected.clone());
    // The event is not read yet: nothing can be mapped, but batches come back, and threads write to what they have.
    for _ in 0..rng.below(60) {
        match rng.below(3) {
            0 => {
                let index = rng.below(PAGES);
                if parent.memory.contains_key(&index) {
                    *next += 1;
                    parent.write(index, *next);
                }
            }
            _ => drop(parent.step(rng)),
        }
    }
    parent.pager.hold_evictions(true);
    let patient = rng.one_in(2);
    while patient && parent.pager.evicting() > 0 {
        parent.step(rng);
    }
    let child_sizes = sizes(rng.range(60, 300));
    let mut forked = parent.pager.fork(parent.disk.clone(), Arena::new().unwrap(), child_sizes).unwrap();
    let mut buffers = vec![u64::MAX; forked.pager.buffers()];
    let carry = |forked: &mut super::Forked<SharedDisk>, from: &[u64], to: &mut [u64]| {
        for (page, theirs, own) in std::mem::take(&mut forked.carried) {
            to[usize::from(own)] = from[usize::from(theirs)];
            forked.has_carried(page, to[usize::from(own)]);
        }
    };
    carry(&mut forked, &parent.buffers, &mut buffers);
    assert_eq!(forked.is_unsettled(), parent.pager.evicting() > 0);
    // The thread that forked goes on.
    parent.changing = false;
    while parent.pager.evicting() > 0 {
        parent.step(rng);
    }
    parent.pager.settle_fork(&mut forked);
    carry(&mut forked, &parent.buffers, &mut buffers);
    parent.pager.hold_evictions(false);
    parent.pager.retry();
    parent.run();
    let mut child = Side::new(forked.pager, parent.disk.clone());
    (child.memory, child.expected, child.buffers) = (memory, expected, buffers);
    child.pager.set_agent();
    for index in 0..PAGES {
        let word = child.pager.word(PageId::new(0, index));
        let there = word.state() != State::Hot || word.has(FRESH) || child.memory.contains_key(&index);
        assert!(there, "page {index} is not in memory: {word:?}");
    }
    child
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn both_sides_find_what_was_there_at_the_fork_and_what_they_wrote_since(seed in any::<u64>()) {
        let mut rng = Rng::new(seed | 1);
        let disk = SharedDisk::default();
        let mut parent_pager = Pager::new(disk.clone(), Arena::new().unwrap(), sizes(rng.range(60, 300)));
        parent_pager.register(BASE, PAGES * PAGE, true, String::new()).unwrap();
        let mut sides = vec![Side::new(parent_pager, disk.clone())];
        let mut next = 0;
        for generation in 0..3 {
            for now in 0..rng.range(200, 1500) {
                for side in &mut sides {
                    side.pager.set_now(generation * 10_000 + now);
                    side.act(&mut rng, &mut next);
                }
            }
            if generation < 2 {
                let place = rng.index(sides.len());
                let child = fork(&mut sides[place], &mut rng, &mut next);
                prop_assert_eq!(child.pager.stats().claimed_pages, PAGES);
                sides.push(child);
            }
        }
        while !sides.is_empty() {
            let mut side = sides.swap_remove(rng.index(sides.len()));
            side.check_all(&mut rng);
            side.end();
        }
        let owned = disk.0.borrow().slots.iter().filter(|slot| slot.0 > 0).count();
        prop_assert_eq!(owned, 0, "slots are left over");
    }
}
