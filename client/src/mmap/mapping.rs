//! One mapping: the region behind it, and which part of it belongs to whom. Mappings of this process that write to the same
//! part of a file, or read what another writes, share one region and so its pages.

use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use fmalloc_proto::messages::{
    Advise, Changed, FileMode, Flush, FlushUntil, RegionId, RegionRange, RegisterFile, RegisterLike, Reply,
    Request,
};
use fmalloc_proto::num::{to_u64, to_usize};
use fmalloc_proto::{PAGE, PAGE_SIZE};
use nix::errno::Errno;
use nix::sys::stat::{FileStat, fstat};

use super::advice::{Advice, UncheckedAdvice};
use super::options::check_len;
use crate::agent::lent::Lent;
use crate::error::Error;
use crate::link::Link;
use crate::pager::Pager;
use crate::region::Region;

const ACCESS: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// A file, whatever its names are.
type Identity = (u64, u64);

/// Regions over files that may be shared within this process.
static LIVE: Mutex<Vec<(Identity, Weak<Mapping>)>> = Mutex::new(Vec::new());

/// A region and what is behind it.
#[derive(Debug)]
pub(super) struct Mapping {
    pub(super) region: ManuallyDrop<Region>,
    /// The process that made it: a region over a file is not inherited.
    owner: u32,
    /// None: anonymous.
    file: Option<MappedFile>,
    /// Pages that guards keep in RAM.
    pub(super) pins: Mutex<Vec<Range<usize>>>,
}

#[derive(Debug)]
struct MappedFile {
    mode: FileMode,
    /// Where the region starts in the file.
    start: u64,
    /// Shown by `fmallocctl`.
    label: String,
    /// Was read-only, and was made writable.
    upgraded: AtomicBool,
}

impl Mapping {
    fn new(region: Region, file: Option<MappedFile>) -> Self {
        let region = ManuallyDrop::new(region);
        Self { region, owner: std::process::id(), file, pins: Mutex::default() }
    }

    /// Whether this process has it: in a child its number may be that of another region.
    fn is_here(&self) -> bool {
        self.link().is_owner() && (self.file.is_none() || self.owner == std::process::id())
    }

    fn check(&self) -> Result<(), Error> {
        if self.is_here() { self.link().check() } else { Err(Error::Forked) }
    }

    fn mode(&self) -> Option<FileMode> {
        let file = self.file.as_ref()?;
        Some(if file.upgraded.load(Ordering::Acquire) { FileMode::Shared } else { file.mode })
    }

    fn link(&self) -> &Link {
        self.region.link()
    }

    /// Bytes of the file that it covers.
    fn part(&self) -> Range<u64> {
        let start = self.file.as_ref().map_or(0, |file| file.start);
        start..start + to_u64(self.region.len())
    }

    /// Has changes within the pages around `range` written.
    pub(super) fn flush(&self, range: Range<usize>, until: FlushUntil) -> Result<(), Error> {
        self.check()?;
        let Some(pages) = self.region.around(&range)? else { return Ok(()) };
        if self.mode() != Some(FileMode::Shared) {
            return Ok(());
        }
        self.link().order(&Request::Flush(Flush { range: self.region.part(&pages), until }))
    }

    /// Lets the region change its file, or its own pages if it is private.
    fn make_writable(&self) -> Result<(), Error> {
        self.check()?;
        match self.mode() {
            Some(FileMode::ReadOnly) => {
                self.link().order(&Request::MakeWritable(RegionId { region: self.region.id() }))?;
                if let Some(file) = &self.file {
                    file.upgraded.store(true, Ordering::Release);
                }
                Ok(())
            }
            // Its pages had no claim on swap as long as nobody could change them.
            Some(FileMode::Private) => self.region.commit(0..self.region.len()),
            Some(FileMode::Shared) | None => Ok(()),
        }
    }

