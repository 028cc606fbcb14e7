//! The pager core of one client: a deterministic state machine. Events go in (faults, what the agent found, I/O that
//! ended, discards, budgets, the time), actions come out. No system call, no clock, no thread.
//!
//! At every instant one place owns a page's bytes (see [`page::State`]); the owner changes only when the next one
//! holds them. Files: `faults` answers faults, `fetch` reads, `evict` picks pages and writes them out, `pool` packs some
//! of them into RAM (`warm`), for which `split` finds how much of the budget that deserves, `changes` follows what the
//! program does to its address space, `fork` makes a copy for a forked child, `actions` hands out work and takes its results.
//!
//! Rules that callers keep, because correctness rests on them:
//! - what was read is fed before anything else is done, in the order in which it was read. Where an event (discard, unmap,
//!   remap) is kept back until [`Pager::evicting`] is zero, [`Pager::hold_evictions`] is on from its reading to its
//!   feeding: a page mapped in between could be one that was discarded;
//! - events are read while [`Pager::evicting`] is zero, or else the agent moves none of the pages any more that it has been
//!   asked for: what the program writes once its discard has been read would be taken for what was discarded (MADV_FREE
//!   is reported like MADV_DONTNEED and lets the page be);
//! - a region is registered only while no event waits and nothing is being moved: old events and old requests would mean
//!   the new region;
//! - after anything was fed, [`Pager::next_action`] is called until it gives nothing, and what it gives is done at once;
//! - results come once for each action handed out, in any order.

mod actions;
pub mod buffers;
mod changes;
mod evict;
mod faults;
mod fetch;
pub mod files;
#[cfg(test)]
mod files_tests;
mod fork;
#[cfg(test)]
mod fork_tests;
#[cfg(test)]
mod model;
pub mod page;
mod pool;
pub mod ranges;
pub mod regions;
mod split;
pub mod streams;
pub mod table;
#[cfg(test)]
mod tests;
mod warm;

pub use actions::Stop;
pub use changes::RegisterError;
pub use evict::Content;
pub use fork::Forked;
pub use pool::WORTH_PACKING;

use std::collections::VecDeque;

use fmalloc_proto::PAGE;
use fmalloc_proto::messages::ClientStats;
use fmalloc_proto::num::to_u64;
use fmalloc_proto::ring::{BatchKind, Layout};

use crate::arena::Arena;
use buffers::Buffers;
use changes::Change;
use files::{FileTransfer, Files};
use page::{
    Buffer, FROM_BUFFER, HAS_SLOT, MAIN, PACKED_COPY, PENDING_SLOT, PageId, QUEUED, STUCK, Slot, State,
    UNPACK, WANTED, Word,
};
use pool::Emptying;
use regions::Regions;
use split::Split;
use streams::Streams;
use warm::{Place, Warm};

/// A client with fewer frames than this hardly gets on: one instruction may need several pages.
const FEWEST_FRAMES: u64 = 16;
/// Milliseconds for which a page that was discarded while present is left alone: the discarding thread is let go by the
/// kernel before it empties the page, and may be anywhere between the two for a while.
pub const DISCARD_GRACE_MS: u64 = 100;
/// Milliseconds between attempts to evict what the agent could not move.
const STUCK_RETRY_MS: u64 = 500;
/// Milliseconds to wait after a failed write, or when no slot is free, before the next try.
const WRITE_RETRY_MS: u64 = 100;
/// Entries that a queue of hot pages may have beyond twice the pages that have a frame, before it is swept.
const QUEUE_SLACK: u64 = 64;
/// Frames that a client which is above its budget may use at once.
const SPARE_FRAMES: u64 = 32;
/// Faults at unknown addresses that may wait.
const MAX_UNKNOWN: usize = 4096;
/// Hints of one kind that may wait; a program that gives more of them loses hints.
const MAX_HINTS: usize = 64;

/// Where slots and claims come from. Shared with other clients.
pub trait Store {
    /// Takes up to `want` neighbouring slots and gives the first and how many; none if all are taken for now.
    fn take(&mut self, want: u32) -> Option<(Slot, u32)>;
    /// Adds an owner to a slot that the pager owns. False if it cannot have another.
    fn share(&mut self, slot: Slot) -> bool;
    /// Gives a slot back. It is free when its last owner has.
    fn give(&mut self, slot: Slot);
    /// Claims one page more for memory that grew without asking. False if swap is full.
    fn claim_page(&mut self) -> bool;
}

