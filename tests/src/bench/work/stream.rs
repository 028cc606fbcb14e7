//! STREAM over three arrays of doubles: copy, scale, add, triad, once each, every thread in a part of its own.

use anyhow::Result;

use super::{THREADS, check};
use crate::bench::child::Desk;
use crate::bench::content::{Content, WORDS};
use crate::bench::kinds::Workload;
use crate::bench::memory::Memory;

const SCALAR: f64 = 3.0;
/// Arrays that the four kernels read or write.
const PASSES: usize = 2 + 2 + 3 + 3;

/// Parts of the three arrays.
type Parts<'a> = (&'a mut [u64], &'a mut [u64], &'a mut [u64]);

/// Fills the arrays, runs the kernels, and compares every element with what arithmetic says.
///
/// # Errors
/// An element that differs in any bit, or what reporting says.
pub(crate) fn all(desk: &Desk, memory: &mut Memory) -> Result<()> {
    desk.preparing("filling")?;
    let words = memory.words();
    let length = words.len() / WORDS / 3 / THREADS * THREADS * WORDS;
    let (a, rest) = words.split_at_mut(length);
    let (b, rest) = rest.split_at_mut(length);
    let c = &mut rest[..length];
    for array in [&mut *a, b, c] {
        for (index, page) in array.chunks_exact_mut(WORDS).enumerate() {
            desk.content.write(index, page);
            page.iter_mut().for_each(|word| *word = double(*word).to_bits());
        }
    }
    if desk.plan.flip {
        a[length / 2] ^= 1;
    }
    desk.measure(Workload::Stream, PASSES * length * 8, || {
        each_kernel(|kernel| {
            let part = length / THREADS;
            let parts = a.chunks_exact_mut(part).zip(b.chunks_exact_mut(part)).zip(c.chunks_exact_mut(part));
            // The end of the scope waits for all threads: kernels do not overlap.
            std::thread::scope(|scope| {
                parts.for_each(|((a, b), c)| drop(scope.spawn(move || kernel((a, b, c)))))
            });
        });
        Ok(())
    })?;
    desk.preparing("verifying")?;
    for (index, ((a, b), c)) in
        a.chunks_exact(WORDS).zip(b.chunks_exact(WORDS)).zip(c.chunks_exact(WORDS)).enumerate()
    {
        for n in 0..WORDS {
            let right = expected(&desk.content, index, n);
            check([a[n], b[n], c[n]] == right, || {
                format!("element {n} of page {index} of the arrays is wrong")
            })?;
        }
    }
    Ok(())
}

fn each_kernel(mut run: impl FnMut(fn(Parts<'_>))) {
    run(|(a, _, c)| c.copy_from_slice(a));
    run(|(_, b, c)| b.iter_mut().zip(c).for_each(|(b, c)| *b = (SCALAR * f(*c)).to_bits()));
    run(|(a, b, c)| {
        c.iter_mut().zip(a).zip(b).for_each(|((c, a), b)| *c = (f(*a) + f(*b)).to_bits());
    });
    run(|(a, b, c)| {
        a.iter_mut().zip(b).zip(c).for_each(|((a, b), c)| *a = (f(*b) + SCALAR * f(*c)).to_bits());
    });
}

fn f(bits: u64) -> f64 {
    f64::from_bits(bits)
}

/// A double from 1 to 2 with the word's upper bits.
fn double(word: u64) -> f64 {
    f64::from_bits(word >> 12 | 0x3ff << 52)
}

/// What the three arrays hold in the end.
fn expected(content: &Content, index: usize, n: usize) -> [u64; 3] {
    let copied = double(content.word(index, n));
    let scaled = SCALAR * copied;
    let added = copied + scaled;
    let triad = scaled + SCALAR * added;
    [triad, scaled, added].map(f64::to_bits)
}
