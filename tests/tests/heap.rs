//! The heap on paged memory: nothing is lost, cold blocks cost no faults, what is freed is given back.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failure here is a failed test")]

use std::process::Command;
use std::ptr::NonNull;
use std::time::Duration;

use fmalloc_client::heap::{Heap, Unavailable};
use fmalloc_client::{Pager, PrivateOptions};
use fmalloc_proto::num::to_usize;
use fmalloc_tests::rng::{Rng, seed};
use fmalloc_tests::{MIB, place, wait_until};
use tempfile::TempDir;

/// A heap with a private daemon; `swap` MiB of swap file.
struct Place {
    heap: Heap,
    pager: Pager,
    _dir: TempDir,
}

fn heap(budget: u64, swap: u64) -> Option<Place> {
    place::can_page().then(|| {
        let dir = place::directory();
        let pager = Pager::private(&PrivateOptions {
            daemon: Some(place::binary("fmallocd")),
            swap_dir: Some(dir.path().to_owned()),
            swap_size: Some(swap * MIB),
            ..PrivateOptions::new(budget * MIB)
        })
        .unwrap();
        Place { heap: Heap::new(&pager, 64 << 30).unwrap(), pager, _dir: dir }
    })
}

/// A block full of words that follow from its seed.
#[derive(Debug, Clone, Copy)]
struct Block {
    at: NonNull<u8>,
    len: usize,
    seed: u64,
}

// SAFETY: whoever has the value owns the block.
unsafe impl Send for Block {}

impl Block {
    fn new(heap: &Heap, len: usize, seed: u64) -> Result<Self, Unavailable> {
        let at = heap.alloc(len, 16)?;
        let mut rng = Rng::new(seed);
        for word in 0..len / 8 {
            // SAFETY: the block has that many bytes, and is aligned.
            unsafe { at.cast::<u64>().add(word).write(rng.word()) };
        }
        Ok(Self { at, len, seed })
    }

    fn verify(&self, len: usize) {
        let mut rng = Rng::new(self.seed);
        for word in 0..len / 8 {
            // SAFETY: the block has that many bytes, and is aligned.
            let found = unsafe { self.at.cast::<u64>().add(word).read() };
            assert_eq!(found, rng.word(), "word {word} of {self:?}");
        }
    }

    fn free(self, heap: &Heap) {
        // SAFETY: nobody else knows the block.
        unsafe { heap.free(self.at) }.unwrap();
    }
}

/// Mostly small blocks; most of the memory in large ones.
fn size(rng: &mut Rng) -> usize {
    match rng.below(100) {
        0..70 => 16 + rng.index(500),
        70..95 => 512 + rng.index(16 << 10),
        _ => (16 << 10) + rng.index(256 << 10),
    }
}

fn churn(heap: &Heap, rng: &mut Rng, bytes: usize, operations: usize) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut total = 0;
    for _ in 0..operations {
        if total < bytes {
            let block = Block::new(heap, size(rng), rng.word()).unwrap();
            total += block.len;
            blocks.push(block);
            continue;
        }
        let at = rng.index(blocks.len());
        let block = blocks.swap_remove(at);
        total -= block.len;
        if rng.below(4) == 0 {
            let len = size(rng);
            // SAFETY: nobody else knows the block.
            let at = unsafe { heap.realloc(block.at, len, 16) }.unwrap();
            Block { at, ..block }.verify(len.min(block.len));
            // SAFETY: as above.
            unsafe { heap.free(at) }.unwrap();
        } else {
            block.verify(block.len);
            block.free(heap);
        }
    }
    blocks
}

#[test]
fn blocks_of_several_times_the_budget_keep_their_content_through_malloc_free_and_realloc() {
    let Some(place) = heap(16, 512) else { return };
    let mut rng = Rng::new(seed());
    let blocks = churn(&place.heap, &mut rng, 48 << 20, 15_000);
    place.heap.check().unwrap();
    for block in blocks {
        block.verify(block.len);
        block.free(&place.heap);
    }
    place.heap.check().unwrap();
    let stats = place.pager.stats().unwrap();
    assert!(stats.pages_out > 0 && stats.pages_in > 0 && stats.poisoned_pages == 0, "{stats:?}");
    assert!(stats.peak_resident_pages * 4096 <= 16 * MIB, "{stats:?}");
}

