//! What to do at a fault and when RAM runs short. Pure: it decides, the pager does the system calls and reports back.
//!
//! A frame is first in, first out among the active ones. Then access is taken away from its page, and it is first in, first
//! out among the idle ones: a touch there is a fault that brings it back at once, so that pages in use stay. The end of
//! that list leaves RAM. Idle frames count against the budget like active ones.

use super::frames::{Fate, Frame, Frames, Origin, Place, State};
use super::pages::{Page, Pages};
use super::table::Table;

/// Most regions of a pager: their tables are in one piece of memory that does not move.
pub(super) const MAX_REGIONS: usize = 256;
/// One of so many frames is kept idle.
const IDLE_SHARE: u32 = 4;

/// What a thread wants from a page.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Want {
    /// To write to it.
    pub(super) write: bool,
    /// To keep it in RAM until [`Paging::unpin`].
    pub(super) pin: bool,
}

/// What the asking thread is to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing: it is done.
    Done,
    /// Nothing: the page is not in use.
    NotOurs,
    /// Nothing: so many pages are pinned that there is no room.
    AllPinned,
    /// The page is pinned and cannot go.
    Pinned,
    /// Wait until another thread has finished its work, then ask again.
    Wait,
    /// Do this without the lock, report it to [`Paging::finish`], then ask again.
    Work(Work),
}

/// A change of access to one page, under way.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub(super) struct Work {
    pub(super) frame: u32,
    pub(super) place: Place,
    pub(super) job: Job,
}

/// What to do with the page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Job {
    /// Give access to it.
    Show {
        /// First write zeros over its place in the file.
        zero: bool,
        /// Access for writing too.
        write: bool,
        /// Its bytes are in the file.
        read: bool,
        /// Pages to ask the system for, behind this one.
        ahead: std::ops::Range<u32>,
    },
    /// Take access away.
    Hide,
    /// Let go of its RAM.
    Evict {
        /// Access must be taken away first.
        hide: bool,
        /// Its content must be written out, after that.
        write: bool,
    },
}

/// What has happened so far. Pages are units of paging.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counters {
    pub(super) peak: u64,
    pub(super) faults: u64,
    pub(super) faults_zero: u64,
    pub(super) faults_read: u64,
    pub(super) faults_rescued: u64,
    pub(super) faults_stalled: u64,
    pub(super) pages_in: u64,
    pub(super) pages_ahead: u64,
    pub(super) pages_out: u64,
    pub(super) pages_clean: u64,
}

/// All that a pager knows of its pages.
#[derive(Debug)]
pub(super) struct Paging {
    frames: Frames,
    regions: [Option<Pages>; MAX_REGIONS],
    limit: u32,
    held: u32,
    pinned: u32,
    /// Frames that must stay free of pins.
    reserve: u32,
    pub(super) counters: Counters,
}

impl Paging {
    /// At most `limit` frames of the table are used, of which `reserve` cannot be pinned.
    pub(super) fn new(table: Table<Frame>, limit: u32, reserve: u32) -> Self {
        Self {
            frames: Frames::new(table),
            regions: std::array::from_fn(|_| None),
            limit,
            held: 0,
            pinned: 0,
            reserve,
            counters: Counters::default(),
        }
    }

    /// Frames in use.
    pub(super) fn held(&self) -> u32 {
        self.held
    }

    /// Frames that are pinned.
    pub(super) fn pinned(&self) -> u32 {
        self.pinned
    }

    /// Pages whose content is in the file only.
    pub(super) fn cold(&self) -> u64 {
        self.regions.iter().flatten().map(|pages| u64::from(pages.cold())).sum()
    }

    /// Most frames in use from now on; [`Paging::shrink`] gets there.
    pub(super) fn set_limit(&mut self, limit: u32) {
        self.limit = limit;
    }

    /// The least limit that pinned pages allow.
    pub(super) fn least_limit(&self) -> u32 {
        self.pinned + self.reserve
    }

    /// Frames that there is a table for.
    pub(super) fn frames(&self) -> usize {
        self.frames.len()
    }

    /// Takes a larger table and gives the old one back.
    pub(super) fn grow(&mut self, table: Table<Frame>) -> Table<Frame> {
        self.frames.grow(table)
    }

    /// Adds a region and gives its slot; none if there are too many.
    ///
    /// # Errors
    /// The pages, if there is no slot.
    pub(super) fn add(&mut self, pages: Pages) -> Result<u32, Pages> {
        let free = (0_u32..).zip(self.regions.iter_mut()).find(|(_, slot)| slot.is_none());
        let Some((number, slot)) = free else { return Err(pages) };
        *slot = Some(pages);
        Ok(number)
    }

