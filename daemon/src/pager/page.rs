//! A page's name and the three words that the page table keeps about it.
//!
//! ```text
//! word   bits 0–3 state | 4–15 flags | 16–31 buffer | 32–63 slot
//! hash   keyed hash of the bytes in the slot, and of the packed copy
//! aux    flag PACKED_COPY: place of the packed copy in the warm pool (see `pager::warm`)
//!        else, state Filled, or Mapping with UNPACK: the eight bytes that fill the page
//!        else, state Cold: when it was evicted, as the number of evictions before
//! ```

use std::fmt;

/// A page by region number (16 bits) and index in the region (48 bits). Stays the same when `mremap` moves the page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId(u64);

impl PageId {
    const INDEX_BITS: u32 = 48;

    /// Page `index` of region `region`.
    #[must_use]
    pub fn new(region: u16, index: u64) -> Self {
        debug_assert!(index >> Self::INDEX_BITS == 0);
        Self(u64::from(region) << Self::INDEX_BITS | index)
    }

    /// The region's number.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "16 bits are left after the shift")]
    pub fn region(self) -> u16 {
        (self.0 >> Self::INDEX_BITS) as u16
    }

    /// The page's place in its region.
    #[must_use]
    pub fn index(self) -> u64 {
        self.0 & ((1 << Self::INDEX_BITS) - 1)
    }

    /// The name as one word, for the warm pool.
    #[must_use]
    pub fn to_word(self) -> u64 {
        self.0
    }

    /// The name that [`PageId::to_word`] gave.
    #[must_use]
    pub fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// The page `n` places further on in the same region.
    #[must_use]
    pub fn plus(self, n: u64) -> Self {
        Self::new(self.region(), self.index() + n)
    }
}

impl fmt::Debug for PageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.region(), self.index())
    }
}

/// Number of a slot in the swap file.
pub type Slot = u32;
/// Number of an I/O buffer.
pub type Buffer = u16;

/// Who owns a page's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum State {
    /// Nobody: all zeros. What never was touched has this state.
    Zero = 0,
    /// The client's memory.
    Hot = 1,
    /// The client's memory or the ring: the agent is moving it out.
    Evicting = 2,
    /// The buffer; on its way to the slot.
    Writing = 3,
    /// The slot.
    Cold = 4,
    /// The slot; on its way to the buffer.
    Fetching = 5,
    /// The slot, with a checked copy in the buffer that is not mapped until somebody faults.
    Held = 6,
    /// The buffer, or nobody (zeros); about to be mapped.
    Mapping = 7,
    /// Nobody: lost. An access must not succeed.
    Poisoned = 8,
    /// The client's memory, if it is still there: the agent is asked after a discard.
    Probing = 9,
    /// The packed copy in the warm pool.
    Warm = 10,
    /// The table: eight bytes, again and again.
    Filled = 11,
    /// The client's memory: the agent copies it out, for the file of its region.
    Copying = 12,
}

impl State {
    const ALL: [Self; 13] = [
        Self::Zero,
        Self::Hot,
        Self::Evicting,
        Self::Writing,
        Self::Cold,
        Self::Fetching,
        Self::Held,
        Self::Mapping,
        Self::Poisoned,
        Self::Probing,
        Self::Warm,
        Self::Filled,
        Self::Copying,
    ];

    /// Whether a page in this state has a frame, or one set aside for it.
    #[must_use]
    pub fn has_frame(self) -> bool {
        matches!(
            self,
            Self::Hot
                | Self::Evicting
                | Self::Fetching
                | Self::Held
                | Self::Mapping
                | Self::Probing
                | Self::Copying
        )
    }

    /// Whether the page has content that only the daemon holds: in the swap file, on the way to it, or packed.
    #[must_use]
    pub fn is_swapped(self) -> bool {
        matches!(self, Self::Writing | Self::Cold | Self::Fetching | Self::Held | Self::Warm | Self::Filled)
    }
}

/// The first word of a page's entry in the table.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Word(pub u64);

