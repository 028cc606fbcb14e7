//! What a heap consists of, counted run by run; and whether all of its records agree.

use std::fmt;
use std::sync::atomic::Ordering;

use super::Core;
use super::backing::Backing;
use super::class::{CLASSES, PAGE, TABLE};
use super::run::{NIL, State};

/// Figures of a heap, in bytes unless said otherwise. What other threads do meanwhile may be counted or not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Addresses that the heap may use.
    pub reserved_bytes: usize,
    /// Made usable so far.
    pub committed_bytes: usize,
    /// In blocks that the program holds, as [`Core::usable_size`] counts them.
    pub used_bytes: usize,
    /// Blocks that the program holds.
    pub used_blocks: usize,
    /// In small blocks that threads keep for their next allocations.
    pub kept_bytes: usize,
    /// In slabs, with what is free in them.
    pub slab_bytes: usize,
    /// In blocks larger than 16 KiB.
    pub large_bytes: usize,
    /// Free pages whose content is not dropped yet.
    pub dirty_bytes: usize,
    /// Free pages that take neither RAM nor swap.
    pub clean_bytes: usize,
    /// Most that slabs and large blocks have been together.
    pub peak_bytes: usize,
    /// The allocator's own tables, which are ordinary memory.
    pub table_bytes: usize,
    /// Slots of threads that were ever needed at the same time.
    pub slots: usize,
    /// Blocks freed twice, and other bad pointers: a number.
    pub misuse: u64,
}

/// The first thing found that must not be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broken {
    /// What it is.
    pub what: &'static str,
    /// The page of the heap where it was found.
    pub page: u32,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the heap's records are damaged: {}, at page {}", self.what, self.page)
    }
}

impl std::error::Error for Broken {}

fn expect(good: bool, what: &'static str, page: u32) -> Result<(), Broken> {
    if good { Ok(()) } else { Err(Broken { what, page }) }
}

