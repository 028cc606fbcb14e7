//! Keeps frames free: picks pages from the FIFO, takes what the agent moved out, and writes what has changed.
//!
//! A page that was read in keeps its slot; if its bytes have the hash that the slot has, nothing is written. Zeros are
//! a table entry. Whatever is left goes to neighbouring slots in large writes.

use std::ops::Range;

use fmalloc_proto::ring::{BatchKind, PageResult};

use super::page::{
    Buffer, FRESH, FROM_BUFFER, HAS_SLOT, IN_FILE, PACKED_COPY, PENDING_SLOT, PageId, QUEUED, STUCK, State,
    WANTED,
};
use super::table::CHUNK_PAGES;
use super::{
    Action, DISCARD_GRACE_MS, Discarded, Drain, Pager, QUEUE_SLACK, STUCK_RETRY_MS, Store, Transfer,
    WRITE_RETRY_MS,
};

/// What was found in a page that the agent moved out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Content {
    /// Keyed hash of its bytes.
    pub hash: u64,
    /// These eight bytes again and again are all that it holds.
    pub fill: Option<u64>,
}

impl<S: Store> Pager<S> {
    /// Puts work for the agent into the queue: what frees frames soon, then what somebody asked for.
    pub(super) fn plan(&mut self) {
        if self.agentless {
            return;
        }
        if self.wants_stuck() && self.now >= self.stuck_retry_at {
            self.retry_stuck();
        }
        while self.plan_protect() || self.plan_probe() || self.plan_copy() || self.plan_eviction() {}
        self.plan_warm();
    }

    /// Whether pages that could not be evicted shall be tried again.
    pub(super) fn wants_stuck(&self) -> bool {
        !self.stuck.is_empty()
            && !self.agentless
            && (self.free_frames() < self.low_water() || !self.drains.is_empty())
    }

    /// Stops (or allows) new evictions, so that events can be read or fed between them. Nothing is mapped meanwhile.
    pub fn hold_evictions(&mut self, hold: bool) {
        self.held = hold;
    }

    /// The kernel cannot poison `page`: the agent shall take access to it away.
    pub fn protect(&mut self, page: PageId) {
        if !self.protect.contains(&page) {
            self.protect.push(page);
        }
    }

    fn plan_protect(&mut self) -> bool {
        if self.protect.is_empty() {
            return false;
        }
        let Some(batch) = self.free_batch() else { return false };
        let mut protect = std::mem::take(&mut self.protect);
        // What was discarded in the meantime is sound again.
        protect.retain(|page| self.word(*page).state() == State::Poisoned);
        let most = protect.len().min(self.sizes.ring.batch_pages() as usize);
        let pages: Vec<PageId> = protect.drain(..most).collect();
        self.protect = protect;
        let any = !pages.is_empty();
        if any {
            self.ask(batch, BatchKind::Protect, pages);
        }
        any
    }

    /// The agent has answered for a page that was to be protected: whoever waits for it runs into the protection.
    pub fn protected(&mut self, page: PageId) {
        self.leave_agent(page);
        if let Some((addr, _)) = self.regions.place(page) {
            self.out.push_back(Action::Wake { addr, pages: 1 });
        }
    }

    /// Pages short of the high mark once all evictions in flight have ended; zero while the low mark is not touched.
    fn deficit(&mut self) -> u64 {
        let supply = self.frames() + self.evicting;
        if self.used + self.low_water() > supply {
            self.refilling = true;
        } else if self.used + self.high_water() <= supply {
            self.refilling = false;
        }
        if self.refilling { (self.used + self.high_water()).saturating_sub(supply) } else { 0 }
    }

    fn plan_eviction(&mut self) -> bool {
        if self.held {
            return false;
        }
        let deficit = self.deficit();
        if deficit == 0 && self.drains.is_empty() {
            return false;
        }
        let Some(batch) = self.free_batch() else { return false };
        // Each page that comes back needs a buffer at once: ask for no more than there are.
        let coming = usize::try_from(self.evicting()).unwrap_or(usize::MAX);
        let room = self.write_buffers.free().saturating_sub(coming);
        let most = (self.sizes.ring.batch_pages() as usize).min(room);
        let mut pages = std::mem::take(&mut self.batches[batch].pages);
        pages.clear();
        if deficit > 0 {
            self.pick_fifo(usize::try_from(deficit).unwrap_or(most).min(most), &mut pages);
        }
        if pages.len() < most {
            self.pick_drains(most, &mut pages);
        }
        if !pages.is_empty() {
            self.batches_asked += 1;
            self.batches[batch].number = self.batches_asked;
            self.ask(batch, BatchKind::Evict, pages);
            return true;
        }
        self.batches[batch].pages = pages;
        if deficit > 0 && most > 0 {
            // Nothing to be evicted: what is held for readers that may come, or packed, must not starve others.
            while self.release_tripwire() {}
            if self.evicting == 0 && self.is_starved() {
                self.set_warm_pages(0);
            }
        }
        self.end_drains();
        false
    }

