//! An array in a mapping of its own that grows at its end and never moves: the allocator's records, outside the memory that
//! it hands out.

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::sys;

/// Bytes made usable at a time.
const STEP: usize = 256 << 10;

/// What a table can hold.
///
/// # Safety
/// All zeros must be a value, and it must be [`Sync`] and need no drop.
pub(super) unsafe trait Zeroed: Sync {}

// SAFETY: zero is a number.
unsafe impl Zeroed for std::sync::atomic::AtomicU32 {}

/// The array. Elements that were never written are zero.
#[derive(Debug)]
pub(super) struct Table<T> {
    base: NonNull<T>,
    capacity: usize,
    usable: AtomicUsize,
    elements: PhantomData<T>,
}

// SAFETY: the table owns its mapping and hands out shared references only.
unsafe impl<T: Zeroed> Send for Table<T> {}
// SAFETY: as above.
unsafe impl<T: Zeroed> Sync for Table<T> {}

impl<T: Zeroed> Table<T> {
    /// Reserves addresses for `capacity` elements. None if there are none.
    pub(super) fn new(capacity: usize) -> Option<Self> {
        const { assert!(align_of::<T>() <= 4096 && size_of::<T>() > 0) };
        let base = sys::reserve(Self::mapped(capacity)?)?.cast();
        Some(Self { base, capacity, usable: AtomicUsize::new(0), elements: PhantomData })
    }

    /// Makes the first `count` elements usable; false if there is no memory for them. Calls must not overlap in time.
    pub(super) fn ensure(&self, count: usize) -> bool {
        let usable = self.usable.load(Ordering::Relaxed);
        let wanted = count.saturating_mul(size_of::<T>());
        if wanted <= usable {
            return true;
        }
        if count > self.capacity {
            return false;
        }
        let end = wanted.next_multiple_of(STEP);
        let start = self.base.as_ptr().cast::<u8>().wrapping_add(usable);
        // SAFETY: the reservation is a multiple of the step, and holds `capacity` elements.
        let done = unsafe { sys::commit(start, end - usable) };
        if done {
            self.usable.store(end, Ordering::Relaxed);
        }
        done
    }

    /// An element that was made usable before. For any other index the process ends.
    #[inline]
    pub(super) fn get(&self, index: u32) -> &T {
        let index = index as usize;
        if index >= self.capacity {
            out_of_range();
        }
        // SAFETY: the index is within the reservation, where zeros or what was written is a value. What is not usable yet
        // cannot be read at all: SIGSEGV.
        unsafe { self.base.add(index).as_ref() }
    }

    /// Bytes of memory that are usable.
    pub(super) fn bytes(&self) -> usize {
        self.usable.load(Ordering::Relaxed)
    }

    fn mapped(capacity: usize) -> Option<usize> {
        capacity.checked_mul(size_of::<T>())?.checked_next_multiple_of(STEP)
    }
}

impl<T> Drop for Table<T> {
    fn drop(&mut self) {
        let len = (self.capacity * size_of::<T>()).next_multiple_of(STEP);
        // SAFETY: the reservation is this table's alone.
        unsafe { sys::release(self.base.cast(), len) };
    }
}

/// Records that name no element: memory was overwritten. Going on would corrupt more.
#[cold]
fn out_of_range() -> ! {
    std::process::abort()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn grows_in_place_and_starts_with_zeros() {
        let table = Table::<AtomicU32>::new(1 << 20).unwrap();
        assert_eq!(table.bytes(), 0);
        assert!(table.ensure(1));
        let first = std::ptr::from_ref(table.get(0));
        table.get(0).store(7, Ordering::Relaxed);
        assert!(table.ensure(1 << 20));
        assert_eq!(first, std::ptr::from_ref(table.get(0)));
        assert_eq!(table.get(0).load(Ordering::Relaxed), 7);
        assert_eq!(table.get((1 << 20) - 1).load(Ordering::Relaxed), 0);
        assert_eq!(table.bytes(), 4 << 20);
        assert!(!table.ensure((1 << 20) + 1));
        assert!(Table::<AtomicU32>::new(usize::MAX / 2).is_none());
    }
}
