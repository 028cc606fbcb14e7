//! The evictor against the real kernel: a userfaultfd of this process, a real ring, and the test in the daemon's place.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use fmalloc_proto::limits::{PAGE, PAGE_SIZE};
use fmalloc_proto::num::{to_u64, to_usize};
use fmalloc_proto::ring::{BatchKind, Layout, PageResult, Ring, STATE_DONE, STATE_REQUESTED};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{ftruncate, pipe, read};

use super::*;
use crate::sys::FEATURE_WRITE_PROTECT;

const BATCH_PAGES: u32 = 64;
const EVENT_REMAP: u64 = 1 << 2;
const EVENT_REMOVE: u64 = 1 << 3;
const EVENT_UNMAP: u64 = 1 << 6;
/// Messages, by their first byte.
pub(crate) const FAULT: u8 = 0x12;
pub(crate) const REMAP: u8 = 0x14;

/// A region, the agent's evictor, and the daemon's view of the ring.
pub(crate) struct Bench {
    pub(crate) base: *mut u8,
    pages: usize,
    pub(crate) evictor: Evictor,
    pub(crate) ring: Ring,
    pub(crate) uffd: Arc<Uffd>,
    reader: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
}

// SAFETY: the tests that share a bench between threads synchronise by themselves.
unsafe impl Sync for Bench {}

impl Bench {
    /// A region of `pages` pages, all present, each with its number in every word.
    fn new(pages: usize) -> Self {
        Self::with_features(pages, 0)
    }

    fn with_features(pages: usize, features: u64) -> Self {
        let mover = Mover::new(Uffd::create(None, true).unwrap(), layout()).unwrap();
        Self::with_method(pages, features, Method::Move(mover))
    }

    /// One whose pages are remapped. A thread reads messages and hands them on: somebody must, for pages to leave.
    pub(crate) fn remapping(pages: usize) -> (Self, Receiver<[u8; 32]>) {
        let remapper = Remapper::new(&Uffd::create(None, true).unwrap(), layout()).unwrap();
        let events = EVENT_REMAP | EVENT_REMOVE | EVENT_UNMAP;
        let mut bench = Self::with_method(pages, FEATURE_WRITE_PROTECT | events, Method::Remap(remapper));
        let (sender, messages) = channel();
        bench.hand_on(sender);
        (bench, messages)
    }

