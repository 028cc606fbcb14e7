//! What a fault thread waits on: three descriptors and its swap I/O. Two implementations of one trait: io_uring, and
//! poll with pread/pwrite where io_uring is not to be had.

mod psync;
mod uring;

use std::fmt::Debug;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::time::Duration;

use nix::errno::Errno;
use thiserror::Error;

pub use psync::Psync;
pub use uring::Uring;

/// A transfer of the swap file, or of another.
#[derive(Debug, Clone, Copy)]
pub struct Io {
    /// Comes back in the completion.
    pub token: u64,
    /// The file, if it is not the swap file; open until the completion.
    pub file: Option<RawFd>,
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
    /// All bytes were transferred, or why not.
    pub result: Result<(), IoFailure>,
}

/// Why a transfer failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum IoFailure {
    /// The system said so.
    #[error("{0}")]
    System(Errno),
    /// It ended early.
    #[error("it ended after {0} bytes")]
    Short(u64),
}

impl Completion {
    /// From what a system call or io_uring gave for a transfer of `len` bytes: a count, or a negative error number.
    #[must_use]
    pub fn of(token: u64, len: u64, got: i64) -> Self {
        let result = match u64::try_from(got) {
            Ok(count) if count == len => Ok(()),
            Ok(count) => Err(IoFailure::Short(count)),
            Err(_) => Err(IoFailure::System(Errno::from_raw(i32::try_from(-got).unwrap_or(libc::EIO)))),
        };
        Self { token, result }
    }
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

/// Stands between fault threads and their swap I/O. Tests have transfers fail through it; `fmallocd` has none.
pub trait Interposer: Debug + Send + Sync {
    /// What the fault thread of this client is to use instead of `reactor`.
    fn interpose(&self, client: u64, reactor: Box<dyn Reactor>) -> Box<dyn Reactor>;
}
