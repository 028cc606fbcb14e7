//! The malloc family as C knows it. What is paged comes from the heap, everything else from the next library; which of
//! the two a block came from shows in its address.

use std::ffi::{c_int, c_void};
use std::ptr::{self, NonNull};

use fmalloc_client::PAGE_SIZE;
use fmalloc_client::heap::{BadPointer, ReallocError};
use libc::{EINVAL, ENOMEM};

use crate::config;
use crate::inside::{Inside, is_inside};
use crate::next::next;
use crate::paging::{Paging, Way, paging, uncount, way};
use crate::{raw, say};

/// What `malloc` aligns to.
const ALIGN: usize = 16;

/// See malloc(3).
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn malloc(size: usize) -> *mut c_void {
    match way(counted(size)) {
        Way::Paged(paging) => paged(paging, size, ALIGN),
        // SAFETY: any size will do.
        Way::Next => unsafe { (next().malloc)(size) },
        Way::Refused => no_memory(),
    }
}

/// See calloc(3).
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn calloc(count: usize, size: usize) -> *mut c_void {
    let Some(bytes) = count.checked_mul(size) else { return no_memory() };
    match way(counted(bytes)) {
        Way::Paged(paging) => {
            let _inside = Inside::enter();
            paging.heap.alloc_zeroed(bytes, ALIGN).map_or_else(|_| no_memory(), |block| block.as_ptr().cast())
        }
        // SAFETY: any sizes will do.
        Way::Next => unsafe { (next().calloc)(count, size) },
        Way::Refused => no_memory(),
    }
}

/// See realloc(3): of no bytes it frees.
///
/// # Safety
/// The block must be one of this family's, and in use.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn realloc(old: *mut c_void, size: usize) -> *mut c_void {
    let Some(block) = NonNull::new(old.cast::<u8>()) else { return malloc(size) };
    if size == 0 {
        // SAFETY: the caller's.
        unsafe { free(old) };
        return ptr::null_mut();
    }
    if let Some(paging) = owner(block) {
        if is_inside() {
            // SAFETY: the caller's.
            return unsafe { moved_to_libc(paging, block, size) };
        }
        let _inside = Inside::enter();
        // SAFETY: the caller's.
        return match unsafe { paging.heap.realloc(block, size, ALIGN) } {
            Ok(block) => block.as_ptr().cast(),
            Err(ReallocError::BadPointer(bad)) => misused("realloc", block, bad),
            Err(_) => no_memory(),
        };
    }
    let usable = usable(old);
    match way(counted(size)) {
        Way::Paged(paging) if size > usable => {
            let new = paged(paging, size, ALIGN);
            if !new.is_null() {
                // SAFETY: both blocks have that many bytes; the old one is the caller's to give up.
                unsafe {
                    new.cast::<u8>().copy_from_nonoverlapping(old.cast(), usable);
                    (next().free)(old);
                }
            }
            new
        }
        Way::Paged(_) | Way::Next => {
            // SAFETY: the caller's.
            let new = unsafe { (next().realloc)(old, size) };
            if !new.is_null() {
                give_back(usable);
            }
            new
        }
        Way::Refused => no_memory(),
    }
}

/// See reallocarray(3).
///
/// # Safety
/// As [`realloc`].
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn reallocarray(old: *mut c_void, count: usize, size: usize) -> *mut c_void {
    match count.checked_mul(size) {
        // SAFETY: the caller's.
        Some(bytes) => unsafe { realloc(old, bytes) },
        None => no_memory(),
    }
}

/// See free(3). Leaves errno alone.
///
/// # Safety
/// The block must be null or one of this family's, and not used any more.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn free(old: *mut c_void) {
    let Some(block) = NonNull::new(old.cast::<u8>()) else { return };
    let Some(paging) = owner(block) else {
        if paging().is_none() {
            give_back(usable(old));
        }
        // SAFETY: the caller's.
        return unsafe { (next().free)(old) };
    };
    if is_inside() {
        // The heap may be in the middle of something: rather lose a block, which libc hardly ever frees here.
        return;
    }
    let _inside = Inside::enter();
    let errno = raw::errno();
    // SAFETY: the caller's.
    if let Err(bad) = unsafe { paging.heap.free(block) } {
        misused("free", block, bad);
    }
    raw::set_errno(errno);
}

/// What old programs call [`free`].
///
/// # Safety
/// As [`free`].
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn cfree(old: *mut c_void) {
    // SAFETY: the caller's.
    unsafe { free(old) };
}

/// See memalign(3).
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn memalign(align: usize, size: usize) -> *mut c_void {
    // As glibc: the next power of two, if there is one.
    let Some(align) = align.max(1).checked_next_power_of_two() else {
        raw::set_errno(EINVAL);
        return ptr::null_mut();
    };
    match way(counted(size)) {
        Way::Paged(paging) => paged(paging, size, align),
        // SAFETY: a power of two, and any size.
        Way::Next => unsafe { (next().memalign)(align, size) },
        Way::Refused => no_memory(),
    }
}