    /// Takes a region out once no thread works on a page of it, whatever is pinned; none until then.
    pub(super) fn remove(&mut self, region: u32) -> Option<Pages> {
        let of_region = |frame: &Frame| frame.state != State::Free && frame.region == region;
        if self.frames.iter().any(|(_, frame)| of_region(frame) && frame.state == State::Busy) {
            return None;
        }
        for number in 0..u32::try_from(self.frames.len()).unwrap_or(u32::MAX) {
            if of_region(self.frames.get(number)) {
                self.frames.unlink(number);
                if std::mem::take(&mut self.frames.get_mut(number).pins) > 0 {
                    self.pinned -= 1;
                }
                self.frames.push(number, State::Free);
                self.held -= 1;
            }
        }
        self.regions.get_mut(index(region)).and_then(Option::take)
    }

    pub(super) fn pages(&mut self, region: u32) -> Option<&mut Pages> {
        self.regions.get_mut(index(region))?.as_mut()
    }

    fn page(&self, place: Place) -> Page {
        let pages = self.regions.get(index(place.region)).and_then(Option::as_ref);
        pages.map_or(Page::Void(Origin::Fresh), |pages| pages.get(place.page))
    }

    fn set_page(&mut self, place: Place, page: Page) {
        if let Some(pages) = self.pages(place.region) {
            pages.set(place.page, page);
        }
    }

    /// A thread has touched a page without having access, or wants to pin it. `first` for the first time that it asks.
    pub(super) fn fault(&mut self, place: Place, want: Want, first: bool) -> Step {
        self.counters.faults += u64::from(first && !want.pin);
        match self.page(place) {
            Page::Void(_) => Step::NotOurs,
            Page::Out(origin) => self.miss(place, want, origin),
            Page::In(frame) => self.hit(frame, want, first),
        }
    }

    fn hit(&mut self, number: u32, want: Want, first: bool) -> Step {
        let Frame { state, dirty, pins, .. } = *self.frames.get(number);
        match state {
            State::Free | State::Busy => Step::Wait,
            State::Active if dirty || !want.write => {
                if want.pin {
                    return self.pin(number, pins);
                }
                // The page has all the access that the thread wants. Usually another thread has just given it. If not,
                // somebody else took it away: then it is given once more, so that the thread gets on.
                if first { self.show(number, dirty) } else { Step::Done }
            }
            State::Active => {
                self.frames.get_mut(number).dirty = true;
                self.show(number, true)
            }
            State::Idle => {
                self.counters.faults_rescued += u64::from(!want.pin);
                let dirty = dirty || want.write;
                self.frames.get_mut(number).dirty = dirty;
                self.show(number, dirty)
            }
        }
    }

    fn miss(&mut self, place: Place, want: Want, origin: Origin) -> Step {
        if want.pin && self.least_limit() >= self.limit {
            return Step::AllPinned;
        }
        let free = if self.held < self.limit { self.frames.first_free() } else { None };
        let Some(number) = free else { return self.make_room() };
        self.frames.unlink(number);
        let frame = self.frames.get_mut(number);
        frame.region = place.region;
        frame.page = place.page;
        frame.pins = 0;
        frame.origin = origin;
        frame.dirty = want.write;
        self.held += 1;
        self.counters.peak = self.counters.peak.max(u64::from(self.held));
        debug_assert!(self.held <= self.limit, "more frames than the budget has");
        self.set_page(place, Page::In(number));
        let mut ahead = 0..0;
        if origin == Origin::Cold {
            self.counters.faults_read += 1;
            self.counters.pages_in += 1;
            ahead = self.pages(place.region).map_or(0..0, |pages| pages.read(place.page));
            self.counters.pages_ahead += u64::from(ahead.end - ahead.start);
        } else {
            self.counters.faults_zero += 1;
        }
        self.frames.push(number, State::Busy);
        let (zero, read) = (origin == Origin::Stale, origin == Origin::Cold);
        self.work(number, Job::Show { zero, write: want.write, read, ahead })
    }

    /// One step towards a free frame.
    fn make_room(&mut self) -> Step {
        let idle_wanted = self.limit / IDLE_SHARE;
        let active = self.frames.first_active();
        if let Some(number) = self.frames.first_idle()
            && (self.frames.idle() >= idle_wanted || active.is_none())
        {
            return self.evict(number, Fate::Keep);
        }
        if let Some(number) = active {
            self.frames.set(number, State::Busy);
            return self.work(number, Job::Hide);
        }
        if self.held > self.pinned {
            self.counters.faults_stalled += 1;
            return Step::Wait;
        }
        Step::AllPinned
    }

    /// One step towards the limit, after it was lowered.
    pub(super) fn shrink(&mut self) -> Step {
        if self.held > self.limit { self.make_room() } else { Step::Done }
    }

