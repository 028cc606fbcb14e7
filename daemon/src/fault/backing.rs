//! The user's own file behind a region: checked when it comes, then read and written by the client's fault thread alone.
//! The client has opened it with its own rights; nothing here opens a path. It may share the descriptions, and change
//! their flags or the file at any time: then its own data suffers, nobody else's.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use fmalloc_proto::messages::{ErrorCode, Failure, FileMode};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::statfs::{
    BPF_FS_MAGIC, CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, DEBUGFS_MAGIC, FUSE_SUPER_MAGIC, FsType,
    PROC_SUPER_MAGIC, SYSFS_MAGIC, TRACEFS_MAGIC, fstatfs,
};

/// What the kernel makes up, and what a process of the user's serves: reading it may take for ever.
const REFUSED: [FsType; 8] = [
    PROC_SUPER_MAGIC,
    SYSFS_MAGIC,
    CGROUP_SUPER_MAGIC,
    CGROUP2_SUPER_MAGIC,
    DEBUGFS_MAGIC,
    TRACEFS_MAGIC,
    BPF_FS_MAGIC,
    FUSE_SUPER_MAGIC,
];

nix::ioctl_read!(
    /// BLKGETSIZE64: bytes of a block device.
    device_size, 0x12, 114, u64);

/// A file, whatever names it has.
type Identity = (u64, u64);

/// See the module.
#[derive(Debug)]
pub struct Backing {
    plain: File,
    /// The same file with O_DIRECT, or just another description of it.
    direct: OwnedFd,
    offset: u64,
    identity: Identity,
    is_device: bool,
    _seat: Seat,
}

impl Backing {
    /// Takes a file in, of which a part from `offset` on is to be mapped.
    ///
    /// # Errors
    /// Why it is not one that can be mapped so; for people.
    pub fn accept(
        seat: Seat,
        plain: OwnedFd,
        direct: OwnedFd,
        offset: u64,
        mode: FileMode,
    ) -> Result<Self, Failure> {
        let invalid = |text: &str| Failure { code: ErrorCode::Invalid, text: text.to_owned() };
        let system = |error: Errno| Failure {
            code: ErrorCode::System,
            text: format!("the file cannot be examined: {error}"),
        };
        let plain = File::from(plain);
        let examine = |file: &File| {
            let meta = file
                .metadata()
                .map_err(|error| system(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))))?;
            let kind = meta.file_type();
            let identity =
                if kind.is_block_device() { (u64::MAX, meta.rdev()) } else { (meta.dev(), meta.ino()) };
            Ok((kind, identity))
        };
        let (kind, identity) = examine(&plain)?;
        if !kind.is_file() && !kind.is_block_device() {
            return Err(invalid("only regular files and block devices can be mapped"));
        }
        if kind.is_file() && REFUSED.contains(&fstatfs(plain.as_fd()).map_err(system)?.filesystem_type()) {
            return Err(invalid(
                "files of this file system (FUSE, or made up by the kernel) cannot be mapped, since reading them may \
                 take for ever; copy the file to a disk",
            ));
        }
        let direct = File::from(direct);
        if examine(&direct)?.1 != identity {
            return Err(invalid("the two descriptors are of different files"));
        }
        for file in [&plain, &direct] {
            let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL).map_err(system)?);
            let access = flags & OFlag::O_ACCMODE;
            if flags.intersects(OFlag::O_PATH | OFlag::O_APPEND) || access == OFlag::O_WRONLY {
                return Err(invalid("the file must be open for reading, and not for appending"));
            }
            if mode == FileMode::Shared && access != OFlag::O_RDWR {
                let text = "the file is open for reading only; open it for writing too, or map a copy";
                return Err(Failure { code: ErrorCode::Denied, text: text.to_owned() });
            }
        }
        Ok(Self {
            plain,
            direct: direct.into(),
            offset,
            identity,
            is_device: kind.is_block_device(),
            _seat: seat,
        })
    }

    /// Whether it can be written.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        let writes = |fd: RawFd| {
            // SAFETY: F_GETFL only looks at an open descriptor.
            let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
            flags >= 0 && flags & libc::O_ACCMODE == libc::O_RDWR
        };
        writes(self.plain.as_raw_fd()) && writes(self.direct.as_raw_fd())
    }

    /// For transfers of whole pages that lie inside the file.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.direct.as_raw_fd()
    }

    /// Where a byte of the region is in the file.
    #[must_use]
    pub fn offset(&self, byte: u64) -> u64 {
        self.offset.saturating_add(byte)
    }

    /// Bytes of the region that the file has at present.
    #[must_use]
    pub fn len(&self) -> u64 {
        let size = if self.is_device {
            let mut size = 0;
            // SAFETY: the call writes one number.
            let got = unsafe { device_size(self.plain.as_raw_fd(), &raw mut size) };
            got.map_or(0, |_| size)
        } else {
            self.plain.metadata().map_or(0, |meta| meta.len())
        };
        size.saturating_sub(self.offset)
    }

    /// Whether the file ends before the region begins.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes a part that is not whole pages: the end of the file.
    ///
    /// # Errors
    /// The errno of the write.
    pub fn write_end(&self, bytes: &[u8], byte: u64) -> Result<(), i32> {
        self.plain
            .write_all_at(bytes, self.offset(byte))
            .map_err(|error| error.raw_os_error().unwrap_or(libc::ENOSPC))
    }

    /// Has everything that was written brought to the disk. Blocks.
    ///
    /// # Errors
    /// What the system says.
    pub fn sync(&self) -> std::io::Result<()> {
        self.plain.sync_data()
    }
}

