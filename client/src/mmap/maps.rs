//! The three kinds of mappings that a program holds.

use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

use fmalloc_proto::messages::FlushUntil;

use super::journal::Journal;
use super::mapping::Part;
use super::options::not_executable;
use super::{Advice, MmapAsRawDesc, MmapOptions, RemapOptions, UncheckedAdvice};

/// A file or anonymous memory, mapped for reading. Dereferences to the bytes.
pub struct Mmap(pub(super) Part);

/// A file or anonymous memory, mapped for reading and writing. Dereferences to the bytes.
pub struct MmapMut {
    pub(super) part: Part,
    /// The file changes only through this; and the mapping's place in it.
    pub(super) journal: Option<Box<(Mutex<Journal>, u64)>>,
}

/// A mapping of which only the address is known: for programs that share it with others, or use atomics in it.
pub struct MmapRaw(pub(super) Part);

/// What the three have in common.
macro_rules! common {
    ($name:ident, $part:tt) => {
        impl $name {
            /// Gives a hint about all of it. See [`Advice`] for what is taken.
            ///
            /// # Errors
            /// `Unsupported` for what mappings of fmalloc cannot do, or a lost daemon.
            pub fn advise(&self, advice: Advice) -> io::Result<()> {
                self.advise_range(advice, 0, self.$part.len)
            }

            /// Gives a hint that may change content, about all of it.
            ///
            /// # Safety
            /// No reference may rely on content that the hint drops.
            ///
            /// # Errors
            /// As [`Self::advise`].
            pub unsafe fn unchecked_advise(&self, advice: UncheckedAdvice) -> io::Result<()> {
                self.$part.unchecked_advise(advice, 0, self.$part.len)
            }

            /// Gives a hint about the pages around `len` bytes from `offset` on.
            ///
            /// # Errors
            /// As [`Self::advise`]; `InvalidInput` for bytes outside the mapping.
            pub fn advise_range(&self, advice: Advice, offset: usize, len: usize) -> io::Result<()> {
                self.$part.advise(advice, offset, len)
            }

            /// Gives a hint that may change content, about the pages around `len` bytes from `offset` on.
            ///
            /// # Safety
            /// No reference may rely on content that the hint drops.
            ///
            /// # Errors
            /// As [`Self::advise_range`].
            pub unsafe fn unchecked_advise_range(
                &self,
                advice: UncheckedAdvice,
                offset: usize,
                len: usize,
            ) -> io::Result<()> {
                self.$part.unchecked_advise(advice, offset, len)
            }

            /// Keeps all of it in RAM (`mlock`), from which it counts against the budget.
            ///
            /// # Errors
            /// What `mlock` says: `RLIMIT_MEMLOCK` may be too low.
            pub fn lock(&self) -> io::Result<()> {
                self.$part.lock(true, self.$part.range())
            }

            /// Lets it leave RAM again.
            ///
            /// # Errors
            /// What `munlock` says.
            pub fn unlock(&self) -> io::Result<()> {
                self.$part.lock(false, self.$part.range())
            }

            /// Changes the length. To become longer it must be allowed to move; what is behind the end of the file gives
            /// SIGBUS.
            ///
            /// # Safety
            /// References and pointers into the mapping are void afterwards.
            ///
            /// # Errors
            /// If it would have to move and may not; as for a new mapping; or if pages are shared with another mapping.
            pub unsafe fn remap(&mut self, new_len: usize, options: RemapOptions) -> io::Result<()> {
                self.$part.resize(new_len, options.may_move)
            }

            /// The first byte.
            #[must_use]
            pub fn as_ptr(&self) -> *const u8 {
                self.$part.ptr().as_ptr()
            }

            /// Length in bytes.
            #[must_use]
            pub fn len(&self) -> usize {
                self.$part.len
            }

            /// Whether it has no bytes.
            #[must_use]
            pub fn is_empty(&self) -> bool {
                self.$part.len == 0
            }
        }
    };
}

common!(Mmap, 0);
common!(MmapMut, part);
common!(MmapRaw, 0);

/// Flushing, for those that can be written through.
macro_rules! flush {
    ($name:ident) => {
        impl $name {
            /// Has all changes written to the file and brought to the disk. What was stored before is there when this
            /// returns.
            ///
            /// # Errors
            /// `StorageFull` or what else the file system says; what could not be written stays in memory, and is written
            /// by a later flush or when it is evicted.
            pub fn flush(&self) -> io::Result<()> {
                self.flush_until(0, self.len(), FlushUntil::Synced)
            }

            /// Has writing all changes begun; waits for nothing.
            ///
            /// # Errors
            /// A lost daemon.
            pub fn flush_async(&self) -> io::Result<()> {
                self.flush_until(0, self.len(), FlushUntil::Begun)
            }

            /// [`Self::flush`] of the pages around `len` bytes from `offset` on.
            ///
            /// # Errors
            /// As there; `InvalidInput` for bytes outside the mapping.
            pub fn flush_range(&self, offset: usize, len: usize) -> io::Result<()> {
                self.flush_until(offset, len, FlushUntil::Synced)
            }

            /// [`Self::flush_async`] of the pages around `len` bytes from `offset` on.
            ///
            /// # Errors
            /// As there; `InvalidInput` for bytes outside the mapping.
            pub fn flush_async_range(&self, offset: usize, len: usize) -> io::Result<()> {
                self.flush_until(offset, len, FlushUntil::Begun)
            }
        }
    };
}

