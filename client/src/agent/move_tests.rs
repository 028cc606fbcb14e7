//! UFFDIO_MOVE alone, without the agent around it: what the kernel promises, put to the test with threads that write,
//! fault and pin beside it. After every round each page is in one place, and in one only.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use fmalloc_proto::limits::{PAGE, PAGE_SIZE};
use fmalloc_proto::num::{to_u64, to_usize};
use nix::errno::Errno;
use nix::sys::uio::pread;
use nix::unistd::read;

use super::evict::tests::{FAULT, map};
use super::sight::PAGEMAP_THERE;
use crate::sys::{self, Uffd};

const PAGES: usize = 256;
const ROUNDS: u64 = 10_000;
/// Most pages of one call.
const MOST: usize = 32;
/// Staging areas, used in turn.
const AREAS: usize = 8;
const WRITERS: usize = 2;
/// The word of a page that holds its number.
const TAG: usize = 511;

/// Moved pages by number. Its lock is held from before a page leaves until its bytes are in.
type Store = Mutex<HashMap<usize, Box<[u8; PAGE_SIZE]>>>;

/// A range of pages registered with a userfaultfd.
struct Range {
    base: *mut u8,
    pages: usize,
    uffd: Uffd,
}

// SAFETY: the threads of the test use atomics, and system calls.
unsafe impl Sync for Range {}

impl Range {
    fn new(pages: usize) -> Self {
        let uffd = Uffd::create(None, true).unwrap();
        uffd.handshake(0).unwrap();
        let range = Self { base: map(ptr::null_mut(), pages, 0), pages, uffd };
        range.uffd.register(range.addr(0), to_u64(pages) * PAGE, false).unwrap();
        range
    }

    fn addr(&self, page: usize) -> u64 {
        to_u64(self.base.expose_provenance() + page * PAGE_SIZE)
    }

    fn word(&self, page: usize, word: usize) -> &AtomicU64 {
        assert!(page < self.pages && word < PAGE_SIZE / 8);
        // SAFETY: inside the mapping, aligned.
        unsafe { AtomicU64::from_ptr(self.base.add(page * PAGE_SIZE + word * 8).cast()) }
    }

    /// Which pages are present.
    fn present(&self, pagemap: &OwnedFd) -> Vec<bool> {
        let mut entries = vec![0; self.pages * 8];
        let offset = i64::try_from(self.addr(0) / PAGE * 8).unwrap();
        assert_eq!(pread(pagemap, &mut entries, offset), Ok(entries.len()));
        let there = |entry: &[u8]| u64::from_ne_bytes(entry.try_into().unwrap()) & PAGEMAP_THERE != 0;
        entries.chunks_exact(8).map(there).collect()
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        // SAFETY: the mapping is the test's.
        unsafe { libc::munmap(self.base.cast(), self.pages * PAGE_SIZE) };
    }
}

/// Answers faults on the region from the store, as a daemon would.
fn serve(region: &Range, store: &Store, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        let short = Duration::from_millis(20);
        sys::poll(&mut [sys::watch(Some(region.uffd.as_fd()), libc::POLLIN)], Some(short)).unwrap();
        let mut message = [0_u8; 32];
        while read(&region.uffd, &mut message) == Ok(32) {
            assert_eq!(message[0], FAULT);
            let addr = u64::from_ne_bytes(message[16..24].try_into().unwrap()) & !(PAGE - 1);
            let page = to_usize((addr - region.addr(0)) / PAGE);
            match store.lock().unwrap().remove(&page) {
                Some(bytes) => region.uffd.fill(addr, &bytes).unwrap(),
                None => region.uffd.wake(addr).unwrap(),
            }
        }
    }
}

