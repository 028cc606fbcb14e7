//! `mlock` and its kin. A locked page cannot be evicted: a little may be locked, as for secrets, the rest of paged memory
//! never is. `mlockall` locks everything else: who runs a program by `fmallocctl run` wants it paged.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

use libc::ENOMEM;

use crate::inside::{self, Inside};
use crate::paging::{Paging, paging};
use crate::raw;

/// Bytes of paged memory that were locked; pages that were locked twice count twice.
static LOCKED: AtomicUsize = AtomicUsize::new(0);

/// See mlock(2).
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn mlock(addr: *const c_void, len: usize) -> c_int {
    lock(addr, len, 0)
}

/// See mlock2(2).
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn mlock2(addr: *const c_void, len: usize, flags: c_uint) -> c_int {
    lock(addr, len, flags.cast_signed())
}

/// See munlock(2).
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn munlock(addr: *const c_void, len: usize) -> c_int {
    let unlocked = raw::munlock(addr, len);
    if unlocked == 0 && paging().is_some_and(|paging| paging.is_paged(addr.addr(), len)) {
        let _ =
            LOCKED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |sum| Some(sum.saturating_sub(len)));
    }
    unlocked
}

/// See mlockall(2).
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn mlockall(flags: c_int) -> c_int {
    let all = |flags: c_int| {
        // SAFETY: changes no content.
        if unsafe { libc::syscall(libc::SYS_mlockall, flags) } == 0 { 0 } else { -1 }
    };
    let Some(paging) = paging().filter(|_| !inside::is_inside()) else { return all(flags) };
    let _inside = Inside::enter();
    let onfault = flags & libc::MCL_ONFAULT;
    if flags & libc::MCL_FUTURE != 0 && all(libc::MCL_FUTURE | onfault) != 0 {
        return -1;
    }
    if flags & libc::MCL_CURRENT != 0 {
        lock_the_rest(paging, if onfault == 0 { 0 } else { libc::MLOCK_ONFAULT.cast_signed() })
    } else {
        0
    }
}

/// See munlockall(2).
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn munlockall() -> c_int {
    LOCKED.store(0, Ordering::Relaxed);
    // SAFETY: changes no content.
    if unsafe { libc::syscall(libc::SYS_munlockall) } == 0 { 0 } else { -1 }
}

fn lock(addr: *const c_void, len: usize, flags: c_int) -> c_int {
    let paged = paging().filter(|paging| paging.is_paged(addr.addr(), len));
    let Some(paging) = paged else { return raw::mlock(addr, len, flags) };
    let most = usize::try_from(paging.pager.budget() / 4).unwrap_or(usize::MAX);
    let sum = LOCKED.fetch_add(len, Ordering::Relaxed).saturating_add(len);
    let locked = if sum <= most { raw::mlock(addr, len, flags) } else { raw::fail(ENOMEM) };
    if locked != 0 {
        LOCKED.fetch_sub(len, Ordering::Relaxed);
    }
    locked
}

/// Locks all mappings but the paged ones, as far as the kernel lets.
fn lock_the_rest(paging: &Paging, flags: c_int) -> c_int {
    let Ok(list) = std::fs::read_to_string("/proc/self/maps") else { return raw::fail(ENOMEM) };
    for line in list.lines() {
        let Some((start, end)) = range(line) else { continue };
        // Pages of the kernel, and those that nobody may touch, cannot be locked.
        let accessible =
            !line.contains(" ---p ") && !line.ends_with("[vsyscall]") && !line.ends_with("[vvar]");
        if accessible && !paging.is_paged(start, end - start) {
            let start = std::ptr::with_exposed_provenance(start);
            if raw::mlock(start, end - start.addr(), flags) != 0 && raw::errno() == libc::EAGAIN {
                return raw::fail(ENOMEM);
            }
        }
    }
    0
}

fn range(line: &str) -> Option<(usize, usize)> {
    let (start, rest) = line.split_once('-')?;
    let end = rest.split(' ').next()?;
    Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
}
