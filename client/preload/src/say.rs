//! The one line that this library writes to the program's stderr, when it cannot do what the user wanted.

use std::sync::atomic::{AtomicBool, Ordering};

static SAID: AtomicBool = AtomicBool::new(false);

/// Says it, unless something was said before. Whoever reads stderr may be slow: the caller waits for nobody but him, as
/// with any message of the program.
pub(crate) fn once(text: &str) {
    if !SAID.swap(true, Ordering::Relaxed) {
        always(text);
    }
}

/// Says it.
pub(crate) fn always(text: &str) {
    let line = format!("fmalloc: {text}\n");
    // SAFETY: the buffer is valid; the descriptor may be anything or closed, which the kernel checks.
    unsafe { libc::write(2, line.as_ptr().cast(), line.len()) };
}
