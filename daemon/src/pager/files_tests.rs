//! Random histories of one region over a file, with a program, an agent, a file and a swap file that are numbers: the
//! content of a page is the number that was stored to it last, and greater numbers are newer.

use std::collections::BTreeMap;

use fmalloc_proto::PAGE;
use fmalloc_proto::messages::FileMode;
use fmalloc_proto::ring::{BatchKind, Layout, PageResult};

use super::files::{FileRead, FileTransfer};
use super::model::rng::Rng;
use super::page::Slot;
use super::{Action, Content, Packed, Pager, Sizes, Source, Stop, Store, Transfer};
use crate::arena::Arena;

const BASE: u64 = 0x10_0000;
const PAGES: u64 = 60;
/// The file ends in front of the last pages.
const FILE_PAGES: u64 = 56;
const REGION: u16 = 0;

/// Slots that are taken once each.
#[derive(Debug, Default)]
struct OnceOnly {
    next: Slot,
}

impl Store for OnceOnly {
    fn take(&mut self, want: u32) -> Option<(Slot, u32)> {
        self.next += want;
        Some((self.next - want, want))
    }

    fn give(&mut self, _slot: Slot) {}

    fn share(&mut self, _slot: Slot) -> bool {
        false
    }

    fn claim_page(&mut self) -> bool {
        true
    }
}

#[derive(Debug, Clone)]
enum Doing {
    Read(Transfer),
    Write(Transfer, Vec<u64>),
    ReadFile(FileTransfer),
    WriteFile(FileTransfer, Vec<u64>),
    Batch(u32, BatchKind),
}

struct Sim {
    rng: Rng,
    mode: FileMode,
    pager: Pager<OnceOnly>,
    /// What the client's memory holds.
    memory: BTreeMap<u64, u64>,
    /// What the program stored last.
    truth: Vec<u64>,
    file: Vec<u64>,
    swap: BTreeMap<Slot, u64>,
    buffers: Vec<u64>,
    doing: Vec<Doing>,
    poisoned: Vec<u64>,
    stamp: u64,
    now: u64,
    /// Flushes that have not ended, with what had been stored when they began.
    flushes: Vec<(u64, Vec<u64>)>,
    flushed: usize,
    failed: usize,
    unpacked: usize,
    /// Per mille of writes to the file that fail.
    failures: u64,
    /// The client has a warm pool, and frames for all pages: they leave when that is asked for.
    pool: bool,
}

impl Sim {
    fn new(seed: u64, mode: FileMode, pool: bool) -> Self {
        let ring = Layout::new(2, 8).unwrap();
        let mut sizes = Sizes { budget: 0, ring, read_buffers: 16, write_buffers: 16 };
        sizes.budget = sizes.overhead() + if pool { 600 } else { 40 } * PAGE;
        let mut pager = Pager::new(OnceOnly::default(), Arena::new().unwrap(), sizes);
        assert_eq!(pager.register(BASE, PAGES * PAGE, true, String::new()), Ok(REGION));
        pager.set_file(REGION, mode);
        let file: Vec<u64> = (0..FILE_PAGES).map(|page| page % 3).collect();
        let mut truth = file.clone();
        truth.resize(usize::try_from(PAGES).unwrap(), 0);
        Self {
            rng: Rng::new(seed),
            mode,
            pager,
            memory: BTreeMap::new(),
            truth,
            file,
            swap: BTreeMap::new(),
            buffers: vec![0; 32],
            doing: Vec::new(),
            poisoned: Vec::new(),
            stamp: 100,
            now: 0,
            flushes: Vec::new(),
            flushed: 0,
            failed: 0,
            unpacked: 0,
            failures: 0,
            pool,
        }
    }

