//! A range of paged memory: its view of the swap file, its life, and what can be asked for it.

use std::ops::{Deref, DerefMut, Range};

use fmalloc_proto::limits::{MAX_REGION, PAGE_SIZE};
use fmalloc_proto::messages::{Advice, ErrorCode};
use fmalloc_proto::num::{to_u64, to_usize};

use super::engine::{Engine, Refusal, Site};
use super::frames::{Fate, Origin, Place};
use super::handler;
use super::pager::{Pager, no_memory, refused};
use super::pages::{Page, Pages};
use super::paging::Want;
use super::space::GRANULE;
use crate::error::Error;
use crate::pod::Pod;

/// Memory of any length, zero at first, of which only as much is in RAM as the pager's budget allows. It is used like
/// a slice, from any number of threads.
///
/// - **System calls do not fault pages in on Windows**: one that gets a pointer to a page that is not in RAM fails with
///   `ERROR_NOACCESS` (998). Use [`Region::read_into`], [`Region::write_from`], or a [`Region::pin`]ned range.
/// - The access rights of its pages are the pager's: `VirtualProtect` by the program does not last.
/// - If the disk fails, the thread that needs the page gets `EXCEPTION_IN_PAGE_ERROR`.
#[derive(Debug)]
pub struct Region {
    pager: Pager,
    site: Site,
    part: Range<u64>,
    len: usize,
    id: u32,
}

impl Region {
    /// A region of `len` bytes. Claims that much of the swap file, so that the memory can never run out later.
    ///
    /// # Errors
    /// [`Error::SwapFull`], [`Error::Invalid`] for zero, for more than 64 TiB or if the page table does not fit into the
    /// budget, [`Error::Refused`] for too many regions, or a failure of the system.
    pub fn new(pager: &Pager, len: usize) -> Result<Self, Error> {
        Self::make(pager, len, true)
    }

    /// [`Region::new`]; the label is for `fmallocctl`, which Windows does not have.
    ///
    /// # Errors
    /// As [`Region::new`].
    pub fn labelled(pager: &Pager, len: usize, _label: &str) -> Result<Self, Error> {
        Self::make(pager, len, true)
    }

    /// [`Region::sparse`]; the label is for `fmallocctl`.
    ///
    /// # Errors
    /// As [`Region::new`].
    pub fn sparse_labelled(pager: &Pager, len: usize, _label: &str) -> Result<Self, Error> {
        Self::make(pager, len, false)
    }

    /// Addresses that cannot be used yet. [`Region::commit`] makes a part usable; a touch outside such parts is an access
    /// violation. On Windows the swap file must have room for all of it at once.
    ///
    /// # Errors
    /// As [`Region::new`].
    pub fn sparse(pager: &Pager, len: usize) -> Result<Self, Error> {
        Self::make(pager, len, false)
    }

    /// Makes the units of paging around `range` (in bytes) usable. What is usable already stays as it is.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range outside the region.
    pub fn commit(&self, range: Range<usize>) -> Result<(), Error> {
        let pages = self.around(&range)?;
        let mut state = self.engine().state();
        pages.for_each(|page| state.paging.commit(self.place(page)));
        Ok(())
    }

    /// Drops the content of `range` (in bytes), and takes the whole units of paging within it out of use. The rest of it
    /// reads as zeros.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range outside the region or with a page that is pinned, or a failure of the system.
    pub fn decommit(&mut self, range: Range<usize>) -> Result<(), Error> {
        // SAFETY: the region is borrowed exclusively.
        unsafe { self.decommit_unused(range) }
    }

    /// [`Region::decommit`] for an allocator, which knows by itself what is in use.
    ///
    /// # Safety
    /// Nothing may refer to the content of the range.
    ///
    /// # Errors
    /// As [`Region::decommit`].
    pub unsafe fn decommit_unused(&self, range: Range<usize>) -> Result<(), Error> {
        // SAFETY: the caller's.
        unsafe { self.empty(range, Fate::Void, "decommitting") }
    }