    /// Runs of pages that differ from the file.
    pub(super) fn changed(&self, range: Range<usize>) -> Result<Vec<Range<usize>>, Error> {
        self.check()?;
        let mut runs = Vec::new();
        let Some(mut pages) = self.region.around(&range)? else { return Ok(runs) };
        loop {
            let part: RegionRange = self.region.part(&pages);
            let Changed { runs: more, next } = match self.link().call(&Request::Changed(part))? {
                Reply::Changed(changed) => changed,
                other => return Err(Link::unexpected(&other)),
            };
            let bytes = |pages: u64| to_usize(pages.saturating_mul(PAGE));
            runs.extend(more.iter().map(|(first, count)| bytes(*first)..bytes(first.saturating_add(*count))));
            match next {
                Some(next) => pages.start = bytes(next),
                None => return Ok(runs),
            }
        }
    }

    /// Reads the pages around `range` in, as far as the budget allows.
    pub(super) fn prefetch(&self, range: Range<usize>) -> Result<(), Error> {
        self.check()?;
        let Some(pages) = self.region.around(&range)? else { return Ok(()) };
        self.link().order(&Request::Prefetch(self.region.part(&pages)))
    }

    /// Another region over the same part of the file, of another length perhaps, in the same mode.
    fn like(&self, len: usize) -> Result<Self, Error> {
        self.check()?;
        let Some(file) = &self.file else { return Err(Error::invalid("an anonymous mapping has no file")) };
        let commit = file.mode == FileMode::Private;
        let of = self.region.id();
        let region =
            Region::make_with(self.region.pager(), len, ACCESS, commit, false, &file.label, |region| {
                self.link().call(&Request::RegisterLike(RegisterLike { region, of }))
            })?;
        let upgraded = AtomicBool::new(file.upgraded.load(Ordering::Acquire));
        let file = MappedFile { mode: file.mode, start: file.start, label: file.label.clone(), upgraded };
        Ok(Self::new(region, Some(file)))
    }

    /// A private mapping of the same content.
    fn copy(&self, len: usize) -> Result<Self, Error> {
        let copy = self.like(len)?;
        for run in self.changed(0..self.region.len().min(len))? {
            let run = run.start..run.end.min(len.next_multiple_of(PAGE_SIZE));
            let (from, to) = (self.region.as_ptr(), copy.region.as_ptr());
            // SAFETY: both regions have the run, which is whole pages, and nobody else knows the copy yet. Whoever writes
            // to the original meanwhile does so at the risk that its caller has accepted.
            unsafe {
                std::ptr::copy_nonoverlapping(from.add(run.start), to.add(run.start), run.end - run.start);
            }
        }
        Ok(copy)
    }
}

impl Drop for Mapping {
    /// What was changed gets into the file, though not yet to the disk.
    fn drop(&mut self) {
        if self.is_here() {
            let _ = self.flush(0..self.region.len(), FlushUntil::Written);
        }
        if self.file.is_none() || self.is_here() {
            // SAFETY: nothing uses the region after this.
            unsafe { ManuallyDrop::drop(&mut self.region) };
        }
    }
}

/// How a mapping is to be made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) offset: u64,
    pub(super) len: usize,
    pub(super) mode: FileMode,
    /// Claim swap for pages that may be changed.
    pub(super) commit: bool,
    pub(super) populate: bool,
}

/// A part of a mapping, in bytes: what a map hands out. Of no bytes at all there is no region.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub(super) mapping: Option<Arc<Mapping>>,
    /// Where it starts in the region.
    pub(super) start: usize,
    pub(super) len: usize,
}

impl Drop for Part {
    /// The file has what was changed although others keep the mapping; the last one's end is the mapping's.
    fn drop(&mut self) {
        if let Some(mapping) = self.mapping.as_ref().filter(|mapping| Arc::strong_count(mapping) > 1)
            && self.len > 0
        {
            let _ = mapping.flush(self.range(), FlushUntil::Written);
        }
    }
}

/// As aligned as a mapping, and nobody's.
#[repr(align(4096))]
struct Nothing;
static NOTHING: Nothing = Nothing;

impl Part {
    /// Zeros, in swap once changed.
    pub(super) fn anonymous(pager: &Pager, len: usize, commit: bool) -> Result<Self, Error> {
        if len == 0 {
            return Ok(Self { mapping: None, start: 0, len });
        }
        let region =
            Region::make_with(pager, len, ACCESS, commit, pager.inherits(), "anonymous mapping", |region| {
                pager.link().call(&Request::Register(region))
            })?;
        Ok(Self { mapping: Some(Arc::new(Mapping::new(region, None))), start: 0, len })
    }

