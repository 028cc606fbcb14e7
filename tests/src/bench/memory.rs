//! The memory that a child works on: a region of fmalloc, anonymous memory, or a mapped file. Workloads see words.

use std::fs::OpenOptions;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use anyhow::{Context, Result};
use fmalloc_client::{ConnectOptions, Pager, Region};
use fmalloc_proto::num::to_u64;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use super::plan::Kind;

/// Whole pages of memory.
#[derive(Debug)]
pub(crate) struct Memory {
    base: NonNull<u64>,
    words: usize,
    backing: Backing,
}

#[derive(Debug)]
enum Backing {
    Region(#[expect(dead_code, reason = "keeps the memory")] Region),
    Mapping,
}

// SAFETY: the value owns its memory; sharing it gives atomics only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Memory of so many bytes, which must be whole pages.
    ///
    /// # Errors
    /// What fmalloc or the system says.
    pub(crate) fn new(kind: &Kind, bytes: u64) -> Result<Self> {
        let bytes = usize::try_from(bytes)?;
        match kind {
            Kind::Fmalloc { socket, budget } => {
                let options = ConnectOptions {
                    socket: Some(socket.clone()),
                    budget: Some(*budget),
                    ..ConnectOptions::default()
                };
                let pager = Pager::connect_with(&options)?;
                let mut region = Region::new(&pager, bytes)?;
                let base = NonNull::from(region.as_mut_slice_of::<u64>()).cast();
                Ok(Self { base, words: bytes / 8, backing: Backing::Region(region) })
            }
            Kind::Anonymous => {
                let (len, access) = shape(bytes)?;
                let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
                // SAFETY: a new mapping at an address of the kernel's choice.
                let base = unsafe { mmap_anonymous(None, len, access, flags) }.context("mapping memory")?;
                Ok(Self { base: base.cast(), words: bytes / 8, backing: Backing::Mapping })
            }
            Kind::File { directory, random } => Self::file(directory, bytes, *random),
        }
    }

    fn file(directory: &Path, bytes: usize, random: bool) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        let file = options.custom_flags(libc::O_TMPFILE | libc::O_EXCL).open(directory);
        let file = file.with_context(|| format!("making a file in {}", directory.display()))?;
        let length = libc::off_t::try_from(bytes)?;
        fallocate(&file, FallocateFlags::empty(), 0, length).context("allocating the file to map")?;
        let (len, access) = shape(bytes)?;
        // SAFETY: a new mapping at an address of the kernel's choice, of a file that nobody else has.
        let base = unsafe { mmap(None, len, access, MapFlags::MAP_SHARED, file.as_fd(), 0) }
            .context("mapping the file")?;
        if random {
            // SAFETY: the mapping is ours.
            unsafe { madvise(base, bytes, MmapAdvise::MADV_RANDOM) }.context("MADV_RANDOM")?;
        }
        Ok(Self { base: base.cast(), words: bytes / 8, backing: Backing::Mapping })
    }

    /// All of it, to write to.
    pub(crate) fn words(&mut self) -> &mut [u64] {
        // SAFETY: the memory is ours and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.words) }
    }

    /// All of it as bytes.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: as above; bytes need no alignment.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().cast(), self.words * 8) }
    }

    /// All of it, shared by threads.
    pub(crate) fn shared(&self) -> &[AtomicU64] {
        // SAFETY: atomics have the layout of their integers, and while `self` is shared nobody has plain access.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.words) }
    }

    /// The last `halves` 32-bit words, shared by threads.
    pub(crate) fn shared_tail(&self, halves: usize) -> &[AtomicU32] {
        let skipped = 2 * self.words - halves;
        // SAFETY: as above; the start stays within the memory.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast::<AtomicU32>().add(skipped), halves) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if matches!(self.backing, Backing::Mapping) {
            // SAFETY: the mapping is ours, and nobody borrows it any more.
            let _ = unsafe { munmap(self.base.cast(), self.words * 8) };
        }
    }
}

fn shape(bytes: usize) -> Result<(NonZeroUsize, ProtFlags)> {
    let len = NonZeroUsize::new(bytes).with_context(|| format!("memory of {} bytes", to_u64(bytes)))?;
    Ok((len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE))
}
