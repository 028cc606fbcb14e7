//! Heaps: an allocator for memory that may be swapped out, and what programs use it by.
//!
//! The allocator never touches the memory that it hands out. All of its records are outside: so freeing a block that has not
//! been used for long costs no page fault, nor does allocating one.
//!
//! - [`Heap`] is what programs use: memory of a [`crate::Region`], for raw blocks or for Rust's collections;
//!   [`GlobalHeap`] makes it the allocator of a whole program.
//! - [`Core`] is the allocator over any [`Backing`]; `malloc` can be made of it.
//! - A run of pages (`run`) is free, a large block or a slab; `pages` knows the free ones by size (`bins`).
//! - A slab (`slab`) has blocks of one size (`class`). Each thread has slabs of its own and keeps a few free blocks (`slots`).
//! - `table`, `lock` and `sys` are what these need of the system.

mod allocator;
mod backing;
mod bins;
mod class;
mod core;
mod error;
mod lock;
mod paged;
mod pages;
mod run;
mod slab;
mod slots;
mod stats;
mod sys;
mod table;
#[cfg(test)]
mod tests;

pub use self::core::Core;
pub use allocator::GlobalHeap;
pub use backing::{Backing, Plain, Unavailable};
pub use error::{BadPointer, ReallocError};
pub use paged::{Heap, Paged};
pub use stats::{Broken, Stats};
