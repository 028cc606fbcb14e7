//! The page table of a region: one word for each page. Pure; called with the pager's lock held.

use super::frames::Origin;
use super::table::{Table, Zeroed};

/// Where a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Page {
    /// Not in use: no access. The origin says what the file has.
    Void(Origin),
    /// In use and not in RAM.
    Out(Origin),
    /// In a frame.
    In(u32),
}

/// A [`Page`] in 32 bits: three of each for what has no frame, and the frame's number after them. Zero is a fresh page.
#[derive(Debug, Clone, Copy)]
struct Word(u32);

/// The first word that means a frame.
const FRAMES: u32 = 6;

/// Most frames that a table can name.
pub(super) const MAX_FRAMES: u32 = u32::MAX - FRAMES;

// SAFETY: an integer.
unsafe impl Zeroed for Word {}

impl From<Page> for Word {
    fn from(page: Page) -> Self {
        Self(match page {
            Page::Out(origin) => origin as u32,
            Page::Void(origin) => 3 + origin as u32,
            Page::In(frame) => FRAMES + frame,
        })
    }
}

impl From<Word> for Page {
    fn from(Word(word): Word) -> Self {
        let origin = match word % 3 {
            0 => Origin::Fresh,
            1 => Origin::Stale,
            _ => Origin::Cold,
        };
        match word {
            0..3 => Self::Out(origin),
            3..FRAMES => Self::Void(origin),
            _ => Self::In(word - FRAMES),
        }
    }
}

/// Pages that a fault reads on from, at most.
const AHEAD_BYTES: usize = 1 << 20;

/// A region's pages, and where it is being read in order.
#[derive(Debug)]
pub(super) struct Pages {
    words: Table<Word>,
    /// How many are out of RAM with content.
    cold: u32,
    /// The page after the last one that was read.
    next: u32,
    /// How many were read in order.
    streak: u32,
    /// End of what was asked for ahead.
    ahead: u32,
    /// Pages to read ahead at a time; none if the program reads at random.
    window: u32,
}

impl Pages {
    /// A table of `len` pages of `unit` bytes, all `page`; none without memory.
    pub(super) fn new(len: u32, unit: usize, page: Page) -> Option<Self> {
        let mut words = Table::new(index(len))?;
        if page != Page::Out(Origin::Fresh) {
            words.fill(Word::from(page));
        }
        let cold = if page == Page::Out(Origin::Cold) { len } else { 0 };
        let mut pages = Self { words, cold, next: 0, streak: 0, ahead: 0, window: 0 };
        pages.read_ahead(true, unit);
        Some(pages)
    }

    /// Bytes of a table of `len` pages.
    pub(super) fn bytes(len: u32) -> usize {
        index(len) * size_of::<Word>()
    }

    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.words.len()).unwrap_or(u32::MAX)
    }

    /// Switches readahead on or off.
    pub(super) fn read_ahead(&mut self, on: bool, unit: usize) {
        let window = if on { u32::try_from(AHEAD_BYTES / unit).unwrap_or(1).max(1) } else { 0 };
        self.window = window;
    }

    /// The page; void outside the table.
    pub(super) fn get(&self, page: u32) -> Page {
        self.words.get(index(page)).map_or(Page::Void(Origin::Fresh), |word| Page::from(*word))
    }

    pub(super) fn set(&mut self, page: u32, value: Page) {
        if let Some(word) = self.words.get_mut(index(page)) {
            let old = Page::from(std::mem::replace(word, Word::from(value)));
            self.cold -= u32::from(old == Page::Out(Origin::Cold));
            self.cold += u32::from(value == Page::Out(Origin::Cold));
        }
    }

    /// How many are out of RAM with content.
    pub(super) fn cold(&self) -> u32 {
        self.cold
    }

    /// Notes that a page is being read from the file, and gives the pages to ask for ahead of the next ones.
    pub(super) fn read(&mut self, page: u32) -> std::ops::Range<u32> {
        self.streak = if page == self.next { self.streak.saturating_add(1) } else { 0 };
        self.next = page.saturating_add(1);
        if self.streak == 0 {
            self.ahead = 0;
        }
        let start = self.next.max(self.ahead);
        // The second half of a window is read while the program is in the first.
        if self.streak < 2 || start > self.next.saturating_add(self.window / 2) {
            return 0..0;
        }
        let mut end = start;
        let most = start.saturating_add(self.window).min(self.len());
        while end < most && self.get(end) == Page::Out(Origin::Cold) {
            end += 1;
        }
        self.ahead = end;
        start..end
    }
}

fn index(page: u32) -> usize {
    fmalloc_proto::num::to_usize(u64::from(page))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_mean_what_they_were_made_from() {
        let origins = [Origin::Fresh, Origin::Stale, Origin::Cold];
        let out = origins.map(Page::Out);
        let void = origins.map(Page::Void);
        for page in out.into_iter().chain(void).chain([Page::In(0), Page::In(MAX_FRAMES)]) {
            assert_eq!(Page::from(Word::from(page)), page);
        }
        assert_eq!(Word::from(Page::Out(Origin::Fresh)).0, 0, "a table of zeros is one of fresh pages");
    }

    #[test]
    fn reading_in_order_asks_for_each_page_once_and_ahead() {
        let mut pages = Pages::new(100, 64 << 10, Page::Out(Origin::Cold)).unwrap();
        let mut asked = Vec::new();
        for page in 0..100 {
            let ahead = pages.read(page);
            assert!(ahead.is_empty() || ahead.start > page);
            asked.extend(ahead);
        }
        assert_eq!(asked, (2..100).collect::<Vec<_>>());
        assert!((0..100).step_by(7).all(|page| pages.read(page).is_empty()), "not in order");
        pages.read_ahead(false, 64 << 10);
        assert!((0..100).all(|page| pages.read(page).is_empty()));
    }

    #[test]
    fn readahead_stops_at_what_is_not_in_the_file() {
        let mut pages = Pages::new(8, 64 << 10, Page::Out(Origin::Cold)).unwrap();
        pages.set(5, Page::Out(Origin::Fresh));
        let asked: Vec<u32> = (0..4).flat_map(|page| pages.read(page)).collect();
        assert_eq!(asked, [2, 3, 4]);
    }
}
