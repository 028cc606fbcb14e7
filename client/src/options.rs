//! What a program can ask for when it makes a pager.

#[cfg(unix)]
use std::ffi::OsString;
use std::path::PathBuf;

use fmalloc_proto::groups::Token as GroupToken;
#[cfg(unix)]
use fmalloc_proto::limits::MAX_NAME;
#[cfg(unix)]
use fmalloc_proto::switches::{DISABLE, Disabled, UnknownWord};

#[cfg(unix)]
use crate::error::Error;

/// How to connect to a daemon that runs already.
#[derive(Debug, Clone, Default)]
pub struct ConnectOptions {
    /// The daemon's socket. Without it: FMALLOC_SOCKET, then the system's socket, then the user's own.
    pub socket: Option<PathBuf>,
    /// RAM budget in bytes; without it the daemon's default.
    pub budget: Option<u64>,
    /// Shown by `fmallocctl`; without it the name of the executable. Cut to 64 bytes.
    pub name: Option<String>,
    /// Accept a userfaultfd with which system calls on swapped-out memory fail with EFAULT, if there is no better one.
    pub user_mode_only: bool,
    /// Forked children go on with the regions: see [`fork`](crate::fork). Needs a daemon with CAP_SYS_PTRACE (root has it)
    /// and Linux 6.8. Children must be able to connect to the daemon as this process was.
    pub inherit: bool,
    /// Share the budget of this group; then `budget` means nothing.
    pub group: Option<GroupToken>,
}

/// How to start a daemon for this process alone.
#[derive(Debug, Clone)]
pub struct PrivateOptions {
    /// RAM budget in bytes.
    pub budget: u64,
    /// Directory of the swap file, on a real disk. Without it FMALLOC_SWAP_DIR, then /var/tmp.
    pub swap_dir: Option<PathBuf>,
    /// Most bytes that the swap file may grow to; without it the daemon decides.
    pub swap_size: Option<u64>,
    /// The `fmallocd` program. Without it FMALLOC_DAEMON, then beside the executable, PATH and libexec.
    pub daemon: Option<PathBuf>,
    /// Shown by `fmallocctl`; without it the name of the executable. Cut to 64 bytes.
    pub name: Option<String>,
    /// Accept a userfaultfd with which system calls on swapped-out memory fail with EFAULT, if there is no better one.
    pub user_mode_only: bool,
    /// Forked children go on with the regions: see [`fork`](crate::fork). Needs CAP_SYS_PTRACE (root has it) and Linux
    /// 6.8.
    pub inherit: bool,
}

impl PrivateOptions {
    /// A budget in bytes, and the default for everything else.
    #[must_use]
    pub fn new(budget: u64) -> Self {
        Self {
            budget,
            swap_dir: None,
            swap_size: None,
            daemon: None,
            name: None,
            user_mode_only: false,
            inherit: false,
        }
    }
}

/// How to page for this process alone, in the same words on every system: in the process on Windows, by a private
/// daemon on Linux.
#[derive(Debug, Clone)]
pub struct LocalOptions {
    /// RAM budget in bytes.
    pub budget: u64,
    /// Bytes that the swap file has room for, as much as all regions together.
    pub swap_size: u64,
    /// The swap file, such as `D:\\swap.bin`. It must not exist, unless fmalloc left it; nobody else can open it. Without it
    /// a new one in the directory for temporary files. On Linux the file has no name, and only the directory counts.
    pub swap_file: Option<PathBuf>,
    /// Do not delete the swap file at the end: the next pager then has its space at once. Its content is not kept. Only
    /// on Windows.
    pub keep: bool,
    /// Bytes that are paged at a time: a power of two from 4 KiB to 1 MiB. On Linux it is always 4 KiB.
    pub unit: usize,
}

impl LocalOptions {
    /// A budget and a size of the swap file in bytes, and the default for everything else.
    #[must_use]
    pub fn new(budget: u64, swap_size: u64) -> Self {
        Self { budget, swap_size, swap_file: None, keep: false, unit: Self::UNIT }
    }

    /// Default of [`LocalOptions::unit`]: by the figures in docs/windows.md.
    pub const UNIT: usize = 64 << 10;
}

/// An environment variable, unless it is empty or this program runs with more rights than its caller, whose environment
/// must not choose a daemon for it then.
#[cfg(unix)]
pub(crate) fn variable(name: &str) -> Option<OsString> {
    // SAFETY: reads a value that the kernel gave to this process.
    let raised = unsafe { libc::getauxval(libc::AT_SECURE) } != 0;
    if raised { None } else { std::env::var_os(name).filter(|value| !value.is_empty()) }
}

/// Features of the kernel that FMALLOC_DISABLE names, not to be used.
///
/// # Errors
/// [`Error::Invalid`] for a word that it does not know.
#[cfg(unix)]
pub(crate) fn disabled() -> Result<Disabled, Error> {
    let words = variable(DISABLE).unwrap_or_default();
    words
        .to_string_lossy()
        .parse()
        .map_err(|error: UnknownWord| Error::invalid(format!("{DISABLE}: {error}")))
}

/// The name to give to the daemon: short, and without control characters.
#[cfg(unix)]
pub(crate) fn client_name(wanted: Option<&str>) -> String {
    let own = || {
        let path = std::env::current_exe().ok()?;
        Some(path.file_name()?.to_string_lossy().into_owned())
    };
    let name = wanted.map(str::to_owned).or_else(own).unwrap_or_default();
    cut(&name)
}

/// `text` without control characters, at most [`MAX_NAME`] bytes of it.
#[cfg(unix)]
pub(crate) fn cut(text: &str) -> String {
    let mut short = String::new();
    for c in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
        if short.len() + c.len_utf8() > MAX_NAME {
            break;
        }
        short.push(c);
    }
    short
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn names_are_cut_at_whole_characters_and_cleaned() {
        assert_eq!(cut("a\nb"), "a b");
        assert_eq!(cut(&"ä".repeat(100)), "ä".repeat(32));
        assert!(!client_name(None).is_empty());
    }
}
