//! What is looked at in a page before it leaves: whether it is all zeros or otherwise alike, and a keyed hash that shows later whether it
//! has changed and whether the swap file gave back what was written.
//!
//! The key is secret and made anew for each swap file: without it nobody can build two pages of equal hash, so that no
//! chosen content can pass for "unchanged". 64 bits: one wrong match is expected in 10^19 comparisons.

use fmalloc_proto::PAGE_SIZE;
use highway::{HighwayHash, HighwayHasher, Key};

/// The secret of a swap file.
#[derive(Clone, Copy)]
pub struct PageKey([u64; 4]);

impl std::fmt::Debug for PageKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PageKey(secret)")
    }
}

impl PageKey {
    /// A new secret from the kernel.
    ///
    /// # Errors
    /// What `getrandom` says.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0_u8; 32];
        // SAFETY: the buffer is valid for its length.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        if usize::try_from(got) != Ok(bytes.len()) {
            return Err(std::io::Error::last_os_error());
        }
        let mut words = [0; 4];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(chunk.try_into().unwrap_or_default());
        }
        Ok(Self(words))
    }

    /// Hash of a page under this key.
    #[must_use]
    pub fn hash(&self, page: &[u8; PAGE_SIZE]) -> u64 {
        HighwayHasher::new(Key(self.0)).hash64(page)
    }
}

/// The eight bytes that a page repeats from start to end, if it does. Stops at the first difference, which is near in
/// nearly all other pages.
#[must_use]
pub fn fill(page: &[u8; PAGE_SIZE]) -> Option<u64> {
    let (words, _) = page.as_chunks::<8>();
    let first = u64::from_ne_bytes(*words.first()?);
    let (lines, _) = words.as_chunks::<8>();
    let same =
        |line: &[[u8; 8]; 8]| line.iter().fold(0, |all, word| all | (u64::from_ne_bytes(*word) ^ first)) == 0;
    lines.iter().all(same).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_depends_on_every_byte_and_on_the_key() {
        let (one, two) = (PageKey::random().unwrap(), PageKey::random().unwrap());
        let mut page = [7; PAGE_SIZE];
        let before = one.hash(&page);
        assert_ne!(before, two.hash(&page));
        for place in [0, 1, 2047, PAGE_SIZE - 1] {
            page[place] ^= 1;
            assert_ne!(before, one.hash(&page));
            page[place] ^= 1;
        }
        assert_eq!(before, one.hash(&page));
    }

    #[test]
    fn only_what_repeats_throughout_is_a_fill() {
        for word in [0, 7, u64::MAX] {
            let mut page: [u8; PAGE_SIZE] = word.to_ne_bytes().repeat(PAGE_SIZE / 8).try_into().unwrap();
            assert_eq!(fill(&page), Some(word));
            for place in [0, 63, 64, PAGE_SIZE - 1] {
                page[place] ^= 1;
                assert_eq!(fill(&page), None);
                page[place] ^= 1;
            }
        }
    }
}
