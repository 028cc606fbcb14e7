//! The memory of a client's I/O buffers: one mapping of whole pages, taken lazily, and a stretch of zeros to map from.

use std::num::NonZeroUsize;
use std::ptr::NonNull;

use fmalloc_proto::PAGE_SIZE;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::pager::page::Buffer;

/// Pages of zeros that one call can map.
pub const ZERO_PAGES: usize = 256;

/// Page-aligned buffers, as O_DIRECT wants them.
#[derive(Debug)]
pub struct Memory {
    base: NonNull<u8>,
    buffers: usize,
}

// SAFETY: the mapping belongs to the value; one fault thread uses it.
unsafe impl Send for Memory {}

impl Memory {
    /// Room for `buffers` buffers and the zeros behind them.
    ///
    /// # Errors
    /// What `mmap` says.
    pub fn new(buffers: usize) -> nix::Result<Self> {
        let len = NonZeroUsize::new((buffers + ZERO_PAGES) * PAGE_SIZE).ok_or(nix::Error::EINVAL)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe { mmap_anonymous(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags) }?;
        Ok(Self { base: base.cast(), buffers })
    }

    /// Start of a buffer; those behind it follow in memory.
    #[must_use]
    pub fn buffer(&self, buffer: Buffer) -> NonNull<u8> {
        assert!(usize::from(buffer) < self.buffers, "buffer outside the memory");
        // SAFETY: inside the mapping, as asserted.
        unsafe { self.base.add(usize::from(buffer) * PAGE_SIZE) }
    }

    /// The bytes of a buffer that no transfer in flight writes to.
    #[must_use]
    pub fn page(&self, buffer: Buffer) -> &[u8; PAGE_SIZE] {
        // SAFETY: the buffer is a whole page of the mapping; only this thread and I/O write to buffers, and callers look
        // at one only when its I/O has ended.
        unsafe { self.buffer(buffer).cast().as_ref() }
    }

    /// The bytes of a buffer, to be filled; it is the caller's for now, and no transfer uses it.
    pub fn page_mut(&mut self, buffer: Buffer) -> &mut [u8; PAGE_SIZE] {
        // SAFETY: a whole page of the mapping; the exclusive borrow makes this the only reference.
        unsafe { self.buffer(buffer).cast().as_mut() }
    }

    /// [`ZERO_PAGES`] pages that are never written to.
    #[must_use]
    pub fn zeros(&self) -> NonNull<u8> {
        // SAFETY: the zeros lie behind the buffers in the same mapping.
        unsafe { self.base.add(self.buffers * PAGE_SIZE) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours; transfers have ended before the fault thread drops it.
        let _ = unsafe { munmap(self.base.cast(), (self.buffers + ZERO_PAGES) * PAGE_SIZE) };
    }
}
