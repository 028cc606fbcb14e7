//! Serves one batch of the ring: has pages moved or copied out of regions, looks whether pages are there, or takes access
//! away.
//! Nothing here allocates, locks, logs, or touches memory of a region other than through the kernel.
//!
//! What the agent is asked to do may be out of date: the application may have unmapped a part of a region and mapped
//! something else there since. So each step first makes sure that the range belongs to a userfaultfd.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use fmalloc_proto::limits::{PAGE, PAGE_SIZE};
use fmalloc_proto::ring::{BatchKind, PageResult, Ring, STATE_DONE, STATE_REQUESTED};
use nix::unistd::{read, write};

use super::mover::Mover;
use super::remapper::Remapper;
use super::sight::{Sight, run_end};
use crate::sys::{self, Coverage, Uffd};

/// How pages leave a region.
#[derive(Debug)]
pub(crate) enum Method {
    /// UFFDIO_MOVE.
    Move(Mover),
    /// Write-protection and mremap.
    Remap(Remapper),
}

/// The part of the agent that works on the ring.
#[derive(Debug)]
pub(crate) struct Evictor {
    ring: Ring,
    pub(super) method: Method,
    /// With the userfaultfd that the daemon serves. Held for as long as a region exists, whatever happens: without it
    /// faults would be answered with zeros when the daemon is gone.
    sight: Sight,
}

impl Evictor {
    pub(crate) fn new(ring: Ring, method: Method, uffd: Uffd) -> Self {
        Self { ring, method, sight: Sight::new(uffd) }
    }

    /// Set it to have an eviction end that waits for the daemon, as far as that is possible.
    pub(super) fn quit_flag(&self) -> Arc<AtomicBool> {
        match &self.method {
            Method::Move(_) => Arc::default(),
            Method::Remap(remapper) => Arc::clone(&remapper.quit),
        }
    }

    /// Works on all batches that are asked for, after `bell` has rung.
    pub(super) fn serve_all(&mut self, bell: &OwnedFd, daemon_bell: &OwnedFd) {
        let mut count = [0; 8];
        let _ = read(bell, &mut count);
        for batch in 0..self.ring.layout().batches() {
            if self.serve(batch) {
                let _ = write(daemon_bell, &1_u64.to_ne_bytes());
            }
        }
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
            Some(BatchKind::Evict) => match &mut self.method {
                Method::Move(mover) => mover.evict(&self.sight, &self.ring, batch, count),
                Method::Remap(remapper) => remapper.evict(&self.sight.uffd, &self.ring, batch, count),
            },
            Some(BatchKind::Probe) => {
                pass_address_space();
                self.each(batch, count, |this, addr| match this.sight.is_there(addr) {
                    Some(true) => PageResult::Present,
                    Some(false) => PageResult::Absent,
                    None => PageResult::Failed,
                });
            }
            Some(BatchKind::Copy) => self.copy(batch, count),
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

    /// Copies the pages of a batch, as many as are there, run by run. A run may cross mappings: then page by page.
    fn copy(&self, batch: u32, count: u32) {
        let mut index = 0;
        while index < count {
            let mut pages = run_end(&self.ring, batch, index, count) - index;
            while pages > 0 {
                let addr = self.ring.addr(batch, index);
                let (done, why) = match self.sight.copy(&self.ring, batch, index, addr, pages) {
                    (0, Some(PageResult::Busy)) if pages > 1 => {
                        self.sight.copy(&self.ring, batch, index, addr, 1)
                    }
                    other => other,
                };
                for copied in index..index + done {
                    self.ring.set_result(batch, copied, PageResult::Copied);
                }
                (index, pages) = (index + done, pages - done);
                if let Some(why) = why {
                    self.ring.set_result(batch, index, why);
                    (index, pages) = (index + 1, pages - 1);
                }
            }
        }
    }

    /// Takes all access to a page away: what it held is lost, and an access must not read anything else.
    fn protect(&mut self, addr: u64) -> PageResult {
        if self.sight.uffd.coverage(addr, PAGE) != Coverage::Whole {
            return PageResult::Failed;
        }
        // SAFETY: changes no content; the page belongs to a region.
        let outcome = unsafe { libc::mprotect(sys::pointer(addr), PAGE_SIZE, libc::PROT_NONE) };
        if outcome == 0 { PageResult::Protected } else { PageResult::Failed }
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
pub(super) mod tests;
