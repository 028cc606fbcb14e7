//! Takes pages out of regions on kernels without UFFDIO_MOVE: protects them against writes, has their page table entries
//! moved to a staging area by mremap, which leaves the region's mapping as it is, and copies them from there.
//!
//! What the protection is for: pages whose content cannot change are the same before and after a discard by the program
//! that nobody can place in time, and they are recognised after the move, should the program have put something else at
//! their address in the last moment. It is no guard against the kernel: what DMA writes to a page that it had pinned
//! before is lost.
//!
//! The kernel tells the daemon of each move, as of any other mremap, and lets the agent wait until it has read that. So
//! this runs on a thread of its own (`aide`); the daemon knows the events by their target.
//!
//! Nothing here allocates, locks, logs, or touches memory of a region other than through the kernel, also not to read
//! it: a page may be gone, or have lost all access.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fmalloc_proto::limits::{MAX_BATCH_PAGES, PAGE, PAGE_SIZE};
use fmalloc_proto::num::{to_u64, to_usize};
use fmalloc_proto::ring::{Layout, PageResult, Ring};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use super::sight::{PAGEMAP_THERE, run_end};
use crate::error::Error;
use crate::sys::{self, Coverage, FEATURE_WRITE_PROTECT, Uffd};

/// Protected against writes by a userfaultfd (Linux 5.13).
const PAGEMAP_PROTECTED: u64 = 1 << 57;
/// Staging areas. One is in use; the next one is taken when somebody else has got hold of addresses of it.
const AREAS: u64 = 4;
/// Pages in the largest batch.
const MOST: usize = MAX_BATCH_PAGES as usize;
/// How often to look again at once, before sleeping in between.
const LOOKS: u32 = 100;
const NAP: Duration = Duration::from_micros(50);

/// See the module.
#[derive(Debug)]
pub(crate) struct Remapper {
    /// Start of all areas.
    base: u64,
    area_len: u64,
    /// The area in use, counted from 0; none is left at [`AREAS`].
    area: u64,
    /// Something is amiss with the area in use.
    spoilt: bool,
    memory: OwnedFd,
    pagemap: OwnedFd,
    /// Nobody reads events any more: wait for nothing.
    pub(super) quit: Arc<AtomicBool>,
}

/// A batch under way.
struct Batch<'a> {
    uffd: &'a Uffd,
    ring: &'a Ring,
    number: u32,
    count: u32,
    /// Pages that were protected and are, as far as is known, where they were.
    protected: [bool; MOST],
}

impl Remapper {
    /// Makes the staging areas, and tries on one of them whether the kernel has what is needed. `uffd` is a fresh one of
    /// this process, for that trial.
    ///
    /// # Errors
    /// [`Error::Unsupported`], or a failure of the system.
    pub(crate) fn new(uffd: &Uffd, layout: Layout) -> Result<Self, Error> {
        let failed = |what: &'static str| move |errno| Error::system(what, errno);
        let lacks = |what: &str| Error::Unsupported {
            what: format!("UFFDIO_MOVE (Linux 6.8), nor {what}, which would do as well"),
        };
        let file = |path: &str| open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
        let memory = file("/proc/self/mem").map_err(|_| lacks("reading /proc/self/mem"))?;
        let pagemap = file("/proc/self/pagemap").map_err(|_| lacks("reading /proc/self/pagemap"))?;
        let area_len = u64::from(layout.batch_pages()) * PAGE;
        let base = sys::map_anonymous(to_usize(area_len * AREAS), libc::PROT_READ | libc::PROT_WRITE, false)
            .map_err(failed("mapping the staging area"))?;
        let base = to_u64(base.as_ptr().expose_provenance());
        let this = Self { base, area_len, area: 0, spoilt: false, memory, pagemap, quit: Arc::default() };
        this.try_out(uffd).map_err(lacks)?;
        this.clear(AREAS * area_len).map_err(failed("preparing the staging area"))?;
        Ok(this)
    }

