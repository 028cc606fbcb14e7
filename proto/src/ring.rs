//! The eviction ring: a sealed memfd made by the daemon, through which it asks a client's agent to move pages
//! out and gets their bytes. Offsets and plain old data only; either side may die at any instruction.
//!
//! ```text
//! 0            magic u64 | version u32 | batches u32 | batch_pages u32 | gate u32
//! 4096         batch descriptors, each `descriptor_len` bytes:
//!                state u32 | kind u32 | count u32 | stop u32 | entries: (addr u64, result u32, zero u32) × batch_pages
//! data_offset  pages: batch 0's batch_pages × 4096 bytes, then batch 1's …
//! ```
//!
//! A batch goes FREE → REQUESTED (daemon) → DONE (agent) → FREE (daemon, after the bytes are safe elsewhere). Each
//! side wakes the other by an eventfd. The daemon trusts nothing it reads here: it keeps the truth about each batch
//! in its own memory, takes only states and results that are possible, and copies bytes before it looks at them.
//!
//! `gate` and `stop` are the daemon's word to an agent that evicts by write-protection, whose remapping raises events
//! among those of the program: the gate is closed while the daemon reads events, and a batch is stopped when one of them
//! turned out to be the program's.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::limits::{MAX_BATCH_PAGES, MAX_BATCHES, PAGE_SIZE};
use crate::num::to_usize;

/// First word of the ring.
pub const RING_MAGIC: u64 = u64::from_le_bytes(*b"FMRING01");
const RING_VERSION: u32 = 1;
const HEADER: usize = PAGE_SIZE;
const BATCH_HEADER: usize = 16;
const ENTRY: usize = 16;

/// Nobody uses the batch.
pub const STATE_FREE: u32 = 0;
/// The agent is asked to work on it.
pub const STATE_REQUESTED: u32 = 1;
/// The agent has worked on it; results and bytes are in place.
pub const STATE_DONE: u32 = 2;

/// What a batch asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum BatchKind {
    /// Move the pages out and copy their bytes into the ring.
    Evict = 1,
    /// Say whether the pages are present; change nothing.
    Probe = 2,
    /// Take access to the pages away for good (where the kernel cannot poison).
    Protect = 3,
    /// Copy the bytes of the pages into the ring and leave the pages where they are.
    Copy = 4,
}

impl BatchKind {
    /// The kind with this number.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        [Self::Evict, Self::Probe, Self::Protect, Self::Copy].into_iter().find(|kind| *kind as u32 == number)
    }
}

/// What the agent found for one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum PageResult {
    /// Moved out; its bytes are in the ring.
    Moved = 1,
    /// Was not there.
    Absent = 2,
    /// Is there and cannot be moved now: pinned or shared.
    Busy = 3,
    /// Is there and cannot be moved: locked, or protected against writes or all access.
    Refused = 4,
    /// Probe: is there.
    Present = 5,
    /// Protect: done.
    Protected = 6,
    /// The agent could not do it; nothing has changed.
    Failed = 7,
    /// Copy: its bytes are in the ring.
    Copied = 8,
}

impl PageResult {
    /// The result with this number.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        use PageResult::{Absent, Busy, Copied, Failed, Moved, Present, Protected, Refused};
        [Moved, Absent, Busy, Refused, Present, Protected, Failed, Copied]
            .into_iter()
            .find(|result| *result as u32 == number)
    }
}

/// The size of a ring and where its parts are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    batches: u32,
    batch_pages: u32,
}

impl Layout {
    /// A ring of `batches` × `batch_pages` pages; none if either is zero or over its limit.
    #[must_use]
    pub fn new(batches: u32, batch_pages: u32) -> Option<Self> {
        let fits = (1..=MAX_BATCHES).contains(&batches) && (1..=MAX_BATCH_PAGES).contains(&batch_pages);
        fits.then_some(Self { batches, batch_pages })
    }

    /// Batches.
    #[must_use]
    pub fn batches(self) -> u32 {
        self.batches
    }

    /// Pages in a batch.
    #[must_use]
    pub fn batch_pages(self) -> u32 {
        self.batch_pages
    }

    fn descriptor_len(self) -> usize {
        BATCH_HEADER + ENTRY * to_usize(self.batch_pages.into())
    }

    fn data_offset(self) -> usize {
        (HEADER + self.descriptor_len() * to_usize(self.batches.into())).next_multiple_of(PAGE_SIZE)
    }

    /// Length of the memfd in bytes.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a ring is never empty")]
    pub fn len(self) -> usize {
        self.data_offset() + to_usize(u64::from(self.batches) * u64::from(self.batch_pages)) * PAGE_SIZE
    }
}

/// A mapped ring. Safe to share between threads: every field is an atomic, pages are raw memory.
#[derive(Debug)]
pub struct Ring {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the mapping belongs to the value and is only reached through atomics and raw page pointers.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

impl Ring {
    /// Maps the memfd `fd`, which must have at least [`Layout::len`] bytes and be sealed against shrinking.
    ///
    /// # Errors
    /// The error of `mmap`.
    pub fn map(fd: BorrowedFd<'_>, layout: Layout) -> io::Result<Self> {
        let len = NonZeroUsize::new(layout.len()).ok_or(io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED, fd, 0) }?;
        Ok(Self { base: base.cast(), layout })
    }

    /// Writes the header (daemon, once, before the ring is handed out).
    pub fn initialise(&self) {
        self.word64(0).store(RING_MAGIC, Ordering::Relaxed);
        self.word(8).store(RING_VERSION, Ordering::Relaxed);
        self.word(12).store(self.layout.batches, Ordering::Relaxed);
        self.word(16).store(self.layout.batch_pages, Ordering::Release);
    }

