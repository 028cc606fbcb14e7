//! Conversions between the integer types of addresses and of memory sizes, which are the same width here.

const _: () = assert!(usize::BITS == 64, "fmalloc needs a 64-bit target");

/// A length or index from the wire as a memory size. Exact: `usize` has 64 bits on every supported target.
#[must_use]
#[inline]
#[allow(clippy::cast_possible_truncation, reason = "usize has 64 bits, asserted above")]
pub const fn to_usize(n: u64) -> usize {
    n as usize
}

/// A memory size as the type of the wire.
#[must_use]
#[inline]
pub const fn to_u64(n: usize) -> u64 {
    n as u64
}
