//! Free runs by size, so that one that is large enough is found in constant time: two-level segregated fit, its lists through
//! the runs' records.

use super::run::{NIL, Run};
use super::table::Table;

/// Bins to each doubling of sizes.
const STEPS: u32 = 8;
const STEPS_LOG2: u32 = STEPS.ilog2();
/// For sizes of 32 bits.
const LEVELS: usize = 30;
const BINS: usize = LEVELS * STEPS as usize;
/// How many runs to look at in the one bin whose runs may be large enough or not.
const TRIES: usize = 4;

/// The heads of the lists, and which are not empty.
#[derive(Debug)]
pub(super) struct Bins {
    levels: u32,
    steps: [u8; LEVELS],
    heads: [u32; BINS],
}

impl Bins {
    /// No runs.
    pub(super) const fn new() -> Self {
        Self { levels: 0, steps: [0; LEVELS], heads: [NIL; BINS] }
    }

    /// A run of at least `pages` pages.
    pub(super) fn find(&self, runs: &Table<Run>, pages: u32) -> Option<u32> {
        // From this bin on, every run is large enough.
        let sure = match pages.checked_next_multiple_of(grain(pages)) {
            Some(rounded) => self.first_from(bin(rounded)),
            None => None,
        };
        sure.or_else(|| {
            let mut id = self.heads[bin(pages)];
            for _ in 0..TRIES {
                if id == NIL {
                    break;
                }
                if runs.get(id).pages() >= pages {
                    return Some(id);
                }
                id = runs.get(id).next();
            }
            None
        })
    }

    /// Adds a run, by the number of its pages.
    pub(super) fn insert(&mut self, runs: &Table<Run>, id: u32) {
        let run = runs.get(id);
        let bin = bin(run.pages());
        let head = self.heads[bin];
        run.set_prev(NIL);
        run.set_next(head);
        if head != NIL {
            runs.get(head).set_prev(id);
        }
        self.heads[bin] = id;
        self.mark(bin, true);
    }

    /// Takes a run out, which must still have as many pages as when it came in.
    pub(super) fn remove(&mut self, runs: &Table<Run>, id: u32) {
        let run = runs.get(id);
        let bin = bin(run.pages());
        let (prev, next) = (run.prev(), run.next());
        if next != NIL {
            runs.get(next).set_prev(prev);
        }
        if prev != NIL {
            runs.get(prev).set_next(next);
        } else {
            self.heads[bin] = next;
            self.mark(bin, next != NIL);
        }
    }

    /// Visits the runs of all bins, with the bins' own idea of where they belong.
    pub(super) fn for_each(&self, runs: &Table<Run>, mut visit: impl FnMut(u32, bool)) {
        for (number, head) in self.heads.iter().enumerate() {
            let mut id = *head;
            while id != NIL {
                let run = runs.get(id);
                visit(id, bin(run.pages()) == number && self.is_marked(number));
                id = run.next();
            }
        }
    }

    fn first_from(&self, bin: usize) -> Option<u32> {
        let (level, step) = (bin / STEPS as usize, bin % STEPS as usize);
        let here = u32::from(self.steps[level]) & (u32::MAX << step);
        let bin = if here != 0 {
            level * STEPS as usize + here.trailing_zeros() as usize
        } else {
            let above = self.levels & (u32::MAX << level << 1);
            if above == 0 {
                return None;
            }
            let level = above.trailing_zeros() as usize;
            level * STEPS as usize + self.steps[level].trailing_zeros() as usize
        };
        Some(self.heads[bin])
    }

    fn mark(&mut self, bin: usize, full: bool) {
        let (level, step) = (bin / STEPS as usize, bin % STEPS as usize);
        let steps = &mut self.steps[level];
        *steps = if full { *steps | 1 << step } else { *steps & !(1 << step) };
        let any = *steps != 0;
        self.levels = if any { self.levels | 1 << level } else { self.levels & !(1 << level) };
    }

    fn is_marked(&self, bin: usize) -> bool {
        let (level, step) = (bin / STEPS as usize, bin % STEPS as usize);
        self.levels >> level & 1 == 1 && self.steps[level] >> step & 1 == 1
    }
}

/// The bin of runs with this many pages.
fn bin(pages: u32) -> usize {
    if pages < STEPS {
        return pages as usize;
    }
    let shift = pages.ilog2() - STEPS_LOG2;
    ((shift + 1) * STEPS + (pages >> shift & (STEPS - 1))) as usize
}

/// By how much the runs of one bin may differ, and one.
fn grain(pages: u32) -> u32 {
    if pages < STEPS { 1 } else { 1 << (pages.ilog2() - STEPS_LOG2) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_are_in_order_of_size() {
        let mut before = 0;
        for pages in (1..100_000).chain((1..2000).map(|n| u32::MAX - 2000 + n)).chain([u32::MAX]) {
            let bin = bin(pages);
            assert!(bin >= before && bin < BINS);
            before = bin;
        }
        assert_eq!(before, BINS - 1);
    }

    #[test]
    fn finds_a_run_if_there_is_one_in_a_larger_bin() {
        let runs = Table::<Run>::new(1000).unwrap();
        assert!(runs.ensure(1000));
        let mut bins = Bins::new();
        let sizes = [1, 2, 7, 8, 9, 15, 16, 17, 100, 1000, 65_536, u32::MAX];
        for (id, pages) in (1..).zip(sizes) {
            runs.get(id).set_pages(pages);
            bins.insert(&runs, id);
        }
        for wanted in (1..=65_536).chain([1 << 31, u32::MAX]) {
            let id = bins.find(&runs, wanted).unwrap();
            assert!(runs.get(id).pages() >= wanted);
            let best = sizes.into_iter().find(|pages| *pages >= wanted).unwrap();
            assert!(runs.get(id).pages() == best || best - wanted < grain(wanted), "{wanted}");
        }
        for id in 1..=12 {
            bins.remove(&runs, id);
        }
        assert_eq!(bins.find(&runs, 1), None);
        assert_eq!(bins.levels, 0);
    }
}