#[test]
fn threads_share_a_heap_under_pressure() {
    let Some(place) = heap(24, 512) else { return };
    let first = seed();
    let left: Vec<Block> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                let heap = &place.heap;
                scope.spawn(move || churn(heap, &mut Rng::new(first + thread), 16 << 20, 5_000))
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    place.heap.check().unwrap();
    for block in left {
        block.verify(block.len);
        block.free(&place.heap);
    }
    place.heap.check().unwrap();
    place.heap.trim(0);
    assert_eq!(place.heap.stats().committed_bytes, 0);
}

#[test]
fn freeing_and_allocating_cold_blocks_costs_no_fault() {
    let Some(place) = heap(8, 512) else { return };
    let mut rng = Rng::new(seed());
    for size in [64, 1000, 10_000, 100_000] {
        let mut blocks: Vec<Block> =
            (0..(32 << 20) / size).map(|n| Block::new(&place.heap, size, n as u64).unwrap()).collect();
        for at in (1..blocks.len()).rev() {
            blocks.swap(at, rng.index(at + 1));
        }
        let mut kept = blocks.split_off(blocks.len() / 2);
        // The thread that faulted last goes on a moment before the fault is counted.
        std::thread::sleep(Duration::from_millis(50));
        let before = place.pager.stats().unwrap();
        assert!(before.swapped_pages * 4096 > 20 * MIB);
        let count = blocks.len();
        blocks.into_iter().for_each(|block| block.free(&place.heap));
        let again: Vec<_> = (0..count).map(|_| place.heap.alloc(size, 16).unwrap()).collect();
        let after = place.pager.stats().unwrap();
        assert_eq!(after.faults, before.faults, "{size}");
        assert_eq!(after.pages_in, before.pages_in, "{size}");
        // In order of address: at random it would take a fault each.
        kept.sort_by_key(|block| block.at);
        for block in kept {
            block.verify(size);
            block.free(&place.heap);
        }
        // SAFETY: nobody else knows the blocks.
        again.into_iter().for_each(|block| unsafe { place.heap.free(block) }.unwrap());
        place.heap.check().unwrap();
        place.heap.trim(0);
    }
}

#[test]
fn what_is_freed_is_given_back_to_ram_and_swap() {
    let Some(place) = heap(16, 256) else { return };
    let blocks: Vec<Block> = (0..1500).map(|n| Block::new(&place.heap, 100_000, n).unwrap()).collect();
    let full = place.pager.stats().unwrap();
    assert!(full.slots * 4096 > 120 * MIB, "{full:?}");
    blocks.into_iter().for_each(|block| block.free(&place.heap));
    assert!(place.heap.stats().dirty_bytes <= 1 << 20);
    // The daemon follows at its own pace.
    wait_until("slots are free", || place.pager.stats().unwrap().slots * 4096 <= 2 * MIB);
    place.heap.trim(0);
    wait_until("all is given back", || {
        let stats = place.pager.stats().unwrap();
        stats.slots == 0 && stats.claimed_pages == 0 && stats.resident_pages == 0
    });
}

#[test]
fn a_full_swap_file_is_an_error_of_the_allocation_never_of_a_store() {
    let Some(place) = heap(8, 64) else { return };
    let mut blocks = Vec::new();
    let error = loop {
        match Block::new(&place.heap, 50_000, blocks.len() as u64) {
            Ok(block) => blocks.push(block),
            Err(error) => break error,
        }
    };
    assert_eq!(error, Unavailable);
    let bytes = blocks.len() * 50_000;
    assert!(bytes > 48 << 20 && bytes <= to_usize(64 * MIB), "{bytes} bytes");
    blocks.iter().for_each(|block| block.verify(block.len));
    for block in blocks.drain(..20) {
        block.free(&place.heap);
    }
    let again = Block::new(&place.heap, 200_000, 7).unwrap();
    again.verify(200_000);
    blocks.iter().for_each(|block| block.verify(block.len));
    place.heap.check().unwrap();
    let stats = place.pager.stats().unwrap();
    assert_eq!((stats.poisoned_pages, stats.io_errors), (0, 0));
}

#[test]
fn examples_of_rust_collections_in_a_heap_work() {
    if !place::can_page() {
        return;
    }
    for example in ["collections", "global_heap"] {
        let output = Command::new(place::binary(&format!("examples/{example}")))
            .env("FMALLOC_DAEMON", place::binary("fmallocd"))
            .output()
            .unwrap();
        let text =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{example}: {text}");
        let written: u64 = text
            .lines()
            .find_map(|line| line.strip_suffix(" pages written to swap")?.parse().ok())
            .unwrap_or_else(|| panic!("{example}: {text}"));
        assert!(written > 1000, "{example}: {text}");
    }
}
