//! Rust collections in a heap of paged memory: more of them than there is RAM to use.
//!
//!     cargo run --release --example collections

use allocator_api2::boxed::Box;
use allocator_api2::vec::Vec;
use anyhow::ensure;
use fmalloc_client::heap::Heap;
use fmalloc_client::{Pager, PrivateOptions};
use hashbrown::{DefaultHashBuilder, HashMap};

/// A node of a list, in the heap as well.
struct Node<'a> {
    number: u64,
    next: Option<Box<Node<'a>, &'a Heap>>,
}

fn main() -> anyhow::Result<()> {
    let pager = Pager::private(&PrivateOptions::new(16 << 20))?;
    let heap = Heap::new(&pager, 16 << 30)?;

    let mut squares = Vec::new_in(&heap);
    squares.extend((0..4_000_000_u64).map(|n| n * n));

    let mut roots = HashMap::with_hasher_in(DefaultHashBuilder::default(), &heap);
    for (root, square) in (0_u64..).zip(&squares).step_by(80) {
        roots.insert(*square, root);
    }

    let mut list = None;
    for number in 0..500_000 {
        list = Some(Box::new_in(Node { number, next: list.take() }, &heap));
    }

    ensure!(
        (0..4_000_000).step_by(80).all(|n| roots.get(&(n * n)) == Some(&n)),
        "the map has lost something"
    );
    ensure!(squares.iter().zip(0..).all(|(square, n)| *square == n * n), "the vector has lost something");
    let mut count = 0;
    while let Some(node) = list {
        count += 1;
        ensure!(node.number == 500_000 - count, "the list has lost something");
        list = Box::into_inner(node).next;
    }

    let stats = heap.stats();
    println!("{} MiB in use, of which at most 16 MiB in RAM", stats.used_bytes >> 20);
    println!("{} pages written to swap", pager.stats()?.pages_out);
    Ok(())
}