    /// Whether the header is that of this version and layout (client).
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.word64(0).load(Ordering::Acquire) == RING_MAGIC
            && self.word(8).load(Ordering::Relaxed) == RING_VERSION
            && self.word(12).load(Ordering::Relaxed) == self.layout.batches
            && self.word(16).load(Ordering::Relaxed) == self.layout.batch_pages
    }

    /// The layout.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// State word of a batch, with acquire ordering.
    #[must_use]
    pub fn state(&self, batch: u32) -> u32 {
        self.word(self.batch_offset(batch)).load(Ordering::Acquire)
    }

    /// Publishes the state of a batch, with release ordering.
    pub fn set_state(&self, batch: u32, state: u32) {
        self.word(self.batch_offset(batch)).store(state, Ordering::Release);
    }

    /// Kind and number of pages that are asked for, as found: check both.
    #[must_use]
    pub fn request(&self, batch: u32) -> (u32, u32) {
        let offset = self.batch_offset(batch);
        (self.word(offset + 4).load(Ordering::Relaxed), self.word(offset + 8).load(Ordering::Relaxed))
    }

    /// Sets kind and number of pages, and that the batch is not stopped; publish with [`Ring::set_state`].
    pub fn set_request(&self, batch: u32, kind: BatchKind, count: u32) {
        let offset = self.batch_offset(batch);
        self.word(offset + 12).store(0, Ordering::Relaxed);
        self.word(offset + 4).store(kind as u32, Ordering::Relaxed);
        self.word(offset + 8).store(count, Ordering::Relaxed);
    }

    /// Asks the agent to leave the pages of a batch where they are, as far as they are still there.
    pub fn stop(&self, batch: u32) {
        self.word(self.batch_offset(batch) + 12).store(1, Ordering::Release);
    }

    /// Whether a batch is stopped. Sees everything that was stopped before the gate was opened last.
    #[must_use]
    pub fn is_stopped(&self, batch: u32) -> bool {
        self.word(self.batch_offset(batch) + 12).load(Ordering::Acquire) != 0
    }

    /// Closes or opens the gate. What an agent did before it saw the gate open happened before it was closed.
    pub fn set_gate(&self, closed: bool) {
        self.word(20).store(closed.into(), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Whether the gate is closed.
    #[must_use]
    pub fn is_gate_closed(&self) -> bool {
        fence(Ordering::SeqCst);
        self.word(20).load(Ordering::SeqCst) != 0
    }

    /// Address of page `index` of a batch.
    #[must_use]
    pub fn addr(&self, batch: u32, index: u32) -> u64 {
        self.word64(self.entry_offset(batch, index)).load(Ordering::Relaxed)
    }

    /// Sets the address of page `index` and clears its result.
    pub fn set_addr(&self, batch: u32, index: u32, addr: u64) {
        let offset = self.entry_offset(batch, index);
        self.word64(offset).store(addr, Ordering::Relaxed);
        self.word(offset + 8).store(0, Ordering::Relaxed);
    }

    /// Result word of page `index`, as found: see [`PageResult::from_number`].
    #[must_use]
    pub fn result(&self, batch: u32, index: u32) -> u32 {
        self.word(self.entry_offset(batch, index) + 8).load(Ordering::Relaxed)
    }

    /// Sets the result of page `index`; publish with [`Ring::set_state`].
    pub fn set_result(&self, batch: u32, index: u32, result: PageResult) {
        self.word(self.entry_offset(batch, index) + 8).store(result as u32, Ordering::Relaxed);
    }

    /// Memory of page `index` of a batch, 4096 bytes. The other process may write to it at any time: copy from it with
    /// `ptr::copy_nonoverlapping`, never make a reference.
    #[must_use]
    pub fn page(&self, batch: u32, index: u32) -> NonNull<u8> {
        debug_assert!(batch < self.layout.batches && index < self.layout.batch_pages);
        let number = u64::from(batch) * u64::from(self.layout.batch_pages) + u64::from(index);
        let offset = self.layout.data_offset() + to_usize(number) * PAGE_SIZE;
        assert!(offset + PAGE_SIZE <= self.layout.len(), "page outside the ring");
        // SAFETY: the offset lies inside the mapping, as asserted.
        unsafe { self.base.add(offset) }
    }

    fn batch_offset(&self, batch: u32) -> usize {
        assert!(batch < self.layout.batches, "batch outside the ring");
        HEADER + self.layout.descriptor_len() * to_usize(batch.into())
    }

    fn entry_offset(&self, batch: u32, index: u32) -> usize {
        assert!(index < self.layout.batch_pages, "entry outside the batch");
        self.batch_offset(batch) + BATCH_HEADER + ENTRY * to_usize(index.into())
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset.is_multiple_of(4) && offset + 4 <= self.layout.data_offset());
        // SAFETY: callers compute offsets of fields inside the mapping, aligned by the layout; atomics may be shared
        // with another process.
        unsafe { AtomicU32::from_ptr(self.base.add(offset).as_ptr().cast()) }
    }

    fn word64(&self, offset: usize) -> &AtomicU64 {
        debug_assert!(offset.is_multiple_of(8) && offset + 8 <= self.layout.data_offset());
        // SAFETY: as in `word`.
        unsafe { AtomicU64::from_ptr(self.base.add(offset).as_ptr().cast()) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no reference into it outlives the value.
        let _ = unsafe { munmap(self.base.cast(), self.layout.len()) };
    }
}

/// Length that a ring's memfd must have, checked against the file itself.
///
/// # Errors
/// The error of `fstat`.
pub fn has_len(fd: BorrowedFd<'_>, layout: Layout) -> io::Result<bool> {
    let stat = nix::sys::stat::fstat(fd)?;
    Ok(usize::try_from(stat.st_size).is_ok_and(|size| size >= layout.len()))
}
