//! Whether the calling thread is at work for fmalloc itself: then its memory comes from libc, and what it maps is not
//! paged. One word of the thread's own storage, which the loader sets aside at the start of the program, so that looking
//! at it never allocates.

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the word of a thread is reached by instructions of x86-64");

use std::arch::{asm, global_asm};

// Rust's own thread-locals call `__tls_get_addr`, which may allocate, and would end up here again.
global_asm!(
    ".pushsection .tbss.fmalloc_preload_inside,\"awT\",@nobits",
    ".p2align 3",
    ".hidden fmalloc_preload_inside",
    ".globl fmalloc_preload_inside",
    ".type fmalloc_preload_inside,@object",
    ".size fmalloc_preload_inside,8",
    "fmalloc_preload_inside:",
    ".zero 8",
    ".popsection",
);

fn word() -> *mut u64 {
    let word: *mut u64;
    // SAFETY: reads the thread pointer and a constant that the loader has filled in.
    unsafe {
        asm!(
            "mov {word}, qword ptr fs:[0]",
            "add {word}, qword ptr [rip + fmalloc_preload_inside@GOTTPOFF]",
            word = out(reg) word,
            options(pure, readonly, nostack),
        );
    }
    word
}

/// Whether this thread is inside.
#[inline]
pub(crate) fn is_inside() -> bool {
    // SAFETY: the word is this thread's, and lives as long as the thread does.
    unsafe { *word() > 0 }
}

/// Inside until it is dropped; may be nested.
#[derive(Debug)]
pub(crate) struct Inside(());

impl Inside {
    pub(crate) fn enter() -> Self {
        // SAFETY: as above; nobody else sees the word.
        unsafe { *word() += 1 };
        Self(())
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { *word() -= 1 };
    }
}

/// For a thread that is fmalloc's own, for as long as it lives.
pub(crate) fn stay() {
    std::mem::forget(Inside::enter());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thread_has_its_own_word() {
        let outer = Inside::enter();
        let inner = Inside::enter();
        drop(inner);
        assert!(is_inside());
        std::thread::spawn(|| {
            assert!(!is_inside());
            stay();
            assert!(is_inside());
        })
        .join()
        .unwrap();
        drop(outer);
        assert!(!is_inside());
    }
}
