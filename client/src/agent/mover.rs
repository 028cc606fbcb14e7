//! Takes pages out of regions with UFFDIO_MOVE. Kernels without it: see `remapper`.

use std::ptr;

use fmalloc_proto::limits::{PAGE, PAGE_SIZE};
use fmalloc_proto::ring::{Layout, PageResult, Ring};
use nix::errno::Errno;

use super::sight::{Sight, run_end};
use super::staging::Staging;
use crate::error::Error;
use crate::sys::{self, Coverage, FEATURE_MOVE, Uffd};

/// How often a page is tried that the kernel could not lock or that made progress towards being movable.
const TRIES: u32 = 8;

/// The staging area and the userfaultfd that it is registered with.
#[derive(Debug)]
pub(crate) struct Mover {
    uffd: Uffd,
    staging: Staging,
    /// A staging place of the batch was not empty.
    doubtful: bool,
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
        uffd.register(start, len, false).map_err(failed("registering the staging area"))?;
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
        Ok(Self { uffd, staging, doubtful: false })
    }

    /// Moves the pages of a batch out, as many as can be, and copies them into the ring.
    pub(super) fn evict(&mut self, sight: &Sight, ring: &Ring, batch: u32, count: u32) {
        self.doubtful = false;
        let mut any = false;
        let mut index = 0;
        while index < count {
            let end = run_end(ring, batch, index, count);
            any |= self.evict_run(sight, ring, batch, index, end - index);
            index = end;
        }
        if self.doubtful {
            // Bytes whose owner is not certain are never dropped.
            self.staging.give_up(batch);
        } else if any {
            self.staging.empty(batch, count);
        }
    }

    /// Moves the pages of one run. A run may cross mappings, which the kernel does not move in one go: then in halves.
    fn evict_run(&mut self, sight: &Sight, ring: &Ring, batch: u32, first: u32, pages: u32) -> bool {
        let (mut done, mut step, mut any) = (0, pages, false);
        while done < pages {
            let index = first + done;
            if ring.is_stopped(batch) {
                (index..first + pages).for_each(|index| ring.set_result(batch, index, PageResult::Failed));
                break;
            }
            let addr = ring.addr(batch, index);
            step = step.clamp(1, pages - done);
            match self.take_ours(sight, batch, index, addr, step) {
                Ok(moved) => {
                    for index in index..index + moved {
                        self.copy_out(ring, batch, index);
                        ring.set_result(batch, index, PageResult::Moved);
                    }
                    (done, step, any) = (done + moved, step.saturating_mul(2), true);
                }
                // Of the whole run, not of its first page.
                Err(Errno::EINVAL | Errno::ENOENT) if step > 1 => step /= 2,
                Err(errno) => {
                    let result = self.evict_page(sight, batch, index, addr, errno);
                    if result == PageResult::Moved {
                        self.copy_out(ring, batch, index);
                        any = true;
                    }
                    ring.set_result(batch, index, result);
                    done += 1;
                }
            }
        }
        any
    }

    /// What becomes of one page that could not be moved at once.
    fn evict_page(
        &mut self,
        sight: &Sight,
        batch: u32,
        index: u32,
        addr: u64,
        mut errno: Errno,
    ) -> PageResult {
        let mut made_exclusive = false;
        for _ in 0..TRIES {
            match errno {
                Errno::ENOENT => return PageResult::Absent,
                // Protected or locked; of an absent page the kernel says the same.
                Errno::EINVAL if sight.is_there(addr) == Some(false) => return PageResult::Absent,
                Errno::EINVAL => return PageResult::Refused,
                // Pinned, or shared since a fork: the latter can be helped. A page that is no longer there must not be
                // touched, since that would be a fault.
                Errno::EBUSY if sight.is_there(addr) == Some(false) => return PageResult::Absent,
                Errno::EBUSY if made_exclusive || !make_exclusive(sight, addr) => return PageResult::Busy,
                Errno::EBUSY => made_exclusive = true,
                Errno::EEXIST => return self.settle(sight, batch, index, addr),
                // An event waits to be read, and the daemon reads it when this batch is back: nothing has changed.
                Errno::EAGAIN if sight.uffd.coverage(addr, PAGE) == Coverage::Changing => {
                    return PageResult::Failed;
                }
                // Somebody else has the page locked.
                Errno::EAGAIN => std::thread::yield_now(),
                _ => return PageResult::Failed,
            }
            match self.take_ours(sight, batch, index, addr, 1) {
                Ok(_) => return PageResult::Moved,
                Err(next) => errno = next,
            }
        }
        PageResult::Busy
    }

    /// The staging place was not empty. Either the page is there already, or something is amiss: then both are left as
    /// they are.
    fn settle(&mut self, sight: &Sight, batch: u32, index: u32, addr: u64) -> PageResult {
        if sight.is_there(self.place(batch, index)) == Some(true) && sight.is_there(addr) == Some(false) {
            return PageResult::Moved;
        }
        self.doubtful = true;
        PageResult::Failed
    }

    /// Moves pages that belong to a region. ENOENT: not all of them do, or the first one is absent. EAGAIN: mappings
    /// are changing.
    fn take_ours(&self, sight: &Sight, batch: u32, index: u32, addr: u64, pages: u32) -> Result<u32, Errno> {
        match sight.uffd.coverage(addr, u64::from(pages) * PAGE) {
            Coverage::No => Err(Errno::ENOENT),
            Coverage::Changing => Err(Errno::EAGAIN),
            // SAFETY: the pages belong to a userfaultfd, as was just seen.
            Coverage::Whole => unsafe { self.take(batch, index, addr, pages) },
        }
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
}

/// Has the kernel make a page this process's own, which it may share with a child.
fn make_exclusive(sight: &Sight, addr: u64) -> bool {
    // SAFETY: populating changes no content; the page belongs to a region.
    sight.uffd.coverage(addr, PAGE) == Coverage::Whole
        && unsafe { sys::madvise(addr, PAGE, libc::MADV_POPULATE_WRITE) }.is_ok()
}
