//! What the heap and its paging are like, in numbers.

use std::ffi::c_int;

use crate::failure::{Failure, status};
use crate::state::must;

/// Figures of the heap and of its paging. Sizes in bytes; the others are numbers.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Stats {
    /// sizeof(fmalloc_stats_t), to be set before the call.
    pub struct_size: usize,
    /// The heap may grow to this.
    pub reserved_bytes: u64,
    /// Claimed in the swap file.
    pub committed_bytes: u64,
    /// In blocks that the program holds.
    pub used_bytes: u64,
    /// Blocks that the program holds.
    pub used_blocks: u64,
    /// Most that blocks and what surrounds them have taken.
    pub peak_bytes: u64,
    /// The allocator's own tables, in RAM beside the budget.
    pub table_bytes: u64,
    /// Bad pointers and second frees so far.
    pub misuse: u64,
    /// RAM budget.
    pub budget_bytes: u64,
    /// In RAM now.
    pub resident_bytes: u64,
    /// The most that was in RAM.
    pub peak_resident_bytes: u64,
    /// Only in the swap file.
    pub swapped_bytes: u64,
    /// Page faults served.
    pub faults: u64,
    /// Pages read from the swap file.
    pub pages_in: u64,
    /// Pages written to the swap file.
    pub pages_out: u64,
}

/// Fills in figures. Takes time in proportion to the heap. Returns 0, or -1 with errno: EINVAL (no heap, or struct_size is not
/// set), EPIPE (the daemon is gone).
///
/// # Safety
/// `stats` must be null or valid, with its struct_size set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fmalloc_stats(stats: *mut Stats) -> c_int {
    // SAFETY: the caller's.
    status(match unsafe { stats.as_mut() } {
        Some(stats) => fill(stats),
        None => Err(Failure::invalid("no structure to fill in was given")),
    })
}

/// Whether all records of the heap agree; for tests, while no other thread allocates or frees. Returns 0, or -1 with errno
/// EINVAL and what is damaged in fmalloc_error().
#[unsafe(no_mangle)]
pub extern "C" fn fmalloc_check() -> c_int {
    status(must().and_then(|heap| heap.check().map_err(|broken| Failure::invalid(broken.to_string()))))
}

fn fill(to: &mut Stats) -> Result<(), Failure> {
    let size = size_of::<Stats>();
    if to.struct_size != size {
        return Err(Failure::invalid(format!(
            "fmalloc_stats_t.struct_size is {}, but must be sizeof(fmalloc_stats_t), {size} here",
            to.struct_size
        )));
    }
    let heap = must()?;
    let paging = heap.region().pager().stats()?;
    let stats = heap.stats();
    let page = fmalloc_proto::PAGE;
    let bytes = fmalloc_proto::num::to_u64;
    *to = Stats {
        struct_size: size,
        reserved_bytes: bytes(stats.reserved_bytes),
        committed_bytes: bytes(stats.committed_bytes),
        used_bytes: bytes(stats.used_bytes),
        used_blocks: bytes(stats.used_blocks),
        peak_bytes: bytes(stats.peak_bytes),
        table_bytes: bytes(stats.table_bytes),
        misuse: stats.misuse,
        budget_bytes: paging.budget_bytes,
        resident_bytes: paging.resident_pages * page,
        peak_resident_bytes: paging.peak_resident_pages * page,
        swapped_bytes: paging.swapped_pages * page,
        faults: paging.faults,
        pages_in: paging.pages_in,
        pages_out: paging.pages_out,
    };
    Ok(())
}
