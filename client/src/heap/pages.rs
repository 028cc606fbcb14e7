//! Runs of pages: which are free, how they are split, joined, and made from more of the backing. All of it under one lock;
//! nothing here touches the pages themselves.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use super::backing::{Backing, Unavailable};
use super::bins::Bins;
use super::class::PAGE;
use super::run::{NIL, Run, State};
use super::table::Table;

/// The backing is committed in steps of an eighth of what it is, within these bounds, in pages.
const MIN_STEP: u32 = 256;
const MAX_STEP: u32 = 16 << 10;

/// Where the pages are and what each belongs to: read by all threads without a lock.
#[derive(Debug)]
pub(super) struct Space<B> {
    pub(super) backing: B,
    /// Most pages that there can be.
    pub(super) limit: u32,
    /// Pages that are committed, from the first one on.
    top: AtomicU32,
    /// The run of a page: true for the first and the last page of each run and for all pages of a slab. What is found for
    /// other pages is old.
    map: Table<AtomicU32>,
    pub(super) runs: Table<Run>,
}

impl<B: Backing> Space<B> {
    /// None if there are no addresses for the tables.
    pub(super) fn new(backing: B) -> Option<Self> {
        // Page numbers have 32 bits: 16 TiB.
        let limit = u32::try_from(backing.reserved() / PAGE).unwrap_or(u32::MAX - 1);
        let map = Table::new(limit as usize)?;
        // Number 0 is no run, and dividing the last page may need spare records.
        let runs = Table::new(limit as usize + 8)?;
        Some(Self { backing, limit, top: AtomicU32::new(0), map, runs })
    }

    #[inline]
    pub(super) fn top(&self) -> u32 {
        self.top.load(Ordering::Relaxed)
    }

    /// The number of the run that was last noted for a page below the top.
    #[inline]
    pub(super) fn noted(&self, page: u32) -> u32 {
        self.map.get(page).load(Ordering::Acquire)
    }

    fn note(&self, page: u32, id: u32) {
        self.map.get(page).store(id, Ordering::Release);
    }

    /// Notes a run at its first and last page.
    fn note_ends(&self, id: u32) {
        let run = self.runs.get(id);
        self.note(run.start(), id);
        self.note(run.end() - 1, id);
    }

    /// Notes a run, which is a slab or will be, at all its pages.
    pub(super) fn note_all(&self, id: u32) {
        let run = self.runs.get(id);
        (run.start()..run.end()).for_each(|page| self.note(page, id));
    }

    /// A run's bytes, from the base.
    pub(super) fn range(&self, id: u32) -> Range<usize> {
        let run = self.runs.get(id);
        bytes(&(run.start()..run.end()))
    }

    /// Bytes of RAM that the tables may take.
    pub(super) fn table_bytes(&self) -> usize {
        self.map.bytes() + self.runs.bytes()
    }
}

fn bytes(pages: &Range<u32>) -> Range<usize> {
    pages.start as usize * PAGE..pages.end as usize * PAGE
}

/// What is under the lock.
#[derive(Debug)]
pub(super) struct Pages {
    /// Free runs whose content matters not, and those that read as zeros.
    pub(super) dirty: Bins,
    pub(super) clean: Bins,
    /// The queue of dirty runs.
    pub(super) oldest: u32,
    newest: u32,
    /// Pages of dirty runs, of runs in use, and the most that the latter have been.
    pub(super) dirty_pages: u32,
    pub(super) used_pages: u32,
    pub(super) peak_pages: u32,
    /// Spare records: a list, and those above `issued` that were never used.
    spare: u32,
    issued: u32,
}

impl Pages {
    /// No pages.
    pub(super) const fn new() -> Self {
        Self {
            dirty: Bins::new(),
            clean: Bins::new(),
            oldest: NIL,
            newest: NIL,
            dirty_pages: 0,
            used_pages: 0,
            peak_pages: 0,
            spare: NIL,
            issued: 1,
        }
    }

    /// A run of `pages` pages for the caller, its address aligned to `align` pages (a power of two), in state
    /// [`State::Large`], and whether it reads as zeros. Takes dirty runs first, since their pages are likely to be in RAM.
    pub(super) fn take<B: Backing>(
        &mut self,
        space: &Space<B>,
        pages: u32,
        align: u32,
    ) -> Result<(u32, bool), Unavailable> {
        let need = pages.checked_add(align - 1).ok_or(Unavailable)?;
        self.stock(space)?;
        let found = self.find(space, need).or_else(|| self.grow(space, need).ok());
        let id = match found {
            Some(id) => id,
            None => {
                self.purge_all(space);
                self.find(space, need).ok_or(Unavailable)?
            }
        };
        let clean = space.runs.get(id).state() == State::Clean;
        self.carve(space, id, pages, align);
        self.count_used(pages);
        Ok((id, clean))
    }

