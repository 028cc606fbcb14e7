//! The swap file itself: a regular file, a block device, or an unlinked temporary file. Owns how it is created,
//! locked, sized and opened for I/O; knows nothing of slots. Opened by the control plane at start, then shared by
//! all fault threads: every method may be called from any thread.
//!
//! The lock (`flock`) sits on the very file description that swap I/O uses, so it outlives a killed daemon for
//! as long as I/O of that daemon is still in flight.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fmalloc_proto::size::Size;
use fmalloc_proto::{PAGE, PAGE_SIZE};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, FsType, TMPFS_MAGIC, fstatfs};
use nix::sys::statvfs::{fstatvfs, statvfs};
use thiserror::Error;
use tracing::{debug, warn};

/// ramfs, which libc does not name.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);
/// "Do not copy on write", which libc does not name.
const FS_NOCOW_FL: libc::c_long = 0x0080_0000;
/// How long another holder of the lock may take to go: a daemon that was just killed, or udev probing a device.
const LOCK_PATIENCE: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// Why there is no swap file.
#[derive(Debug, Error)]
pub enum SwapFileError {
    /// Another process has it.
    #[error(
        "swap {path} is in use by {holder}; two daemons cannot share it: stop the other, or name another with --swap"
    )]
    Busy {
        /// The swap file.
        path: PathBuf,
        /// Who has it, for people.
        holder: String,
    },
    /// Others may read or write it.
    #[error(
        "swap {path} belongs to uid {uid} and has mode {mode:04o}, so others could read the memory of clients; \
         remove it, or give it to uid {wanted} with mode 0600"
    )]
    Exposed {
        /// The swap file.
        path: PathBuf,
        /// Its owner.
        uid: u32,
        /// Its permission bits.
        mode: u32,
        /// The owner that it needs.
        wanted: u32,
    },
    /// Neither a regular file nor a block device.
    #[error("swap {0} is neither a regular file nor a block device; name another with --swap")]
    NotAFile(PathBuf),
    /// Smaller than asked for.
    #[error(
        "swap device {path} has {has}, less than the {wanted} asked for; lower --swap-size or leave it out"
    )]
    SmallDevice {
        /// The device.
        path: PathBuf,
        /// Its size.
        has: Size,
        /// The size asked for.
        wanted: Size,
    },
    /// Not even one page.
    #[error("swap of {0} bytes has no room for a page; raise --swap-size")]
    Empty(u64),
    /// The disk is too full.
    #[error(
        "not enough disk for swap {path}: {wanted} more wanted, {available} available; \
         free some, or lower --swap-size"
    )]
    NoSpace {
        /// The swap file or its directory.
        path: PathBuf,
        /// What it would take beyond what the file already has.
        wanted: Size,
        /// What the file system has for us.
        available: Size,
    },
    /// The directory is in RAM.
    #[error(
        "{0} is in RAM (tmpfs or ramfs), where a swap file gains nothing; choose a directory on a disk \
         with --swap-dir or FMALLOC_SWAP_DIR"
    )]
    InRam(PathBuf),
    /// A system call failed.
    #[error("cannot {what} swap {path}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The swap file or its directory.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
}

/// The swap file: opened, locked, and as large as it says.
#[derive(Debug)]
pub struct SwapFile {
    file: File,
    path: Option<PathBuf>,
    /// Where it is, for messages; the directory of a temporary file.
    place: PathBuf,
    max: u64,
    bytes: AtomicU64,
    growing: Mutex<()>,
    direct: bool,
}

impl SwapFile {
    /// Opens `path`, creating it with mode 0600 if nothing is there, and takes it for this process alone. A regular
    /// file gets `size` bytes, all of them allocated on disk; a block device must have that many, and no size means
    /// all that it has. What the file held before is lost.
    ///
    /// # Errors
    /// See [`SwapFileError`]. A file that was created for nothing is removed again.
    pub fn open(path: &Path, size: Option<u64>) -> Result<Self, SwapFileError> {
        let system = |what| move |source| SwapFileError::System { what, path: path.to_owned(), source };
        let (file, created) = open_or_create(path).map_err(system("open"))?;
        let kind = file.metadata().map_err(system("examine"))?.file_type();
        let opened = if kind.is_block_device() {
            Self::take_device(path, &file, size)
        } else if kind.is_file() {
            Self::take_file(path, file, size.unwrap_or(0))
        } else {
            Err(SwapFileError::NotAFile(path.to_owned()))
        };
        if created && opened.is_err() {
            let _ = std::fs::remove_file(path);
        }
        opened
    }

