//! Follows what the program does to its address space: new regions, discards, unmapping, moves, hints.

use std::ops::Range;

use fmalloc_proto::PAGE;
use fmalloc_proto::messages::{Advice, RegionRow};

use super::page::{FRESH, HAS_SLOT, IN_FILE, PACKED_COPY, PageId, RETRIED, STUCK, State, UNPACK, WANTED};
use super::regions::{Region, Segment};
use super::table::{CHUNK_PAGES, Table};
use super::{Action, MAX_HINTS, Pager, Store};

/// What the program has done to a range.
#[derive(Debug, Clone, Copy)]
pub(super) enum Change {
    Discard { addr: u64, len: u64 },
    Unmap { addr: u64, len: u64 },
    Remap { from: u64, to: u64, len: u64 },
}

impl Change {
    /// The range that it is about.
    fn range(&self) -> Range<u64> {
        match *self {
            Self::Discard { addr, len } | Self::Unmap { addr, len } => addr..addr + len,
            Self::Remap { from, len, .. } => from..from + len,
        }
    }

    /// Where memory moves to, if it does.
    fn target(&self) -> Range<u64> {
        match *self {
            Self::Remap { to, len, .. } => to..to + len,
            _ => 0..0,
        }
    }

    fn touches(&self, other: &Self) -> bool {
        let ranges = |change: &Self| [change.range(), change.target()];
        ranges(self).iter().any(|one| ranges(other).iter().any(|two| overlap(one, two)))
    }
}

fn overlap(one: &Range<u64>, two: &Range<u64>) -> bool {
    one.start < two.end && two.start < one.end
}

/// Why a region cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegisterError {
    /// A part of it is registered already.
    Overlap,
    /// No room for its page table, or too many regions.
    Full,
}

impl<S: Store> Pager<S> {
    /// Adds a region and gives its number. What `commit` claims in swap the caller has claimed.
    ///
    /// # Errors
    /// See [`RegisterError`]; nothing has changed.
    pub fn register(
        &mut self,
        addr: u64,
        len: u64,
        commit: bool,
        label: String,
    ) -> Result<u16, RegisterError> {
        if self.regions.overlaps(addr, len) {
            return Err(RegisterError::Overlap);
        }
        let table = Table::new(&mut self.arena, len / PAGE).ok_or(RegisterError::Full)?;
        let number = match self.regions.add(label, addr, table) {
            Some(number) => number,
            None => {
                table.free(&mut self.arena);
                return Err(RegisterError::Full);
            }
        };
        self.table_bytes += table.bytes();
        if commit {
            self.commit(number, 0..len / PAGE);
        }
        Ok(number)
    }

    /// Pages of `range` that are not committed yet: what a commit must claim. None if the region does not have the range.
    #[must_use]
    pub fn uncommitted(&self, number: u16, range: &Range<u64>) -> Option<u64> {
        let region = self.open_region(number)?;
        (range.end <= region.pages).then(|| range.end - range.start - region.committed.overlap(range))
    }

    /// The region with this number, unless it is being unregistered.
    #[must_use]
    pub fn open_region(&self, number: u16) -> Option<&Region> {
        self.regions.get(number).filter(|region| !region.closing)
    }

    /// Counts `range` as claimed; the caller has claimed what [`Pager::uncommitted`] said.
    pub fn commit(&mut self, number: u16, range: Range<u64>) {
        if let Some(region) = self.regions.get_mut(number) {
            self.stats.claimed_pages += range.end - range.start - region.committed.overlap(&range);
            region.committed.insert(range);
        }
    }

    /// Takes the claim of `range` back and gives the number of pages to be unclaimed. What was in them is gone.
    pub fn decommit(&mut self, number: u16, range: Range<u64>) -> u64 {
        self.forget(number, range.clone(), false);
        let Some(region) = self.regions.get_mut(number) else { return 0 };
        let pages = region.committed.overlap(&range);
        region.committed.remove(range);
        self.stats.claimed_pages -= pages;
        pages
    }

    /// Begins to unregister: the pages' content is dropped. Go on when [`Pager::is_closed`] says so.
    pub fn close(&mut self, number: u16) {
        let Some(region) = self.regions.get_mut(number) else { return };
        region.closing = true;
        let pages = region.pages;
        self.forget(number, 0..pages, true);
        self.close_file(number);
        self.streams.forget(number);
        self.willneed.retain(|(region, _)| *region != number);
        // The number will be used again.
        let other = |page: &PageId| page.region() != number;
        for queue in [
            &mut self.probation,
            &mut self.main,
            &mut self.unpack_queue,
            &mut self.stuck,
            &mut self.map_queue,
            &mut self.poison_queue,
            &mut self.waiting,
            &mut self.tripwires,
        ] {
            queue.retain(other);
        }
        self.discarded.retain(|entry| other(&entry.page));
        self.discarded_later.retain(|entry| other(&entry.page));
        self.absent.retain(|entry| other(&entry.page));
        self.protect.retain(other);
        for drain in &mut self.drains {
            drain.exhausted |= drain.range.as_ref().is_some_and(|(region, _)| *region == number);
        }
    }

