//! Pseudo-random numbers. The seed of a test is printed, and shown if the test fails: FMALLOC_TEST_SEED repeats it.

use std::time::{SystemTime, UNIX_EPOCH};

/// SplitMix64.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// A sequence of its own for each seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }

    /// A number less than `end`, which must not be zero.
    pub fn below(&mut self, end: u64) -> u64 {
        self.word() % end
    }

    /// A number less than `end`, which must not be zero.
    pub fn index(&mut self, end: usize) -> usize {
        fmalloc_proto::num::to_usize(self.below(fmalloc_proto::num::to_u64(end)))
    }

    /// A range of at most `most` elements within `0..end`, not empty.
    pub fn range(&mut self, end: usize, most: usize) -> std::ops::Range<usize> {
        let start = self.index(end);
        start..start + 1 + self.index(most.min(end - start))
    }
}

/// FMALLOC_TEST_SEED, or a new seed, printed.
#[must_use]
pub fn seed() -> u64 {
    let given = std::env::var("FMALLOC_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.subsec_nanos().into())
    });
    println!("FMALLOC_TEST_SEED={seed}");
    seed
}
