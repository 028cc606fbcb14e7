//! Serves one batch of the ring: moves pages out of regions, looks whether pages are there, or takes access away.
//! Nothing here allocates, locks, logs, or touches memory of a region other than through the kernel.
//!
//! What the agent is asked to do may be out of date: the application may have unmapped a part of a region and mapped
//! something else there since. So each step first makes sure that the range belongs to a userfaultfd.

use std::os::fd::{AsFd, OwnedFd};

use fmalloc_proto::limits::{PAGE, PAGE_SIZE};
use fmalloc_proto::num::to_usize;
use fmalloc_proto::ring::{BatchKind, PageResult, Ring, STATE_DONE, STATE_REQUESTED};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::uio::pread;

use super::mover::Mover;
use crate::sys::{self, Coverage, Uffd};

/// How often a page is tried that the kernel could not lock or that made progress towards being movable.
const TRIES: u32 = 8;
/// Present, and swapped out by the kernel: either way the page has content here.
const PAGEMAP_THERE: u64 = 0b11 << 62;

/// The part of the agent that works on the ring.
#[derive(Debug)]
pub(crate) struct Evictor {
    ring: Ring,
    mover: Mover,
    /// The userfaultfd that the daemon serves. Held for as long as a region exists, whatever happens: without it
    /// faults would be answered with zeros when the daemon is gone.
    uffd: Uffd,
    pagemap: Option<OwnedFd>,
    doubtful: bool,
}

impl Evictor {
    pub(crate) fn new(ring: Ring, mover: Mover, uffd: Uffd) -> Self {
        // Not to be had in a process that made itself undumpable: then a few answers are less exact.
        let pagemap = open("/proc/self/pagemap", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).ok();
        Self { ring, mover, uffd, pagemap, doubtful: false }
    }

    /// Batches in the ring.
    pub(crate) fn batches(&self) -> u32 {
        self.ring.layout().batches()
    }

    /// Works on a batch if it is asked for; says whether it was.
    pub(crate) fn serve(&mut self, batch: u32) -> bool {
        let asked = self.ring.state(batch) == STATE_REQUESTED;
        if asked {
            self.work(batch);
            self.ring.set_state(batch, STATE_DONE);
        }
        asked
    }

    fn work(&mut self, batch: u32) {
        let (kind, count) = self.ring.request(batch);
        let count = count.min(self.ring.layout().batch_pages());
        match BatchKind::from_number(kind) {
            Some(BatchKind::Evict) => self.evict(batch, count),
            Some(BatchKind::Probe) => {
                pass_address_space();
                self.each(batch, count, |this, addr| match this.is_there(addr) {
                    Some(true) => PageResult::Present,
                    Some(false) => PageResult::Absent,
                    None => PageResult::Failed,
                });
            }
            Some(BatchKind::Protect) => self.each(batch, count, Self::protect),
            None => self.each(batch, count, |_, _| PageResult::Failed),
        }
    }

    fn each(&mut self, batch: u32, count: u32, work: impl Fn(&mut Self, u64) -> PageResult) {
        for index in 0..count {
            let result = work(self, self.ring.addr(batch, index));
            self.ring.set_result(batch, index, result);
        }
    }

    fn evict(&mut self, batch: u32, count: u32) {
        self.doubtful = false;
        let mut any = false;
        let mut index = 0;
        while index < count {
            let addr = self.ring.addr(batch, index);
            let follows = |next: &u32| {
                let expected =
                    u64::from(next - index).checked_mul(PAGE).and_then(|ahead| addr.checked_add(ahead));
                Some(self.ring.addr(batch, *next)) == expected
            };
            let end = (index + 1..count).take_while(follows).last().map_or(index + 1, |last| last + 1);
            any |= self.evict_run(batch, index, addr, end - index);
            index = end;
        }
        if any || self.doubtful {
            self.mover.finish(batch, count, self.doubtful);
        }
    }

    /// Moves the pages of one run. A run may cross mappings, which the kernel does not move in one go: then in halves.
    fn evict_run(&mut self, batch: u32, first: u32, addr: u64, pages: u32) -> bool {
        let (mut done, mut step, mut any) = (0, pages, false);
        while done < pages {
            let (index, addr) = (first + done, addr + u64::from(done) * PAGE);
            step = step.clamp(1, pages - done);
            match self.take(batch, index, addr, step) {
                Ok(moved) => {
                    for index in index..index + moved {
                        self.mover.copy_out(&self.ring, batch, index);
                        self.ring.set_result(batch, index, PageResult::Moved);
                    }
                    (done, step, any) = (done + moved, step.saturating_mul(2), true);
                }
                // Of the whole run, not of its first page.
                Err(Errno::EINVAL | Errno::ENOENT) if step > 1 => step /= 2,
                Err(errno) => {
                    let result = self.evict_page(batch, index, addr, errno);
                    if result == PageResult::Moved {
                        self.mover.copy_out(&self.ring, batch, index);
                        any = true;
                    }
                    self.ring.set_result(batch, index, result);
                    done += 1;
                }
            }
        }
        any
    }

