//! How much of a client's budget the warm pool shall have: found at run time from what faults show.
//!
//! A page that comes back tells how many pages were evicted since it was: its distance. With more of the budget packed,
//! pages of larger distance are still in RAM, but a page stays hot for a shorter time and packing costs time for each
//! eviction. From the distances seen lately follows what each split would have cost, and the cheapest is approached in
//! small steps. Data that does not pack, and data that is read in order and does not come back, get no pool at all.
//!
//! Costs are in tenths of a microsecond of a thread's time, means as measured on a virtual machine with an SSD (those of a
//! fault that reads are mostly its slowest ones); only their ratios matter, and they are far apart.

/// A fault that waits for the swap file.
const READ: u64 = 900;
/// A fault that unpacks.
const UNPACK: u64 = 130;
/// A page that was read ahead, in large reads that nobody waits for.
const READ_AHEAD: u64 = 45;
/// A page that was unpacked ahead.
const UNPACK_AHEAD: u64 = 12;
/// An eviction that packs, beyond one that does not.
const PACK: u64 = 20;

/// Distances are counted in so many steps, each a sixteenth of the budget.
const STEPS: usize = 64;
const STEPS_PER_BUDGET: u64 = 16;
/// Splits that are weighed: eighths of the budget.
const CHOICES: u64 = 8;
/// The largest part that may be packed, in eighths: hot pages are what a program works on.
const MOST: u64 = 6;
/// Evictions between two looks, as a part of the budget.
const PERIOD: u64 = 8;
/// A change must save one part in so many to be worth while.
const WORTH: u64 = 16;
/// One in so many evictions is packed to see how well, while the pool is not used.
const SAMPLE: u64 = 64;

/// What was seen of one kind of pages.
#[derive(Debug)]
struct Distances {
    steps: [u64; STEPS],
    /// Farther than all steps.
    far: u64,
}

impl Default for Distances {
    fn default() -> Self {
        Self { steps: [0; STEPS], far: 0 }
    }
}

impl Distances {
    fn all(&self) -> u64 {
        self.steps.iter().sum::<u64>() + self.far
    }

    /// How many came back at a distance below `pages`.
    fn below(&self, pages: u64, budget: u64) -> u64 {
        let step = (budget / STEPS_PER_BUDGET).max(1);
        let whole = usize::try_from(pages / step).unwrap_or(STEPS).min(STEPS);
        let part = self.steps.get(whole).map_or(0, |count| count * (pages % step) / step);
        self.steps[..whole].iter().sum::<u64>() + part
    }

