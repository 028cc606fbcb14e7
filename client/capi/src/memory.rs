//! `malloc` and its kin, and hints.

use std::ffi::{c_int, c_void};
use std::ptr::{self, NonNull};

use fmalloc_client::Advice;

use crate::failure::{Failure, pointer, status};
use crate::state::must;

/// Alignment of blocks unless more is asked for.
const ALIGN: usize = 16;

/// For fmalloc_advise: no special pattern.
pub const FMALLOC_NORMAL: u32 = 0;
/// Will be read from front to back.
pub const FMALLOC_SEQUENTIAL: u32 = 1;
/// Will be read at random: no readahead.
pub const FMALLOC_RANDOM: u32 = 2;
/// Will be needed soon: read it in.
pub const FMALLOC_WILL_NEED: u32 = 3;
/// Will not be needed soon: evict it. Its content stays.
pub const FMALLOC_COLD: u32 = 4;

/// A block of at least `size` bytes, aligned to 16. A size of 0 gives a block as well. NULL with errno ENOMEM if there is no
/// memory or swap left, EINVAL if there is no heap.
#[unsafe(no_mangle)]
pub extern "C" fn fmalloc(size: usize) -> *mut c_void {
    pointer(must().and_then(|heap| Ok(heap.alloc(size, ALIGN)?.as_ptr().cast())))
}

/// A block for `count` elements of `size` bytes, all zero. As fmalloc; also ENOMEM if the product is too large.
#[unsafe(no_mangle)]
pub extern "C" fn fcalloc(count: usize, size: usize) -> *mut c_void {
    let bytes = count.saturating_mul(size);
    pointer(must().and_then(|heap| Ok(heap.alloc_zeroed(bytes, ALIGN)?.as_ptr().cast())))
}

/// A block of at least `size` bytes whose address is a multiple of `alignment`, a power of two. As fmalloc; EINVAL for
/// another alignment.
#[unsafe(no_mangle)]
pub extern "C" fn faligned_alloc(alignment: usize, size: usize) -> *mut c_void {
    let make = || {
        let heap = must()?;
        if !alignment.is_power_of_two() {
            return Err(Failure::invalid(format!("an alignment of {alignment}: it must be a power of two")));
        }
        Ok(heap.alloc(size, alignment)?.as_ptr().cast())
    };
    pointer(make())
}

/// Changes the size of a block, which may move (then aligned to 16), and gives its address. NULL as `block` is fmalloc; a
/// size of 0 frees the block and gives NULL. NULL with errno ENOMEM or EINVAL (no such block) if it fails; the block is
/// unchanged then.
///
/// # Safety
/// If the block moves, the old address must not be used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn frealloc(block: *mut c_void, size: usize) -> *mut c_void {
    let Some(old) = NonNull::new(block.cast()) else { return fmalloc(size) };
    if size == 0 {
        // SAFETY: the caller's.
        unsafe { ffree(block) };
        return ptr::null_mut();
    }
    // SAFETY: the caller's.
    pointer(must().and_then(|heap| Ok(unsafe { heap.realloc(old, size, ALIGN) }?.as_ptr().cast())))
}

/// Frees a block; NULL does nothing. A pointer that is no block of the heap, or was freed before, changes nothing but errno
/// (EINVAL), fmalloc_error() and the count in fmalloc_stats_t.
///
/// # Safety
/// The block must not be used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ffree(block: *mut c_void) {
    let Some(block) = NonNull::new(block.cast()) else { return };
    // SAFETY: the caller's.
    let outcome = must().and_then(|heap| Ok(unsafe { heap.free(block) }?));
    if let Err(failure) = outcome {
        failure.tell();
    }
}

/// How many bytes of a block may be used: at least those asked for. 0 for NULL; 0 with errno EINVAL for what is no block.
#[unsafe(no_mangle)]
pub extern "C" fn fmalloc_usable_size(block: *const c_void) -> usize {
    let Some(block) = NonNull::new(block.cast_mut().cast()) else { return 0 };
    must().and_then(|heap| Ok(heap.usable_size(block)?)).unwrap_or_else(|failure| {
        failure.tell();
        0
    })
}

/// Gives the daemon a hint about `length` bytes of the heap, one of those above. Returns at once, 0, or -1 with errno.
#[unsafe(no_mangle)]
pub extern "C" fn fmalloc_advise(start: *const c_void, length: usize, advice: u32) -> c_int {
    let advise = || {
        let heap = must()?;
        let range = heap
            .range(start.cast(), length)
            .ok_or_else(|| Failure::invalid("the range is not in the heap"))?;
        Ok(heap.region().advise(range, hint(advice)?)?)
    };
    status(advise())
}

/// A hint by its number.
pub(crate) fn hint(number: u32) -> Result<Advice, Failure> {
    match number {
        FMALLOC_NORMAL => Ok(Advice::Normal),
        FMALLOC_SEQUENTIAL => Ok(Advice::Sequential),
        FMALLOC_RANDOM => Ok(Advice::Random),
        FMALLOC_WILL_NEED => Ok(Advice::WillNeed),
        FMALLOC_COLD => Ok(Advice::Cold),
        other => Err(Failure::invalid(format!("{other} is no advice; see fmalloc.h"))),
    }
}

/// Gives free memory back to RAM and swap, but for `keep` bytes at the end of the heap. Returns 0, or -1 with errno.
#[unsafe(no_mangle)]
pub extern "C" fn fmalloc_trim(keep: usize) -> c_int {
    status(must().map(|heap| heap.trim(keep)))
}