    /// One step towards having a page out of RAM.
    pub(super) fn expel(&mut self, place: Place, fate: Fate) -> Step {
        match self.page(place) {
            Page::In(number) => {
                let Frame { state, pins, .. } = *self.frames.get(number);
                match state {
                    State::Free | State::Busy => Step::Wait,
                    State::Active if pins > 0 => Step::Pinned,
                    State::Active | State::Idle => self.evict(number, fate),
                }
            }
            Page::Out(origin) | Page::Void(origin) if fate == Fate::Void => {
                self.set_page(place, Page::Void(emptied(origin, false)));
                Step::Done
            }
            Page::Out(origin) if fate == Fate::Discard => {
                self.set_page(place, Page::Out(emptied(origin, false)));
                Step::Done
            }
            Page::Out(_) | Page::Void(_) => Step::Done,
        }
    }

    /// Takes a page into use, if it is not.
    pub(super) fn commit(&mut self, place: Place) {
        if let Page::Void(origin) = self.page(place) {
            self.set_page(place, Page::Out(origin));
        }
    }

    /// Whether a page is not in use.
    pub(super) fn is_void(&self, place: Place) -> bool {
        matches!(self.page(place), Page::Void(_))
    }

    /// Whether a page takes RAM.
    pub(super) fn is_in(&self, place: Place) -> bool {
        matches!(self.page(place), Page::In(_))
    }

    fn pin(&mut self, number: u32, pins: u32) -> Step {
        if pins == 0 {
            if self.least_limit() >= self.limit {
                return Step::AllPinned;
            }
            self.frames.unlink(number);
            self.pinned += 1;
        }
        self.frames.get_mut(number).pins = pins.saturating_add(1);
        Step::Done
    }

    /// Ends one pin of a page.
    pub(super) fn unpin(&mut self, place: Place) {
        let Page::In(number) = self.page(place) else { return };
        let frame = self.frames.get_mut(number);
        if frame.pins == 0 {
            return;
        }
        frame.pins -= 1;
        if frame.pins == 0 {
            self.pinned -= 1;
            if frame.state == State::Active {
                self.frames.push(number, State::Active);
            }
        }
    }

    /// Gives access to what is in RAM.
    fn show(&mut self, number: u32, write: bool) -> Step {
        self.frames.set(number, State::Busy);
        self.work(number, Job::Show { zero: false, write, read: false, ahead: 0..0 })
    }

    fn evict(&mut self, number: u32, fate: Fate) -> Step {
        let hide = self.frames.get(number).state == State::Active;
        self.frames.set(number, State::Busy);
        let frame = self.frames.get_mut(number);
        frame.fate = fate;
        let write = frame.dirty && fate == Fate::Keep;
        self.work(number, Job::Evict { hide, write })
    }

    fn work(&mut self, number: u32, job: Job) -> Step {
        let place = self.frames.get(number).place();
        Step::Work(Work { frame: number, place, job })
    }

    /// A thread has done its work; not `done` if the system refused it, which leaves the page without access.
    pub(super) fn finish(&mut self, work: &Work, done: bool) {
        let number = work.frame;
        let Frame { origin, dirty, fate, .. } = *self.frames.get(number);
        match &work.job {
            Job::Show { zero, .. } if done => {
                if *zero {
                    self.frames.get_mut(number).origin = Origin::Fresh;
                }
                self.frames.push(number, State::Active);
            }
            // Its place in the file still has what it had.
            Job::Show { zero: true, .. } => self.leave(number, Page::Out(origin)),
            // The next touch tries again.
            Job::Show { .. } => self.frames.push(number, State::Active),
            Job::Hide if done => self.frames.push(number, State::Idle),
            Job::Hide => self.frames.push(number, State::Active),
            Job::Evict { hide: true, .. } if !done => self.frames.push(number, State::Active),
            Job::Evict { .. } => {
                let page = match fate {
                    Fate::Keep if dirty => {
                        self.counters.pages_out += 1;
                        Page::Out(Origin::Cold)
                    }
                    Fate::Keep => {
                        self.counters.pages_clean += 1;
                        Page::Out(origin)
                    }
                    Fate::Discard => Page::Out(emptied(origin, dirty)),
                    Fate::Void => Page::Void(emptied(origin, dirty)),
                };
                self.leave(number, page);
            }
        }
    }

    fn leave(&mut self, number: u32, page: Page) {
        let place = self.frames.get(number).place();
        self.set_page(place, page);
        self.frames.push(number, State::Free);
        self.held -= 1;
    }
}

/// What a page is whose content was dropped: the file has something else than zeros unless it never had.
fn emptied(origin: Origin, dirty: bool) -> Origin {
    if origin == Origin::Fresh && !dirty { Origin::Fresh } else { Origin::Stale }
}

fn index(region: u32) -> usize {
    fmalloc_proto::num::to_usize(u64::from(region))
}
