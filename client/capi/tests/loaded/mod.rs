//! The C library in a program that loads it when it runs: as the original's users do, and a hundred times. The same for
//! fmalloc.dll and libfmalloc.so.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]
#![allow(unreachable_pub, reason = "shared by two test programs")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;

use libloading::Library;

type Init = unsafe extern "C" fn(*const c_char, usize) -> c_int;
type Alloc = unsafe extern "C" fn(usize) -> *mut c_void;
type Realloc = unsafe extern "C" fn(*mut c_void, usize) -> *mut c_void;
type Free = unsafe extern "C" fn(*mut c_void);
type Close = unsafe extern "C" fn() -> c_int;
type Message = unsafe extern "C" fn() -> *const c_char;

/// What the heap may grow to. Its RAM is a quarter.
const SIZE: usize = 64 << 20;
/// More than its RAM.
const LARGE: usize = 40 << 20;

fn init(library: &Library, swap: &CStr) {
    // SAFETY: the types are those of fmalloc.h.
    unsafe {
        let message = library.get::<Message>(b"fmalloc_error").unwrap();
        let status = library.get::<Init>(b"fmalloc_init").unwrap()(swap.as_ptr(), SIZE);
        assert_eq!(status, 0, "{:?}", CStr::from_ptr(message()));
    }
}

/// Loads the library a hundred times, uses it each time, and unloads it. `swap` is the swap file, which has a name on
/// Windows only; `after` is called after each time.
pub fn a_hundred_times(library: &Path, swap: &Path, after: impl Fn(u8)) {
    let text = CString::new(swap.to_str().unwrap()).unwrap();
    for round in 0..100_u8 {
        // SAFETY: the types are those of fmalloc.h; blocks are used as long as they are there.
        unsafe {
            let library = Library::new(library).unwrap();
            init(&library, &text);
            assert_eq!(swap.exists(), cfg!(windows));
            let len = if round % 20 == 0 { LARGE } else { 1 << 20 };
            let block = library.get::<Alloc>(b"fmalloc").unwrap()(len).cast::<u8>();
            assert!(!block.is_null());
            block.write_bytes(round, len);
            let block =
                library.get::<Realloc>(b"frealloc").unwrap()(block.cast(), len + 100_000).cast::<u8>();
            assert!(std::slice::from_raw_parts(block, len).iter().all(|byte| *byte == round));
            library.get::<Free>(b"ffree").unwrap()(block.cast());
            assert_eq!(library.get::<Close>(b"fmalloc_close").unwrap()(), 0);
            assert!(!swap.exists());
            library.close().unwrap();
        }
        after(round);
    }
}

/// A program that forgets fmalloc_close: what handles its faults must not go away with the library.
pub fn unloaded_too_early(library: &Path, swap: &Path) {
    let text = CString::new(swap.to_str().unwrap()).unwrap();
    // SAFETY: as above.
    unsafe {
        let library = Library::new(library).unwrap();
        init(&library, &text);
        let block = library.get::<Alloc>(b"fmalloc").unwrap()(LARGE).cast::<u8>();
        library.close().unwrap();
        block.write_bytes(5, LARGE);
        assert!(std::slice::from_raw_parts(block, LARGE).iter().all(|byte| *byte == 5));
    }
}
