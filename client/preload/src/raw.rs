//! System calls by number: the functions of these names are the ones that this library replaces. Each gives what the
//! kernel gave, with errno set on failure.

use std::ffi::{c_int, c_long, c_void};

/// `mmap`.
///
/// # Safety
/// As the system call's: with MAP_FIXED, what was there must be the caller's.
pub(crate) unsafe fn mmap(
    addr: *mut c_void,
    len: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    // SAFETY: the caller's.
    pointer(unsafe { libc::syscall(libc::SYS_mmap, addr, len, prot, flags, fd, offset) })
}

/// `munmap`.
///
/// # Safety
/// The range must be the caller's.
pub(crate) unsafe fn munmap(addr: *mut c_void, len: usize) -> c_int {
    // SAFETY: the caller's.
    status(unsafe { libc::syscall(libc::SYS_munmap, addr, len) })
}

/// `mremap`.
///
/// # Safety
/// The ranges must be the caller's.
pub(crate) unsafe fn mremap(
    old: *mut c_void,
    old_len: usize,
    len: usize,
    flags: c_int,
    new: *mut c_void,
) -> *mut c_void {
    // SAFETY: the caller's.
    pointer(unsafe { libc::syscall(libc::SYS_mremap, old, old_len, len, flags, new) })
}

/// `mprotect`.
///
/// # Safety
/// The range must be the caller's.
pub(crate) unsafe fn mprotect(addr: *mut c_void, len: usize, prot: c_int) -> c_int {
    // SAFETY: the caller's.
    status(unsafe { libc::syscall(libc::SYS_mprotect, addr, len, prot) })
}

/// `madvise`.
///
/// # Safety
/// Nothing may rely on content that the advice drops.
pub(crate) unsafe fn madvise(addr: *mut c_void, len: usize, advice: c_int) -> c_int {
    // SAFETY: the caller's.
    status(unsafe { libc::syscall(libc::SYS_madvise, addr, len, advice) })
}

/// `mlock2`, or `mlock` without flags.
pub(crate) fn mlock(addr: *const c_void, len: usize, flags: c_int) -> c_int {
    // SAFETY: changes no content; the kernel checks the range.
    status(unsafe {
        if flags == 0 {
            libc::syscall(libc::SYS_mlock, addr, len)
        } else {
            libc::syscall(libc::SYS_mlock2, addr, len, flags)
        }
    })
}

/// `munlock`.
pub(crate) fn munlock(addr: *const c_void, len: usize) -> c_int {
    // SAFETY: as above.
    status(unsafe { libc::syscall(libc::SYS_munlock, addr, len) })
}

/// `mlockall`.
pub(crate) fn mlockall(flags: c_int) -> c_int {
    // SAFETY: changes no content.
    status(unsafe { libc::syscall(libc::SYS_mlockall, flags) })
}

/// `munlockall`.
pub(crate) fn munlockall() -> c_int {
    // SAFETY: as above.
    status(unsafe { libc::syscall(libc::SYS_munlockall) })
}

/// Sets errno, and gives what functions that give a status give with it.
pub(crate) fn fail(errno: c_int) -> c_int {
    set_errno(errno);
    -1
}

/// Sets errno.
pub(crate) fn set_errno(errno: c_int) {
    // SAFETY: the thread's own.
    unsafe { *libc::__errno_location() = errno };
}

/// This thread's errno.
pub(crate) fn errno() -> c_int {
    // SAFETY: the thread's own.
    unsafe { *libc::__errno_location() }
}

fn pointer(value: c_long) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(value.cast_unsigned().try_into().unwrap_or(0))
}

fn status(value: c_long) -> c_int {
    if value == 0 { 0 } else { -1 }
}