    /// Takes a run back, whose content matters not. Gives the run that it has become part of.
    pub(super) fn give<B: Backing>(&mut self, space: &Space<B>, id: u32) -> u32 {
        self.used_pages -= space.runs.get(id).pages();
        self.free(space, id, State::Dirty)
    }

    /// Makes a run in use shorter.
    pub(super) fn shrink<B: Backing>(
        &mut self,
        space: &Space<B>,
        id: u32,
        pages: u32,
    ) -> Result<(), Unavailable> {
        self.stock(space)?;
        let run = space.runs.get(id);
        let rest = run.start() + pages..run.end();
        if !rest.is_empty() {
            run.set_pages(pages);
            space.note_ends(id);
            self.used_pages -= rest.end - rest.start;
            self.make(space, rest, State::Dirty);
        }
        Ok(())
    }

    /// Makes a run in use longer where it is; false if the pages behind it are not free.
    pub(super) fn extend<B: Backing>(&mut self, space: &Space<B>, id: u32, pages: u32) -> bool {
        let run = space.runs.get(id);
        let more = pages - run.pages();
        if self.stock(space).is_err() {
            return false;
        }
        let mut next = self.free_at(space, run.end());
        let (has, ends) = next.map_or((0, run.end()), |next| {
            let next = space.runs.get(next);
            (next.pages(), next.end())
        });
        if has < more {
            // At the top there may be more to be had, but only behind a clean run: a dirty one would stay apart from it.
            let joins = next.is_none_or(|next| space.runs.get(next).state() == State::Clean);
            if ends != space.top() || !joins || self.grow(space, more).is_err() {
                return false;
            }
            next = self.free_at(space, run.end());
        }
        let Some(next) = next else { return false };
        if space.runs.get(next).pages() < more {
            return false;
        }
        self.carve(space, next, more, 1);
        self.retire(space, next);
        run.set_pages(pages);
        space.note_ends(id);
        self.count_used(more);
        true
    }

    /// Takes the oldest dirty run out, in order that its content be dropped without the lock.
    pub(super) fn begin_purge<B: Backing>(&mut self, space: &Space<B>) -> Option<u32> {
        let id = self.oldest;
        if id == NIL {
            return None;
        }
        self.unlink(space, id);
        space.runs.get(id).set_state(State::Purging);
        Some(id)
    }

    /// Brings it back; `dropped` says whether it reads as zeros now.
    pub(super) fn end_purge<B: Backing>(&mut self, space: &Space<B>, id: u32, dropped: bool) {
        self.free(space, id, if dropped { State::Clean } else { State::Dirty });
    }

    /// Gives clean pages at the top back to the backing, but for `keep`.
    pub(super) fn lower_top<B: Backing>(&mut self, space: &Space<B>, keep: u32) {
        let top = space.top();
        let Some(id) = top.checked_sub(1).map(|page| space.noted(page)) else { return };
        let run = space.runs.get(id);
        if run.state() != State::Clean || run.pages() <= keep {
            return;
        }
        let rest = run.start() + keep..top;
        self.unlink(space, id);
        // SAFETY: the pages are free, and out of every list.
        let given = unsafe { space.backing.decommit(bytes(&rest)) }.is_ok();
        if !given {
            self.free(space, id, State::Dirty);
            return;
        }
        space.top.store(rest.start, Ordering::Relaxed);
        if keep == 0 {
            self.retire(space, id);
        } else {
            run.set_pages(keep);
            self.free(space, id, State::Clean);
        }
    }

    fn count_used(&mut self, pages: u32) {
        self.used_pages += pages;
        self.peak_pages = self.peak_pages.max(self.used_pages);
    }

    fn find<B: Backing>(&self, space: &Space<B>, pages: u32) -> Option<u32> {
        self.dirty.find(&space.runs, pages).or_else(|| self.clean.find(&space.runs, pages))
    }

    /// A free run that begins at this page.
    fn free_at<B: Backing>(&self, space: &Space<B>, page: u32) -> Option<u32> {
        let id = (page < space.top()).then(|| space.noted(page))?;
        matches!(space.runs.get(id).state(), State::Clean | State::Dirty).then_some(id)
    }

    /// Commits more of the backing, so that there is a clean run of at least `need` pages at the top; gives that.
    fn grow<B: Backing>(&mut self, space: &Space<B>, need: u32) -> Result<u32, Unavailable> {
        let top = space.top();
        let tail = top.checked_sub(1).map(|page| space.runs.get(space.noted(page)));
        let has = tail.filter(|tail| tail.state() == State::Clean).map_or(0, Run::pages);
        let least = need.saturating_sub(has).max(1);
        let room = space.limit - top;
        if least > room {
            return Err(Unavailable);
        }
        let step = (top / 8).clamp(MIN_STEP, MAX_STEP).min(room).max(least);
        let commit = |more: u32| {
            let end = top + more;
            if !space.map.ensure(end as usize) {
                return Err(Unavailable);
            }
            space.backing.commit(bytes(&(top..end))).map(|()| end)
        };
        let end = commit(step).or_else(|error| if least < step { commit(least) } else { Err(error) })?;
        space.top.store(end, Ordering::Relaxed);
        Ok(self.make(space, top..end, State::Clean))
    }