    /// A part of a file.
    pub(super) fn of_file(pager: &Pager, fd: BorrowedFd<'_>, wanted: &Wanted) -> Result<Self, Error> {
        let start = to_usize(wanted.offset % PAGE);
        let Some(bytes) = wanted.len.checked_add(start) else {
            return Err(Error::invalid("the mapping's length overflows"));
        };
        if wanted.len == 0 {
            return Ok(Self { mapping: None, start: 0, len: 0 });
        }
        let stat = fstat(fd).map_err(|errno| Error::system("examining the file", errno))?;
        let first = wanted.offset - wanted.offset % PAGE;
        let mut live = LIVE.lock().unwrap_or_else(PoisonError::into_inner);
        live.retain(|(_, mapping)| mapping.strong_count() > 0);
        if wanted.mode != FileMode::Private
            && let Some(mapping) = find_shared(&live, &stat, first..first + to_u64(bytes), wanted.mode)
        {
            let at = to_usize(first - mapping.part().start) + start;
            return Ok(Self { mapping: Some(mapping), start: at, len: wanted.len });
        }
        // What others have changed must be in the file before it is read.
        let others = live.iter().filter(|(identity, _)| *identity == identity_of(&stat));
        for mapping in others.filter_map(|(_, mapping)| mapping.upgrade()) {
            if mapping.is_here() {
                mapping.flush(0..mapping.region.len(), FlushUntil::Written)?;
            }
        }
        let commit = wanted.commit && wanted.mode == FileMode::Private;
        let lent = Lent::new(fd).map_err(|errno| Error::system("examining the file", errno))?;
        let label = label(fd);
        let region = Region::make_with(pager, bytes, ACCESS, commit, false, &label, |region| {
            let request = Request::RegisterFile(RegisterFile { region, offset: first, mode: wanted.mode });
            pager.link().call_with(&request, Some(lent))
        })?;
        let upgraded = AtomicBool::new(false);
        let file = MappedFile { mode: wanted.mode, start: first, label, upgraded };
        let mapping = Arc::new(Mapping::new(region, Some(file)));
        if wanted.mode != FileMode::Private {
            live.push((identity_of(&stat), Arc::downgrade(&mapping)));
        }
        drop(live);
        if wanted.populate {
            mapping.prefetch(0..bytes)?;
        }
        Ok(Self { mapping: Some(mapping), start, len: wanted.len })
    }

    pub(super) fn ptr(&self) -> NonNull<u8> {
        match &self.mapping {
            Some(mapping) => {
                let place = mapping.region.as_ptr().wrapping_add(self.start);
                NonNull::new(place).unwrap_or(NonNull::from(&NOTHING).cast())
            }
            None => NonNull::from(&NOTHING).cast(),
        }
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        // SAFETY: the region has these bytes, initialised, for as long as `self` holds it; that nobody changes them is the
        // promise of whoever made the mapping.
        unsafe { std::slice::from_raw_parts(self.ptr().as_ptr(), self.len) }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above; that nobody else looks at them meanwhile is promised in the same way.
        unsafe { std::slice::from_raw_parts_mut(self.ptr().as_ptr(), self.len) }
    }

