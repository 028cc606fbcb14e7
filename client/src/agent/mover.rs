//! Takes pages out of regions with UFFDIO_MOVE: the only part of the agent that knows how it is done. A kernel without
//! it needs another mover behind the same three functions.

use std::ptr;

use fmalloc_proto::limits::{PAGE, PAGE_SIZE};
use fmalloc_proto::ring::{Layout, Ring};
use nix::errno::Errno;

use super::staging::Staging;
use crate::error::Error;
use crate::sys::{self, FEATURE_MOVE, Uffd};

/// The staging area and the userfaultfd that it is registered with.
#[derive(Debug)]
pub(crate) struct Mover {
    uffd: Uffd,
    staging: Staging,
}

impl Mover {
    /// Makes the staging area, with its page tables. `uffd` is a fresh one of this process; it never leaves the agent.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel cannot move pages, or a failure of the system.
    pub(crate) fn new(uffd: Uffd, layout: Layout) -> Result<Self, Error> {
        let failed = |what: &'static str| move |errno| Error::system(what, errno);
        let features = uffd.handshake(0).map_err(failed("the userfaultfd handshake of the staging area"))?;
        if features & FEATURE_MOVE == 0 {
            return Err(Error::Unsupported { what: "UFFDIO_MOVE, which needs Linux 6.8".to_owned() });
        }
        let staging = Staging::map(layout).map_err(failed("mapping the staging area"))?;
        let (start, len) = staging.span();
        uffd.register(start, len).map_err(failed("registering the staging area"))?;
        // A page that comes and goes leaves the page table behind; later that memory might be hard to get.
        for area in staging.starts() {
            uffd.map_zeros(area, PAGE).map_err(failed("preparing the staging area"))?;
        }
        for area in staging.starts() {
            // SAFETY: the staging area is ours and holds nothing yet. A single page: emptying a whole page table could
            // free it.
            unsafe { sys::madvise(area, PAGE, libc::MADV_DONTNEED) }
                .map_err(failed("preparing the staging area"))?;
        }
        Ok(Self { uffd, staging })
    }

    /// Moves the pages from `addr` on into the places of a batch from `index` on. Gives how many have moved, one at
    /// least: the one after them, if any, has an error that the next call tells.
    ///
    /// # Safety
    /// The pages must belong to a region of this process.
    pub(super) unsafe fn take(&self, batch: u32, index: u32, addr: u64, pages: u32) -> Result<u32, Errno> {
        let len = u64::from(pages) * PAGE;
        // SAFETY: the places are ours; the caller answers for the source.
        let moved = unsafe { self.uffd.move_pages(self.staging.place(batch, index), addr, len) }?;
        u32::try_from(moved / PAGE).map_err(|_| Errno::EOVERFLOW)
    }

    /// The place where page `index` of a batch lands.
    pub(super) fn place(&self, batch: u32, index: u32) -> u64 {
        self.staging.place(batch, index)
    }

    /// Copies a page that was taken into its page of the ring.
    pub(super) fn copy_out(&self, ring: &Ring, batch: u32, index: u32) {
        let (from, to) = (self.staging.page(batch, index), ring.page(batch, index));
        // SAFETY: both are a whole page; the source is present and nobody else's, and nothing refers to the target.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), PAGE_SIZE) };
    }

    /// Puts something in a place, as only a mistake could.
    #[cfg(test)]
    pub(super) fn occupy(&self, batch: u32, index: u32) {
        self.uffd.map_zeros(self.staging.place(batch, index), PAGE).unwrap();
    }

    /// Frees what a batch of `count` pages has left behind, or keeps it for good where `doubtful`: bytes whose owner is
    /// not certain are never dropped.
    pub(super) fn finish(&mut self, batch: u32, count: u32, doubtful: bool) {
        if doubtful {
            self.staging.give_up(batch);
        } else {
            self.staging.empty(batch, count);
        }
    }
}