    /// Drops the content of all dirty runs, when there is no other memory left.
    fn purge_all<B: Backing>(&mut self, space: &Space<B>) {
        while let Some(id) = self.begin_purge(space) {
            // SAFETY: the run is free.
            let dropped = unsafe { space.backing.discard(space.range(id)) }.is_ok();
            self.end_purge(space, id, dropped);
            if !dropped {
                return;
            }
        }
    }

    /// Takes `pages` pages for use out of a free run that has enough, and makes free runs of what is left on either side.
    fn carve<B: Backing>(&mut self, space: &Space<B>, id: u32, pages: u32, align: u32) {
        self.unlink(space, id);
        let run = space.runs.get(id);
        let state = run.state();
        let (first, end) = (run.start(), run.end());
        let base = space.backing.base().addr().get() / PAGE;
        let at = base + first as usize;
        // Less than the alignment, which has 32 bits.
        #[allow(clippy::cast_possible_truncation, reason = "see above")]
        let skip = (at.next_multiple_of(align as usize) - at) as u32;
        let start = first + skip;
        run.set_start(start);
        run.set_pages(pages);
        run.set_state(State::Large);
        space.note_ends(id);
        for rest in [first..start, start + pages..end] {
            if !rest.is_empty() {
                self.make(space, rest, state);
            }
        }
    }

    /// A new free run, joined with its neighbours.
    fn make<B: Backing>(&mut self, space: &Space<B>, pages: Range<u32>, state: State) -> u32 {
        let id = self.record(space);
        let run = space.runs.get(id);
        run.set_start(pages.start);
        run.set_pages(pages.end - pages.start);
        self.free(space, id, state)
    }

    /// Enters a run as free, joined with neighbours of the same state. Gives the run that has come of it.
    fn free<B: Backing>(&mut self, space: &Space<B>, id: u32, state: State) -> u32 {
        let run = space.runs.get(id);
        let before = run.start().checked_sub(1).map(|page| space.noted(page));
        if let Some(before) = before.filter(|id| space.runs.get(*id).state() == state) {
            self.unlink(space, before);
            run.set_start(space.runs.get(before).start());
            run.set_pages(run.pages() + space.runs.get(before).pages());
            self.retire(space, before);
        }
        let behind = (run.end() < space.top()).then(|| space.noted(run.end()));
        if let Some(behind) = behind.filter(|id| space.runs.get(*id).state() == state) {
            self.unlink(space, behind);
            run.set_pages(run.pages() + space.runs.get(behind).pages());
            self.retire(space, behind);
        }
        run.set_state(state);
        space.note_ends(id);
        if state == State::Clean {
            self.clean.insert(&space.runs, id);
        } else {
            self.dirty.insert(&space.runs, id);
            self.enqueue(space, id);
        }
        id
    }

    /// Takes a free run out of its bin, and a dirty one out of the queue.
    fn unlink<B: Backing>(&mut self, space: &Space<B>, id: u32) {
        let run = space.runs.get(id);
        if run.state() == State::Clean {
            self.clean.remove(&space.runs, id);
            return;
        }
        self.dirty.remove(&space.runs, id);
        self.dirty_pages -= run.pages();
        let (older, newer) = (run.older(), run.newer());
        match older {
            NIL => self.oldest = newer,
            older => space.runs.get(older).set_newer(newer),
        }
        match newer {
            NIL => self.newest = older,
            newer => space.runs.get(newer).set_older(older),
        }
    }

    fn enqueue<B: Backing>(&mut self, space: &Space<B>, id: u32) {
        let run = space.runs.get(id);
        run.set_older(self.newest);
        run.set_newer(NIL);
        match self.newest {
            NIL => self.oldest = id,
            newest => space.runs.get(newest).set_newer(id),
        }
        self.newest = id;
        self.dirty_pages += run.pages();
    }

    /// Makes sure that there are records enough for any one operation.
    fn stock<B: Backing>(&mut self, space: &Space<B>) -> Result<(), Unavailable> {
        if space.runs.ensure(self.issued as usize + 4) { Ok(()) } else { Err(Unavailable) }
    }

    fn record<B: Backing>(&mut self, space: &Space<B>) -> u32 {
        match self.spare {
            NIL => {
                self.issued += 1;
                self.issued - 1
            }
            id => {
                self.spare = space.runs.get(id).next();
                id
            }
        }
    }

    fn retire<B: Backing>(&mut self, space: &Space<B>, id: u32) {
        let run = space.runs.get(id);
        run.set_state(State::Spare);
        run.set_next(self.spare);
        self.spare = id;
    }
}
