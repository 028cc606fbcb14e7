//! Follows what the program does to its address space: new regions, discards, unmapping, moves, hints.

use std::ops::Range;

use fmalloc_proto::PAGE;
use fmalloc_proto::messages::{Advice, RegionRow};

use super::page::{FRESH, FROM_BUFFER, HAS_SLOT, PENDING_SLOT, PageId, RETRIED, STUCK, State, WANTED};
use super::regions::{Region, Segment};
use super::table::{CHUNK_PAGES, Table};
use super::{Action, Pager, Store};

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
    pub fn register(&mut self, addr: u64, len: u64, commit: bool, label: String) -> Result<u16, RegisterError> {
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
        self.streams.forget(number);
        self.willneed.retain(|(region, _)| *region != number);
        let gone = |page: &PageId| page.region() != number;
        self.fifo.retain(gone);
        self.stuck.retain(gone);
        self.discarded.retain(|entry| gone(&entry.page));
        self.map_queue.retain(gone);
        self.waiting.retain(gone);
        for drain in &mut self.drains {
            drain.exhausted |= drain.range.as_ref().is_some_and(|(region, _)| *region == number);
        }
    }

    /// Whether nothing touches a closed region any more.
    #[must_use]
    pub fn is_closed(&self, number: u16) -> bool {
        self.regions.get(number).is_none_or(|region| region.closing && region.at_agent == 0)
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
        for piece in self.regions.pieces(addr, len) {
            if let Some(region) = self.regions.get_mut(piece.region) {
                region.removed = true;
            }
            self.forget(piece.region, piece.first..piece.first + piece.pages, false);
        }
    }

    /// The program has unmapped a range, or mapped something else over it.
    pub fn unmap(&mut self, addr: u64, len: u64) {
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
        self.unknown.retain(|fault| !(addr..addr + len).contains(fault));
    }

    /// Pages whose claim ended because they were unmapped, since the last call.
    pub fn take_unclaimed(&mut self) -> u64 {
        std::mem::take(&mut self.unclaimed)
    }

    /// The program has moved a range with mremap.
    pub fn remap(&mut self, from: u64, to: u64, len: u64) {
        self.regions.remap(from, to, len);
    }

    /// A hint about a range of a region.
    pub fn advise(&mut self, number: u16, range: Range<u64>, advice: Advice) {
        match advice {
            Advice::WillNeed => self.will_need(number, range),
            Advice::Cold => {
                let pages = range.end - range.start;
                self.drain(u64::MAX, Some((number, range)), pages);
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

    fn forget_page(&mut self, page: PageId, gone: bool) {
        let word = self.word(page);
        let wanted = word.has(WANTED) && !gone;
        match word.state() {
            State::Zero => {
                if gone {
                    self.set(page, word.without(WANTED));
                }
            }
            State::Hot | State::Probing if !gone => {
                let word = self.drop_slot(word);
                self.set(page, word);
                self.suspect(page);
            }
            // Only while the agent waits for its own fault on a page that it should move: see the module's rules.
            State::Evicting if !gone => self.set(page, word.with(FRESH)),
            State::Hot | State::Probing | State::Evicting | State::Cold | State::Poisoned | State::Held => {
                if word.state() == State::Held {
                    self.give_buffer(word.buffer());
                }
                let word = self.drop_slot(word).without(FRESH | STUCK | RETRIED);
                let word = if gone { word.without(WANTED) } else { word };
                // A cold page that somebody waits for stays in the queue, as zeros.
                self.set(page, word.with_state(State::Zero));
            }
            // The transfer owns slot and buffer, and gives them back when it ends.
            State::Writing => {
                let word = word.without(HAS_SLOT | RETRIED);
                let word = if gone { word.without(WANTED) } else { word };
                self.set(page, word.with_state(State::Zero));
            }
            State::Fetching | State::Mapping => {
                let word = self.drop_source(word);
                let word = if word.state() == State::Fetching {
                    word.without(HAS_SLOT | RETRIED)
                } else {
                    self.drop_slot(word)
                };
                let word = word.without(FROM_BUFFER | PENDING_SLOT | FRESH);
                if wanted {
                    self.settle_zero(page, word);
                } else {
                    self.set(page, word.with_state(State::Zero).without(WANTED));
                }
            }
        }
        if gone
            && word.has(WANTED)
            && let Some((addr, _)) = self.regions.place(page)
        {
            self.out.push_back(Action::Wake { addr, pages: 1 });
        }
    }

    /// Rows for people, at most `most`, from region `from` on, and whether there are more.
    #[must_use]
    pub fn region_rows(&self, client: u64, from: u32, most: usize) -> (Vec<RegionRow>, bool) {
        let mut open = self
            .regions
            .iter()
            .filter(|(number, region)| u32::from(*number) >= from && !region.closing);
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
