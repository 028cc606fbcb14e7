//! The content of test pages: a function of a seed and the page's number. Half of it is random, so that it neither
//! compresses to nothing nor equals another page's; the other half names seed and page, so that a wrong page can be
//! recognised.

use fmalloc_proto::PAGE_SIZE;

use crate::rng::Rng;

/// 64-bit words of a page.
pub const WORDS: usize = PAGE_SIZE / 8;

/// The words of page `index`.
pub fn words(seed: u64, index: u64) -> impl Iterator<Item = u64> {
    let mut rng = Rng::new(seed.rotate_left(32) ^ index.wrapping_mul(0xd6e8_feb8_6659_fd93));
    (0..WORDS).map(move |n| if n % 2 == 0 { rng.word() } else { stamp(seed, index) })
}

fn stamp(seed: u64, index: u64) -> u64 {
    seed << 40 | index & 0xff_ffff_ffff
}

/// Writes page `index` to `to`.
pub fn write(seed: u64, index: u64, to: &mut [u64]) {
    to.iter_mut().zip(words(seed, index)).for_each(|(to, word)| *to = word);
}

/// Whether `page` is page `index`, byte by byte; otherwise what it is instead.
///
/// # Errors
/// A description for people.
pub fn check(seed: u64, index: u64, page: &[u64]) -> Result<(), String> {
    let wrong = page.iter().zip(words(seed, index)).filter(|(found, expected)| **found != *expected).count();
    if wrong == 0 && page.len() == WORDS {
        return Ok(());
    }
    let what = if page.iter().all(|word| *word == 0) {
        "is all zeros".to_owned()
    } else {
        let stamp = page.get(1).copied().unwrap_or(0);
        format!(
            "has {wrong} wrong words; its stamp says seed {} page {}",
            stamp >> 40,
            stamp & 0xff_ffff_ffff
        )
    };
    Err(format!("page {index} of seed {seed} {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_changed_word_shows() {
        let mut page = vec![0; WORDS];
        write(3, 77, &mut page);
        assert_eq!(check(3, 77, &page), Ok(()));
        assert!(check(3, 78, &page).unwrap_err().contains("seed 3 page 77"));
        assert!(check(4, 77, &page).is_err());
        for n in 0..WORDS {
            page[n] ^= 1 << 17;
            assert!(check(3, 77, &page).is_err());
            page[n] ^= 1 << 17;
        }
        assert!(check(3, 77, &[0; WORDS]).unwrap_err().contains("zeros"));
    }
}
