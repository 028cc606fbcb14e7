//! A lock that the exception handler may take: it allocates nothing and needs nothing of the thread.

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};

use windows_sys::Win32::System::Threading::{
    AcquireSRWLockExclusive, AcquireSRWLockShared, CONDITION_VARIABLE, CONDITION_VARIABLE_INIT, INFINITE,
    ReleaseSRWLockExclusive, ReleaseSRWLockShared, SRWLOCK, SRWLOCK_INIT, SleepConditionVariableSRW,
    WakeAllConditionVariable,
};

/// A value that one thread at a time may change, and many may read.
pub(super) struct Lock<T> {
    raw: UnsafeCell<SRWLOCK>,
    value: UnsafeCell<T>,
}

// SAFETY: the lock gives the value to one thread at a time, or to several for reading.
unsafe impl<T: Send> Send for Lock<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Lock<T> {}

impl<T> Lock<T> {
    pub(super) const fn new(value: T) -> Self {
        Self { raw: UnsafeCell::new(SRWLOCK_INIT), value: UnsafeCell::new(value) }
    }

    /// Waits until no other thread has it.
    pub(super) fn lock(&self) -> Held<'_, T> {
        // SAFETY: the lock was initialised and does not move while it is borrowed.
        unsafe { AcquireSRWLockExclusive(self.raw.get()) };
        Held(self)
    }

    /// Waits until no other thread changes it. Not to be called again by a thread that has it.
    pub(super) fn read(&self) -> Reading<'_, T> {
        // SAFETY: as above.
        unsafe { AcquireSRWLockShared(self.raw.get()) };
        Reading(self)
    }
}

/// The value, until it is dropped.
pub(super) struct Held<'lock, T>(&'lock Lock<T>);

impl<T> Deref for Held<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: this thread has the lock.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> DerefMut for Held<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: this thread has the lock, and no other has any part of it.
        unsafe { &mut *self.0.value.get() }
    }
}

impl<T> Drop for Held<'_, T> {
    fn drop(&mut self) {
        // SAFETY: taken in `lock`.
        unsafe { ReleaseSRWLockExclusive(self.0.raw.get()) };
    }
}

/// The value for reading, until it is dropped.
pub(super) struct Reading<'lock, T>(&'lock Lock<T>);

impl<T> Deref for Reading<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: nobody changes the value while this thread reads it.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> Drop for Reading<'_, T> {
    fn drop(&mut self) {
        // SAFETY: taken in `read`.
        unsafe { ReleaseSRWLockShared(self.0.raw.get()) };
    }
}

/// Something to wait for that changes under a lock.
pub(super) struct Change(UnsafeCell<CONDITION_VARIABLE>);

// SAFETY: condition variables are made to be used by many threads.
unsafe impl Send for Change {}
// SAFETY: as above.
unsafe impl Sync for Change {}

impl Change {
    pub(super) const fn new() -> Self {
        Self(UnsafeCell::new(CONDITION_VARIABLE_INIT))
    }

    /// Gives the lock back, waits for [`Change::tell`], and takes it again. May return without reason.
    pub(super) fn wait<T>(&self, held: &mut Held<'_, T>) {
        // SAFETY: both were initialised, and this thread has the lock exclusively.
        unsafe { SleepConditionVariableSRW(self.0.get(), held.0.raw.get(), INFINITE, 0) };
    }

    /// Wakes all that wait.
    pub(super) fn tell(&self) {
        // SAFETY: as above.
        unsafe { WakeAllConditionVariable(self.0.get()) };
    }
}
