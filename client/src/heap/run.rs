//! A run of pages: the allocator's one kind of record. A run is free, or a large block, or a slab of small blocks. The runs
//! lie side by side without gaps from the heap's first page to its top.
//!
//! A slab has three bitmaps. A block that is in none of them is the program's; so a second free of it shows.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::table::Zeroed;

/// Words of a slab's bitmap: 256 blocks at most.
pub(super) const WORDS: usize = 4;

/// The number of no run.
pub(super) const NIL: u32 = 0;

/// What a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum State {
    /// No run: the record is spare.
    Spare = 0,
    /// Free, and reads as zeros.
    Clean = 1,
    /// Free, and has content that nobody needs.
    Dirty = 2,
    /// Free; its content is being dropped.
    Purging = 3,
    /// One block.
    Large = 4,
    /// A slab in its slot's list: blocks may be free.
    Listed = 5,
    /// A slab in no list: when that was decided, no block was free.
    Full = 6,
}

/// Its fields are atomic because any thread reads them when it frees a block. Who writes them is said at each.
#[derive(Debug)]
#[repr(C, align(128))]
pub(super) struct Run {
    /// First page. Under the lock of the pages, as all fields but those of slabs.
    start: AtomicU32,
    /// How many.
    pages: AtomicU32,
    /// Neighbours in a list: of a bin of free runs, of spare records, or of a slot's slabs (under the slot's lock).
    prev: AtomicU32,
    next: AtomicU32,
    /// Neighbours in the queue of dirty runs.
    older: AtomicU32,
    newer: AtomicU32,
    /// The slot that a slab belongs to, for as long as it is a slab.
    owner: AtomicU16,
    /// A slab's size class.
    class: AtomicU8,
    state: AtomicU8,
    spare: AtomicU32,
    /// Blocks that the slot may hand out. Under the slot's lock.
    pub(super) avail: [AtomicU64; WORDS],
    /// Blocks that other threads have freed and the slot has not collected yet. Set by any thread.
    pub(super) freed: [AtomicU64; WORDS],
    /// Blocks that the slot's thread keeps. Its alone.
    pub(super) kept: [AtomicU64; WORDS],
}

// SAFETY: zero is a number, and the state `Spare`.
unsafe impl Zeroed for Run {}

macro_rules! fields {
    ($($name:ident $set:ident $type:ty),*) => {
        $(
            #[inline]
            pub(super) fn $name(&self) -> $type {
                self.$name.load(Ordering::Relaxed)
            }

            #[inline]
            pub(super) fn $set(&self, value: $type) {
                self.$name.store(value, Ordering::Relaxed);
            }
        )*
    };
}

#[allow(missing_docs, reason = "see the fields")]
impl Run {
    fields!(
        start set_start u32, pages set_pages u32, prev set_prev u32, next set_next u32,
        older set_older u32, newer set_newer u32, owner set_owner u16, class set_class u8
    );

    /// The page after the last one.
    #[inline]
    pub(super) fn end(&self) -> u32 {
        self.start() + self.pages()
    }

    /// Sequentially consistent, as [`Run::set_state`]: a thread that frees a block looks at the state afterwards, a slot that
    /// declares a slab full looks for freed blocks afterwards, and one of them must see the other's deed.
    #[inline]
    pub(super) fn state(&self) -> State {
        match self.state.load(Ordering::SeqCst) {
            1 => State::Clean,
            2 => State::Dirty,
            3 => State::Purging,
            4 => State::Large,
            5 => State::Listed,
            6 => State::Full,
            _ => State::Spare,
        }
    }

    /// See [`Run::state`].
    #[inline]
    pub(super) fn set_state(&self, state: State) {
        self.state.store(state as u8, Ordering::SeqCst);
    }

    /// Empties all bitmaps.
    pub(super) fn clear_bitmaps(&self) {
        for words in [&self.avail, &self.freed, &self.kept] {
            words.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        }
    }
}

const _: () = assert!(size_of::<Run>() == 128);
