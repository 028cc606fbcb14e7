//! What the agent can see of the memory of its process: which ranges belong to the daemon's userfaultfd, and which pages
//! are there.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use fmalloc_proto::limits::PAGE;
use fmalloc_proto::num::to_usize;
use fmalloc_proto::ring::{PageResult, Ring};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::uio::pread;

use crate::sys::{Coverage, Uffd};

/// Present, and swapped out by the kernel: either way the page has content here.
pub(super) const PAGEMAP_THERE: u64 = 0b11 << 62;

/// See the module.
#[derive(Debug)]
pub(crate) struct Sight {
    /// The userfaultfd that the daemon serves.
    pub(super) uffd: Uffd,
    pagemap: Option<OwnedFd>,
    memory: Option<OwnedFd>,
}

impl Sight {
    pub(super) fn new(uffd: Uffd) -> Self {
        // Not to be had in a process that made itself undumpable: then a few answers are less exact.
        let file = |path: &str| open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).ok();
        Self { uffd, pagemap: file("/proc/self/pagemap"), memory: file("/proc/self/mem") }
    }

    /// Whether a page is there; none where the kernel does not tell.
    pub(super) fn is_there(&self, addr: u64) -> Option<bool> {
        let mut entry = [0; 8];
        let offset = i64::try_from(addr / PAGE * 8).ok()?;
        let read = pread(self.pagemap.as_ref()?.as_fd(), &mut entry, offset).ok()?;
        (read == to_usize(8)).then(|| u64::from_ne_bytes(entry) & PAGEMAP_THERE != 0)
    }
}

impl Sight {
    /// Copies pages from `addr` on to their places in the ring as they are at this moment; by a call that fails where a page
    /// is not there, instead of waiting for it. Gives how many it copied, and what about the next one if not all.
    pub(super) fn copy(
        &self,
        ring: &Ring,
        batch: u32,
        index: u32,
        addr: u64,
        pages: u32,
    ) -> (u32, Option<PageResult>) {
        let Some(memory) = &self.memory else { return (0, Some(PageResult::Failed)) };
        let len = u64::from(pages) * PAGE;
        if self.uffd.coverage(addr, len) != Coverage::Whole {
            // One page is in one mapping: then mappings are changing, and the daemon will know when it asks again.
            return (0, Some(PageResult::Busy));
        }
        let Ok(offset) = i64::try_from(addr) else { return (0, Some(PageResult::Failed)) };
        let place = ring.page(batch, index).as_ptr().cast();
        // SAFETY: the pages of a batch lie side by side in the ring, and nothing refers to them.
        let got = unsafe { libc::pread(memory.as_raw_fd(), place, to_usize(len), offset) };
        // Whatever was mapped there in the meantime is not the region's: no event is read while this goes on.
        if self.uffd.coverage(addr, len) != Coverage::Whole {
            return (0, Some(PageResult::Busy));
        }
        let whole = u32::try_from(u64::try_from(got).unwrap_or(0) / PAGE).unwrap_or(0);
        (whole, (whole < pages).then_some(PageResult::Absent))
    }
}

/// The end of the run of neighbouring pages that starts at `index` of a batch.
pub(super) fn run_end(ring: &Ring, batch: u32, index: u32, count: u32) -> u32 {
    let addr = ring.addr(batch, index);
    let follows = |next: &u32| {
        let expected = u64::from(next - index).checked_mul(PAGE).and_then(|ahead| addr.checked_add(ahead));
        Some(ring.addr(batch, *next)) == expected
    };
    (index + 1..count).take_while(follows).last().map_or(index + 1, |last| last + 1)
}