    /// Reads messages and hands them on.
    fn hand_on(&mut self, sender: Sender<[u8; 32]>) {
        let (uffd, stop) = (Arc::clone(&self.uffd), Arc::new(AtomicBool::new(false)));
        let over = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                let short = Duration::from_millis(20);
                sys::poll(&mut [sys::watch(Some(uffd.as_fd()), libc::POLLIN)], Some(short)).unwrap();
                let mut message = [0_u8; 32];
                while read(&*uffd, &mut message) == Ok(32) {
                    let _ = sender.send(message);
                }
            }
        });
        self.reader = Some((stop, thread));
    }

    fn with_method(pages: usize, features: u64, method: Method) -> Self {
        let layout = layout();
        let memory = memfd_create(c"ring", MFdFlags::MFD_CLOEXEC).unwrap();
        ftruncate(&memory, i64::try_from(layout.len()).unwrap()).unwrap();
        let ring = Ring::map(memory.as_fd(), layout).unwrap();
        ring.initialise();
        let base = map(ptr::null_mut(), pages, 0);
        let uffd = Arc::new(Uffd::create(None, true).unwrap());
        uffd.handshake(features).unwrap();
        let write_protect = matches!(method, Method::Remap(_));
        let agents = Ring::map(memory.as_fd(), layout).unwrap();
        assert!(agents.is_valid());
        let held = uffd.try_clone().unwrap();
        let evictor = Evictor::new(agents, method, held);
        let bench = Self { base, pages, evictor, ring, uffd, reader: None };
        for page in 0..pages {
            bench.fill(page, to_u64(page));
        }
        bench.uffd.register(bench.addr(0), to_u64(pages) * PAGE, write_protect).unwrap();
        bench
    }

    pub(crate) fn addr(&self, page: usize) -> u64 {
        to_u64(self.base.expose_provenance() + page * PAGE_SIZE)
    }

    pub(crate) fn word(&self, page: usize, word: usize) -> &AtomicU64 {
        assert!(page < self.pages && word < PAGE_SIZE / 8);
        // SAFETY: inside the mapping, aligned.
        unsafe { AtomicU64::from_ptr(self.base.add(page * PAGE_SIZE + word * 8).cast()) }
    }

    pub(crate) fn fill(&self, page: usize, value: u64) {
        for word in 0..PAGE_SIZE / 8 {
            self.word(page, word).store(value, Ordering::Relaxed);
        }
    }

    pub(crate) fn discard(&self, page: usize) {
        // SAFETY: the region is the test's.
        unsafe { sys::madvise(self.addr(page), PAGE, libc::MADV_DONTNEED) }.unwrap();
    }

    pub(crate) fn request(&self, batch: u32, kind: BatchKind, pages: &[usize]) {
        for (index, page) in (0..).zip(pages) {
            self.ring.set_addr(batch, index, self.addr(*page));
        }
        self.ring.set_request(batch, kind, u32::try_from(pages.len()).unwrap());
        self.ring.set_state(batch, STATE_REQUESTED);
    }

    /// Asks for some pages and gives what came of each.
    pub(crate) fn ask(&mut self, kind: BatchKind, pages: &[usize]) -> Vec<PageResult> {
        self.request(1, kind, pages);
        assert!(!self.evictor.serve(0));
        assert!(self.evictor.serve(1));
        assert_eq!(self.ring.state(1), STATE_DONE);
        self.results(1, pages.len())
    }

    pub(crate) fn results(&self, batch: u32, count: usize) -> Vec<PageResult> {
        let count = u32::try_from(count).unwrap();
        (0..count).map(|index| PageResult::from_number(self.ring.result(batch, index)).unwrap()).collect()
    }

    pub(crate) fn evict(&mut self, pages: &[usize]) -> Vec<PageResult> {
        self.ask(BatchKind::Evict, pages)
    }

    /// Bytes of an evicted page in the ring.
    fn evicted(&self, batch: u32, index: usize) -> [u8; PAGE_SIZE] {
        let mut page = [0; PAGE_SIZE];
        let from = self.ring.page(batch, u32::try_from(index).unwrap());
        // SAFETY: both are a page.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), page.as_mut_ptr(), PAGE_SIZE) };
        page
    }

    pub(crate) fn assert_evicted(&self, index: usize, value: u64) {
        let page = self.evicted(1, index);
        assert!(page.chunks_exact(8).all(|word| word == value.to_ne_bytes()), "page of value {value}");
    }

    pub(crate) fn is_there(&self, page: usize) -> bool {
        self.evictor.sight.is_there(self.addr(page)).unwrap()
    }

    fn mover(&self) -> &Mover {
        match &self.evictor.method {
            Method::Move(mover) => mover,
            Method::Remap(_) => panic!("another method"),
        }
    }

    pub(crate) fn staging_is_empty(&self) -> bool {
        let (start, len) = match &self.evictor.method {
            Method::Move(mover) => (mover.place(0, 0), 2 * u64::from(BATCH_PAGES) * PAGE),
            Method::Remap(remapper) => remapper.span(),
        };
        (start..start + len).step_by(PAGE_SIZE).all(|addr| self.evictor.sight.is_there(addr) == Some(false))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // While somebody reads its event.
        let _ = self.uffd.unregister(self.addr(0), to_u64(self.pages) * PAGE);
        if let Some((stop, reader)) = self.reader.take() {
            stop.store(true, Ordering::Relaxed);
            let _ = reader.join();
        }
        // SAFETY: the mapping is the test's.
        unsafe { libc::munmap(self.base.cast(), self.pages * PAGE_SIZE) };
    }
}

