//! Anonymous mappings of the program that are paged: carved out of one region, by the books in [`Area`]. Each function
//! does what the system call of its name does for memory of the area, and sets errno as that would.
//!
//! The books' lock is held across the system calls that it is about; the agent never takes it. All of it runs inside
//! (see [`crate::inside`]), so that the library's own calls do not come back here.

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use fmalloc_client::{Advice, Error, PAGE_SIZE, Pager, Region};
use libc::{EAGAIN, EEXIST, EINVAL, ENOMEM, PROT_NONE, PROT_READ, PROT_WRITE};

use crate::area::{Area, Piece, Use};
use crate::raw;

const READ_WRITE: c_int = PROT_READ | PROT_WRITE;

/// See the module.
#[derive(Debug)]
pub(crate) struct Maps {
    region: Region,
    area: Mutex<Area>,
}

/// A range of bytes that is split where the area begins and ends.
#[derive(Debug)]
pub(crate) struct Split {
    /// Pages of the area.
    pub(crate) inside: Range<usize>,
    /// Address and length of what is before and behind.
    pub(crate) outside: [(usize, usize); 2],
}

impl Split {
    /// Whether all of the range is in the area.
    pub(crate) fn is_whole(&self) -> bool {
        self.outside.iter().all(|(_, len)| *len == 0)
    }
}

impl Maps {
    /// Reserves addresses.
    pub(crate) fn new(pager: &Pager, bytes: usize) -> Result<Self, Error> {
        let region = Region::sparse_labelled(pager, bytes, "mappings")?;
        let pages = region.len() / PAGE_SIZE;
        Ok(Self { region, area: Mutex::new(Area::new(pages)) })
    }

    /// The part of `len` bytes from `addr` on that is in the area; none if there is nothing of it.
    pub(crate) fn split(&self, addr: usize, len: usize) -> Option<Split> {
        let (base, size) = (self.base(), self.region.len());
        let len = len.checked_next_multiple_of(PAGE_SIZE)?;
        let end = addr.checked_add(len)?;
        let (from, to) = (addr.max(base), end.min(base + size));
        (from < to).then(|| Split {
            inside: (from - base) / PAGE_SIZE..(to - base) / PAGE_SIZE,
            outside: [(addr, from - addr), (to, end - to)],
        })
    }

    /// Whether any of these bytes are in the area.
    pub(crate) fn touches(&self, addr: usize, len: usize) -> bool {
        self.split(addr, len).is_some()
    }

    /// For `fork`: no other thread is at work on the area until the guard is dropped.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Area> {
        self.area.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new mapping anywhere.
    pub(crate) fn map(&self, len: usize, prot: c_int) -> *mut c_void {
        let pages = len.div_ceil(PAGE_SIZE);
        let mut area = self.lock();
        let Some(range) = area.take(pages, Use { prot, committed: false, foreign: false }) else {
            raw::set_errno(ENOMEM);
            return libc::MAP_FAILED;
        };
        if let Err(errno) = self.make_accessible(&mut area, &range, prot) {
            area.give(range);
            raw::set_errno(errno);
            return libc::MAP_FAILED;
        }
        self.at(range.start)
    }

    /// A new mapping at these pages; what was there goes.
    pub(crate) fn map_fixed(&self, range: Range<usize>, prot: c_int, replace: bool) -> *mut c_void {
        let mut area = self.lock();
        if !replace && !area.pieces(range.clone()).is_empty() {
            raw::set_errno(EEXIST);
            return libc::MAP_FAILED;
        }
        let outcome = self.clear(&mut area, &range).and_then(|()| {
            area.take_gaps(range.clone(), Use { prot, committed: false, foreign: false });
            for Piece { pages, .. } in
                area.pieces(range.clone()).into_iter().filter(|piece| piece.used.foreign)
            {
                self.map_unpaged(&pages, prot)?;
            }
            self.make_accessible(&mut area, &range, prot)
        });
        match outcome {
            Ok(()) => self.at(range.start),
            Err(errno) => {
                raw::set_errno(errno);
                libc::MAP_FAILED
            }
        }
    }

    /// Something that is not paged is being mapped over these pages by `map`, which says whether it was.
    pub(crate) fn map_foreign(&self, range: Range<usize>, map: impl FnOnce() -> *mut c_void) -> *mut c_void {
        let mut area = self.lock();
        if let Err(errno) = self.clear(&mut area, &range) {
            raw::set_errno(errno);
            return libc::MAP_FAILED;
        }
        let mapped = map();
        if mapped != libc::MAP_FAILED {
            area.take_gaps(range, Use { prot: PROT_NONE, committed: false, foreign: true });
        }
        mapped
    }