    /// The bytes `len` from `offset` on, as bytes of the region.
    pub(super) fn within(&self, offset: usize, len: usize) -> io::Result<Range<usize>> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(self.start + offset..self.start + end),
            _ => {
                let text = format!("{len} bytes from {offset} on are not within a mapping of {}", self.len);
                Err(io::Error::new(io::ErrorKind::InvalidInput, text))
            }
        }
    }

    pub(super) fn flush(&self, offset: usize, len: usize, until: FlushUntil) -> io::Result<()> {
        let range = self.within(offset, len)?;
        let Some(mapping) = &self.mapping else { return Ok(()) };
        Ok(mapping.flush(range, until)?)
    }

    pub(super) fn make_writable(&self) -> io::Result<()> {
        self.mapping.as_ref().map_or(Ok(()), |mapping| Ok(mapping.make_writable()?))
    }

    pub(super) fn advise(&self, advice: Advice, offset: usize, len: usize) -> io::Result<()> {
        use crate::Advice as Hint;
        let range = self.within(offset, len)?;
        let Some(mapping) = &self.mapping else { return Ok(()) };
        mapping.check()?;
        let hint = match advice {
            Advice::Normal => Hint::Normal,
            Advice::Random => Hint::Random,
            Advice::Sequential => Hint::Sequential,
            Advice::WillNeed => Hint::WillNeed,
            Advice::DontFork | Advice::Unmergeable | Advice::NoHugePage | Advice::DontDump => return Ok(()),
            Advice::PopulateRead | Advice::PopulateWrite => return Ok(mapping.prefetch(range)?),
            Advice::DoFork | Advice::Mergeable | Advice::HugePage | Advice::DoDump | Advice::HwPoison => {
                return Err(unsupported(&format!(
                    "{advice:?} is not for mappings of fmalloc; see mmap::Advice"
                )));
            }
        };
        Ok(mapping.region.advise(range, hint)?)
    }

    pub(super) fn unchecked_advise(
        &self,
        advice: UncheckedAdvice,
        offset: usize,
        len: usize,
    ) -> io::Result<()> {
        let range = self.within(offset, len)?;
        let Some(mapping) = &self.mapping else { return Ok(()) };
        mapping.check()?;
        let shared = matches!(mapping.mode(), Some(FileMode::Shared | FileMode::ReadOnly));
        let number = match advice {
            UncheckedAdvice::DontNeed if shared => {
                let Some(pages) = mapping.region.around(&range)? else { return Ok(()) };
                let advise = Advise { range: mapping.region.part(&pages), advice: crate::Advice::Cold };
                return Ok(mapping.link().order(&Request::Advise(advise))?);
            }
            UncheckedAdvice::DontNeed => libc::MADV_DONTNEED,
            UncheckedAdvice::Free if !shared => libc::MADV_FREE,
            UncheckedAdvice::Free => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "Free is for anonymous and private mappings",
                ));
            }
            UncheckedAdvice::Remove => {
                return Err(unsupported("Remove is not for mappings of fmalloc; use fallocate on the file"));
            }
        };
        // With a dead daemon the kernel would wait for ever for it to take note.
        mapping.check()?;
        let Some(pages) = mapping.region.around(&range)? else { return Ok(()) };
        let place = mapping.region.as_ptr().wrapping_add(pages.start);
        // SAFETY: the pages are the region's; that nobody minds the loss of their content the caller has promised.
        Errno::result(unsafe { libc::madvise(place.cast(), pages.len(), number) })?;
        Ok(())
    }

    /// `mlock` or `munlock`.
    pub(super) fn lock(&self, lock: bool, range: Range<usize>) -> io::Result<()> {
        let Some(mapping) = &self.mapping else { return Ok(()) };
        mapping.check()?;
        let place = mapping.region.as_ptr().wrapping_add(range.start).cast();
        // SAFETY: changes no content; the range is the region's.
        let result =
            unsafe { if lock { libc::mlock(place, range.len()) } else { libc::munlock(place, range.len()) } };
        Errno::result(result)?;
        Ok(())
    }

    /// All of it, as bytes of the region.
    pub(super) fn range(&self) -> Range<usize> {
        self.start..self.start + self.len
    }

    /// Another length. What is beyond the end of the file gives SIGBUS.
    pub(super) fn resize(&mut self, len: usize, may_move: bool) -> io::Result<()> {
        let Some(mapping) = &self.mapping else {
            return Err(unsupported("a mapping of no bytes cannot be resized; make a new one"));
        };
        check_len(len)?;
        if len == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a mapping cannot shrink to no bytes; drop it",
            ));
        }
        let bytes = self.start + len;
        if bytes <= mapping.region.len().next_multiple_of(PAGE_SIZE) && len <= self.len {
            self.len = len;
            return Ok(());
        }
        if !may_move {
            let text = "the mapping cannot grow where it is; allow it to move (RemapOptions::may_move)";
            return Err(io::Error::new(io::ErrorKind::OutOfMemory, text));
        }
        let new = match mapping.mode() {
            Some(FileMode::Private) => mapping.copy(bytes)?,
            Some(FileMode::Shared | FileMode::ReadOnly) => {
                if Arc::strong_count(mapping) > 1 && mapping.mode() == Some(FileMode::Shared) {
                    return Err(io::Error::new(
                        io::ErrorKind::ResourceBusy,
                        "another mapping shares these pages, so this one cannot move away from them; drop it first",
                    ));
                }
                mapping.flush(0..mapping.region.len(), FlushUntil::Written)?;
                mapping.like(bytes)?
            }
            None => Self::grown(mapping, bytes)?,
        };
        let new = Arc::new(new);
        if new.file.is_some() && new.mode() != Some(FileMode::Private) {
            let mut live = LIVE.lock().unwrap_or_else(PoisonError::into_inner);
            let old = Arc::as_ptr(mapping);
            for (_, other) in live.iter_mut().filter(|(_, other)| std::ptr::eq(other.as_ptr(), old)) {
                *other = Arc::downgrade(&new);
            }
        }
        self.mapping = Some(new);
        self.len = len;
        Ok(())
    }

    /// A longer anonymous mapping of the same content.
    fn grown(mapping: &Mapping, bytes: usize) -> Result<Mapping, Error> {
        let pager = mapping.region.pager();
        let region =
            Region::make_with(pager, bytes, ACCESS, true, pager.inherits(), "anonymous mapping", |region| {
                pager.link().call(&Request::Register(region))
            })?;
        let len = mapping.region.len().min(bytes);
        // SAFETY: both regions have these bytes, and nobody else knows the new one yet.
        unsafe { std::ptr::copy_nonoverlapping(mapping.region.as_ptr(), region.as_ptr(), len) };
        Ok(Mapping::new(region, None))
    }

    /// A copy of a private or anonymous mapping as it is now.
    pub(super) fn snapshot(&self) -> io::Result<Self> {
        let Some(mapping) = &self.mapping else { return Ok(self.clone()) };
        let copy = match mapping.mode() {
            Some(FileMode::Private) => mapping.copy(mapping.region.len())?,
            None => Self::grown(mapping, mapping.region.len())?,
            Some(_) => {
                return Err(unsupported(
                    "a mapping that shares its file has no snapshot; map a copy (map_copy)",
                ));
            }
        };
        Ok(Self { mapping: Some(Arc::new(copy)), start: self.start, len: self.len })
    }
}

