//! Reads pages back: the one that is wanted, and windows ahead of sequential readers.
//!
//! The pages of a window are mapped as soon as they are read, except the first, which is held back: the fault on it
//! shows that the reader has come so far, and starts the next window while the reader works through this one.

use std::ops::Range;

use fmalloc_proto::messages::Advice;

use super::page::{Buffer, FROM_BUFFER, PageId, RETRIED, State, WANTED, Word};
use super::{Action, MAX_HINTS, Pager, Store, Transfer};

/// Most pages of one read ahead: more of them in flight are better than larger ones.
const READ_MAX: u64 = 64;

impl<S: Store> Pager<S> {
    /// Starts to read a cold page into a frame. False if no buffer is free. The caller has seen a free frame.
    pub(super) fn fetch_one(&mut self, page: PageId) -> bool {
        if self.read_buffers.free() == 0 {
            return false;
        }
        self.fetch_run(page, 1, WANTED, false) == 1
    }

    /// Continues the stream that a fault on `page` belongs to, if any.
    pub(super) fn read_ahead(&mut self, page: PageId) {
        let Some(region) = self.regions.get(page.region()) else { return };
        let (index, advice) = (page.index(), region.advice_at(page.index()));
        if advice == Advice::Random {
            return;
        }
        let max = (self.read_buffers.len() as u64 / 4).min(self.frames() / 16).max(1);
        let max = self.streams.widest(max);
        let Some(stream) = self.streams.advance(page.region(), index) else { return };
        let (mut end, mut window, step) = (stream.end, stream.window, stream.step);
        if advice == Advice::Sequential && window == 0 {
            window = max / 4;
        }
        let mut ahead = stream.ahead();
        // When the reader comes to the last window the next one is due, so that it is in flight while he is at this one.
        while ahead <= window {
            window = (window * 2).clamp(8.min(max), max);
            let first = PageId::new(page.region(), end);
            let asked = match step {
                1 => self.window(first, window, ahead > 0),
                _ => self.stepped_window(first, step, window, ahead > 0),
            };
            self.streams.asked(asked);
            let steps = i64::try_from(asked).unwrap_or(0);
            end = end.saturating_add_signed(steps * step);
            ahead += asked;
            if asked < window {
                break;
            }
        }
        if let Some(stream) = self.streams.last(page.region()) {
            (stream.end, stream.window, stream.fills) = (end, window, false);
        }
    }

    /// [`Pager::window`] for streams that go backward, or leave pages out.
    fn stepped_window(&mut self, first: PageId, step: i64, want: u64, hold: bool) -> u64 {
        let exists = |page: &PageId| self.regions.place(*page).is_some();
        let page = |n: u64| {
            let index = first.index().checked_add_signed(i64::try_from(n).ok()?.checked_mul(step)?)?;
            Some(PageId::new(first.region(), index)).filter(exists)
        };
        let pages = (0..want).map_while(page).count() as u64;
        if pages == 0 {
            return 0;
        }
        self.window(first, 1, hold);
        if step == -1 {
            // In one piece, and from front to back as it lies in the swap file.
            let lowest = PageId::new(first.region(), first.index() + 1 - pages);
            self.window(lowest, pages - 1, false);
        } else {
            for n in 1..i64::try_from(pages).unwrap_or(0) {
                let index = first.index().saturating_add_signed(n * step);
                self.window(PageId::new(first.region(), index), 1, false);
            }
        }
        pages
    }

    /// Reads the cold ones of up to `want` pages; the first of them is held back if `hold` says so. Gives how many
    /// pages were looked at; fewer than asked where frames, buffers or the region end.
    fn window(&mut self, first: PageId, want: u64, hold: bool) -> u64 {
        let Some((_, run)) = self.regions.place(first) else { return 0 };
        if self.has_file(first) {
            return self.window_file(first, want.min(run), hold);
        }
        let end = first.index() + want.min(run);
        let mut index = first.index();
        let mut hold = hold;
        while index < end {
            let page = PageId::new(first.region(), index);
            let state = self.word(page).state();
            let packed = matches!(state, State::Warm | State::Filled);
            if state != State::Cold && (hold || !packed) {
                // A packed page costs nobody a wait: it is held back by being left alone.
                hold &= !packed;
                index = self.next_present(page).min(end);
                continue;
            }
            let want = self.room_ahead(end - index);
            let fetched = match want {
                0 => 0,
                _ if packed => self.unpack_run(page, want, 0),
                _ => self.fetch_run(page, want, 0, hold),
            };
            if fetched == 0 {
                break;
            }
            self.stats.pages_readahead += fetched;
            index += fetched;
            hold = false;
        }
        index - first.index()
    }

    /// How many of `want` pages may be read ahead now. Faults come first: frames and buffers are left to them.
    pub(super) fn room_ahead(&self, want: u64) -> u64 {
        let spare = self.free_frames().saturating_sub(self.low_water() / 2);
        let buffers = self.read_buffers.free().saturating_sub(self.read_buffers.len() / 4);
        want.min(spare).min(buffers as u64).min(READ_MAX)
    }

