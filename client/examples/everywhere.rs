//! Memory larger than RAM on every system: this program, which uses a region and a heap, is the same on Linux and on
//! Windows.
//!
//!     cargo build -p fmallocd && cargo run --example everywhere
//!     .ci/windows/run cargo run --target x86_64-pc-windows-gnu --example everywhere

use allocator_api2::vec::Vec;
use fmalloc_client::heap::Heap;
use fmalloc_client::{LocalOptions, Pager, Region};

/// RAM for all of it.
const BUDGET: u64 = 16 << 20;
/// Bytes of the region, and of the vector in the heap.
const SIZE: usize = 64 << 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let pager = Pager::local(&LocalOptions::new(BUDGET, 512 << 20))?;

    let mut region = Region::new(&pager, SIZE)?;
    for (index, word) in (0_u64..).zip(region.as_mut_slice_of::<u64>()) {
        *word = scatter(index);
    }

    let heap = Heap::new(&pager, 4 * SIZE)?;
    let mut sorted = Vec::new_in(&heap);
    sorted.extend_from_slice(region.as_slice_of::<u64>());
    sorted.sort_unstable();

    let in_order = sorted.windows(2).all(|pair| pair[0] <= pair[1]);
    let same = (0_u64..).zip(region.as_slice_of::<u64>()).all(|(index, word)| *word == scatter(index));
    let sums = [sorted.iter(), region.as_slice_of::<u64>().iter()]
        .map(|words| words.fold(0_u64, |sum, word| sum.wrapping_add(*word)));
    if !in_order || !same || sums[0] != sums[1] {
        return Err("the memory has lost something".into());
    }
    let stats = pager.stats()?;
    println!("{} MiB sorted within {} MiB of RAM: all right", SIZE >> 20, stats.budget_bytes >> 20);
    println!("{} pages were written out, {} read back", stats.pages_out, stats.pages_in);
    Ok(())
}

/// Numbers without order, of which none comes twice.
fn scatter(index: u64) -> u64 {
    let word = index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word ^ word >> 32
}
