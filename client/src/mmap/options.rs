//! How a mapping is to be made.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::FileTypeExt;

use fmalloc_proto::messages::FileMode;
use fmalloc_proto::num::to_usize;

use super::default::{default_pager, make};
use super::journal;
use super::mapping::{Part, Wanted};
use super::{Mmap, MmapMut, MmapRaw};
use crate::pager::Pager;

/// A file to be mapped, as something that has a descriptor.
pub struct MmapRawDescriptor(RawFd);

/// What can be mapped: a reference to a file, or a descriptor.
pub trait MmapAsRawDesc {
    /// Its descriptor, which must be open for as long as the mapping is being made.
    fn as_raw_desc(&self) -> MmapRawDescriptor;
}

impl MmapAsRawDesc for RawFd {
    fn as_raw_desc(&self) -> MmapRawDescriptor {
        MmapRawDescriptor(*self)
    }
}

impl<T: AsRawFd> MmapAsRawDesc for &T {
    fn as_raw_desc(&self) -> MmapRawDescriptor {
        MmapRawDescriptor(self.as_raw_fd())
    }
}

impl MmapRawDescriptor {
    fn borrow(&self) -> io::Result<BorrowedFd<'_>> {
        if self.0 < 0 {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        // SAFETY: open as long as the mapping is being made, as whoever gave it promises; if it is not, calls fail.
        Ok(unsafe { BorrowedFd::borrow_raw(self.0) })
    }
}

impl fmt::Debug for MmapRawDescriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MmapRawDescriptor({})", self.0)
    }
}

/// Makes mappings: set what differs from the default, then map.
#[derive(Clone, Debug, Default)]
pub struct MmapOptions {
    offset: u64,
    len: Option<usize>,
    populate: bool,
    no_reserve_swap: bool,
    budget: Option<u64>,
    pager: Option<Pager>,
}

impl MmapOptions {
    /// All as by default: the whole file, the process's default pager.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The first byte of the file that is mapped. Any: what lies before it in its page is mapped along.
    pub fn offset(&mut self, offset: u64) -> &mut Self {
        self.offset = offset;
        self
    }

    /// Length in bytes. Without it, all that the file has from the offset on.
    pub fn len(&mut self, len: usize) -> &mut Self {
        self.len = Some(len);
        self
    }

    /// Ignored: a stack that is paged by another process is an ordinary mapping.
    pub fn stack(&mut self) -> &mut Self {
        self
    }

    /// Ignored: pages of 4096 bytes are what is paged.
    pub fn huge(&mut self, _page_bits: Option<u8>) -> &mut Self {
        self
    }

    /// Reads the file in while the mapping is made, as much as the budget allows.
    pub fn populate(&mut self) -> &mut Self {
        self.populate = true;
        self
    }

    /// Claims no swap for pages that may be changed, of an anonymous or private mapping. If swap is full when they are
    /// evicted, the program waits until there is some.
    pub fn no_reserve_swap(&mut self) -> &mut Self {
        self.no_reserve_swap = true;
        self
    }

    /// Gives the mapping a RAM budget of its own, in bytes, of at least 4 MiB: it counts as a client of its own.
    pub fn budget(&mut self, bytes: u64) -> &mut Self {
        self.budget = Some(bytes);
        self
    }

    /// Has this pager page the mapping instead of the process's default one.
    pub fn pager(&mut self, pager: &Pager) -> &mut Self {
        self.pager = Some(pager.clone());
        self
    }

    /// Maps a file for reading. Who writes to the file by other means than mappings of this process may or may not be
    /// seen.
    ///
    /// # Safety
    /// Nobody may change or shorten the file while references into the mapping are alive.
    ///
    /// # Errors
    /// If the file cannot be read, is not one that can be mapped, or there is no pager.
    pub unsafe fn map<T: MmapAsRawDesc>(&self, file: T) -> io::Result<Mmap> {
        self.of_file(&file, FileMode::ReadOnly).map(Mmap)
    }

    /// Always refused: memory that is paged cannot be executed.
    ///
    /// # Safety
    /// None is needed.
    ///
    /// # Errors
    /// Always.
    pub unsafe fn map_exec<T: MmapAsRawDesc>(&self, _file: T) -> io::Result<Mmap> {
        Err(not_executable())
    }

    /// Maps a file for reading and writing. Changes get into the file when they are flushed or evicted, and at drop.
    ///
    /// # Safety
    /// Nobody else may change or shorten the file while references into the mapping are alive.
    ///
    /// # Errors
    /// As [`MmapOptions::map`]; if the file is not open for writing; and `ResourceBusy` if another process writes to
    /// the same part of the file through the same daemon.
    pub unsafe fn map_mut<T: MmapAsRawDesc>(&self, file: T) -> io::Result<MmapMut> {
        self.of_file(&file, FileMode::Shared).map(MmapMut::plain)
    }