    /// Asks whether discarded pages are still there: at once if frames are short, else when the grace is over.
    fn plan_probe(&mut self) -> bool {
        let Some(batch) = self.probe_batch() else { return false };
        let short = self.used + self.high_water() > self.frames();
        let mut pages = std::mem::take(&mut self.batches[batch].pages);
        pages.clear();
        self.batches[batch].probes.clear();
        while pages.len() < self.sizes.ring.batch_pages() as usize
            && let Some(entry) = self.next_probe(short)
        {
            self.set(entry.page, self.word(entry.page).with_state(State::Probing));
            self.batches[batch].probes.push(Discarded { remaps: self.remaps, ..entry });
            pages.push(entry.page);
        }
        let any = !pages.is_empty();
        if any {
            self.ask(batch, BatchKind::Probe, pages);
        } else {
            self.batches[batch].pages = pages;
        }
        any
    }

    fn next_probe(&mut self, short: bool) -> Option<Discarded> {
        let due = |entry: &Discarded| self.now >= entry.since + DISCARD_GRACE_MS;
        loop {
            let entry = if self.discarded_later.front().is_some_and(due) {
                self.discarded_later.pop_front()?
            } else if self.discarded.front().is_some_and(|entry| short || due(entry)) {
                self.discarded.pop_front()?
            } else {
                return None;
            };
            if self.is_suspect(&entry) {
                return Some(entry);
            }
        }
    }

    /// Whether an entry still says something about its page.
    fn is_suspect(&self, entry: &Discarded) -> bool {
        let word = self.word(entry.page);
        word.state() == State::Hot && word.has(FRESH) && word.buffer() == entry.stamp
    }

    pub(super) fn free_batch(&self) -> Option<usize> {
        self.batches.iter().position(|batch| batch.kind.is_none())
    }

    /// A batch for probes, which must not keep evictions waiting: they get half of the ring at most.
    pub(super) fn probe_batch(&self) -> Option<usize> {
        let probing = self.batches.iter().filter(|batch| batch.kind == Some(BatchKind::Probe)).count();
        if probing > 0 && probing >= self.batches.len() / 2 { None } else { self.free_batch() }
    }

    pub(super) fn ask(&mut self, batch: usize, kind: BatchKind, pages: Vec<PageId>) {
        for page in &pages {
            if let Some(region) = self.regions.get_mut(page.region()) {
                region.at_agent += 1;
            }
        }
        self.batches[batch].pages = pages;
        self.batches[batch].kind = Some(kind);
        self.out.push_back(Action::Ask { batch: u32::try_from(batch).unwrap_or(0), kind });
    }

    fn pick_fifo(&mut self, want: usize, pages: &mut Vec<PageId>) {
        while pages.len() < want {
            let Some(page) = self.next_hot() else { return };
            let word = self.word(page).without(QUEUED);
            // What was discarded comes back when it is known to be there; what has gone does not.
            let ready = word.state() == State::Hot && !word.has(FRESH) && self.regions.place(page).is_some();
            self.set(page, if ready { word.with_state(State::Evicting) } else { word });
            if ready {
                pages.push(page);
            }
        }
    }

    /// The hot page to go next: one on probation while those are more than their share, which is an eighth.
    fn next_hot(&mut self) -> Option<PageId> {
        if self.probation.len() as u64 * 8 >= self.used {
            self.probation.pop_front().or_else(|| self.main.pop_front())
        } else {
            self.main.pop_front().or_else(|| self.probation.pop_front())
        }
    }

