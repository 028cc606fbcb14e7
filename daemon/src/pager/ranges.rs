//! A set of page indices, kept as ranges: which part of a region is committed.

use std::collections::BTreeMap;
use std::ops::Range;

/// Disjoint, merged ranges.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges {
    by_start: BTreeMap<u64, u64>,
}

impl Ranges {
    /// Number of indices in the set.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.by_start.iter().map(|(start, end)| end - start).sum()
    }

    /// How many indices of `range` are in the set.
    #[must_use]
    pub fn overlap(&self, range: &Range<u64>) -> u64 {
        let before = self.by_start.range(..range.start).next_back();
        before
            .into_iter()
            .chain(self.by_start.range(range.start..range.end))
            .map(|(start, end)| end.min(&range.end).saturating_sub(*start.max(&range.start)))
            .sum()
    }

    /// End of the stretch that `index` lies in, if it is in the set.
    #[must_use]
    pub fn end_from(&self, index: u64) -> Option<u64> {
        self.by_start.range(..=index).next_back().map(|(_, end)| *end).filter(|end| *end > index)
    }

    /// Adds `range`.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        while let Some((&s, &e)) = self.by_start.range(..=end).next_back().filter(|(_, e)| **e >= start) {
            self.by_start.remove(&s);
            start = start.min(s);
            end = end.max(e);
        }
        self.by_start.insert(start, end);
    }

    /// Takes `range` out.
    pub fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        while let Some((&s, &e)) =
            self.by_start.range(..range.end).next_back().filter(|(_, e)| **e > range.start)
        {
            self.by_start.remove(&s);
            if e > range.end {
                self.by_start.insert(range.end, e);
            }
            if s < range.start {
                self.by_start.insert(s, range.start);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn behaves_as_a_set(ops in proptest::collection::vec((any::<bool>(), 0_u64..60, 0_u64..20), 1..60)) {
            let mut ranges = Ranges::default();
            let mut model = [false; 80];
            for (add, start, len) in ops {
                let range = start..start + len;
                if add { ranges.insert(range.clone()) } else { ranges.remove(range.clone()) }
                range.for_each(|i| model[usize::try_from(i).unwrap()] = add);
                prop_assert_eq!(ranges.total(), model.iter().filter(|set| **set).count() as u64);
                prop_assert_eq!(ranges.overlap(&(10..30)), model[10..30].iter().filter(|set| **set).count() as u64);
                for (i, set) in model.iter().enumerate() {
                    let end = ranges.end_from(i as u64);
                    prop_assert_eq!(end.is_some(), *set);
                    if let Some(end) = end {
                        let end = usize::try_from(end).unwrap();
                        prop_assert!(model[i..end].iter().all(|set| *set) && !model[end]);
                    }
                }
            }
        }
    }
}