fn layout() -> Layout {
    Layout::new(2, BATCH_PAGES).unwrap()
}

/// Anonymous memory; at `at` if that is not null.
pub(crate) fn map(at: *mut u8, pages: usize, flags: i32) -> *mut u8 {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags;
    // SAFETY: fixed addresses are given only where the test has unmapped before.
    let base = unsafe { libc::mmap(at.cast(), pages * PAGE_SIZE, access, flags, -1, 0) };
    assert_ne!(base, libc::MAP_FAILED);
    // SAFETY: changes no content.
    unsafe { libc::madvise(base, pages * PAGE_SIZE, libc::MADV_NOHUGEPAGE) };
    base.cast()
}

pub(crate) fn protect(addr: u64, access: i32) {
    // SAFETY: the page is the test's.
    assert_eq!(unsafe { libc::mprotect(sys::pointer(addr), PAGE_SIZE, access) }, 0);
}

use PageResult::{Absent, Busy, Failed, Moved, Present, Protected, Refused};

#[test]
fn present_pages_move_with_their_bytes_and_absent_ones_are_told() {
    let mut bench = Bench::new(16);
    for page in [0, 3, 4, 9] {
        bench.discard(page);
    }
    let all: Vec<usize> = (0..16).collect();
    let results = bench.evict(&all);
    for (page, result) in results.iter().enumerate() {
        if [0, 3, 4, 9].contains(&page) {
            assert_eq!(*result, Absent, "page {page}");
        } else {
            assert_eq!(*result, Moved, "page {page}");
            bench.assert_evicted(page, to_u64(page));
        }
        assert!(!bench.is_there(page));
    }
    assert!(bench.staging_is_empty());
    assert_eq!(bench.evict(&all), [Absent; 16]);
}

#[test]
fn scattered_and_backward_pages_keep_their_places_in_the_batch() {
    let mut bench = Bench::new(64);
    let order = [60, 61, 5, 4, 3, 10, 12, 13, 14, 0];
    assert_eq!(bench.evict(&order), [Moved; 10]);
    for (index, page) in order.iter().enumerate() {
        bench.assert_evicted(index, to_u64(*page));
    }
    assert!(bench.is_there(11) && bench.is_there(62));
}

#[test]
fn nothing_leaves_once_the_batch_is_stopped() {
    let mut bench = Bench::new(8);
    bench.request(1, BatchKind::Evict, &[0, 1, 5]);
    bench.ring.stop(1);
    assert!(bench.evictor.serve(1));
    assert_eq!(bench.results(1, 3), [Failed; 3]);
    assert!([0, 1, 5].iter().all(|page| bench.is_there(*page)));
    assert_eq!(bench.evict(&[0, 1, 5]), [Moved; 3]);
}

#[test]
fn a_page_named_twice_moves_once() {
    let mut bench = Bench::new(4);
    assert_eq!(bench.evict(&[2, 2]), [Moved, Absent]);
    bench.assert_evicted(0, 2);
}

#[test]
fn hazard_11_protected_pages_are_refused_and_their_neighbours_move() {
    let mut bench = Bench::new(16);
    protect(bench.addr(5), libc::PROT_READ);
    protect(bench.addr(9), libc::PROT_NONE);
    bench.discard(11);
    protect(bench.addr(11), libc::PROT_READ);
    let all: Vec<usize> = (0..16).collect();
    let results = bench.evict(&all);
    for (page, result) in results.into_iter().enumerate() {
        match page {
            5 | 9 => assert_eq!(result, Refused),
            11 => assert_eq!(result, Absent),
            _ => {
                assert_eq!(result, Moved, "page {page}");
                bench.assert_evicted(page, to_u64(page));
            }
        }
    }
    assert_eq!(bench.word(5, 7).load(Ordering::Relaxed), 5);
    assert!(bench.staging_is_empty());
}

