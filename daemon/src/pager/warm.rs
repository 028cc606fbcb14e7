//! The warm pool: packed copies of pages in the client's arena, as a log of segments. What is added goes to the end of
//! the log, what is oldest leaves first; segments of which little is still of use are cleaned, which keeps the order.
//!
//! ```text
//! segment   entries, each a multiple of 8 bytes: page u64 | stamp u32 | length u16 | zero u16 | packed bytes
//! place     bits 0–15 length | 16–31 offset of the entry in its segment / 8 | 32–63 segment
//! ```
//!
//! Who owns a page is not decided here: an entry is valid if the page table names its place, and live if the page's
//! state is `Warm`. What is valid but not live is dropped when its segment is emptied.

use std::collections::VecDeque;

use fmalloc_proto::PAGE;

use super::page::PageId;
use crate::arena::Arena;

/// Bytes of a segment. Small ones in tests, so that more happens in a short history.
pub(super) const SEGMENT: u64 = if cfg!(test) { 8 << 10 } else { 64 << 10 };
/// Frames that a segment takes.
pub(super) const SEGMENT_FRAMES: u64 = SEGMENT / PAGE;
const HEADER: u64 = 16;
/// Segments among the oldest of which the one with the least of use is cleaned.
const CLEAN_WINDOW: usize = 128;

/// Where a packed copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place(u64);

impl Place {
    fn new(segment: u32, at: u64, len: u64) -> Self {
        Self(u64::from(segment) << 32 | (at / 8) << 16 | len)
    }

    /// The place that a page table's third word names.
    #[must_use]
    pub(super) fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// For the page table.
    #[must_use]
    pub(super) fn word(self) -> u64 {
        self.0
    }

    fn segment(self) -> usize {
        usize::try_from(self.0 >> 32).unwrap_or(usize::MAX)
    }

    fn at(self) -> u64 {
        (self.0 >> 16 & 0xffff) * 8
    }

    fn len(self) -> u64 {
        self.0 & 0xffff
    }

    fn entry_len(self) -> u64 {
        entry_len(self.len())
    }
}

fn entry_len(len: u64) -> u64 {
    (HEADER + len).next_multiple_of(8)
}

#[derive(Debug, Clone, Copy, Default)]
struct Segment {
    /// Offset in the arena; zero if it has no memory.
    base: u64,
    used: u64,
    live: u64,
}

/// An entry as found in a segment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    /// Whose bytes.
    pub(super) page: PageId,
    /// When it was evicted, the lowest 32 bits of it.
    pub(super) stamp: u32,
    /// Where.
    pub(super) place: Place,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Warm {
    segments: Vec<Segment>,
    /// Segments without memory.
    spare: Vec<u32>,
    /// Memory for segments to come: to give it back and to get it again costs more than to fill it.
    ready: Vec<u64>,
    /// Segments with memory, oldest content first.
    order: VecDeque<u32>,
    /// Where new entries go.
    fresh: Option<u32>,
    /// Where entries go that survive a cleaning.
    survivors: Option<u32>,
    live_pages: u64,
}

impl Warm {
    /// Segments that have entries.
    #[must_use]
    pub(super) fn segments(&self) -> u64 {
        self.order.len() as u64
    }

    /// Whether another segment takes no more memory.
    #[must_use]
    pub(super) fn is_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Gives memory back that is ready for more than `most` segments in all.
    pub(super) fn keep_ready(&mut self, arena: &mut Arena, most: u64) {
        while self.bytes() > most * SEGMENT
            && let Some(base) = self.ready.pop()
        {
            arena.release(base, SEGMENT);
        }
    }

    /// Bytes of RAM that the pool takes.
    #[must_use]
    pub(super) fn bytes(&self) -> u64 {
        (self.segments() + self.ready.len() as u64) * SEGMENT
    }

    /// Pages that nobody else has.
    #[must_use]
    pub(super) fn live_pages(&self) -> u64 {
        self.live_pages
    }

    /// Whether an entry of `len` packed bytes fits without another segment.
    #[must_use]
    pub(super) fn has_room(&self, len: usize) -> bool {
        self.fits(self.fresh, len as u64)
    }

    fn fits(&self, head: Option<u32>, len: u64) -> bool {
        head.is_some_and(|head| self.segments[head as usize].used + entry_len(len) <= SEGMENT)
    }

