//! Sorting the data as u64s in place, on one thread and on several (UMap's parallel sort).

use anyhow::Result;

use super::pages::{fill, flip};
use super::{THREADS, check};
use crate::bench::child::Desk;
use crate::bench::kinds::Workload;
use crate::bench::memory::Memory;
use crate::rng::Rng;

/// Fills, sorts, and checks that the same values are there, in order.
///
/// # Errors
/// Values that are not, or what reporting says.
pub(crate) fn all(desk: &Desk, memory: &mut Memory) -> Result<()> {
    for workload in [Workload::Sort, Workload::ParallelSort] {
        if !desk.wants(workload) {
            continue;
        }
        desk.preparing("filling")?;
        let words = memory.words();
        fill(&desk.content, words);
        let before = sum(words);
        flip(desk, words);
        if workload == Workload::Sort {
            desk.measure(workload, words.len() * 8, || {
                words.sort_unstable();
                Ok(())
            })?;
        } else {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(THREADS).build()?;
            desk.measure(workload, words.len() * 8, || {
                pool.install(|| rayon::slice::ParallelSliceMut::par_sort_unstable(words));
                Ok(())
            })?;
        }
        desk.preparing("verifying")?;
        check(words.is_sorted(), || "the values are not in order after sorting".to_owned())?;
        check(sum(words) == before, || "the values after sorting are not those before".to_owned())?;
    }
    Ok(())
}

/// Of the values, in whatever order.
fn sum(words: &[u64]) -> u64 {
    words.iter().fold(0, |sum, word| sum.wrapping_add(Rng::new(*word).word()))
}