    /// A hint about the pages around `range` (in bytes). Sequential and random reading are noted for the whole region.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range outside the region, or a failure of the system.
    pub fn advise(&self, range: Range<usize>, advice: Advice) -> Result<(), Error> {
        let pages = self.around(&range)?;
        match advice {
            Advice::Normal | Advice::Sequential | Advice::Random => {
                let unit = self.engine().unit;
                if let Some(pages) = self.engine().state().paging.pages(self.id) {
                    pages.read_ahead(advice != Advice::Random, unit);
                }
                Ok(())
            }
            Advice::WillNeed => {
                let view = &self.site.view;
                let bytes =
                    self.engine().bytes(view, pages.start).start..self.engine().bytes(view, pages.end).start;
                view.prefetch([&bytes, &(0..0)]);
                Ok(())
            }
            // Page by page, so that one that is pinned does not keep the others.
            Advice::Cold => pages
                .map(|page| self.engine().expel(self.id, page..page + 1, Fate::Keep))
                .filter(|outcome| *outcome != Err(Refusal::Pinned))
                .collect::<Result<(), _>>()
                .map_err(|refusal| refused("evicting", refusal)),
        }
    }

    /// Drops the content of `range` (in bytes): it reads as zeros from now on, and what its whole units of paging took of
    /// RAM is free. The rest of it is filled with zeros.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range outside the region or with a page that is pinned, or a failure of the system.
    pub fn discard(&mut self, range: Range<usize>) -> Result<(), Error> {
        // SAFETY: the region is borrowed exclusively.
        unsafe { self.discard_unused(range) }
    }

    /// [`Region::discard`] for an allocator, which knows by itself what is in use.
    ///
    /// # Safety
    /// Nothing may refer to the content of the range.
    ///
    /// # Errors
    /// As [`Region::discard`].
    pub unsafe fn discard_unused(&self, range: Range<usize>) -> Result<(), Error> {
        // SAFETY: the caller's.
        unsafe { self.empty(range, Fate::Discard, "discarding") }
    }

    /// For each page of 4096 bytes that `range` (in bytes) touches, whether it counts as being in RAM at this moment.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range outside the region.
    pub fn resident(&self, range: Range<usize>) -> Result<Vec<bool>, Error> {
        self.check_range(&range)?;
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let small = range.start / PAGE_SIZE..range.end.div_ceil(PAGE_SIZE);
        let mut map = Vec::with_capacity(small.len());
        let per_unit = self.engine().unit / PAGE_SIZE;
        let state = self.engine().state();
        map.extend(small.map(|page| state.paging.is_in(self.place(number(page / per_unit)))));
        Ok(map)
    }

    /// The region as values of another type; bytes at the end that do not fill one are left out.
    #[must_use]
    pub fn as_slice_of<T: Pod>(&self) -> &[T] {
        let count = self.len.checked_div(size_of::<T>()).unwrap_or(0);
        // SAFETY: any bytes are a `T`, the view is aligned for it, and the lifetime is that of `self`.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), count) }
    }