/// What a page to be mapped is filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Zeros.
    Zeros,
    /// This buffer and those behind it.
    Buffer(Buffer),
}

/// What a buffer is to be filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packed {
    /// These eight bytes, again and again.
    Fill(u64),
    /// What [`Pager::packed_bytes`] gives unpacks to.
    Bytes {
        /// Offset in the arena.
        offset: u64,
        /// Length.
        len: u64,
    },
}

/// What the shell shall do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Fill the buffer with the page's bytes, and answer with [`Pager::unpacked`].
    Unpack {
        /// The page.
        page: PageId,
        /// Its buffer.
        buffer: Buffer,
        /// From what.
        from: Packed,
    },
    /// Map `pages` pages from `addr` on, and answer with [`Pager::mapped`].
    Map {
        /// First page.
        page: PageId,
        /// Its address.
        addr: u64,
        /// How many.
        pages: u64,
        /// What with.
        source: Source,
    },
    /// Wake threads that wait for these pages.
    Wake {
        /// Address.
        addr: u64,
        /// Pages.
        pages: u64,
    },
    /// Map zeros for the agent, which itself faulted on a page that it was asked to move and that was discarded. To be
    /// tried again for as long as events wait to be read.
    Assist {
        /// Address.
        addr: u64,
    },
    /// Make any access to the page fail, and answer with [`Pager::poisoned`].
    Poison {
        /// The page.
        page: PageId,
        /// Its address.
        addr: u64,
    },
    /// Read, check each page's hash ([`Pager::slot_hash`]), and answer with [`Pager::page_read`] for each page, then
    /// [`Pager::read_ended`].
    Read(Transfer),
    /// Write, and answer with [`Pager::write_ended`].
    Write(Transfer),
    /// Read from a region's file, and answer with [`Pager::file_page_read`] for each page, then [`Pager::read_ended`].
    ReadFile(FileTransfer),
    /// Write to a region's file, and answer with [`Pager::file_write_ended`].
    WriteFile(FileTransfer),
    /// Ask the agent to work on [`Pager::batch_pages`]; answer with [`Pager::evicted`], [`Pager::copied`] or
    /// [`Pager::probed`] for each page, then [`Pager::batch_ended`].
    Ask {
        /// The batch of the ring.
        batch: u32,
        /// What for.
        kind: BatchKind,
    },
}

/// A piece of swap I/O: neighbouring slots, neighbouring buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// Names the operation.
    pub op: u32,
    /// First slot.
    pub slot: Slot,
    /// First buffer.
    pub buffer: Buffer,
    /// Pages.
    pub pages: u32,
}

/// Sizes that a client's pager works with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Budget in bytes, overheads included.
    pub budget: u64,
    /// The ring.
    pub ring: Layout,
    /// Buffers for reading.
    pub read_buffers: Buffer,
    /// Buffers for writing.
    pub write_buffers: Buffer,
}

impl Sizes {
    /// What suits a budget: ring and buffers take a sixteenth of it each, within bounds.
    #[must_use]
    pub fn for_budget(budget: u64, ring: Layout) -> Self {
        let pages = budget / PAGE / 16;
        let read_buffers = Buffer::try_from(pages.clamp(64, 1024)).unwrap_or(64);
        let write_buffers = Buffer::try_from(ring.batches() * ring.batch_pages()).unwrap_or(Buffer::MAX / 2);
        Self { budget, ring, read_buffers, write_buffers }
    }

    /// Bytes that ring and buffers take.
    #[must_use]
    pub fn overhead(&self) -> u64 {
        to_u64(self.ring.len()) + (u64::from(self.read_buffers) + u64::from(self.write_buffers)) * PAGE
    }
}

/// A read or write in flight.
#[derive(Debug, Default)]
struct Op {
    slot: Slot,
    buffer: Buffer,
    pages: Vec<PageId>,
    /// The first page is not to be mapped before somebody faults on it.
    hold_first: bool,
}