    fn act(&mut self) {
        while let Some(action) = self.pager.next_action() {
            match action {
                Action::Map { page, pages, source, .. } => {
                    let mut done = 0;
                    let mut stop = None;
                    while done < pages && stop.is_none() {
                        let index = page.index() + done;
                        if self.memory.contains_key(&index) {
                            stop = Some(Stop::Exists);
                        } else {
                            let Source::Buffer(buffer) = source else {
                                panic!("zeros for page {index} of a file")
                            };
                            let content = self.buffers[usize::from(buffer) + usize::try_from(done).unwrap()];
                            assert_eq!(content, self.truth_of(index), "page {index} is mapped");
                            self.memory.insert(index, content);
                            done += 1;
                        }
                    }
                    self.pager.mapped(page, pages, done, stop);
                }
                Action::Wake { .. } => {}
                Action::Assist { .. } => panic!("the agent does not fault"),
                Action::Poison { page, .. } => {
                    assert!(page.index() >= FILE_PAGES, "page {} is in the file", page.index());
                    self.poisoned.push(page.index());
                    self.pager.poisoned(page, None);
                }
                Action::Read(transfer) => self.doing.push(Doing::Read(transfer)),
                Action::Write(transfer) => {
                    assert_eq!(self.mode, FileMode::Private, "pages of the file get into swap");
                    let content = self.content(transfer.buffer, transfer.pages);
                    self.doing.push(Doing::Write(transfer, content));
                }
                Action::ReadFile(transfer) => {
                    assert!(!self.is_being_written(&transfer), "a read beside a write");
                    self.doing.push(Doing::ReadFile(transfer));
                }
                Action::WriteFile(transfer) => {
                    assert_eq!(self.mode, FileMode::Shared, "the file is changed");
                    assert!(!self.is_being_written(&transfer), "two writes of a page at once");
                    let content = self.content(transfer.buffer, transfer.pages);
                    self.doing.push(Doing::WriteFile(transfer, content));
                }
                Action::Unpack { page, buffer, from } => {
                    let Packed::Bytes { offset, len } = from else { panic!("pages of files are not filled") };
                    let content =
                        u64::from_le_bytes(self.pager.packed_bytes(offset, len).try_into().unwrap());
                    self.buffers[usize::from(buffer)] = content;
                    self.unpacked += 1;
                    self.pager.unpacked(page, true);
                }
                Action::Ask { batch, kind } => self.doing.push(Doing::Batch(batch, kind)),
            }
        }
        for (token, result) in self.pager.flushed() {
            let place = self.flushes.iter().position(|(other, _)| *other == token).unwrap();
            let (_, before) = self.flushes.swap_remove(place);
            match result {
                Ok(()) => {
                    self.flushed += 1;
                    for (index, stored) in before.iter().enumerate().take(self.file.len()) {
                        match self.mode {
                            FileMode::Shared => {
                                assert!(self.file[index] >= *stored, "page {index} is not flushed");
                            }
                            FileMode::ReadOnly => {}
                            FileMode::Private => assert!(
                                *stored == self.file[index]
                                    || *stored != self.truth[index]
                                    || self.is_changed(index),
                                "page {index} differs from the file and is not said to"
                            ),
                        }
                    }
                }
                Err(errno) => {
                    assert_eq!(errno, libc::ENOSPC);
                    self.failed += 1;
                }
            }
        }
    }

    fn is_changed(&self, index: usize) -> bool {
        let index = u64::try_from(index).unwrap();
        let (runs, next) = self.pager.changed(REGION, 0..PAGES, 1000);
        assert_eq!(next, None);
        runs.iter().any(|(first, pages)| (*first..first + pages).contains(&index))
    }

    fn truth_of(&self, index: u64) -> u64 {
        self.truth[usize::try_from(index).unwrap()]
    }

    fn content(&self, buffer: u16, pages: u32) -> Vec<u64> {
        self.buffers[usize::from(buffer)..][..pages as usize].to_vec()
    }

    fn is_being_written(&self, transfer: &FileTransfer) -> bool {
        let pages = transfer.first..transfer.first + u64::from(transfer.pages);
        self.doing.iter().any(|doing| match doing {
            Doing::WriteFile(other, _) => {
                other.first < pages.end && pages.start < other.first + u64::from(other.pages)
            }
            _ => false,
        })
    }

    fn fault(&mut self, index: u64) {
        self.pager.fault(BASE + index * PAGE, false);
        self.act();
    }

    fn touch(&mut self) {
        let index = self.rng.below(PAGES);
        if self.poisoned.contains(&index) {
            return;
        }
        match self.memory.get(&index) {
            None => self.fault(index),
            Some(content) => {
                assert_eq!(*content, self.truth_of(index), "page {index} is read");
                if self.mode != FileMode::ReadOnly && self.rng.one_in(2) {
                    self.stamp += 1;
                    self.memory.insert(index, self.stamp);
                    self.truth[usize::try_from(index).unwrap()] = self.stamp;
                }
            }
        }
    }

    /// A private page is as the file has it again. No event is read while a page is on its way out.
    fn discard(&mut self) {
        if self.mode != FileMode::Private || self.pager.evicting() > 0 {
            return;
        }
        let index = self.rng.below(FILE_PAGES);
        self.pager.discard(BASE + index * PAGE, PAGE);
        self.memory.remove(&index);
        self.truth[usize::try_from(index).unwrap()] = self.file[usize::try_from(index).unwrap()];
        self.act();
    }