    fn pick_drains(&mut self, most: usize, pages: &mut Vec<PageId>) {
        let mut drains = std::mem::take(&mut self.drains);
        for drain in drains.iter_mut().filter(|drain| !drain.exhausted) {
            let room = u64::try_from(most - pages.len()).unwrap_or(0).min(drain.remaining);
            let before = pages.len();
            let want = before + usize::try_from(room).unwrap_or(0);
            match &mut drain.range {
                None => self.pick_fifo(want, pages),
                Some((region, range)) => {
                    while pages.len() < want && range.start < range.end {
                        let page = PageId::new(*region, range.start);
                        range.start = self.next_present(page);
                        let word = self.word(page);
                        let ready = word.state() == State::Hot && !word.has(FRESH) && !word.has(STUCK);
                        if ready && self.regions.place(page).is_some() {
                            self.set(page, word.with_state(State::Evicting));
                            pages.push(page);
                        }
                    }
                }
            }
            if pages.len() > before {
                drain.remaining -= (pages.len() - before) as u64;
                drain.last_batch = self.batches_asked + 1;
            }
            drain.exhausted = drain.remaining == 0 || pages.len() < want;
        }
        self.drains = drains;
    }

    /// The index behind `page` at which something can be present: pages without a table are skipped.
    pub(super) fn next_present(&self, page: PageId) -> u64 {
        let next = page.index() + 1;
        match self.regions.get(page.region()) {
            Some(region) if !region.table.has_chunk(&self.arena, page.index()) => {
                next.next_multiple_of(CHUNK_PAGES)
            }
            _ => next,
        }
    }

    /// Asks for up to `pages` pages to be evicted, from a range of a region or from anywhere; see [`Pager::drained`].
    pub fn drain(&mut self, token: u64, range: Option<(u16, Range<u64>)>, pages: u64) {
        let evictions_before = self.evictions;
        let exhausted = pages == 0;
        self.drains.push_back(Drain {
            token,
            range,
            remaining: pages,
            evictions_before,
            last_batch: 0,
            exhausted,
        });
    }

