//! A range of memory that the daemon pages: its mapping, its life, and what can be asked for it.

use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;

use fmalloc_proto::limits::{MAX_REGION, PAGE_SIZE};
use fmalloc_proto::messages::{Advice, Advise, RegionId, RegionRange, Register, Reply, Request};
use fmalloc_proto::num::to_u64;
use nix::errno::Errno;

use crate::error::Error;
use crate::link::Link;
use crate::options::cut;
use crate::pager::Pager;
use crate::pod::Pod;
use crate::sys;

/// Memory of any length, zero at first, of which only as much is in RAM as the pager's budget allows. It is used like
/// a slice, from any number of threads; system calls work on it too.
///
/// - After `fork` the child has no mapping here: a touch is SIGSEGV, dropping the region there does nothing.
/// - Pages that the program locks (`mlock`) or makes read-only (`mprotect`) cannot be evicted and count against the
///   budget for as long as that lasts.
/// - If the daemon dies, resident pages work and a touch of any other waits for ever: it never reads zeros.
/// - A page whose content was lost to a disk error gives SIGBUS.
#[derive(Debug)]
pub struct Region {
    pager: Pager,
    base: NonNull<u8>,
    len: usize,
    id: u32,
}

// SAFETY: the region owns its mapping; shared access is that of a slice.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// A region of `len` bytes. Claims that much of the swap file, so that the memory can never run out later.
    ///
    /// # Errors
    /// [`Error::SwapFull`], [`Error::Invalid`] for zero or more than 64 TiB, [`Error::Refused`] at the daemon's limit of
    /// regions, a lost daemon, or a failure of the system.
    pub fn new(pager: &Pager, len: usize) -> Result<Self, Error> {
        Self::make(pager, len, true, "")
    }

    /// [`Region::new`] with a label for `fmallocctl regions`, of which 64 bytes are kept.
    ///
    /// # Errors
    /// As [`Region::new`].
    pub fn labelled(pager: &Pager, len: usize, label: &str) -> Result<Self, Error> {
        Self::make(pager, len, true, label)
    }

    /// Addresses only. [`Region::commit`] makes a part usable and claims swap for it; a touch outside such parts is
    /// SIGSEGV.
    ///
    /// # Errors
    /// As [`Region::new`].
    pub fn sparse(pager: &Pager, len: usize) -> Result<Self, Error> {
        Self::make(pager, len, false, "")
    }

    /// [`Region::sparse`] with a label for `fmallocctl regions`, of which 64 bytes are kept.
    ///
    /// # Errors
    /// As [`Region::new`].
    pub fn sparse_labelled(pager: &Pager, len: usize, label: &str) -> Result<Self, Error> {
        Self::make(pager, len, false, label)
    }

    /// Makes the pages of `range` (in bytes; whole pages around it) usable. What is usable already stays as it is.
    ///
    /// # Errors
    /// [`Error::SwapFull`], [`Error::Invalid`] for a range outside the region, a lost daemon, or a failure of the
    /// system. Nothing has changed then.
    pub fn commit(&self, range: Range<usize>) -> Result<(), Error> {
        let Some(pages) = self.around(&range)? else { return Ok(()) };
        self.link().order(&Request::Commit(self.part(&pages)))?;
        self.protect(&pages, libc::PROT_READ | libc::PROT_WRITE).inspect_err(|_| {
            let _ = self.link().order(&Request::Decommit(self.part(&pages)));
        })
    }

    /// Drops the content of the whole pages within `range` (in bytes), takes them out of use and gives their swap back.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range outside the region, a lost daemon, or a failure of the system.
    pub fn decommit(&mut self, range: Range<usize>) -> Result<(), Error> {
        // SAFETY: the region is borrowed exclusively.
        unsafe { self.decommit_unused(range) }
    }

    /// [`Region::decommit`] for an allocator, which knows by itself what is in use.
    ///
    /// # Safety
    /// Nothing may refer to the content of the range.
    ///
    /// # Errors
    /// As [`Region::decommit`].
    pub unsafe fn decommit_unused(&self, range: Range<usize>) -> Result<(), Error> {
        let Some(pages) = self.within(&range)? else { return Ok(()) };
        self.link().check()?;
        self.protect(&pages, libc::PROT_NONE)?;
        // SAFETY: the caller's.
        unsafe { self.drop_pages(&pages) }?;
        self.link().order(&Request::Decommit(self.part(&pages)))
    }

    /// Gives the daemon a hint about the pages around `range` (in bytes). Returns at once.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range outside the region, or a lost daemon.
    pub fn advise(&self, range: Range<usize>, advice: Advice) -> Result<(), Error> {
        let Some(pages) = self.around(&range)? else { return Ok(()) };
        self.link().order(&Request::Advise(Advise { range: self.part(&pages), advice }))
    }

    /// Drops the content of `range` (in bytes): it reads as zeros from now on, and what its whole pages took of RAM and
    /// of the swap file is free for other pages of this client. A partial page at either end is filled with zeros.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range outside the region, a lost daemon (nothing has changed then), or a failure of the
    /// system.
    pub fn discard(&mut self, range: Range<usize>) -> Result<(), Error> {
        let pages = self.within(&range)?;
        // With a dead daemon the kernel would wait for ever for it to take note.
        self.link().check()?;
        let Some(pages) = pages else {
            self[range].fill(0);
            return Ok(());
        };
        // SAFETY: the region is borrowed exclusively.
        unsafe { self.drop_pages(&pages) }?;
        self[range.start..pages.start].fill(0);
        let tail = pages.end.min(range.end)..range.end;
        self[tail].fill(0);
        Ok(())
    }

    /// [`Region::discard`] of the whole pages within `range` (in bytes) for an allocator, which knows by itself what is in
    /// use.
    ///
    /// # Safety
    /// Nothing may refer to the content of the range.
    ///
    /// # Errors
    /// As [`Region::discard`].
    pub unsafe fn discard_unused(&self, range: Range<usize>) -> Result<(), Error> {
        let Some(pages) = self.within(&range)? else { return Ok(()) };
        self.link().check()?;
        // SAFETY: the caller's.
        unsafe { self.drop_pages(&pages) }
    }

    /// For each page that `range` (in bytes) touches, whether it is in RAM at this moment.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range outside the region, or a failure of the system.
    pub fn resident(&self, range: Range<usize>) -> Result<Vec<bool>, Error> {
        if !self.link().is_owner() {
            return Err(Error::Forked);
        }
        let Some(pages) = self.around(&range)? else { return Ok(Vec::new()) };
        let mut map = vec![0_u8; pages.len() / PAGE_SIZE];
        let start = self.base.as_ptr().wrapping_add(pages.start).cast();
        // SAFETY: the vector has a byte for each page; the kernel checks the range.
        Errno::result(unsafe { libc::mincore(start, pages.len(), map.as_mut_ptr()) })
            .map_err(|errno| Error::system("asking which pages are resident", errno))?;
        Ok(map.into_iter().map(|page| page & 1 != 0).collect())
    }

    /// The region as values of another type; bytes at the end that do not fill one are left out.
    #[must_use]
    pub fn as_slice_of<T: Pod>(&self) -> &[T] {
        let count = self.len.checked_div(size_of::<T>()).unwrap_or(0);
        // SAFETY: any bytes are a `T`, the mapping is aligned for it, and the lifetime is that of `self`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), count) }
    }

    /// As [`Region::as_slice_of`], to write to.
    #[must_use]
    pub fn as_mut_slice_of<T: Pod>(&mut self) -> &mut [T] {
        let count = self.len.checked_div(size_of::<T>()).unwrap_or(0);
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().cast(), count) }
    }

    /// Start of the memory; aligned to 4096.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Length in bytes, as asked for.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: a region has one byte at least.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The region's number within this client, as `fmallocctl regions` shows it.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The pager that it belongs to.
    #[must_use]
    pub fn pager(&self) -> &Pager {
        &self.pager
    }

    fn make(pager: &Pager, len: usize, commit: bool, label: &str) -> Result<Self, Error> {
        let access = if commit { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_NONE };
        Self::make_with(pager, len, access, commit, pager.inherits(), label, |register| {
            pager.link().call(&Request::Register(register))
        })
    }

    /// Maps memory and has it registered by `register`. Forked children have it only if `inherit` says so.
    pub(crate) fn make_with(
        pager: &Pager,
        len: usize,
        access: i32,
        commit: bool,
        inherit: bool,
        label: &str,
        register: impl FnOnce(Register) -> Result<Reply, Error>,
    ) -> Result<Self, Error> {
        if len == 0 || to_u64(len) > MAX_REGION {
            return Err(Error::invalid(format!("a region of {len} bytes; it must have 1 to {MAX_REGION}")));
        }
        pager.link().check()?;
        let mapped = len.next_multiple_of(PAGE_SIZE);
        let base = sys::map_anonymous(mapped, access, inherit)
            .map_err(|errno| Error::system("mapping addresses for a region", errno))?;
        let outcome = register(Register {
            addr: to_u64(base.as_ptr().expose_provenance()),
            len: to_u64(mapped),
            commit,
            label: cut(label),
        });
        let outcome = outcome.and_then(|reply| match reply {
            Reply::Registered(registered) => Ok(registered.region),
            other => Err(Link::unexpected(&other)),
        });
        match outcome {
            Ok(id) => Ok(Self { pager: pager.clone(), base, len, id }),
            Err(error) => {
                release(pager.link(), base, mapped, !error.is_uncertain());
                Err(error)
            }
        }
    }

    pub(crate) fn link(&self) -> &Link {
        self.pager.link()
    }

    /// The whole pages around a range; none for an empty one.
    pub(crate) fn around(&self, range: &Range<usize>) -> Result<Option<Range<usize>>, Error> {
        self.check_range(range)?;
        let start = range.start - range.start % PAGE_SIZE;
        Ok((!range.is_empty()).then(|| start..range.end.next_multiple_of(PAGE_SIZE)))
    }

    /// The whole pages within a range, the last one of the region counting as whole; none if there is none.
    fn within(&self, range: &Range<usize>) -> Result<Option<Range<usize>>, Error> {
        self.check_range(range)?;
        let start = range.start.next_multiple_of(PAGE_SIZE);
        let end = if range.end == self.len {
            range.end.next_multiple_of(PAGE_SIZE)
        } else {
            range.end - range.end % PAGE_SIZE
        };
        Ok((start < end).then_some(start..end))
    }

    fn check_range(&self, range: &Range<usize>) -> Result<(), Error> {
        if range.start <= range.end && range.end <= self.len {
            Ok(())
        } else {
            Err(Error::range(range, self.len))
        }
    }

    /// What [`Region::pin`] does, for a binding that keeps no guard: [`Region::release`] ends it. Here system calls fault
    /// pages in, so that nothing has to be held.
    ///
    /// # Errors
    /// As [`Region::pin`].
    pub fn hold(&self, range: &Range<usize>, _write: bool) -> Result<(), Error> {
        self.check_range(range)
    }

    /// Ends one [`Region::hold`] of the same range.
    pub fn release(&self, _: &Range<usize>) {}

    pub(crate) fn part(&self, pages: &Range<usize>) -> RegionRange {
        RegionRange { region: self.id, offset: to_u64(pages.start), len: to_u64(pages.len()) }
    }

    fn protect(&self, pages: &Range<usize>, access: i32) -> Result<(), Error> {
        let start = self.base.as_ptr().wrapping_add(pages.start).cast();
        // SAFETY: the pages are the region's; content does not change. Who touches them without access gets SIGSEGV.
        Errno::result(unsafe { libc::mprotect(start, pages.len(), access) })
            .map(drop)
            .map_err(|errno| Error::system("changing access to a part of a region", errno))
    }

    /// # Safety
    /// Nothing may refer to the content.
    unsafe fn drop_pages(&self, pages: &Range<usize>) -> Result<(), Error> {
        let start = self.base.as_ptr().wrapping_add(pages.start).cast();
        // SAFETY: the pages are the region's, and the caller answers for their content.
        Errno::result(unsafe { libc::madvise(start, pages.len(), libc::MADV_DONTNEED) })
            .map(drop)
            .map_err(|errno| Error::system("discarding a part of a region", errno))
    }
}

/// Gives the addresses back, or leaves them mapped for ever: unmapping what a lost daemon should take note of would
/// wait for ever.
fn release(link: &Link, base: NonNull<u8>, mapped: usize, unregistered: bool) {
    if unregistered {
        // SAFETY: the mapping is ours and nobody refers to it any more.
        unsafe { libc::munmap(base.as_ptr().cast(), mapped) };
    } else {
        link.leak();
    }
}

impl Deref for Region {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.as_slice_of()
    }
}

impl DerefMut for Region {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.as_mut_slice_of()
    }
}

impl Drop for Region {
    /// Waits until the daemon has let go of the memory. With a lost daemon the addresses stay mapped.
    fn drop(&mut self) {
        let link = self.pager.link();
        // A forked child has no such mapping.
        if link.is_owner() {
            let unregistered = link.order(&Request::Unregister(RegionId { region: self.id })).is_ok();
            release(link, self.base, self.len.next_multiple_of(PAGE_SIZE), unregistered);
        }
    }
}