    fn end_something(&mut self) {
        if self.doing.is_empty() {
            return;
        }
        let place = self.rng.index(self.doing.len());
        match self.doing.swap_remove(place) {
            Doing::Read(Transfer { op, slot, buffer, pages }) => {
                for n in 0..pages {
                    self.buffers[usize::from(buffer) + n as usize] = self.swap[&(slot + n)];
                    self.pager.page_read(op, n as usize, true);
                }
                self.pager.read_ended(op);
            }
            Doing::Write(Transfer { op, slot, pages, .. }, content) => {
                self.swap.extend((slot..slot + pages).zip(content));
                self.pager.write_ended(op, true);
            }
            Doing::ReadFile(FileTransfer { op, first, buffer, pages, .. }) => {
                let fails = self.failures > 0 && self.rng.one_in(20);
                for n in 0..pages as usize {
                    let index = usize::try_from(first).unwrap() + n;
                    let read = match self.file.get(index) {
                        None => FileRead::Beyond,
                        Some(_) if fails && n > 0 => FileRead::Failed,
                        Some(content) => {
                            self.buffers[usize::from(buffer) + n] = *content;
                            FileRead::Good(*content)
                        }
                    };
                    self.pager.file_page_read(op, n, read);
                }
                self.pager.read_ended(op);
            }
            Doing::WriteFile(FileTransfer { op, first, .. }, content) => {
                let fails = self.rng.below(1000) < self.failures;
                let written = if fails { content.len() / 2 } else { content.len() };
                for (n, content) in content.into_iter().enumerate().take(written) {
                    let index = usize::try_from(first).unwrap() + n;
                    assert!(self.file[index] <= content, "page {index} gets older");
                    self.file[index] = content;
                }
                self.pager.file_write_ended(op, if fails { Err(libc::ENOSPC) } else { Ok(()) });
            }
            Doing::Batch(batch, kind) => self.end_batch(batch, kind),
        }
        self.act();
    }

    fn end_batch(&mut self, batch: u32, kind: BatchKind) {
        for (n, page) in self.pager.batch_pages(batch).to_vec().into_iter().enumerate() {
            let present = self.memory.get(&page.index()).copied();
            let busy = self.rng.one_in(10);
            match (kind, present) {
                (BatchKind::Probe, _) => self.pager.probed(batch, n, page, present.is_some()),
                (BatchKind::Evict, Some(_)) if busy => self.pager.not_evicted(page, PageResult::Busy),
                (BatchKind::Evict, None) => self.pager.not_evicted(page, PageResult::Absent),
                (BatchKind::Copy, Some(_)) if busy => self.pager.not_copied(page, PageResult::Busy),
                (BatchKind::Copy, None) => self.pager.not_copied(page, PageResult::Absent),
                (BatchKind::Evict | BatchKind::Copy, Some(hash)) => {
                    let buffer = self.pager.take_write_buffer().expect("a free buffer");
                    self.buffers[usize::from(buffer)] = hash;
                    let content = Content { hash, fill: None };
                    let kept = if kind == BatchKind::Evict {
                        self.memory.remove(&page.index());
                        let bytes = hash.to_le_bytes();
                        let packs = self.pager.wants_packed(page, hash);
                        self.pager.evicted(page, content, packs.then_some(&bytes[..]), buffer)
                    } else {
                        self.pager.copied(page, content, buffer)
                    };
                    if !kept {
                        self.pager.give_write_buffer(buffer);
                    }
                }
                (BatchKind::Protect, _) => self.pager.protected(page),
            }
        }
        self.pager.batch_ended(batch);
    }

    fn flush(&mut self) {
        self.stamp += 1;
        let (first, end) = (self.rng.below(PAGES), PAGES);
        let mut before = self.truth.clone();
        before[..usize::try_from(first).unwrap()].fill(0);
        if self.mode == FileMode::Private {
            before.clone_from(&self.truth);
        }
        let range = if self.mode == FileMode::Private { 0..end } else { first..end };
        self.flushes.push((self.stamp, before));
        self.pager.flush(self.stamp, REGION, range);
        self.act();
    }

