//! The C library from a program that loads it when it runs, as plug-ins and bindings of other languages do.
//!
//!     cargo build -p fmalloc-capi && cargo run --example load_library -- target/debug/libfmalloc.so

use std::ffi::{CStr, c_char, c_int, c_void};

use anyhow::{Context, ensure};
use libloading::{Library, Symbol};

fn main() -> anyhow::Result<()> {
    let path = std::env::args_os().nth(1).context("give the path of libfmalloc.so")?;
    // SAFETY: the library runs nothing when it is loaded, and it stays loaded: its threads run its code.
    let library = std::mem::ManuallyDrop::new(unsafe { Library::new(path) }?);
    // SAFETY: the types are those of fmalloc.h.
    unsafe {
        let init: Symbol<'_, unsafe extern "C" fn(*const c_char, usize) -> c_int> =
            library.get(b"fmalloc_init")?;
        let error: Symbol<'_, extern "C" fn() -> *const c_char> = library.get(b"fmalloc_error")?;
        let alloc: Symbol<'_, extern "C" fn(usize) -> *mut c_void> = library.get(b"fmalloc")?;
        let free: Symbol<'_, unsafe extern "C" fn(*mut c_void)> = library.get(b"ffree")?;
        let close: Symbol<'_, extern "C" fn() -> c_int> = library.get(b"fmalloc_close")?;

        // A file in /var/tmp would do as well: it tells on which disk to swap.
        if init(c"/var/tmp".as_ptr(), 1 << 30) != 0 {
            anyhow::bail!("{}", CStr::from_ptr(error()).to_string_lossy());
        }
        let bytes = 64 << 20;
        let block = alloc(bytes).cast::<u64>();
        ensure!(!block.is_null(), "{}", CStr::from_ptr(error()).to_string_lossy());
        let words = std::slice::from_raw_parts_mut(block, bytes / 8);
        words.iter_mut().zip(0..).for_each(|(word, n)| *word = n);
        ensure!(words.iter().zip(0..).all(|(word, n)| *word == n), "the memory has lost something");
        free(block.cast());
        ensure!(close() == 0, "the heap does not end");
    }
    println!("all right");
    Ok(())
}
