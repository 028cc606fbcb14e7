//! What the agent can see of the memory of its process: which ranges belong to the daemon's userfaultfd, and which pages
//! are there.

use std::os::fd::{AsFd, OwnedFd};

use fmalloc_proto::limits::PAGE;
use fmalloc_proto::num::to_usize;
use fmalloc_proto::ring::Ring;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::uio::pread;

use crate::sys::Uffd;

/// Present, and swapped out by the kernel: either way the page has content here.
pub(super) const PAGEMAP_THERE: u64 = 0b11 << 62;

/// See the module.
#[derive(Debug)]
pub(crate) struct Sight {
    /// The userfaultfd that the daemon serves.
    pub(super) uffd: Uffd,
    pagemap: Option<OwnedFd>,
}

impl Sight {
    pub(super) fn new(uffd: Uffd) -> Self {
        // Not to be had in a process that made itself undumpable: then a few answers are less exact.
        let pagemap = open("/proc/self/pagemap", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).ok();
        Self { uffd, pagemap }
    }

    /// Whether a page is there; none where the kernel does not tell.
    pub(super) fn is_there(&self, addr: u64) -> Option<bool> {
        let mut entry = [0; 8];
        let offset = i64::try_from(addr / PAGE * 8).ok()?;
        let read = pread(self.pagemap.as_ref()?.as_fd(), &mut entry, offset).ok()?;
        (read == to_usize(8)).then(|| u64::from_ne_bytes(entry) & PAGEMAP_THERE != 0)
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
