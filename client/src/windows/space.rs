//! Which parts of the swap file are free, and which have never been used. Pure.

use std::collections::BTreeMap;
use std::ops::Range;

/// What a system maps at least; offsets and lengths of parts are multiples of it.
pub(super) const GRANULE: u64 = 64 << 10;

/// The free parts of a file, and where the part that was never used begins.
#[derive(Debug)]
pub(super) struct Space {
    /// Start and end of each free part; no two of them touch.
    free: BTreeMap<u64, u64>,
    /// Nothing was ever taken from here on.
    fresh: u64,
}

impl Space {
    /// All of `range` is free; what is before `fresh` may have any content.
    pub(super) fn new(range: Range<u64>, fresh: u64) -> Self {
        Self { free: BTreeMap::from([(range.start, range.end)]), fresh }
    }

    /// Takes the first part that fits. Tells whether it has zeros only.
    pub(super) fn take(&mut self, len: u64) -> Option<(Range<u64>, bool)> {
        let fits = |(start, end): (&u64, &u64)| (end - start >= len).then_some((*start, *end));
        let (start, end) = self.free.iter().find_map(fits)?;
        self.free.remove(&start);
        let part = start..start.checked_add(len)?;
        if part.end < end {
            self.free.insert(part.end, end);
        }
        let fresh = part.start >= self.fresh;
        self.fresh = self.fresh.max(part.end);
        Some((part, fresh))
    }

    /// Gives a part back.
    pub(super) fn give(&mut self, part: Range<u64>) {
        let Range { mut start, mut end } = part;
        if let Some((&before, &touching)) = self.free.range(..start).next_back()
            && touching == start
        {
            self.free.remove(&before);
            start = before;
        }
        if let Some(after) = self.free.remove(&end) {
            end = after;
        }
        self.free.insert(start, end);
    }

    /// The longest part that can be taken.
    pub(super) fn largest(&self) -> u64 {
        self.free.iter().map(|(start, end)| end - start).max().unwrap_or(0)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Random numbers that a seed determines: SplitMix64.
    pub(in super::super) struct Random(u64);

    impl Random {
        pub(in super::super) fn new(seed: u64) -> Self {
            Self(seed)
        }

        /// Less than `end`, which must not be zero.
        pub(in super::super) fn below(&mut self, end: u32) -> u32 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = self.0;
            word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            u32::try_from((word ^ word >> 31) % u64::from(end)).unwrap()
        }
    }

    #[test]
    fn parts_never_overlap_and_all_comes_back() {
        for seed in 0..300 {
            println!("seed {seed}");
            let mut random = Random::new(seed);
            let mut space = Space::new(10..200, 10);
            let mut taken: Vec<Range<u64>> = Vec::new();
            let mut used = [false; 200];
            for _ in 0..random.below(200) {
                let n = u64::from(1 + random.below(20));
                if random.below(2) == 0 {
                    let longest = space.largest();
                    let Some((part, fresh)) = space.take(n) else {
                        assert!(longest < n);
                        continue;
                    };
                    assert_eq!(part.end - part.start, n);
                    assert!(part.start >= 10 && part.end <= 200);
                    assert!(taken.iter().all(|other| other.end <= part.start || part.end <= other.start));
                    let cells = usize::try_from(part.start).unwrap()..usize::try_from(part.end).unwrap();
                    assert!(!fresh || used[cells.clone()].iter().all(|used| !used));
                    used[cells].fill(true);
                    taken.push(part);
                } else if !taken.is_empty() {
                    let index = usize::try_from(n).unwrap() % taken.len();
                    space.give(taken.swap_remove(index));
                }
            }
            taken.into_iter().for_each(|part| space.give(part));
            assert_eq!(space.free, BTreeMap::from([(10, 200)]));
        }
    }
}
