//! The pager core of one client: a deterministic state machine. Events go in (faults, what the agent found, I/O that
//! ended, discards, budgets, the time), actions come out. No system call, no clock, no thread.
//!
//! At every instant one place owns a page's bytes (see [`page::State`]); the owner changes only when the next one
//! holds them. Files: `faults` answers faults, `fetch` reads, `evict` picks pages and writes them out, `changes`
//! follows what the program does to its address space, `actions` hands out work and takes its results.
//!
//! Rules that callers keep, because correctness rests on them:
//! - events other than faults (discard, unmap, remap) are not fed while [`Pager::evicting`] is above zero, except when
//!   the agent itself waits for one of its faults: a page being moved would be in an unknown place;
//! - results come once for each action handed out, in any order.

mod actions;
pub mod buffers;
mod changes;
mod evict;
mod faults;
mod fetch;
#[cfg(test)]
mod model;
pub mod page;
pub mod ranges;
pub mod regions;
pub mod streams;
pub mod table;

pub use actions::Stop;
pub use changes::RegisterError;
pub use evict::Content;

use std::collections::VecDeque;

use fmalloc_proto::PAGE;
use fmalloc_proto::messages::ClientStats;
use fmalloc_proto::num::to_u64;
use fmalloc_proto::ring::{BatchKind, Layout};

use crate::arena::Arena;
use buffers::Buffers;
use page::{Buffer, FROM_BUFFER, HAS_SLOT, PENDING_SLOT, PageId, QUEUED, STUCK, Slot, State, Word};
use regions::Regions;
use streams::Streams;

/// Milliseconds for which a page that was discarded while present is left alone: the discarding thread is let go by the
/// kernel before it empties the page, and may be anywhere between the two for a while.
pub const DISCARD_GRACE_MS: u64 = 100;
/// Milliseconds between attempts to evict what the agent could not move.
const STUCK_RETRY_MS: u64 = 500;
/// Milliseconds to wait after a failed write before the next one.
const WRITE_RETRY_MS: u64 = 100;

/// Where slots and claims come from. Shared with other clients.
pub trait Store {
    /// Takes up to `want` neighbouring slots and gives the first and how many; none if all are taken for now.
    fn take(&mut self, want: u32) -> Option<(Slot, u32)>;
    /// Gives a slot back.
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

/// What the shell shall do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
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
    /// Map zeros for the agent, which itself faulted on a page that it was asked to move and that was discarded.
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
    /// Ask the agent to work on [`Pager::batch_pages`]; answer with [`Pager::evicted`] or [`Pager::probed`] for each
    /// page, then [`Pager::batch_ended`].
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

/// A batch that the agent works on.
#[derive(Debug, Default)]
struct Batch {
    pages: Vec<PageId>,
    /// For a probe: when each page was discarded. Empty for an eviction.
    since: Vec<u64>,
    busy: bool,
}

/// A page that was discarded while it was present.
#[derive(Debug, Clone, Copy)]
struct Discarded {
    page: PageId,
    since: u64,
    stamp: Buffer,
    probed: bool,
    /// Rounds of events that had been read when the entry was made: it waits for a later one.
    events: u64,
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
    table_bytes: u64,
    fifo: VecDeque<PageId>,
    stuck: VecDeque<PageId>,
    stuck_retry_at: u64,
    discarded: VecDeque<Discarded>,
    /// Stamp of the next discard.
    stamp: Buffer,
    /// Rounds in which all events were read.
    events_drained: u64,
    unclaimed: u64,
    poison_later: Vec<(PageId, u64)>,
    streams: Streams,
    read_buffers: Buffers,
    write_buffers: Buffers,
    ops: Vec<Op>,
    free_ops: Vec<u32>,
    batches: Vec<Batch>,
    evicting: u64,
    refilling: bool,
    /// No new evictions for now.
    held: bool,
    /// Pages to which the agent shall take access away.
    protect: Vec<PageId>,
    drains: VecDeque<Drain>,
    drained: Vec<(u64, u64)>,
    evictions: u64,
    /// Evicted pages that wait for a slot, with their buffers.
    dirty: VecDeque<(PageId, Buffer)>,
    write_retry_at: u64,
    writing: u32,
    /// Faults that wait for a frame or a buffer.
    waiting: VecDeque<PageId>,
    /// Faults at addresses that belong to no region as far as is known.
    unknown: Vec<u64>,
    /// Ranges to be read in because somebody said that they will be needed.
    willneed: VecDeque<(u16, std::ops::Range<u64>)>,
    map_queue: VecDeque<PageId>,
    maps_blocked: bool,
    out: VecDeque<Action>,
    now: u64,
    stats: ClientStats,
}

impl<S: Store> Pager<S> {
    /// A pager without regions.
    #[must_use]
    pub fn new(store: S, arena: Arena, sizes: Sizes) -> Self {
        let Sizes { read_buffers, write_buffers, ring, .. } = sizes;
        let batch = || {
            let capacity = ring.batch_pages() as usize;
            Batch { pages: Vec::with_capacity(capacity), since: Vec::with_capacity(capacity), busy: false }
        };
        Self {
            store,
            arena,
            regions: Regions::default(),
            sizes,
            used: 0,
            table_bytes: 0,
            fifo: VecDeque::new(),
            stuck: VecDeque::new(),
            stuck_retry_at: 0,
            discarded: VecDeque::new(),
            stamp: 0,
            events_drained: 1,
            unclaimed: 0,
            poison_later: Vec::new(),
            streams: Streams::default(),
            read_buffers: Buffers::new(0..read_buffers),
            write_buffers: Buffers::new(read_buffers..read_buffers + write_buffers),
            ops: Vec::new(),
            free_ops: Vec::new(),
            batches: (0..ring.batches()).map(|_| batch()).collect(),
            evicting: 0,
            refilling: false,
            held: false,
            protect: Vec::new(),
            drains: VecDeque::new(),
            drained: Vec::new(),
            evictions: 0,
            dirty: VecDeque::new(),
            write_retry_at: 0,
            writing: 0,
            waiting: VecDeque::new(),
            unknown: Vec::new(),
            willneed: VecDeque::new(),
            map_queue: VecDeque::new(),
            maps_blocked: false,
            out: VecDeque::new(),
            now: 0,
            stats: ClientStats::default(),
        }
    }