    /// As [`Region::as_slice_of`], to write to.
    #[must_use]
    pub fn as_mut_slice_of<T: Pod>(&mut self) -> &mut [T] {
        let count = self.len.checked_div(size_of::<T>()).unwrap_or(0);
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.as_ptr().cast(), count) }
    }

    /// Start of the memory; aligned to 65536.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.site.view.start.as_ptr()
    }

    /// Length in bytes, as asked for.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: a region has one byte at least.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The region's number within its pager.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The pager that it belongs to.
    #[must_use]
    pub fn pager(&self) -> &Pager {
        &self.pager
    }

    fn make(pager: &Pager, len: usize, commit: bool) -> Result<Self, Error> {
        if len == 0 || to_u64(len) > MAX_REGION {
            return Err(Error::invalid(format!("a region of {len} bytes; it must have 1 to {MAX_REGION}")));
        }
        let unit = pager.engine().unit;
        let count = u32::try_from(len.div_ceil(unit)).map_err(|_| {
            Error::invalid(format!("a region of {len} bytes needs a larger unit than {unit}"))
        })?;
        let tables = to_u64(Pages::bytes(count));
        let (part, fresh) = pager.claim(to_u64(len).next_multiple_of(GRANULE), tables)?;
        Self::place_in(pager, len, count, commit, &part, fresh).inspect_err(|_| pager.unclaim(part, tables))
    }

    fn place_in(
        pager: &Pager,
        len: usize,
        count: u32,
        commit: bool,
        part: &Range<u64>,
        fresh: bool,
    ) -> Result<Self, Error> {
        let engine = pager.engine();
        let origin = if fresh { Origin::Fresh } else { Origin::Stale };
        let page = if commit { Page::Out(origin) } else { Page::Void(origin) };
        let pages = Pages::new(count, engine.unit, page).ok_or_else(no_memory)?;
        let view = engine.swap.section.map(part).map_err(|code| Error::system("mapping a region", code))?;
        let site = Site { view, offset: part.start };
        let too_many = || {
            view.unmap();
            Error::Refused { code: ErrorCode::Limit, text: "too many regions".to_owned() }
        };
        let id = engine.add(pages, site).map_err(|_| too_many())?;
        if !handler::add(view.addresses(), id, engine) {
            engine.remove(id);
            return Err(too_many());
        }
        Ok(Self { pager: pager.clone(), site, part: part.clone(), len, id })
    }

    fn engine(&self) -> &Engine {
        self.pager.engine()
    }

    fn place(&self, page: u32) -> Place {
        Place { region: self.id, page }
    }

    /// What [`Region::pin`] does, for a binding that keeps no guard: [`Region::release`] ends it.
    ///
    /// # Errors
    /// As [`Region::pin`].
    pub fn hold(&self, range: &Range<usize>, write: bool) -> Result<(), Error> {
        let pages = self.around(range)?;
        for page in pages.clone() {
            if let Err(refusal) = self.engine().serve(self.place(page), Want { write, pin: true }) {
                self.unpin(pages.start..page);
                return Err(refused("pinning", refusal));
            }
        }
        Ok(())
    }

    /// Ends one [`Region::hold`] of the same range.
    pub fn release(&self, range: &Range<usize>) {
        if let Ok(pages) = self.around(range) {
            self.unpin(pages);
        }
    }

    /// Lets go of the whole units within a range, and fills the rest of it with zeros where it is in use.
    ///
    /// # Safety
    /// Nothing may refer to the content.
    unsafe fn empty(&self, range: Range<usize>, fate: Fate, what: &str) -> Result<(), Error> {
        let pages = self.within(&range)?;
        let unit = self.engine().unit;
        let whole = to_usize(pages.start.into()) * unit..(to_usize(pages.end.into()) * unit).min(self.len);
        self.engine().expel(self.id, pages, fate).map_err(|refusal| refused(what, refusal))?;
        let rest = if whole.is_empty() {
            let middle = range.end.min(range.start.next_multiple_of(unit));
            [range.start..middle, middle..range.end]
        } else {
            [range.start..whole.start, whole.end..range.end]
        };
        for part in rest.into_iter().filter(|part| !part.is_empty()) {
            let place = self.place(number(part.start / unit));
            if !self.engine().state().paging.is_void(place) {
                // SAFETY: within one unit of the region that is in use; nobody refers to it.
                unsafe { self.as_ptr().add(part.start).write_bytes(0, part.len()) };
            }
        }
        Ok(())
    }

    fn unpin(&self, pages: Range<u32>) {
        let mut state = self.engine().state();
        pages.for_each(|page| state.paging.unpin(self.place(page)));
    }

    /// The pages around a range.
    fn around(&self, range: &Range<usize>) -> Result<Range<u32>, Error> {
        self.check_range(range)?;
        let unit = self.engine().unit;
        let end = if range.is_empty() { range.start / unit } else { range.end.div_ceil(unit) };
        Ok(number(range.start / unit)..number(end))
    }

    /// The whole pages within a range, the last one of the region counting as whole.
    fn within(&self, range: &Range<usize>) -> Result<Range<u32>, Error> {
        self.check_range(range)?;
        let unit = self.engine().unit;
        let end = if range.end == self.len { range.end.div_ceil(unit) } else { range.end / unit };
        let start = number(range.start.div_ceil(unit));
        Ok(start..number(end).max(start))
    }

    fn check_range(&self, range: &Range<usize>) -> Result<(), Error> {
        if range.start <= range.end && range.end <= self.len {
            Ok(())
        } else {
            Err(Error::range(range, self.len))
        }
    }
}

/// A page's number. Regions have no more than 32 bits count.
fn number(page: usize) -> u32 {
    u32::try_from(page).unwrap_or(u32::MAX)
}

impl Deref for Region {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.as_slice_of()
    }
}

impl DerefMut for Region {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.as_mut_slice_of()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        handler::remove(self.site.view.addresses().start);
        let tables = self.engine().remove(self.id).map_or(0, |pages| to_u64(Pages::bytes(pages.len())));
        self.site.view.unmap();
        self.pager.unclaim(self.part.clone(), tables);
    }
}
