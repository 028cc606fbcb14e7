//! Which slots of the swap file are taken: one bit each, shared by all fault threads without a lock.
//!
//! Each thread has a [`Cursor`] of its own and takes runs of neighbouring slots from where it stands, so that eviction
//! writes are sequential; wholly free words of 64 slots come first, what is scattered is used when nothing else is left.
//!
//! After a fork a slot has several owners, parent and children: a counter beside the bit says how many more than one. The
//! counters are made zeroed and untouched, so that they cost memory only where slots are shared.

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use fmalloc_proto::num::{to_u64, to_usize};

use crate::pager::page::Slot;

const WORD_SLOTS: u64 = 64;
/// Words that one summary counter covers.
const GROUP_WORDS: usize = 64;

/// The map of slots.
#[derive(Debug)]
pub struct Slots {
    words: Box<[AtomicU64]>,
    /// Taken slots per group of words, so that full stretches are skipped.
    groups: Box<[AtomicU64]>,
    /// Owners of each taken slot beyond the first.
    extra: Box<[AtomicU16]>,
    /// Slots that exist now; the file may grow.
    capacity: AtomicU64,
    used: AtomicU64,
}

/// Where a thread takes its next slots.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cursor {
    next: u64,
}

impl Slots {
    /// A map for at most `max` slots, none of which exists yet.
    #[must_use]
    pub fn new(max: u64) -> Self {
        let words = to_usize(max.div_ceil(WORD_SLOTS));
        Self {
            words: zeroed(words),
            groups: zeroed(words.div_ceil(GROUP_WORDS)),
            extra: zeroed_counters(words * to_usize(WORD_SLOTS)),
            capacity: AtomicU64::new(0),
            used: AtomicU64::new(0),
        }
    }

    /// Lets slots below `capacity` be taken. Never takes any away.
    pub fn grow(&self, capacity: u64) {
        let max = to_u64(self.words.len()) * WORD_SLOTS;
        self.capacity.fetch_max(capacity.min(max), Ordering::AcqRel);
    }

