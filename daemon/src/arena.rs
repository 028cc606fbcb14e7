//! The arena: a memfd that holds what would be data if it were lost, one per client. Plain old data and offsets, no
//! pointers, so that it can be mapped elsewhere by a later daemon: the page tables and the warm pool.
//!
//! ```text
//! 0      magic u64 | version u32 | zero u32 | next free byte u64
//! 4096   blocks, each a multiple of 4096 bytes: page-table directories and chunks (see `pager::table`), segments of
//!        the warm pool (see `pager::warm`)
//! ```
//!
//! The file is sparse and as long as it may ever get; memory is taken by touching it. Freed blocks are zeroed and
//! used again for blocks of the same size. Used by one fault thread.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use fmalloc_proto::num::to_usize;
use fmalloc_proto::{PAGE, PAGE_SIZE};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::ftruncate;

/// First word of an arena.
pub const ARENA_MAGIC: u64 = u64::from_le_bytes(*b"FMARENA1");
const VERSION: u64 = 1;
/// Length of the file: tables for 16 TiB of memory in use, and address space only.
const LEN: usize = 1 << 36;

/// A client's arena.
#[derive(Debug)]
pub struct Arena {
    base: NonNull<u8>,
    file: OwnedFd,
    next: u64,
    free: BTreeMap<u64, Vec<u64>>,
    free_bytes: u64,
}

// SAFETY: the mapping belongs to the value; it is moved to its fault thread and used by that alone.
unsafe impl Send for Arena {}

impl Arena {
    /// An empty arena.
    ///
    /// # Errors
    /// What `memfd_create`, `ftruncate` or `mmap` say.
    pub fn new() -> nix::Result<Self> {
        let file = memfd_create(c"fmalloc-arena", MFdFlags::MFD_CLOEXEC)?;
        let len = NonZeroUsize::new(LEN).ok_or(nix::Error::EINVAL)?;
        ftruncate(&file, i64::try_from(LEN).map_err(|_| nix::Error::EINVAL)?)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe { mmap(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags, &file, 0) }?;
        let mut arena = Self { base: base.cast(), file, next: PAGE, free: BTreeMap::new(), free_bytes: 0 };
        *arena.word_mut(0) = ARENA_MAGIC;
        *arena.word_mut(8) = VERSION;
        *arena.word_mut(16) = PAGE;
        Ok(arena)
    }

    /// The file, for whoever keeps it when the daemon goes.
    #[must_use]
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Takes a zeroed block of `len` bytes, rounded up to pages, and gives its offset, which is never zero. None if the
    /// arena is full.
    pub fn alloc(&mut self, len: u64) -> Option<u64> {
        let len = len.next_multiple_of(PAGE);
        if let Some(offset) = self.free.get_mut(&len).and_then(Vec::pop) {
            self.free_bytes -= len;
            return Some(offset);
        }
        let offset = self.next;
        self.next = offset.checked_add(len).filter(|end| to_usize(*end) <= LEN)?;
        *self.word_mut(16) = self.next;
        Some(offset)
    }

    /// Gives a block back: zeroes it for its next user. `touched` names the bytes that can be other than zero.
    pub fn free(&mut self, offset: u64, len: u64, touched: bool) {
        let len = len.next_multiple_of(PAGE);
        if touched {
            self.words_mut(offset, len / 8).fill(0);
        }
        self.free.entry(len).or_default().push(offset);
        self.free_bytes += len;
    }

    /// Gives a block back, and its memory to the system.
    pub fn release(&mut self, offset: u64, len: u64) {
        let len = len.next_multiple_of(PAGE);
        assert!(to_usize(offset + len) <= LEN, "block outside the arena");
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let signed = |number: u64| i64::try_from(number).unwrap_or(0);
        let removed = fallocate(&self.file, mode, signed(offset), signed(len));
        self.free(offset, len, removed.is_err());
    }

    /// `len` bytes from `offset` on.
    #[must_use]
    pub fn bytes(&self, offset: u64, len: u64) -> &[u8] {
        let (start, len) = (to_usize(offset), to_usize(len));
        assert!(start + len <= LEN, "range outside the arena");
        // SAFETY: inside the mapping, as asserted; only this value's exclusive borrower writes to it.
        unsafe { std::slice::from_raw_parts(self.base.add(start).as_ptr(), len) }
    }

    /// The same, to be changed.
    pub fn bytes_mut(&mut self, offset: u64, len: u64) -> &mut [u8] {
        let (start, len) = (to_usize(offset), to_usize(len));
        assert!(start + len <= LEN, "range outside the arena");
        // SAFETY: as in `bytes`; the exclusive borrow of the arena makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(start).as_ptr(), len) }
    }

    /// Copies `len` bytes within the arena; the ranges do not overlap.
    pub fn copy(&mut self, from: u64, to: u64, len: u64) {
        let (from, to, len) = (to_usize(from), to_usize(to), to_usize(len));
        assert!(from + len <= LEN && to + len <= LEN && (from + len <= to || to + len <= from));
        // SAFETY: both ranges lie inside the mapping and do not overlap, as asserted.
        unsafe {
            std::ptr::copy_nonoverlapping(self.base.add(from).as_ptr(), self.base.add(to).as_ptr(), len)
        };
    }

    /// The `u64` at `offset`, which must be a multiple of 8 within a block.
    #[must_use]
    #[inline]
    pub fn word(&self, offset: u64) -> u64 {
        assert!(offset.is_multiple_of(8) && to_usize(offset) < LEN, "offset outside the arena");
        // SAFETY: inside the mapping and aligned, as asserted; the file is never made shorter.
        unsafe { self.base.add(to_usize(offset)).cast::<u64>().read() }
    }

    /// The `u64` at `offset`, to be changed.
    #[inline]
    pub fn word_mut(&mut self, offset: u64) -> &mut u64 {
        assert!(offset.is_multiple_of(8) && to_usize(offset) < LEN, "offset outside the arena");
        // SAFETY: as in `word`; the exclusive borrow of the arena makes this the only reference.
        unsafe { self.base.add(to_usize(offset)).cast::<u64>().as_mut() }
    }

    /// `count` words from `offset` on.
    pub fn words_mut(&mut self, offset: u64, count: u64) -> &mut [u64] {
        let (start, count) = (to_usize(offset), to_usize(count));
        assert!(offset.is_multiple_of(8) && start + count * 8 <= LEN, "range outside the arena");
        // SAFETY: as in `word_mut`, for a whole range.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(start).cast::<u64>().as_ptr(), count) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no reference outlives the value.
        let _ = unsafe { munmap(self.base.cast(), LEN) };
    }
}

const _: () = assert!(PAGE_SIZE == 4096);
