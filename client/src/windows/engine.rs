//! What a pager, its regions and the exception handler share: the paging core behind a lock, and the loop that does
//! what it decides. It is in memory from the system, allocates nothing, and never touches a region's memory.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use fmalloc_proto::num::{to_u64, to_usize};

use super::frames::{Fate, Place};
use super::lock::{Change, Held, Lock};
use super::pages::Pages;
use super::paging::{Job, MAX_REGIONS, Paging, Step, Want, Work};
use super::swap::Swap;
use super::sys::{Access, Code, View};

/// A block of zeros to write.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Why a page could not be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It is not in use.
    NotOurs,
    /// Too much is pinned.
    AllPinned,
    /// It is pinned and cannot go.
    Pinned,
    /// The system refused.
    Failed(Code),
}

/// Where a region is: its addresses, and where it begins in the swap file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Site {
    pub(super) view: View,
    pub(super) offset: u64,
}

/// What is behind the lock.
pub(super) struct State {
    pub(super) paging: Paging,
    sites: [Site; MAX_REGIONS],
}

/// See the module.
pub(super) struct Engine {
    state: Lock<State>,
    change: Change,
    pub(super) swap: Swap,
    /// Bytes of a page.
    pub(super) unit: usize,
    /// Exception handlers at work in here.
    pub(super) users: AtomicU32,
    /// Failed reads and writes of the swap file.
    pub(super) io_errors: AtomicU64,
}

impl Engine {
    pub(super) fn new(paging: Paging, swap: Swap, unit: usize) -> Self {
        let nowhere = Site { view: View { start: NonNull::dangling(), len: 0 }, offset: 0 };
        Self {
            state: Lock::new(State { paging, sites: [nowhere; MAX_REGIONS] }),
            change: Change::new(),
            swap,
            unit,
            users: AtomicU32::new(0),
            io_errors: AtomicU64::new(0),
        }
    }

    pub(super) fn state(&self) -> Held<'_, State> {
        self.state.lock()
    }

    /// Gets a thread the page that it wants. Called by the exception handler too.
    ///
    /// # Errors
    /// Any refusal but `Pinned`.
    pub(super) fn serve(&self, place: Place, want: Want) -> Result<(), Refusal> {
        let mut first = true;
        self.repeat(|paging| paging.fault(place, want, std::mem::take(&mut first)))
    }

    /// Gets pages out of RAM, or empties them.
    ///
    /// # Errors
    /// `Pinned` or `Failed`; the pages before that one are out.
    pub(super) fn expel(&self, region: u32, pages: Range<u32>, fate: Fate) -> Result<(), Refusal> {
        for page in pages {
            let mut asked = false;
            self.repeat(|paging| {
                // A page that keeps its content may be wanted back at once: then it stays.
                if std::mem::replace(&mut asked, true) && fate == Fate::Keep {
                    return Step::Done;
                }
                paging.expel(Place { region, page }, fate)
            })?;
        }
        Ok(())
    }

    /// Gets down to a limit that was lowered.
    ///
    /// # Errors
    /// `Failed`; so much is above the limit still.
    pub(super) fn shrink(&self) -> Result<(), Refusal> {
        self.repeat(Paging::shrink)
    }

    /// Adds a region.
    ///
    /// # Errors
    /// The pages, if there are too many regions.
    pub(super) fn add(&self, pages: Pages, site: Site) -> Result<u32, Pages> {
        let mut state = self.state();
        let region = state.paging.add(pages)?;
        if let Some(place) = state.sites.get_mut(to_usize(region.into())) {
            *place = site;
        }
        Ok(region)
    }

    /// Takes a region out, whatever state its pages are in; nobody can ask for them afterwards.
    pub(super) fn remove(&self, region: u32) -> Option<Pages> {
        let mut state = self.state();
        loop {
            if state.paging.pages(region).is_none() {
                return None;
            }
            if let Some(pages) = state.paging.remove(region) {
                return Some(pages);
            }
            self.change.wait(&mut state);
        }
    }

    /// Bytes of a page within its region; the last one may be cut.
    pub(super) fn bytes(&self, view: &View, page: u32) -> Range<usize> {
        let start = to_usize(page.into()) * self.unit;
        start.min(view.len)..(start + self.unit).min(view.len)
    }

    fn repeat(&self, mut ask: impl FnMut(&mut Paging) -> Step) -> Result<(), Refusal> {
        let mut state = self.state();
        loop {
            match ask(&mut state.paging) {
                Step::Done => return Ok(()),
                Step::NotOurs => return Err(Refusal::NotOurs),
                Step::AllPinned => return Err(Refusal::AllPinned),
                Step::Pinned => return Err(Refusal::Pinned),
                Step::Wait => self.change.wait(&mut state),
                Step::Work(work) => {
                    let Some(site) = state.sites.get(to_usize(work.place.region.into())).copied() else {
                        return Err(Refusal::NotOurs);
                    };
                    drop(state);
                    let done = self.work(&work, &site);
                    state = self.state();
                    state.paging.finish(&work, done.is_ok());
                    self.change.tell();
                    done.map_err(Refusal::Failed)?;
                }
            }
        }
    }

    fn work(&self, work: &Work, site: &Site) -> Result<(), Code> {
        let view = &site.view;
        let bytes = self.bytes(view, work.place.page);
        match &work.job {
            Job::Show { zero, write, read, ahead } => {
                if *zero {
                    self.write_zeros(site.offset + to_u64(bytes.start), bytes.len())?;
                }
                if *read && (self.unit > fmalloc_proto::PAGE_SIZE || !ahead.is_empty()) {
                    let ahead = if ahead.is_empty() {
                        0..0
                    } else {
                        self.bytes(view, ahead.start).start..self.bytes(view, ahead.end - 1).end
                    };
                    view.prefetch([&bytes, &ahead]);
                }
                view.protect(&bytes, if *write { Access::Write } else { Access::Read })
            }
            Job::Hide => view.protect(&bytes, Access::None),
            Job::Evict { hide, write } => {
                if *hide {
                    view.protect(&bytes, Access::None)?;
                }
                // What could not be written stays the system's to write: nothing is lost by going on.
                if *write && view.flush(&bytes).is_err() {
                    self.io_errors.fetch_add(1, Ordering::Relaxed);
                }
                view.trim(&bytes);
                Ok(())
            }
        }
    }

    fn write_zeros(&self, offset: u64, len: usize) -> Result<(), Code> {
        for start in (0..len).step_by(ZEROS.len()) {
            let block = ZEROS.get(..(len - start).min(ZEROS.len())).unwrap_or(&ZEROS);
            self.swap.file.write_at(offset + to_u64(start), block).inspect_err(|_| {
                self.io_errors.fetch_add(1, Ordering::Relaxed);
            })?;
        }
        Ok(())
    }
}
