//! Atomic changes of a file: what is to be changed is written to a journal beside it and brought to the disk, then to the
//! file. A journal that is complete is replayed when the file is mapped again, any other is void.
//!
//! ```text
//! 0      magic "FMJOURN1" | inode of the file u64 | pages u64 | hash u64 of what follows | zeros up to 4096
//! 4096   the pages, 4096 bytes each
//! …      for each page its offset in the file in bytes u64, and how many bytes of it u64
//! ```
//!
//! One hash covers everything behind the header, inode and number of pages: whatever part of a journal is missing after a
//! power cut, it shows. Numbers are little endian.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use fmalloc_proto::num::{to_u64, to_usize};
use fmalloc_proto::{PAGE, PAGE_SIZE};
use highway::{HighwayHash, HighwayHasher, Key};

const MAGIC: u64 = u64::from_le_bytes(*b"FMJOURN1");
/// Of no secret: the hash finds what is missing, not what was forged.
const KEY: Key = Key([MAGIC, 1, 2, 3]);
const ENDING: &str = ".fmalloc-journal";
/// Pages that are written to the file at a time.
const STEP: usize = 256;
/// Bytes of an entry of the list behind the pages.
const ENTRY: u64 = 16;

/// One of the two files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    File,
    Journal,
}

/// The two files as far as they matter here; in tests, a disk that fails.
trait Disk {
    fn len(&self, which: Which) -> io::Result<u64>;
    fn read(&self, which: Which, bytes: &mut [u8], offset: u64) -> io::Result<()>;
    fn write(&mut self, which: Which, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Has blocks of the file allocated, so that writing does not fail for want of them.
    fn reserve(&mut self, offset: u64, len: u64) -> io::Result<()>;
    fn sync(&mut self, which: Which) -> io::Result<()>;
    /// Makes the journal empty.
    fn clear(&mut self) -> io::Result<()>;
    fn inode(&self) -> u64;
}

/// The journal of a mapped file, held for this mapping alone.
#[derive(Debug)]
pub(super) struct Journal {
    disk: Files,
    book: Book,
}

/// What is known of pages that were flushed.
#[derive(Debug, Default)]
struct Book {
    /// Hashes of what the file has, by offset.
    flushed: HashMap<u64, u64, RandomState>,
    hashes: RandomState,
    /// The journal is complete, but the file does not have all of it yet.
    unfinished: bool,
}

impl Journal {
    /// Takes the journal of a file, and replays it if one was left behind.
    pub(super) fn open(file: &File) -> io::Result<Self> {
        let mut disk = Files::open(file)?;
        recover(&mut disk)?;
        Ok(Self { disk, book: Book::default() })
    }

    /// Gets the pages of `runs` into the file, which starts at `start` in it: all of them or none. `page` gives their
    /// bytes; runs are bytes from the mapping's start.
    pub(super) fn flush<'a>(
        &mut self,
        start: u64,
        runs: &[Range<usize>],
        page: impl Fn(usize) -> &'a [u8],
    ) -> io::Result<()> {
        self.book.flush(&mut self.disk, start, runs, page)
    }
}