/// A batch of the ring.
#[derive(Debug)]
struct Batch {
    /// What the agent does with it at present, if anything.
    kind: Option<BatchKind>,
    pages: Vec<PageId>,
    /// For a probe: the pages as they were when it was asked for.
    probes: Vec<Discarded>,
    /// Evictions are numbered in the order in which they are asked for.
    number: u64,
}

/// A hot page that was discarded, or found absent, and may be there or not. Void once the page has another stamp.
#[derive(Debug, Clone, Copy)]
struct Discarded {
    page: PageId,
    since: u64,
    stamp: Buffer,
    /// `remaps` when the agent was asked.
    remaps: u64,
}

/// Work that somebody asked for: evict a range of a region, or anything.
#[derive(Debug)]
struct Drain {
    token: u64,
    /// Region and what is left of the range to look at; none means the FIFO.
    range: Option<(u16, std::ops::Range<u64>)>,
    /// Pages still to be chosen.
    remaining: u64,
    /// `evictions` when the drain began.
    evictions_before: u64,
    /// The last batch that has pages of it.
    last_batch: u64,
    exhausted: bool,
}

/// The pager of one client.
#[derive(Debug)]
pub struct Pager<S> {
    store: S,
    arena: Arena,
    regions: Regions,
    sizes: Sizes,
    /// Pages with a frame.
    used: u64,
    /// Frames beyond the budget that may be used for now: see [`Pager::ease_budget`].
    surplus: u64,
    table_bytes: u64,
    /// Hot pages that are new, or come back after a long time: the first to go.
    probation: VecDeque<PageId>,
    /// Hot pages that have come back soon after an eviction.
    main: VecDeque<PageId>,
    warm: Warm,
    /// Segments that the warm pool may have.
    warm_limit: u64,
    split: Split,
    emptying: Option<Emptying>,
    /// Pages whose buffers are to be filled from packed copies.
    unpack_queue: VecDeque<PageId>,
    stuck: VecDeque<PageId>,
    stuck_retry_at: u64,
    /// To be probed: at once if frames are short, else when the grace is over. Oldest first.
    discarded: VecDeque<Discarded>,
    /// Those that were there before the grace was over: to be probed again then.
    discarded_later: VecDeque<Discarded>,
    /// Those that were not there: settled when all events are known.
    absent: Vec<Discarded>,
    /// Stamp of the next discard.
    stamp: Buffer,
    /// Changes of the address space that were reported too early to be understood.
    early: Vec<Change>,
    /// Moves of memory so far.
    remaps: u64,
    unclaimed: u64,
    poison_queue: VecDeque<PageId>,
    streams: Streams,
    /// Held pages, and some that were.
    tripwires: VecDeque<PageId>,
    read_buffers: Buffers,
    write_buffers: Buffers,
    ops: Vec<Op>,
    free_ops: Vec<u32>,
    batches: Vec<Batch>,
    /// Eviction batches so far.
    batches_asked: u64,
    /// Pages in state `Evicting`.
    evicting: u64,
    refilling: bool,
    /// No new evictions and no maps for now.
    held: bool,
    /// The client has no agent yet.
    agentless: bool,
    /// Pages so far that were discarded while on their way out.
    discarded_out: u64,
    /// Pages to which the agent shall take access away.
    protect: Vec<PageId>,
    drains: VecDeque<Drain>,
    drained: Vec<(u64, u64)>,
    evictions: u64,
    /// Evicted pages that wait for a slot, with their buffers.
    dirty: VecDeque<(PageId, Buffer)>,
    write_retry_at: u64,
    /// Faults that wait for a frame or a buffer.
    waiting: VecDeque<PageId>,
    /// Faults at addresses that belong to no region as far as is known.
    unknown: Vec<u64>,
    /// Ranges to be read in because somebody said that they will be needed.
    willneed: VecDeque<(u16, std::ops::Range<u64>)>,
    map_queue: VecDeque<PageId>,
    maps_blocked: bool,
    /// Pages that are being read and that somebody waits for.
    awaited: u64,
    /// So many of the next maps are of one page each.
    single_maps: u64,
    out: VecDeque<Action>,
    now: u64,
    files: Files,
    stats: ClientStats,
}

