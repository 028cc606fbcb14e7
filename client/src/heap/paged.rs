//! The heap over a region: the allocator on memory that the daemon pages.

use std::ops::{Deref, Range};
use std::ptr::NonNull;

use super::backing::{Backing, Unavailable};
use super::core::Core;
use crate::error::Error;
use crate::{Pager, Region, own};

/// Free pages that wait to be used again may be this part of the budget, within these bounds, in bytes.
const DIRTY_PART: u64 = 16;
const DIRTY_BOUNDS: (u64, u64) = (1 << 20, 64 << 20);

/// A heap of paged memory. Its allocator is [`Core`], which it derefs to: there are `alloc`, `free`, `realloc`,
/// `usable_size`, `stats`, `trim` and `check`.
///
/// It is an `Allocator` of the crate allocator-api2 as well, so that collections can live in it:
///
/// ```no_run
/// use allocator_api2::vec::Vec;
/// use fmalloc_client::heap::Heap;
/// use fmalloc_client::{Pager, PrivateOptions};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pager = Pager::private(&PrivateOptions::new(256 << 20))?;
/// let heap = Heap::new(&pager, 64 << 30)?;
/// let mut numbers = Vec::new_in(&heap);
/// numbers.extend(0..1_000_000_000_u64);
/// # Ok(())
/// # }
/// ```
///
/// Addresses are reserved, swap is claimed as the heap grows: an allocation that the swap file has no room for fails, and
/// memory that was handed out never runs short later. Blocks are gone when the heap is dropped.
#[derive(Debug)]
pub struct Heap(Core<Paged>);

impl Heap {
    /// A heap of at most `reserve` bytes, in whole pages, and at most 16 TiB.
    ///
    /// # Errors
    /// As [`Region::sparse`].
    pub fn new(pager: &Pager, reserve: usize) -> Result<Self, Error> {
        Self::labelled(pager, reserve, "heap")
    }

    /// [`Heap::new`] with a label for `fmallocctl regions`, of which 64 bytes are kept.
    ///
    /// # Errors
    /// As [`Region::sparse`].
    pub fn labelled(pager: &Pager, reserve: usize, label: &str) -> Result<Self, Error> {
        let region = Region::sparse_labelled(pager, reserve, label)?;
        let Some(core) = Core::new(Paged(region)) else {
            return Err(Error::invalid(format!(
                "a heap of {reserve} bytes: no addresses are left for its tables; reserve less"
            )));
        };
        let (least, most) = DIRTY_BOUNDS;
        core.set_dirty_limit(fmalloc_proto::num::to_usize((pager.budget() / DIRTY_PART).clamp(least, most)));
        Ok(Self(core))
    }

    /// The memory that blocks come from: for hints, and for what is resident.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.0.backing().0
    }

    /// Where in [`Heap::region`] a block or a part of it is, if it is in this heap.
    #[must_use]
    pub fn range(&self, start: *const u8, len: usize) -> Option<Range<usize>> {
        let start = self.0.offset(start);
        let end = start.checked_add(len)?;
        (end <= self.region().len()).then_some(start..end)
    }
}

impl Deref for Heap {
    type Target = Core<Paged>;

    fn deref(&self) -> &Core<Paged> {
        &self.0
    }
}

/// A region as a [`Backing`].
#[derive(Debug)]
pub struct Paged(Region);

// SAFETY: the region is this value's alone. What is committed is private memory until it is decommitted or the region is
// dropped; zero at first, and after it was dropped.
unsafe impl Backing for Paged {
    fn base(&self) -> NonNull<u8> {
        // It never is null.
        NonNull::new(self.0.as_ptr()).unwrap_or(NonNull::dangling())
    }

    fn reserved(&self) -> usize {
        self.0.len()
    }

    fn commit(&self, range: Range<usize>) -> Result<(), Unavailable> {
        let _inside = own::enter();
        self.0.commit(range).map_err(|_| Unavailable)
    }

    unsafe fn discard(&self, range: Range<usize>) -> Result<(), Unavailable> {
        let _inside = own::enter();
        // SAFETY: the caller's.
        unsafe { self.0.discard_unused(range) }.map_err(|_| Unavailable)
    }

    unsafe fn decommit(&self, range: Range<usize>) -> Result<(), Unavailable> {
        let _inside = own::enter();
        // SAFETY: the caller's.
        unsafe { self.0.decommit_unused(range) }.map_err(|_| Unavailable)
    }
}
