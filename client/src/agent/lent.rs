//! A file that an application thread has open, for a message to the daemon. The agent has a table of descriptors of its
//! own, so it opens the file anew through the table of that thread, which waits meanwhile. The daemon gets two descriptions
//! of the file that the application does not share, the second one with O_DIRECT if the file system has that.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use fmalloc_proto::messages::{ErrorCode, Failure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;

use crate::sys;

/// See the module.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lent {
    thread: i32,
    fd: RawFd,
    access: OFlag,
}

impl Lent {
    /// A file of the calling thread's table.
    ///
    /// # Errors
    /// EBADF if it is not open.
    pub(crate) fn new(fd: BorrowedFd<'_>) -> Result<Self, Errno> {
        let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
        Ok(Self {
            thread: sys::thread_id(),
            fd: fd.as_raw_fd(),
            access: flags & (OFlag::O_ACCMODE | OFlag::O_PATH),
        })
    }

    /// Opens the file in the agent's table, with the access that the application has.
    pub(super) fn open(&self) -> Result<[OwnedFd; 2], Failure> {
        let path = format!("/proc/self/task/{}/fd/{}", self.thread, self.fd);
        let again = |more: OFlag| {
            // A path that is no file anybody could read must not be waited for.
            let flags = self.access | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | more;
            open(path.as_str(), flags, Mode::empty())
        };
        let failed = |errno: Errno| Failure {
            code: ErrorCode::System,
            text: format!("the file cannot be handed to the daemon: {}", errno.desc()),
        };
        // Rights may have been given up since the file was opened: then the descriptor itself.
        let plain = again(OFlag::empty()).or_else(|_| self.borrow()).map_err(failed)?;
        let direct = match again(OFlag::O_DIRECT) {
            Ok(direct) => direct,
            Err(_) => plain
                .try_clone()
                .map_err(|error| failed(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EMFILE))))?,
        };
        Ok([plain, direct])
    }

    /// The application's own description of the file.
    fn borrow(&self) -> Result<OwnedFd, Errno> {
        // SAFETY: takes numbers by value.
        let process = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) })?;
        // SAFETY: the kernel has just made this descriptor for us.
        let process = unsafe { OwnedFd::from_raw_fd(RawFd::try_from(process).map_err(|_| Errno::EBADF)?) };
        // SAFETY: as above.
        let fd =
            Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), self.fd, 0) })?;
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(unsafe { OwnedFd::from_raw_fd(RawFd::try_from(fd).map_err(|_| Errno::EBADF)?) })
    }
}
