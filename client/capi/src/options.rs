//! What a heap is made of, as C programs say it.

use std::ffi::{CStr, OsStr, c_char};
use std::path::PathBuf;

#[cfg(unix)]
use fmalloc_client::Error;
#[cfg(windows)]
use fmalloc_client::LocalOptions;
use fmalloc_client::heap::Heap;
use fmalloc_client::{ConnectOptions, Pager, PrivateOptions};
use fmalloc_proto::num::{to_u64, to_usize};

use crate::failure::Failure;

/// For fmalloc_options_t.daemon: the running service if it answers, else a daemon for this process alone.
pub const FMALLOC_ANY_DAEMON: u32 = 0;
/// The running service.
pub const FMALLOC_SERVICE: u32 = 1;
/// A daemon for this process alone, with a swap file of its own.
pub const FMALLOC_PRIVATE: u32 = 2;

/// For fmalloc_init_with. Fill it with zeros, set struct_size to sizeof(fmalloc_options_t), then what is wanted.
#[repr(C)]
#[derive(Debug)]
pub struct Options {
    /// sizeof(fmalloc_options_t).
    pub struct_size: usize,
    /// The heap may grow to this many bytes. Addresses only: swap is claimed as it grows.
    pub size: usize,
    /// RAM budget in bytes. 0: the service's default; for a private daemon a quarter of this machine's RAM or of `size`,
    /// whichever is less, and 16 MiB at least.
    pub ram: u64,
    /// Most bytes that a private daemon's swap file may grow to. 0: the daemon decides.
    pub swap_size: u64,
    /// FMALLOC_ANY_DAEMON, FMALLOC_SERVICE or FMALLOC_PRIVATE.
    pub daemon: u32,
    /// Accept a userfaultfd with which system calls on swapped-out memory fail with EFAULT, if there is no better one.
    pub user_mode_only: bool,
    /// Directory of a private daemon's swap file, on a real disk; or a file in it, whose name does not matter: the swap
    /// file never has one. NULL: FMALLOC_SWAP_DIR, then /var/tmp. On Windows the swap file itself, in UTF-8, or a directory;
    /// NULL: that for temporary files.
    pub path: *const c_char,
    /// The service's socket. NULL: FMALLOC_SOCKET, then the usual places.
    pub socket: *const c_char,
    /// Shown by fmallocctl. NULL: the name of the executable.
    pub name: *const c_char,
}

/// A private daemon's budget if none is given, in bytes.
const LEAST_RAM: u64 = 16 << 20;

impl Options {
    /// Those of `fmalloc_init`.
    pub(crate) fn plain(path: *const c_char, size: usize) -> Self {
        let daemon = if path.is_null() { FMALLOC_ANY_DAEMON } else { FMALLOC_PRIVATE };
        Self {
            struct_size: size_of::<Self>(),
            size,
            ram: 0,
            swap_size: 0,
            daemon,
            user_mode_only: false,
            path,
            socket: std::ptr::null(),
            name: std::ptr::null(),
        }
    }

