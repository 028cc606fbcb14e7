//! A mutex that allocates nothing, may be held across `fork`, and can be released in the child: what the standard
//! library's does not offer.

use std::cell::UnsafeCell;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, Ordering};

use super::sys;

const FREE: u32 = 0;
const HELD: u32 = 1;
const CONTENDED: u32 = 2;

/// How often to look again before sleeping: critical sections are tens of nanoseconds, but for those that commit memory.
const SPINS: u32 = 100;

/// The bare lock. All zeros is free.
#[derive(Debug)]
pub(super) struct Lock(AtomicU32);

impl Lock {
    /// A free lock.
    pub(super) const fn new() -> Self {
        Self(AtomicU32::new(FREE))
    }

    /// Takes it, waiting if need be.
    #[inline]
    pub(super) fn lock(&self) {
        if !self.try_lock() {
            self.wait();
        }
    }

    /// Takes it if it is free.
    #[inline]
    pub(super) fn try_lock(&self) -> bool {
        self.0.compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// Releases it. Only for who holds it.
    #[inline]
    pub(super) fn unlock(&self) {
        if self.0.swap(FREE, Ordering::Release) == CONTENDED {
            sys::wake_one(&self.0);
        }
    }

    #[cold]
    fn wait(&self) {
        for _ in 0..SPINS {
            if self.0.load(Ordering::Relaxed) == FREE && self.try_lock() {
                return;
            }
            std::hint::spin_loop();
        }
        while self.0.swap(CONTENDED, Ordering::Acquire) != FREE {
            sys::wait(&self.0, CONTENDED);
        }
    }
}

/// A value behind a [`Lock`].
pub(super) struct Guarded<T> {
    lock: Lock,
    value: UnsafeCell<T>,
}

// SAFETY: the lock admits one thread at a time.
unsafe impl<T: Send> Sync for Guarded<T> {}

impl<T> Guarded<T> {
    /// Wraps a value.
    pub(super) const fn new(value: T) -> Self {
        Self { lock: Lock::new(), value: UnsafeCell::new(value) }
    }

    /// Waits for the value.
    #[inline]
    pub(super) fn lock(&self) -> Guard<'_, T> {
        self.lock.lock();
        Guard(self)
    }

    /// The value, for who holds the bare lock.
    ///
    /// # Safety
    /// The caller must hold the lock, and keep it while it uses the value.
    pub(super) unsafe fn peek(&self) -> &T {
        // SAFETY: the caller's.
        unsafe { &*self.value.get() }
    }

    /// The lock, to be held across `fork`.
    pub(super) fn bare(&self) -> &Lock {
        &self.lock
    }
}

impl<T> fmt::Debug for Guarded<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guarded").finish_non_exhaustive()
    }
}

/// The value, and the right to it.
pub(super) struct Guard<'a, T>(&'a Guarded<T>);

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: the guard holds the lock.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the guard holds the lock and is borrowed exclusively.
        unsafe { &mut *self.0.value.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        self.0.lock.unlock();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thread_at_a_time() {
        let counter = Guarded::new(0_u64);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for n in 0..20_000 {
                        let mut guard = counter.lock();
                        let seen = *guard;
                        if n % 64 == 0 {
                            std::thread::yield_now();
                        }
                        *guard = seen + 1;
                    }
                });
            }
        });
        assert_eq!(*counter.lock(), 80_000);
        assert!(counter.bare().try_lock());
        assert!(!counter.bare().try_lock());
        counter.bare().unlock();
    }
}
