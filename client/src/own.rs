//! Which threads are this library's own, at least for a while: what they allocate must not come from paged memory, since the
//! agent reads it, and nothing could be evicted while the agent waits for a page.

use std::cell::Cell;

thread_local! {
    /// How often the thread has entered the library.
    static OWN: Cell<u32> = const { Cell::new(0) };
}

/// To be called first on a thread of this library.
#[cfg(unix)]
pub(crate) fn on_own_thread() {
    OWN.set(1);
}

/// Makes the calling thread one of the library's own while the value lives: it prepares what the agent will read.
pub(crate) fn enter() -> Inside {
    OWN.set(OWN.get() + 1);
    Inside
}

/// Whether the calling thread is in the library, or one of its own.
#[inline]
pub(crate) fn is_own() -> bool {
    OWN.get() > 0
}

/// See [`enter`].
pub(crate) struct Inside;

impl Drop for Inside {
    fn drop(&mut self) {
        OWN.set(OWN.get() - 1);
    }
}