    /// Makes a heap.
    ///
    /// # Safety
    /// The strings must be null or end with a zero byte.
    pub(crate) unsafe fn open(&self) -> Result<Heap, Failure> {
        if self.struct_size != size_of::<Self>() {
            return Err(Failure::invalid(format!(
                "fmalloc_options_t.struct_size is {}, but must be sizeof(fmalloc_options_t), {} here; was the program \
                 compiled with another version of fmalloc.h?",
                self.struct_size,
                size_of::<Self>()
            )));
        }
        if self.size == 0 {
            return Err(Failure::invalid("a heap must have a size: give the most bytes that it may grow to"));
        }
        // SAFETY: the caller's.
        let (path, socket, name) = unsafe { (string(self.path)?, string(self.socket)?, string(self.name)?) };
        let service = ConnectOptions {
            socket: socket.map(PathBuf::from),
            budget: (self.ram > 0).then_some(self.ram),
            name: name.map(|name| name.to_string_lossy().into_owned()),
            user_mode_only: self.user_mode_only,
            ..ConnectOptions::default()
        };
        let private = || -> Result<Pager, Failure> {
            let budget = if self.ram > 0 { self.ram } else { self.default_ram() };
            #[cfg(windows)]
            if let Some(file) = path.map(PathBuf::from).filter(|path| !path.is_dir()) {
                let swap_size = self.swap_size.max(to_u64(self.size));
                let options = LocalOptions { swap_file: Some(file), ..LocalOptions::new(budget, swap_size) };
                return Ok(Pager::local(&options)?);
            }
            let swap_dir = path.map(PathBuf::from).map(directory).transpose()?;
            let pager = Pager::private(&PrivateOptions {
                swap_dir,
                swap_size: self.private_swap(),
                name: service.name.clone(),
                user_mode_only: self.user_mode_only,
                ..PrivateOptions::new(budget)
            })?;
            Ok(pager)
        };
        let pager = match self.daemon {
            // There is no service there.
            #[cfg(windows)]
            FMALLOC_ANY_DAEMON => private()?,
            #[cfg(unix)]
            FMALLOC_ANY_DAEMON => match Pager::connect_with(&service) {
                Err(Error::NoDaemon { .. } | Error::Denied { .. }) if socket.is_none() => private()?,
                other => other?,
            },
            FMALLOC_SERVICE => Pager::connect_with(&service)?,
            FMALLOC_PRIVATE => private()?,
            other => return Err(Failure::invalid(format!("{other} is no daemon; see fmalloc.h"))),
        };
        Ok(Heap::new(&pager, self.size)?)
    }

    /// On Windows the heap's addresses are a part of the swap file, which must be as long.
    fn private_swap(&self) -> Option<u64> {
        if cfg!(windows) {
            Some(self.swap_size.max(to_u64(self.size)))
        } else {
            (self.swap_size > 0).then_some(self.swap_size)
        }
    }

    fn default_ram(&self) -> u64 {
        (machine_ram() / 4).min(to_u64(self.size) / 4).max(LEAST_RAM)
    }
}

/// Bytes of RAM of this machine.
#[cfg(unix)]
fn machine_ram() -> u64 {
    // SAFETY: asks for numbers.
    let (pages, page) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    u64::try_from(pages).unwrap_or(0) * u64::try_from(page).unwrap_or(0)
}

#[cfg(windows)]
fn machine_ram() -> u64 {
    use windows_sys::Win32::System::SystemInformation::{GlobalMemoryStatusEx, MEMORYSTATUSEX};
    let mut status = MEMORYSTATUSEX { dwLength: 64, ..MEMORYSTATUSEX::default() };
    const _: () = assert!(size_of::<MEMORYSTATUSEX>() == 64);
    // SAFETY: the structure has the length that it says. If the call fails it stays zero.
    unsafe { GlobalMemoryStatusEx(&raw mut status) };
    status.ullTotalPhys
}

/// The directory that a path means: itself, or where a file of that name would be.
fn directory(path: PathBuf) -> Result<PathBuf, Failure> {
    let parent = path
        .parent()
        .map(|parent| if parent.as_os_str().is_empty() { ".".into() } else { parent.to_owned() });
    match parent {
        _ if path.is_dir() => Ok(path),
        Some(parent) if parent.is_dir() => Ok(parent),
        _ => Err(Failure::new(
            libc::ENOENT,
            format!("{}: neither a directory nor a name in one; the swap file is made there", path.display()),
        )),
    }
}

/// A path that C gives, if it does.
///
/// # Safety
/// The text must be null or end with a zero byte.
pub(crate) unsafe fn path(text: *const c_char) -> Result<Option<PathBuf>, Failure> {
    // SAFETY: the caller's.
    Ok(unsafe { string(text) }?.map(PathBuf::from))
}

/// # Safety
/// The text must be null or end with a zero byte, and outlive the result.
unsafe fn string<'a>(text: *const c_char) -> Result<Option<&'a OsStr>, Failure> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's.
    let text = unsafe { CStr::from_ptr(text) };
    #[cfg(unix)]
    return Ok(Some(std::os::unix::ffi::OsStrExt::from_bytes(text.to_bytes())));
    #[cfg(windows)]
    text.to_str().map(|text| Some(OsStr::new(text))).map_err(|_| Failure::invalid("a string is not in UTF-8"))
}

const _: () = assert!(to_usize(LEAST_RAM) == 16 << 20);