/// Counts up in its own word of random pages, and knows what must be there.
fn write(region: &Range, writer: usize, over: &AtomicBool) {
    let (mut shadow, mut random) = (vec![0_u64; PAGES], Random(7 + to_u64(writer)));
    while !over.load(Ordering::Relaxed) {
        let page = random.below(PAGES);
        let word = region.word(page, writer * 64);
        assert_eq!(word.load(Ordering::Relaxed), shadow[page], "page {page}");
        assert_eq!(region.word(page, TAG).load(Ordering::Relaxed), to_u64(page));
        shadow[page] += 1;
        word.store(shadow[page], Ordering::Relaxed);
    }
    for (page, expected) in shadow.into_iter().enumerate() {
        assert_eq!(
            region.word(page, writer * 64).load(Ordering::Relaxed),
            expected,
            "page {page} at the end"
        );
    }
}

/// Pins and unpins random pages by registering them as a buffer of io_uring, which brings in those that are absent.
fn pin(region: &Range, ring: &OwnedFd, over: &AtomicBool) -> u64 {
    let (mut random, mut pins) = (Random(3), 0);
    while !over.load(Ordering::Relaxed) {
        let (page, count) = (random.below(PAGES - 4), 1 + random.below(4));
        let buffer = libc::iovec { iov_base: sys::pointer(region.addr(page)), iov_len: count * PAGE_SIZE };
        // SAFETY: pages of the region, pinned until the next call (IORING_REGISTER_BUFFERS is 0).
        let pinned =
            unsafe { libc::syscall(libc::SYS_io_uring_register, ring.as_raw_fd(), 0, &raw const buffer, 1) };
        assert_eq!(pinned, 0, "{}", Errno::last());
        for page in page..page + count {
            // What a pinned page holds is written to the page that is there, not to one that has left.
            region.word(page, WRITERS * 64).fetch_add(1, Ordering::Relaxed);
        }
        thread::sleep(Duration::from_micros(200));
        // SAFETY: unpins (IORING_UNREGISTER_BUFFERS is 1).
        let unpinned =
            unsafe { libc::syscall(libc::SYS_io_uring_register, ring.as_raw_fd(), 1, ptr::null::<u8>(), 0) };
        assert_eq!(unpinned, 0, "{}", Errno::last());
        pins += 1;
    }
    pins
}

/// What came of the calls.
#[derive(Debug, Default)]
struct Tally {
    moved: u64,
    absent: u64,
    busy: u64,
    again: u64,
}

/// Moves one run into a staging area and its bytes into the store. The caller holds the store's lock.
fn move_run(
    region: &Range,
    staging: &Range,
    pagemap: &OwnedFd,
    store: &mut HashMap<usize, Box<[u8; PAGE_SIZE]>>,
    (first, count, area): (usize, usize, usize),
    tally: &mut Tally,
) {
    let (mut done, mut tries, mut taken) = (0, 0, Vec::new());
    while done < count {
        let (page, place) = (first + done, area * MOST + done);
        // SAFETY: faults on the region are answered with the bytes taken; the staging area is the test's.
        let outcome = unsafe {
            staging.uffd.move_pages(staging.addr(place), region.addr(page), to_u64(count - done) * PAGE)
        };
        match outcome {
            Ok(bytes) => {
                let pages = to_usize(bytes / PAGE);
                assert!((1..=count - done).contains(&pages));
                taken.extend((0..pages).map(|n| (page + n, place + n)));
                (done, tries) = (done + pages, 0);
                continue;
            }
            Err(Errno::ENOENT) => {
                assert!(store.contains_key(&page), "page {page} is neither in the region nor in the store");
                tally.absent += 1;
            }
            Err(Errno::EBUSY) => tally.busy += 1,
            Err(Errno::EAGAIN) if tries < 100 => {
                tries += 1;
                continue;
            }
            Err(Errno::EAGAIN) => tally.again += 1,
            Err(errno) => panic!("page {page} to {place}: {errno}; staging {:?}", staging.present(pagemap)),
        }
        (done, tries) = (done + 1, 0);
    }
    let (here, there) = (region.present(pagemap), staging.present(pagemap));
    for (page, place) in taken {
        assert!(!here[page] && there[place], "page {page} was moved: {} {}", here[page], there[place]);
        assert_eq!(staging.word(place, TAG).load(Ordering::Relaxed), to_u64(page), "another page");
        let mut bytes = Box::new([0; PAGE_SIZE]);
        // SAFETY: a page of the staging area that is present, and one of our own.
        unsafe {
            ptr::copy_nonoverlapping(staging.base.add(place * PAGE_SIZE), bytes.as_mut_ptr(), PAGE_SIZE);
        }
        assert!(store.insert(page, bytes).is_none(), "page {page} was moved twice");
        tally.moved += 1;
    }
    let used = area * MOST..(area + 1) * MOST;
    let arrived = there[used.clone()].iter().filter(|there| **there).count();
    assert!(arrived <= count, "more has arrived than was asked for");
    // SAFETY: the staging area is the test's, and its bytes are in the store.
    unsafe { sys::madvise(staging.addr(used.start), to_u64(MOST) * PAGE, libc::MADV_DONTNEED) }.unwrap();
}