    /// Whether nothing touches a closed region any more.
    #[must_use]
    pub fn is_closed(&self, number: u16) -> bool {
        let unused = |region: &Region| region.closing && region.at_agent == 0;
        self.regions.get(number).is_none_or(unused) && !self.files.has_pending(number)
    }

    /// Forgets a closed region. Gives where it was mapped and how many pages are to be unclaimed.
    pub fn unregister(&mut self, number: u16) -> (Vec<Segment>, u64) {
        let Some(region) = self.regions.take(number) else { return (Vec::new(), 0) };
        let claimed = region.committed.total();
        self.stats.claimed_pages -= claimed;
        self.table_bytes -= region.table.bytes();
        region.table.free(&mut self.arena);
        (region.segments().to_vec(), claimed)
    }

    /// The program discards a range (madvise): its pages read as zeros from now on, or, after MADV_FREE, keep what they
    /// have until they are written. They may still be present, and are counted until the agent has looked.
    pub fn discard(&mut self, addr: u64, len: u64) {
        self.change(Change::Discard { addr, len });
    }

    /// The program has unmapped a range, or mapped something else over it.
    pub fn unmap(&mut self, addr: u64, len: u64) {
        self.change(Change::Unmap { addr, len });
    }

    /// The program has moved a range with mremap.
    pub fn remap(&mut self, from: u64, to: u64, len: u64) {
        self.change(Change::Remap { from, to, len });
    }

    /// Of two threads' changes the later may be reported first. It shows when memory moves to a place of which we do not
    /// know yet that it was vacated: then that move, and what touches the same ranges after it, waits for the report
    /// that does so.
    fn change(&mut self, change: Change) {
        let vacates = !matches!(change, Change::Discard { .. });
        let awaited = |early: &Change| vacates && overlap(&early.target(), &change.range());
        let place = self.early.iter().position(awaited).unwrap_or(self.early.len());
        self.early.insert(place, change);
        while let Some(next) = (0..self.early.len()).find(|place| self.is_due(*place)) {
            let change = self.early.remove(next);
            self.apply(change);
        }
    }

    /// Whether a change can be applied before those that wait in front of it.
    fn is_due(&self, place: usize) -> bool {
        let (change, target) = (&self.early[place], self.early[place].target());
        let occupied = !target.is_empty() && self.regions.overlaps(target.start, target.end - target.start);
        !occupied && !self.early[..place].iter().any(|earlier| earlier.touches(change))
    }

    /// All reports are in: what still waits has waited for something that we were wrong about.
    pub(super) fn settle_early(&mut self) {
        for change in std::mem::take(&mut self.early) {
            let target = change.target();
            self.apply_unmap(target.start, target.end - target.start);
            self.apply(change);
        }
    }

    fn apply(&mut self, change: Change) {
        match change {
            Change::Discard { addr, len } => self.apply_discard(addr, len),
            Change::Unmap { addr, len } => self.apply_unmap(addr, len),
            Change::Remap { from, to, len } => {
                self.remaps += 1;
                self.regions.remap(from, to, len);
                // Faults that came from there after the move were taken for faults on the pages that have left.
                self.out.push_back(Action::Wake { addr: from, pages: len / PAGE });
            }
        }
    }

    fn apply_discard(&mut self, addr: u64, len: u64) {
        for piece in self.regions.pieces(addr, len) {
            if let Some(region) = self.regions.get_mut(piece.region) {
                region.removed = true;
            }
            self.forget(piece.region, piece.first..piece.first + piece.pages, false);
        }
    }

    pub(super) fn apply_unmap(&mut self, addr: u64, len: u64) {
        for piece in self.regions.pieces(addr, len) {
            let range = piece.first..piece.first + piece.pages;
            self.forget(piece.region, range.clone(), true);
            if let Some(region) = self.regions.get_mut(piece.region) {
                let pages = region.committed.overlap(&range);
                region.committed.remove(range);
                self.stats.claimed_pages -= pages;
                self.unclaimed += pages;
            }
        }
        self.regions.unmap(addr, len);
        for fault in self.unknown.extract_if(.., |fault| (addr..addr + len).contains(fault)) {
            self.out.push_back(Action::Wake { addr: fault, pages: 1 });
        }
    }