    /// Makes an unlinked temporary file in `dir`, empty at first, that may grow to `max_bytes`. It vanishes with its
    /// last user.
    ///
    /// # Errors
    /// See [`SwapFileError`]; a directory in RAM is refused.
    pub fn temporary(dir: &Path, max_bytes: u64) -> Result<Self, SwapFileError> {
        let system = |what| move |source| SwapFileError::System { what, path: dir.to_owned(), source };
        let max = whole_pages(max_bytes)?;
        let file = open_temporary(dir).map_err(system("create a temporary"))?;
        if is_in_ram(&file) {
            return Err(SwapFileError::InRam(dir.to_owned()));
        }
        avoid_copy_on_write(&file);
        // One page now: shows a full disk at once, and gives the probe for direct I/O something to read.
        allocate(&file, dir, 0, PAGE)?;
        let direct = switch_to_direct(&file).map_err(system("probe"))?;
        Ok(Self {
            file,
            path: None,
            place: dir.to_owned(),
            max,
            bytes: AtomicU64::new(PAGE),
            growing: Mutex::new(()),
            direct,
        })
    }

    fn take_file(path: &Path, file: File, size: u64) -> Result<Self, SwapFileError> {
        let system = |what| move |source| SwapFileError::System { what, path: path.to_owned(), source };
        let size = whole_pages(size)?;
        let meta = file.metadata().map_err(system("examine"))?;
        let wanted = nix::unistd::geteuid().as_raw();
        if meta.uid() != wanted || meta.mode() & 0o077 != 0 {
            let (uid, mode) = (meta.uid(), meta.mode() & 0o7777);
            return Err(SwapFileError::Exposed { path: path.to_owned(), uid, mode, wanted });
        }
        lock(&file, path)?;
        if meta.len() == 0 {
            avoid_copy_on_write(&file);
        }
        if meta.len() > size {
            file.set_len(size).map_err(system("shorten"))?;
        }
        allocate(&file, path, meta.len().min(size), size)?;
        let direct = if is_in_ram(&file) {
            warn!(path = %path.display(), "the swap file is in RAM (tmpfs or ramfs): for tests only");
            false
        } else {
            switch_to_direct(&file).map_err(system("read"))?
        };
        Ok(Self::whole(file, path, size, direct))
    }

    fn take_device(path: &Path, file: &File, size: Option<u64>) -> Result<Self, SwapFileError> {
        let system = |what| move |source| SwapFileError::System { what, path: path.to_owned(), source };
        // O_EXCL on a device keeps mounts and other swappers off it, and fails if there are any.
        let again = format!("/proc/self/fd/{}", file.as_raw_fd());
        let exclusive = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(again);
        let mut device = exclusive.map_err(|source| {
            if source.raw_os_error() == Some(libc::EBUSY) {
                let holder =
                    lock_holder(file).unwrap_or_else(|| "a mount or another use by the kernel".to_owned());
                SwapFileError::Busy { path: path.to_owned(), holder }
            } else {
                SwapFileError::System { what: "open", path: path.to_owned(), source }
            }
        })?;
        lock(&device, path)?;
        let has = device.seek(SeekFrom::End(0)).map_err(system("measure"))?;
        let wanted = size.unwrap_or(has);
        if wanted > has {
            return Err(SwapFileError::SmallDevice {
                path: path.to_owned(),
                has: Size(has),
                wanted: Size(wanted),
            });
        }
        let size = whole_pages(wanted)?;
        let direct = switch_to_direct(&device).map_err(system("read"))?;
        Ok(Self::whole(device, path, size, direct))
    }

    fn whole(file: File, path: &Path, size: u64, direct: bool) -> Self {
        Self {
            file,
            path: Some(path.to_owned()),
            place: path.to_owned(),
            max: size,
            bytes: AtomicU64::new(size),
            growing: Mutex::new(()),
            direct,
        }
    }

    /// For I/O; offsets, lengths and buffers in whole, aligned pages where [`SwapFile::direct`] holds.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Bytes that it may have at most.
    #[must_use]
    pub fn max_bytes(&self) -> u64 {
        self.max
    }

    /// Bytes that it has at present, all allocated on disk.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// I/O bypasses the page cache.
    #[must_use]
    pub fn direct(&self) -> bool {
        self.direct
    }