    fn step(&mut self) {
        if self.pool {
            self.pager.set_warm_pages(300);
        }
        match self.rng.below(100) {
            0..60 => self.touch(),
            60..94 => self.end_something(),
            94..96 => self.discard(),
            96..97 => self.flush(),
            97..98 => {
                let pages = if self.pool { PAGES } else { 5 };
                let range = self.rng.below(PAGES)..PAGES;
                self.pager.drain(u64::MAX, Some((REGION, range)), pages);
                self.act();
            }
            98..99 => {
                let first = self.rng.below(PAGES);
                self.pager.load(1, REGION, first..PAGES);
                self.act();
                self.pager.loaded();
            }
            _ => {
                self.now += 60;
                self.pager.set_now(self.now);
                self.pager.events_drained();
                self.act();
            }
        }
        assert!(self.pager.is_within_budget() || self.pager.stats().overhead_bytes > 0);
    }

    fn settle(&mut self) {
        for _ in 0..20_000 {
            self.now += 60;
            self.pager.set_now(self.now);
            self.pager.events_drained();
            self.act();
            self.end_something();
        }
    }

    /// All that was stored is in the file after a flush, and everything is given back at the end.
    fn finish(&mut self) {
        self.failures = 0;
        self.settle();
        assert!(self.flushes.is_empty(), "a flush has no end");
        self.stamp += 1;
        self.flushes.push((self.stamp, self.truth.clone()));
        self.pager.flush(self.stamp, REGION, 0..PAGES);
        self.settle();
        assert!(self.flushes.is_empty(), "the last flush has no end");
        if self.mode == FileMode::Shared {
            assert_eq!(self.file, self.truth[..self.file.len()]);
        }
        for index in 0..FILE_PAGES {
            if !self.memory.contains_key(&index) {
                self.fault(index);
                while !self.memory.contains_key(&index) {
                    assert!(!self.doing.is_empty(), "page {index} does not come");
                    self.end_something();
                }
            }
            assert_eq!(self.memory[&index], self.truth_of(index));
        }
        self.pager.close(REGION);
        self.act();
        self.settle();
        assert!(self.pager.is_closed(REGION) && self.doing.is_empty());
        self.pager.unregister(REGION);
        assert_eq!(self.pager.read_buffers.free(), self.pager.read_buffers.len());
        assert_eq!(self.pager.write_buffers.free(), self.pager.write_buffers.len());
        assert_eq!(self.pager.stats().resident_pages, 0);
    }
}

fn history(mode: FileMode, failures: u64) -> (usize, usize) {
    let (mut flushed, mut failed, mut unpacked) = (0, 0, 0);
    for seed in 0..60 {
        let mut sim = Sim::new(seed + 1, mode, seed % 3 == 0);
        sim.failures = failures;
        for _ in 0..3000 {
            sim.step();
        }
        sim.finish();
        flushed += sim.flushed;
        failed += sim.failed;
        unpacked += sim.unpacked;
    }
    assert!(unpacked > 100, "the warm pool is of no use");
    (flushed, failed)
}

#[test]
fn shared_pages_get_into_the_file_and_come_back_from_it() {
    let (flushed, failed) = history(FileMode::Shared, 0);
    assert!(flushed > 500 && failed == 0, "{flushed} flushes");
}

#[test]
fn shared_pages_survive_a_file_that_cannot_be_written_for_a_while() {
    let (flushed, failed) = history(FileMode::Shared, 200);
    assert!(flushed > 100 && failed > 100, "{flushed} flushes, {failed} failed");
}

#[test]
fn private_pages_leave_the_file_as_it_is() {
    let (flushed, _) = history(FileMode::Private, 0);
    assert!(flushed > 500, "{flushed} flushes");
}

#[test]
fn pages_that_are_only_read_are_never_written() {
    history(FileMode::ReadOnly, 0);
}

#[test]
fn closing_a_region_writes_what_was_evicted() {
    let mut sim = Sim::new(7, FileMode::Shared, false);
    sim.fault(3);
    while !sim.memory.contains_key(&3) {
        sim.end_something();
    }
    sim.memory.insert(3, 999);
    sim.truth[3] = 999;
    sim.pager.drain(1, Some((REGION, 0..PAGES)), 1);
    sim.act();
    let batch = sim.doing.iter().position(|doing| matches!(doing, Doing::Batch(..))).unwrap();
    let Doing::Batch(batch, kind) = sim.doing.swap_remove(batch) else { unreachable!() };
    sim.rng = (1..).map(Rng::new).find(|rng| !rng.clone().one_in(10)).unwrap();
    sim.end_batch(batch, kind);
    assert!(sim.memory.is_empty());
    sim.pager.close(REGION);
    assert!(!sim.pager.is_closed(REGION), "its page is on its way");
    sim.act();
    sim.settle();
    assert!(sim.pager.is_closed(REGION));
    assert_eq!(sim.file[3], 999);
}
