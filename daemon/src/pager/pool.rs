//! Puts pages into the warm pool and takes them out again: which are packed, when they are unpacked, and how the pool is
//! kept within its share of the budget.

use super::page::{Buffer, FROM_BUFFER, IN_FILE, MAIN, PACKED_COPY, PageId, State, UNPACK, WANTED, Word};
use super::warm::{Entry, Place, SEGMENT, SEGMENT_FRAMES};
use super::{Action, Packed, Pager, Store};

/// A page that packs into more bytes than these goes to the swap file as it is.
pub const WORTH_PACKING: usize = 3072;
/// Segments that are emptied ahead of demand.
const AHEAD: u64 = 4;
/// A pool of fewer segments is none.
const LEAST: u64 = 16;

/// A segment that is being emptied.
#[derive(Debug, Clone, Copy)]
pub(super) struct Emptying {
    segment: u32,
    at: u64,
    /// What is live in it is kept; else it goes to the swap file.
    keep: bool,
}

impl<S: Store> Pager<S> {
    /// Whether the bytes of a page that the agent has moved out, with this hash, shall be packed before
    /// [`Pager::evicted`] is called.
    pub fn wants_packed(&mut self, page: PageId, hash: u64) -> bool {
        let word = self.word(page);
        if word.state() != State::Evicting || word.has(WANTED) {
            return false;
        }
        if self.is_written_back(page, word, hash) {
            return false;
        }
        if self.split.wants_sample() {
            return true;
        }
        self.warm_limit > 0
            && !self.is_draining()
            && !(word.has(PACKED_COPY) && self.slot_hash(page) == hash)
            && (self.warm.has_room(WORTH_PACKING) || self.may_grow())
    }

    /// Whether somebody wants memory to be freed, not packed.
    fn is_draining(&self) -> bool {
        self.drains.iter().any(|drain| drain.token != u64::MAX)
    }

    /// Whether the pool may have another segment now.
    fn may_grow(&self) -> bool {
        self.warm.segments() < self.warm_limit && self.has_segment()
    }

    /// Whether there is memory for another segment.
    fn has_segment(&self) -> bool {
        self.warm.is_ready() || self.free_frames() >= SEGMENT_FRAMES
    }

    /// Takes a page that was moved out into the pool, if it packs well and there is room. `word` keeps a slot that holds
    /// the same bytes.
    pub(super) fn admit(&mut self, page: PageId, word: Word, packed: Option<&[u8]>, same: bool) -> bool {
        let stamp = self.stamp_now();
        if same && word.has(PACKED_COPY) {
            let place = Place::from_word(self.aux(page));
            self.warm.restamp(&mut self.arena, place, stamp);
            self.set(page, word.with_state(State::Warm));
            return true;
        }
        let Some(bytes) = packed else { return false };
        self.split.packed(if bytes.len() > WORTH_PACKING { usize::MAX } else { bytes.len() });
        if self.warm_limit == 0 || bytes.len() > WORTH_PACKING || self.is_draining() {
            return false;
        }
        let may_grow = self.may_grow();
        let Some(place) = self.warm.add(&mut self.arena, page, stamp, bytes, may_grow) else {
            return false;
        };
        self.set_aux(page, place.word());
        self.set(page, word.with(PACKED_COPY).with_state(State::Warm));
        true
    }

    /// When an eviction happens, on the clock of evictions.
    #[allow(clippy::cast_possible_truncation, reason = "the clock wraps around; distances are differences")]
    pub(super) fn stamp_now(&self) -> u32 {
        self.evictions as u32
    }