    /// Its name, unless it is a temporary file.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Makes sure that at least `bytes` bytes are there, allocated on disk. May take a while.
    ///
    /// # Errors
    /// `StorageFull` with the figures beyond [`SwapFile::max_bytes`] or if the disk has not that much, and what else
    /// the system refuses. The file is as large as before then.
    pub fn grow(&self, bytes: u64) -> io::Result<()> {
        if bytes <= self.bytes() {
            return Ok(());
        }
        if bytes > self.max {
            let text = format!("{} wanted, the swap file may have {}", Size(bytes), Size(self.max));
            return Err(io::Error::new(io::ErrorKind::StorageFull, text));
        }
        let _growing = self.growing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let has = self.bytes();
        if bytes <= has {
            return Ok(());
        }
        let wanted = bytes.next_multiple_of(PAGE);
        allocate(&self.file, &self.place, has, wanted).map_err(|error| match error {
            SwapFileError::System { source, .. } => source,
            other => io::Error::new(io::ErrorKind::StorageFull, other),
        })?;
        self.bytes.store(wanted, Ordering::Release);
        Ok(())
    }
}

/// Bytes that a file at `path` could have: what the file system has left for us, and what the file has already.
///
/// # Errors
/// What the system says about the directory.
pub fn room(path: &Path) -> io::Result<u64> {
    let has = std::fs::metadata(path).map_or(0, |meta| if meta.is_file() { meta.blocks() * 512 } else { 0 });
    let existing = path.ancestors().find(|place| place.exists()).unwrap_or(path);
    let fs = statvfs(existing)?;
    Ok(fs.blocks_available().saturating_mul(fs.fragment_size()).saturating_add(has))
}

fn whole_pages(size: u64) -> Result<u64, SwapFileError> {
    let whole = size - size % PAGE;
    if whole == 0 { Err(SwapFileError::Empty(size)) } else { Ok(whole) }
}

/// Opens what is at `path`, or creates it in one step so that nobody else can ever open it; says whether it did.
fn open_or_create(path: &Path) -> io::Result<(File, bool)> {
    let mut options = OpenOptions::new();
    // No link is followed to a file: in a directory that others may write to it could lead to any file of ours.
    options
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY);
    match options.clone().create_new(true).open(path) {
        Ok(file) => return Ok((file, true)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    match options.open(path) {
        // Names of devices, such as those in /dev/disk/by-id, are links.
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
            let file = options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
            if file.metadata()?.file_type().is_block_device() { Ok((file, false)) } else { Err(error) }
        }
        other => other.map(|file| (file, false)),
    }
}

