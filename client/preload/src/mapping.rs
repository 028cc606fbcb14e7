//! `mmap` and its kin as C knows them. Large private anonymous mappings are carved from the area of [`crate::maps`];
//! everything else goes to the kernel as it is, but for what it would do to paged memory.

use std::ffi::{c_int, c_void};
use std::ops::Range;

use fmalloc_client::PAGE_SIZE;
use libc::{EINVAL, ENOMEM};

use crate::inside::{self, Inside};
use crate::maps::{self, Split};
use crate::paging::{Paging, Way, paging, way};
use crate::raw;

/// Mappings below this size are not worth a conversation with the daemon.
const SMALLEST: usize = 128 << 10;
/// Hints below this address are more than hints: the program can use nothing else.
const LOW: usize = 4 << 30;

/// See mmap(2).
///
/// # Safety
/// As for the system call.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn mmap(
    addr: *mut c_void,
    len: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    // SAFETY: the caller's.
    let native = || unsafe { raw::mmap(addr, len, prot, flags, fd, offset) };
    if inside::is_inside() {
        return native();
    }
    let fixed = flags & (libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE) != 0;
    if fixed {
        return match touched(addr.addr(), len) {
            Some((paging, split)) => {
                let _inside = Inside::enter();
                let replace = flags & libc::MAP_FIXED_NOREPLACE != libc::MAP_FIXED_NOREPLACE;
                if is_pageable(prot, flags) && split.is_whole() {
                    paging.maps.map_fixed(split.inside, prot, replace)
                } else if replace {
                    paging.maps.map_foreign(split.inside, native)
                } else {
                    raw::set_errno(libc::EEXIST);
                    libc::MAP_FAILED
                }
            }
            None => native(),
        };
    }
    let low = !addr.is_null() && addr.addr() < LOW;
    if len < SMALLEST || len > isize::MAX.cast_unsigned() || low || !is_pageable(prot, flags) {
        return native();
    }
    match way(len) {
        Way::Paged(paging) => {
            let _inside = Inside::enter();
            let mapped = paging.maps.map(len, prot);
            // Addresses alone cost no memory, and more may be wanted than the area has.
            if mapped == libc::MAP_FAILED && prot == libc::PROT_NONE { native() } else { mapped }
        }
        Way::Next => native(),
        Way::Refused => {
            raw::set_errno(ENOMEM);
            libc::MAP_FAILED
        }
    }
}

/// [`mmap`] under its other name.
///
/// # Safety
/// As [`mmap`].
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn mmap64(
    addr: *mut c_void,
    len: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    // SAFETY: the caller's.
    unsafe { mmap(addr, len, prot, flags, fd, offset) }
}

/// See munmap(2).
///
/// # Safety
/// As for the system call.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn munmap(addr: *mut c_void, len: usize) -> c_int {
    // SAFETY: the caller's.
    let native = |addr: usize, len| unsafe { raw::munmap(std::ptr::with_exposed_provenance_mut(addr), len) };
    each(addr.addr(), len, native, |paging, range| match range {
        Part::Maps(pages) => paging.maps.unmap(pages),
        // The heap's memory is not the program's to unmap.
        Part::Heap(_) => raw::fail(EINVAL),
    })
}

/// See mprotect(2).
///
/// # Safety
/// As for the system call.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn mprotect(addr: *mut c_void, len: usize, prot: c_int) -> c_int {
    let native =
        // SAFETY: the caller's.
        |addr: usize, len| unsafe { raw::mprotect(std::ptr::with_exposed_provenance_mut(addr), len, prot) };
    each(addr.addr(), len, native, |paging, range| match range {
        Part::Maps(pages) => paging.maps.protect(pages, prot),
        Part::Heap(bytes) => native(paging.heap_start() + bytes.start, bytes.len()),
    })
}

/// See madvise(2).
///
/// # Safety
/// As for the system call.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn madvise(addr: *mut c_void, len: usize, advice: c_int) -> c_int {
    let native =
        // SAFETY: the caller's.
        |addr: usize, len| unsafe { raw::madvise(std::ptr::with_exposed_provenance_mut(addr), len, advice) };
    each(addr.addr(), len, native, |paging, range| match range {
        Part::Maps(pages) => paging.maps.advise(pages, advice),
        Part::Heap(bytes) => maps::advise(&paging.heap.backing().0, bytes, advice),
    })
}

/// See mremap(2). The last argument is there only with MREMAP_FIXED or MREMAP_DONTUNMAP; without them it is not looked
/// at.
///
/// # Safety
/// As for the system call.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn mremap(
    old: *mut c_void,
    old_len: usize,
    len: usize,
    flags: c_int,
    new: *mut c_void,
) -> *mut c_void {
    // SAFETY: the caller's.
    let native = || unsafe { raw::mremap(old, old_len, len, flags, new) };
    if inside::is_inside() {
        return native();
    }
    let fixed = flags & (libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP) != 0;
    let Some((paging, split)) = touched(old.addr(), old_len.max(1)) else {
        let target = if fixed { touched(new.addr(), len) } else { None };
        return match target {
            Some((paging, split)) => {
                let _inside = Inside::enter();
                paging.maps.map_foreign(split.inside, native)
            }
            None => native(),
        };
    };
    if fixed || old_len == 0 || !split.is_whole() || !old.addr().is_multiple_of(PAGE_SIZE) {
        // What is left of a move is unknown to nobody only if the program copies itself.
        raw::set_errno(EINVAL);
        return libc::MAP_FAILED;
    }
    let _inside = Inside::enter();
    paging.maps.remap(split.inside, len.div_ceil(PAGE_SIZE), flags & libc::MREMAP_MAYMOVE != 0)
}

/// Paged memory that a call is about.
enum Part {
    /// Pages of the area.
    Maps(Range<usize>),
    /// Bytes of the heap's region.
    Heap(Range<usize>),
}

/// Does `ours` for the paged part of a range, `native` for the rest; gives the first failure.
fn each(
    addr: usize,
    len: usize,
    native: impl Fn(usize, usize) -> c_int,
    ours: impl Fn(&Paging, Part) -> c_int,
) -> c_int {
    if inside::is_inside() || !addr.is_multiple_of(PAGE_SIZE) || len == 0 {
        return native(addr, len);
    }
    let Some(paging) = paging() else { return native(addr, len) };
    if let Some(split) = paging.maps.split(addr, len) {
        let _inside = Inside::enter();
        let [before, behind] = split.outside;
        for (addr, len) in [before, behind] {
            if len > 0 && native(addr, len) != 0 {
                return -1;
            }
        }
        return ours(paging, Part::Maps(split.inside));
    }
    let whole = len.next_multiple_of(PAGE_SIZE);
    match paging.heap_range(addr, whole) {
        Some(bytes) => {
            let _inside = Inside::enter();
            ours(paging, Part::Heap(bytes))
        }
        None => native(addr, len),
    }
}

/// The part of a range that is in the area of a paged process.
fn touched(addr: usize, len: usize) -> Option<(&'static Paging, Split)> {
    let paging = paging()?;
    Some((paging, paging.maps.split(addr, len)?))
}

/// Whether a mapping is such that it can be paged: private, anonymous, in ordinary pages, not for code or stacks.
fn is_pageable(prot: c_int, flags: c_int) -> bool {
    let wanted = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let unwanted =
        libc::MAP_GROWSDOWN | libc::MAP_HUGETLB | libc::MAP_32BIT | libc::MAP_LOCKED | libc::MAP_STACK;
    flags & (libc::MAP_TYPE | wanted | unwanted) == wanted && prot & libc::PROT_EXEC == 0
}
