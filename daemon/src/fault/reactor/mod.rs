//! What a fault thread waits on: three descriptors and its swap I/O. Two implementations of one trait: io_uring, and
//! poll with pread/pwrite where io_uring is not to be had.

mod psync;
mod uring;

use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::time::Duration;

pub use psync::Psync;
pub use uring::Uring;

/// A transfer of the swap file.
#[derive(Debug, Clone, Copy)]
pub struct Io {
    /// Comes back in the completion.
    pub token: u64,
    /// Into memory, or out of it.
    pub is_read: bool,
    /// Byte offset in the file.
    pub offset: u64,
    /// Memory; must stay as it is until the completion.
    pub memory: NonNull<u8>,
    /// Bytes.
    pub len: u32,
}

/// A transfer that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// From the transfer.
    pub token: u64,
    /// All bytes were transferred; anything less is a failure.
    pub good: bool,
}

/// Descriptors that became readable.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ready {
    /// The client's userfaultfd.
    pub uffd: bool,
    /// It can no longer be polled: the client has changed its flags.
    pub uffd_error: bool,
    /// The agent's doorbell.
    pub agent: bool,
    /// The queue of commands.
    pub commands: bool,
}

/// The descriptors to watch.
#[derive(Debug, Clone, Copy)]
pub struct Watched {
    /// The client's userfaultfd.
    pub uffd: RawFd,
    /// The agent's doorbell (an eventfd).
    pub agent: RawFd,
    /// Rung when a command is queued (an eventfd).
    pub commands: RawFd,
}

/// Waits and does swap I/O for one fault thread.
pub trait Reactor {
    /// Queues a transfer. It starts at the next [`Reactor::wait`] at the latest.
    ///
    /// # Safety
    /// The memory must stay valid, and unused if it is read into, until the completion has been seen.
    unsafe fn submit(&mut self, io: Io);

    /// Waits until something happens or `timeout` is over; does not wait if it is zero. Appends to `done` what has ended.
    /// The userfaultfd is watched only if `watch_uffd` is set.
    ///
    /// # Errors
    /// Failures that leave no way to go on.
    fn wait(
        &mut self,
        timeout: Option<Duration>,
        watch_uffd: bool,
        done: &mut Vec<Completion>,
    ) -> std::io::Result<Ready>;
}
