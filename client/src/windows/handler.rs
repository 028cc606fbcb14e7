//! The vectored exception handler: turns a fault on a page of a region into that page, and passes everything else on
//! untouched. It runs on the thread that faulted, whatever that was doing and whatever locks of the program it has; so
//! nothing here allocates, prints, or touches paged memory.

use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, Ordering};

use windows_sys::Win32::Foundation::{
    EXCEPTION_ACCESS_VIOLATION, EXCEPTION_IN_PAGE_ERROR, FreeLibrary, GetLastError, HMODULE, SetLastError,
};
use windows_sys::Win32::System::Diagnostics::Debug::{
    AddVectoredExceptionHandler, EXCEPTION_CONTINUE_EXECUTION, EXCEPTION_CONTINUE_SEARCH, EXCEPTION_POINTERS,
    RemoveVectoredExceptionHandler,
};
use windows_sys::Win32::System::LibraryLoader::{GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS, GetModuleHandleExW};

use super::engine::Engine;
use super::frames::Place;
use super::lock::Lock;
use super::paging::Want;
use super::sys::Code;

/// Most regions of a process: the list is searched in the handler and cannot grow there.
const MAX_REGIONS: usize = 1024;

/// How an access was made, in an exception's first parameter. 8 is execution, which regions do not have.
const READ: usize = 0;
const WRITE: usize = 1;

/// The addresses of a region, and who pages it.
#[derive(Clone, Copy)]
struct Entry {
    start: usize,
    end: usize,
    region: u32,
    engine: *const Engine,
}

/// All regions of the process, by address.
struct Registry {
    entries: [Entry; MAX_REGIONS],
    len: usize,
}

// SAFETY: the engines are shared objects; `acquire` says why they are there.
unsafe impl Send for Registry {}
// SAFETY: as above.
unsafe impl Sync for Registry {}

static REGISTRY: Lock<Registry> = Lock::new(Registry {
    entries: [Entry { start: 0, end: 0, region: 0, engine: std::ptr::null() }; MAX_REGIONS],
    len: 0,
});

/// How many pagers want the handler, and what was registered for them.
struct Registration {
    pagers: u32,
    handle: *mut std::ffi::c_void,
    module: HMODULE,
}

// SAFETY: both pointers belong to the process, not to a thread.
unsafe impl Send for Registration {}
// SAFETY: as above.
unsafe impl Sync for Registration {}

static REGISTRATION: Lock<Registration> =
    Lock::new(Registration { pagers: 0, handle: null_mut(), module: null_mut() });
/// Threads in the handler.
static INSIDE: AtomicU32 = AtomicU32::new(0);

/// Keeps the handler registered, as the first of the process, and its code loaded.
#[derive(Debug)]
pub(super) struct Handler(());

impl Handler {
    /// Registers it, if it is not.
    ///
    /// # Errors
    /// The system's number.
    pub(super) fn register() -> Result<Self, Code> {
        let mut registration = REGISTRATION.lock();
        if registration.pagers == 0 {
            let mut module = null_mut();
            let here: unsafe extern "system" fn(*mut EXCEPTION_POINTERS) -> i32 = handle;
            // SAFETY: with this flag the name is an address. A program that unloads this DLL without having dropped its
            // pagers then keeps it in memory, and the handler with it.
            let found = unsafe {
                GetModuleHandleExW(
                    GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS,
                    here as *const u16,
                    &raw mut module,
                )
            };
            // SAFETY: the handler keeps the rules of handlers: see the module.
            let handle =
                if found == 0 { null_mut() } else { unsafe { AddVectoredExceptionHandler(1, Some(handle)) } };
            if handle.is_null() {
                // SAFETY: reads a number of this thread.
                return Err(unsafe { GetLastError() });
            }
            registration.handle = handle;
            registration.module = module;
        }
        registration.pagers += 1;
        Ok(Self(()))
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        let mut registration = REGISTRATION.lock();
        registration.pagers -= 1;
        if registration.pagers > 0 {
            return;
        }
        // SAFETY: registered by us, once.
        unsafe { RemoveVectoredExceptionHandler(registration.handle) };
        while INSIDE.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
        // SAFETY: the reference taken at registration. Whoever runs this code has one of its own.
        unsafe { FreeLibrary(registration.module) };
    }
}

