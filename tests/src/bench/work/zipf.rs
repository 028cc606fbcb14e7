//! Zipf-distributed ranks by the method of Gray et al. (SIGMOD 1994), as YCSB has it, scattered over the pages.

use fmalloc_proto::num::{to_u64, to_usize};

use crate::rng::Rng;

/// A distribution over `0..n`.
#[derive(Debug, Clone)]
pub(crate) struct Zipf {
    n: usize,
    theta: f64,
    alpha: f64,
    zeta: f64,
    eta: f64,
}

impl Zipf {
    /// With exponent `theta`, less than 1.
    pub(crate) fn new(n: usize, theta: f64) -> Self {
        let zeta_of = |n: usize| (1..=n).map(|rank| float(rank).powf(-theta)).sum::<f64>();
        let zeta = zeta_of(n);
        let eta = (1.0 - (2.0 / float(n)).powf(1.0 - theta)) / (1.0 - zeta_of(2) / zeta);
        Self { n, theta, alpha: 1.0 / (1.0 - theta), zeta, eta }
    }

    /// The next rank: 0 is the most frequent.
    pub(crate) fn rank(&self, rng: &mut Rng) -> usize {
        let uniform = float(to_usize(rng.word() >> 11)) / (1_u64 << 53) as f64;
        let scaled = uniform * self.zeta;
        if scaled < 1.0 {
            return 0;
        }
        if scaled < 1.0 + 0.5_f64.powf(self.theta) {
            return 1;
        }
        let rank = float(self.n) * (self.eta * uniform - self.eta + 1.0).powf(self.alpha);
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "from 0 to n, rounded down"
        )]
        let rank = rank as usize;
        rank.min(self.n - 1)
    }

    /// The next page: frequent ones are all over the memory.
    pub(crate) fn page(&self, rng: &mut Rng) -> usize {
        to_usize(Rng::new(to_u64(self.rank(rng))).word() % to_u64(self.n))
    }
}

#[allow(clippy::cast_precision_loss, reason = "counts of pages and 53-bit integers")]
fn float(n: usize) -> f64 {
    n as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_are_those_of_zipf() {
        let (n, draws) = (1000, 200_000);
        let zipf = Zipf::new(n, 0.99);
        let mut rng = Rng::new(1);
        let mut counts = vec![0_u32; n];
        (0..draws).for_each(|_| counts[zipf.rank(&mut rng)] += 1);
        for rank in [0, 1] {
            let expected = f64::from(draws) * float(rank + 1).powf(-0.99) / zipf.zeta;
            let found = f64::from(counts[rank]);
            assert!((found / expected - 1.0).abs() < 0.03, "rank {rank}: {found} of {expected}");
        }
        // The method is approximate beyond the first two: the sum over a stretch is what counts.
        let expected: f64 = (10..100).map(|rank| float(rank + 1).powf(-0.99)).sum::<f64>() / zipf.zeta;
        let found = f64::from(counts[10..100].iter().sum::<u32>()) / f64::from(draws);
        assert!((found / expected - 1.0).abs() < 0.05, "{found} of {expected}");
    }
}
