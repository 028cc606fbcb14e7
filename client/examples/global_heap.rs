//! A whole program whose large allocations are paged: ordinary vectors, maps and strings.
//!
//!     cargo run --release --example global_heap

use std::collections::{BTreeMap, HashMap};

use anyhow::ensure;
use fmalloc_client::heap::{GlobalHeap, Heap};
use fmalloc_client::{Pager, PrivateOptions};

/// Allocations below 64 bytes stay with the system's allocator.
#[global_allocator]
static GLOBAL: GlobalHeap = GlobalHeap::new(64);

fn main() -> anyhow::Result<()> {
    let pager = Pager::private(&PrivateOptions::new(16 << 20))?;
    let heap = GLOBAL.start(Heap::new(&pager, 16 << 30)?);

    let squares: Vec<u64> = (0..4_000_000).map(|n| n * n).collect();
    let roots: HashMap<u64, usize> =
        squares.iter().step_by(80).zip((0..).step_by(80)).map(|(s, n)| (*s, n)).collect();
    let names: BTreeMap<usize, String> = (0..200_000).map(|n| (n, format!("{n:080}"))).collect();
    let sum = std::thread::spawn({
        let squares = squares.clone();
        move || squares.iter().fold(0_u64, |sum, square| sum.wrapping_add(*square))
    });

    let found = (0..).zip(&squares).step_by(80).all(|(n, square)| roots.get(square) == Some(&n));
    ensure!(found && roots.len() == 50_000, "the map has lost something");
    ensure!(names.iter().all(|(n, name)| name.parse().ok() == Some(*n)), "the strings have lost something");
    let sum = sum.join().map_err(|_| anyhow::anyhow!("the thread has panicked"))?;
    ensure!(
        sum == (0..4_000_000_u64).fold(0_u64, |sum, n| sum.wrapping_add(n * n)),
        "the vector has lost something"
    );

    println!("{} MiB in use, of which at most 16 MiB in RAM", heap.stats().used_bytes >> 20);
    println!("{} pages written to swap", pager.stats()?.pages_out);
    Ok(())
}
