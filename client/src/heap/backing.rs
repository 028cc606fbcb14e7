//! The memory that an allocator hands out, as the allocator sees it.

use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;

use super::sys;

/// Reserved addresses, of which parts can be made usable and given back. Ranges are bytes from the base, in whole pages.
///
/// # Safety
/// From a successful [`Backing::commit`] until the range is decommitted or the value dropped, the range must be memory
/// that nobody else uses, that reads as zeros until it is written and keeps what was written. After a successful
/// [`Backing::discard`] the range reads as zeros again. The base must be aligned to 4096 and never change.
pub unsafe trait Backing {
    /// Start of the addresses.
    fn base(&self) -> NonNull<u8>;

    /// How many bytes are reserved; a partial page at the end is not used.
    fn reserved(&self) -> usize;

    /// Makes `range` usable and claims for it whatever it may need later.
    ///
    /// # Errors
    /// There is no memory or swap for it; nothing has changed.
    fn commit(&self, range: Range<usize>) -> Result<(), Unavailable>;

    /// Drops the content of `range`, which stays usable and reads as zeros.
    ///
    /// # Errors
    /// The content is undefined then, the range still usable.
    ///
    /// # Safety
    /// Nobody may rely on the content.
    unsafe fn discard(&self, range: Range<usize>) -> Result<(), Unavailable>;

    /// Undoes [`Backing::commit`].
    ///
    /// # Errors
    /// The range is still usable then, its content undefined.
    ///
    /// # Safety
    /// Nobody may use the range any more.
    unsafe fn decommit(&self, range: Range<usize>) -> Result<(), Unavailable>;
}

/// The memory behind an allocator could not do what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unavailable;

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no memory or swap to be had")
    }
}

impl std::error::Error for Unavailable {}

/// Ordinary memory of the system, not paged by fmalloc: what tests and comparisons run the allocator on.
#[derive(Debug)]
pub struct Plain {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the value owns the mapping.
unsafe impl Send for Plain {}
// SAFETY: as above; the methods are system calls.
unsafe impl Sync for Plain {}

impl Plain {
    /// Reserves `len` bytes of addresses. None if the system has not that many.
    #[must_use]
    pub fn new(len: usize) -> Option<Self> {
        Some(Self { base: sys::reserve(len)?, len })
    }

    fn at(&self, range: &Range<usize>) -> Result<*mut u8, Unavailable> {
        let inside = range.start <= range.end && range.end <= self.len;
        if inside { Ok(self.base.as_ptr().wrapping_add(range.start)) } else { Err(Unavailable) }
    }
}

// SAFETY: the mapping is private anonymous memory that this value owns.
unsafe impl Backing for Plain {
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn reserved(&self) -> usize {
        self.len
    }

    fn commit(&self, range: Range<usize>) -> Result<(), Unavailable> {
        // SAFETY: the range is within the mapping.
        ok(unsafe { sys::commit(self.at(&range)?, range.len()) })
    }

    unsafe fn discard(&self, range: Range<usize>) -> Result<(), Unavailable> {
        // SAFETY: the range is within the mapping, and nobody relies on its content.
        ok(unsafe { sys::discard(self.at(&range)?, range.len()) })
    }

    unsafe fn decommit(&self, range: Range<usize>) -> Result<(), Unavailable> {
        // SAFETY: as above.
        ok(unsafe { sys::decommit(self.at(&range)?, range.len()) })
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's alone.
        unsafe { sys::release(self.base, self.len) };
    }
}

fn ok(done: bool) -> Result<(), Unavailable> {
    if done { Ok(()) } else { Err(Unavailable) }
}
