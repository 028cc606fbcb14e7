//! The heap as what Rust's collections take: an `Allocator` of the crate allocator-api2, and a global allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Write;
use std::process::abort;
use std::ptr::{NonNull, null_mut};
use std::sync::OnceLock;

use allocator_api2::alloc::{AllocError, Allocator};

use super::error::BadPointer;
use super::paged::Heap;
use crate::own;

// SAFETY: blocks stay valid until they are freed or the heap is dropped, wherever the heap is moved to; and a reference to
// a heap is the same allocator.
unsafe impl Allocator for Heap {
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        let block = self.alloc(layout.size(), layout.align()).map_err(|_| AllocError)?;
        Ok(NonNull::slice_from_raw_parts(block, layout.size()))
    }

    fn allocate_zeroed(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        let block = self.alloc_zeroed(layout.size(), layout.align()).map_err(|_| AllocError)?;
        Ok(NonNull::slice_from_raw_parts(block, layout.size()))
    }

    unsafe fn deallocate(&self, block: NonNull<u8>, _: Layout) {
        // SAFETY: the caller's.
        unsafe { self.free(block) }.unwrap_or_else(|bad| misused(bad));
    }

    unsafe fn grow(&self, block: NonNull<u8>, _: Layout, new: Layout) -> Result<NonNull<[u8]>, AllocError> {
        // SAFETY: the caller's.
        let moved = unsafe { self.realloc(block, new.size(), new.align()) }.map_err(|_| AllocError)?;
        Ok(NonNull::slice_from_raw_parts(moved, new.size()))
    }

    unsafe fn shrink(&self, block: NonNull<u8>, _: Layout, new: Layout) -> Result<NonNull<[u8]>, AllocError> {
        // SAFETY: the caller's.
        let moved = unsafe { self.realloc(block, new.size(), new.align()) }.map_err(|_| AllocError)?;
        Ok(NonNull::slice_from_raw_parts(moved, new.size()))
    }
}

/// A global allocator that takes allocations from a [`Heap`] once there is one, and from the system what is smaller than
/// a threshold, what comes before, and what the library itself needs.
///
/// ```no_run
/// use fmalloc_client::heap::{GlobalHeap, Heap};
/// use fmalloc_client::{Error, Pager, PrivateOptions};
///
/// #[global_allocator]
/// static GLOBAL: GlobalHeap = GlobalHeap::new(4096);
///
/// fn main() -> Result<(), Error> {
///     let pager = Pager::private(&PrivateOptions::new(256 << 20))?;
///     GLOBAL.start(Heap::new(&pager, 64 << 30)?);
///     let numbers: Vec<u64> = (0..1_000_000_000).collect();
///     println!("{}", numbers.iter().sum::<u64>());
///     Ok(())
/// }
/// ```
///
/// Memory that system calls or other threads use is fine. Not so after `fork` without `exec`: the child has none of it.
#[derive(Debug)]
pub struct GlobalHeap {
    threshold: usize,
    heap: OnceLock<Heap>,
}

impl GlobalHeap {
    /// A global allocator that leaves allocations of fewer than `threshold` bytes to the system.
    #[must_use]
    pub const fn new(threshold: usize) -> Self {
        Self { threshold, heap: OnceLock::new() }
    }

    /// Takes allocations from this heap from now on, for as long as the process lives. If there is one already, that stays
    /// and `heap` is dropped. Gives the heap in use.
    pub fn start(&self, heap: Heap) -> &Heap {
        self.heap.get_or_init(|| heap)
    }

    /// The heap in use.
    #[must_use]
    pub fn heap(&self) -> Option<&Heap> {
        self.heap.get()
    }

    /// The heap, if a block of this size is to come from it.
    #[inline]
    fn heap_for(&self, size: usize) -> Option<&Heap> {
        if size < self.threshold || own::is_own() { None } else { self.heap.get() }
    }

    #[inline]
    fn heap_of(&self, block: *const u8) -> Option<&Heap> {
        self.heap.get().filter(|heap| heap.owns(block))
    }
}

fn pointer(block: Result<NonNull<u8>, impl Sized>) -> *mut u8 {
    block.map_or(null_mut(), NonNull::as_ptr)
}

// SAFETY: both allocators keep to the contract, and which one a block is from is told by its address. What the heap does
// meanwhile (messages to the daemon) allocates from the system: a thread that is in there is one of the library's own.
unsafe impl GlobalAlloc for GlobalHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match self.heap_for(layout.size()) {
            Some(heap) => pointer(heap.alloc(layout.size(), layout.align())),
            // SAFETY: the caller's.
            None => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match self.heap_for(layout.size()) {
            Some(heap) => pointer(heap.alloc_zeroed(layout.size(), layout.align())),
            // SAFETY: the caller's.
            None => unsafe { System.alloc_zeroed(layout) },
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        match (self.heap_of(block), NonNull::new(block)) {
            // SAFETY: the caller's.
            (Some(heap), Some(block)) => unsafe { heap.free(block) }.unwrap_or_else(|bad| misused(bad)),
            // SAFETY: the caller's; it is not from the heap.
            _ => unsafe { System.dealloc(block, layout) },
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let from = self.heap_of(block);
        let stays = from.is_some() == self.heap_for(size).is_some();
        match (from, NonNull::new(block)) {
            (Some(heap), Some(block)) if stays => {
                // SAFETY: the caller's.
                pointer(unsafe { heap.realloc(block, size, layout.align()) })
            }
            // SAFETY: the caller's; it is not from the heap.
            (None, _) if stays => unsafe { System.realloc(block, layout, size) },
            _ => {
                // SAFETY: the caller promises that the size is valid for the alignment.
                let new = unsafe { self.alloc(Layout::from_size_align_unchecked(size, layout.align())) };
                if !new.is_null() {
                    // SAFETY: both blocks have that many bytes; the old one is the caller's to give up.
                    unsafe {
                        new.copy_from_nonoverlapping(block, layout.size().min(size));
                        self.dealloc(block, layout);
                    }
                }
                new
            }
        }
    }
}

/// Rust code that frees what is not allocated is broken in a way that nothing can be expected of afterwards.
#[cold]
fn misused(bad: BadPointer) -> ! {
    let mut stderr = std::io::stderr();
    let _ = stderr.write_all(b"fmalloc: ");
    let _ = stderr.write_all(bad.text().as_bytes());
    let _ = stderr.write_all(b"\n");
    abort()
}
