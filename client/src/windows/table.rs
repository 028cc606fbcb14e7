//! Memory for tables that the exception handler uses. On Windows it comes straight from the system: the program's
//! allocator may keep its memory in a region, where the handler must not touch it.

use std::ops::{Deref, DerefMut};

/// A fixed number of values that any bytes of zero are the first value of.
#[derive(Debug)]
pub(super) struct Table<T: Zeroed> {
    #[cfg(windows)]
    start: std::ptr::NonNull<T>,
    #[cfg(windows)]
    len: usize,
    #[cfg(not(windows))]
    values: Vec<T>,
}

/// A type for which bytes of zero are a value, and which needs no dropping.
///
/// # Safety
/// As said.
pub(super) unsafe trait Zeroed: Copy {}

#[cfg(windows)]
mod system {
    use std::ptr::{NonNull, null};

    use windows_sys::Win32::System::Memory::{
        MEM_COMMIT, MEM_RELEASE, MEM_RESERVE, PAGE_READWRITE, VirtualAlloc, VirtualFree,
    };

    use super::{Table, Zeroed};

    // SAFETY: the table owns its memory and gives it out as references only.
    unsafe impl<T: Zeroed + Send> Send for Table<T> {}
    // SAFETY: as above.
    unsafe impl<T: Zeroed + Sync> Sync for Table<T> {}

    /// Zeros, aligned to a page.
    pub(super) fn memory(bytes: usize) -> Option<NonNull<u8>> {
        // SAFETY: asks for memory anywhere.
        let start = unsafe { VirtualAlloc(null(), bytes.max(1), MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE) };
        NonNull::new(start.cast())
    }

    /// Gives back what `memory` gave.
    pub(super) fn free(start: NonNull<u8>) {
        // SAFETY: the caller's promise, and nobody refers to it any more.
        unsafe { VirtualFree(start.as_ptr().cast(), 0, MEM_RELEASE) };
    }

    impl<T: Zeroed> Table<T> {
        /// Zeros; none if the system has no memory. Pages of it take RAM when they are touched first.
        pub(in super::super) fn new(len: usize) -> Option<Self> {
            let start = memory(len.checked_mul(size_of::<T>())?)?.cast();
            Some(Self { start, len })
        }
    }

    impl<T: Zeroed> Drop for Table<T> {
        fn drop(&mut self) {
            free(self.start.cast());
        }
    }
}

#[cfg(not(windows))]
impl<T: Zeroed> Table<T> {
    pub(super) fn new(len: usize) -> Option<Self> {
        // SAFETY: the trait's promise.
        let zero: T = unsafe { std::mem::zeroed() };
        Some(Self { values: vec![zero; len] })
    }
}

impl<T: Zeroed> Deref for Table<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        #[cfg(windows)]
        // SAFETY: the memory has `len` values, all of them zeros at first.
        return unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) };
        #[cfg(not(windows))]
        &self.values
    }
}

impl<T: Zeroed> DerefMut for Table<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        #[cfg(windows)]
        // SAFETY: as above, and the table is borrowed exclusively.
        return unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) };
        #[cfg(not(windows))]
        &mut self.values
    }
}

/// One value in memory from the system.
#[cfg(windows)]
#[derive(Debug)]
pub(super) struct Fixed<T>(std::ptr::NonNull<T>);

// SAFETY: it owns the value, as a `Box` does.
#[cfg(windows)]
unsafe impl<T: Send> Send for Fixed<T> {}
// SAFETY: as above.
#[cfg(windows)]
unsafe impl<T: Sync> Sync for Fixed<T> {}

#[cfg(windows)]
impl<T> Fixed<T> {
    /// None if the system has no memory.
    pub(super) fn new(value: T) -> Option<Self> {
        let place = system::memory(size_of::<T>())?.cast::<T>();
        // SAFETY: new memory, large enough, and aligned to a page.
        unsafe { place.write(value) };
        Some(Self(place))
    }
}

#[cfg(windows)]
impl<T> Deref for Fixed<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: written in `new`.
        unsafe { self.0.as_ref() }
    }
}

#[cfg(windows)]
impl<T> Drop for Fixed<T> {
    fn drop(&mut self) {
        // SAFETY: written in `new`, and nobody refers to it any more.
        unsafe { self.0.drop_in_place() };
        system::free(self.0.cast());
    }
}