impl Book {
    fn flush<'a>(
        &mut self,
        disk: &mut impl Disk,
        start: u64,
        runs: &[Range<usize>],
        page: impl Fn(usize) -> &'a [u8],
    ) -> io::Result<()> {
        if self.unfinished {
            recover(disk)?;
            self.unfinished = false;
        }
        let file_len = disk.len(Which::File)?;
        let mut hasher = HighwayHasher::new(KEY);
        let mut entries: Vec<(u64, u64)> = Vec::new();
        let mut hashes = Vec::new();
        let mut chunk = Vec::with_capacity(STEP * PAGE_SIZE);
        let mut end = PAGE;
        for place in runs.iter().flat_map(|run| run.clone().step_by(PAGE_SIZE)) {
            let offset = start + to_u64(place);
            let len = file_len.saturating_sub(offset).min(PAGE);
            // What is stored meanwhile shall not be in one place and not in another.
            let copied = chunk.len();
            chunk.extend_from_slice(page(place));
            let hash = self.hashes.hash_one(&chunk[copied..]);
            if len == 0 || self.flushed.get(&offset) == Some(&hash) {
                chunk.truncate(copied);
                continue;
            }
            entries.push((offset, len));
            hashes.push((offset, hash));
            if chunk.len() == STEP * PAGE_SIZE {
                end = append(disk, &mut hasher, &mut chunk, end)?;
            }
        }
        if entries.is_empty() {
            return Ok(());
        }
        for (offset, len) in &entries {
            disk.reserve(*offset, *len)?;
        }
        end = append(disk, &mut hasher, &mut chunk, end)?;
        for (offset, len) in &entries {
            chunk.extend_from_slice(&offset.to_le_bytes());
            chunk.extend_from_slice(&len.to_le_bytes());
        }
        append(disk, &mut hasher, &mut chunk, end)?;
        let (inode, pages) = (disk.inode(), to_u64(entries.len()));
        hasher.append(&inode.to_le_bytes());
        hasher.append(&pages.to_le_bytes());
        let mut header = vec![0; PAGE_SIZE];
        let words = [MAGIC, inode, pages, hasher.finalize64()];
        for (word, place) in words.iter().zip(header.chunks_exact_mut(8)) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        disk.write(Which::Journal, &header, 0)?;
        disk.sync(Which::Journal)?;
        // From here on it will get into the file, whatever happens.
        self.unfinished = true;
        replay(disk, &entries)?;
        self.unfinished = false;
        self.flushed.extend(hashes);
        Ok(())
    }
}

fn append(
    disk: &mut impl Disk,
    hasher: &mut HighwayHasher,
    chunk: &mut Vec<u8>,
    end: u64,
) -> io::Result<u64> {
    if !chunk.is_empty() {
        disk.write(Which::Journal, chunk, end)?;
        hasher.append(chunk);
    }
    let end = end + to_u64(chunk.len());
    chunk.clear();
    Ok(end)
}

/// Gets a complete journal into the file.
fn replay(disk: &mut impl Disk, entries: &[(u64, u64)]) -> io::Result<()> {
    let mut chunk = vec![0; STEP * PAGE_SIZE];
    let mut from = PAGE;
    let mut entries = entries;
    while let Some((first, _)) = entries.first() {
        // Neighbours in the file go there in one write.
        let follows = |(n, (offset, _)): &(u64, &(u64, u64))| *offset == first + n * PAGE;
        let count = (0..).zip(entries).take(STEP).take_while(follows).count();
        let bytes = &mut chunk[..count * PAGE_SIZE];
        disk.read(Which::Journal, bytes, from)?;
        let last = entries[count - 1].1;
        let len = (count - 1) * PAGE_SIZE + to_usize(last.min(PAGE));
        disk.write(Which::File, &bytes[..len], *first)?;
        from += to_u64(bytes.len());
        entries = &entries[count..];
    }
    disk.sync(Which::File)?;
    disk.clear()
}

/// Replays the journal if it is complete; makes it empty in any case.
fn recover(disk: &mut impl Disk) -> io::Result<()> {
    match read_entries(disk)? {
        Some(entries) => replay(disk, &entries),
        None => disk.clear(),
    }
}