    /// Pages whose claim ended because they were unmapped, since the last call.
    pub fn take_unclaimed(&mut self) -> u64 {
        std::mem::take(&mut self.unclaimed)
    }

    /// A hint about a range of a region.
    pub fn advise(&mut self, number: u16, range: Range<u64>, advice: Advice) {
        match advice {
            Advice::WillNeed => self.will_need(number, range),
            Advice::Cold => {
                if self.drains.len() < MAX_HINTS {
                    let pages = range.end.saturating_sub(range.start);
                    self.drain(u64::MAX, Some((number, range)), pages);
                }
            }
            Advice::Normal | Advice::Sequential | Advice::Random => {
                let Some(region) = self.regions.get_mut(number) else { return };
                region.advice.retain(|(old, _)| !(range.start <= old.start && old.end <= range.end));
                // Hints that overlap in ever new ways are not worth keeping for ever.
                if region.advice.len() >= 64 {
                    region.advice.remove(0);
                }
                region.advice.push((range, advice));
            }
        }
    }

    /// Drops the content of pages. `gone`: they are not mapped any more either.
    fn forget(&mut self, number: u16, range: Range<u64>, gone: bool) {
        let mut index = range.start;
        while index < range.end {
            let Some(region) = self.regions.get(number) else { return };
            if region.table.has_chunk(&self.arena, index) {
                self.forget_page(PageId::new(number, index), gone);
                index += 1;
            } else {
                index = (index + 1).next_multiple_of(CHUNK_PAGES);
            }
        }
    }

    pub(super) fn forget_page(&mut self, page: PageId, gone: bool) {
        let before = self.word(page);
        let word = if gone { before.without(WANTED) } else { before };
        match word.state() {
            State::Zero => {
                if gone {
                    self.set(page, word);
                }
            }
            State::Hot | State::Probing if !gone => {
                let word = self.drop_slot(word);
                self.back_to_hot(page, word);
                self.suspect(page);
            }
            // Moved before the discard, or not at all: see the module's rules.
            State::Evicting | State::Copying if !gone => {
                self.discarded_out += 1;
                let word = self.drop_slot(word);
                self.set(page, word.with(FRESH));
            }
            State::Hot
            | State::Probing
            | State::Evicting
            | State::Copying
            | State::Cold
            | State::Poisoned
            | State::Held
            | State::Warm
            | State::Filled => {
                if word.state() == State::Held {
                    self.give_buffer(word.buffer());
                }
                let word = self.drop_slot(word).without(FRESH | STUCK | RETRIED | IN_FILE);
                // A cold page that somebody waits for stays in the queue, as zeros.
                self.set(page, word.with_state(State::Zero));
            }
            // The transfer owns slot and buffer, and gives them back when it ends.
            State::Writing => {
                let word = word.without(HAS_SLOT | RETRIED | PACKED_COPY | UNPACK);
                self.set(page, word.with_state(State::Zero));
            }
            State::Fetching => self.settle_zero(page, word.without(HAS_SLOT | RETRIED)),
            State::Mapping => {
                let word = self.drop_source(word);
                let word = self.drop_slot(word).without(STUCK);
                if self.has_file(page) {
                    let fresh = if word.has(WANTED) { FRESH } else { 0 };
                    self.settle_in_file(page, word.without(FRESH).with(fresh));
                } else if word.has(WANTED) {
                    // Stays in the queue, as zeros. It may be there already, and be emptied later.
                    self.set(page, word.with(FRESH));
                } else {
                    self.set(page, word.with_state(State::Zero).without(FRESH));
                }
            }
        }
        // Whoever waits for a place that is gone, or was to run into poison, looks for himself.
        if ((gone && before.has(WANTED)) || before.state() == State::Poisoned)
            && let Some((addr, _)) = self.regions.place(page)
        {
            self.out.push_back(Action::Wake { addr, pages: 1 });
        }
    }

    /// Rows for people, at most `most`, from region `from` on, and whether there are more.
    #[must_use]
    pub fn region_rows(&self, client: u64, from: u32, most: usize) -> (Vec<RegionRow>, bool) {
        let mut open =
            self.regions.iter().filter(|(number, region)| u32::from(*number) >= from && !region.closing);
        let row = |(number, region): (u16, &Region)| RegionRow {
            client,
            region: number.into(),
            label: region.label.clone(),
            addr: region.addr,
            len: region.len,
            claimed_bytes: region.committed.total() * PAGE,
            resident_pages: region.resident,
            swapped_pages: region.swapped,
            poisoned_pages: region.poisoned,
        };
        let rows = open.by_ref().take(most).map(row).collect();
        (rows, open.next().is_some())
    }
}
