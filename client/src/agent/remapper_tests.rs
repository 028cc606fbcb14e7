//! The remapper against the real kernel, which need not be an old one: it has what this takes since Linux 5.13.

use std::ptr;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::Receiver;
use std::thread;

use fmalloc_proto::ring::PageResult::{Absent, Failed, Moved, Refused};
use fmalloc_proto::ring::{BatchKind, STATE_REQUESTED};

use super::super::evict::Method;
use super::super::evict::tests::{Bench, FAULT, REMAP, STRESS_PAGES, map, protect, stress};
use super::*;

fn word(message: [u8; 32], at: usize) -> u64 {
    u64::from_ne_bytes(message[at..at + 8].try_into().unwrap())
}

fn span(bench: &Bench) -> (u64, u64) {
    match &bench.evictor.method {
        Method::Move(_) => panic!("another method"),
        Method::Remap(remapper) => remapper.span(),
    }
}

/// The next message of a kind.
fn next(messages: &Receiver<[u8; 32]>, kind: u8) -> [u8; 32] {
    loop {
        let message = messages.recv_timeout(Duration::from_secs(10)).unwrap();
        if message[0] == kind {
            return message;
        }
    }
}

#[test]
fn present_pages_leave_with_their_bytes_and_absent_ones_are_told() {
    let (mut bench, messages) = Bench::remapping(16);
    for page in [0, 3, 4, 9] {
        bench.discard(page);
    }
    let all: Vec<usize> = (0..16).collect();
    for (page, result) in bench.evict(&all).into_iter().enumerate() {
        if [0, 3, 4, 9].contains(&page) {
            assert_eq!(result, Absent, "page {page}");
        } else {
            assert_eq!(result, Moved, "page {page}");
            bench.assert_evicted(page, page as u64);
        }
        assert!(!bench.is_there(page));
    }
    assert!(bench.staging_is_empty());
    let (start, len) = span(&bench);
    let event = next(&messages, REMAP);
    assert_eq!((word(event, 8), word(event, 24)), (bench.addr(0), 16 * PAGE));
    assert!((start..start + len).contains(&word(event, 16)), "the daemon knows it by its target");
    assert_eq!(bench.evict(&all), [Absent; 16]);
}

#[test]
fn scattered_pages_and_a_page_named_twice_keep_their_places_in_the_batch() {
    let (mut bench, _messages) = Bench::remapping(64);
    let order = [60, 61, 5, 4, 3, 10, 12, 13, 14, 0];
    assert_eq!(bench.evict(&order), [Moved; 10]);
    for (index, page) in order.iter().enumerate() {
        bench.assert_evicted(index, *page as u64);
    }
    assert!(bench.is_there(11) && bench.is_there(62));
    assert_eq!(bench.evict(&[2, 2, 62]), [Moved, Absent, Moved]);
    bench.assert_evicted(2, 62);
    assert!(bench.staging_is_empty());
}

#[test]
fn pages_without_access_leave_with_their_bytes_and_locked_ones_stay() {
    let (mut bench, _messages) = Bench::remapping(12);
    protect(bench.addr(3), libc::PROT_READ);
    protect(bench.addr(5), libc::PROT_NONE);
    // SAFETY: the page is the test's.
    assert_eq!(unsafe { libc::mlock(sys::pointer(bench.addr(7)), PAGE_SIZE) }, 0);
    let all: Vec<usize> = (0..12).collect();
    for (page, result) in bench.evict(&all).into_iter().enumerate() {
        assert_eq!(result, if page == 7 { Refused } else { Moved }, "page {page}");
        if page != 7 {
            bench.assert_evicted(page, page as u64);
        }
    }
    // Were it still protected, this would wait for ever.
    bench.fill(7, 77);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::munlock(sys::pointer(bench.addr(7)), PAGE_SIZE) }, 0);
    assert_eq!(bench.evict(&[7]), [Moved]);
    bench.assert_evicted(0, 77);
}

#[test]
fn memory_that_took_the_place_of_an_unmapped_part_is_left_alone() {
    let (mut bench, _messages) = Bench::remapping(8);
    let hole = bench.base.wrapping_add(2 * PAGE_SIZE);
    // SAFETY: the pages are the test's.
    assert_eq!(unsafe { libc::munmap(hole.cast(), 2 * PAGE_SIZE) }, 0);
    assert_eq!(map(hole, 2, libc::MAP_FIXED_NOREPLACE), hole);
    bench.fill(2, 1111);
    bench.fill(3, 2222);
    assert_eq!(bench.evict(&[0, 1, 2, 3, 4, 5]), [Moved, Moved, Absent, Absent, Moved, Moved]);
    bench.assert_evicted(4, 4);
    for word in [0, 511] {
        assert_eq!(bench.word(2, word).load(Ordering::Relaxed), 1111);
        assert_eq!(bench.word(3, word).load(Ordering::Relaxed), 2222);
    }
}

