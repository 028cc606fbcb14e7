//! The books of the addresses that anonymous mappings are carved from: which pages are free, and of the others how they
//! may be accessed and whether swap is claimed for them. Makes no system call; [`crate::maps`] does.
//!
//! Pages are numbered from the start of the area. Addresses are never given back to the kernel while the process lives:
//! it could give them to another thread before the daemon has heard of it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// A page that is in use, as the program sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Use {
    /// `PROT_` bits.
    pub(crate) prot: i32,
    /// Swap is claimed for it.
    pub(crate) committed: bool,
    /// Something else has been mapped over it: the kernel's business.
    pub(crate) foreign: bool,
}

/// Neighbouring pages of the same kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) pages: Range<usize>,
    pub(crate) used: Use,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Area {
    /// Lengths by start. Neighbours are always merged.
    free: BTreeMap<usize, usize>,
    /// The same by length.
    by_len: BTreeSet<(usize, usize)>,
    /// Ends and kinds by start.
    used: BTreeMap<usize, (usize, Use)>,
}

impl Area {
    /// An area of which all is free.
    pub(crate) fn new(pages: usize) -> Self {
        let mut area = Self { free: BTreeMap::new(), by_len: BTreeSet::new(), used: BTreeMap::new() };
        area.insert_free(0..pages);
        area
    }

    /// Takes the smallest free stretch that is long enough, from its front.
    pub(crate) fn take(&mut self, pages: usize, used: Use) -> Option<Range<usize>> {
        let (_, start) = *self.by_len.range((pages, 0)..).next()?;
        self.take_at(start..start + pages, used).then_some(start..start + pages)
    }

    /// Takes these pages if all of them are free.
    pub(crate) fn take_at(&mut self, range: Range<usize>, used: Use) -> bool {
        let Some((start, len)) = self.free.range(..=range.start).next_back().map(|(s, l)| (*s, *l)) else {
            return false;
        };
        if range.is_empty() || range.end > start + len {
            return false;
        }
        self.remove_free(start);
        self.insert_free(start..range.start);
        self.insert_free(range.end..start + len);
        self.insert_used(range, used);
        true
    }

    /// Takes all pages of a range that are free.
    pub(crate) fn take_gaps(&mut self, range: Range<usize>, used: Use) {
        let mut start = range.start;
        let pieces = self.pieces(range.clone());
        for (from, to) in pieces.iter().map(|p| (p.pages.start, p.pages.end)).chain([(range.end, range.end)])
        {
            if start < from {
                self.take_at(start..from, used);
            }
            start = to;
        }
    }

    /// Frees what is in use of these pages; foreign ones must have been made ordinary before.
    pub(crate) fn give(&mut self, range: Range<usize>) {
        for piece in self.pieces(range) {
            self.cut(&piece.pages);
            let (mut start, mut end) = (piece.pages.start, piece.pages.end);
            if let Some((before, len)) = self.free.range(..start).next_back().map(|(s, l)| (*s, *l))
                && before + len == start
            {
                self.remove_free(before);
                start = before;
            }
            if let Some(len) = self.free.get(&end).copied() {
                self.remove_free(end);
                end += len;
            }
            self.insert_free(start..end);
        }
    }

    /// What is in use within a range, in order.
    pub(crate) fn pieces(&self, range: Range<usize>) -> Vec<Piece> {
        let before = self.used.range(..range.start).next_back();
        before
            .into_iter()
            .chain(self.used.range(range.start..range.end.max(range.start)))
            .map(|(start, (end, used))| Piece {
                pages: (*start).max(range.start)..(*end).min(range.end),
                used: *used,
            })
            .filter(|piece| !piece.pages.is_empty())
            .collect()
    }

    /// Whether all pages of a range are in use.
    pub(crate) fn is_used(&self, range: Range<usize>) -> bool {
        let len = range.len();
        self.pieces(range).iter().map(|piece| piece.pages.len()).sum::<usize>() == len
    }

    /// Changes what is in use of these pages.
    pub(crate) fn change(&mut self, range: Range<usize>, change: impl Fn(&mut Use)) {
        for piece in self.pieces(range) {
            let mut used = piece.used;
            change(&mut used);
            if used != piece.used {
                self.cut(&piece.pages);
                self.insert_used(piece.pages, used);
            }
        }
    }

    /// Pages in use.
    #[cfg(test)]
    fn used_pages(&self) -> usize {
        self.used.iter().map(|(start, (end, _))| end - start).sum()
    }

    /// Takes a range that lies within one piece out of it.
    fn cut(&mut self, range: &Range<usize>) {
        let Some((start, (end, used))) = self.used.range(..=range.start).next_back().map(|(s, u)| (*s, *u))
        else {
            return;
        };
        self.used.remove(&start);
        if start < range.start {
            self.used.insert(start, (range.start, used));
        }
        if range.end < end {
            self.used.insert(range.end, (end, used));
        }
    }