    /// Notes that a page comes back, and whether it belongs into the main queue. A thread waits for it, or it is read
    /// ahead.
    pub(super) fn came_back(&mut self, page: PageId, word: Word, waited: bool) -> Word {
        #[allow(clippy::cast_possible_truncation, reason = "as in stamp_now")]
        let stamp = match word.state() {
            _ if word.has(PACKED_COPY) => self.warm.stamp(&self.arena, Place::from_word(self.aux(page))),
            State::Cold | State::Writing => self.aux(page) as u32,
            _ => return word.without(MAIN),
        };
        let distance = u64::from(self.stamp_now().wrapping_sub(stamp));
        self.split.came_back(distance, self.budget_pages(), waited);
        // What comes back within the time that a page stays resident is worth more than what is new.
        if waited && distance < self.frames() { word.with(MAIN) } else { word.without(MAIN) }
    }

    pub(super) fn budget_pages(&self) -> u64 {
        self.sizes.budget / fmalloc_proto::PAGE
    }

    /// Starts to bring in a page that is packed, or filled with eight bytes. False if no buffer is free. The caller has
    /// seen a free frame.
    pub(super) fn unpack_one(&mut self, page: PageId) -> bool {
        self.unpack_run(page, 1, WANTED) == 1
    }

    /// The same for up to `want` neighbours. Gives how many.
    pub(super) fn unpack_run(&mut self, first: PageId, want: u64, flags: u64) -> u64 {
        let packed = |n: &u64| matches!(self.word(first.plus(*n)).state(), State::Warm | State::Filled);
        let neighbours = (0..want).take_while(packed).count();
        let Some((buffer, count)) = self.read_buffers.take(neighbours) else { return 0 };
        for n in 0..count {
            let page = first.plus(n as u64);
            let into = buffer + Buffer::try_from(n).unwrap_or(0);
            let word = self.came_back(page, self.word(page), flags & WANTED != 0).with_buffer(into);
            self.set(page, word.with_state(State::Mapping).with(FROM_BUFFER | UNPACK | flags));
            self.unpack_queue.push_back(page);
            self.map_queue.push_back(page);
        }
        count as u64
    }

    /// The next page to be unpacked into its buffer.
    pub(super) fn next_unpack(&mut self) -> Option<Action> {
        while let Some(page) = self.unpack_queue.pop_front() {
            let word = self.word(page);
            if !word.has(UNPACK) || !matches!(word.state(), State::Mapping | State::Writing) {
                continue;
            }
            let from = if word.has(PACKED_COPY) {
                let (offset, len) = self.warm.data(Place::from_word(self.aux(page)));
                Packed::Bytes { offset, len }
            } else {
                Packed::Fill(self.aux(page))
            };
            return Some(Action::Unpack { page, buffer: word.buffer(), from });
        }
        None
    }

    /// The packed bytes that [`Action::Unpack`] names.
    #[must_use]
    pub fn packed_bytes(&self, offset: u64, len: u64) -> &[u8] {
        self.arena.bytes(offset, len)
    }

    /// Result of [`Action::Unpack`]: the page's bytes are in its buffer, or what was packed is damaged.
    pub fn unpacked(&mut self, page: PageId, good: bool) {
        let word = self.word(page);
        if !word.has(UNPACK) {
            return;
        }
        if !good {
            self.stats.io_errors += 1;
            self.unpack_failed(page, word);
            return;
        }
        if word.state() == State::Writing {
            // The copy's segment is about to go.
            self.drop_copy(page, word.without(UNPACK));
        } else {
            self.set(page, word.without(UNPACK));
        }
    }

    /// RAM has failed. The slot may still have the bytes.
    fn unpack_failed(&mut self, page: PageId, word: Word) {
        self.drop_copy(page, word.without(UNPACK));
        let word = self.word(page);
        if word.state() == State::Writing {
            // The entry among the dirty pages gives the buffer back.
            self.set(page, word.with_state(State::Zero));
            self.lose(page);
            return;
        }
        let word = self.drop_source(word);
        if word.has(IN_FILE) {
            self.settle_in_file(page, word);
        } else if word.slot().is_some() {
            self.set(page, word.without(WANTED).with_state(State::Cold));
            if word.has(WANTED) {
                self.bring(page);
            }
        } else {
            self.set(page, word);
            self.lose(page);
        }
    }

