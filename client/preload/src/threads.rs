//! `pthread_create`: a thread that is started inside is fmalloc's own, and stays inside from its first instruction to its
//! last. What libc and Rust allocate around a thread's own function would otherwise be paged, and the thread that evicts
//! would wait for itself.

use std::ffi::{c_int, c_void};

use crate::inside;
use crate::next::next;

type Start = unsafe extern "C" fn(*mut c_void) -> *mut c_void;

/// What a thread of fmalloc's is to do.
struct Work {
    start: Start,
    argument: *mut c_void,
}

/// See pthread_create(3).
///
/// # Safety
/// As for the function of libc.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn pthread_create(
    thread: *mut libc::pthread_t,
    attributes: *const libc::pthread_attr_t,
    start: Start,
    argument: *mut c_void,
) -> c_int {
    let Some(create) = next().pthread_create else { return libc::EAGAIN };
    if !inside::is_inside() {
        // SAFETY: the caller's.
        return unsafe { create(thread, attributes, start, argument) };
    }
    let work = Box::into_raw(Box::new(Work { start, argument }));
    // SAFETY: the caller's; the work is the new thread's to drop.
    let status = unsafe { create(thread, attributes, run, work.cast()) };
    if status != 0 {
        // SAFETY: there is no thread that could.
        drop(unsafe { Box::from_raw(work) });
    }
    status
}

unsafe extern "C" fn run(work: *mut c_void) -> *mut c_void {
    inside::stay();
    // SAFETY: made for this thread alone by `pthread_create`.
    let Work { start, argument } = *unsafe { Box::from_raw(work.cast::<Work>()) };
    // SAFETY: as whoever created the thread has promised.
    unsafe { start(argument) }
}
