//! Pagers and regions by themselves, for programs and bindings that want memory without an allocator on it.

use std::ffi::{c_char, c_int, c_void};
use std::ops::Range;

#[cfg(unix)]
use fmalloc_client::Advice;
#[cfg(unix)]
use fmalloc_client::mmap::{Advice as MapAdvice, MmapRaw, UncheckedAdvice};
use fmalloc_client::{ConnectOptions, LocalOptions, Pager as ClientPager, Region as ClientRegion};
use fmalloc_proto::num::{to_u64, to_usize};

use crate::failure::{Failure, pointer, status};
use crate::memory::hint;
use crate::options::path;

/// A RAM budget, and the paging of regions within it.
#[derive(Debug)]
pub struct Pager(ClientPager);

/// Memory that a pager pages, perhaps the content of a file.
#[derive(Debug)]
pub struct Region(Kind);

#[derive(Debug)]
enum Kind {
    Memory(ClientRegion),
    #[cfg(unix)]
    File {
        map: MmapRaw,
        /// Changes get into the file.
        shared: bool,
    },
}

impl Pager {
    /// For C.
    pub(crate) fn boxed(pager: ClientPager) -> *mut Self {
        boxed(Self(pager))
    }

    #[cfg(unix)]
    pub(crate) fn get(&self) -> &ClientPager {
        &self.0
    }
}

#[cfg(unix)]
impl Region {
    /// For C.
    pub(crate) fn of_file(map: MmapRaw, shared: bool) -> *mut Self {
        boxed(Self(Kind::File { map, shared }))
    }
}

/// For fmalloc_pager_local. Fill it with zeros, set struct_size, then what is wanted.
#[repr(C)]
#[derive(Debug)]
pub struct LocalPaging {
    /// sizeof(fmalloc_local_t).
    pub struct_size: usize,
    /// RAM budget in bytes.
    pub budget: u64,
    /// Bytes that the swap file has room for.
    pub swap_size: u64,
    /// The swap file, in UTF-8; NULL for one in the directory for temporary files. On Linux it has no name, and only the
    /// directory counts.
    pub swap_file: *const c_char,
    /// Windows: bytes paged at a time, 4096 to 1048576. 0: the default.
    pub unit: u64,
    /// Windows: do not delete the swap file at the end. Its content is not kept.
    pub keep: u32,
}

/// Figures of a pager. Pages have 4096 bytes.
#[repr(C)]
#[derive(Debug, Default)]
pub struct PagerStats {
    /// sizeof(fmalloc_pager_stats_t), to be set before the call.
    pub struct_size: usize,
    /// Budget in bytes.
    pub budget_bytes: u64,
    /// Pages in RAM now.
    pub resident_pages: u64,
    /// Most pages in RAM so far.
    pub peak_resident_pages: u64,
    /// Bytes of page tables and buffers; part of the budget.
    pub overhead_bytes: u64,
    /// Pages whose only copy is in the swap file.
    pub swapped_pages: u64,
    /// Pages of swap claimed.
    pub claimed_pages: u64,
    /// Pages that cannot leave RAM at present.
    pub unevictable_pages: u64,
    /// Page faults.
    pub faults: u64,
    /// Pages read from the swap file.
    pub pages_in: u64,
    /// Pages written to the swap file.
    pub pages_out: u64,
    /// Pages evicted without a write, since the swap file had the same bytes.
    pub pages_clean: u64,
    /// Failed reads and writes of the swap file.
    pub io_errors: u64,
    /// Most that pages in RAM and overhead_bytes have had together, in bytes; never more than the largest budget so far.
    pub peak_held_bytes: u64,
}

/// Pages for this process alone: within it on Windows, by a private daemon on Linux. NULL with errno and a message if it
/// fails.
///
/// # Safety
/// `paging` must be null or valid, its string null or ended by a zero byte.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fmalloc_pager_local(paging: *const LocalPaging) -> *mut Pager {
    let open = || {
        // SAFETY: the caller's.
        let paging = unsafe { paging.as_ref() }
            .filter(|paging| paging.struct_size == size_of::<LocalPaging>())
            .ok_or_else(|| Failure::invalid("fmalloc_local_t.struct_size must be sizeof(fmalloc_local_t)"))?;
        let mut options = LocalOptions::new(paging.budget, paging.swap_size);
        // SAFETY: the caller's.
        options.swap_file = unsafe { path(paging.swap_file) }?;
        options.keep = paging.keep != 0;
        if paging.unit != 0 {
            options.unit = to_usize(paging.unit);
        }
        Ok(boxed(Pager(ClientPager::local(&options)?)))
    };
    pointer(open())
}