/// A write or sync that failed, as its region's owner hears of it.
#[must_use]
pub fn file_failure(errno: i32) -> Failure {
    let (code, text) = match errno {
        libc::ENOSPC | libc::EDQUOT => (
            ErrorCode::FileFull,
            "the file cannot be written: its disk is full, or its owner's quota is used up; the changes are kept in \
             memory: make room and flush again",
        ),
        libc::ESTALE => (ErrorCode::NotFound, "the region was unregistered"),
        libc::EOPNOTSUPP => (
            ErrorCode::Unsupported,
            "fmalloc cannot copy this process's memory: it needs to read /proc/self/mem",
        ),
        _ => {
            let text = format!(
                "the file could not be written ({}); the changes are kept in memory",
                Errno::from_raw(errno).desc()
            );
            return Failure { code: ErrorCode::FileFailed, text };
        }
    };
    Failure { code, text: text.to_owned() }
}

/// Which parts of which files are written by regions: two that wrote the same would undo each other's changes.
#[derive(Debug)]
pub struct Writers {
    parts: Mutex<Parts>,
    /// Files that more can be mapped.
    free: AtomicUsize,
}

/// The right to have one file more open; ends with the value.
#[derive(Debug)]
pub struct Seat(Arc<Writers>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.free.fetch_add(1, Ordering::AcqRel);
    }
}

/// By file: the number of the claim, and bytes of the file.
type Parts = HashMap<Identity, Vec<(u64, Range<u64>)>>;

/// The right to write a part of a file; ends with the value.
#[derive(Debug)]
pub struct Claim {
    writers: Arc<Writers>,
    identity: Identity,
    number: u64,
}

impl Writers {
    /// For a daemon that has descriptors for so many mapped files: they must not run out for everything else.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self { parts: Mutex::default(), free: AtomicUsize::new(most) }
    }

    /// Room for one file more.
    ///
    /// # Errors
    /// That there is none; for people.
    pub fn seat(self: &Arc<Self>) -> Result<Seat, Failure> {
        let less = |free: usize| free.checked_sub(1);
        match self.free.fetch_update(Ordering::AcqRel, Ordering::Acquire, less) {
            Ok(_) => Ok(Seat(Arc::clone(self))),
            Err(_) => Err(Failure {
                code: ErrorCode::Limit,
                text: "fmallocd has no descriptors left for mapped files; raise its LimitNOFILE".to_owned(),
            }),
        }
    }

    /// Claims the first `len` bytes of the region over `file`. None if another region writes to some of them.
    #[must_use]
    pub fn claim(self: &Arc<Self>, file: &Backing, len: u64) -> Option<Claim> {
        let part = file.offset..file.offset.saturating_add(len);
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let claims = parts.entry(file.identity).or_default();
        if claims.iter().any(|(_, other)| other.start < part.end && part.start < other.end) {
            return None;
        }
        let number = claims.iter().map(|(number, _)| number + 1).max().unwrap_or(0);
        claims.push((number, part));
        Some(Claim { writers: Arc::clone(self), identity: file.identity, number })
    }
}

