//! The swap file and the books over it: which slots are taken, and how much is promised to committed memory.

pub mod file;
pub mod slots;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use fmalloc_proto::PAGE;
use fmalloc_proto::size::Size;
use thiserror::Error;

pub use file::SwapFile;
use slots::{Cursor, Slots};

use crate::fault::reactor::Interposer;
use crate::hash::PageKey;
use crate::pager::Store;
use crate::pager::page::Slot;

/// A file that grows is made longer by at least so many bytes at a time.
const GROW_STEP: u64 = 64 << 20;
/// Slots beyond the claims, for pages that are written anew while their old slot is still in use.
const SPARE_SLOTS: u64 = 1024;

/// The swap file, shared by all fault threads.
#[derive(Debug)]
pub struct Swap {
    /// The file.
    pub file: SwapFile,
    /// The secret of its hashes.
    pub key: PageKey,
    /// What fault threads put before their swap I/O; nothing in `fmallocd`.
    pub interposer: Option<Box<dyn Interposer>>,
    slots: Slots,
    /// Pages promised to committed memory.
    claimed: AtomicU64,
    /// Held while the file grows.
    growing: Mutex<()>,
}

/// Swap that cannot be promised.
#[derive(Debug, Error)]
pub enum ClaimError {
    /// Not that much is left.
    #[error("swap is full: {wanted} wanted, {free} of {total} free; give fmallocd a larger swap file")]
    Full {
        /// Wanted.
        wanted: Size,
        /// Left.
        free: Size,
        /// Size of the swap file.
        total: Size,
    },
    /// The file could not grow.
    #[error("the swap file cannot grow: {0}")]
    Grow(#[from] io::Error),
}

impl Swap {
    /// Books over `file`, nothing taken.
    ///
    /// # Errors
    /// Where the kernel gives no random numbers.
    pub fn new(file: SwapFile) -> io::Result<Self> {
        let slots = Slots::new(file.max_bytes() / PAGE);
        slots.grow(file.bytes() / PAGE);
        Ok(Self {
            key: PageKey::random()?,
            file,
            interposer: None,
            slots,
            claimed: AtomicU64::new(0),
            growing: Mutex::new(()),
        })
    }

    /// Promises `pages` pages. May make the file longer, which takes the time that the file system takes.
    ///
    /// # Errors
    /// See [`ClaimError`]; nothing has been promised then.
    pub fn claim(&self, pages: u64) -> Result<(), ClaimError> {
        let total = self.file.max_bytes() / PAGE;
        let add = |claimed: u64| claimed.checked_add(pages).filter(|sum| *sum <= total);
        let before =
            self.claimed.fetch_update(Ordering::AcqRel, Ordering::Acquire, add).map_err(|claimed| {
                ClaimError::Full {
                    wanted: Size(pages.saturating_mul(PAGE)),
                    free: Size((total - claimed) * PAGE),
                    total: Size(total * PAGE),
                }
            })?;
        let needed = (before + pages + SPARE_SLOTS).min(total);
        if needed > self.slots.capacity()
            && let Err(error) = self.grow(needed, total)
        {
            self.unclaim(pages);
            return Err(error.into());
        }
        Ok(())
    }

    /// Takes a promise back.
    pub fn unclaim(&self, pages: u64) {
        self.claimed.fetch_sub(pages, Ordering::AcqRel);
    }

    fn grow(&self, needed: u64, total: u64) -> io::Result<()> {
        let _growing = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        if needed > self.slots.capacity() {
            let bytes = (needed * PAGE).next_multiple_of(GROW_STEP).min(total * PAGE);
            self.file.grow(bytes)?;
            self.slots.grow(self.file.bytes() / PAGE);
        }
        Ok(())
    }

    /// Pages promised.
    #[must_use]
    pub fn claimed_pages(&self) -> u64 {
        self.claimed.load(Ordering::Relaxed)
    }

    /// Slots taken.
    #[must_use]
    pub fn used_slots(&self) -> u64 {
        self.slots.used()
    }
}

/// One client's access to the slots.
#[derive(Debug)]
pub struct ClientSlots {
    swap: Arc<Swap>,
    cursor: Cursor,
}

impl ClientSlots {
    /// Access for client number `client`.
    #[must_use]
    pub fn new(swap: Arc<Swap>, client: u64) -> Self {
        let cursor = swap.slots.cursor(client);
        Self { swap, cursor }
    }
}

impl Store for ClientSlots {
    fn take(&mut self, want: u32) -> Option<(Slot, u32)> {
        self.swap.slots.take(&mut self.cursor, want)
    }

    fn share(&mut self, slot: Slot) -> bool {
        self.swap.slots.share(slot)
    }

    fn give(&mut self, slot: Slot) {
        self.swap.slots.give(slot);
    }

    fn claim_page(&mut self) -> bool {
        self.swap.claim(1).is_ok()
    }
}