/// Connects to the service of a Linux machine, for a RAM budget in bytes or, with 0, its default. NULL with errno and a
/// message if it fails.
#[unsafe(no_mangle)]
pub extern "C" fn fmalloc_pager_connect(budget: u64) -> *mut Pager {
    let options = ConnectOptions { budget: (budget > 0).then_some(budget), ..ConnectOptions::default() };
    pointer(ClientPager::connect_with(&options).map(|pager| boxed(Pager(pager))).map_err(Failure::from))
}

/// Ends the use of a pager; its regions keep what they need. NULL does nothing.
///
/// # Safety
/// `pager` must be null or one from above, and not be used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fmalloc_pager_close(pager: *mut Pager) {
    // SAFETY: the caller's.
    unsafe { unbox(pager) };
}

/// Changes the RAM budget, in bytes, and returns when RAM is within it. Returns 0, or -1 with errno and a message.
///
/// # Safety
/// `pager` must be valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fmalloc_pager_set_budget(pager: *const Pager, bytes: u64) -> c_int {
    // SAFETY: the caller's.
    status(unsafe { get(pager) }.and_then(|pager| Ok(pager.0.set_budget(bytes).map(drop)?)))
}

/// Fills in figures. Returns 0, or -1 with errno and a message.
///
/// # Safety
/// `pager` must be valid; `stats` as well, with its struct_size set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fmalloc_pager_stats(pager: *const Pager, stats: *mut PagerStats) -> c_int {
    let fill = || {
        // SAFETY: the caller's.
        let (pager, to) = unsafe { (get(pager)?, stats.as_mut()) };
        let struct_size = size_of::<PagerStats>();
        let to = to.filter(|to| to.struct_size == struct_size).ok_or_else(|| {
            Failure::invalid("fmalloc_pager_stats_t.struct_size must be sizeof(fmalloc_pager_stats_t)")
        })?;
        let stats = pager.0.stats()?;
        *to = PagerStats {
            struct_size,
            budget_bytes: stats.budget_bytes,
            resident_pages: stats.resident_pages,
            peak_resident_pages: stats.peak_resident_pages,
            overhead_bytes: stats.overhead_bytes,
            swapped_pages: stats.swapped_pages,
            claimed_pages: stats.claimed_pages,
            unevictable_pages: stats.unevictable_pages,
            faults: stats.faults,
            pages_in: stats.pages_in,
            pages_out: stats.pages_out,
            pages_clean: stats.pages_clean,
            io_errors: stats.io_errors,
            peak_held_bytes: stats.peak_held_bytes,
        };
        Ok(())
    };
    status(fill())
}

/// Memory of `length` bytes, zero at first. NULL with errno and a message if it fails.
///
/// # Safety
/// `pager` must be valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fmalloc_region_open(pager: *const Pager, length: u64) -> *mut Region {
    // SAFETY: the caller's.
    let pager = unsafe { get(pager) };
    pointer(
        pager.and_then(|pager| {
            Ok(boxed(Region(Kind::Memory(ClientRegion::new(&pager.0, to_usize(length))?))))
        }),
    )
}

/// Gives a region back. NULL does nothing.
///
/// # Safety
/// `region` must be null or one from above; neither it nor its memory may be used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fmalloc_region_close(region: *mut Region) {
    // SAFETY: the caller's.
    unsafe { unbox(region) };
}

/// Start of a region's memory.
///
/// # Safety
/// `region` must be valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fmalloc_region_address(region: *const Region) -> *mut c_void {
    // SAFETY: the caller's.
    pointer(unsafe { get(region) }.map(|region| match &region.0 {
        Kind::Memory(region) => region.as_ptr().cast(),
        #[cfg(unix)]
        Kind::File { map, .. } => map.as_mut_ptr().cast(),
    }))
}

/// Bytes of a region.
///
/// # Safety
/// `region` must be valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fmalloc_region_length(region: *const Region) -> u64 {
    // SAFETY: the caller's.
    match unsafe { get(region) } {
        Ok(Region(Kind::Memory(region))) => to_u64(region.len()),
        #[cfg(unix)]
        Ok(Region(Kind::File { map, .. })) => to_u64(map.len()),
        Err(failure) => {
            failure.tell();
            0
        }
    }
}

/// Returns when what was changed in a part of a shared file's content is on the disk; with other regions there is nothing to do.
/// Returns 0, or -1 with errno and a message: then the changes are still in memory.
///
/// # Safety
/// `region` must be valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fmalloc_region_flush(region: *const Region, offset: u64, length: u64) -> c_int {
    // SAFETY: the caller's.
    status(unsafe { get(region) }.and_then(|region| match &region.0 {
        Kind::Memory(region) => check(offset, length, region.len()),
        #[cfg(unix)]
        Kind::File { map, .. } => Ok(map.flush_range(to_usize(offset), to_usize(length))?),
    }))
}