#[test]
fn hazard_11_locked_pages_are_refused() {
    let mut bench = Bench::new(8);
    // SAFETY: the page is the test's.
    assert_eq!(unsafe { libc::mlock(sys::pointer(bench.addr(2)), PAGE_SIZE) }, 0);
    let results = bench.evict(&[0, 1, 2, 3]);
    assert_eq!(results, [Moved, Moved, Refused, Moved]);
}

#[test]
fn hazard_01_pages_shared_with_a_living_child_are_made_exclusive_and_move() {
    let mut bench = Bench::new(8);
    let (wait, go) = pipe().unwrap();
    // SAFETY: the child only waits and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let mut byte = 0_u8;
        // SAFETY: as above.
        unsafe {
            libc::close(go.as_raw_fd());
            libc::read(wait.as_raw_fd(), (&raw mut byte).cast(), 1);
            libc::_exit(0);
        }
    }
    let results = bench.evict(&[0, 1, 2, 3]);
    drop(go);
    // SAFETY: waits for the child of this test.
    assert_eq!(unsafe { libc::waitpid(child, ptr::null_mut(), 0) }, child);
    assert_eq!(results, [Moved; 4]);
    for page in 0..4 {
        bench.assert_evicted(page, to_u64(page));
    }
    // Shared once, and the sharer has gone: looks shared still.
    assert_eq!(bench.evict(&[4, 5]), [Moved; 2]);
}

#[test]
fn hazard_01_pages_pinned_for_io_stay_and_go_later() {
    let mut bench = Bench::new(8);
    let mut params = [0_u8; 120];
    // SAFETY: the structure is as large as the kernel's.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    if ring < 0 {
        eprintln!("skipped: no io_uring here");
        return;
    }
    let buffer = libc::iovec { iov_base: sys::pointer(bench.addr(3)), iov_len: 2 * PAGE_SIZE };
    // SAFETY: registers two pages of the test's region (IORING_REGISTER_BUFFERS is 0).
    let registered = unsafe { libc::syscall(libc::SYS_io_uring_register, ring, 0, &raw const buffer, 1) };
    assert_eq!(registered, 0);
    let all: Vec<usize> = (0..8).collect();
    assert_eq!(bench.evict(&all), [Moved, Moved, Moved, Busy, Busy, Moved, Moved, Moved]);
    assert_eq!(bench.word(3, 0).load(Ordering::Relaxed), 3, "still there");
    // SAFETY: the ring is the test's.
    unsafe { libc::close(i32::try_from(ring).unwrap()) };
    let mut left = vec![3, 4];
    for _ in 0..1000 {
        let results = bench.evict(&left);
        for (index, result) in results.into_iter().enumerate().rev() {
            if result == Moved {
                bench.assert_evicted(index, to_u64(left.remove(index)));
            }
        }
        if left.is_empty() {
            return;
        }
        thread::sleep(std::time::Duration::from_millis(2));
    }
    panic!("pages {left:?} never became movable");
}

#[test]
fn hazard_04_memory_that_took_the_place_of_an_unmapped_part_is_left_alone() {
    let mut bench = Bench::new(8);
    let hole = bench.base.wrapping_add(2 * PAGE_SIZE);
    // SAFETY: the pages are the test's.
    assert_eq!(unsafe { libc::munmap(hole.cast(), 2 * PAGE_SIZE) }, 0);
    assert_eq!(map(hole, 2, libc::MAP_FIXED_NOREPLACE), hole);
    bench.fill(2, 1111);
    bench.fill(3, 2222);
    let results = bench.evict(&[0, 1, 2, 3, 4, 5]);
    assert_eq!(results, [Moved, Moved, Absent, Absent, Moved, Moved]);
    bench.assert_evicted(4, 4);
    for word in [0, 511] {
        assert_eq!(bench.word(2, word).load(Ordering::Relaxed), 1111);
        assert_eq!(bench.word(3, word).load(Ordering::Relaxed), 2222);
    }
    assert_eq!(bench.ask(BatchKind::Protect, &[2]), [Failed]);
    bench.fill(2, 3333);
}

