//! The handle to this process's paging, and what can be asked of it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fmalloc_proto::PAGE_SIZE;
use fmalloc_proto::messages::{ClientStats, ErrorCode};
use fmalloc_proto::num::{to_u64, to_usize};
use fmalloc_proto::size::Size;

use super::engine::{Engine, Refusal};
use super::frames::Frame;
use super::handler::{self, Handler};
use super::pages::MAX_FRAMES;
use super::paging::Paging;
use super::space::Space;
use super::swap;
use super::table::{Fixed, Table};
use crate::error::Error;
use crate::health::Health;
use crate::options::{ConnectOptions, LocalOptions, PrivateOptions};

/// Frames that are never pinned: one instruction may need as many pages at once (a gather of 16 elements of which
/// each crosses from one page to the next), and each of several threads may execute one.
const RESERVE: u32 = 64;
/// Least budget: that of Linux.
const MIN_BUDGET: u64 = fmalloc_proto::limits::MIN_BUDGET;
/// Smallest and largest unit of paging.
const UNITS: std::ops::RangeInclusive<usize> = PAGE_SIZE..=1 << 20;

/// This process's paging of its regions within one budget, with a swap file of its own. Clones are the same pager; all
/// of it may be used from any thread. The swap file is closed, and goes away unless it is to be kept, when the last
/// clone and the last region are dropped.
///
/// There is no service on Windows: the faults of this process are served on the threads that have them.
#[derive(Debug, Clone)]
pub struct Pager(Arc<Inner>);

struct Inner {
    engine: Fixed<Engine>,
    admin: Mutex<Admin>,
    _handler: Handler,
}

/// What changes rarely.
struct Admin {
    budget: u64,
    /// Bytes of the page tables of all regions.
    tables: u64,
    space: Space,
    claimed: u64,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").finish_non_exhaustive()
    }
}

impl Pager {
    /// Pages within this process, to a swap file of its own.
    ///
    /// # Errors
    /// [`Error::SwapFull`] if the disk has no room for the swap file, [`Error::Invalid`] for a budget or a unit that is too
    /// small or a file that is not fmalloc's, or a failure of the system.
    pub fn local(options: &LocalOptions) -> Result<Self, Error> {
        let unit = options.unit;
        if !unit.is_power_of_two() || !UNITS.contains(&unit) {
            let text = format!("a unit of {unit} bytes; it must be a power of two from 4 KiB to 1 MiB");
            return Err(Error::invalid(text));
        }
        let limit = limit(options.budget, 0, unit)?;
        let (swap, space) = swap::open(options.swap_file.as_deref(), options.swap_size, options.keep)?;
        let table = Table::new(to_usize(limit.into())).ok_or_else(no_memory)?;
        let engine = Engine::new(Paging::new(table, limit, RESERVE), swap, unit);
        let engine = Fixed::new(engine).ok_or_else(no_memory)?;
        let handler =
            Handler::register().map_err(|code| Error::system("registering the exception handler", code))?;
        let admin = Admin { budget: options.budget, tables: 0, space, claimed: 0 };
        Ok(Self(Arc::new(Inner { engine, admin: Mutex::new(admin), _handler: handler })))
    }

    /// There is no service on Windows.
    ///
    /// # Errors
    /// [`Error::Unsupported`], always.
    pub fn connect() -> Result<Self, Error> {
        Self::connect_with(&ConnectOptions::default())
    }

    /// There is no service on Windows.
    ///
    /// # Errors
    /// [`Error::Unsupported`], always.
    pub fn connect_with(_: &ConnectOptions) -> Result<Self, Error> {
        Err(Error::Unsupported { what: "a paging service; use Pager::local or Pager::private".to_owned() })
    }

    /// [`Pager::local`] with the options that it has in common with Linux: the swap file is in the directory named, else
    /// in the user's for temporary files; without a size it has room for 16 times the budget.
    ///
    /// # Errors
    /// As [`Pager::local`].
    pub fn private(options: &PrivateOptions) -> Result<Self, Error> {
        let size = options.swap_size.unwrap_or_else(|| options.budget.saturating_mul(16));
        let mut local = LocalOptions::new(options.budget, size);
        local.swap_file = options.swap_dir.as_deref().map(swap::unnamed_in);
        Self::local(&local)
    }

    /// Budget in bytes.
    #[must_use]
    pub fn budget(&self) -> u64 {
        self.admin().budget
    }

    /// Changes the budget, in bytes, and gives it. Returns when RAM is within it.
    ///
    /// # Errors
    /// [`Error::Invalid`] below the minimum, or for less than is pinned.
    pub fn set_budget(&self, bytes: u64) -> Result<u64, Error> {
        let mut admin = self.admin();
        self.resize(bytes, admin.tables)?;
        admin.budget = bytes;
        Ok(bytes)
    }

