//! Whether this process is paged, and its beginning. Most processes of a tree stay small: paging begins when a process
//! has asked for [`START`] bytes, so that shells and their like cost nothing and fork as always. What was handed out
//! before stays libc's.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use fmalloc_client::heap::{Backing, Core, Unavailable};
use fmalloc_client::{ConnectOptions, Error, Health, Pager, Region};

use crate::config::{self, Config};
use crate::inside::{self, Inside};
use crate::locked::Unlocked;
use crate::maps::{self, Maps};
use crate::say;

/// Bytes that a process may have from libc before it is paged: its libraries' and its own small beginnings.
pub(crate) const START: usize = 4 << 20;
/// Free pages of the heap that may wait to be used again before their content is dropped.
const DIRTY_LIMIT: usize = 4 << 20;

/// A process that is paged. Lives as long as the process.
#[derive(Debug)]
pub(crate) struct Paging {
    pub(crate) pager: Pager,
    pub(crate) heap: Core<HeapRegion>,
    pub(crate) maps: Maps,
    pub(crate) threshold: usize,
}

static PAGING: AtomicPtr<Paging> = AtomicPtr::new(std::ptr::null_mut());
static UNPAGED: AtomicUsize = AtomicUsize::new(0);
static STARTING: Mutex<()> = Mutex::new(());

const NOT_TRIED: u8 = 0;
const REFUSED: u8 = 1;
static OUTCOME: AtomicU8 = AtomicU8::new(NOT_TRIED);

/// What becomes of an allocation or mapping.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Way {
    /// It is paged.
    Paged(&'static Paging),
    /// The next library's business.
    Next,
    /// It should be paged and cannot be.
    Refused,
}

/// The paged process, if it is one.
#[inline]
pub(crate) fn paging() -> Option<&'static Paging> {
    let paging = PAGING.load(Ordering::Acquire);
    // SAFETY: set once, to a value that is never freed.
    (!paging.is_null()).then(|| unsafe { &*paging })
}

/// Which way an allocation of this size goes. May begin with paging.
#[inline]
pub(crate) fn way(size: usize) -> Way {
    if inside::is_inside() {
        return Way::Next;
    }
    match paging() {
        Some(paging) if size >= paging.threshold => Way::Paged(paging),
        Some(_) => Way::Next,
        None => before(size),
    }
}

/// Bytes of libc's were given back, or, if negative, taken without having been counted.
pub(crate) fn uncount(size: usize) {
    // Wraps for memory that was handed out before anything was counted; a little is of no consequence.
    let _ = UNPAGED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |sum| Some(sum.saturating_sub(size)));
}

#[cold]
fn before(size: usize) -> Way {
    // Not before the library's constructor has run.
    let Some(config) = config::get() else { return Way::Next };
    if size < config.threshold {
        return Way::Next;
    }
    let sum = UNPAGED.fetch_add(size, Ordering::Relaxed).saturating_add(size);
    if sum < START {
        return Way::Next;
    }
    match begin(config) {
        Some(paging) => Way::Paged(paging),
        None => {
            uncount(size);
            Way::Refused
        }
    }
}

/// Begins with paging, or finds that it has begun.
pub(crate) fn begin(config: &'static Config) -> Option<&'static Paging> {
    let _inside = Inside::enter();
    let _turn = lock();
    if let Some(paging) = paging() {
        return Some(paging);
    }
    if OUTCOME.load(Ordering::Relaxed) == REFUSED {
        return None;
    }
    match Paging::new(config) {
        Ok(paging) => {
            let paging: &'static Paging = Box::leak(Box::new(paging));
            PAGING.store(std::ptr::from_ref(paging).cast_mut(), Ordering::Release);
            Some(paging)
        }
        Err(error) => {
            OUTCOME.store(REFUSED, Ordering::Relaxed);
            say::once(&format!(
                "process {} cannot be paged, so it gets no more than {} MiB of memory: {error}",
                std::process::id(),
                START >> 20,
            ));
            None
        }
    }
}

/// Held while paging begins; by `fork` too, so that no child finds it half begun.
pub(crate) fn lock() -> MutexGuard<'static, ()> {
    STARTING.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Paging {
    fn new(config: &Config) -> Result<Self, Error> {
        let _unlocked = Unlocked::begin();
        let options = ConnectOptions {
            socket: config.socket.clone(),
            group: config.group,
            inherit: true,
            ..ConnectOptions::default()
        };
        let pager = Pager::connect_with(&options)?;
        let region = Region::sparse_labelled(&pager, config.reserve, "heap")?;
        let heap = Core::new(HeapRegion(region)).ok_or_else(|| Error::System {
            what: "reserving addresses for the heap's tables".to_owned(),
            errno: libc::ENOMEM,
        })?;
        heap.set_dirty_limit(DIRTY_LIMIT);
        let maps = Maps::new(&pager, config.reserve)?;
        Ok(Self { pager, heap, maps, threshold: config.threshold })
    }

    /// The part of the heap's region that a range of addresses covers, if it is all of it.
    pub(crate) fn heap_range(&self, addr: usize, len: usize) -> Option<Range<usize>> {
        let region = &self.heap.backing().0;
        let start = addr.checked_sub(region.as_ptr().addr())?;
        let end = start.checked_add(len)?;
        (end <= region.len()).then_some(start..end)
    }

    /// Where the heap's region starts.
    pub(crate) fn heap_start(&self) -> usize {
        self.heap.backing().0.as_ptr().addr()
    }

    /// Whether any of these bytes are paged.
    pub(crate) fn is_paged(&self, addr: usize, len: usize) -> bool {
        let region = &self.heap.backing().0;
        let start = region.as_ptr().addr();
        let in_heap = addr < start + region.len() && addr.saturating_add(len) > start;
        in_heap || self.maps.touches(addr, len)
    }

    /// Whether somebody answers faults.
    pub(crate) fn is_healthy(&self) -> bool {
        self.pager.health() == Health::Ok
    }
}

/// The region that the heap is in.
#[derive(Debug)]
pub(crate) struct HeapRegion(pub(crate) Region);

// SAFETY: the region is this value's alone; committed parts are private memory that reads as zeros, and its base is that
// of a page.
unsafe impl Backing for HeapRegion {
    fn base(&self) -> NonNull<u8> {
        maps::base(&self.0)
    }

    fn reserved(&self) -> usize {
        self.0.len()
    }

    fn commit(&self, range: Range<usize>) -> Result<(), Unavailable> {
        self.0.commit(range).map_err(|_| Unavailable)
    }

    unsafe fn discard(&self, range: Range<usize>) -> Result<(), Unavailable> {
        // SAFETY: the caller's.
        unsafe { self.0.discard_unused(range) }.map_err(|_| Unavailable)
    }

    unsafe fn decommit(&self, range: Range<usize>) -> Result<(), Unavailable> {
        // SAFETY: the caller's.
        unsafe { self.0.decommit_unused(range) }.map_err(|_| Unavailable)
    }
}
