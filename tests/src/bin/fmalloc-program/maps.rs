//! `mmap` and its kin, on memory that is paged.

use std::ffi::{c_int, c_void};
use std::ptr;

use libc::{MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_PRIVATE, PROT_NONE, PROT_READ, PROT_WRITE};

use crate::block::{self, Block, MIB};

const PAGE: usize = 4096;
const PLAIN: c_int = MAP_PRIVATE | MAP_ANONYMOUS;
const READ_WRITE: c_int = PROT_READ | PROT_WRITE;

fn map(len: usize, prot: c_int) -> *mut c_void {
    // SAFETY: a new mapping at a place of the kernel's choice.
    let start = unsafe { libc::mmap(ptr::null_mut(), len, prot, PLAIN, -1, 0) };
    assert_ne!(start, MAP_FAILED);
    start
}

fn words<'a>(start: *mut c_void, len: usize) -> &'a mut [u64] {
    // SAFETY: callers pass mappings that they may write to.
    unsafe { std::slice::from_raw_parts_mut(start.cast(), len / 8) }
}

fn fill(start: *mut c_void, len: usize, seed: usize) {
    block::fill(words(start, len), seed);
}

fn check(start: *mut c_void, len: usize, seed: usize) {
    block::check(words(start, len), seed);
}

fn is_zero(start: *mut c_void, len: usize) -> bool {
    words(start, len).iter().all(|word| *word == 0)
}

fn ok(status: c_int) {
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
}

/// A file of the system's is enough to tell whose bytes they are.
fn file() -> std::fs::File {
    std::fs::File::open(std::env::current_exe().unwrap()).unwrap()
}

pub(crate) fn all() {
    // Enough to be paged from here on.
    let ballast: Vec<*mut c_void> = (0..48)
        .map(|n| {
            let start = map(MIB, READ_WRITE);
            fill(start, MIB, n);
            start
        })
        .collect();
    // SAFETY: mappings of this function, which no reference is kept to.
    unsafe {
        partly_unmapped();
        grown();
        protected();
        advised();
        mapped_over();
    }
    for (n, start) in ballast.into_iter().enumerate() {
        check(start, MIB, n);
        // SAFETY: a mapping of ours.
        ok(unsafe { libc::munmap(start, MIB) });
    }
}

unsafe fn partly_unmapped() {
    let start = map(8 * MIB, READ_WRITE);
    fill(start, 8 * MIB, 100);
    // SAFETY: parts of the mapping.
    unsafe {
        ok(libc::munmap(start.byte_add(2 * MIB), MIB));
        ok(libc::munmap(start.byte_add(5 * MIB), 3 * MIB));
    }
    block::check(&words(start, 8 * MIB)[..2 * MIB / 8], 100);
    for page in 3 * MIB / PAGE..5 * MIB / PAGE {
        let words = &words(start, 8 * MIB)[page * 512..(page + 1) * 512];
        fmalloc_tests::pattern::check(100, page as u64, words).unwrap();
    }
    // SAFETY: what is left of it, and what is not mapped any more besides.
    ok(unsafe { libc::munmap(start, 8 * MIB) });
    let again = map(8 * MIB, READ_WRITE);
    assert!(is_zero(again, 8 * MIB), "a new mapping has old bytes");
    // SAFETY: the mapping.
    ok(unsafe { libc::munmap(again, 8 * MIB) });
}

unsafe fn grown() {
    let mut start = map(MIB, READ_WRITE);
    fill(start, MIB, 200);
    let mut len = MIB;
    for _ in 0..5 {
        let obstacle = map(256 * 1024, READ_WRITE);
        // SAFETY: the mapping, which moves.
        start = unsafe { libc::mremap(start, len, len * 2, libc::MREMAP_MAYMOVE) };
        assert_ne!(start, MAP_FAILED);
        check(start, MIB, 200);
        assert!(is_zero(start.wrapping_byte_add(len), len));
        len *= 2;
        // SAFETY: a mapping of ours.
        ok(unsafe { libc::munmap(obstacle, 256 * 1024) });
    }
    // SAFETY: the mapping, which shrinks.
    unsafe {
        assert_eq!(libc::mremap(start, len, MIB, 0), start);
        check(start, MIB, 200);
        ok(libc::munmap(start, MIB));
    }
}

