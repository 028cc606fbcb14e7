//! What a program wants run on this library's own threads, before anything else there.

use std::sync::OnceLock;

static HOOK: OnceLock<fn()> = OnceLock::new();

/// Has `hook` called first thing on each thread that this library starts from now on: the one that evicts must never
/// touch paged memory, so who makes libc's `malloc` give out such memory has to know them. Only the first hook counts.
pub fn set_thread_hook(hook: fn()) {
    let _ = HOOK.set(hook);
}

/// To be called first on a thread of this library.
pub(crate) fn on_own_thread() {
    if let Some(hook) = HOOK.get() {
        hook();
    }
}
