//! Slabs: runs cut into blocks of one size. How blocks get from a slab to the thread that owns its slot, and back.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use super::Core;
use super::backing::{Backing, Unavailable};
use super::class::{Class, TABLE};
use super::run::{NIL, Run, State};
use super::slots::{Place, Slot};

/// Whether something may be dropped now: runs were given back.
pub(super) type GaveBack = bool;

impl<B: Backing> Core<B> {
    /// Makes the slot keep some blocks of a class, from its slabs or a new one. The caller holds the slot's lock and is the
    /// one that may take kept blocks.
    #[cold]
    pub(super) fn refill(&self, slot: &Slot, class: u8) -> Result<(), Unavailable> {
        let of = &TABLE[usize::from(class)];
        let wanted = of.kept / 2;
        while slot.kept(class) < wanted {
            let list = &slot.lists[usize::from(class)];
            let id = match list.load(Ordering::Relaxed) {
                // Some are enough: no new slab for the rest.
                NIL if slot.kept(class) > 0 => return Ok(()),
                NIL => self.new_slab(slot, class, of)?,
                id => id,
            };
            let run = self.space.runs.get(id);
            self.collect(run);
            if !take_blocks(slot, class, of, id, run, wanted) {
                self.unlist(slot, class, id);
                run.set_state(State::Full);
                // Who freed a block before it could see the new state left it to us.
                if run.freed.iter().any(|word| word.load(Ordering::SeqCst) != 0) {
                    self.list(slot, class, id);
                }
            }
        }
        Ok(())
    }

    /// Gives the `count` oldest blocks that the slot keeps of a class back to their slabs, and slabs that are empty then
    /// back to the pages. The caller holds the slot's lock and is the one that may take kept blocks.
    #[cold]
    pub(super) fn flush(&self, slot: &Slot, class: u8, count: u32) -> GaveBack {
        let of = &TABLE[usize::from(class)];
        let mut gave_back = false;
        for at in 0..count {
            let Place { run: id, block } = slot.place(of, at);
            let run = self.space.runs.get(id);
            let (word, bit) = split(block);
            clear(&run.kept[word], bit);
            if run.freed[word].load(Ordering::Relaxed) & bit != 0 {
                // Freed twice, by two threads at the same moment: it will be collected once.
                self.count_misuse();
                continue;
            }
            set(&run.avail[word], bit);
            if run.state() == State::Full {
                self.list(slot, class, id);
            }
            // Another thread that frees the last other block looks for ours afterwards.
            fence(Ordering::SeqCst);
            gave_back |= self.release_if_empty(slot, class, id, false);
        }
        slot.drop_oldest(class, of, count);
        gave_back
    }

    /// After a block of a slab was freed by a thread that does not own its slot: lists the slab if it was full, gives it
    /// back if it is empty.
    #[cold]
    pub(super) fn settle(&self, id: u32) -> GaveBack {
        let run = self.space.runs.get(id);
        let (owner, class) = (run.owner(), run.class());
        let slot = self.slots.get(owner);
        slot.lock.lock();
        // The run may have become anything meanwhile. As long as it is a slab of this slot, what follows is right.
        let ours = matches!(run.state(), State::Listed | State::Full) && run.owner() == owner;
        let mut gave_back = false;
        if ours && run.class() == class {
            if run.state() == State::Full && run.freed.iter().any(|word| word.load(Ordering::SeqCst) != 0) {
                self.list(slot, class, id);
            }
            gave_back = self.release_if_empty(slot, class, id, false);
        }
        slot.lock.unlock();
        gave_back
    }

    /// Whether all blocks of a slab are free and none is kept.
    pub(super) fn is_empty(run: &Run, of: &Class) -> bool {
        (0..run.avail.len()).all(|word| {
            let free = run.avail[word].load(Ordering::SeqCst) | run.freed[word].load(Ordering::SeqCst);
            free == of.mask(word) && run.kept[word].load(Ordering::Relaxed) == 0
        })
    }

    /// Gives an empty slab back, but for the only one in its list unless `all` says so: else a single block that comes
    /// and goes would make and unmake a slab each time. The caller holds the slot's lock.
    pub(super) fn release_if_empty(&self, slot: &Slot, class: u8, id: u32, all: bool) -> GaveBack {
        let run = self.space.runs.get(id);
        let alone = run.prev() == NIL && run.next() == NIL;
        if run.state() != State::Listed || alone && !all || !Self::is_empty(run, &TABLE[usize::from(class)]) {
            return false;
        }
        self.unlist(slot, class, id);
        run.clear_bitmaps();
        self.pages.lock().give(&self.space, id);
        true
    }

