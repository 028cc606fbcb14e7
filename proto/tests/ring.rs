//! The ring through two mappings of one memfd, as daemon and client have it, and its bytes, written out.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use fmalloc_proto::PAGE_SIZE;
use fmalloc_proto::limits::{MAX_BATCH_PAGES, MAX_BATCHES};
use fmalloc_proto::ring::{
    BatchKind, Layout, PageResult, Ring, STATE_DONE, STATE_FREE, STATE_REQUESTED, has_len,
};
use nix::sys::memfd::{MFdFlags, memfd_create};

fn memfd(len: usize) -> File {
    let file = File::from(memfd_create("ring", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len as u64).unwrap();
    file
}

fn rings(layout: Layout) -> (File, Ring, Ring) {
    let file = memfd(layout.len());
    let daemon = Ring::map(file.as_fd(), layout).unwrap();
    let client = Ring::map(file.as_fd(), layout).unwrap();
    (file, daemon, client)
}

#[test]
fn layouts_outside_the_limits_are_refused() {
    for (batches, pages) in
        [(0, 1), (1, 0), (MAX_BATCHES + 1, 1), (1, MAX_BATCH_PAGES + 1), (u32::MAX, u32::MAX)]
    {
        assert_eq!(Layout::new(batches, pages), None, "{batches} × {pages}");
    }
    assert!(Layout::new(MAX_BATCHES, MAX_BATCH_PAGES).is_some());
}

#[test]
fn batches_are_stopped_one_by_one_and_until_they_are_asked_for_again() {
    let (_file, daemon, agent) = rings(Layout::new(2, 3).unwrap());
    daemon.initialise();
    assert!(!agent.is_gate_closed() && !agent.is_stopped(0) && !agent.is_stopped(1));
    daemon.set_gate(true);
    daemon.stop(1);
    assert!(agent.is_gate_closed() && !agent.is_stopped(0) && agent.is_stopped(1));
    daemon.set_request(1, BatchKind::Evict, 3);
    daemon.set_gate(false);
    assert!(!agent.is_gate_closed() && !agent.is_stopped(1));
}

#[test]
fn ring_has_golden_bytes() {
    let layout = Layout::new(2, 3).unwrap();
    assert_eq!(layout.len(), (2 + 2 * 3) * PAGE_SIZE, "header, descriptors, pages");
    let (file, daemon, _) = rings(layout);
    daemon.initialise();
    daemon.set_addr(1, 2, 0x1122_3344_5566_7000);
    daemon.set_result(1, 2, PageResult::Busy);
    daemon.set_request(1, BatchKind::Probe, 3);
    daemon.set_state(1, STATE_REQUESTED);
    let read = |offset: usize, len: usize| {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, offset as u64).unwrap();
        bytes
    };
    assert_eq!(read(0, 20), *b"FMRING01\x01\0\0\0\x02\0\0\0\x03\0\0\0");
    let descriptor = 4096 + (16 + 3 * 16);
    assert_eq!(read(descriptor, 16), *b"\x01\0\0\0\x02\0\0\0\x03\0\0\0\0\0\0\0", "state, kind, count");
    daemon.set_gate(true);
    daemon.stop(1);
    assert_eq!(read(20, 4), *b"\x01\0\0\0", "gate");
    assert_eq!(read(descriptor + 12, 4), *b"\x01\0\0\0", "stop");
    assert_eq!(read(descriptor + 16 + 2 * 16, 16), *b"\0\x70\x66\x55\x44\x33\x22\x11\x03\0\0\0\0\0\0\0");
}

#[test]
fn what_one_side_writes_the_other_reads() {
    let layout = Layout::new(4, 64).unwrap();
    let (_, daemon, client) = rings(layout);
    assert!(!client.is_valid());
    daemon.initialise();
    assert!(client.is_valid() && daemon.is_valid());
    for batch in 0..layout.batches() {
        assert_eq!(client.state(batch), STATE_FREE);
        for index in 0..layout.batch_pages() {
            daemon.set_addr(batch, index, u64::from(batch * 1000 + index) << 12);
        }
        daemon.set_request(batch, BatchKind::Evict, layout.batch_pages());
        daemon.set_state(batch, STATE_REQUESTED);
    }
    for batch in 0..layout.batches() {
        assert_eq!(client.state(batch), STATE_REQUESTED);
        assert_eq!(client.request(batch), (BatchKind::Evict as u32, layout.batch_pages()));
        for index in 0..layout.batch_pages() {
            assert_eq!(client.addr(batch, index), u64::from(batch * 1000 + index) << 12);
            // SAFETY: a page has 4096 bytes, and this thread alone uses the ring.
            unsafe { client.page(batch, index).write_bytes(u8::try_from(batch + index).unwrap(), PAGE_SIZE) };
            client.set_result(batch, index, PageResult::Moved);
        }
        client.set_state(batch, STATE_DONE);
    }
    for batch in 0..layout.batches() {
        assert_eq!(daemon.state(batch), STATE_DONE);
        for index in 0..layout.batch_pages() {
            assert_eq!(PageResult::from_number(daemon.result(batch, index)), Some(PageResult::Moved));
            let mut page = [0_u8; PAGE_SIZE];
            // SAFETY: as above.
            unsafe {
                daemon.page(batch, index).as_ptr().copy_to_nonoverlapping(page.as_mut_ptr(), PAGE_SIZE)
            };
            assert!(page.iter().all(|byte| u32::from(*byte) == batch + index), "pages do not overlap");
        }
    }
}

#[test]
fn short_file_and_other_layout_are_noticed() {
    let layout = Layout::new(2, 3).unwrap();
    assert!(has_len(memfd(layout.len()).as_fd(), layout).unwrap());
    assert!(!has_len(memfd(layout.len() - 1).as_fd(), layout).unwrap());
    let (file, daemon, _) = rings(layout);
    daemon.initialise();
    for other in [Layout::new(3, 2), Layout::new(2, 2), Layout::new(1, 3)] {
        let ring = Ring::map(file.as_fd(), other.unwrap()).unwrap();
        assert!(!ring.is_valid(), "{other:?}");
    }
}

#[test]
fn numbers_that_mean_nothing_are_none() {
    for number in [0, 5, u32::MAX] {
        assert_eq!(BatchKind::from_number(number), None);
    }
    for number in [0, 9, u32::MAX] {
        assert_eq!(PageResult::from_number(number), None);
    }
    for number in 1..=7 {
        assert_eq!(PageResult::from_number(number).map(|result| result as u32), Some(number));
    }
}

#[test]
#[should_panic(expected = "outside")]
fn batch_outside_the_ring_panics() {
    let (_, daemon, _) = rings(Layout::new(1, 1).unwrap());
    daemon.set_state(1, STATE_FREE);
}
