//! Size classes of small blocks: multiples of 16 bytes up to 128, then four to each doubling, so that at most a fifth of a
//! block is unused. Everything here is computed at compile time.

use super::run::WORDS;

/// Bytes of a page of the allocator, and the alignment of its backing.
pub(super) const PAGE: usize = 4096;
/// Every block is aligned to this, as `malloc` must.
pub(super) const MIN_ALIGN: usize = 16;
/// Largest small block in bytes; anything larger is a run of pages of its own.
pub(super) const MAX_SMALL: usize = 16 << 10;
/// Number of classes.
pub(super) const CLASSES: usize = 36;
/// Most pages of a slab.
const MAX_SLAB_PAGES: usize = 16;
/// Most blocks of a slab.
const MAX_BLOCKS: usize = WORDS * 64;
/// Most blocks that a thread keeps of one class, and most bytes (but for two blocks).
const MAX_KEPT: usize = 64;
const MAX_KEPT_BYTES: usize = 16 << 10;

/// What there is to know about a class.
#[derive(Debug, Clone, Copy)]
pub(super) struct Class {
    /// Bytes of a block.
    pub(super) size: u32,
    /// Pages of a slab.
    pub(super) pages: u32,
    /// Blocks of a slab.
    pub(super) blocks: u32,
    /// 2³² / size, rounded up: multiplying by it divides an offset within a slab, exactly, since
    /// offset × size < 2³².
    pub(super) reciprocal: u64,
    /// Blocks that a thread keeps.
    pub(super) kept: u32,
    /// Where the kept ones of this class begin in a slot's array.
    pub(super) kept_from: u32,
}

/// All classes, smallest first.
pub(super) const TABLE: [Class; CLASSES] = table();
/// Blocks of all classes that a thread keeps.
pub(super) const ALL_KEPT: usize = (TABLE[CLASSES - 1].kept_from + TABLE[CLASSES - 1].kept) as usize;

impl Class {
    /// Which bits of word `word` of a slab's bitmaps stand for blocks.
    #[inline]
    pub(super) fn mask(&self, word: usize) -> u64 {
        let blocks = self.blocks as usize;
        if word * 64 + 64 <= blocks {
            u64::MAX
        } else if word * 64 >= blocks {
            0
        } else {
            (1 << (blocks % 64)) - 1
        }
    }
}

/// The smallest class whose blocks have `size` bytes and are aligned to `align`, a power of two; none if that takes a run
/// of its own.
#[inline]
pub(super) fn fitting(size: usize, align: usize) -> Option<u8> {
    if align <= MIN_ALIGN {
        return by_size(size);
    }
    if align > PAGE {
        return None;
    }
    // Slabs begin at pages, so a block is as aligned as its size. Of four neighbouring classes one is a power of two.
    let mut class = by_size(size.max(align))?;
    while !(TABLE[usize::from(class)].size as usize).is_multiple_of(align) {
        class += 1;
    }
    Some(class)
}

/// The smallest class for `size` bytes.
#[inline]
fn by_size(size: usize) -> Option<u8> {
    const SMALL: [u8; 65] = small();
    if size <= 1024 {
        Some(SMALL[size.div_ceil(MIN_ALIGN)])
    } else if size <= MAX_SMALL {
        Some(formula(size))
    } else {
        None
    }
}

const fn small() -> [u8; 65] {
    let mut of = [0; 65];
    let mut n = 0;
    while n < of.len() {
        of[n] = formula(n * MIN_ALIGN);
        n += 1;
    }
    of
}

#[allow(clippy::cast_possible_truncation, reason = "there are 36 classes")]
const fn formula(size: usize) -> u8 {
    if size <= 128 {
        return (if size == 0 { 0 } else { (size - 1) / MIN_ALIGN }) as u8;
    }
    let top = (size - 1).ilog2();
    let quarter = ((size - 1) >> (top - 2)) & 3;
    (8 + (top as usize - 7) * 4 + quarter) as u8
}

const fn size_of_class(class: usize) -> usize {
    if class < 8 { (class + 1) * MIN_ALIGN } else { (5 + (class - 8) % 4) << (5 + (class - 8) / 4) }
}

/// The number of pages that wastes least, and among those that waste a 64th at most the largest.
const fn slab_pages(size: usize) -> usize {
    let mut best = 1;
    let mut pages = 1;
    while pages <= MAX_SLAB_PAGES && pages * PAGE / size <= MAX_BLOCKS {
        let waste = (pages * PAGE) % size;
        let good = waste * 64 <= pages * PAGE;
        let less = waste * best <= (best * PAGE) % size * pages;
        if pages * PAGE >= size && (good || less) {
            best = pages;
        }
        pages += 1;
    }
    best
}

#[allow(clippy::cast_possible_truncation, reason = "sizes of classes and slabs are small")]
const fn table() -> [Class; CLASSES] {
    let mut table = [Class { size: 0, pages: 0, blocks: 0, reciprocal: 0, kept: 0, kept_from: 0 }; CLASSES];
    let mut kept_from = 0;
    let mut n = 0;
    while n < CLASSES {
        let size = size_of_class(n);
        let pages = slab_pages(size);
        let fit = MAX_KEPT_BYTES / size;
        let kept = if fit > MAX_KEPT {
            MAX_KEPT
        } else if fit < 2 {
            2
        } else {
            fit
        };
        table[n] = Class {
            size: size as u32,
            pages: pages as u32,
            blocks: (pages * PAGE / size) as u32,
            reciprocal: (1_u64 << 32).div_ceil(size as u64),
            kept: kept as u32,
            kept_from,
        };
        kept_from += kept as u32;
        n += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_fit_every_size_with_a_fifth_of_waste_at_most() {
        for size in 0..=MAX_SMALL {
            let class = usize::from(fitting(size, 1).unwrap());
            let block = TABLE[class].size as usize;
            assert!(block >= size.max(1));
            assert!(
                class == 0 || (TABLE[class - 1].size as usize) < size,
                "{size} would fit a smaller class"
            );
            assert!(size <= 128 || (block - size) * 5 <= block, "{size} in {block}");
        }
        assert_eq!(fitting(MAX_SMALL + 1, 1), None);
        assert_eq!(TABLE[CLASSES - 1].size as usize, MAX_SMALL);
    }

    #[test]
    fn blocks_of_aligned_classes_are_aligned() {
        for align in (0..=12).map(|n| 1 << n) {
            for size in 1..=MAX_SMALL {
                let class = TABLE[usize::from(fitting(size, align).unwrap())];
                assert!(class.size as usize >= size && (class.size as usize).is_multiple_of(align));
                assert!((class.size as usize) < size.max(align).max(16) * 2, "{size} at {align}: {class:?}");
            }
        }
        assert_eq!(fitting(1, 8192), None);
    }

    #[test]
    fn slabs_waste_little_and_fit_their_bitmaps() {
        for class in TABLE {
            let bytes = class.pages as usize * PAGE;
            let used = (class.size * class.blocks) as usize;
            assert!(used <= bytes && (bytes - used) * 64 <= bytes, "{class:?}");
            assert!(class.blocks as usize <= MAX_BLOCKS && class.blocks >= 4, "{class:?}");
            let bits: u32 = (0..WORDS).map(|word| class.mask(word).count_ones()).sum();
            assert_eq!(bits, class.blocks);
            for offset in 0..bytes as u64 {
                assert_eq!((offset * class.reciprocal) >> 32, offset / u64::from(class.size));
            }
        }
    }
}
