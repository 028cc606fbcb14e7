//! The system calls of the allocator: memory for its own records, sleeping on a lock, whether a thread lives. The only
//! file under `heap` that knows the operating system. Nothing here allocates.

use std::ptr::NonNull;

pub(super) use imp::*;

/// Reserves addresses that cannot be touched yet.
pub(super) fn reserve(len: usize) -> Option<NonNull<u8>> {
    if len == 0 { None } else { NonNull::new(imp::map(len)) }
}

#[cfg(unix)]
mod imp {
    use std::ffi::c_long;
    use std::ptr::{NonNull, null_mut};
    use std::sync::atomic::AtomicU32;

    /// Null if there are no addresses left.
    pub(super) fn map(len: usize) -> *mut u8 {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe { libc::mmap(null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
        if base == libc::MAP_FAILED { null_mut() } else { base.cast() }
    }

    /// Makes reserved addresses usable; zeros where nothing was written.
    ///
    /// # Safety
    /// The range must be whole pages of a reservation of the caller's.
    pub(in super::super) unsafe fn commit(at: *mut u8, len: usize) -> bool {
        // SAFETY: the caller's; content does not change.
        unsafe { libc::mprotect(at.cast(), len, libc::PROT_READ | libc::PROT_WRITE) == 0 }
    }

    /// Drops the content of usable addresses.
    ///
    /// # Safety
    /// As [`commit`], and nobody may rely on the content.
    pub(in super::super) unsafe fn discard(at: *mut u8, len: usize) -> bool {
        // SAFETY: the caller's.
        unsafe { libc::madvise(at.cast(), len, libc::MADV_DONTNEED) == 0 }
    }

    /// Makes addresses unusable again and drops their content.
    ///
    /// # Safety
    /// As [`discard`], and nobody may touch the range.
    pub(in super::super) unsafe fn decommit(at: *mut u8, len: usize) -> bool {
        // SAFETY: the caller's.
        unsafe { libc::mprotect(at.cast(), len, libc::PROT_NONE) == 0 && discard(at, len) }
    }

    /// Gives a reservation back.
    ///
    /// # Safety
    /// It must be one of [`super::reserve`], whole, and nobody may use it any more.
    pub(in super::super) unsafe fn release(base: NonNull<u8>, len: usize) {
        // SAFETY: the caller's.
        unsafe { libc::munmap(base.as_ptr().cast(), len) };
    }

    /// Sleeps while `word` is `expected`; may return early.
    pub(in super::super) fn wait(word: &AtomicU32, expected: u32) {
        // SAFETY: the word outlives the call; no timeout.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                word.as_ptr(),
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                expected,
                0,
            )
        };
    }

    /// Wakes one thread that sleeps on `word`.
    pub(in super::super) fn wake_one(word: &AtomicU32) {
        // SAFETY: the kernel uses the address as a name only.
        unsafe {
            libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, 1)
        };
    }

    /// A number for the calling thread, never 0, that no other living thread of the process has.
    pub(in super::super) fn thread_id() -> u32 {
        // SAFETY: takes nothing, gives a number. Not libc's wrapper, which old versions of it lack.
        let id: c_long = unsafe { libc::syscall(libc::SYS_gettid) };
        u32::try_from(id).unwrap_or(1)
    }

    /// Whether the thread with this number still runs. If in doubt, it does.
    pub(in super::super) fn thread_lives(id: u32) -> bool {
        // SAFETY: signal 0 only asks.
        let outcome = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), id, 0) };
        outcome == 0 || std::io::Error::last_os_error().raw_os_error() != Some(libc::ESRCH)
    }
}

#[cfg(windows)]
mod imp {
    use std::ptr::{NonNull, null};
    use std::sync::atomic::AtomicU32;

    use windows_sys::Win32::Foundation::{CloseHandle, WAIT_OBJECT_0};
    use windows_sys::Win32::System::Memory::{
        MEM_COMMIT, MEM_DECOMMIT, MEM_RELEASE, MEM_RESERVE, PAGE_NOACCESS, PAGE_READWRITE, VirtualAlloc,
        VirtualFree,
    };
    use windows_sys::Win32::System::Threading::{
        GetCurrentThreadId, INFINITE, OpenThread, THREAD_SYNCHRONIZE, WaitForSingleObject, WaitOnAddress,
        WakeByAddressSingle,
    };

    /// Null if there are no addresses left.
    pub(super) fn map(len: usize) -> *mut u8 {
        // SAFETY: a fresh reservation at an address of the system's choice.
        unsafe { VirtualAlloc(null(), len, MEM_RESERVE, PAGE_NOACCESS) }.cast()
    }

    /// Makes reserved addresses usable; zeros where nothing was written.
    ///
    /// # Safety
    /// The range must be whole pages of a reservation of the caller's.
    pub(in super::super) unsafe fn commit(at: *mut u8, len: usize) -> bool {
        // SAFETY: the caller's; what is committed already stays as it is.
        unsafe { !VirtualAlloc(at.cast(), len, MEM_COMMIT, PAGE_READWRITE).is_null() }
    }

    /// Drops the content of usable addresses.
    ///
    /// # Safety
    /// As [`commit`], and nobody may rely on the content.
    pub(in super::super) unsafe fn discard(at: *mut u8, len: usize) -> bool {
        // SAFETY: the caller's. If the second call fails the range cannot be touched, which a caller cannot mend: there
        // is no commit charge left in the whole system then.
        unsafe { decommit(at, len) && commit(at, len) }
    }

    /// Makes addresses unusable again and drops their content.
    ///
    /// # Safety
    /// As [`discard`], and nobody may touch the range.
    pub(in super::super) unsafe fn decommit(at: *mut u8, len: usize) -> bool {
        // SAFETY: the caller's.
        unsafe { VirtualFree(at.cast(), len, MEM_DECOMMIT) != 0 }
    }

    /// Gives a reservation back.
    ///
    /// # Safety
    /// It must be one of [`super::reserve`], whole, and nobody may use it any more.
    pub(in super::super) unsafe fn release(base: NonNull<u8>, _len: usize) {
        // SAFETY: the caller's.
        unsafe { VirtualFree(base.as_ptr().cast(), 0, MEM_RELEASE) };
    }

    /// Sleeps while `word` is `expected`; may return early.
    pub(in super::super) fn wait(word: &AtomicU32, expected: u32) {
        // SAFETY: both words outlive the call.
        unsafe { WaitOnAddress(word.as_ptr().cast(), (&raw const expected).cast(), 4, INFINITE) };
    }

    /// Wakes one thread that sleeps on `word`.
    pub(in super::super) fn wake_one(word: &AtomicU32) {
        // SAFETY: the system uses the address as a name only.
        unsafe { WakeByAddressSingle(word.as_ptr().cast()) };
    }

    /// A number for the calling thread, never 0, that no other living thread of the process has.
    pub(in super::super) fn thread_id() -> u32 {
        // SAFETY: takes nothing, gives a number.
        unsafe { GetCurrentThreadId() }
    }

    /// Whether the thread with this number still runs. If in doubt, it does.
    pub(in super::super) fn thread_lives(id: u32) -> bool {
        // SAFETY: the handle is closed again; numbers are passed by value.
        unsafe {
            let handle = OpenThread(THREAD_SYNCHRONIZE, 0, id);
            if handle.is_null() {
                // No such thread; or one of another process that we may not open, which has taken over the number.
                return false;
            }
            let ended = WaitForSingleObject(handle, 0) == WAIT_OBJECT_0;
            CloseHandle(handle);
            !ended
        }
    }
}
