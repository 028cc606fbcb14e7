//! libfmalloc_preload.so: pages the memory of a program that knows nothing of fmalloc. `fmallocctl run` has the dynamic
//! loader put it in front of libc (LD_PRELOAD), so that the program's calls of `malloc`, `mmap`, `fork` and their kin
//! come here.
//!
//! - `malloc`, `mapping`, `locked`, `fork`, `threads`: the functions that the program calls.
//! - `paging`: whether the process is paged, and how that begins; `maps` and `area`: its mappings.
//! - `inside`, `own`, `next`, `raw`: what keeps this library's own work from coming back to it.
//!
//! Two rules hold everywhere. Whatever the library does for itself happens *inside*: its memory is libc's, its mappings
//! are the kernel's. And the threads that evict never touch paged memory: they are inside for as long as they live.

// In its tests nothing is replaced, so nobody calls most of it.
#![cfg_attr(test, allow(dead_code))]

mod area;
mod config;
mod fork;
mod inside;
mod locked;
mod malloc;
mod mapping;
mod maps;
mod next;
mod own;
mod paging;
mod raw;
mod say;
mod threads;

/// Run by the dynamic loader when all libraries are there, before the program starts.
#[cfg_attr(not(test), used)]
#[cfg_attr(not(test), unsafe(link_section = ".init_array"))]
static AT_START: extern "C" fn() = at_start;

extern "C" fn at_start() {
    let _inside = inside::Inside::enter();
    next::next();
    let config = config::load();
    fork::register();
    if config.trial {
        try_out(config);
    }
}

/// Begins with paging, says why if that fails, and ends the program before it has begun.
fn try_out(config: &'static config::Config) -> ! {
    let status = i32::from(paging::begin(config).is_none());
    // SAFETY: ends the process.
    unsafe { libc::_exit(status) }
}