    /// Adds a piece, and merges it with neighbours of its kind.
    fn insert_used(&mut self, mut range: Range<usize>, used: Use) {
        if let Some((before, (end, kind))) = self.used.range(..range.start).next_back().map(|(s, u)| (*s, *u))
            && end == range.start
            && kind == used
        {
            self.used.remove(&before);
            range.start = before;
        }
        if let Some((end, kind)) = self.used.get(&range.end).copied()
            && kind == used
        {
            self.used.remove(&range.end);
            range.end = end;
        }
        self.used.insert(range.start, (range.end, used));
    }

    fn insert_free(&mut self, range: Range<usize>) {
        if !range.is_empty() {
            self.free.insert(range.start, range.len());
            self.by_len.insert((range.len(), range.start));
        }
    }

    fn remove_free(&mut self, start: usize) {
        if let Some(len) = self.free.remove(&start) {
            self.by_len.remove(&(len, start));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGES: usize = 64;
    const PLAIN: Use = Use { prot: 3, committed: true, foreign: false };

    #[derive(Debug, Clone)]
    enum Step {
        Take(usize, i32),
        TakeAt(usize, usize, i32),
        Give(usize, usize),
        Change(usize, usize, i32),
    }

    fn step() -> impl Strategy<Value = Step> {
        let range = (0..PAGES, 0..PAGES / 2);
        prop_oneof![
            (1..PAGES / 2, 0..3).prop_map(|(pages, prot)| Step::Take(pages, prot)),
            (range.clone(), 0..3).prop_map(|((start, len), prot)| Step::TakeAt(start, len, prot)),
            range.clone().prop_map(|(start, len)| Step::Give(start, len)),
            (range, 0..3).prop_map(|((start, len), prot)| Step::Change(start, len, prot)),
        ]
    }

    /// One entry a page.
    type Model = [Option<Use>; PAGES];

    fn longest_free(model: &Model) -> usize {
        model.split(Option::is_some).map(<[_]>::len).max().unwrap_or(0)
    }

    fn check(area: &Area, model: &Model) {
        for (page, used) in model.iter().enumerate() {
            let pieces = area.pieces(page..page + 1);
            assert_eq!(pieces.first().map(|piece| piece.used), *used, "page {page}");
        }
        assert_eq!(area.used_pages(), model.iter().flatten().count());
        let free: usize = area.free.values().sum();
        assert_eq!(free + area.used_pages(), PAGES);
        assert_eq!(area.by_len.len(), area.free.len());
        // Merged: no two neighbours could be one.
        assert!(area.free.iter().all(|(start, len)| !area.free.contains_key(&(start + len))));
        assert!(area.used.values().all(|(end, used)| area.used.get(end).is_none_or(|next| next.1 != *used)));
    }

    proptest! {
        #[test]
        fn books_agree_with_a_table_of_pages(steps in proptest::collection::vec(step(), 1..80)) {
            let mut area = Area::new(PAGES);
            let mut model: Model = [None; PAGES];
            for step in steps {
                match step {
                    Step::Take(pages, prot) => {
                        let used = Use { prot, ..PLAIN };
                        let fits = longest_free(&model) >= pages;
                        let taken = area.take(pages, used);
                        prop_assert_eq!(taken.is_some(), fits);
                        if let Some(range) = taken {
                            prop_assert_eq!(range.len(), pages);
                            prop_assert!(model[range.clone()].iter().all(Option::is_none));
                            model[range].fill(Some(used));
                        }
                    }
                    Step::TakeAt(start, len, prot) => {
                        let (range, used) = (start..(start + len).min(PAGES), Use { prot, ..PLAIN });
                        let free = !range.is_empty() && model[range.clone()].iter().all(Option::is_none);
                        prop_assert_eq!(area.take_at(range.clone(), used), free);
                        if free {
                            model[range].fill(Some(used));
                        }
                    }
                    Step::Give(start, len) => {
                        let range = start..(start + len).min(PAGES);
                        area.give(range.clone());
                        model[range].fill(None);
                    }
                    Step::Change(start, len, prot) => {
                        let range = start..(start + len).min(PAGES);
                        prop_assert_eq!(
                            area.is_used(range.clone()),
                            model[range.clone()].iter().all(Option::is_some)
                        );
                        area.change(range.clone(), |used| used.prot = prot);
                        model[range].iter_mut().flatten().for_each(|used| used.prot = prot);
                    }
                }
                check(&area, &model);
            }
        }
    }

    #[test]
    fn the_smallest_stretch_that_fits_is_taken() {
        let mut area = Area::new(100);
        assert_eq!(area.take(10, PLAIN), Some(0..10));
        assert_eq!(area.take(5, PLAIN), Some(10..15));
        assert_eq!(area.take(10, PLAIN), Some(15..25));
        area.give(10..15);
        assert_eq!(area.take(4, PLAIN), Some(10..14));
        assert_eq!(area.take(2, PLAIN), Some(25..27), "one page is left there");
        assert_eq!(area.take(74, PLAIN), None);
    }
}
