//! Where this library's own memory comes from: libc's allocator by its internal names, which nobody interposes.

use std::alloc::{GlobalAlloc, Layout};
use std::ffi::c_void;

unsafe extern "C" {
    pub(crate) fn __libc_malloc(size: usize) -> *mut c_void;
    pub(crate) fn __libc_calloc(count: usize, size: usize) -> *mut c_void;
    pub(crate) fn __libc_realloc(old: *mut c_void, size: usize) -> *mut c_void;
    pub(crate) fn __libc_memalign(align: usize, size: usize) -> *mut c_void;
    pub(crate) fn __libc_free(old: *mut c_void);
}

/// What `malloc` aligns to on x86-64.
const MALLOC_ALIGN: usize = 16;

/// See the module.
struct Own;

#[cfg_attr(not(test), global_allocator)]
static OWN: Own = Own;

// SAFETY: libc's allocator keeps the contract, and both ways of allocating end in `__libc_free`.
unsafe impl GlobalAlloc for Own {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: plain values; alignments are powers of two.
        let memory = unsafe {
            if layout.align() <= MALLOC_ALIGN {
                __libc_malloc(layout.size())
            } else {
                __libc_memalign(layout.align(), layout.size())
            }
        };
        memory.cast()
    }

    unsafe fn dealloc(&self, memory: *mut u8, _: Layout) {
        // SAFETY: the caller's: it came from `alloc`.
        unsafe { __libc_free(memory.cast()) };
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if layout.align() <= MALLOC_ALIGN {
            // SAFETY: as above.
            return unsafe { __libc_realloc(memory.cast(), size) }.cast();
        }
        // SAFETY: the caller's; the copy is of what both have.
        unsafe {
            let moved = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            if !moved.is_null() {
                memory.copy_to_nonoverlapping(moved, layout.size().min(size));
                self.dealloc(memory, layout);
            }
            moved
        }
    }
}