/// Has the evictor find the pages of a batch unprotected in its staging area, as if something else had taken their
/// place after they were protected.
fn surprise(bench: &mut Bench, pages: &[usize]) {
    for (index, page) in (0..).zip(pages) {
        bench.ring.set_addr(0, index, bench.addr(*page));
    }
    let count = u32::try_from(pages.len()).unwrap();
    bench.ring.set_request(0, BatchKind::Evict, count);
    let uffd = bench.uffd.try_clone().unwrap();
    let Method::Remap(remapper) = &mut bench.evictor.method else { panic!("another method") };
    let mut batch = Batch { uffd: &uffd, ring: &bench.ring, number: 0, count, protected: [true; MOST] };
    for index in 0..count {
        let addr = batch.addr(index);
        // SAFETY: the page is the test's.
        unsafe { sys::remap(addr, PAGE, remapper.place(index), true) }.unwrap();
        remapper.settle(&mut batch, index, 1);
    }
    assert!(!remapper.spoilt);
}

#[test]
fn what_is_not_the_page_that_was_protected_goes_back_to_where_it_was() {
    let (mut bench, _messages) = Bench::remapping(8);
    surprise(&mut bench, &[1, 2]);
    assert_eq!(bench.results(0, 2), [Failed; 2]);
    for page in [1, 2] {
        assert!(bench.is_there(page));
        assert_eq!(bench.word(page, 9).load(Ordering::Relaxed), page as u64);
    }
    // The same with memory that is not paged.
    bench.uffd.unregister(bench.addr(4), 2 * PAGE).unwrap();
    surprise(&mut bench, &[4, 5]);
    assert_eq!(bench.results(0, 2), [Failed; 2]);
    for page in [4, 5] {
        assert_eq!(bench.word(page, 9).load(Ordering::Relaxed), page as u64);
        bench.fill(page, 55);
    }
    assert_eq!(bench.evict(&[0, 1, 2, 4]), [Moved, Moved, Moved, Absent]);
    bench.assert_evicted(1, 1);
}

#[test]
fn nothing_leaves_while_an_event_is_unread_or_once_the_batch_is_stopped() {
    let (mut bench, _messages) = Bench::remapping(8);
    bench.request(1, BatchKind::Evict, &[0, 1]);
    bench.ring.stop(1);
    assert!(bench.evictor.serve(1));
    assert_eq!(bench.results(1, 2), [Failed; 2]);
    bench.fill(1, 11);

    // The gate opens after a while.
    bench.ring.set_gate(true);
    bench.request(1, BatchKind::Evict, &[0, 1]);
    let Bench { ring, evictor, .. } = &mut bench;
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(30));
            assert_eq!(ring.state(1), STATE_REQUESTED, "it waits");
            ring.set_gate(false);
        });
        assert!(evictor.serve(1));
    });
    assert_eq!(bench.results(1, 2), [Moved; 2]);
    bench.assert_evicted(1, 11);

    // It never does, and nobody waits for it any more.
    bench.ring.set_gate(true);
    bench.evictor.quit_flag().store(true, Ordering::Relaxed);
    assert_eq!(bench.evict(&[2]), [Failed]);
    bench.fill(2, 22);
}

#[test]
fn a_write_to_a_page_on_its_way_out_waits_and_lands_in_what_comes_back() {
    let (mut bench, messages) = Bench::remapping(4);
    let (addr, len) = (bench.addr(2), PAGE);
    bench.uffd.write_protect(addr, len, true).unwrap();
    thread::scope(|scope| {
        // SAFETY: inside the region, aligned.
        let word: &AtomicU64 =
            unsafe { AtomicU64::from_ptr(ptr::with_exposed_provenance_mut(to_usize(addr))) };
        let writer = scope.spawn(move || word.store(99, Ordering::Relaxed));
        let fault = next(&messages, FAULT);
        assert_eq!(word_of_fault(fault), (addr, true), "a write, to a protected page");
        assert_eq!(bench.evict(&[2]), [Moved]);
        bench.assert_evicted(0, 2);
        let mut page = [0; PAGE_SIZE];
        page.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&2_u64.to_ne_bytes()));
        bench.uffd.fill(addr, &page).unwrap();
        writer.join().unwrap();
    });
    assert_eq!(bench.word(2, 0).load(Ordering::Relaxed), 99);
    assert_eq!(bench.word(2, 1).load(Ordering::Relaxed), 2);
    assert_eq!(bench.evict(&[2]), [Moved]);
}

/// Where, and whether the page was there and protected.
fn word_of_fault(message: [u8; 32]) -> (u64, bool) {
    const PROTECTED: u64 = 2;
    (word(message, 16) & !(PAGE - 1), word(message, 8) & PROTECTED != 0)
}

#[test]
fn a_place_whose_addresses_somebody_else_got_is_given_up() {
    let (mut bench, _messages) = Bench::remapping(8);
    let (start, _) = span(&bench);
    let Method::Remap(remapper) = &mut bench.evictor.method else { panic!("another method") };
    remapper.spoilt = true;
    assert_eq!(bench.evict(&[0]), [Failed]);
    assert_eq!(bench.evict(&[0, 1]), [Moved; 2]);
    let Method::Remap(remapper) = &bench.evictor.method else { panic!("another method") };
    assert_eq!(remapper.place(0), start + 64 * PAGE, "the next area");
}

#[test]
fn no_write_is_lost_while_pages_come_and_go() {
    let (bench, messages) = Bench::remapping(STRESS_PAGES);
    let pages = std::env::var("FMALLOC_STRESS_PAGES").ok().and_then(|text| text.parse().ok());
    stress(bench, messages, pages.unwrap_or(50_000));
}
