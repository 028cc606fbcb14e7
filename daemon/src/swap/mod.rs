//! The swap file and the books over it: which slots are taken, and how much is promised to committed memory.

pub mod file;

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use fmalloc_proto::PAGE;
use thiserror::Error;

pub use file::SwapFile;

/// The swap file shared by all fault threads.
#[derive(Debug)]
pub struct Swap {
    /// The file.
    pub file: SwapFile,
    /// Pages promised to committed memory.
    claimed: AtomicU64,
    /// Held while the file grows.
    growing: Mutex<()>,
}

/// Swap that cannot be promised.
#[derive(Debug, Error)]
pub enum ClaimError {
    /// Not that much is left.
    #[error("swap is full: {wanted} bytes wanted, {free} of {total} free; use a larger swap file or less memory")]
    Full {
        /// Bytes wanted.
        wanted: u64,
        /// Bytes left.
        free: u64,
        /// Size of the swap file in bytes.
        total: u64,
    },
    /// The file could not grow.
    #[error("the swap file could not grow: {0}")]
    Grow(#[from] io::Error),
}

impl Swap {
    /// Books over `file`, nothing taken.
    #[must_use]
    pub fn new(file: SwapFile) -> Self {
        Self { file, claimed: AtomicU64::new(0), growing: Mutex::new(()) }
    }

    /// Pages promised.
    #[must_use]
    pub fn claimed_pages(&self) -> u64 {
        self.claimed.load(Ordering::Relaxed)
    }

    /// Slots taken.
    #[must_use]
    pub fn used_slots(&self) -> u64 {
        0
    }
}

#[allow(unused)]
const _: u64 = PAGE;