/// Stands in the FIFO.
pub const QUEUED: u64 = 1 << 4;
/// The slot field names a slot with a valid copy (in `Writing` and `Fetching`: the one in use).
pub const HAS_SLOT: u64 = 1 << 5;
/// Was discarded while present; not to be evicted until it is known whether it still is.
pub const FRESH: u64 = 1 << 6;
/// The agent could not move it.
pub const STUCK: u64 = 1 << 7;
/// A thread waits for it.
pub const WANTED: u64 = 1 << 8;
/// The slot field names a slot whose write is still in flight while the page is hot again.
pub const PENDING_SLOT: u64 = 1 << 9;
/// `Mapping` takes its bytes from the buffer field, else zeros.
pub const FROM_BUFFER: u64 = 1 << 10;
/// A read of it has failed once; another failure poisons it.
pub const RETRIED: u64 = 1 << 11;
/// The third word names a valid packed copy. In a state other than `Warm` it is one that nobody needs: the pool drops it
/// when it wants the room.
pub const PACKED_COPY: u64 = 1 << 12;
/// The buffer is not filled yet: the bytes are to be unpacked into it (`Mapping` and `Writing`).
pub const UNPACK: u64 = 1 << 13;
/// Has come back soon after an eviction: belongs into the main queue.
pub const MAIN: u64 = 1 << 14;
/// The hash is that of bytes which the file of the region has.
pub const IN_FILE: u64 = 1 << 15;

impl Word {
    /// The state.
    #[must_use]
    pub fn state(self) -> State {
        // Only `with_state` writes these bits.
        State::ALL[usize::from((self.0 & 0xf) as u8).min(State::ALL.len() - 1)]
    }

    /// The same with another state.
    #[must_use]
    pub fn with_state(self, state: State) -> Self {
        Self(self.0 & !0xf | state as u64)
    }

    /// Whether all of `flags` are set.
    #[must_use]
    pub fn has(self, flags: u64) -> bool {
        self.0 & flags == flags
    }

    /// Whether any of `flags` is set.
    #[must_use]
    pub fn has_any(self, flags: u64) -> bool {
        self.0 & flags != 0
    }

    /// The same with `flags` set.
    #[must_use]
    pub fn with(self, flags: u64) -> Self {
        Self(self.0 | flags)
    }

    /// The same with `flags` cleared.
    #[must_use]
    pub fn without(self, flags: u64) -> Self {
        Self(self.0 & !flags)
    }

    /// The buffer field.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "the field has 16 bits")]
    pub fn buffer(self) -> Buffer {
        (self.0 >> 16) as u16
    }

    /// The same with another buffer.
    #[must_use]
    pub fn with_buffer(self, buffer: Buffer) -> Self {
        Self(self.0 & !0xffff_0000 | u64::from(buffer) << 16)
    }

    /// The slot, if it holds a valid copy.
    #[must_use]
    pub fn slot(self) -> Option<Slot> {
        self.has(HAS_SLOT).then_some(self.slot_field())
    }

    /// The slot field, valid or not.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "the field has 32 bits")]
    pub fn slot_field(self) -> Slot {
        (self.0 >> 32) as u32
    }

    /// The same with another slot, `HAS_SLOT` set.
    #[must_use]
    pub fn with_slot(self, slot: Slot) -> Self {
        Self(self.0 & 0xffff_ffff | u64::from(slot) << 32).with(HAS_SLOT)
    }
}

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (QUEUED, "queued"),
            (HAS_SLOT, "slot"),
            (FRESH, "fresh"),
            (STUCK, "stuck"),
            (WANTED, "wanted"),
            (PENDING_SLOT, "pending"),
            (FROM_BUFFER, "buffer"),
            (RETRIED, "retried"),
            (PACKED_COPY, "packed"),
            (UNPACK, "unpack"),
            (MAIN, "main"),
            (IN_FILE, "in-file"),
        ];
        write!(f, "{:?}", self.state())?;
        for (_, name) in names.iter().filter(|(flag, _)| self.has(*flag)) {
            write!(f, "+{name}")?;
        }
        write!(f, " b{} s{}", self.buffer(), self.slot_field())
    }
}