    /// Adds an entry at the end of the log; it counts when the page table names it. `may_grow` allows for another
    /// segment. None if there is no room.
    pub(super) fn add(
        &mut self,
        arena: &mut Arena,
        page: PageId,
        stamp: u32,
        bytes: &[u8],
        may_grow: bool,
    ) -> Option<Place> {
        let len = bytes.len() as u64;
        if !self.has_room(bytes.len()) {
            if !may_grow {
                return None;
            }
            let segment = self.take_segment(arena)?;
            self.order.push_back(segment);
            self.fresh = Some(segment);
        }
        let (place, data) = self.append(arena, self.fresh?, page, stamp, len)?;
        arena.bytes_mut(data, len).copy_from_slice(bytes);
        Some(place)
    }

    /// Copies an entry to where survivors go. None if there is no room.
    pub(super) fn keep(&mut self, arena: &mut Arena, entry: Entry, may_grow: bool) -> Option<Place> {
        let len = entry.place.len();
        if !self.fits(self.survivors, len) {
            if !may_grow {
                return None;
            }
            let segment = self.take_segment(arena)?;
            self.order.push_front(segment);
            self.survivors = Some(segment);
        }
        let (place, data) = self.append(arena, self.survivors?, entry.page, entry.stamp, len)?;
        arena.copy(self.data(entry.place).0, data, len);
        Some(place)
    }

    fn take_segment(&mut self, arena: &mut Arena) -> Option<u32> {
        let base = self.ready.pop().or_else(|| arena.alloc(SEGMENT))?;
        let segment = self.spare.pop().unwrap_or_else(|| {
            self.segments.push(Segment::default());
            u32::try_from(self.segments.len() - 1).unwrap_or(u32::MAX)
        });
        self.segments[segment as usize] = Segment { base, used: 0, live: 0 };
        Some(segment)
    }

    fn append(
        &mut self,
        arena: &mut Arena,
        number: u32,
        page: PageId,
        stamp: u32,
        len: u64,
    ) -> Option<(Place, u64)> {
        let segment = self.segments.get_mut(number as usize)?;
        let (at, base) = (segment.used, segment.base + segment.used);
        segment.used += entry_len(len);
        *arena.word_mut(base) = page.to_word();
        *arena.word_mut(base + 8) = u64::from(stamp) | len << 32;
        Some((Place::new(number, at, len), base + HEADER))
    }

    /// Offset in the arena, and length, of the packed bytes at a place.
    #[must_use]
    pub(super) fn data(&self, place: Place) -> (u64, u64) {
        let base = self.segments.get(place.segment()).map_or(0, |segment| segment.base);
        (base + place.at() + HEADER, place.len())
    }

    /// When the page at a place was evicted.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "the stamp has 32 bits")]
    pub(super) fn stamp(&self, arena: &Arena, place: Place) -> u32 {
        arena.word(self.data(place).0 - 8) as u32
    }

    /// Notes that the page at a place has been evicted again, unchanged.
    pub(super) fn restamp(&self, arena: &mut Arena, place: Place, stamp: u32) {
        let word = arena.word_mut(self.data(place).0 - 8);
        *word = *word & !0xffff_ffff | u64::from(stamp);
    }

    /// The page at a place is `Warm` from now on, or no longer.
    pub(super) fn set_live(&mut self, place: Place, live: bool) {
        let Some(segment) = self.segments.get_mut(place.segment()) else { return };
        let len = place.entry_len();
        if live {
            segment.live += len;
            self.live_pages += 1;
        } else {
            segment.live -= len;
            self.live_pages -= 1;
        }
    }

    /// The segment to be emptied next, and whether what is live in it is worth being kept. None if there is none but
    /// those that are being filled.
    pub(super) fn victim(&mut self, clean: bool) -> Option<(u32, bool)> {
        let heads = [self.fresh, self.survivors];
        let closed = |segment: &&u32| !heads.contains(&Some(**segment));
        if clean {
            let candidates = self.order.iter().filter(closed).take(CLEAN_WINDOW);
            let least = candidates.min_by_key(|segment| self.segments[**segment as usize].live).copied();
            if let Some(least) = least
                && self.segments[least as usize].live < SEGMENT / 2
            {
                return Some((least, true));
            }
        }
        let oldest = *self.order.front()?;
        // What is oldest leaves, whether its segment is full or not.
        self.survivors.take_if(|head| *head == oldest);
        if self.fresh == Some(oldest) {
            if clean {
                return None;
            }
            self.fresh = None;
        }
        Some((oldest, false))
    }

