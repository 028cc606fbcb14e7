//! The error type of the whole library.

use std::path::PathBuf;

use fmalloc_proto::limits::PAGE;
use fmalloc_proto::messages::{ErrorCode, Failure};
#[cfg(unix)]
use nix::errno::Errno;
use thiserror::Error;

/// What went wrong, as a program can act on it. The text says what happened and what to do about it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// No daemon answers at any of the sockets.
    #[error(
        "no fmallocd answers; tried {}. Start the service (systemctl start fmallocd), name its socket in \
         FMALLOC_SOCKET, or use Pager::private, which starts a daemon of its own",
        places(tried)
    )]
    NoDaemon {
        /// Sockets tried, and what was wrong with each.
        tried: Vec<(PathBuf, String)>,
    },
    /// The daemon or its socket does not admit this user.
    #[error("access denied: {text}")]
    Denied {
        /// What was denied, and what to do.
        text: String,
    },
    /// The daemon's RAM pool has no room for the budget.
    #[error("the daemon's RAM pool is full: {text}")]
    PoolFull {
        /// The daemon's figures.
        text: String,
    },
    /// The swap file has no room for the memory that was asked for.
    #[error("the swap file is full: {text}")]
    SwapFull {
        /// The daemon's figures.
        text: String,
    },
    /// This process may not have a userfaultfd that serves system calls.
    #[error(
        "this process may not create a full userfaultfd ({reason}). Connect to the fmallocd service, which hands one to \
         the users that it admits (members of group `fmalloc`); or set sysctl vm.unprivileged_userfaultfd=1; or accept \
         one in which system calls on swapped-out memory fail, by the option user_mode_only"
    )]
    NoUserfaultfd {
        /// The system's word.
        reason: String,
    },
    /// The kernel lacks something that fmalloc needs.
    #[error("the kernel does not support {what}")]
    Unsupported {
        /// What is missing.
        what: String,
    },
    /// The daemon has ended. Memory that is resident still works; threads that touch other memory wait.
    #[error(
        "the paging daemon is gone: memory that is not resident cannot be reached any more; restart the program"
    )]
    DaemonGone,
    /// The library's own thread has failed. Nothing can be evicted or registered any more.
    #[error("fmalloc's agent thread has failed; save what is needed and restart the program")]
    AgentFailed,
    /// The process was forked after the pager was made.
    #[error("this pager belongs to the parent process: after fork, make a new one")]
    Forked,
    /// The daemon refused the request for another reason.
    #[error("the daemon refused: {text}")]
    Refused {
        /// For programs.
        code: ErrorCode,
        /// For people.
        text: String,
    },
    /// The conversation with the daemon did not come about or broke its rules.
    #[error("no conversation with fmallocd: {what}")]
    Conversation {
        /// What happened, and what to do.
        what: String,
    },
    /// No `fmallocd` to start was found.
    #[error(
        "no fmallocd program found; looked at {}. Install it, or name it in FMALLOC_DAEMON",
        places(tried)
    )]
    NoDaemonBinary {
        /// Files looked at, and what was wrong with each.
        tried: Vec<(PathBuf, String)>,
    },
    /// Arguments that make no sense.
    #[error("invalid argument: {what}")]
    Invalid {
        /// Which, and why.
        what: String,
    },
    /// A system call failed.
    #[error("{what}: {}", describe(*errno))]
    System {
        /// What was tried.
        what: String,
        /// The system's error number.
        errno: i32,
    },
}

impl Error {
    /// A failed system call.
    #[cfg(unix)]
    pub(crate) fn system(what: &str, errno: Errno) -> Self {
        Self::System { what: what.to_owned(), errno: errno as i32 }
    }

    /// A failed system call.
    #[cfg(windows)]
    pub(crate) fn system(what: &str, code: u32) -> Self {
        Self::System { what: what.to_owned(), errno: code.cast_signed() }
    }

    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid { what: what.into() }
    }

    #[cfg(unix)]
    pub(crate) fn conversation(what: impl Into<String>) -> Self {
        Self::Conversation { what: what.into() }
    }

    /// Whether the daemon may have done what was asked all the same.
    #[cfg(unix)]
    pub(crate) fn is_uncertain(&self) -> bool {
        matches!(self, Self::DaemonGone | Self::AgentFailed | Self::Conversation { .. })
    }

    /// The nearest error number of the system: what a function with the manners of the C library shall give to its caller.
    #[cfg(unix)]
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::System { errno, .. } => *errno,
            Self::PoolFull { .. } | Self::SwapFull { .. } => libc::ENOMEM,
            Self::Invalid { .. } => libc::EINVAL,
            Self::Denied { .. } | Self::NoUserfaultfd { .. } => libc::EPERM,
            Self::Unsupported { .. } => libc::ENOSYS,
            _ => libc::EAGAIN,
        }
    }

    /// A range that is not inside a region of `len` bytes.
    pub(crate) fn range(range: &std::ops::Range<usize>, len: usize) -> Self {
        Self::Invalid {
            what: format!("{range:?} is not a range within {len} bytes (pages have {PAGE} bytes)"),
        }
    }
}

impl From<Error> for std::io::Error {
    /// The kind says what a program can act on; the error itself is inside.
    fn from(error: Error) -> Self {
        use std::io::ErrorKind;
        let kind = match &error {
            Error::NoDaemon { .. } | Error::NoDaemonBinary { .. } => ErrorKind::NotConnected,
            Error::Denied { .. } | Error::NoUserfaultfd { .. } => ErrorKind::PermissionDenied,
            Error::PoolFull { .. } | Error::SwapFull { .. } => ErrorKind::OutOfMemory,
            Error::Unsupported { .. } => ErrorKind::Unsupported,
            Error::DaemonGone | Error::AgentFailed | Error::Conversation { .. } => ErrorKind::BrokenPipe,
            Error::Refused { code: ErrorCode::FileFull, .. } => ErrorKind::StorageFull,
            Error::Refused { code: ErrorCode::FileBusy, .. } => ErrorKind::ResourceBusy,
            Error::Refused { code: ErrorCode::Invalid, .. } | Error::Invalid { .. } => {
                ErrorKind::InvalidInput
            }
            Error::System { errno, .. } => Self::from_raw_os_error(*errno).kind(),
            Error::Forked | Error::Refused { .. } => ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

impl From<Failure> for Error {
    fn from(Failure { code, text }: Failure) -> Self {
        match code {
            ErrorCode::Denied => Self::Denied { text },
            ErrorCode::PoolFull => Self::PoolFull { text },
            ErrorCode::SwapFull => Self::SwapFull { text },
            ErrorCode::Unsupported => Self::Unsupported { what: text },
            _ => Self::Refused { code, text },
        }
    }
}

#[cfg(unix)]
fn describe(errno: i32) -> &'static str {
    Errno::from_raw(errno).desc()
}

#[cfg(windows)]
fn describe(code: i32) -> std::io::Error {
    std::io::Error::from_raw_os_error(code)
}

fn places(tried: &[(PathBuf, String)]) -> String {
    if tried.is_empty() {
        return "nothing".to_owned();
    }
    let list: Vec<String> =
        tried.iter().map(|(path, reason)| format!("{} ({reason})", path.display())).collect();
    list.join(", ")
}