fn open_temporary(dir: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    // O_EXCL: it can never be given a name.
    match options.clone().custom_flags(libc::O_TMPFILE | libc::O_EXCL).open(dir) {
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) => {}
        other => return other,
    }
    for attempt in 0..100 {
        let path = dir.join(format!(".fmalloc-{}-{attempt}", std::process::id()));
        match options.clone().create_new(true).open(&path) {
            Ok(file) => {
                std::fs::remove_file(&path)?;
                return Ok(file);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

fn lock(file: &File, path: &Path) -> Result<(), SwapFileError> {
    let mut holder = None;
    for _ in 0..LOCK_PATIENCE {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) => {
                holder = lock_holder(file).or(holder);
                std::thread::sleep(LOCK_PAUSE);
            }
            Err(TryLockError::Error(source)) => {
                return Err(SwapFileError::System { what: "lock", path: path.to_owned(), source });
            }
        }
    }
    let holder = holder.unwrap_or_else(|| "a process that is not visible here".to_owned());
    Err(SwapFileError::Busy { path: path.to_owned(), holder })
}

/// Who holds a lock on the file, for people.
fn lock_holder(file: &File) -> Option<String> {
    let meta = file.metadata().ok()?;
    let device = (libc::major(meta.dev()), libc::minor(meta.dev()));
    let pid = holder_in(&std::fs::read_to_string("/proc/locks").ok()?, device, meta.ino())?;
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(format!("process {pid} ({})", name.trim_end()))
}

/// Finds the holder in the text of /proc/locks: `1: FLOCK ADVISORY WRITE 4711 fe:00:1234 0 EOF`. On file systems with
/// subvolumes the device shown is another than that of `stat`, so an entry with the right inode alone will do.
fn holder_in(locks: &str, device: (u32, u32), inode: u64) -> Option<i32> {
    let mut likely = None;
    for line in locks.lines() {
        let mut fields = line.split_ascii_whitespace().skip(4);
        let (Some(pid), Some(file)) = (fields.next(), fields.next()) else { continue };
        let mut parts = file.split(':');
        let (Some(major), Some(minor), Some(number)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let (Ok(pid), Ok(number)) = (pid.parse::<i32>(), number.parse::<u64>()) else { continue };
        if pid <= 0 || number != inode {
            continue;
        }
        let hex = |text| u32::from_str_radix(text, 16).ok();
        if (hex(major), hex(minor)) == (Some(device.0), Some(device.1)) {
            return Some(pid);
        }
        likely = Some(pid);
    }
    likely
}

fn is_in_ram(file: &File) -> bool {
    fstatfs(file).is_ok_and(|fs| [TMPFS_MAGIC, RAMFS_MAGIC].contains(&fs.filesystem_type()))
}

fn available(file: &File) -> io::Result<u64> {
    let fs = fstatvfs(file)?;
    Ok(fs.blocks_available().saturating_mul(fs.fragment_size()))
}

/// Allocates all blocks of a file up to `to`; its first `from` bytes exist. As large as before after an error.
fn allocate(file: &File, place: &Path, from: u64, to: u64) -> Result<(), SwapFileError> {
    let system = |source| SwapFileError::System { what: "allocate", path: place.to_owned(), source };
    let has = file.metadata().map_err(system)?.blocks() * 512;
    let (wanted, available) = (to.saturating_sub(has), available(file).map_err(system)?);
    let full = || SwapFileError::NoSpace {
        path: place.to_owned(),
        wanted: Size(wanted),
        available: Size(available),
    };
    if wanted > available {
        return Err(full());
    }
    let length = libc::off_t::try_from(to).map_err(|_| full())?;
    let done = loop {
        match fallocate(file, FallocateFlags::empty(), 0, length) {
            Err(Errno::EINTR) => {}
            // A sparse beginning needs its blocks too.
            Err(Errno::EOPNOTSUPP) => break write_zeros(file, if has >= from { from } else { 0 }, to),
            other => break other.map_err(io::Error::from),
        }
    };
    done.map_err(|error| {
        // What a failed allocation leaves behind would fill the disk for nothing.
        let _ = file.set_len(from);
        if matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) { full() } else { system(error) }
    })
}

#[repr(C, align(4096))]
struct Aligned<const N: usize>([u8; N]);

/// For file systems without `fallocate`.
fn write_zeros(file: &File, from: u64, to: u64) -> io::Result<()> {
    const CHUNK: usize = 64 * PAGE_SIZE;
    let zeros = Box::new(Aligned([0_u8; CHUNK]));
    let mut at = from;
    while at < to {
        let length = usize::try_from(to - at).unwrap_or(CHUNK).min(CHUNK);
        file.write_all_at(&zeros.0[..length], at)?;
        at += fmalloc_proto::num::to_u64(length);
    }
    file.sync_data()
}

/// Switches to direct I/O if the file system has it for whole pages; says whether it has.
fn switch_to_direct(file: &File) -> io::Result<bool> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    let mut page = Aligned([0_u8; PAGE_SIZE]);
    if fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_DIRECT)).is_ok() {
        match file.read_at(&mut page.0, 0) {
            Ok(_) => return Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(error),
        }
    }
    fcntl(file, FcntlArg::F_SETFL(flags - OFlag::O_DIRECT))?;
    file.read_at(&mut page.0, 0)?;
    Ok(false)
}

/// On btrfs a rewritten block takes new space unless the file is marked, so a full disk could show at a page-out.
fn avoid_copy_on_write(file: &File) {
    if !fstatfs(file).is_ok_and(|fs| fs.filesystem_type() == BTRFS_SUPER_MAGIC) {
        return;
    }
    let mut flags: libc::c_long = 0;
    // SAFETY: the kernel writes an int-sized flag word, for which `flags` has room.
    let got = unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_GETFLAGS, &raw mut flags) };
    flags |= FS_NOCOW_FL;
    // SAFETY: the kernel reads the flag word.
    let set = unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_SETFLAGS, &raw const flags) };
    if got != 0 || set != 0 {
        debug!(
            "the swap file on btrfs could not be marked against copy-on-write: {}",
            io::Error::last_os_error()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCKS: &str = "1: POSIX  ADVISORY  WRITE 7 fd:01:99 0 EOF
2: FLOCK  ADVISORY  WRITE 4711 00:2f:1234 0 EOF
2: -> FLOCK  ADVISORY  WRITE 4712 00:2f:1234 0 EOF
3: FLOCK  ADVISORY  WRITE 4713 fd:01:1234 0 EOF
4: OFDLCK ADVISORY  READ  -1 fd:01:5678 0 EOF
nonsense
";

    #[test]
    fn holder_is_found_by_device_and_inode_else_by_inode() {
        assert_eq!(holder_in(LOCKS, (0xfd, 1), 1234), Some(4713));
        assert!(holder_in(LOCKS, (8, 1), 1234).is_some());
        assert_eq!(holder_in(LOCKS, (0xfd, 1), 5678), None);
        assert_eq!(holder_in(LOCKS, (0xfd, 1), 1), None);
    }
}