/// The list of a journal that is complete.
fn read_entries(disk: &impl Disk) -> io::Result<Option<Vec<(u64, u64)>>> {
    let len = disk.len(Which::Journal)?;
    if len < PAGE {
        return Ok(None);
    }
    let mut header = vec![0; PAGE_SIZE];
    disk.read(Which::Journal, &mut header, 0)?;
    let word = |n: usize| header[n * 8..][..8].try_into().map_or(0, u64::from_le_bytes);
    let (inode, pages, hash) = (word(1), word(2), word(3));
    let fits = pages.checked_mul(PAGE + ENTRY).and_then(|bytes| bytes.checked_add(PAGE));
    if word(0) != MAGIC || fits.is_none_or(|end| end > len) {
        return Ok(None);
    }
    let mut hasher = HighwayHasher::new(KEY);
    let end = PAGE + pages * (PAGE + ENTRY);
    let mut chunk = vec![0; STEP * PAGE_SIZE];
    let mut list = Vec::new();
    let mut from = PAGE;
    while from < end {
        let step = to_usize((end - from).min(to_u64(chunk.len())));
        disk.read(Which::Journal, &mut chunk[..step], from)?;
        hasher.append(&chunk[..step]);
        let list_start = PAGE + pages * PAGE;
        if from + to_u64(step) > list_start {
            list.extend_from_slice(&chunk[to_usize(list_start.saturating_sub(from))..step]);
        }
        from += to_u64(step);
    }
    hasher.append(&inode.to_le_bytes());
    hasher.append(&pages.to_le_bytes());
    if hasher.finalize64() != hash {
        return Ok(None);
    }
    if inode != disk.inode() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the journal beside the file was written for another file of that name; remove it if it is not wanted",
        ));
    }
    let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
    let entries = list.chunks_exact(to_usize(ENTRY));
    Ok(Some(entries.map(|entry| (number(&entry[..8]), number(&entry[8..]))).collect()))
}

/// The real files.
#[derive(Debug)]
struct Files {
    file: File,
    journal: File,
    path: PathBuf,
    inode: u64,
}

impl Files {
    fn open(file: &File) -> io::Result<Self> {
        let own = format!("/proc/self/fd/{}", file.as_raw_fd());
        let named = fs::read_link(&own)?;
        let meta = file.metadata()?;
        let same = |meta: &fs::Metadata, other: &fs::Metadata| {
            (meta.dev(), meta.ino()) == (other.dev(), other.ino())
        };
        if !fs::metadata(&named).is_ok_and(|found| same(&found, &meta)) {
            let text = "the file has no name beside which a journal could be kept";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let mut path = named.into_os_string();
        path.push(ENDING);
        let path = PathBuf::from(path);
        // A description that nobody shares, so that nobody moves it or changes its flags.
        let file = OpenOptions::new().read(true).write(true).open(&own)?;
        let mode = meta.mode() & 0o666;
        loop {
            let journal = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(mode)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path)?;
            match journal.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let text = "another mapping flushes the file atomically; drop that one first";
                    return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
                }
                Err(TryLockError::Error(error)) => return Err(error),
            }
            // Whoever held the lock before may have removed it.
            if fs::symlink_metadata(&path).is_ok_and(|found| {
                journal.metadata().is_ok_and(|meta| same(&found, &meta) && found.file_type().is_file())
            }) {
                sync_directory(&path)?;
                return Ok(Self { file, journal, path, inode: meta.ino() });
            }
        }
    }

    fn get(&self, which: Which) -> &File {
        match which {
            Which::File => &self.file,
            Which::Journal => &self.journal,
        }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // One that is not empty has something to say to whoever maps the file next.
        if self.journal.metadata().is_ok_and(|meta| meta.len() == 0) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Disk for Files {
    fn len(&self, which: Which) -> io::Result<u64> {
        Ok(self.get(which).metadata()?.len())
    }

    fn read(&self, which: Which, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.get(which).read_exact_at(bytes, offset)
    }

    fn write(&mut self, which: Which, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.get(which).write_all_at(bytes, offset)
    }

    fn reserve(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else { return Ok(()) };
        let flags = nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match nix::fcntl::fallocate(&self.file, flags, offset, len) {
            Err(nix::Error::EOPNOTSUPP) => Ok(()),
            other => Ok(other?),
        }
    }

    fn sync(&mut self, which: Which) -> io::Result<()> {
        self.get(which).sync_data()
    }

    fn clear(&mut self) -> io::Result<()> {
        self.journal.set_len(0)?;
        self.journal.sync_data()
    }

    fn inode(&self) -> u64 {
        self.inode
    }
}

fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