    /// Tells the time, in milliseconds from any origin; never goes back.
    pub fn set_now(&mut self, now: u64) {
        self.now = self.now.max(now);
    }

    /// Frames that the client may have: its budget less ring, buffers and page tables.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.sizes.budget.saturating_sub(self.overhead()) / PAGE
    }

    /// Bytes that the daemon holds for this client.
    #[must_use]
    pub fn overhead(&self) -> u64 {
        self.sizes.overhead() + self.table_bytes
    }

    /// Frames that are free.
    #[must_use]
    pub fn free_frames(&self) -> u64 {
        self.frames().saturating_sub(self.used)
    }

    /// Pages that the agent is moving out.
    #[must_use]
    pub fn evicting(&self) -> u64 {
        self.evicting
    }

    /// Changes the budget. The client gets within it as fast as its agent moves pages out.
    pub fn set_budget(&mut self, bytes: u64) {
        self.sizes.budget = bytes;
    }

    /// Whether the client holds no more frames than it may.
    #[must_use]
    pub fn is_within_budget(&self) -> bool {
        self.used <= self.frames()
    }

    /// Whether anybody waits for a frame or a buffer.
    #[must_use]
    pub fn is_starved(&self) -> bool {
        !self.waiting.is_empty()
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

    /// When the pager wants to be told the time again, if it waits for anything.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        let grace = self.discarded.front().map(|d| d.since + DISCARD_GRACE_MS);
        let stuck = (!self.stuck.is_empty() && self.free_frames() < self.low_water()).then_some(self.stuck_retry_at);
        let write = (!self.dirty.is_empty() && self.write_retry_at > 0).then_some(self.write_retry_at);
        [grace, stuck, write].into_iter().flatten().min()
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

    /// Writes a page's word and keeps the counts. All changes of state go through here.
    fn set(&mut self, page: PageId, new: Word) {
        let Some(region) = self.regions.get_mut(page.region()) else { return };
        let old = region.table.word(&self.arena, page.index());
        let bytes = region.table.bytes();
        if !region.table.set_word(&mut self.arena, page.index(), new) {
            // Only a chunk that does not exist can fail to be made, and `reserve` makes it before a page leaves `Zero`.
            debug_assert_eq!(old, new, "page table out of space");
            return;
        }
        self.table_bytes += region.table.bytes() - bytes;
        let (before, after) = (old.state(), new.state());
        if before != after {
            count(&mut self.used, before.has_frame(), after.has_frame());
            count(&mut region.resident, before.has_frame(), after.has_frame());
            count(&mut region.swapped, before.is_swapped(), after.is_swapped());
            count(&mut self.stats.swapped_pages, before.is_swapped(), after.is_swapped());
            let lost = |state| state == State::Poisoned;
            count(&mut region.poisoned, lost(before), lost(after));
            count(&mut self.stats.poisoned_pages, lost(before), lost(after));
            count(&mut self.evicting, before == State::Evicting, after == State::Evicting);
            self.stats.peak_resident_pages = self.stats.peak_resident_pages.max(self.used);
        }
        count(&mut self.stats.unevictable_pages, old.has(STUCK), new.has(STUCK));
        count(&mut self.stats.slots, old.has(HAS_SLOT), new.has(HAS_SLOT));
    }

    /// Puts a hot page at the end of the FIFO, unless it stands there already.
    fn enqueue(&mut self, page: PageId) {
        let word = self.word(page);
        if !word.has(QUEUED) {
            self.set(page, word.with(QUEUED));
            self.fifo.push_back(page);
        }
    }

    /// Gives back the slot that a word names, if it owns one. A slot whose write is in flight belongs to the write.
    fn drop_slot(&mut self, word: Word) -> Word {
        if let Some(slot) = word.slot() {
            self.store.give(slot);
        }
        word.without(HAS_SLOT | PENDING_SLOT)
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
