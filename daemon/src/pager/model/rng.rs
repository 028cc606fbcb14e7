//! Random numbers that a seed determines.

#[derive(Debug, Clone)]
pub(in crate::pager) struct Rng(u64);

impl Rng {
    pub(in crate::pager) fn new(seed: u64) -> Self {
        let mut rng = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        rng.next();
        rng.next();
        rng
    }

    pub(in crate::pager) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `end`, which must be above zero.
    pub(in crate::pager) fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }

    /// From `low` to `high`, both included.
    pub(in crate::pager) fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    pub(in crate::pager) fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap()
    }

    pub(in crate::pager) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}