/// Has faults on these addresses served by `engine`, which must live until [`remove`]. False if there are too many
/// regions.
pub(super) fn add(addresses: std::ops::Range<usize>, region: u32, engine: *const Engine) -> bool {
    let mut registry = REGISTRY.lock();
    let len = registry.len;
    if len == MAX_REGIONS {
        return false;
    }
    let at = registry.place(addresses.start);
    registry.entries.copy_within(at..len, at + 1);
    registry.entries[at] = Entry { start: addresses.start, end: addresses.end, region, engine };
    registry.len += 1;
    true
}

/// Ends that for the region that begins at `start`. Threads may still be at work on a fault there.
pub(super) fn remove(start: usize) {
    let mut registry = REGISTRY.lock();
    let at = registry.place(start);
    let len = registry.len;
    if at < len && registry.entries[at].start == start {
        registry.entries.copy_within(at + 1..len, at);
        registry.len -= 1;
    }
}

impl Registry {
    /// Where an entry with this start is or would be.
    fn place(&self, start: usize) -> usize {
        self.entries[..self.len].partition_point(|entry| entry.start < start)
    }
}

/// The region at an address, its engine marked as in use: the engine's owner takes its regions out of the list
/// first, and then waits until nobody uses it.
fn acquire(address: usize) -> Option<(&'static Engine, Place)> {
    let registry = REGISTRY.read();
    let before = registry.entries[..registry.len].partition_point(|entry| entry.start <= address);
    let entry = registry.entries[..before].last().filter(|entry| address < entry.end)?;
    // SAFETY: it is in the list, so it lives; the count keeps it so until `serve` has ended.
    let engine = unsafe { &*entry.engine };
    engine.users.fetch_add(1, Ordering::SeqCst);
    let page = u32::try_from((address - entry.start) / engine.unit).ok();
    Some((engine, Place { region: entry.region, page: page.unwrap_or(u32::MAX) }))
}

unsafe extern "system" fn handle(pointers: *mut EXCEPTION_POINTERS) -> i32 {
    INSIDE.fetch_add(1, Ordering::SeqCst);
    // SAFETY: the system calls handlers with a valid record.
    let record = unsafe { &*(*pointers).ExceptionRecord };
    let kind = record.ExceptionInformation[0];
    let about_memory = record.NumberParameters >= 2
        && (record.ExceptionCode == EXCEPTION_ACCESS_VIOLATION && (kind == READ || kind == WRITE)
            || record.ExceptionCode == EXCEPTION_IN_PAGE_ERROR);
    let served = about_memory && {
        // SAFETY: reads a number of this thread, and puts it back: the program may be about to ask for it.
        let error = unsafe { GetLastError() };
        let served = serve(record.ExceptionCode, kind == WRITE, record.ExceptionInformation[1]);
        // SAFETY: as above.
        unsafe { SetLastError(error) };
        served
    };
    INSIDE.fetch_sub(1, Ordering::SeqCst);
    if served { EXCEPTION_CONTINUE_EXECUTION } else { EXCEPTION_CONTINUE_SEARCH }
}

/// Whether the access can be made now.
fn serve(code: i32, write: bool, address: usize) -> bool {
    let Some((engine, place)) = acquire(address) else { return false };
    let served = if code == EXCEPTION_IN_PAGE_ERROR {
        // The disk failed. The program hears of it as it would without us; `Pager::health` tells as well.
        engine.io_errors.fetch_add(1, Ordering::Relaxed);
        false
    } else {
        engine.serve(place, Want { write, pin: false }).is_ok()
    };
    engine.users.fetch_sub(1, Ordering::SeqCst);
    served
}

/// Waits until no handler is at work with an engine whose regions are all out of the list.
pub(super) fn wait_unused(engine: &Engine) {
    while engine.users.load(Ordering::SeqCst) > 0 {
        std::thread::yield_now();
    }
}