impl<B: Backing> Core<B> {
    /// Counts what there is. Takes time in proportion to the heap, and holds the lock of the pages meanwhile.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let mut stats = Stats {
            reserved_bytes: self.space.limit as usize * PAGE,
            table_bytes: self.space.table_bytes() + self.slots.bytes(),
            slots: self.slots.iter().count(),
            misuse: self.misuse(),
            ..Stats::default()
        };
        let pages = self.pages.lock();
        stats.committed_bytes = self.space.top() as usize * PAGE;
        stats.peak_bytes = pages.peak_pages as usize * PAGE;
        let mut page = 0;
        while page < self.space.top() {
            let run = self.space.runs.get(self.space.noted(page));
            let bytes = run.pages() as usize * PAGE;
            match run.state() {
                State::Large => {
                    stats.large_bytes += bytes;
                    stats.used_bytes += bytes;
                    stats.used_blocks += 1;
                }
                State::Listed | State::Full => {
                    let of = &TABLE[usize::from(run.class())];
                    let mut used = 0;
                    let mut kept = 0;
                    for word in 0..run.avail.len() {
                        let kept_here = run.kept[word].load(Ordering::Relaxed);
                        let free = run.avail[word].load(Ordering::Relaxed)
                            | run.freed[word].load(Ordering::Relaxed)
                            | kept_here;
                        kept += kept_here.count_ones();
                        used += (of.mask(word) & !free).count_ones();
                    }
                    stats.slab_bytes += bytes;
                    stats.used_blocks += used as usize;
                    stats.used_bytes += (used * of.size) as usize;
                    stats.kept_bytes += (kept * of.size) as usize;
                }
                State::Dirty => stats.dirty_bytes += bytes,
                State::Clean | State::Purging => stats.clean_bytes += bytes,
                State::Spare => return stats,
            }
            page = run.end();
        }
        stats
    }

    /// Whether all records agree with each other. Holds every lock meanwhile; blocks that other threads are just then
    /// allocating or freeing may look like damage.
    ///
    /// # Errors
    /// The first damage found.
    pub fn check(&self) -> Result<(), Broken> {
        self.prepare_fork();
        let outcome = self.check_held();
        self.after_fork_parent();
        outcome
    }

    fn check_held(&self) -> Result<(), Broken> {
        // SAFETY: `check` holds the lock.
        let pages = unsafe { self.pages.peek() };
        let (space, runs) = (&self.space, &self.space.runs);
        let (mut page, mut before, mut dirty, mut clean, mut used) = (0, State::Spare, (0, 0), 0, 0);
        let mut listed = 0_usize;
        let mut kept = 0_u32;
        while page < space.top() {
            let id = space.noted(page);
            let run = runs.get(id);
            let state = run.state();
            expect(
                id != NIL && run.start() == page,
                "a run does not begin where the one before it ends",
                page,
            )?;
            expect(run.pages() > 0 && run.end() <= space.top(), "a run has an impossible length", page)?;
            expect(space.noted(run.end() - 1) == id, "the last page of a run leads elsewhere", page)?;
            let free = matches!(state, State::Clean | State::Dirty);
            expect(!free || state != before, "free runs side by side are not joined", page)?;
            match state {
                State::Clean => clean += 1,
                State::Dirty => dirty = (dirty.0 + 1, dirty.1 + run.pages()),
                State::Large => used += run.pages(),
                State::Listed | State::Full => {
                    used += run.pages();
                    listed += usize::from(state == State::Listed);
                    kept += self.check_slab(id)?;
                }
                State::Purging | State::Spare => expect(false, "a run has an impossible state", page)?,
            }
            before = state;
            page = run.end();
        }
        expect(used == pages.used_pages, "pages in use are miscounted", 0)?;
        expect(dirty.1 == pages.dirty_pages, "dirty pages are miscounted", 0)?;
        for (bins, state, mut count) in
            [(&pages.clean, State::Clean, clean), (&pages.dirty, State::Dirty, dirty.0)]
        {
            let mut wrong = None;
            bins.for_each(runs, |id, placed| {
                count -= 1;
                if !placed || runs.get(id).state() != state {
                    wrong = Some(runs.get(id).start());
                }
            });
            expect(wrong.is_none(), "a free run is in a wrong bin", wrong.unwrap_or(0))?;
            expect(count == 0, "free runs are missing from their bins", 0)?;
        }
        let (mut id, mut queued) = (pages.oldest, 0);
        while id != NIL && queued <= dirty.0 {
            expect(
                runs.get(id).state() == State::Dirty,
                "the queue holds what is not dirty",
                runs.get(id).start(),
            )?;
            queued += 1;
            id = runs.get(id).newer();
        }
        expect(queued == dirty.0, "the queue of dirty runs is incomplete", 0)?;
        self.check_slots(listed, kept)
    }

    /// Gives the number of kept blocks.
    fn check_slab(&self, id: u32) -> Result<u32, Broken> {
        let run = self.space.runs.get(id);
        let page = run.start();
        let class = usize::from(run.class());
        expect(class < CLASSES, "a slab has no class", page)?;
        let of = &TABLE[class];
        expect(run.pages() == of.pages, "a slab has a wrong length", page)?;
        expect(
            (page..run.end()).all(|page| self.space.noted(page) == id),
            "a page of a slab leads elsewhere",
            page,
        )?;
        let mut all_kept = 0;
        for word in 0..run.avail.len() {
            let avail = run.avail[word].load(Ordering::Relaxed);
            let freed = run.freed[word].load(Ordering::Relaxed);
            let kept = run.kept[word].load(Ordering::Relaxed);
            expect((avail | freed | kept) & !of.mask(word) == 0, "a slab has too many blocks", page)?;
            expect(avail & kept | avail & freed | kept & freed == 0, "a block is free twice", page)?;
            let full = run.state() == State::Full;
            expect(!full || avail == 0, "a slab that is called full has blocks", page)?;
            all_kept += kept.count_ones();
        }
        Ok(all_kept)
    }

    fn check_slots(&self, mut listed: usize, mut kept: u32) -> Result<(), Broken> {
        let runs = &self.space.runs;
        for slot in self.slots.iter_held() {
            for (class, of) in (0..).zip(&TABLE) {
                let (mut id, mut before) = (slot.lists[usize::from(class)].load(Ordering::Relaxed), NIL);
                while id != NIL {
                    let run = runs.get(id);
                    let right = run.state() == State::Listed && run.class() == class;
                    expect(right && run.owner() == slot.number(), "a slab is in a wrong list", run.start())?;
                    expect(run.prev() == before, "a list of slabs is broken", run.start())?;
                    expect(listed > 0, "a slab is listed twice", run.start())?;
                    listed -= 1;
                    (before, id) = (id, run.next());
                }
                for at in 0..slot.kept(class) {
                    let place = slot.place(of, at);
                    let run = runs.get(place.run);
                    let (word, bit) = super::slab::split(place.block);
                    let right = run.class() == class && run.kept[word].load(Ordering::Relaxed) & bit != 0;
                    expect(
                        right && run.owner() == slot.number(),
                        "a kept block is not marked so",
                        run.start(),
                    )?;
                    kept = kept.wrapping_sub(1);
                }
            }
        }
        expect(listed == 0, "a slab is missing from its list", 0)?;
        expect(kept == 0, "blocks are marked as kept that are not", 0)
    }
}