impl<S: Store> Pager<S> {
    /// A pager without regions.
    #[must_use]
    pub fn new(store: S, arena: Arena, sizes: Sizes) -> Self {
        let Sizes { read_buffers, write_buffers, ring, .. } = sizes;
        let batch = || {
            let capacity = ring.batch_pages() as usize;
            Batch {
                kind: None,
                pages: Vec::with_capacity(capacity),
                probes: Vec::with_capacity(capacity),
                number: 0,
            }
        };
        Self {
            store,
            arena,
            regions: Regions::default(),
            sizes,
            used: 0,
            surplus: 0,
            table_bytes: 0,
            probation: VecDeque::new(),
            main: VecDeque::new(),
            warm: Warm::default(),
            warm_limit: 0,
            split: Split::default(),
            emptying: None,
            unpack_queue: VecDeque::new(),
            stuck: VecDeque::new(),
            stuck_retry_at: 0,
            discarded: VecDeque::new(),
            discarded_later: VecDeque::new(),
            absent: Vec::new(),
            stamp: 0,
            early: Vec::new(),
            remaps: 0,
            unclaimed: 0,
            poison_queue: VecDeque::new(),
            streams: Streams::default(),
            tripwires: VecDeque::new(),
            read_buffers: Buffers::new(0..read_buffers),
            write_buffers: Buffers::new(read_buffers..read_buffers + write_buffers),
            ops: Vec::new(),
            free_ops: Vec::new(),
            batches: (0..ring.batches()).map(|_| batch()).collect(),
            batches_asked: 0,
            evicting: 0,
            refilling: false,
            held: false,
            agentless: false,
            discarded_out: 0,
            protect: Vec::new(),
            drains: VecDeque::new(),
            drained: Vec::new(),
            evictions: 0,
            dirty: VecDeque::new(),
            write_retry_at: 0,
            waiting: VecDeque::new(),
            unknown: Vec::new(),
            willneed: VecDeque::new(),
            map_queue: VecDeque::new(),
            maps_blocked: false,
            awaited: 0,
            single_maps: 0,
            out: VecDeque::new(),
            now: 0,
            files: Files::default(),
            stats: ClientStats::default(),
        }
    }

    /// Tells the time, in milliseconds from any origin; never goes back.
    pub fn set_now(&mut self, now: u64) {
        self.now = self.now.max(now);
    }