impl Claim {
    /// Claims a part of `len` bytes from the same place on. False if another region writes to some of them; nothing has
    /// changed then.
    #[must_use]
    pub fn grow(&self, len: u64) -> bool {
        let mut parts = self.writers.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(claims) = parts.get_mut(&self.identity) else { return false };
        let Some(own) = claims.iter().position(|(number, _)| *number == self.number) else { return false };
        let part = claims[own].1.start..claims[own].1.end.max(claims[own].1.start.saturating_add(len));
        let mut others = claims.iter().filter(|(number, _)| *number != self.number);
        let free = !others.any(|(_, other)| other.start < part.end && part.start < other.end);
        if free {
            claims[own].1 = part;
        }
        free
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut parts = self.writers.parts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(claims) = parts.get_mut(&self.identity) {
            claims.retain(|(number, _)| *number != self.number);
            if claims.is_empty() {
                parts.remove(&self.identity);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;

    use fmalloc_proto::PAGE;

    use super::*;

    fn open(file: &tempfile::NamedTempFile, write: bool, flags: i32) -> OwnedFd {
        OpenOptions::new().read(true).write(write).custom_flags(flags).open(file.path()).unwrap().into()
    }

    fn take(plain: OwnedFd, direct: OwnedFd, offset: u64, mode: FileMode) -> Result<Backing, Failure> {
        Backing::accept(Arc::new(Writers::new(1)).seat().unwrap(), plain, direct, offset, mode)
    }

    fn accept(file: &tempfile::NamedTempFile, write: bool, mode: FileMode) -> Result<Backing, ErrorCode> {
        take(open(file, write, 0), open(file, write, 0), 0, mode).map_err(|failure| failure.code)
    }

    #[test]
    fn what_is_open_for_reading_only_is_never_written() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(!accept(&file, false, FileMode::ReadOnly).unwrap().is_writable());
        assert!(accept(&file, false, FileMode::Private).is_ok());
        assert_eq!(accept(&file, false, FileMode::Shared).unwrap_err(), ErrorCode::Denied);
        assert!(accept(&file, true, FileMode::Shared).unwrap().is_writable());
        let mixed = take(open(&file, true, 0), open(&file, false, 0), 0, FileMode::Shared);
        assert_eq!(mixed.unwrap_err().code, ErrorCode::Denied);
    }

    #[test]
    fn what_is_not_an_ordinary_file_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let other = tempfile::NamedTempFile::new().unwrap();
        let refused =
            |plain: OwnedFd, direct: OwnedFd| take(plain, direct, 0, FileMode::ReadOnly).unwrap_err().code;
        assert_eq!(refused(open(&file, false, 0), open(&other, false, 0)), ErrorCode::Invalid);
        let appends = || open(&file, true, libc::O_APPEND);
        assert_eq!(refused(appends(), appends()), ErrorCode::Invalid);
        let names = || open(&file, false, libc::O_PATH);
        assert_eq!(refused(names(), names()), ErrorCode::Invalid);
        let (pipe, end) = nix::unistd::pipe().unwrap();
        assert_eq!(refused(pipe, end), ErrorCode::Invalid);
        for path in ["/dev/zero", "/proc/self/maps", "/"] {
            let open = || OwnedFd::from(File::open(path).unwrap());
            assert_eq!(refused(open(), open()), ErrorCode::Invalid, "{path}");
        }
    }

    #[test]
    fn length_is_what_the_file_has_behind_the_offset() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[1; 10_000]).unwrap();
        let at =
            |offset| take(open(&file, false, 0), open(&file, false, 0), offset, FileMode::ReadOnly).unwrap();
        assert_eq!(at(0).len(), 10_000);
        assert_eq!(at(2 * PAGE).len(), 10_000 - 2 * PAGE);
        assert!(at(3 * PAGE).is_empty());
    }

    #[test]
    fn a_part_of_a_file_has_one_writer() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let writers = Arc::new(Writers::new(9));
        let backing = accept(&file, true, FileMode::Shared).unwrap();
        let first = writers.claim(&backing, 2 * PAGE).unwrap();
        assert!(writers.claim(&backing, PAGE).is_none());
        let behind = take(open(&file, true, 0), open(&file, true, 0), 2 * PAGE, FileMode::Shared).unwrap();
        let second = writers.claim(&behind, PAGE).unwrap();
        drop(first);
        assert!(writers.claim(&backing, 3 * PAGE).is_none());
        let again = writers.claim(&backing, PAGE).unwrap();
        assert!(again.grow(2 * PAGE) && !again.grow(3 * PAGE));
        drop(again);
        drop(second);
        assert!(writers.claim(&backing, 3 * PAGE).is_some());
        assert!(writers.parts.lock().unwrap().is_empty(), "nothing is kept");
    }

    #[test]
    fn there_are_no_more_files_than_descriptors() {
        let writers = Arc::new(Writers::new(1));
        let seat = writers.seat().unwrap();
        assert_eq!(writers.seat().unwrap_err().code, ErrorCode::Limit);
        drop(seat);
        assert!(writers.seat().is_ok());
    }
}