    /// `munmap`.
    pub(crate) fn unmap(&self, range: Range<usize>) -> c_int {
        status(self.clear(&mut self.lock(), &range))
    }

    /// `mprotect`.
    pub(crate) fn protect(&self, range: Range<usize>, prot: c_int) -> c_int {
        let mut area = self.lock();
        if !area.is_used(range.clone()) {
            return raw::fail(ENOMEM);
        }
        status(self.make_accessible(&mut area, &range, prot))
    }

    /// `mremap` within the area, without a wish for the new address. `may_move`: MREMAP_MAYMOVE.
    pub(crate) fn remap(&self, old: Range<usize>, pages: usize, may_move: bool) -> *mut c_void {
        let mut area = self.lock();
        let pieces = area.pieces(old.clone());
        let failed = |errno| {
            raw::set_errno(errno);
            libc::MAP_FAILED
        };
        let [Piece { pages: whole, used }] = &pieces[..] else { return failed(libc::EFAULT) };
        if *whole != old || used.foreign || pages == 0 {
            return failed(EINVAL);
        }
        if pages <= old.len() {
            return match self.clear(&mut area, &(old.start + pages..old.end)) {
                Ok(()) => self.at(old.start),
                Err(errno) => failed(errno),
            };
        }
        let more = old.end..old.start + pages;
        let fresh = Use { committed: false, ..*used };
        if area.take_at(more.clone(), fresh) {
            return match self.make_accessible(&mut area, &more, used.prot) {
                Ok(()) => self.at(old.start),
                Err(errno) => {
                    area.give(more);
                    failed(errno)
                }
            };
        }
        if !may_move {
            return failed(ENOMEM);
        }
        let Some(new) = area.take(pages, fresh) else { return failed(ENOMEM) };
        let moved = self.make_accessible(&mut area, &new, READ_WRITE).and_then(|()| {
            // SAFETY: both ranges are of this area and in use; whoever reads the old one would be wrong natively too.
            unsafe {
                protect(self.at(old.start), old.len() * PAGE_SIZE, PROT_READ)?;
                self.at(new.start).copy_from_nonoverlapping(self.at(old.start), old.len() * PAGE_SIZE);
            }
            self.make_accessible(&mut area, &new, used.prot)
        });
        if let Err(errno) = moved {
            let _ = self.clear(&mut area, &new);
            return failed(errno);
        }
        // The mapping has moved; if its old place cannot be given back, that is lost, no more.
        let _ = self.clear(&mut area, &old);
        self.at(new.start)
    }

    /// `madvise`.
    pub(crate) fn advise(&self, range: Range<usize>, advice: c_int) -> c_int {
        let area = self.lock();
        let pieces = area.pieces(range.clone());
        drop(area);
        for Piece { pages, used } in &pieces {
            let outcome = if used.foreign {
                // SAFETY: what is mapped there is the program's.
                unsafe { raw::madvise(self.at(pages.start), pages.len() * PAGE_SIZE, advice) }
            } else {
                advise(&self.region, bytes(pages), advice)
            };
            if outcome != 0 {
                return outcome;
            }
        }
        if pieces.iter().map(|piece| piece.pages.len()).sum::<usize>() == range.len() {
            0
        } else {
            raw::fail(ENOMEM)
        }
    }

    /// Takes content, swap and access of all pages of a range away, and frees those that were in use.
    fn clear(&self, area: &mut Area, range: &Range<usize>) -> Result<(), c_int> {
        for Piece { pages, used } in area.pieces(range.clone()) {
            if used.foreign {
                // Not part of the region any more, and never given out again: something may still be in the way.
                self.map_unpaged(&pages, PROT_NONE)?;
                area.change(pages, |used| used.prot = PROT_NONE);
                continue;
            }
            if used.committed {
                // Locked pages are not dropped.
                raw::munlock(self.at(pages.start), pages.len() * PAGE_SIZE);
                // SAFETY: the program has unmapped it.
                match unsafe { self.region.decommit_unused(bytes(&pages)) } {
                    Ok(()) => {}
                    // Never to be used again, so that nothing of it is ever read.
                    Err(_) => {
                        area.change(pages, |used| used.foreign = true);
                        continue;
                    }
                }
            } else if used.prot != PROT_NONE {
                // SAFETY: as above.
                unsafe { protect(self.at(pages.start), pages.len() * PAGE_SIZE, PROT_NONE) }?;
            }
            area.give(pages);
        }
        Ok(())
    }

