//! libfmalloc.so in a program that loads and unloads it; the same as with fmalloc.dll under wine.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

#[path = "../../client/capi/tests/loaded/mod.rs"]
mod loaded;

use fmalloc_tests::{place, wait_until};

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// One test: it counts threads and descriptors of the process. Whether the code itself leaves memory is the C library's
/// business: it stays while a thread lives that had a message of ours.
#[test]
fn the_library_is_loaded_and_unloaded_a_hundred_times_and_stays_while_it_is_needed() {
    if !place::can_page() {
        return;
    }
    // SAFETY: before the library is there, and the test harness does not read this variable.
    unsafe { std::env::set_var("FMALLOC_DAEMON", place::binary("fmallocd")) };
    let library = place::binary("libfmalloc.so");
    let directory = place::directory();
    let swap = directory.path().join("swap.bin");
    let (threads_before, descriptors_before) = (threads(), descriptors());
    loaded::a_hundred_times(&library, &swap, |round| {
        // One that was waited for is listed for a moment still.
        wait_until("the threads are gone", || threads() == threads_before);
        assert_eq!(descriptors(), descriptors_before, "round {round}");
    });
    loaded::unloaded_too_early(&library, &swap);
}
