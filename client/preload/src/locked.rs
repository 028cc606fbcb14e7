//! `mlock` and its kin. A locked page cannot be evicted: a little may be locked, as for secrets, the rest of paged memory
//! never is. `mlockall` locks everything else: who runs a program by `fmallocctl run` wants it paged.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use libc::ENOMEM;

use crate::inside::{self, Inside};
use crate::paging::paging;
use crate::raw;

/// Bytes of paged memory that were locked; pages that were locked twice count twice.
static LOCKED: AtomicUsize = AtomicUsize::new(0);

/// The flags of `mlockall` that hold for mappings to come; 0 if they are not locked.
static FUTURE: AtomicI32 = AtomicI32::new(0);

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
    let onfault = flags & libc::MCL_ONFAULT;
    let future = if flags & libc::MCL_FUTURE == 0 { 0 } else { libc::MCL_FUTURE | onfault };
    if paging().is_none() || inside::is_inside() {
        let locked = raw::mlockall(flags);
        if locked == 0 {
            FUTURE.store(future, Ordering::Relaxed);
        }
        return locked;
    }
    let _inside = Inside::enter();
    if future != 0 && raw::mlockall(future) != 0 {
        return -1;
    }
    FUTURE.store(future, Ordering::Relaxed);
    if flags & libc::MCL_CURRENT != 0 {
        lock_the_rest(if onfault == 0 { 0 } else { libc::MLOCK_ONFAULT.cast_signed() })
    } else {
        0
    }
}

/// See munlockall(2).
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn munlockall() -> c_int {
    LOCKED.store(0, Ordering::Relaxed);
    FUTURE.store(0, Ordering::Relaxed);
    raw::munlockall()
}

/// Lets what is mapped until the value is dropped be unlocked, whatever the program has asked for: the regions of a
/// process that begins to be paged, and the memory that pages pass through.
#[derive(Debug)]
pub(crate) struct Unlocked(c_int);

impl Unlocked {
    pub(crate) fn begin() -> Self {
        let future = FUTURE.load(Ordering::Relaxed);
        if future != 0 {
            // The kernel has no call for this alone. What is mapped stays locked, or is from its next use on.
            raw::mlockall(libc::MCL_CURRENT | libc::MCL_ONFAULT);
        }
        Self(future)
    }
}

impl Drop for Unlocked {
    fn drop(&mut self) {
        if self.0 != 0 {
            raw::mlockall(self.0);
        }
    }
}

/// A forked child inherits no locks.
pub(crate) fn forget() {
    LOCKED.store(0, Ordering::Relaxed);
    FUTURE.store(0, Ordering::Relaxed);
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

/// Locks all mappings but those that a userfaultfd serves, as far as the kernel lets: the paged ones, and the agent's
/// place for pages on their way out.
fn lock_the_rest(flags: c_int) -> c_int {
    let Ok(list) = std::fs::read_to_string("/proc/self/smaps") else { return raw::fail(ENOMEM) };
    let mut current = None;
    for line in list.lines() {
        if let Some(words) = line.strip_prefix("VmFlags:") {
            let served = words.split(' ').any(|word| word == "um");
            let Some((start, len)) = current.filter(|_| !served) else { continue };
            // Pages of the kernel, and those that nobody may touch, cannot be locked.
            if raw::mlock(std::ptr::with_exposed_provenance(start), len, flags) != 0
                && raw::errno() == libc::EAGAIN
            {
                return raw::fail(ENOMEM);
            }
        } else if let Some((start, end)) = range(line) {
            current = Some((start, end - start));
        }
    }
    0
}

fn range(line: &str) -> Option<(usize, usize)> {
    let (start, rest) = line.split_once('-')?;
    let end = rest.split(' ').next()?;
    Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_line_of_a_mapping_has_its_range() {
        assert_eq!(range("7f00-7fff rw-p 00000000 00:00 0 "), Some((0x7f00, 0x7fff)));
        for line in ["Rss:                   4 kB", "VmFlags: rd wr", "Private_Dirty: 0 kB", ""] {
            assert_eq!(range(line), None, "{line}");
        }
    }
}