unsafe fn protected() {
    let start = map(2 * MIB, PROT_NONE);
    // SAFETY: parts of the mapping.
    unsafe {
        ok(libc::mprotect(start, MIB, READ_WRITE));
        fill(start, MIB, 300);
        ok(libc::mprotect(start, MIB, PROT_READ));
        check(start, MIB, 300);
        ok(libc::mprotect(start, MIB, PROT_NONE));
        ok(libc::mprotect(start, 2 * MIB, READ_WRITE));
        check(start, MIB, 300);
        assert!(is_zero(start.byte_add(MIB), MIB));
        ok(libc::munmap(start, 2 * MIB));
        assert_eq!(libc::mprotect(start, MIB, PROT_READ), -1, "it is unmapped");
    }
}

unsafe fn advised() {
    let start = map(4 * MIB, READ_WRITE);
    fill(start, 4 * MIB, 400);
    // SAFETY: parts of the mapping, whose content is not needed where it is dropped.
    unsafe {
        for advice in [
            libc::MADV_SEQUENTIAL,
            libc::MADV_RANDOM,
            libc::MADV_WILLNEED,
            libc::MADV_COLD,
            libc::MADV_HUGEPAGE,
            libc::MADV_DONTDUMP,
            libc::MADV_NORMAL,
        ] {
            ok(libc::madvise(start, 4 * MIB, advice));
        }
        check(start, 4 * MIB, 400);
        ok(libc::madvise(start, MIB, libc::MADV_DONTNEED));
        ok(libc::madvise(start.byte_add(MIB), MIB, libc::MADV_FREE));
        assert!(is_zero(start, MIB));
        // Of the heap's memory as well.
        let mut place = Block::from_raw(libc::aligned_alloc(PAGE, 2 * MIB), 2 * MIB).unwrap();
        place.fill(1);
        ok(libc::madvise(place.as_ptr(), MIB, libc::MADV_DONTNEED));
        assert!(is_zero(place.as_ptr(), MIB));
    }
    for page in 2 * MIB / PAGE..4 * MIB / PAGE {
        let words = &words(start, 4 * MIB)[page * 512..(page + 1) * 512];
        fmalloc_tests::pattern::check(400, page as u64, words).unwrap();
    }
    // SAFETY: the mapping.
    ok(unsafe { libc::munmap(start, 4 * MIB) });
}

/// Memory and a file mapped over a part, and memory again.
unsafe fn mapped_over() {
    let start = map(4 * MIB, READ_WRITE);
    fill(start, 4 * MIB, 500);
    let over = start.wrapping_byte_add(MIB);
    // SAFETY: a part of the mapping is replaced.
    unsafe {
        assert_eq!(libc::mmap(over, MIB, READ_WRITE, PLAIN | MAP_FIXED, -1, 0), over);
        assert!(is_zero(over, MIB));
        fill(over, MIB, 501);
        check(over, MIB, 501);
        let file = file();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        assert_eq!(libc::mmap(over, PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, fd, 0), over);
        assert_eq!(*over.cast::<[u8; 4]>(), *b"\x7fELF");
        assert_eq!(libc::mmap(over, MIB, READ_WRITE, PLAIN | MAP_FIXED, -1, 0), over);
        assert!(is_zero(over, MIB));
    }
    check(start, MIB, 500);
    for page in 2 * MIB / PAGE..4 * MIB / PAGE {
        let words = &words(start, 4 * MIB)[page * 512..(page + 1) * 512];
        fmalloc_tests::pattern::check(500, page as u64, words).unwrap();
    }
    // SAFETY: the mapping.
    ok(unsafe { libc::munmap(start, 4 * MIB) });
}

/// A large reservation, of which parts are used as a language's runtime does.
pub(crate) fn reserve() {
    const ALL: usize = 1 << 30;
    let start = map(ALL, PROT_NONE);
    for n in 0..64 {
        let part = start.wrapping_byte_add(n * 16 * MIB);
        // SAFETY: parts of the reservation.
        unsafe {
            if n % 2 == 0 {
                ok(libc::mprotect(part, MIB, READ_WRITE));
            } else {
                assert_eq!(libc::mmap(part, MIB, READ_WRITE, PLAIN | MAP_FIXED, -1, 0), part);
            }
        }
        fill(part, MIB, n);
    }
    for n in 0..64 {
        check(start.wrapping_byte_add(n * 16 * MIB), MIB, n);
    }
    // SAFETY: the reservation.
    ok(unsafe { libc::munmap(start, ALL) });
}
