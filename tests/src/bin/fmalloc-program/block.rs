//! Memory from `malloc`, with content that can be verified.

use std::ffi::c_void;

use fmalloc_tests::pattern;

pub(crate) const MIB: usize = 1 << 20;

/// A block, freed when it is dropped.
#[derive(Debug)]
pub(crate) struct Block {
    start: *mut c_void,
    bytes: usize,
}

// SAFETY: the memory is the value's.
unsafe impl Send for Block {}

impl Block {
    pub(crate) fn new(bytes: usize) -> Self {
        // SAFETY: any size will do.
        Self::from_raw(unsafe { libc::malloc(bytes) }, bytes).expect("memory")
    }

    /// Takes over a block; none if it is null.
    pub(crate) fn from_raw(start: *mut c_void, bytes: usize) -> Option<Self> {
        (!start.is_null()).then_some(Self { start, bytes })
    }

    pub(crate) fn as_ptr(&self) -> *mut c_void {
        self.start
    }

    /// Whole pages of it are filled.
    pub(crate) fn fill(&mut self, seed: usize) {
        // SAFETY: the block is ours and aligned to 16 bytes.
        let words = unsafe { std::slice::from_raw_parts_mut(self.start.cast::<u64>(), self.bytes / 8) };
        fill(words, seed);
    }

    pub(crate) fn check(&self, seed: usize) {
        // SAFETY: as above.
        check(unsafe { std::slice::from_raw_parts(self.start.cast::<u64>(), self.bytes / 8) }, seed);
    }

    /// Gives it up without freeing it.
    pub(crate) fn into_raw(self) -> *mut c_void {
        let start = self.start;
        std::mem::forget(self);
        start
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: from malloc, and not used any more.
        unsafe { libc::free(self.start) };
    }
}

/// Writes what [`check`] expects.
pub(crate) fn fill(words: &mut [u64], seed: usize) {
    for (index, page) in words.chunks_exact_mut(pattern::WORDS).enumerate() {
        pattern::write(seed as u64, index as u64, page);
    }
}

pub(crate) fn check(words: &[u64], seed: usize) {
    for (index, page) in words.chunks_exact(pattern::WORDS).enumerate() {
        if let Err(wrong) = pattern::check(seed as u64, index as u64, page) {
            panic!("{wrong}");
        }
    }
}