    /// Reads as many of `want` pages as are cold and lie in neighbouring slots, from `first` on. The caller has seen
    /// that the frames are free. Gives how many.
    pub(super) fn fetch_run(&mut self, first: PageId, want: u64, flags: u64, hold_first: bool) -> u64 {
        let Some(slot) = self.word(first).slot() else { return 0 };
        let cold = |n: &u64| {
            let word = self.word(first.plus(*n));
            word.state() == State::Cold && u64::from(slot) + n == u64::from(word.slot_field())
        };
        let neighbours = (0..want).take_while(cold).count();
        let Some((buffer, count)) = self.read_buffers.take(neighbours) else { return 0 };
        let op = self.new_op(slot, buffer, hold_first);
        for n in 0..count {
            let page = first.plus(n as u64);
            let into = buffer + Buffer::try_from(n).unwrap_or(0);
            let word = self.came_back(page, self.word(page), flags & WANTED != 0);
            let word = word.with_state(State::Fetching).with_buffer(into).without(RETRIED);
            self.set(page, word.with(flags));
            self.ops[op as usize].pages.push(page);
        }
        let pages = u32::try_from(count).unwrap_or(0);
        self.out.push_back(Action::Read(Transfer { op, slot, buffer, pages }));
        count as u64
    }

    /// The pages of a transfer, in order.
    #[must_use]
    pub fn op_pages(&self, op: u32) -> &[PageId] {
        &self.ops[op as usize].pages
    }

    /// The buffer of page `n` of a transfer.
    #[must_use]
    pub fn op_buffer(&self, op: u32, n: usize) -> Buffer {
        self.op_entry(op, n).buffer
    }

    /// Page `n` of read `op` has come; `good` says whether it was read and its hash is right.
    pub fn page_read(&mut self, op: u32, n: usize, good: bool) {
        let Op { page, buffer, slot, held } = self.op_entry(op, n);
        let word = self.word(page);
        let live = word.state() == State::Fetching && word.buffer() == buffer;
        if !live {
            // Discarded meanwhile: what was read is nobody's.
            self.store.give(slot);
            self.read_buffers.give(buffer);
        } else if good {
            self.stats.pages_in += 1;
            self.arrived(page, word, held);
        } else {
            self.stats.io_errors += 1;
            self.read_failed(page, buffer);
        }
    }

    /// A page has been read: maps it, or holds it back until somebody faults.
    pub(super) fn arrived(&mut self, page: PageId, word: Word, held: bool) {
        if held && !word.has(WANTED) {
            self.set(page, word.with_state(State::Held));
            self.tripwires.push_back(page);
            // Readers that never came must not keep the buffers.
            if self.tripwires.len() > self.read_buffers.len() / 4 {
                self.release_tripwire();
            }
        } else {
            self.set(page, word.with_state(State::Mapping).with(FROM_BUFFER));
            self.map_queue.push_back(page);
        }
    }

    fn read_failed(&mut self, page: PageId, buffer: Buffer) {
        let word = self.word(page);
        if !word.has(WANTED) {
            // Nobody has asked for it yet; whoever does will have it read again.
            self.read_buffers.give(buffer);
            self.set(page, word.with_state(State::Cold));
        } else if word.has(RETRIED) {
            self.read_buffers.give(buffer);
            let word = self.drop_slot(word).without(RETRIED);
            self.set(page, word);
            self.lose(page);
        } else {
            self.set(page, word.with(RETRIED));
            let slot = word.slot_field();
            let op = self.new_op(slot, buffer, false);
            self.ops[op as usize].pages.push(page);
            self.out.push_back(Action::Read(Transfer { op, slot, buffer, pages: 1 }));
        }
    }

    /// Read `op` has been answered page by page.
    pub fn read_ended(&mut self, op: u32) {
        self.free_ops.push(op);
    }

    /// Lets the page that has been held longest go back to its slot. False if none is held.
    pub(super) fn release_tripwire(&mut self) -> bool {
        let Some(page) = self.tripwires.pop_front() else { return false };
        let word = self.word(page);
        if word.state() == State::Held {
            self.read_buffers.give(word.buffer());
            let from = if word.slot().is_some() { State::Cold } else { State::Zero };
            self.set(page, word.with_state(from));
        }
        true
    }

    /// Somebody will need these pages soon.
    pub(super) fn will_need(&mut self, region: u16, range: Range<u64>) {
        if self.willneed.len() < MAX_HINTS {
            self.willneed.push_back((region, range));
        }
    }

    /// Reads on in ranges that will be needed, as far as frames and buffers allow; what does not fit is left out.
    pub(super) fn continue_willneed(&mut self) {
        while let Some((region, range)) = self.willneed.front_mut() {
            let (page, want) = (PageId::new(*region, range.start), range.end.saturating_sub(range.start));
            let asked = self.window(page, want, false);
            if asked < want && self.has_io() {
                // Goes on when a transfer ends.
                if let Some((_, range)) = self.willneed.front_mut() {
                    range.start += asked;
                }
                return;
            }
            self.willneed.pop_front();
        }
    }

    /// What entry `n` of an operation is about.
    pub(super) fn op_entry(&self, op: u32, n: usize) -> Op {
        let (op, n16) = (&self.ops[op as usize], Buffer::try_from(n).unwrap_or(0));
        Op {
            page: op.pages[n],
            buffer: op.buffer + n16,
            slot: op.slot + u32::from(n16),
            held: op.hold_first && n == 0,
        }
    }
}

/// One page of an operation.
pub(super) struct Op {
    pub(super) page: PageId,
    pub(super) buffer: Buffer,
    pub(super) slot: super::Slot,
    pub(super) held: bool,
}