    /// Forgets a page's packed copy, which is not its owner. The third word says from now on when the page was evicted.
    fn drop_copy(&mut self, page: PageId, word: Word) {
        if word.has(PACKED_COPY) {
            let stamp = self.warm.stamp(&self.arena, Place::from_word(self.aux(page)));
            self.set(page, word.without(PACKED_COPY));
            self.set_aux(page, u64::from(stamp));
        } else {
            self.set(page, word);
        }
    }

    /// Sets the pool's share, in pages, within what the budget has left for it.
    pub(super) fn set_warm_pages(&mut self, pages: u64) {
        let most = (self.sizes.budget.saturating_sub(self.sizes.overhead() + self.table_bytes)) / 8 * 7;
        let segments = (pages / SEGMENT_FRAMES).min(most / SEGMENT);
        self.warm_limit = if segments < LEAST { 0 } else { segments };
    }

    /// Empties segments: ahead of demand, or because the pool has more than its share. What is kept stays in the pool, the
    /// rest goes to the swap file.
    pub(super) fn plan_warm(&mut self) {
        loop {
            self.warm.keep_ready(&mut self.arena, self.warm_limit);
            let Some(mut emptying) = self.emptying.take().or_else(|| self.next_emptying()) else { return };
            let done = self.empty(&mut emptying);
            // What is to be unpacked from it is unpacked before the next call.
            if !done || !self.unpack_queue.is_empty() {
                self.emptying = Some(emptying);
                return;
            }
            self.warm.free(emptying.segment);
        }
    }

    fn next_emptying(&mut self) -> Option<Emptying> {
        let held = self.warm.segments();
        let ahead = if self.warm_limit == 0 { 0 } else { AHEAD };
        if held == 0 || held + ahead <= self.warm_limit {
            return None;
        }
        let (segment, keep) = self.warm.victim(self.warm_limit > 0 && held <= self.warm_limit + 1)?;
        Some(Emptying { segment, at: 0, keep })
    }

    /// Goes on emptying a segment. Whether all of it has been seen to.
    fn empty(&mut self, emptying: &mut Emptying) -> bool {
        while let Some((entry, next)) = self.warm.entry(&self.arena, emptying.segment, emptying.at) {
            let word = self.word(entry.page);
            if word.has(PACKED_COPY) && self.aux(entry.page) == entry.place.word() {
                let moved = match word.state() {
                    State::Warm => (emptying.keep && self.keep(&entry)) || self.spill(&entry, word),
                    // Goes on when it has been unpacked.
                    State::Mapping | State::Writing if word.has(UNPACK) => false,
                    _ => {
                        self.drop_copy(entry.page, word);
                        true
                    }
                };
                if !moved {
                    return false;
                }
            }
            emptying.at = next;
        }
        true
    }

    fn keep(&mut self, entry: &Entry) -> bool {
        let may_grow = self.has_segment();
        let Some(place) = self.warm.keep(&mut self.arena, *entry, may_grow) else { return false };
        self.warm.set_live(entry.place, false);
        self.set_aux(entry.page, place.word());
        self.warm.set_live(place, true);
        true
    }

    /// Sends a warm page to the swap file, or leaves it to the slot that has it already. False if that must wait.
    fn spill(&mut self, entry: &Entry, word: Word) -> bool {
        if word.slot().is_some() {
            self.drop_copy(entry.page, word.with_state(State::Cold));
            return true;
        }
        if word.has(IN_FILE) {
            self.settle_in_file(entry.page, word);
            return true;
        }
        // What the agent moves out comes first.
        let coming = usize::try_from(self.evicting()).unwrap_or(usize::MAX);
        if self.write_buffers.free() <= coming {
            return false;
        }
        let Some(buffer) = self.take_write_buffer() else { return false };
        self.set(entry.page, word.with_state(State::Writing).with(UNPACK).with_buffer(buffer));
        self.unpack_queue.push_back(entry.page);
        self.dirty.push_back((entry.page, buffer));
        self.stats.pages_spilled += 1;
        true
    }
}