    /// Slots that exist.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    /// Slots taken.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// A cursor for the `n`-th client, far from those of others.
    #[must_use]
    pub fn cursor(&self, n: u64) -> Cursor {
        let words = (self.capacity() / WORD_SLOTS).max(1);
        // The golden ratio spreads any number of starting points evenly.
        let spread = u128::from(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)) * u128::from(words);
        Cursor { next: u64::try_from(spread >> 64).unwrap_or(0) * WORD_SLOTS }
    }

    /// Takes up to `want` neighbouring slots, at most 64, and gives the first and how many. None if all are taken.
    pub fn take(&self, cursor: &mut Cursor, want: u32) -> Option<(Slot, u32)> {
        let want = want.clamp(1, 64);
        let capacity = self.capacity();
        if capacity == 0 {
            return None;
        }
        let start = if cursor.next >= capacity { 0 } else { cursor.next };
        self.take_at(start, want, capacity)
            .or_else(|| {
                self.search(start, capacity, |taken| taken == 0)
                    .and_then(|at| self.take_at(at, want, capacity))
            })
            .or_else(|| self.scavenge(start, want, capacity))
            .inspect(|&(slot, count)| cursor.next = u64::from(slot) + u64::from(count))
    }

    /// Adds an owner to a slot that the caller owns. False if it has as many as can be counted.
    #[must_use]
    pub fn share(&self, slot: Slot) -> bool {
        debug_assert!(self.is_taken(slot), "sharing a free slot");
        let more = |extra: u16| extra.checked_add(1);
        self.extra[to_usize(slot.into())].fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    /// Gives a slot back. It must have been taken; with the last owner it becomes free.
    pub fn give(&self, slot: Slot) {
        let less = |extra: u16| extra.checked_sub(1);
        // Whoever frees the slot has seen all that other owners did with it.
        if self.extra[to_usize(slot.into())].fetch_update(Ordering::AcqRel, Ordering::Acquire, less).is_ok() {
            return;
        }
        let (word, bit) = (to_usize(u64::from(slot) / WORD_SLOTS), u64::from(slot) % WORD_SLOTS);
        let before = self.words[word].fetch_and(!(1 << bit), Ordering::AcqRel);
        debug_assert!(before >> bit & 1 == 1, "slot {slot} given back twice");
        if before >> bit & 1 == 1 {
            self.groups[word / GROUP_WORDS].fetch_sub(1, Ordering::Relaxed);
            self.used.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Whether a slot is taken.
    #[must_use]
    pub fn is_taken(&self, slot: Slot) -> bool {
        let (word, bit) = (to_usize(u64::from(slot) / WORD_SLOTS), u64::from(slot) % WORD_SLOTS);
        self.words[word].load(Ordering::Acquire) >> bit & 1 == 1
    }

    /// Bits of `word` that may never be taken because the file ends before them.
    fn beyond(word: usize, capacity: u64) -> u64 {
        let first = to_u64(word) * WORD_SLOTS;
        if first + WORD_SLOTS <= capacity { 0 } else { !0 << (capacity - first) }
    }

    /// Takes the free slots right at `slot`, within its word. None if `slot` itself is taken.
    fn take_at(&self, slot: u64, want: u32, capacity: u64) -> Option<(Slot, u32)> {
        let (word, bit) = (to_usize(slot / WORD_SLOTS), slot % WORD_SLOTS);
        let cell = &self.words[word];
        let mut taken = cell.load(Ordering::Acquire);
        loop {
            let blocked = (taken | Self::beyond(word, capacity)) >> bit;
            let room = blocked.trailing_zeros().min(64 - u32::try_from(bit).unwrap_or(0));
            let count = room.min(want);
            if count == 0 {
                return None;
            }
            let mask = (!0 >> (64 - count)) << bit;
            match cell.compare_exchange_weak(taken, taken | mask, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    self.groups[word / GROUP_WORDS].fetch_add(count.into(), Ordering::Relaxed);
                    self.used.fetch_add(count.into(), Ordering::Relaxed);
                    return Some((Slot::try_from(slot).ok()?, count));
                }
                Err(now) => taken = now,
            }
        }
    }

    /// First slot of the first word, from `start`'s on and round, of which `fits` approves.
    fn search(&self, start: u64, capacity: u64, fits: impl Fn(u64) -> bool) -> Option<u64> {
        let words = to_usize(capacity.div_ceil(WORD_SLOTS));
        let first = to_usize(start / WORD_SLOTS);
        let full = to_u64(GROUP_WORDS) * WORD_SLOTS;
        let mut step = 0;
        while step <= words {
            let word = (first + step) % words;
            let group = word / GROUP_WORDS;
            if word.is_multiple_of(GROUP_WORDS) && self.groups[group].load(Ordering::Relaxed) >= full {
                step += GROUP_WORDS.min(words - word);
                continue;
            }
            if fits(self.words[word].load(Ordering::Acquire) | Self::beyond(word, capacity)) {
                return Some(to_u64(word) * WORD_SLOTS);
            }
            step += 1;
        }
        None
    }

    /// Takes what is left between others' slots.
    fn scavenge(&self, start: u64, want: u32, capacity: u64) -> Option<(Slot, u32)> {
        loop {
            let word = self.search(start, capacity, |taken| taken != !0)?;
            let index = to_usize(word / WORD_SLOTS);
            let taken = self.words[index].load(Ordering::Acquire) | Self::beyond(index, capacity);
            if taken != !0
                && let Some(run) = self.take_at(word + u64::from(taken.trailing_ones()), want, capacity)
            {
                return Some(run);
            }
            // Another thread was faster: look again.
        }
    }
}

/// Zeroed atomics without touching their memory.
fn zeroed(count: usize) -> Box<[AtomicU64]> {
    let plain = vec![0_u64; count].into_boxed_slice();
    // SAFETY: AtomicU64 has the same size, alignment and bit validity as u64.
    unsafe { Box::from_raw(Box::into_raw(plain) as *mut [AtomicU64]) }
}

/// The same for the counters.
fn zeroed_counters(count: usize) -> Box<[AtomicU16]> {
    let plain = vec![0_u16; count].into_boxed_slice();
    // SAFETY: as in `zeroed`.
    unsafe { Box::from_raw(Box::into_raw(plain) as *mut [AtomicU16]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn shared_slot_becomes_free_with_its_last_owner() {
        let slots = Slots::new(64);
        slots.grow(64);
        let mut cursor = Cursor::default();
        assert_eq!(slots.take(&mut cursor, 2), Some((0, 2)));
        assert!(slots.share(1) && slots.share(1));
        for left in [true, true, false] {
            slots.give(1);
            assert_eq!((slots.is_taken(1), slots.is_taken(0)), (left, true));
        }
        assert_eq!(slots.used(), 1);
        slots.give(0);
        assert_eq!(slots.used(), 0);
    }

    #[test]
    fn slot_with_too_many_owners_is_not_shared_further() {
        let slots = Slots::new(64);
        slots.grow(64);
        let (slot, _) = slots.take(&mut Cursor::default(), 1).unwrap();
        for _ in 0..u16::MAX {
            assert!(slots.share(slot));
        }
        assert!(!slots.share(slot));
        for _ in 0..u16::MAX {
            slots.give(slot);
        }
        assert!(slots.is_taken(slot));
        slots.give(slot);
        assert!(!slots.is_taken(slot));
    }

    #[test]
    fn owners_on_many_threads_free_a_slot_once() {
        let slots = Slots::new(64);
        slots.grow(64);
        for _ in 0..2000 {
            let (slot, _) = slots.take(&mut Cursor::default(), 1).unwrap();
            for _ in 0..3 {
                assert!(slots.share(slot));
            }
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| slots.give(slot));
                }
            });
            assert_eq!(slots.used(), 0);
        }
    }

    #[test]
    fn runs_are_sequential_while_the_file_is_empty() {
        let slots = Slots::new(1000);
        slots.grow(1000);
        let mut cursor = Cursor::default();
        assert_eq!(slots.take(&mut cursor, 40), Some((0, 40)));
        assert_eq!(slots.take(&mut cursor, 40), Some((40, 24)));
        assert_eq!(slots.take(&mut cursor, 64), Some((64, 64)));
    }

    #[test]
    fn every_slot_can_be_taken_once_and_none_beyond_the_end() {
        let slots = Slots::new(1000);
        slots.grow(777);
        let mut cursor = slots.cursor(3);
        let mut seen = HashSet::new();
        let mut want = 1;
        while let Some((slot, count)) = slots.take(&mut cursor, want) {
            for slot in slot..slot + count {
                assert!(slot < 777 && seen.insert(slot));
            }
            want = want % 7 + 1;
        }
        assert_eq!(seen.len(), 777);
        assert_eq!(slots.used(), 777);
        slots.give(5);
        slots.give(700);
        let again: HashSet<_> = [slots.take(&mut cursor, 64), slots.take(&mut cursor, 64)].into();
        assert_eq!(again, [Some((5, 1)), Some((700, 1))].into());
        assert_eq!(slots.take(&mut cursor, 1), None);
        slots.grow(778);
        assert_eq!(slots.take(&mut cursor, 9), Some((777, 1)));
    }

    #[test]
    fn threads_never_take_the_same_slot() {
        let slots = Slots::new(1 << 14);
        slots.grow(1 << 14);
        let taken: Vec<Vec<Slot>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|n| {
                    let slots = &slots;
                    scope.spawn(move || {
                        let mut cursor = slots.cursor(n);
                        let mut mine = Vec::new();
                        let mut round = 0_u32;
                        while let Some((slot, count)) = slots.take(&mut cursor, round % 50 + 1) {
                            mine.extend(slot..slot + count);
                            round += 1;
                            if round.is_multiple_of(3)
                                && let Some(back) = mine.pop()
                            {
                                slots.give(back);
                            }
                        }
                        mine
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let all: HashSet<Slot> = taken.iter().flatten().copied().collect();
        assert_eq!(all.len(), taken.iter().map(Vec::len).sum::<usize>());
        assert_eq!(to_u64(all.len()), slots.used());
    }
}