    /// Ordinary memory in place of foreign pages.
    fn map_unpaged(&self, pages: &Range<usize>, prot: c_int) -> Result<(), c_int> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: what is there is the program's, which has unmapped it.
        let mapped = unsafe { raw::mmap(self.at(pages.start), pages.len() * PAGE_SIZE, prot, flags, -1, 0) };
        if mapped == libc::MAP_FAILED { Err(raw::errno()) } else { Ok(()) }
    }

    /// Claims swap where the program is to have access, and gives access.
    fn make_accessible(&self, area: &mut Area, range: &Range<usize>, prot: c_int) -> Result<(), c_int> {
        for Piece { pages, used } in area.pieces(range.clone()) {
            if prot != PROT_NONE && !used.committed && !used.foreign {
                self.region.commit(bytes(&pages)).map_err(|_| ENOMEM)?;
                area.change(pages.clone(), |used| used.committed = true);
                if prot == READ_WRITE {
                    continue;
                }
            } else if prot == PROT_NONE && !used.committed && !used.foreign {
                continue;
            }
            // SAFETY: the pages are the program's, which changes its access to them.
            unsafe { protect(self.at(pages.start), pages.len() * PAGE_SIZE, prot) }?;
        }
        area.change(range.clone(), |used| used.prot = prot);
        Ok(())
    }

    fn base(&self) -> usize {
        self.region.as_ptr().addr()
    }

    fn at(&self, page: usize) -> *mut c_void {
        self.region.as_ptr().wrapping_add(page * PAGE_SIZE).cast()
    }
}

/// `madvise` on memory of a region: what is about content does as on other memory, what is about RAM goes to the
/// daemon, and what would take memory out of its hands is left out.
pub(crate) fn advise(region: &Region, range: Range<usize>, advice: c_int) -> c_int {
    let hint = match advice {
        // Freed at once, so that nobody has to find out when.
        libc::MADV_DONTNEED | libc::MADV_FREE => {
            let start = region.as_ptr().wrapping_add(range.start).cast();
            raw::munlock(start, range.len());
            // SAFETY: the program has said that it does not need the content.
            return unsafe { raw::madvise(start, range.len(), libc::MADV_DONTNEED) };
        }
        libc::MADV_NORMAL => Advice::Normal,
        libc::MADV_RANDOM => Advice::Random,
        libc::MADV_SEQUENTIAL => Advice::Sequential,
        libc::MADV_WILLNEED => Advice::WillNeed,
        libc::MADV_COLD | libc::MADV_PAGEOUT => Advice::Cold,
        libc::MADV_HUGEPAGE
        | libc::MADV_NOHUGEPAGE
        | libc::MADV_COLLAPSE
        | libc::MADV_MERGEABLE
        | libc::MADV_UNMERGEABLE
        | libc::MADV_DONTDUMP
        | libc::MADV_DODUMP => return 0,
        libc::MADV_POPULATE_READ | libc::MADV_POPULATE_WRITE | libc::MADV_DONTFORK | libc::MADV_DOFORK => {
            let start = region.as_ptr().wrapping_add(range.start).cast();
            // SAFETY: changes no content.
            return unsafe { raw::madvise(start, range.len(), advice) };
        }
        _ => return raw::fail(EINVAL),
    };
    match region.advise(range, hint) {
        Ok(()) => 0,
        Err(_) => raw::fail(EAGAIN),
    }
}

fn bytes(pages: &Range<usize>) -> Range<usize> {
    pages.start * PAGE_SIZE..pages.end * PAGE_SIZE
}

fn status(outcome: Result<(), c_int>) -> c_int {
    outcome.map_or_else(raw::fail, |()| 0)
}

/// # Safety
/// The range must be the program's.
unsafe fn protect(addr: *mut c_void, len: usize, prot: c_int) -> Result<(), c_int> {
    // SAFETY: the caller's.
    if unsafe { raw::mprotect(addr, len, prot) } == 0 { Ok(()) } else { Err(raw::errno()) }
}

/// The start of a region as the heap wants it.
pub(crate) fn base(region: &Region) -> NonNull<u8> {
    NonNull::new(region.as_ptr()).unwrap_or(NonNull::dangling())
}