    fn fade(&mut self) {
        self.steps.iter_mut().for_each(|count| *count -= *count / 4);
        self.far -= self.far / 4;
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Split {
    demanded: Distances,
    ahead: Distances,
    evictions: u64,
    evictions_before: u64,
    /// Bytes of a packed page on average, incompressible ones at their full size.
    packed_len: u64,
    samples: u64,
    /// Share of the budget in pages that the pool may have.
    pages: u64,
}

impl Default for Split {
    fn default() -> Self {
        Self {
            demanded: Distances::default(),
            ahead: Distances::default(),
            evictions: 0,
            evictions_before: 0,
            packed_len: 4096,
            samples: 0,
            pages: 0,
        }
    }
}

impl Split {
    /// A page has come back, `distance` evictions after its own; `waited` if a thread waited for it, else it was read
    /// ahead.
    pub(super) fn came_back(&mut self, distance: u64, budget: u64, waited: bool) {
        let seen = if waited { &mut self.demanded } else { &mut self.ahead };
        let step = distance / (budget / STEPS_PER_BUDGET).max(1);
        match usize::try_from(step).ok().and_then(|step| seen.steps.get_mut(step)) {
            Some(count) => *count += 1,
            None => seen.far += 1,
        }
    }

    /// Whether a page on its way out shall be packed only to see how well that goes.
    pub(super) fn wants_sample(&mut self) -> bool {
        self.samples += 1;
        self.samples.is_multiple_of(SAMPLE)
    }

    /// A page was packed into so many bytes.
    pub(super) fn packed(&mut self, len: usize) {
        let len = u64::try_from(len).unwrap_or(4096).min(4096);
        self.packed_len = (self.packed_len * 63 + len).div_ceil(64);
    }

    /// Counts an eviction. Gives the pool's new share in pages when it is time to change it.
    pub(super) fn evicted(&mut self, budget: u64) -> Option<u64> {
        self.evictions += 1;
        if self.evictions < (budget / PERIOD).max(256) {
            return None;
        }
        let best = self.best(budget);
        let step = budget / CHOICES / 2;
        self.pages = if best > self.pages {
            best.min(self.pages + step)
        } else {
            best.max(self.pages.saturating_sub(step))
        };
        self.demanded.fade();
        self.ahead.fade();
        self.evictions_before = (self.evictions_before + self.evictions) * 3 / 4;
        self.evictions = 0;
        Some(self.pages)
    }

    /// The pool's share that would have cost least, in pages.
    fn best(&self, budget: u64) -> u64 {
        let now = self.cost(self.pages, budget);
        let choices = (0..=MOST).map(|part| budget * part / CHOICES);
        let best = choices.min_by_key(|pages| self.cost(*pages, budget)).unwrap_or(0);
        if self.cost(best, budget) + now / WORTH < now { best } else { self.pages }
    }

    /// What it would have cost with a pool of `pages`.
    fn cost(&self, pages: u64, budget: u64) -> u64 {
        // So many pages more (or fewer) are evicted than now, or so much earlier.
        let (sooner, later) = (pages.saturating_sub(self.pages), self.pages.saturating_sub(pages));
        let reach = pages * 4096 / self.packed_len.max(64);
        let step = (budget / STEPS_PER_BUDGET).max(1);
        let kind = |seen: &Distances, read: u64, unpack: u64| {
            // A smaller hot part loses pages to the pool: as many as came back just beyond its end, per page.
            let lost = seen.steps[0].min(seen.steps[1]) * sooner / step;
            let saved = seen.below(later, budget);
            let near = seen.below((reach + later).saturating_sub(sooner), budget).max(saved) - saved;
            let cost_of_lost = if pages == 0 { read } else { unpack };
            lost * cost_of_lost + near * unpack + (seen.all() - saved - near) * read
        };
        let packing = if pages == 0 { 0 } else { (self.evictions + self.evictions_before) * PACK };
        kind(&self.demanded, READ, UNPACK) + kind(&self.ahead, READ_AHEAD, UNPACK_AHEAD) + packing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: u64 = 16_384;

    /// Lets `faults` pages come back, at the distances that `distance` gives, and evicts as many. Gives the share.
    fn run(
        split: &mut Split,
        rounds: u64,
        waited: bool,
        packed: usize,
        distance: impl Fn(u64, u64) -> u64,
    ) -> u64 {
        for n in 0..rounds * BUDGET {
            split.came_back(distance(n, split.pages), BUDGET, waited);
            split.packed(packed);
            split.evicted(BUDGET);
        }
        split.pages
    }

    #[test]
    fn pages_that_come_back_just_beyond_the_budget_get_a_pool() {
        let pages = run(&mut Split::default(), 20, true, 1500, |n, _| n * 7 % (BUDGET * 3 / 2));
        assert!(pages >= BUDGET / 4, "{pages}");
    }

    #[test]
    fn data_that_does_not_pack_gets_none() {
        assert_eq!(run(&mut Split::default(), 20, true, 4096, |n, _| n * 7 % (BUDGET * 3 / 2)), 0);
    }

    #[test]
    fn pages_that_come_back_late_or_never_get_none() {
        assert_eq!(run(&mut Split::default(), 20, false, 2000, |_, _| BUDGET * 3), 0);
        assert_eq!(run(&mut Split::default(), 20, true, 2000, |_, _| BUDGET * 30), 0);
    }

    #[test]
    fn a_pool_that_is_of_no_use_any_more_goes() {
        let mut split = Split::default();
        assert!(run(&mut split, 20, true, 1000, |n, _| n * 7 % (BUDGET * 3 / 2)) > 0);
        assert_eq!(run(&mut split, 20, false, 1000, |_, _| BUDGET * 9), 0);
    }

    #[test]
    fn a_loop_that_fits_when_packed_is_packed() {
        // A scan of one and a third times the budget, again and again: with a pool of p pages each page comes back p pages
        // further on than without.
        let pages = run(&mut Split::default(), 30, false, 2200, |_, pool| BUDGET / 3 + pool);
        assert!(pages * 4096 / 2200 > BUDGET / 3 + pages, "{pages}");
    }
}