flush!(MmapMut);
flush!(MmapRaw);

impl Mmap {
    /// [`MmapOptions::map`] with all as by default.
    ///
    /// # Safety
    /// As there.
    ///
    /// # Errors
    /// As there.
    pub unsafe fn map<T: MmapAsRawDesc>(file: T) -> io::Result<Self> {
        // SAFETY: the caller's.
        unsafe { MmapOptions::new().map(file) }
    }

    /// Allows writing, to the file if the mapping shares it.
    ///
    /// # Errors
    /// If the file was not open for writing, or another mapping writes to it; or if swap has no room for the changes.
    pub fn make_mut(self) -> io::Result<MmapMut> {
        self.0.make_writable()?;
        Ok(MmapMut::plain(self.0))
    }
}

impl MmapMut {
    pub(super) fn plain(part: Part) -> Self {
        Self { part, journal: None }
    }

    pub(super) fn atomic(part: Part, journal: Journal, offset: u64) -> Self {
        Self { part, journal: Some(Box::new((Mutex::new(journal), offset))) }
    }

    /// [`MmapOptions::map_mut`] with all as by default.
    ///
    /// # Safety
    /// As there.
    ///
    /// # Errors
    /// As there.
    pub unsafe fn map_mut<T: MmapAsRawDesc>(file: T) -> io::Result<Self> {
        // SAFETY: the caller's.
        unsafe { MmapOptions::new().map_mut(file) }
    }

    /// Zeros, `length` bytes of them.
    ///
    /// # Errors
    /// As [`MmapOptions::map_anon`].
    pub fn map_anon(length: usize) -> io::Result<Self> {
        MmapOptions::new().len(length).map_anon()
    }

    fn flush_until(&self, offset: usize, len: usize, until: FlushUntil) -> io::Result<()> {
        match &self.journal {
            Some(_) => self.flush_atomic_range(offset, len),
            None => self.part.flush(offset, len, until),
        }
    }

    /// Takes the right to write away.
    ///
    /// # Errors
    /// None at present.
    pub fn make_read_only(self) -> io::Result<Mmap> {
        Ok(Mmap(self.part))
    }

    /// Always refused: memory that is paged cannot be executed.
    ///
    /// # Errors
    /// Always.
    pub fn make_exec(self) -> io::Result<Mmap> {
        Err(not_executable())
    }
}

impl MmapRaw {
    /// [`MmapOptions::map_raw`] with all as by default.
    ///
    /// # Errors
    /// As there.
    pub fn map_raw<T: MmapAsRawDesc>(file: T) -> io::Result<Self> {
        MmapOptions::new().map_raw(file)
    }

    /// The first byte, to be written to. Not of a mapping that was made for reading only: such changes are lost.
    #[must_use]
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.0.ptr().as_ptr()
    }

    fn flush_until(&self, offset: usize, len: usize, until: FlushUntil) -> io::Result<()> {
        self.0.flush(offset, len, until)
    }
}

impl From<Mmap> for MmapRaw {
    fn from(mmap: Mmap) -> Self {
        Self(mmap.0)
    }
}

impl From<MmapMut> for MmapRaw {
    /// Of a mapping that is flushed atomically, changes can no longer be flushed.
    fn from(mmap: MmapMut) -> Self {
        Self(mmap.part)
    }
}

impl Deref for Mmap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_slice()
    }
}

impl Deref for MmapMut {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.part.as_slice()
    }
}

impl DerefMut for MmapMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.part.as_mut_slice()
    }
}

impl AsRef<[u8]> for Mmap {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsRef<[u8]> for MmapMut {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for MmapMut {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

// SAFETY: the bytes are in a region, which does not move with the value.
unsafe impl stable_deref_trait::StableDeref for Mmap {}
// SAFETY: as above.
unsafe impl stable_deref_trait::StableDeref for MmapMut {}

macro_rules! debug {
    ($name:ident) => {
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name))
                    .field("ptr", &self.as_ptr())
                    .field("len", &self.len())
                    .finish()
            }
        }
    };
}

debug!(Mmap);
debug!(MmapMut);
debug!(MmapRaw);
