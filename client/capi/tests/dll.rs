//! fmalloc.dll in a program that loads it when it runs. The same with libfmalloc.so: tests/tests/dll.rs.

#![cfg(windows)]
#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

mod loaded;

use std::path::PathBuf;

use windows_sys::Win32::System::LibraryLoader::GetModuleHandleA;

fn dll() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let deps = own.parent().unwrap();
    let places = [deps.join("fmalloc.dll"), deps.parent().unwrap().join("fmalloc.dll")];
    places.into_iter().find(|path| path.is_file()).unwrap()
}

fn is_loaded() -> bool {
    // SAFETY: the name ends with a zero.
    !unsafe { GetModuleHandleA(c"fmalloc.dll".as_ptr().cast()) }.is_null()
}

/// One test: both parts are about whether the DLL is in memory.
#[test]
fn the_dll_is_loaded_and_unloaded_a_hundred_times_and_stays_while_it_is_needed() {
    let swap = std::env::temp_dir().join("fmalloc-test-dll.bin");
    loaded::a_hundred_times(&dll(), &swap, |round| assert!(!is_loaded(), "round {round}"));
    loaded::unloaded_too_early(&dll(), &swap);
    assert!(is_loaded());
}
