//! Two pages that differ and that XXH3 gives the same 64-bit and 128-bit hashes, as anybody can build them in no time:
//! its secret is public. A pager that took "same hash" for "same content" would lose one of them.

use crate::pattern::WORDS;

/// Bytes 0 to 191 of XXH3's default secret are public; of these, the words that meet lane 0 of stripes 3 and 4.
const KEYS: [u64; 2] = [0x1f67_b3b7_a4a4_4072, 0x78e5_c0cc_4ee6_79cb];
/// Words from one stripe to the next.
const STRIPE: usize = 8;

/// The pages.
///
/// Each 64-bit word of the input is xored with a word of the secret; the product of the result's halves goes to one
/// accumulator, and the word itself is added to its neighbour. A word whose lower half equals the key's has a product of
/// zero whatever its upper half is, so what two such words in one lane have above can be shifted from one to the other.
#[must_use]
pub fn pages() -> [[u64; WORDS]; 2] {
    let page = |shift: u64| {
        let mut page = [0x5555_0000_aaaa_1111; WORDS];
        for (stripe, (key, upper)) in (3..).zip(KEYS.iter().zip([100 + shift, 100 - shift])) {
            page[stripe * STRIPE] = upper << 32 | key & 0xffff_ffff;
        }
        page
    };
    [page(0), page(7)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twins_differ_and_have_the_same_unkeyed_hashes() {
        let [first, second] = pages().map(|page| page.map(u64::to_le_bytes).concat());
        assert_ne!(first, second);
        assert_eq!(twox_hash::XxHash3_64::oneshot(&first), twox_hash::XxHash3_64::oneshot(&second));
        assert_eq!(twox_hash::XxHash3_128::oneshot(&first), twox_hash::XxHash3_128::oneshot(&second));
    }
}
