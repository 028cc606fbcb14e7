//! The one heap of the process.

use std::ffi::{c_char, c_int};
use std::ptr;
#[cfg(unix)]
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use fmalloc_client::heap::Heap;

use crate::failure::{Failure, status};
use crate::options::Options;

/// From `fmalloc_init` to `fmalloc_close`; else null.
static HEAP: AtomicPtr<Heap> = AtomicPtr::new(ptr::null_mut());
/// Whether this process was forked from one that had a heap.
static FORKED: AtomicBool = AtomicBool::new(false);

/// The heap, if there is one.
#[inline]
pub(crate) fn heap() -> Option<&'static Heap> {
    // SAFETY: null, or a heap that lives until `fmalloc_close`, during which no other call may be under way.
    unsafe { HEAP.load(Ordering::Acquire).as_ref() }
}

/// The heap, or why there is none.
#[inline]
pub(crate) fn must() -> Result<&'static Heap, Failure> {
    heap().ok_or_else(|| {
        Failure::invalid(if FORKED.load(Ordering::Relaxed) {
            "the heap belongs to the parent process: after fork, call fmalloc_init again"
        } else {
            "there is no heap: call fmalloc_init first"
        })
    })
}

/// Makes the heap of this process.
///
/// `path`: NULL for the running service or, if none answers, a private daemon; otherwise a private daemon whose swap file,
/// which never has a name, is on the disk of this directory or file. `size`: bytes that the heap may grow to.
///
/// Returns 0, or -1 with errno: EINVAL (arguments, or there is a heap already), ENOENT (no daemon, no such directory), EACCES,
/// EPERM (no userfaultfd), ENOSPC, ENOMEM, ENOSYS (the kernel is too old); fmalloc_error() says what to do.
///
/// # Safety
/// The path must be null or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fmalloc_init(path: *const c_char, size: usize) -> c_int {
    // SAFETY: the caller's.
    status(unsafe { open(&Options::plain(path, size)) })
}

/// As fmalloc_init, with options.
///
/// # Safety
/// The options must be null or valid, their strings too.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fmalloc_init_with(options: *const Options) -> c_int {
    // SAFETY: the caller's.
    status(match unsafe { options.as_ref() } {
        // SAFETY: as above.
        Some(options) => unsafe { open(options) },
        None => Err(Failure::invalid("no options were given")),
    })
}

/// Ends the heap. All of its blocks are gone. No other call may be under way, nor may any thread use a block any more.
/// Returns 0, or -1 with errno EINVAL if there is no heap.
#[unsafe(no_mangle)]
pub extern "C" fn fmalloc_close() -> c_int {
    let close = || {
        must()?;
        let heap = HEAP.swap(ptr::null_mut(), Ordering::AcqRel);
        // SAFETY: made by `open` from a box, and nobody else has it any more.
        drop(unsafe { Box::from_raw(heap) });
        Ok(())
    };
    status(close())
}

/// # Safety
/// The strings of the options must be null or end with a zero byte.
unsafe fn open(options: &Options) -> Result<(), Failure> {
    if heap().is_some() {
        return Err(Failure::invalid("there is a heap already: call fmalloc_close first"));
    }
    #[cfg(unix)]
    watch_forks();
    // SAFETY: the caller's.
    let heap = unsafe { options.open() }?;
    FORKED.store(false, Ordering::Relaxed);
    HEAP.store(Box::into_raw(Box::new(heap)), Ordering::Release);
    Ok(())
}

#[cfg(unix)]
fn watch_forks() {
    static ATFORK: Once = Once::new();
    ATFORK.call_once(|| {
        // SAFETY: registers a function of this library, which only stores two words. Without memory for it a child finds out
        // by SIGSEGV.
        let _ = unsafe { libc::pthread_atfork(None, None, Some(forked)) };
    });
}

/// In a forked child: it has none of the memory. The parent's records are left alone, where they are.
#[cfg(unix)]
extern "C" fn forked() {
    if !HEAP.swap(ptr::null_mut(), Ordering::AcqRel).is_null() {
        FORKED.store(true, Ordering::Relaxed);
    }
}