    /// The entry at `at` of a segment, and where the next one is. None at its end.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "the stamp has 32 bits")]
    pub(super) fn entry(&self, arena: &Arena, number: u32, at: u64) -> Option<(Entry, u64)> {
        let segment = self.segments.get(number as usize).filter(|segment| at < segment.used)?;
        let (page, word) = (arena.word(segment.base + at), arena.word(segment.base + at + 8));
        let place = Place::new(number, at, word >> 32 & 0xffff);
        let entry = Entry { page: PageId::from_word(page), stamp: word as u32, place };
        Some((entry, at + place.entry_len()))
    }

    /// Empties a segment, in which nothing is live; its memory is ready for another.
    pub(super) fn free(&mut self, number: u32) {
        let Some(segment) = self.segments.get_mut(number as usize) else { return };
        debug_assert!(segment.live == 0, "a live page is thrown away");
        self.ready.push(segment.base);
        *segment = Segment::default();
        if let Some(at) = self.order.iter().position(|other| *other == number) {
            self.order.remove(at);
        }
        self.fresh.take_if(|head| *head == number);
        self.survivors.take_if(|head| *head == number);
        self.spare.push(number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(index: u64) -> PageId {
        PageId::new(3, index)
    }

    #[test]
    fn what_was_added_is_found_and_segments_are_walked_in_order() {
        let (mut warm, mut arena) = (Warm::default(), Arena::new().unwrap());
        let bytes = |index: u64| {
            vec![u8::try_from(index % 251).unwrap(); usize::try_from(100 + index * 7 % 3000).unwrap()]
        };
        let places: Vec<Place> = (0..400)
            .map(|index| {
                let stamp = u32::try_from(index * 3).unwrap();
                let place = warm.add(&mut arena, page(index), stamp, &bytes(index), true).unwrap();
                warm.set_live(place, true);
                place
            })
            .collect();
        assert_eq!(warm.live_pages(), 400);
        for (place, index) in places.iter().zip(0..) {
            let (offset, len) = warm.data(*place);
            assert_eq!(arena.bytes(offset, len), bytes(index));
            assert_eq!(warm.stamp(&arena, *place), u32::try_from(index * 3).unwrap());
            assert_eq!(Place::from_word(place.word()), *place);
        }
        let mut seen = 0;
        while let Some((victim, false)) = warm.victim(false) {
            let mut at = 0;
            while let Some((entry, next)) = warm.entry(&arena, victim, at) {
                assert_eq!((entry.page, entry.place), (page(seen), places[usize::try_from(seen).unwrap()]));
                warm.set_live(entry.place, false);
                (seen, at) = (seen + 1, next);
            }
            warm.free(victim);
        }
        assert!(warm.is_ready());
        warm.keep_ready(&mut arena, 3);
        assert_eq!(warm.bytes(), 3 * SEGMENT);
        warm.keep_ready(&mut arena, 0);
        assert_eq!((seen, warm.bytes(), warm.live_pages()), (400, 0, 0));
    }

    #[test]
    fn segments_of_little_use_are_cleaned_and_what_survives_stays_the_oldest() {
        let (mut warm, mut arena) = (Warm::default(), Arena::new().unwrap());
        for index in 0..160 {
            let place = warm.add(&mut arena, page(index), 0, &[7; 2000], true).unwrap();
            if index % 4 == 0 || index > 64 {
                warm.set_live(place, true);
            }
        }
        assert!(!warm.has_room(64 << 10));
        let (victim, keep) = warm.victim(true).unwrap();
        assert!(keep, "three quarters of it are of no use");
        let mut at = 0;
        let mut kept = Vec::new();
        while let Some((entry, next)) = warm.entry(&arena, victim, at) {
            if entry.page.index() % 4 == 0 {
                warm.set_live(entry.place, false);
                let place = warm.keep(&mut arena, entry, true).unwrap();
                warm.set_live(place, true);
                kept.push((entry.page, place));
            }
            at = next;
        }
        warm.free(victim);
        let (oldest, keep) = warm.victim(false).unwrap();
        assert!(!keep);
        let (entry, _) = warm.entry(&arena, oldest, 0).unwrap();
        assert_eq!((entry.page, entry.place), kept[0]);
        assert_eq!(arena.bytes(warm.data(entry.place).0, 2000), [7; 2000]);
    }
}