/// Ends the threads beside the test, also when it fails: what faults then is nobody's any more.
struct End<'a>(&'a Range, &'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.1.store(true, Ordering::Relaxed);
        if thread::panicking() {
            let _ = self.0.uffd.unregister(self.0.addr(0), to_u64(PAGES) * PAGE);
        }
    }
}

#[test]
fn hazard_01_move_alone_loses_and_doubles_no_page_in_ten_thousand_rounds() {
    let (region, staging) = (Range::new(PAGES), Range::new(AREAS * MOST));
    let mut params = [0_u8; 120];
    // SAFETY: the structure is as large as the kernel's.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    // SAFETY: the kernel has just made this descriptor for us.
    let ring = i32::try_from(ring).ok().filter(|fd| *fd >= 0).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    if ring.is_none() {
        eprintln!("no io_uring here: nothing is pinned");
    }
    let pagemap = OwnedFd::from(std::fs::File::open("/proc/self/pagemap").unwrap());
    let store = Store::default();
    // Pages come into being as the daemon makes them.
    for page in 0..PAGES {
        let mut bytes = [0; PAGE_SIZE];
        bytes[TAG * 8..].copy_from_slice(&to_u64(page).to_ne_bytes());
        region.uffd.fill(region.addr(page), &bytes).unwrap();
    }
    let (over, answered) = (AtomicBool::new(false), AtomicBool::new(false));
    let mut tally = Tally::default();
    let pins = thread::scope(|scope| {
        let (region, staging, store, over, answered) = (&region, &staging, &store, &over, &answered);
        let ended = End(region, answered);
        let end = End(region, over);
        scope.spawn(move || serve(region, store, answered));
        let writers: Vec<_> =
            (0..WRITERS).map(|writer| scope.spawn(move || write(region, writer, over))).collect();
        let pinner = ring.as_ref().map(|ring| scope.spawn(move || pin(region, ring, over)));
        let mut random = Random(99);
        for round in 0..ROUNDS {
            if writers.iter().any(|writer| writer.is_finished()) {
                break;
            }
            let count = 1 + random.below(MOST);
            let (first, area) = (random.below(PAGES - count + 1), to_usize(round) % AREAS);
            {
                let mut held = store.lock().unwrap();
                move_run(region, staging, &pagemap, &mut held, (first, count, area), &mut tally);
                for (page, present) in region.present(&pagemap).into_iter().enumerate() {
                    let stored = held.contains_key(&page);
                    assert!(
                        present != stored,
                        "round {round}, page {page}: present {present}, stored {stored}"
                    );
                }
            }
            thread::yield_now();
        }
        drop(end);
        let writers: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        let pins = pinner.map_or(Ok(0), |pinner| pinner.join());
        drop(ended);
        writers.into_iter().for_each(|writer| writer.unwrap());
        pins.unwrap()
    });
    println!("{tally:?}, {pins} pins");
    assert!(tally.moved > ROUNDS, "{tally:?}");
    assert!(pins == 0 || tally.busy > 0, "pins were never in the way: {tally:?}");
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
