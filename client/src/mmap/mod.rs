//! Files in memory, within a RAM budget: what the crate memmap2 offers, by the same names. A program switches by changing
//! one line:
//!
//! ```no_run
//! use fmalloc_client::mmap::Mmap; // instead of memmap2::Mmap
//!
//! # fn main() -> std::io::Result<()> {
//! let file = std::fs::File::open("words")?;
//! // SAFETY: nobody changes the file meanwhile.
//! let words = unsafe { Mmap::map(&file)? };
//! println!("{} lines", words.iter().filter(|byte| **byte == b'\n').count());
//! # Ok(())
//! # }
//! ```
//!
//! The memory is not a mapping of the file by the kernel but a region of the daemon: its pages are read from the file when
//! they are touched, by the megabyte where they are touched in order, and leave RAM when the budget wants it. Changed pages
//! are written back to the file on flush, on eviction and at drop; those of a copy go to swap.
//!
//! # What is different from a mapping by the kernel
//!
//! - **A process that is killed** loses what it has changed since the last flush, as far as it was not evicted. What a
//!   flush has acknowledged is on the disk.
//! - **Writes to the file by others** are seen by pages that are read later; a page that is in RAM stays as it is. If it was
//!   changed here, writing it back undoes what others have written to the same 4096 bytes. Mappings of the same file within
//!   this process share their pages; another process that maps the same part for writing through the same daemon is refused.
//! - **A file that becomes shorter**: pages behind its end give SIGBUS if they have to be read, as usual; those that are in
//!   RAM can still be read, and what was changed in them is dropped. A page that has given SIGBUS does so for as long as
//!   the mapping lives, also if the file becomes longer.
//! - **Mappings for reading** are kept from writing by the type, not by the processor: what is written through a raw pointer
//!   all the same may be seen for a while, and never gets into the file.
//! - **A child** made by fork has no mappings.
//!
//! # Beyond memmap2
//!
//! A budget per mapping ([`MmapOptions::budget`]), [`MmapMut::flush_atomic`] for mappings made by
//! [`MmapOptions::map_atomic`], snapshots of private mappings ([`MmapMut::snapshot`]), waiting for pages to be read ahead
//! ([`Mmap::prefetch`]), pages that stay in RAM while a guard lives ([`Mmap::pin`]), which pages are in RAM
//! ([`Mmap::resident`]), figures ([`Mmap::pager`]), and typed access by way of `bytemuck` ([`Mmap::as_slice_of`]).

mod advice;
mod default;
mod extras;
mod journal;
mod mapping;
mod maps;
mod options;

pub use advice::{Advice, UncheckedAdvice};
pub use default::{default_pager, set_default_pager};
pub use extras::{PinGuard, Prefetch};
pub use maps::{Mmap, MmapMut, MmapRaw};
pub use options::{MmapAsRawDesc, MmapOptions, MmapRawDescriptor};

/// How a mapping may change its length.
#[derive(Debug, Clone, Copy, Default)]
pub struct RemapOptions {
    may_move: bool,
}

impl RemapOptions {
    /// It stays where it is.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether it may get another address.
    #[must_use]
    pub fn may_move(mut self, may_move: bool) -> Self {
        self.may_move = may_move;
        self
    }
}
