//! The staging area: where pages land that are moved out of regions, until their bytes are in the ring. Ordinary memory
//! of this process, registered with a userfaultfd of its own that has no events, empty between batches.

use std::ptr::NonNull;

use fmalloc_proto::limits::{PAGE, PAGE_SIZE};
use fmalloc_proto::num::{to_u64, to_usize};
use fmalloc_proto::ring::Layout;
use nix::errno::Errno;

use crate::sys;

/// Areas beyond one per batch, for areas that cannot be trusted any more. None has ever been needed.
const SPARE: u32 = 4;

/// One area of `batch_pages` places for each batch of the ring, and a few to spare.
#[derive(Debug)]
pub(crate) struct Staging {
    base: NonNull<u8>,
    batch_pages: u32,
    areas: u32,
    /// Which area each batch uses.
    area_of: Vec<u32>,
    /// Areas below this one are in use or given up.
    fresh: u32,
}

// SAFETY: the mapping belongs to the value.
unsafe impl Send for Staging {}

impl Staging {
    /// Maps the areas; the caller registers [`Staging::span`].
    pub(crate) fn map(layout: Layout) -> Result<Self, Errno> {
        let areas = layout.batches() + SPARE;
        let len = area_len(layout.batch_pages()) * u64::from(areas);
        let base = sys::map_anonymous(to_usize(len), libc::PROT_READ | libc::PROT_WRITE, false)?;
        base.as_ptr().expose_provenance();
        let area_of = (0..layout.batches()).collect();
        Ok(Self { base, batch_pages: layout.batch_pages(), areas, area_of, fresh: layout.batches() })
    }

    /// Start and length of all areas together.
    pub(crate) fn span(&self) -> (u64, u64) {
        (to_u64(self.base.addr().get()), area_len(self.batch_pages) * u64::from(self.areas))
    }

    /// Starts of all areas.
    pub(crate) fn starts(&self) -> impl Iterator<Item = u64> + use<> {
        let (base, len) = (self.span().0, area_len(self.batch_pages));
        (0..self.areas).map(move |area| base + u64::from(area) * len)
    }

    /// The place of page `index` of a batch.
    pub(crate) fn place(&self, batch: u32, index: u32) -> u64 {
        let area = self.area_of.get(to_usize(batch.into())).copied().unwrap_or(0);
        self.span().0 + u64::from(area) * area_len(self.batch_pages) + u64::from(index) * PAGE
    }

    /// Memory of a place. Touch it only while a page is there.
    pub(crate) fn page(&self, batch: u32, index: u32) -> NonNull<u8> {
        let offset = to_usize(self.place(batch, index) - self.span().0);
        debug_assert!(offset + PAGE_SIZE <= to_usize(self.span().1));
        // SAFETY: places lie inside the mapping: batches and indices come from the layout that it was sized for.
        unsafe { self.base.add(offset) }
    }

    /// Frees the pages in the first `count` places of a batch. If that fails the area is given up, since what is left
    /// in it would be in the way of later pages.
    pub(crate) fn empty(&mut self, batch: u32, count: u32) {
        // SAFETY: the area is ours, and the bytes have been copied.
        let emptied =
            unsafe { sys::madvise(self.place(batch, 0), u64::from(count) * PAGE, libc::MADV_DONTNEED) };
        if emptied.is_err() {
            self.give_up(batch);
        }
    }

    /// Lets a batch use a fresh area and leaves the old one as it is, for good.
    pub(crate) fn give_up(&mut self, batch: u32) {
        if let Some(area) = self.area_of.get_mut(to_usize(batch.into()))
            && self.fresh < self.areas
        {
            *area = self.fresh;
            self.fresh += 1;
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let (_, len) = self.span();
        // SAFETY: the mapping is ours and nothing refers to it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), to_usize(len)) };
    }
}

fn area_len(batch_pages: u32) -> u64 {
    u64::from(batch_pages) * PAGE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_disjoint_and_a_given_up_area_is_not_used_again() {
        let mut staging = Staging::map(Layout::new(2, 8).unwrap()).unwrap();
        let (start, len) = staging.span();
        assert_eq!(staging.place(0, 0), start);
        assert_eq!(staging.place(1, 0), staging.place(0, 7) + PAGE);
        assert_eq!(len, 6 * 8 * PAGE);
        assert_eq!(staging.starts().count(), 6);
        for spare in 2..6 {
            staging.give_up(0);
            assert_eq!(staging.place(0, 0), start + spare * 8 * PAGE);
        }
        staging.give_up(0);
        assert_eq!(staging.place(0, 0), start + 5 * 8 * PAGE, "the last one stays when none is left");
    }
}