    /// What becomes of one page that could not be moved at once.
    fn evict_page(&mut self, batch: u32, index: u32, addr: u64, mut errno: Errno) -> PageResult {
        let mut made_exclusive = false;
        for _ in 0..TRIES {
            match errno {
                Errno::ENOENT => return PageResult::Absent,
                // Protected or locked; of an absent page the kernel says the same.
                Errno::EINVAL if self.is_there(addr) == Some(false) => return PageResult::Absent,
                Errno::EINVAL => return PageResult::Refused,
                // Pinned, or shared since a fork: the latter can be helped. A page that is no longer there must not be
                // touched, since that would be a fault.
                Errno::EBUSY if self.is_there(addr) == Some(false) => return PageResult::Absent,
                Errno::EBUSY if made_exclusive || !self.make_exclusive(addr) => return PageResult::Busy,
                Errno::EBUSY => made_exclusive = true,
                Errno::EEXIST => return self.settle(batch, index, addr),
                // An event waits to be read, and the daemon reads it when this batch is back: nothing has changed.
                Errno::EAGAIN if self.uffd.coverage(addr, PAGE) == Coverage::Changing => return PageResult::Failed,
                // Somebody else has the page locked.
                Errno::EAGAIN => std::thread::yield_now(),
                _ => return PageResult::Failed,
            }
            match self.take(batch, index, addr, 1) {
                Ok(_) => return PageResult::Moved,
                Err(next) => errno = next,
            }
        }
        PageResult::Busy
    }

    /// The staging place was not empty. Either the page is there already, or something is amiss: then both are left as
    /// they are.
    fn settle(&mut self, batch: u32, index: u32, addr: u64) -> PageResult {
        if self.is_there(self.mover.place(batch, index)) == Some(true) && self.is_there(addr) == Some(false) {
            return PageResult::Moved;
        }
        self.doubtful = true;
        PageResult::Failed
    }

    /// Moves pages that belong to a region. ENOENT: not all of them do, or the first one is absent. EAGAIN: mappings
    /// are changing.
    fn take(&mut self, batch: u32, index: u32, addr: u64, pages: u32) -> Result<u32, Errno> {
        match self.uffd.coverage(addr, u64::from(pages) * PAGE) {
            Coverage::No => Err(Errno::ENOENT),
            Coverage::Changing => Err(Errno::EAGAIN),
            // SAFETY: the pages belong to a userfaultfd, as was just seen.
            Coverage::Whole => unsafe { self.mover.take(batch, index, addr, pages) },
        }
    }

    /// Takes all access to a page away: what it held is lost, and an access must not read anything else.
    fn protect(&mut self, addr: u64) -> PageResult {
        if self.uffd.coverage(addr, PAGE) != Coverage::Whole {
            return PageResult::Failed;
        }
        // SAFETY: changes no content; the page belongs to a region.
        let outcome = unsafe { libc::mprotect(sys::pointer(addr), PAGE_SIZE, libc::PROT_NONE) };
        if outcome == 0 { PageResult::Protected } else { PageResult::Failed }
    }

    fn make_exclusive(&mut self, addr: u64) -> bool {
        // SAFETY: populating changes no content; the page belongs to a region.
        self.uffd.coverage(addr, PAGE) == Coverage::Whole
            && unsafe { sys::madvise(addr, PAGE, libc::MADV_POPULATE_WRITE) }.is_ok()
    }

    /// Whether a page is there; none where the kernel does not tell.
    fn is_there(&self, addr: u64) -> Option<bool> {
        let mut entry = [0; 8];
        let offset = i64::try_from(addr / PAGE * 8).ok()?;
        let read = pread(self.pagemap.as_ref()?.as_fd(), &mut entry, offset).ok()?;
        (read == to_usize(8)).then(|| u64::from_ne_bytes(entry) & PAGEMAP_THERE != 0)
    }
}

/// Waits until every discard that is under way in this address space has ended: it holds the space's lock for reading,
/// and this call takes it for writing. Asks for the end of the heap, and changes nothing.
fn pass_address_space() {
    // SAFETY: an address of zero cannot be the heap's end, so the kernel only says where that is.
    unsafe { libc::syscall(libc::SYS_brk, 0) };
}

#[cfg(test)]
#[path = "evict_tests.rs"]
mod tests;
