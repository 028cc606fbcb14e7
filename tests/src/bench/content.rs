//! The data: the words of each page as a function of a seed and the page's number. Half of a page is random and found on
//! no other page; the other half repeats one word, so that it compresses to nothing. Incompressible data is all random.
//!
//! Making a page must cost little beside paging it (here 0.1 µs): the random words are a window of a bank, at another
//! place and with another mask for each page.

use fmalloc_proto::PAGE_SIZE;
use fmalloc_proto::num::{to_u64, to_usize};

use crate::rng::Rng;

/// 64-bit words of a page.
pub(crate) const WORDS: usize = PAGE_SIZE / 8;
/// The word of a page that workloads add to; the others stay as they are.
pub(crate) const COUNTER: usize = WORDS - 1;

const BANK: usize = 64 * WORDS;

/// What the pages of one child hold.
#[derive(Debug)]
pub(crate) struct Content {
    bank: Vec<u64>,
    random: usize,
    seed: u64,
}

impl Content {
    /// Pages of which all or half of the words are random.
    pub(crate) fn new(seed: u64, all_random: bool) -> Self {
        let mut rng = Rng::new(seed);
        let bank = (0..BANK + WORDS).map(|_| rng.word()).collect();
        Self { bank, random: if all_random { WORDS } else { WORDS / 2 }, seed }
    }

    /// Word `n` of page `index`.
    pub(crate) fn word(&self, index: usize, n: usize) -> u64 {
        let key = self.key(index);
        if n < self.random { self.window(key)[n] ^ key } else { key }
    }

    /// Writes page `index`.
    pub(crate) fn write(&self, index: usize, page: &mut [u64]) {
        let key = self.key(index);
        let (random, rest) = page.split_at_mut(self.random);
        random.iter_mut().zip(self.window(key)).for_each(|(to, from)| *to = from ^ key);
        rest.fill(key);
    }

    /// Whether `page` is page `index` to whose counter `added` was added.
    pub(crate) fn is(&self, index: usize, page: &[u64], added: u64) -> bool {
        let key = self.key(index);
        let (random, rest) = page.split_at(self.random);
        // The counter is the last word, random or not.
        let last = self.word(index, COUNTER).wrapping_add(added);
        let body = random.len().min(COUNTER);
        let wrong = random[..body].iter().zip(self.window(key)).fold(0, |wrong, (a, b)| wrong | a ^ b ^ key)
            | rest.iter().take(rest.len().saturating_sub(1)).fold(0, |wrong, a| wrong | a ^ key);
        wrong == 0 && page[COUNTER] == last
    }

    fn window(&self, key: u64) -> &[u64] {
        let start = to_usize(key >> 40) % BANK;
        &self.bank[start..start + self.random]
    }

    /// Different for each page: the steps of SplitMix64 can be undone.
    fn key(&self, index: usize) -> u64 {
        Rng::new(self.seed ^ to_u64(index) << 8).word()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_changed_word_shows_and_the_counter_counts() {
        for all_random in [false, true] {
            let content = Content::new(7, all_random);
            let mut page = vec![0; WORDS];
            content.write(5, &mut page);
            assert!(content.is(5, &page, 0) && !content.is(6, &page, 0) && !content.is(5, &page, 1));
            assert!((0..WORDS).all(|n| content.word(5, n) == page[n]));
            for n in 0..WORDS {
                page[n] ^= 1 << 40;
                assert!(!content.is(5, &page, 0), "word {n}");
                page[n] ^= 1 << 40;
            }
            page[COUNTER] = page[COUNTER].wrapping_add(3);
            assert!(content.is(5, &page, 3));
        }
    }

    #[test]
    fn half_of_a_page_or_all_of_it_is_unique() {
        for (all_random, unique) in [(false, WORDS / 2 + 1), (true, WORDS)] {
            let content = Content::new(1, all_random);
            let mut words = std::collections::HashSet::new();
            for index in 0..100 {
                let mut page = vec![0; WORDS];
                content.write(index, &mut page);
                words.extend(page);
            }
            assert_eq!(words.len(), 100 * unique);
        }
    }
}
