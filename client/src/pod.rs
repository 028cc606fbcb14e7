//! Types that a region can be viewed as.

/// A type for which any bytes are a value: integers, floats, arrays of them, and structures that promise the same.
///
/// # Safety
/// The type must have an alignment of at most 4096, no padding, no invalid bit patterns, no pointers or references, and
/// no interior mutability.
pub unsafe trait Pod: Copy + Send + Sync + 'static {}

macro_rules! pod {
    ($($name:ty),*) => {
        // SAFETY: primitive integers and floats have no padding, and every bit pattern is a value.
        $(unsafe impl Pod for $name {})*
    };
}

pod!(u8, u16, u32, u64, u128, usize, i8, i16, i32, i64, i128, isize, f32, f64);

// SAFETY: an array has no padding of its own.
unsafe impl<T: Pod, const N: usize> Pod for [T; N] {}