    /// Maps a file for reading and writing; the file stays as it is, and changes are seen by this mapping alone.
    ///
    /// # Safety
    /// As for [`MmapOptions::map`].
    ///
    /// # Errors
    /// As [`MmapOptions::map`], or if swap has no room for the changes.
    pub unsafe fn map_copy<T: MmapAsRawDesc>(&self, file: T) -> io::Result<MmapMut> {
        self.of_file(&file, FileMode::Private).map(MmapMut::plain)
    }

    /// As [`MmapOptions::map_copy`], for reading only; [`Mmap::make_mut`] allows writing later.
    ///
    /// # Safety
    /// As for [`MmapOptions::map`].
    ///
    /// # Errors
    /// As [`MmapOptions::map`].
    pub unsafe fn map_copy_read_only<T: MmapAsRawDesc>(&self, file: T) -> io::Result<Mmap> {
        let mut uncommitted = self.clone();
        uncommitted.no_reserve_swap = true;
        uncommitted.of_file(&file, FileMode::Private).map(Mmap)
    }

    /// Maps memory that no file is behind: zeros at first.
    ///
    /// # Errors
    /// If there is no pager, or swap has no room.
    pub fn map_anon(&self) -> io::Result<MmapMut> {
        let len = self.len.unwrap_or(0);
        check_len(len)?;
        if len == 0 {
            return Ok(MmapMut::plain(Part { mapping: None, start: 0, len }));
        }
        Ok(MmapMut::plain(Part::anonymous(&self.chosen_pager()?, len, !self.no_reserve_swap)?))
    }

    /// [`MmapOptions::map_mut`] for access by pointers only, which is not unsafe in itself.
    ///
    /// # Errors
    /// As [`MmapOptions::map_mut`].
    pub fn map_raw<T: MmapAsRawDesc>(&self, file: T) -> io::Result<MmapRaw> {
        self.of_file(&file, FileMode::Shared).map(MmapRaw)
    }

    /// [`MmapOptions::map`] for access by pointers only. Nothing may be written through them: such changes are lost.
    ///
    /// # Errors
    /// As [`MmapOptions::map`].
    pub fn map_raw_read_only<T: MmapAsRawDesc>(&self, file: T) -> io::Result<MmapRaw> {
        self.of_file(&file, FileMode::ReadOnly).map(MmapRaw)
    }

    /// Maps a file for reading and writing such that the file only ever changes by [`MmapMut::flush_atomic`] (and
    /// [`MmapMut::flush`], which is the same here): all at once, also if the process is killed or the power fails in the
    /// middle. Until then changes are kept in RAM and swap; those that are not flushed are dropped with the mapping.
    ///
    /// Beside the file, as its name with `.fmalloc-journal` added, a journal is kept while a flush is under way. One that
    /// was left behind is replayed here, or removed if it is not complete.
    ///
    /// # Safety
    /// Nobody else may change or shorten the file while references into the mapping are alive, nor between a crash and
    /// the next call of this function.
    ///
    /// # Errors
    /// As [`MmapOptions::map_copy`]; if the file has no name, is not open for writing, or has a journal that cannot be
    /// replayed.
    pub unsafe fn map_atomic(&self, file: &File) -> io::Result<MmapMut> {
        if !file.metadata()?.file_type().is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "only a regular file can be flushed atomically",
            ));
        }
        let journal = journal::Journal::open(file)?;
        let part = self.of_file(&file, FileMode::Private)?;
        Ok(MmapMut::atomic(part, journal, self.offset))
    }

    fn chosen_pager(&self) -> io::Result<Pager> {
        match (&self.pager, self.budget) {
            (_, Some(budget)) => Ok(make(Some(budget))?),
            (Some(pager), None) => Ok(pager.clone()),
            (None, None) => Ok(default_pager()?),
        }
    }

    fn of_file<T: MmapAsRawDesc>(&self, file: &T, mode: FileMode) -> io::Result<Part> {
        let desc = file.as_raw_desc();
        let fd = desc.borrow()?;
        let len = match self.len {
            Some(len) => len,
            None => to_usize(file_len(fd)?.checked_sub(self.offset).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, "memory map offset is larger than length")
            })?),
        };
        check_len(len)?;
        if len == 0 {
            return Ok(Part { mapping: None, start: 0, len });
        }
        let (offset, populate) = (self.offset, self.populate);
        let wanted = Wanted { offset, len, mode, commit: !self.no_reserve_swap, populate };
        Ok(Part::of_file(&self.chosen_pager()?, fd, &wanted)?)
    }
}

pub(super) fn check_len(len: usize) -> io::Result<()> {
    if isize::try_from(len).is_ok() {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "memory map length overflows isize"))
}

fn file_len(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let file = File::from(fd.as_fd().try_clone_to_owned()?);
    let meta = file.metadata()?;
    if meta.file_type().is_block_device() {
        let text = "the length of a device must be given (MmapOptions::len)";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    Ok(meta.len())
}

pub(super) fn not_executable() -> io::Error {
    io::Error::new(
        io::ErrorKind::Unsupported,
        "memory that fmalloc pages cannot be executed: the kernel moves no executable pages; use memmap2 for code",
    )
}
