//! How failures are told: `errno`, and a message that each thread has for itself.

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int};
#[cfg(unix)]
use std::io;
#[cfg(unix)]
use std::path::Path;
use std::ptr;

use fmalloc_client::Error;
use fmalloc_client::heap::{BadPointer, ReallocError, Unavailable};

thread_local! {
    static MESSAGE: RefCell<CString> = RefCell::new(CString::default());
}

/// What to tell.
#[derive(Debug)]
pub(crate) struct Failure {
    errno: c_int,
    text: String,
}

impl Failure {
    /// Arguments that make no sense.
    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self { errno: libc::EINVAL, text: text.into() }
    }

    /// With another error number.
    pub(crate) fn new(errno: c_int, text: impl Into<String>) -> Self {
        Self { errno, text: text.into() }
    }

    /// Says what it is about as well.
    #[cfg(unix)]
    pub(crate) fn about(mut self, path: &Path) -> Self {
        self.text.insert_str(0, &format!("{}: ", path.display()));
        self
    }

    /// Sets `errno` and the message of the calling thread.
    #[cold]
    pub(crate) fn tell(self) {
        let text = self.text.replace('\0', " ");
        // A thread that is about to end has no message any more.
        let _ = MESSAGE.try_with(|message| message.replace(CString::new(text).unwrap_or_default()));
        set_errno(self.errno);
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let errno = match &error {
            Error::NoDaemon { .. } | Error::NoDaemonBinary { .. } => libc::ENOENT,
            Error::Denied { .. } => libc::EACCES,
            Error::PoolFull { .. } => libc::ENOMEM,
            Error::SwapFull { .. } => libc::ENOSPC,
            Error::NoUserfaultfd { .. } => libc::EPERM,
            Error::Unsupported { .. } => libc::ENOSYS,
            Error::DaemonGone | Error::AgentFailed => libc::EPIPE,
            Error::Conversation { .. } => libc::EPROTO,
            Error::System { errno, .. } if cfg!(unix) => *errno,
            // Of Windows, whose numbers are others.
            Error::System { .. } => libc::EIO,
            _ => libc::EINVAL,
        };
        Self { errno, text: error.to_string() }
    }
}

#[cfg(unix)]
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        let errno = match error.kind() {
            io::ErrorKind::StorageFull => Some(libc::ENOSPC),
            io::ErrorKind::ResourceBusy => Some(libc::EBUSY),
            _ => error.raw_os_error(),
        };
        let text = error.to_string();
        match (errno, error.downcast::<Error>()) {
            (Some(errno), _) => Self::new(errno, text),
            (None, Ok(error)) => error.into(),
            (None, Err(_)) => Self::invalid(text),
        }
    }
}

impl From<Unavailable> for Failure {
    fn from(_: Unavailable) -> Self {
        let text = "out of memory: the heap's size is reached, the swap file is full, or the size is impossible; see \
                    fmalloc_stats, or give fmalloc_init a larger size";
        Self { errno: libc::ENOMEM, text: text.to_owned() }
    }
}

impl From<BadPointer> for Failure {
    fn from(bad: BadPointer) -> Self {
        Self { errno: libc::EINVAL, text: bad.text().to_owned() }
    }
}

impl From<ReallocError> for Failure {
    fn from(error: ReallocError) -> Self {
        match error {
            ReallocError::BadPointer(bad) => bad.into(),
            _ => Unavailable.into(),
        }
    }
}

/// A result as C functions give it: 0, or -1 after the failure was told.
pub(crate) fn status(outcome: Result<(), Failure>) -> c_int {
    match outcome {
        Ok(()) => 0,
        Err(failure) => {
            failure.tell();
            -1
        }
    }
}

/// A pointer, or null after the failure was told.
#[inline]
pub(crate) fn pointer<T>(outcome: Result<*mut T, Failure>) -> *mut T {
    outcome.unwrap_or_else(|failure| {
        failure.tell();
        ptr::null_mut()
    })
}

/// What the last call of this thread that failed had to say, in English; empty if none has. Valid until the next failure
/// in this thread.
#[unsafe(no_mangle)]
pub extern "C" fn fmalloc_error() -> *const c_char {
    MESSAGE.try_with(|message| message.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

#[cfg(unix)]
fn set_errno(errno: c_int) {
    // SAFETY: libc gives the calling thread's own variable.
    unsafe { *libc::__errno_location() = errno };
}

#[cfg(windows)]
fn set_errno(errno: c_int) {
    unsafe extern "C" {
        fn _set_errno(value: c_int) -> c_int;
    }
    // SAFETY: the C runtime's function takes a number.
    unsafe { _set_errno(errno) };
}