    /// Makes what other threads have freed available. The caller holds the lock of the slab's slot.
    fn collect(&self, run: &Run) {
        for word in 0..run.avail.len() {
            let freed = run.freed[word].load(Ordering::Relaxed);
            if freed == 0 {
                continue;
            }
            let avail = run.avail[word].load(Ordering::Relaxed);
            let twice = freed & (avail | run.kept[word].load(Ordering::Relaxed));
            (0..twice.count_ones()).for_each(|_| self.count_misuse());
            // In this order: a block that is free is in one of the bitmaps at any time, so that a second free finds it.
            run.avail[word].store(avail | freed & !twice, Ordering::Relaxed);
            run.freed[word].fetch_and(!freed, Ordering::SeqCst);
        }
    }

    fn new_slab(&self, slot: &Slot, class: u8, of: &Class) -> Result<u32, Unavailable> {
        let mut pages = self.pages.lock();
        let (id, _) = pages.take(&self.space, of.pages, 1)?;
        let run = self.space.runs.get(id);
        run.clear_bitmaps();
        run.set_owner(slot.number());
        run.set_class(class);
        for (word, avail) in run.avail.iter().enumerate() {
            avail.store(of.mask(word), Ordering::Relaxed);
        }
        self.list(slot, class, id);
        self.space.note_all(id);
        Ok(id)
    }

    fn list(&self, slot: &Slot, class: u8, id: u32) {
        let list = &slot.lists[usize::from(class)];
        let run = self.space.runs.get(id);
        let head = list.load(Ordering::Relaxed);
        run.set_prev(NIL);
        run.set_next(head);
        if head != NIL {
            self.space.runs.get(head).set_prev(id);
        }
        list.store(id, Ordering::Relaxed);
        run.set_state(State::Listed);
    }

    fn unlist(&self, slot: &Slot, class: u8, id: u32) {
        let run = self.space.runs.get(id);
        let (prev, next) = (run.prev(), run.next());
        if next != NIL {
            self.space.runs.get(next).set_prev(prev);
        }
        match prev {
            NIL => slot.lists[usize::from(class)].store(next, Ordering::Relaxed),
            prev => self.space.runs.get(prev).set_next(next),
        }
        run.set_prev(NIL);
        run.set_next(NIL);
    }
}

/// Moves blocks of a slab to the slot until it keeps `wanted`, such that those with the lowest addresses are handed out
/// first. Gives false if no block is left.
fn take_blocks(slot: &Slot, class: u8, of: &Class, id: u32, run: &Run, wanted: u32) -> bool {
    let mut taken = [0; super::run::WORDS];
    let mut missing = wanted - slot.kept(class).min(wanted);
    let mut left = false;
    for (word, avail) in run.avail.iter().enumerate() {
        let mut bits = avail.load(Ordering::Relaxed);
        while bits != 0 && missing > 0 {
            taken[word] |= bits & bits.wrapping_neg();
            bits &= bits - 1;
            missing -= 1;
        }
        left |= bits != 0;
    }
    for (word, bits) in taken.iter().enumerate().rev() {
        let mut bits = *bits;
        // Kept first, then no longer available: see `collect`.
        set(&run.kept[word], bits);
        clear(&run.avail[word], bits);
        while bits != 0 {
            let bit = bits.ilog2();
            bits &= !(1 << bit);
            // A word has 64 bits and there are four.
            #[allow(clippy::cast_possible_truncation, reason = "see above")]
            let block = word as u32 * 64 + bit;
            slot.push(class, of, Place { run: id, block });
        }
    }
    left
}

/// The word of a bitmap and the bit in it for a block.
#[inline]
pub(super) fn split(block: u32) -> (usize, u64) {
    ((block / 64) as usize, 1 << (block % 64))
}

/// Sets bits of a word that only the caller writes.
#[inline]
pub(super) fn set(word: &AtomicU64, bits: u64) {
    word.store(word.load(Ordering::Relaxed) | bits, Ordering::Relaxed);
}

/// Clears bits of a word that only the caller writes.
#[inline]
pub(super) fn clear(word: &AtomicU64, bits: u64) {
    word.store(word.load(Ordering::Relaxed) & !bits, Ordering::Relaxed);
}