/// A hint about a part of a region, one of FMALLOC_NORMAL and so on. Returns 0, or -1 with errno and a message.
///
/// # Safety
/// `region` must be valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fmalloc_region_advise(
    region: *const Region,
    offset: u64,
    length: u64,
    advice: u32,
) -> c_int {
    // SAFETY: the caller's.
    status(unsafe { get(region) }.and_then(|region| match &region.0 {
        Kind::Memory(region) => Ok(region.advise(range(offset, length)?, hint(advice)?)?),
        #[cfg(unix)]
        Kind::File { map, shared } => {
            let (offset, length) = (to_usize(offset), to_usize(length));
            let advice = match hint(advice)? {
                Advice::Sequential => MapAdvice::Sequential,
                Advice::Random => MapAdvice::Random,
                Advice::WillNeed => MapAdvice::WillNeed,
                Advice::Cold if *shared => {
                    // SAFETY: of a shared file no content is dropped: it is written back.
                    unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, offset, length) }?;
                    return Ok(());
                }
                // It goes when something else needs its place.
                Advice::Cold => return Ok(()),
                _ => MapAdvice::Normal,
            };
            Ok(map.advise_range(advice, offset, length)?)
        }
    }))
}

/// Drops the content of a part of a region: it is zero from now on, and takes no RAM. Returns 0, or -1 with errno and a
/// message.
///
/// # Safety
/// `region` must be valid, and nobody may use the part meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fmalloc_region_discard(region: *const Region, offset: u64, length: u64) -> c_int {
    // SAFETY: the caller's.
    status(unsafe { get(region) }.and_then(|region| match &region.0 {
        // SAFETY: the caller's.
        Kind::Memory(region) => Ok(unsafe { region.discard_unused(range(offset, length)?) }?),
        #[cfg(unix)]
        Kind::File { .. } => Err(Failure::invalid("the content of a file cannot be discarded")),
    }))
}

/// Keeps a part of a region in RAM until fmalloc_region_unpin, readable or, unless `write` is 0, writable for system calls.
/// On Linux they can be given any part at any time, and this does nothing. Returns 0, or -1 with errno and a message.
///
/// # Safety
/// `region` must be valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fmalloc_region_pin(
    region: *const Region,
    offset: u64,
    length: u64,
    write: c_int,
) -> c_int {
    // SAFETY: the caller's.
    status(unsafe { get(region) }.and_then(|region| match &region.0 {
        Kind::Memory(region) => Ok(region.hold(&range(offset, length)?, write != 0)?),
        #[cfg(unix)]
        Kind::File { map, .. } => check(offset, length, map.len()),
    }))
}

/// Ends fmalloc_region_pin for the same part.
///
/// # Safety
/// `region` must be valid, and the part one that was pinned.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fmalloc_region_unpin(region: *const Region, offset: u64, length: u64) {
    // SAFETY: the caller's.
    match unsafe { get(region) }.and_then(|region| Ok((region, range(offset, length)?))) {
        Ok((Region(Kind::Memory(region)), range)) => region.release(&range),
        #[cfg(unix)]
        Ok(_) => {}
        Err(failure) => failure.tell(),
    }
}

fn range(offset: u64, length: u64) -> Result<Range<usize>, Failure> {
    let end = offset.checked_add(length).ok_or_else(|| Failure::invalid("the range is not in the region"))?;
    Ok(to_usize(offset)..to_usize(end))
}

fn check(offset: u64, length: u64, of: usize) -> Result<(), Failure> {
    if range(offset, length)?.end > of {
        return Err(Failure::invalid("the range is not in the region"));
    }
    Ok(())
}

fn boxed<T>(value: T) -> *mut T {
    Box::into_raw(Box::new(value))
}

/// # Safety
/// The pointer must be null or from [`boxed`], and not be used any more.
unsafe fn unbox<T>(pointer: *mut T) {
    if !pointer.is_null() {
        // SAFETY: the caller's.
        drop(unsafe { Box::from_raw(pointer) });
    }
}

/// # Safety
/// The pointer must be null or valid.
pub(crate) unsafe fn get<'a, T>(pointer: *const T) -> Result<&'a T, Failure> {
    // SAFETY: the caller's.
    unsafe { pointer.as_ref() }.ok_or_else(|| Failure::invalid("a null pointer was given"))
}
