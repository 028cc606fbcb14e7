//! Packs pages, and unpacks them again: LZ4, which costs a few microseconds where the swap file costs fifty.

use fmalloc_proto::PAGE_SIZE;
use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};

/// What packing works with; one per fault thread.
pub struct Packer {
    table: CompressTable,
    out: Vec<u8>,
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Packer")
    }
}

impl Default for Packer {
    fn default() -> Self {
        Self { table: CompressTable::small(), out: vec![0; get_maximum_output_size(PAGE_SIZE)] }
    }
}

impl Packer {
    /// The page in fewer bytes, or at least not many more.
    pub fn pack(&mut self, page: &[u8; PAGE_SIZE]) -> Option<&[u8]> {
        let len = compress_into_with_table(page, &mut self.out, &mut self.table).ok()?;
        self.out.get(..len)
    }
}

/// Unpacks into a page. Whether the bytes made one.
#[must_use]
pub fn unpack(packed: &[u8], page: &mut [u8; PAGE_SIZE]) -> bool {
    decompress_into(packed, page).is_ok_and(|len| len == PAGE_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_all_kinds_survive_and_damage_is_seen() {
        let mut packer = Packer::default();
        for kind in 0..64_u64 {
            let mut page = [0; PAGE_SIZE];
            let mut word = kind.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            for (at, byte) in page.iter_mut().enumerate() {
                word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let random = word.to_ne_bytes()[7];
                *byte = if at as u64 * 64 < kind * 4096 { random } else { b'a' + random % 3 };
            }
            let packed = packer.pack(&page).unwrap().to_vec();
            let mut back = [1; PAGE_SIZE];
            assert!(unpack(&packed, &mut back) && back == page);
            assert!(!unpack(&packed[..packed.len() / 2], &mut back), "half of it is no page");
        }
    }
}