    /// Drains that have ended since the last call: token and pages evicted meanwhile.
    pub fn drained(&mut self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.drained)
    }

    fn end_drains(&mut self) {
        let evictions = self.batches.iter().filter(|batch| batch.kind == Some(BatchKind::Evict));
        let oldest = evictions.map(|batch| batch.number).min().unwrap_or(u64::MAX);
        while let Some(drain) = self.drains.pop_front_if(|drain| drain.exhausted && drain.last_batch < oldest)
        {
            self.drained.push((drain.token, self.evictions - drain.evictions_before));
        }
    }

    /// The pages of a batch, in order.
    #[must_use]
    pub fn batch_pages(&self, batch: u32) -> &[PageId] {
        &self.batches[batch as usize].pages
    }

    /// A free buffer for a page that the agent moved out. There always is one.
    pub fn take_write_buffer(&mut self) -> Option<Buffer> {
        self.write_buffers.take(1).map(|(buffer, _)| buffer)
    }

    /// Gives a buffer back that [`Pager::evicted`] did not keep.
    pub fn give_write_buffer(&mut self, buffer: Buffer) {
        self.write_buffers.give(buffer);
    }

    /// The agent has moved `page` out; its bytes are in `buffer`, and packed if [`Pager::wants_packed`] said so. Says
    /// whether the buffer is kept.
    pub fn evicted(&mut self, page: PageId, content: Content, packed: Option<&[u8]>, buffer: Buffer) -> bool {
        self.leave_agent(page);
        let word = self.word(page).without(STUCK);
        if word.state() != State::Evicting {
            return false; // unmapped meanwhile
        }
        self.evictions += 1;
        if let Some(pages) = self.split.evicted(self.budget_pages()) {
            self.set_warm_pages(pages);
        }
        let wanted = word.has(WANTED);
        let mut word = word.without(PENDING_SLOT); // a write in flight gives its slot back itself
        if let Some(file) = self.file_of(page.region()) {
            if let Some(kept) = self.evicted_of_file(page, word, file.mode, content, packed, buffer) {
                return kept;
            }
            word = word.without(IN_FILE);
        }
        let discarded = word.has(FRESH);
        if content.fill == Some(0) || discarded {
            self.stats.pages_zero += u64::from(!discarded);
            let word = self.drop_slot(word);
            self.settle_zero(page, word);
            return false;
        }
        if let Some(bytes) = content.fill.filter(|_| !wanted) {
            self.stats.pages_zero += 1;
            let word = self.drop_slot(word);
            self.set(page, word.with_state(State::Filled));
            self.set_aux(page, bytes);
            return false;
        }
        let same = word.has_any(HAS_SLOT | PACKED_COPY) && self.slot_hash(page) == content.hash;
        let word = if same { word } else { self.drop_slot(word) };
        self.set_hash(page, content.hash);
        if wanted {
            self.map_from(page, word, buffer);
            return true;
        }
        self.stats.pages_clean += u64::from(same);
        if self.admit(page, word, packed, same) {
            return false;
        }
        self.set_aux(page, self.stamp_now().into());
        if word.has(HAS_SLOT) {
            self.set(page, word.with_state(State::Cold));
            return false;
        }
        self.set(page, word.with_state(State::Writing).with_buffer(buffer));
        self.dirty.push_back((page, buffer));
        true
    }

    /// The agent has not moved `page` out, for the reason given.
    pub fn not_evicted(&mut self, page: PageId, result: PageResult) {
        self.leave_agent(page);
        let word = self.word(page);
        if word.state() != State::Evicting {
            return;
        }
        self.back_to_hot(page, word.without(STUCK));
        match result {
            // Emptied by a discard that came late, or moved by an mremap of which we have not read yet.
            PageResult::Absent => self.suspect(page),
            PageResult::Busy | PageResult::Refused => {
                self.set(page, self.word(page).with(STUCK));
                if self.stuck.is_empty() {
                    self.stuck_retry_at = self.now + STUCK_RETRY_MS;
                }
                self.stuck.push_back(page);
            }
            _ => self.enqueue(page),
        }
        if word.has(FRESH) {
            self.suspect(page);
        }
    }

    /// The agent says whether `page`, the `n`-th of `batch`, is present.
    pub fn probed(&mut self, batch: u32, n: usize, page: PageId, present: bool) {
        self.leave_agent(page);
        let Some(entry) = self.live_probe(batch, n) else { return };
        if !present {
            // It may have been moved by an mremap of which we have not read yet.
            self.absent.push(entry);
            return;
        }
        let word = self.word(page);
        if self.now >= entry.since + DISCARD_GRACE_MS {
            self.back_to_hot(page, word.without(FRESH));
            self.enqueue(page);
        } else {
            self.back_to_hot(page, word);
            self.discarded_later.push_back(entry);
        }
    }

    /// The agent could not say whether `page` is present: ask again later.
    pub fn not_probed(&mut self, batch: u32, n: usize, page: PageId) {
        self.leave_agent(page);
        if let Some(entry) = self.live_probe(batch, n) {
            self.back_to_hot(page, self.word(page));
            self.discarded_later.push_back(Discarded { since: self.now, ..entry });
        }
    }

    /// A page that the agent did not find, now that all events are known.
    pub(super) fn settle_absent(&mut self, entry: Discarded) {
        let (page, word) = (entry.page, self.word(entry.page));
        if word.state() != State::Probing || word.buffer() != entry.stamp {
            return;
        }
        if entry.remaps != self.remaps {
            // The agent may have looked where it no longer was.
            self.back_to_hot(page, word);
            self.suspect(page);
        } else if self.regions.get(page.region()).is_some_and(|region| region.removed) {
            let word = self.drop_slot(word);
            self.settle_zero(page, word);
        } else {
            // No event explains that the page has gone: its content is lost, and nobody shall read zeros for it.
            let word = self.drop_slot(word);
            self.set(page, word);
            self.lose(page);
            self.stats.io_errors += 1;
        }
    }

    /// What entry `n` of a probe is about, unless the page has been discarded again or unmapped since.
    fn live_probe(&self, batch: u32, n: usize) -> Option<Discarded> {
        let entry = *self.batches[batch as usize].probes.get(n)?;
        let word = self.word(entry.page);
        (word.state() == State::Probing && word.buffer() == entry.stamp).then_some(entry)
    }

    /// A page is the client's again; whoever waits for it looks for himself.
    pub(super) fn back_to_hot(&mut self, page: PageId, word: super::Word) {
        self.set(page, word.with_state(State::Hot).without(WANTED));
        if word.has(WANTED)
            && let Some((addr, _)) = self.regions.place(page)
        {
            self.out.push_back(Action::Wake { addr, pages: 1 });
        }
    }

    /// All pages of a batch have been answered.
    pub fn batch_ended(&mut self, batch: u32) {
        self.batches[batch as usize].kind = None;
        self.end_drains();
    }

    pub(super) fn leave_agent(&mut self, page: PageId) {
        if let Some(region) = self.regions.get_mut(page.region()) {
            region.at_agent = region.at_agent.saturating_sub(1);
        }
    }

    /// A page is zeros and present nowhere: maps it if somebody waits, else frees its frame.
    pub(super) fn settle_zero(&mut self, page: PageId, word: super::Word) {
        let word = word.without(FRESH | STUCK);
        if self.has_file(page) {
            self.settle_in_file(page, word);
        } else if word.has(WANTED) {
            self.set(page, word.with_state(State::Mapping).without(FROM_BUFFER));
            self.map_queue.push_back(page);
        } else {
            self.set(page, word.with_state(State::Zero));
        }
    }

    pub(super) fn map_from(&mut self, page: PageId, word: super::Word, buffer: Buffer) {
        self.set(page, word.with_state(State::Mapping).with_buffer(buffer).with(FROM_BUFFER));
        self.map_queue.push_back(page);
    }

    pub(super) fn set_hash(&mut self, page: PageId, hash: u64) {
        if let Some(region) = self.regions.get_mut(page.region()) {
            region.table.set_hash(&mut self.arena, page.index(), hash);
        }
    }

    /// A hot page may not be there, or not for long: it is not evicted before a probe has shown what is true.
    pub(super) fn suspect(&mut self, page: PageId) {
        let stamp = self.stamp;
        self.stamp = self.stamp.wrapping_add(1);
        self.set(page, self.word(page).with(FRESH).with_buffer(stamp));
        self.discarded.push_back(Discarded { page, since: self.now, stamp, remaps: 0 });
        // Without an agent that answers they would pile up.
        if self.discarded.len() as u64 > 2 * self.used + QUEUE_SLACK {
            let mut discarded = std::mem::take(&mut self.discarded);
            discarded.retain(|entry| self.is_suspect(entry));
            self.discarded = discarded;
        }
    }

    fn retry_stuck(&mut self) {
        self.stuck_retry_at = self.now + STUCK_RETRY_MS;
        for page in std::mem::take(&mut self.stuck) {
            let word = self.word(page);
            if word.state() == State::Hot && word.has(STUCK) {
                self.enqueue(page);
            }
        }
    }

    /// Gives dirty pages slots and starts to write them, neighbours together.
    pub(super) fn write_dirty(&mut self) {
        if self.now < self.write_retry_at {
            return;
        }
        self.write_retry_at = 0;
        while let Some(&(_, buffer)) = self.dirty.front() {
            let neighbours = self
                .dirty
                .iter()
                .zip(u64::from(buffer)..)
                .take(64)
                .take_while(|((page, b), expected)| {
                    let word = self.word(*page);
                    u64::from(*b) == *expected && word.state() == State::Writing && word.buffer() == *b
                })
                .count();
            if neighbours == 0 {
                // Rescued or discarded before it got a slot.
                self.dirty.pop_front();
                self.write_buffers.give(buffer);
                continue;
            }
            let want = u32::try_from(neighbours).unwrap_or(1);
            let Some((slot, pages)) = self.store.take(want) else {
                self.write_retry_at = self.now + WRITE_RETRY_MS;
                return;
            };
            let op = self.new_op(slot, buffer, false);
            for (page, slot) in
                self.dirty.drain(..pages as usize).map(|(page, _)| page).zip(slot..).collect::<Vec<_>>()
            {
                self.set(page, self.word(page).with_slot(slot));
                self.ops[op as usize].pages.push(page);
            }
            self.out.push_back(Action::Write(Transfer { op, slot, buffer, pages }));
        }
    }

    /// Write `op` has ended; `good` says whether all of it is in the file.
    pub fn write_ended(&mut self, op: u32, good: bool) {
        if !good {
            self.stats.io_errors += 1;
            self.write_retry_at = self.now + WRITE_RETRY_MS;
        }
        for n in 0..self.ops[op as usize].pages.len() {
            let entry = self.op_entry(op, n);
            let (page, word) = (entry.page, self.word(entry.page));
            let same_slot = word.slot_field() == entry.slot;
            let on_its_way = word.state() == State::Writing && word.buffer() == entry.buffer;
            self.stats.pages_out += u64::from(good);
            if on_its_way && word.has(HAS_SLOT) && same_slot {
                if good {
                    self.set(page, word.with_state(State::Cold));
                } else {
                    // The bytes are still in the buffer: try again, elsewhere and later.
                    self.store.give(entry.slot);
                    self.set(page, word.without(HAS_SLOT));
                    self.dirty.push_back((page, entry.buffer));
                    continue;
                }
            } else if word.has(PENDING_SLOT) && same_slot {
                let kept = word.without(PENDING_SLOT);
                self.set(page, if good { kept.with(HAS_SLOT) } else { kept });
                if !good {
                    self.store.give(entry.slot);
                }
            } else {
                self.store.give(entry.slot);
            }
            self.write_buffers.give(entry.buffer);
        }
        self.free_ops.push(op);
    }
}