#[test]
fn hazard_10_pages_stay_while_an_event_about_changed_mappings_is_unread() {
    let mut bench = Bench::with_features(8, EVENT_REMOVE);
    let addr = bench.addr(7);
    let remover = thread::spawn(move || {
        // SAFETY: the page is the test's.
        unsafe { sys::madvise(addr, PAGE, libc::MADV_DONTNEED) }.unwrap();
    });
    sys::poll(&mut [sys::watch(Some(bench.uffd.as_fd()), libc::POLLIN)], None).unwrap();
    assert_eq!(bench.evict(&[0, 1]), [Failed, Failed]);
    assert_eq!(bench.word(1, 0).load(Ordering::Relaxed), 1);
    let mut message = [0; 32];
    read(&*bench.uffd, &mut message).unwrap();
    remover.join().unwrap();
    assert_eq!(bench.evict(&[0, 1, 7]), [Moved, Moved, Absent]);
    // The region ends without anybody to read an event.
    let _ = bench.evict(&[2, 3, 4, 5, 6]);
}

#[test]
fn probe_tells_and_changes_nothing() {
    let mut bench = Bench::new(6);
    bench.discard(1);
    assert_eq!(bench.ask(BatchKind::Probe, &[0, 1, 2]), [Present, Absent, Present]);
    assert_eq!(bench.word(2, 0).load(Ordering::Relaxed), 2);
}

#[test]
fn protect_takes_access_away() {
    let mut bench = Bench::new(4);
    assert_eq!(bench.ask(BatchKind::Protect, &[1]), [Protected]);
    let (_reader, writer) = pipe().unwrap();
    let attempt = |page: usize| {
        // SAFETY: the kernel checks the access; that is what is asked.
        Errno::result(unsafe { libc::write(writer.as_raw_fd(), sys::pointer(bench.addr(page)), 8) })
    };
    assert_eq!(attempt(1), Err(Errno::EFAULT));
    assert_eq!(attempt(2), Ok(8));
}

#[test]
fn nonsense_from_the_other_side_is_survived() {
    let mut bench = Bench::new(4);
    bench.request(1, BatchKind::Evict, &[0, 1]);
    for (index, addr) in [(0, 0), (1, bench.addr(1) + 8), (2, u64::MAX - 7), (3, 1 << 50), (4, bench.addr(2))]
    {
        bench.ring.set_addr(1, index, addr);
    }
    bench.ring.set_request(1, BatchKind::Evict, u32::MAX);
    assert!(bench.evictor.serve(1));
    let results = bench.results(1, to_usize(BATCH_PAGES.into()));
    assert_eq!(results[4], Moved);
    assert!(results.iter().enumerate().all(|(index, result)| index == 4 || *result != Moved));
    assert!(bench.is_there(0) && bench.is_there(1) && bench.is_there(3));
}

#[test]
fn hazard_10_an_occupied_staging_place_is_never_emptied_and_not_used_again() {
    let mut bench = Bench::new(8);
    let taken = bench.mover().place(1, 2);
    bench.mover().occupy(1, 2);
    assert_eq!(bench.evict(&[0, 1, 2, 3]), [Moved, Moved, Failed, Moved]);
    assert_eq!(bench.word(2, 0).load(Ordering::Relaxed), 2, "the page stayed");
    assert_eq!(bench.evictor.sight.is_there(taken), Some(true), "so did what was in the way");
    assert_ne!(bench.mover().place(1, 2), taken);
    assert_eq!(bench.evict(&[4, 5, 2]), [Moved; 3]);
    bench.assert_evicted(2, 2);
}