fn unsupported(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, text)
}

fn identity_of(stat: &FileStat) -> Identity {
    if stat.st_mode & libc::S_IFMT == libc::S_IFBLK {
        (u64::MAX, stat.st_rdev)
    } else {
        (stat.st_dev, stat.st_ino)
    }
}

/// A region of this process that has the bytes of a file, and in which changes are as they shall be.
fn find_shared(
    live: &[(Identity, Weak<Mapping>)],
    stat: &FileStat,
    part: Range<u64>,
    mode: FileMode,
) -> Option<Arc<Mapping>> {
    let same = live.iter().filter(|(identity, _)| *identity == identity_of(stat));
    let usable = |mapping: &Arc<Mapping>| {
        let has = mapping.part();
        has.start <= part.start
            && part.end <= has.end
            && mapping.check().is_ok()
            // One that only reads is shared by a writer, so that its readers see what is written; if it can be.
            && (mode == FileMode::ReadOnly || mapping.make_writable().is_ok())
    };
    same.filter_map(|(_, mapping)| mapping.upgrade()).find(usable)
}

/// For `fmallocctl regions`: the end of the file's name, which says more than its beginning.
fn label(fd: BorrowedFd<'_>) -> String {
    use std::os::fd::AsRawFd;
    let path = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap_or_default();
    let path = path.to_string_lossy();
    let most = fmalloc_proto::limits::MAX_NAME;
    if path.len() <= most {
        return path.into_owned();
    }
    format!("…{}", &path[path.ceil_char_boundary(path.len() - (most - 3))..])
}
