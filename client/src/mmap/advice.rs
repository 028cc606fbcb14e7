//! Hints for mappings, by the names and numbers of `madvise`.

/// A hint that changes no content.
#[repr(i32)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash)]
pub enum Advice {
    /// No special pattern.
    Normal = libc::MADV_NORMAL,
    /// Read at random: no readahead.
    Random = libc::MADV_RANDOM,
    /// Read from front to back: readahead from the start.
    Sequential = libc::MADV_SEQUENTIAL,
    /// Needed soon: read in behind the caller's back.
    WillNeed = libc::MADV_WILLNEED,
    /// Not inherited by a child; mappings never are.
    DontFork = libc::MADV_DONTFORK,
    /// Inherited by a child: refused, a child would read zeros.
    DoFork = libc::MADV_DOFORK,
    /// Pages of equal content may be merged: refused, merged pages cannot be evicted.
    Mergeable = libc::MADV_MERGEABLE,
    /// They may not be merged; they never are.
    Unmergeable = libc::MADV_UNMERGEABLE,
    /// Use huge pages: refused, pages are paged one by one.
    HugePage = libc::MADV_HUGEPAGE,
    /// Use no huge pages; none ever are.
    NoHugePage = libc::MADV_NOHUGEPAGE,
    /// Left out of core dumps; mappings always are.
    DontDump = libc::MADV_DONTDUMP,
    /// Part of core dumps: refused, what is not resident could not be.
    DoDump = libc::MADV_DODUMP,
    /// Poison pages, for tests of memory failures: refused.
    HwPoison = libc::MADV_HWPOISON,
    /// Read in now, as much as the budget allows; waits for it.
    PopulateRead = libc::MADV_POPULATE_READ,
    /// The same, for writing.
    PopulateWrite = libc::MADV_POPULATE_WRITE,
}

/// A hint that may change content: for those who know that nobody minds.
#[repr(i32)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash)]
pub enum UncheckedAdvice {
    /// Not needed. Of a mapping that shares the file, pages are written back and leave RAM. Elsewhere their changes are
    /// dropped: they read as the file has them, or as zeros if there is none.
    DontNeed = libc::MADV_DONTNEED,
    /// The content may be dropped at some time from now on, until it is written to. Of anonymous and private mappings.
    Free = libc::MADV_FREE,
    /// Makes a hole in the file: refused; use `fallocate` on the file.
    Remove = libc::MADV_REMOVE,
}

impl Advice {
    /// Whether mappings of this module take this hint.
    #[must_use]
    pub fn is_supported(self) -> bool {
        !matches!(self, Self::DoFork | Self::Mergeable | Self::HugePage | Self::DoDump | Self::HwPoison)
    }
}

impl UncheckedAdvice {
    /// Whether mappings of this module take this hint.
    #[must_use]
    pub fn is_supported(self) -> bool {
        self != Self::Remove
    }
}
