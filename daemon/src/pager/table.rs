//! Page tables: for each region a directory of chunks, made when they are first written, so that memory which was
//! reserved and never touched costs next to nothing.
//!
//! ```text
//! directory   one u64 per 512 pages: offset of the chunk in the arena, 0 = none (all pages `Zero`)
//! chunk       512 entries of three words (see `pager::page`): 12 KiB for 2 MiB of memory, 24 bytes a page
//! ```

use fmalloc_proto::PAGE;

use super::page::{State, Word};
use crate::arena::Arena;

/// Pages that one chunk describes.
pub const CHUNK_PAGES: u64 = 512;
const ENTRY: u64 = 24;
const CHUNK_LEN: u64 = CHUNK_PAGES * ENTRY;
/// Frames that a new chunk may cost: its own, and one of the directory.
pub const CHUNK_FRAMES: u64 = CHUNK_LEN / PAGE + 1;

/// One region's table.
#[derive(Debug, Clone, Copy)]
pub struct Table {
    directory: u64,
    pages: u64,
    chunks: u64,
}

impl Table {
    /// A table for `pages` pages, all `Zero`. None if the arena is full.
    pub fn new(arena: &mut Arena, pages: u64) -> Option<Self> {
        let directory = arena.alloc(Self::directory_len(pages))?;
        Some(Self { directory, pages, chunks: 0 })
    }

    /// A table in another arena with room for the same pages, all `Zero`. None if that is full.
    pub fn like(other: &Self, of: &Arena, arena: &mut Arena) -> Option<Self> {
        let mut table = Self::new(arena, other.pages)?;
        let described = (0..other.pages).step_by(usize::try_from(CHUNK_PAGES).unwrap_or(usize::MAX));
        let mut described = described.filter(|index| other.has_chunk(of, *index));
        described.all(|index| table.entry_or_new(arena, index).is_some()).then_some(table)
    }

    fn directory_len(pages: u64) -> u64 {
        pages.div_ceil(CHUNK_PAGES) * 8
    }

    /// Pages described.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Bytes of RAM that the table takes, the untouched part of the directory not counted.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.chunks * CHUNK_LEN + Self::directory_len(self.pages).min((self.chunks + 1) * PAGE)
    }

    /// Makes room for `pages` pages in all. False if the arena is full; nothing has changed then.
    pub fn grow(&mut self, arena: &mut Arena, pages: u64) -> bool {
        let (old, new) = (Self::directory_len(self.pages), Self::directory_len(pages));
        if new.next_multiple_of(PAGE) > old.next_multiple_of(PAGE) {
            // Twice as long as asked, so that growing page by page stays cheap.
            let Some(directory) = arena.alloc(Self::directory_len(pages * 2)) else { return false };
            for entry in (0..old).step_by(8) {
                *arena.word_mut(directory + entry) = arena.word(self.directory + entry);
            }
            arena.free(self.directory, old, true);
            self.directory = directory;
            self.pages = pages * 2;
        } else {
            self.pages = self.pages.max(pages);
        }
        true
    }

    /// The chunk that describes page `index`, if there is one: without it the whole chunk is `Zero`.
    #[must_use]
    pub fn has_chunk(&self, arena: &Arena, index: u64) -> bool {
        index < self.pages && arena.word(self.directory + index / CHUNK_PAGES * 8) != 0
    }

    /// The word of page `index`.
    #[must_use]
    #[inline]
    pub fn word(&self, arena: &Arena, index: u64) -> Word {
        self.entry(arena, index).map_or(Word(State::Zero as u64), |entry| Word(arena.word(entry)))
    }

    /// The hash of page `index`'s slot.
    #[must_use]
    #[inline]
    pub fn hash(&self, arena: &Arena, index: u64) -> u64 {
        self.entry(arena, index).map_or(0, |entry| arena.word(entry + 8))
    }

    /// Sets the word of page `index`. False if the arena is full.
    #[inline]
    pub fn set_word(&mut self, arena: &mut Arena, index: u64, word: Word) -> bool {
        let Some(entry) = self.entry_or_new(arena, index) else { return false };
        *arena.word_mut(entry) = word.0;
        true
    }

    /// Sets the hash of page `index`, before the word that makes its slot valid.
    #[inline]
    pub fn set_hash(&mut self, arena: &mut Arena, index: u64, hash: u64) {
        if let Some(entry) = self.entry_or_new(arena, index) {
            *arena.word_mut(entry + 8) = hash;
        }
    }

    /// The third word of page `index`; what it means depends on its state and flags.
    #[must_use]
    #[inline]
    pub fn aux(&self, arena: &Arena, index: u64) -> u64 {
        self.entry(arena, index).map_or(0, |entry| arena.word(entry + 16))
    }

    /// Sets the third word of page `index`, before the word that gives it a meaning.
    #[inline]
    pub fn set_aux(&mut self, arena: &mut Arena, index: u64, aux: u64) {
        if let Some(entry) = self.entry_or_new(arena, index) {
            *arena.word_mut(entry + 16) = aux;
        }
    }

    /// Makes sure that pages `index` and on, as many as `count`, can be written. False if the arena is full.
    pub fn prepare(&mut self, arena: &mut Arena, index: u64, count: u64) -> bool {
        let last = index + count.max(1) - 1;
        (index / CHUNK_PAGES..=last / CHUNK_PAGES)
            .all(|chunk| self.entry_or_new(arena, chunk * CHUNK_PAGES).is_some())
    }

    /// Gives everything back to the arena.
    pub fn free(self, arena: &mut Arena) {
        let len = Self::directory_len(self.pages);
        for entry in (0..len).step_by(8) {
            let chunk = arena.word(self.directory + entry);
            if chunk != 0 {
                arena.free(chunk, CHUNK_LEN, true);
            }
        }
        arena.free(self.directory, len, self.chunks > 0);
    }

    #[inline]
    fn entry(&self, arena: &Arena, index: u64) -> Option<u64> {
        if index >= self.pages {
            return None;
        }
        let chunk = arena.word(self.directory + index / CHUNK_PAGES * 8);
        (chunk != 0).then(|| chunk + index % CHUNK_PAGES * ENTRY)
    }

    #[inline]
    fn entry_or_new(&mut self, arena: &mut Arena, index: u64) -> Option<u64> {
        if let Some(entry) = self.entry(arena, index) {
            return Some(entry);
        }
        if index >= self.pages {
            return None;
        }
        let chunk = arena.alloc(CHUNK_LEN)?;
        *arena.word_mut(self.directory + index / CHUNK_PAGES * 8) = chunk;
        self.chunks += 1;
        Some(chunk + index % CHUNK_PAGES * ENTRY)
    }
}