    /// Protects a page, moves it and looks at it, all in the staging area.
    fn try_out(&self, uffd: &Uffd) -> Result<(), &'static str> {
        const PROTECTION: &str = "write-protection by userfaultfd (Linux 5.13)";
        let (from, to) = (self.base, self.base + self.area_len);
        uffd.handshake(FEATURE_WRITE_PROTECT).map_err(|_| PROTECTION)?;
        let trial = uffd
            .register(from, PAGE, true)
            // SAFETY: the area is readable and holds nothing that matters.
            .and_then(|()| unsafe { uffd.copy(from, to) })
            .and_then(|()| uffd.write_protect(from, PAGE, true));
        trial.map_err(|_| PROTECTION)?;
        let mut entry = [0];
        self.entries(from, &mut entry);
        if entry[0] & PAGEMAP_PROTECTED == 0 {
            return Err(PROTECTION);
        }
        let unregistered = uffd.unregister(from, PAGE);
        // SAFETY: both pages are the area's.
        unregistered
            .and_then(|()| unsafe { sys::remap(from, PAGE, to, true) })
            .map_err(|_| "mremap that keeps what it moves from (Linux 5.7)")
    }

    /// Start and length of all addresses that pages are moved to.
    pub(crate) fn span(&self) -> (u64, u64) {
        (self.base, self.area_len * AREAS)
    }

    /// Evicts the pages of a batch, as many as can be.
    pub(super) fn evict(&mut self, uffd: &Uffd, ring: &Ring, number: u32, count: u32) {
        let mut batch = Batch { uffd, ring, number, count, protected: [false; MOST] };
        (0..count).for_each(|index| batch.set(index, PageResult::Failed));
        // The program changes its mappings: nothing is taken before the daemon knows how.
        let quiet = batch.protect();
        if quiet && self.area < AREAS && self.may_take(&batch) {
            self.take_all(&mut batch);
        }
        self.unprotect(&batch);
    }

    /// Waits until the daemon is not reading events. What it has read before then it has read when the batch's pages were
    /// protected, or else it has stopped the batch.
    fn may_take(&self, batch: &Batch<'_>) -> bool {
        let mut looks = 0;
        while batch.ring.is_gate_closed() {
            if !self.wait(&mut looks) {
                return false;
            }
        }
        !batch.is_stopped()
    }

    fn take_all(&mut self, batch: &mut Batch<'_>) {
        let (mut index, mut used) = (0, 0);
        while index < batch.count && !batch.is_stopped() {
            let end = run_end(batch.ring, batch.number, index, batch.count);
            let end = (index..end).find(|index| !batch.is_protected(*index)).unwrap_or(end);
            if end > index {
                used = end;
                if self.take_run(batch, index, end - index) == Err(Errno::EAGAIN) {
                    break;
                }
            }
            index = end.max(index + 1);
        }
        let len = u64::from(used) * PAGE;
        if len == 0 {
            return;
        }
        // Unregistered first, so that clearing raises no events. If that fails the daemon knows them all the same.
        let _ = batch.uffd.unregister(self.place(0), len);
        if self.spoilt || self.clear(len).is_err() {
            self.spoilt = false;
            self.area += 1;
        }
    }

    /// Takes the pages of one run. A run may cross mappings, which the kernel does not move in one go: then in halves.
    /// EAGAIN: mappings are changing.
    fn take_run(&mut self, batch: &mut Batch<'_>, first: u32, pages: u32) -> Result<(), Errno> {
        let (mut done, mut step) = (0, pages);
        while done < pages && !batch.is_stopped() && !self.spoilt {
            let index = first + done;
            step = step.clamp(1, pages - done);
            match self.take(batch, index, step) {
                Ok(()) => {
                    self.settle(batch, index, step);
                    (done, step) = (done + step, step.saturating_mul(2));
                }
                Err(Errno::EAGAIN) => return Err(Errno::EAGAIN),
                Err(_) if step > 1 => step /= 2,
                Err(errno) => {
                    batch.set(index, refusal(errno));
                    done += 1;
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, batch: &Batch<'_>, index: u32, pages: u32) -> Result<(), Errno> {
        let (addr, len) = (batch.addr(index), u64::from(pages) * PAGE);
        match batch.uffd.coverage(addr, len) {
            Coverage::No => return Err(Errno::ENOENT),
            Coverage::Changing => return Err(Errno::EAGAIN),
            Coverage::Whole => {}
        }
        // Refused for locked memory, which shall stay; else it only says what is true, that nobody needs the pages.
        // SAFETY: changes no content.
        unsafe { sys::madvise(addr, len, libc::MADV_COLD) }?;
        // SAFETY: the pages belong to a userfaultfd, as was just seen, which answers for what is gone; the place is ours.
        let moved = unsafe { sys::remap(addr, len, self.place(index), true) };
        if moved.is_err() {
            // The place may have been unmapped before it failed, and be somebody else's by now.
            // SAFETY: nothing is replaced.
            self.spoilt |= unsafe { sys::reserve(self.place(index), len, false) }.is_err();
        }
        moved
    }

    /// Copies what has come into the staging area, having made sure that it is what was protected.
    fn settle(&mut self, batch: &mut Batch<'_>, first: u32, pages: u32) {
        let mut entries = [0; MOST];
        let entries = entries.get_mut(..to_usize(pages.into())).unwrap_or_default();
        self.entries(self.place(first), entries);
        let mut index = first;
        for stretch in entries.chunk_by(|a, b| kind(*a) == kind(*b)) {
            let end = index + u32::try_from(stretch.len()).unwrap_or(0);
            let result = match stretch.first().copied().map_or(Kind::Absent, kind) {
                Kind::Ours => self.copy_out(batch, index, end - index),
                Kind::Absent => PageResult::Absent,
                Kind::Foreign => {
                    (index..end).for_each(|index| self.put_back(batch, index));
                    PageResult::Failed
                }
            };
            for index in index..end {
                batch.set(index, result);
                batch.unmark(index);
            }
            index = end;
        }
    }

    /// Copies pages from the staging area into the ring, by a call that minds neither missing pages nor missing access.
    fn copy_out(&mut self, batch: &Batch<'_>, first: u32, pages: u32) -> PageResult {
        let (to, from) = (batch.ring.page(batch.number, first), self.place(first));
        let (len, mut done) = (to_usize(pages.into()) * PAGE_SIZE, 0);
        for _ in 0..LOOKS {
            let Ok(offset) = i64::try_from(from + to_u64(done)) else { break };
            // SAFETY: the pages of a batch lie side by side in the ring, and nothing refers to them.
            let got = unsafe {
                libc::pread(self.memory.as_raw_fd(), to.as_ptr().add(done).cast(), len - done, offset)
            };
            done += usize::try_from(got).unwrap_or(0);
            if done == len {
                return PageResult::Moved;
            }
        }
        // Not to happen. The bytes stay where they are, and nobody gets wrong ones instead.
        self.spoilt = true;
        PageResult::Failed
    }

    /// Something else was at the address of a page: back with it, to where the program has it.
    fn put_back(&mut self, batch: &Batch<'_>, index: u32) {
        let (addr, place, mut looks) = (batch.addr(index), self.place(index), 0);
        loop {
            // SAFETY: there is a page at the place, readable as it was for the program; if it was not, the call fails.
            match unsafe { batch.uffd.copy(addr, place) } {
                Ok(()) | Err(Errno::EEXIST) => return,
                Err(Errno::EAGAIN) if self.wait(&mut looks) => {}
                Err(_) => break,
            }
        }
        // Memory that is not paged: the mapping as a whole.
        // SAFETY: it is put where it came from a moment ago, which is empty since.
        let back = unsafe { sys::remap(place, PAGE, addr, false) };
        // SAFETY: nothing is replaced.
        self.spoilt |= back.is_err() || unsafe { sys::reserve(place, PAGE, false) }.is_err();
    }

    /// Lets writes to what has stayed go on.
    fn unprotect(&self, batch: &Batch<'_>) {
        let mut index = 0;
        while index < batch.count {
            let end = run_end(batch.ring, batch.number, index, batch.count);
            let end = (index..end).find(|index| !batch.is_protected(*index)).unwrap_or(end);
            if end > index && self.unprotect_run(batch, index, end - index) == Err(Errno::ENOENT) {
                for index in index..end {
                    // What is no longer there the daemon unprotects when somebody writes to it.
                    let _ = self.unprotect_run(batch, index, 1);
                }
            }
            index = end.max(index + 1);
        }
    }

    fn unprotect_run(&self, batch: &Batch<'_>, first: u32, pages: u32) -> Result<(), Errno> {
        let mut looks = 0;
        loop {
            match batch.uffd.write_protect(batch.addr(first), u64::from(pages) * PAGE, false) {
                Err(Errno::EAGAIN) if self.wait(&mut looks) => {}
                other => return other,
            }
        }
    }

    /// Waits a little; gives false if there is nothing to be waited for any more.
    fn wait(&self, looks: &mut u32) -> bool {
        *looks += 1;
        if *looks < LOOKS {
            std::thread::yield_now();
        } else {
            std::thread::sleep(NAP);
        }
        !self.quit.load(Ordering::Relaxed)
    }

    fn place(&self, index: u32) -> u64 {
        self.base + self.area * self.area_len + u64::from(index) * PAGE
    }

    /// Makes the first `len` bytes of the area in use empty and untouchable.
    fn clear(&self, len: u64) -> Result<(), Errno> {
        // SAFETY: the area is ours: nothing was unmapped there that was not mapped again.
        unsafe { sys::reserve(self.place(0), len, true) }
    }

    /// What the kernel has from `addr` on; zeros, which stand for nothing, where it does not tell.
    fn entries(&self, addr: u64, entries: &mut [u64]) {
        let Ok(offset) = i64::try_from(addr / PAGE * 8) else { return };
        let (to, len) = (entries.as_mut_ptr().cast(), size_of_val(entries));
        // SAFETY: the slice is valid for its length, and any bytes are numbers.
        unsafe { libc::pread(self.pagemap.as_fd().as_raw_fd(), to, len, offset) };
    }
}

impl Drop for Remapper {
    fn drop(&mut self) {
        // Areas that were given up may belong to others in part.
        if self.area == 0 {
            let (start, len) = self.span();
            // SAFETY: the mapping is ours and nothing refers to it any more.
            unsafe { libc::munmap(sys::pointer(start), to_usize(len)) };
        }
    }
}

impl Batch<'_> {
    /// Protects all pages that belong to a region. False if mappings are changing.
    fn protect(&mut self) -> bool {
        let mut index = 0;
        while index < self.count {
            let end = run_end(self.ring, self.number, index, self.count);
            let mut step = end - index;
            while index < end {
                step = step.clamp(1, end - index);
                match self.uffd.write_protect(self.addr(index), u64::from(step) * PAGE, true) {
                    Ok(()) => {
                        let (from, to) = (to_usize(index.into()), to_usize((index + step).into()));
                        self.protected.get_mut(from..to).unwrap_or_default().fill(true);
                        (index, step) = (index + step, step.saturating_mul(2));
                    }
                    Err(Errno::EAGAIN) => return false,
                    Err(_) if step > 1 => step /= 2,
                    Err(errno) => {
                        self.set(index, refusal(errno));
                        index += 1;
                    }
                }
            }
        }
        true
    }

    fn addr(&self, index: u32) -> u64 {
        self.ring.addr(self.number, index)
    }

    fn set(&self, index: u32, result: PageResult) {
        self.ring.set_result(self.number, index, result);
    }

    fn is_stopped(&self) -> bool {
        self.ring.is_stopped(self.number)
    }

    fn is_protected(&self, index: u32) -> bool {
        self.protected.get(to_usize(index.into())).copied().unwrap_or(false)
    }

    fn unmark(&mut self, index: u32) {
        if let Some(protected) = self.protected.get_mut(to_usize(index.into())) {
            *protected = false;
        }
    }
}

/// What was found in a staging place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Ours,
    Absent,
    Foreign,
}

fn kind(entry: u64) -> Kind {
    match (entry & PAGEMAP_THERE != 0, entry & PAGEMAP_PROTECTED != 0) {
        (true, true) => Kind::Ours,
        (true, false) => Kind::Foreign,
        (false, _) => Kind::Absent,
    }
}

/// Why one page was not taken.
fn refusal(errno: Errno) -> PageResult {
    match errno {
        // Not, or no longer, memory of a region.
        Errno::ENOENT => PageResult::Absent,
        // Locked.
        Errno::EINVAL => PageResult::Refused,
        _ => PageResult::Failed,
    }
}

#[cfg(test)]
#[path = "remapper_tests.rs"]
mod tests;