/// See posix_memalign(3). Leaves errno alone.
///
/// # Safety
/// There must be room for a pointer at `place`.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn posix_memalign(place: *mut *mut c_void, align: usize, size: usize) -> c_int {
    if !align.is_power_of_two() || !align.is_multiple_of(size_of::<*mut c_void>()) {
        return EINVAL;
    }
    let errno = raw::errno();
    let block = memalign(align, size);
    raw::set_errno(errno);
    if block.is_null() {
        return ENOMEM;
    }
    // SAFETY: the caller's.
    unsafe { place.write(block) };
    0
}

/// See aligned_alloc(3).
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn aligned_alloc(align: usize, size: usize) -> *mut c_void {
    memalign(align, size)
}

/// See valloc(3).
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn valloc(size: usize) -> *mut c_void {
    memalign(PAGE_SIZE, size)
}

/// See pvalloc(3).
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn pvalloc(size: usize) -> *mut c_void {
    size.checked_next_multiple_of(PAGE_SIZE).map_or_else(no_memory, |size| memalign(PAGE_SIZE, size))
}

/// See malloc_usable_size(3).
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn malloc_usable_size(block: *mut c_void) -> usize {
    let Some(place) = NonNull::new(block.cast::<u8>()) else { return 0 };
    match owner(place) {
        Some(paging) => {
            let _inside = Inside::enter();
            paging.heap.usable_size(place).unwrap_or_else(|bad| misused("malloc_usable_size", place, bad))
        }
        None => usable(block),
    }
}

/// See malloc_trim(3).
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn malloc_trim(keep: usize) -> c_int {
    // SAFETY: any number will do.
    let trimmed = next().trim.map_or(0, |trim| unsafe { trim(keep) });
    match paging().filter(|paging| paging.is_healthy()) {
        Some(paging) => {
            let _inside = Inside::enter();
            paging.heap.trim(keep);
            1
        }
        None => trimmed,
    }
}

/// See mallinfo2(3): what the next library has, and the heap beside it, as if it were mapped.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn mallinfo2() -> libc::mallinfo2 {
    // SAFETY: takes nothing; all zeros is a valid answer.
    let mut info = unsafe { next().mallinfo2.map_or_else(|| std::mem::zeroed(), |info| info()) };
    if let Some(paging) = paging() {
        let _inside = Inside::enter();
        let stats = paging.heap.stats();
        info.hblks += 1;
        info.hblkhd += stats.committed_bytes;
        info.uordblks += stats.used_bytes;
        info.fordblks += stats.committed_bytes.saturating_sub(stats.used_bytes);
    }
    info
}

/// The paged process whose heap the block is in.
#[inline]
fn owner(block: NonNull<u8>) -> Option<&'static Paging> {
    paging().filter(|paging| paging.heap.owns(block.as_ptr()))
}

/// What `realloc` does inside, where the heap may be in the middle of something: the loader resizes the list of a thread's
/// storage wherever it finds that it must. The old block is lost.
///
/// # Safety
/// As [`realloc`].
#[cold]
unsafe fn moved_to_libc(paging: &Paging, old: NonNull<u8>, size: usize) -> *mut c_void {
    // SAFETY: any size will do; both blocks have the bytes that are copied.
    unsafe {
        let new = (next().malloc)(size);
        if !new.is_null() {
            let usable = paging.heap.usable_size(old).unwrap_or(0);
            new.cast::<u8>().copy_from_nonoverlapping(old.as_ptr(), usable.min(size));
        }
        new
    }
}

fn paged(paging: &Paging, size: usize, align: usize) -> *mut c_void {
    let _inside = Inside::enter();
    paging.heap.alloc(size, align).map_or_else(|_| no_memory(), |block| block.as_ptr().cast())
}

/// What libc gives for a request of this size, which is how it is counted when it comes back.
#[inline]
fn counted(size: usize) -> usize {
    (size.saturating_add(23) & !15).saturating_sub(8).max(24)
}

fn usable(block: *mut c_void) -> usize {
    // SAFETY: the block is the next library's.
    next().usable.map_or(0, |usable| unsafe { usable(block) })
}

/// Libc has got back what was counted when it gave it.
fn give_back(usable: usize) {
    if config::get().is_some_and(|config| usable >= config.threshold) {
        uncount(usable);
    }
}

#[cold]
fn no_memory() -> *mut c_void {
    raw::set_errno(ENOMEM);
    ptr::null_mut()
}

/// Ends the program as libc does: it would damage somebody's data if it went on.
#[cold]
fn misused(function: &str, block: NonNull<u8>, bad: BadPointer) -> ! {
    let _inside = Inside::enter();
    say::always(&format!("{function}({block:p}): {bad}"));
    // SAFETY: ends the process.
    unsafe { libc::abort() }
}