    /// Figures of this pager; those of pages are in pages of 4096 bytes, whatever the unit.
    ///
    /// # Errors
    /// None on Windows.
    pub fn stats(&self) -> Result<ClientStats, Error> {
        let admin = self.admin();
        let state = self.0.engine.state();
        let paging = &state.paging;
        let counters = paging.counters;
        let pages = |units: u64| units * to_u64(self.0.engine.unit / PAGE_SIZE);
        let overhead = admin.tables + to_u64(paging.frames() * size_of::<Frame>());
        Ok(ClientStats {
            budget_bytes: admin.budget,
            resident_pages: pages(paging.held().into()),
            peak_resident_pages: pages(counters.peak),
            overhead_bytes: overhead,
            peak_held_bytes: counters.peak * to_u64(self.0.engine.unit) + overhead,
            swapped_pages: pages(paging.cold()),
            slots: admin.claimed / to_u64(PAGE_SIZE),
            claimed_pages: admin.claimed / to_u64(PAGE_SIZE),
            unevictable_pages: pages(paging.pinned().into()),
            faults: counters.faults,
            faults_zero: counters.faults_zero,
            faults_read: counters.faults_read,
            faults_rescued: counters.faults_rescued,
            faults_stalled: counters.faults_stalled,
            pages_in: pages(counters.pages_in),
            pages_readahead: pages(counters.pages_ahead),
            pages_out: pages(counters.pages_out),
            pages_clean: pages(counters.pages_clean),
            io_errors: self.0.engine.io_errors.load(Ordering::Relaxed),
            // What only the daemon does: compressed pages, poisoned ones, those found to be zeros.
            ..ClientStats::default()
        })
    }

    /// Whether paging works.
    #[must_use]
    pub fn health(&self) -> Health {
        if self.0.engine.io_errors.load(Ordering::Relaxed) == 0 { Health::Ok } else { Health::DiskFailed }
    }

    /// This process's number: there is no service that would give it another.
    #[must_use]
    pub fn client_id(&self) -> u64 {
        std::process::id().into()
    }

    pub(super) fn engine(&self) -> &Engine {
        &self.0.engine
    }

    fn admin(&self) -> MutexGuard<'_, Admin> {
        self.0.admin.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims a part of the swap file, and page tables of so many bytes. Tells whether the part has zeros only.
    pub(super) fn claim(&self, len: u64, tables: u64) -> Result<(std::ops::Range<u64>, bool), Error> {
        let mut admin = self.admin();
        let (part, fresh) = admin.space.take(len).ok_or_else(|| Error::SwapFull {
            text: format!(
                "{} were asked for, its longest free part has {}",
                Size(len),
                Size(admin.space.largest())
            ),
        })?;
        let budget = admin.budget;
        if let Err(error) = self.resize(budget, admin.tables + tables) {
            admin.space.give(part);
            return Err(error);
        }
        admin.tables += tables;
        admin.claimed += len;
        Ok((part, fresh))
    }

    /// Gives back what [`Pager::claim`] gave.
    pub(super) fn unclaim(&self, part: std::ops::Range<u64>, tables: u64) {
        let mut admin = self.admin();
        admin.tables -= tables;
        admin.claimed -= part.end - part.start;
        admin.space.give(part);
        let _ = self.resize(admin.budget, admin.tables);
    }

    /// Brings the number of frames to what a budget has room for beside the tables.
    fn resize(&self, budget: u64, tables: u64) -> Result<(), Error> {
        let engine = self.engine();
        let limit = limit(budget, tables, engine.unit)?;
        let more = to_usize(limit.into());
        let table = if engine.state().paging.frames() < more {
            Some(Table::new(more).ok_or_else(no_memory)?)
        } else {
            None
        };
        let mut state = engine.state();
        let least = state.paging.least_limit();
        if limit < least {
            // Nothing is allocated with the lock held: the program's allocator may fault.
            drop(state);
            let bytes = u64::from(least) * to_u64(engine.unit) + tables;
            return Err(Error::invalid(format!("{} are needed for what is pinned", Size(bytes))));
        }
        // Nobody else makes it larger: the caller has the administration's lock.
        let old = table.map(|table| state.paging.grow(table));
        state.paging.set_limit(limit);
        drop(state);
        drop(old);
        engine.shrink().map_err(|refusal| refused("lowering the budget", refusal))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The regions are gone, and with them the handler's ways in here.
        handler::wait_unused(&self.engine);
    }
}

/// Frames that a budget has room for.
fn limit(budget: u64, tables: u64, unit: usize) -> Result<u32, Error> {
    let frame = to_u64(unit + size_of::<Frame>());
    let least = MIN_BUDGET.max(u64::from(RESERVE) * 2 * frame) + tables;
    if budget < least {
        return Err(Error::invalid(format!(
            "a budget of {}; with units of {} and page tables of {} it must be at least {}",
            Size(budget),
            Size(to_u64(unit)),
            Size(tables),
            Size(least)
        )));
    }
    let frames = (budget - tables) / frame;
    Ok(u32::try_from(frames).unwrap_or(MAX_FRAMES).min(MAX_FRAMES))
}

pub(super) fn refused(what: &str, refusal: Refusal) -> Error {
    match refusal {
        Refusal::Failed(code) => Error::system(what, code),
        Refusal::AllPinned => Error::invalid(format!("{what}: too much of the budget is pinned")),
        Refusal::Pinned => Error::invalid(format!("{what}: a page of it is pinned")),
        Refusal::NotOurs => Error::invalid(format!("{what}: a page of it is not committed")),
    }
}

pub(super) fn no_memory() -> Error {
    Error::Refused { code: ErrorCode::System, text: "the system has no memory for page tables".to_owned() }
}
