//! `fork`: the child goes on with the paged memory as it was, and each side with its own from then on.
//!
//! Libc forks in functions of its own as well (`daemon`, `forkpty`), so the work is done by handlers that it calls around
//! every fork. Those cannot refuse: the function [`fork`] does what they would do before it comes to that, and fails where
//! the child's memory is not to be had.
//!
//! From the first lock to the last release the forking thread is inside. Handlers of other libraries that run meanwhile
//! get their memory from libc.

use std::cell::UnsafeCell;
use std::ffi::c_int;
use std::sync::MutexGuard;
use std::sync::atomic::{AtomicI32, Ordering};

use fmalloc_client::{Error, PreparedFork};
use libc::pid_t;

use crate::area::Area;
use crate::inside::Inside;
use crate::next::next;
use crate::paging::{self, Paging};
use crate::{locked, raw, say};

/// All that is held while a fork is under way. Dropped from front to back.
struct Held {
    paged: Option<Paged>,
    _starting: MutexGuard<'static, ()>,
    _inside: Inside,
}

/// Of a process that is paged.
struct Paged {
    prepared: Result<PreparedFork, Error>,
    paging: &'static Paging,
    _area: MutexGuard<'static, Area>,
}

/// What is held, while [`FORKING`] names the thread that holds it.
struct Place(UnsafeCell<Option<Held>>);

// SAFETY: only the thread that holds the lock on the beginning of paging looks at it.
unsafe impl Sync for Place {}

static HELD: Place = Place(UnsafeCell::new(None));
/// The thread that is forking; 0 if none is.
static FORKING: AtomicI32 = AtomicI32::new(0);

/// Has libc call this library around each fork. The first to register is the last before a fork and the first after it.
pub(crate) fn register() {
    // SAFETY: functions that live as long as the process; this library is never unloaded.
    unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
}

/// See fork(2).
///
/// # Safety
/// As for the function of libc.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn fork() -> pid_t {
    let Some(fork) = next().fork else { return raw::fail(libc::ENOSYS) };
    // SAFETY: the caller's.
    if refused() { -1 } else { unsafe { fork() } }
}

/// See fork(2): without the handlers of the program, but with this library's.
///
/// # Safety
/// As for the function of libc.
#[allow(non_snake_case, reason = "the C library's name")]
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn _Fork() -> pid_t {
    let Some(fork) = next().plain_fork else { return raw::fail(libc::ENOSYS) };
    if refused() {
        return -1;
    }
    before();
    // SAFETY: the caller's.
    let pid = unsafe { fork() };
    let errno = raw::errno();
    if pid == 0 {
        in_child()
    } else {
        in_parent()
    }
    raw::set_errno(errno);
    pid
}

/// Prepares for a fork; if the child cannot have its memory, undoes that, sets errno and says so.
fn refused() -> bool {
    before();
    let Some(held) = held() else { return false };
    let Some(Paged { prepared: Err(error), .. }) = &held.paged else { return false };
    let errno = error.errno();
    in_parent();
    raw::set_errno(errno);
    true
}

/// Before a fork: nobody is in the middle of anything.
extern "C" fn before() {
    let thread = thread_id();
    if FORKING.load(Ordering::Relaxed) == thread {
        return;
    }
    let inside = Inside::enter();
    let starting = paging::lock();
    let paged = paging::paging().map(|paging| {
        let area = paging.maps.lock();
        paging.heap.prepare_fork();
        Paged { prepared: paging.pager.prepare_fork(), paging, _area: area }
    });
    FORKING.store(thread, Ordering::Relaxed);
    // SAFETY: this thread holds the lock.
    unsafe { *HELD.0.get() = Some(Held { paged, _starting: starting, _inside: inside }) };
}

/// After a fork, in the parent, or where no fork came of it.
extern "C" fn in_parent() {
    let Some(mut held) = take() else { return };
    if let Some(Paged { prepared, paging, _area: area }) = held.paged.take() {
        if let Ok(prepared) = prepared {
            prepared.in_parent();
        }
        paging.heap.after_fork_parent();
        drop(area);
    }
}

/// After a fork, in the child.
extern "C" fn in_child() {
    let Some(mut held) = take() else { return };
    locked::forget();
    if let Some(Paged { prepared, paging, _area: area }) = held.paged.take() {
        match prepared {
            // SAFETY: this is the child, and its thread has prepared.
            Ok(prepared) => unsafe { prepared.in_child() },
            Err(error) => {
                // Of a fork that could not be refused.
                say::always(&format!("a forked child cannot get its memory and ends: {error}"));
                // SAFETY: ends the process.
                unsafe { libc::abort() };
            }
        }
        paging.heap.after_fork_child();
        drop(area);
    }
}

/// What this thread holds; none if it is not forking.
fn held() -> Option<&'static mut Held> {
    // SAFETY: this thread holds the lock, as `FORKING` says, and does nothing else meanwhile.
    unsafe { (*HELD.0.get()).as_mut() }
}

/// Ends the fork of this thread. The name of the thread that forks does not outlive it: the child's is another.
fn take() -> Option<Held> {
    FORKING.store(0, Ordering::Relaxed);
    // SAFETY: as above; libc calls the handlers on the thread that forks.
    unsafe { (*HELD.0.get()).take() }
}

fn thread_id() -> c_int {
    // SAFETY: takes nothing.
    unsafe { libc::gettid() }
}