#[test]
fn no_write_is_lost_while_pages_come_and_go() {
    let mut bench = Bench::new(STRESS_PAGES);
    let (sender, messages) = channel();
    bench.hand_on(sender);
    stress(bench, messages, 50_000);
}

pub(crate) const STRESS_PAGES: usize = 192;

/// Threads that write and check, while `enough` pages leave and come back.
pub(crate) fn stress(mut bench: Bench, messages: Receiver<[u8; 32]>, enough: u64) {
    const WRITERS: usize = 3;
    for page in 0..STRESS_PAGES {
        bench.fill(page, 0);
    }
    // Evicted pages. Its lock is held from before a page leaves until its bytes are in.
    let store: Arc<Mutex<HashMap<u64, [u8; PAGE_SIZE]>>> = Arc::default();
    let (over, done) = (AtomicBool::new(false), AtomicBool::new(false));
    let mut moved = 0_u64;
    let Bench { ref uffd, ref ring, ref mut evictor, base, pages, .. } = bench;
    let memory = base.expose_provenance();
    let start = to_u64(memory);
    thread::scope(|scope| {
        let over = &over;
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                scope.spawn(move || {
                    let mut shadow = vec![0_u64; pages];
                    let mut random = Random(7 + to_u64(writer));
                    let mut round = 0;
                    while !over.load(Ordering::Relaxed) {
                        round += 1;
                        let page = random.below(pages);
                        let at = ptr::with_exposed_provenance_mut::<u64>(
                            memory + page * PAGE_SIZE + writer * 1024,
                        );
                        // SAFETY: inside the region, aligned, and no other thread's word.
                        let word = unsafe { AtomicU64::from_ptr(at) };
                        assert_eq!(word.load(Ordering::Relaxed), shadow[page], "page {page}");
                        word.store(round, Ordering::Relaxed);
                        shadow[page] = round;
                    }
                })
            })
            .collect();
        let (stored, done) = (&store, &done);
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                let Ok(message) = messages.recv_timeout(Duration::from_millis(20)) else { continue };
                if message[0] != FAULT {
                    continue;
                }
                let addr = u64::from_ne_bytes(message[16..24].try_into().unwrap()) & !(PAGE - 1);
                match stored.lock().unwrap().remove(&addr) {
                    Some(page) => uffd.fill(addr, &page).unwrap(),
                    None => uffd.wake(addr).unwrap(),
                }
            }
        });
        let mut random = Random(99);
        while moved < enough && !writers.iter().any(|writer| writer.is_finished()) {
            let first = random.below(STRESS_PAGES - 16);
            let mut store = store.lock().unwrap();
            for index in 0..16 {
                ring.set_addr(0, index, start + (to_u64(first) + u64::from(index)) * PAGE);
            }
            ring.set_request(0, BatchKind::Evict, 16);
            ring.set_state(0, STATE_REQUESTED);
            assert!(evictor.serve(0));
            for index in 0..16 {
                if ring.result(0, index) == Moved as u32 {
                    let mut page = [0; PAGE_SIZE];
                    // SAFETY: both are a page.
                    unsafe {
                        ptr::copy_nonoverlapping(ring.page(0, index).as_ptr(), page.as_mut_ptr(), PAGE_SIZE);
                    }
                    assert!(store.insert(ring.addr(0, index), page).is_none(), "moved twice");
                    moved += 1;
                } else {
                    assert_eq!(ring.result(0, index), Absent as u32);
                }
            }
            drop(store);
            thread::yield_now();
        }
        over.store(true, Ordering::Relaxed);
        let ends: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        done.store(true, Ordering::Relaxed);
        ends.into_iter().for_each(|end| end.unwrap());
    });
}

/// xorshift: repeatable, and good enough to choose pages.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        to_usize(self.0 % to_u64(limit))
    }
}
