//! The C library from a program that loads it when it runs, as plug-ins and bindings of other languages do: `libfmalloc.so`,
//! or `fmalloc.dll`. The second argument is the swap file; on Linux it only tells on which disk to swap.
//!
//!     cargo build -p fmalloc-capi && cargo run --example load_library -- target/debug/libfmalloc.so /var/tmp
//!     load_library.exe fmalloc.dll D:\swap.bin

use std::ffi::{CStr, CString, c_char, c_int, c_void};

use anyhow::{Context, ensure};
use libloading::{Library, Symbol};

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().context("give the path of libfmalloc.so or fmalloc.dll")?;
    let swap = CString::new(arguments.next().context("give the path of a swap file")?)?;
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

        if init(swap.as_ptr(), 1 << 30) != 0 {
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