    /// Frames that the client may have: its budget less ring, buffers, page tables and warm pool.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.sizes.budget.saturating_sub(self.overhead()) / PAGE
    }

    /// Bytes that the daemon holds for this client.
    #[must_use]
    pub fn overhead(&self) -> u64 {
        self.sizes.overhead() + self.table_bytes + self.warm.bytes()
    }

    /// Bytes that page tables take.
    #[must_use]
    pub fn table_bytes(&self) -> u64 {
        self.table_bytes
    }

    /// The part of [`Pager::overhead`] that no eviction makes smaller.
    #[must_use]
    pub fn least_overhead(&self) -> u64 {
        self.sizes.overhead() + self.table_bytes
    }

    /// Frames that are free.
    #[must_use]
    pub fn free_frames(&self) -> u64 {
        (self.frames() + self.surplus).saturating_sub(self.used)
    }

    /// Whether frames are short.
    #[must_use]
    pub fn lacks_frames(&self) -> bool {
        self.is_starved() || self.used + self.low_water() > self.frames() + self.evicting
    }

    /// Pages that the agent has been asked to move out, or to copy out, and has not answered for.
    #[must_use]
    pub fn evicting(&self) -> u64 {
        let comes_back = |batch: &&Batch| matches!(batch.kind, Some(BatchKind::Evict | BatchKind::Copy));
        let evictions = self.batches.iter().filter(comes_back);
        evictions.map(|batch| batch.pages.len() as u64).sum()
    }

    /// Changes the budget. The client gets within it as fast as its agent moves pages out.
    pub fn set_budget(&mut self, bytes: u64) {
        self.sizes.budget = bytes;
        self.set_warm_pages(self.warm_limit.saturating_mul(warm::SEGMENT_FRAMES));
        self.surplus = 0;
    }

    /// Changes the budget to one that others need a part of. A client that is above it goes on meanwhile: of each two
    /// frames that its agent frees, one may be used anew.
    pub fn ease_budget(&mut self, bytes: u64) {
        if bytes != self.sizes.budget {
            self.sizes.budget = bytes;
            self.set_warm_pages(self.warm_limit.saturating_mul(warm::SEGMENT_FRAMES));
            let above = self.used.saturating_sub(self.frames());
            self.surplus = if above > 0 { above + SPARE_FRAMES } else { 0 };
        }
    }

    /// Whether the client holds no more than it may.
    #[must_use]
    pub fn is_within_budget(&self) -> bool {
        self.used * PAGE + self.overhead() <= self.sizes.budget
    }

    /// Whether anybody waits for a frame or a buffer.
    #[must_use]
    pub fn is_starved(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether page tables, ring and buffers leave next to nothing of the budget for pages.
    #[must_use]
    pub fn is_filled_by_tables(&self) -> bool {
        self.sizes.budget < self.sizes.overhead() + self.table_bytes + FEWEST_FRAMES * PAGE
    }

    /// Whether swap could not be written lately.
    #[must_use]
    pub fn has_write_errors(&self) -> bool {
        self.write_retry_at > 0
    }

    /// Whether an operation on the swap file is in flight.
    #[must_use]
    pub fn has_io(&self) -> bool {
        self.ops.len() > self.free_ops.len()
    }

    /// Whether somebody waits for a read in flight.
    #[must_use]
    pub fn awaits_reads(&self) -> bool {
        self.awaited > 0
    }

    /// When the pager wants to be told the time again, if it waits for anything.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        // Without a free batch nothing can be asked; one that gets free is an event of its own.
        let first = self.discarded.front().into_iter().chain(self.discarded_later.front());
        let can_probe = !self.agentless && self.probe_batch().is_some();
        let grace = first.map(|d| d.since + DISCARD_GRACE_MS).min().filter(|_| can_probe);
        let stuck = self.wants_stuck().then_some(self.stuck_retry_at);
        let write = (!self.dirty.is_empty() && self.write_retry_at > 0).then_some(self.write_retry_at);
        [grace, stuck, write, self.files.deadline()].into_iter().flatten().min()
    }

    /// The regions.
    #[must_use]
    pub fn regions(&self) -> &Regions {
        &self.regions
    }

    /// Figures as of now.
    #[must_use]
    pub fn stats(&self) -> ClientStats {
        ClientStats {
            budget_bytes: self.sizes.budget,
            resident_pages: self.used,
            overhead_bytes: self.overhead(),
            packed_pages: self.warm.live_pages(),
            packed_bytes: self.warm.bytes(),
            pages_readahead_unused: self.streams.unused(),
            ..self.stats
        }
    }

    fn low_water(&self) -> u64 {
        (self.frames() / 32).clamp(8, 4096)
    }

    fn high_water(&self) -> u64 {
        self.low_water() * 2
    }

    fn word(&self, page: PageId) -> Word {
        self.regions.get(page.region()).map_or(Word::default(), |r| r.table.word(&self.arena, page.index()))
    }

    /// Hash of the bytes in the page's slot.
    #[must_use]
    pub fn slot_hash(&self, page: PageId) -> u64 {
        self.regions.get(page.region()).map_or(0, |r| r.table.hash(&self.arena, page.index()))
    }

    /// The page's third word.
    fn aux(&self, page: PageId) -> u64 {
        self.regions.get(page.region()).map_or(0, |r| r.table.aux(&self.arena, page.index()))
    }

    fn set_aux(&mut self, page: PageId, aux: u64) {
        if let Some(region) = self.regions.get_mut(page.region()) {
            region.table.set_aux(&mut self.arena, page.index(), aux);
        }
    }

    /// Writes a page's word and keeps the counts. All changes of state go through here.
    fn set(&mut self, page: PageId, new: Word) {
        let Some(region) = self.regions.get_mut(page.region()) else { return };
        let old = region.table.word(&self.arena, page.index());
        if old == new {
            return;
        }
        let bytes = region.table.bytes();
        if !region.table.set_word(&mut self.arena, page.index(), new) {
            // Only a chunk that does not exist can fail to be made, and `reserve` makes it before a page leaves `Zero`.
            debug_assert!(false, "page table out of space");
            return;
        }
        self.table_bytes += region.table.bytes() - bytes;
        let (before, after) = (old.state(), new.state());
        if before != after {
            if before == State::Warm || after == State::Warm {
                let place = Place::from_word(region.table.aux(&self.arena, page.index()));
                self.warm.set_live(place, after == State::Warm);
            }
            count(&mut self.used, before.has_frame(), after.has_frame());
            if self.surplus > 0 && before.has_frame() && !after.has_frame() {
                let overhead = self.sizes.overhead() + self.table_bytes + self.warm.bytes();
                let above = self.used.saturating_sub(self.sizes.budget.saturating_sub(overhead) / PAGE);
                let most = if above > 0 { above + SPARE_FRAMES } else { 0 };
                self.surplus = (self.surplus - self.used % 2).min(most);
            }
            count(&mut region.resident, before.has_frame(), after.has_frame());
            count(&mut region.swapped, before.is_swapped(), after.is_swapped());
            count(&mut self.stats.swapped_pages, before.is_swapped(), after.is_swapped());
            let lost = |state| state == State::Poisoned;
            count(&mut region.poisoned, lost(before), lost(after));
            count(&mut self.stats.poisoned_pages, lost(before), lost(after));
            count(&mut self.evicting, before == State::Evicting, after == State::Evicting);
            self.stats.peak_resident_pages = self.stats.peak_resident_pages.max(self.used);
            self.stats.peak_held_bytes = self.stats.peak_held_bytes.max(self.used * PAGE + self.overhead());
        }
        let awaited = |word: Word| word.state() == State::Fetching && word.has(WANTED);
        count(&mut self.awaited, awaited(old), awaited(new));
        count(&mut self.stats.unevictable_pages, old.has(STUCK), new.has(STUCK));
        count(&mut self.stats.slots, old.has(HAS_SLOT), new.has(HAS_SLOT));
    }

    /// Puts a hot page at the end of its queue, unless it stands in one already.
    fn enqueue(&mut self, page: PageId) {
        let word = self.word(page);
        if word.has(QUEUED) {
            return;
        }
        self.set(page, word.with(QUEUED));
        let queue = if word.has(MAIN) { &mut self.main } else { &mut self.probation };
        queue.push_back(page);
        // Pages leave by discards too: sweep now and then, so that the queue stays in proportion.
        if queue.len() as u64 > 2 * self.used + QUEUE_SLACK {
            let mut queue = std::mem::take(queue);
            queue.retain(|page| {
                let word = self.word(*page);
                let stays = word.state().has_frame();
                if !stays {
                    self.set(*page, word.without(QUEUED));
                }
                stays
            });
            if word.has(MAIN) { self.main = queue } else { self.probation = queue }
        }
    }

    /// Gives back the slot that a word names, if it owns one, and forgets the packed copy: what they hold is not the
    /// page's content any more. A slot whose write is in flight belongs to the write.
    fn drop_slot(&mut self, word: Word) -> Word {
        if let Some(slot) = word.slot() {
            self.store.give(slot);
        }
        word.without(HAS_SLOT | PENDING_SLOT | PACKED_COPY | UNPACK)
    }

    /// Takes the mapping's use of a buffer back.
    fn drop_source(&mut self, word: Word) -> Word {
        if word.state() == State::Mapping && word.has(FROM_BUFFER) {
            self.give_buffer(word.buffer());
        }
        word.without(FROM_BUFFER)
    }

    fn give_buffer(&mut self, buffer: Buffer) {
        if buffer < self.sizes.read_buffers {
            self.read_buffers.give(buffer);
        } else {
            self.write_buffers.give(buffer);
        }
    }

    fn share_buffer(&mut self, buffer: Buffer) {
        if buffer < self.sizes.read_buffers {
            self.read_buffers.share(buffer);
        } else {
            self.write_buffers.share(buffer);
        }
    }

    fn new_op(&mut self, slot: Slot, buffer: Buffer, hold_first: bool) -> u32 {
        let number = self.free_ops.pop().unwrap_or_else(|| {
            self.ops.push(Op::default());
            u32::try_from(self.ops.len() - 1).unwrap_or(u32::MAX)
        });
        let op = &mut self.ops[number as usize];
        op.pages.clear();
        (op.slot, op.buffer, op.hold_first) = (slot, buffer, hold_first);
        number
    }
}

/// Adjusts a gauge for something that may have started or ended to be counted.
fn count(gauge: &mut u64, before: bool, after: bool) {
    match (before, after) {
        (false, true) => *gauge += 1,
        (true, false) => *gauge -= 1,
        _ => {}
    }
}
