//! The allocator over any [`Backing`]: finds the block of a pointer, and passes what is asked on to slabs or pages.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::backing::{Backing, Unavailable};
use super::class::{MAX_SMALL, PAGE, TABLE, fitting};
use super::error::{BadPointer, ReallocError};
use super::lock::{Guarded, Lock};
use super::pages::{Pages, Space};
use super::run::State;
use super::slab::{GaveBack, clear, set, split};
use super::slots::{COMMON, Place, Slot, Slots};

/// Dirty runs dropped by one call at most, so that no call takes long.
const MOST_PURGES: u32 = 8;
/// Runs of at least this many pages are made zero by dropping their content, not by writing.
const DISCARD_PAGES: u32 = 16;
/// See [`Core::set_dirty_limit`].
const DIRTY_LIMIT: usize = 16 << 20;

/// An allocator whose records are all outside of the memory that it hands out: neither allocating nor freeing touches that
/// memory, so blocks that are swapped out cost no page fault.
///
/// Blocks of up to 16 KiB come from slabs, larger ones are runs of pages. Each call takes constant time, whatever the size
/// of the heap, but for the system calls that make memory usable or drop its content. Nothing here allocates otherwise
/// or panics, so that it can be what `malloc` is made of: its own tables are anonymous mappings that grow as needed
/// (about 0.3 % of the heap, 3 % if it is full of 16-byte blocks).
///
/// Any number of threads may use it. After `fork` the child may too, if [`Core::prepare_fork`] and its kin are called and
/// the backing is inherited.
#[derive(Debug)]
pub struct Core<B> {
    pub(super) space: Space<B>,
    pub(super) pages: Guarded<Pages>,
    pub(super) slots: Slots,
    /// Held while content is dropped; so it is not under way when the process forks.
    purging: Lock,
    dirty_limit: AtomicU32,
    misuse: AtomicU64,
}

/// Where a pointer leads.
#[derive(Debug, Clone, Copy)]
enum Block {
    /// A block of a slab, in use or not.
    Small(Place),
    /// The start of a run that is one block.
    Large(u32),
}

impl<B: Backing> Core<B> {
    /// An allocator over a backing of which nothing is committed yet. None if there are no addresses for its tables, which
    /// reserve 1/30 of what the backing does. Of a backing beyond 16 TiB the rest is not used.
    #[must_use]
    pub fn new(backing: B) -> Option<Self> {
        let space = Space::new(backing)?;
        let pages = Guarded::new(Pages::new());
        let slots = Slots::new()?;
        let dirty_limit = AtomicU32::new(pages_of(DIRTY_LIMIT)?);
        Some(Self { space, pages, slots, purging: Lock::new(), dirty_limit, misuse: AtomicU64::new(0) })
    }

    /// What it allocates from.
    #[must_use]
    pub fn backing(&self) -> &B {
        &self.space.backing
    }

    /// Free pages whose content is not dropped yet may be this many bytes; they are what is used next. Beyond that the
    /// oldest are dropped. The default is 16 MiB.
    pub fn set_dirty_limit(&self, bytes: usize) {
        self.dirty_limit.store(pages_of(bytes).unwrap_or(u32::MAX), Ordering::Relaxed);
    }

    /// A block of at least `size` bytes (16 if it is zero), its address a multiple of `align` (of 16 at least). Its content is
    /// undefined.
    ///
    /// # Errors
    /// No memory is left, or the size is impossible, or the alignment not a power of two.
    #[inline]
    pub fn alloc(&self, size: usize, align: usize) -> Result<NonNull<u8>, Unavailable> {
        if !align.is_power_of_two() {
            return Err(Unavailable);
        }
        match fitting(size, align) {
            Some(class) => self.alloc_small(class),
            None => self.alloc_large(size, align).map(|(id, _)| self.address(self.space.range(id).start)),
        }
    }

    /// As [`Core::alloc`], filled with zeros. Large blocks that read as zeros already are not touched.
    ///
    /// # Errors
    /// As [`Core::alloc`].
    pub fn alloc_zeroed(&self, size: usize, align: usize) -> Result<NonNull<u8>, Unavailable> {
        if !align.is_power_of_two() {
            return Err(Unavailable);
        }
        if let Some(class) = fitting(size, align) {
            let block = self.alloc_small(class)?;
            // SAFETY: the block is ours and has at least `size` bytes.
            unsafe { block.write_bytes(0, size) };
            return Ok(block);
        }
        let (id, clean) = self.alloc_large(size, align)?;
        let range = self.space.range(id);
        let block = self.address(range.start);
        if !clean {
            let many = self.space.runs.get(id).pages() >= DISCARD_PAGES;
            // SAFETY: the run is ours, and its content does not matter.
            let dropped = many && unsafe { self.space.backing.discard(range.clone()) }.is_ok();
            if !dropped {
                // SAFETY: as above.
                unsafe { block.write_bytes(0, range.len()) };
            }
        }
        Ok(block)
    }

    /// Frees a block. Touches none of it.
    ///
    /// # Errors
    /// The pointer does not lead to the start of a block that is in use. Nothing has changed then, but for the count in
    /// [`super::Stats::misuse`]. A block that was freed and has been handed out again since is in use.
    ///
    /// # Safety
    /// Nobody may use the block any more.
    #[inline]
    pub unsafe fn free(&self, block: NonNull<u8>) -> Result<(), BadPointer> {
        let freed = match self.find(block) {
            Ok(Block::Small(place)) => self.free_small(place),
            Ok(Block::Large(id)) => self.free_large(id, block),
            Err(bad) => Err(bad),
        };
        match freed {
            Ok(false) => Ok(()),
            Ok(true) => {
                self.purge();
                Ok(())
            }
            Err(bad) => {
                self.count_misuse();
                Err(bad)
            }
        }
    }

    /// Changes the size of a block, where it is if possible, and gives its address from now on. Of what was in it the first
    /// `size` bytes are kept.
    ///
    /// # Errors
    /// No memory is left, or the pointer is bad; the block is unchanged then.
    ///
    /// # Safety
    /// If the address changes, nobody may use the old one any more.
    pub unsafe fn realloc(
        &self,
        block: NonNull<u8>,
        size: usize,
        align: usize,
    ) -> Result<NonNull<u8>, ReallocError> {
        let old = self.usable_size(block).inspect_err(|_| self.count_misuse())?;
        if align.is_power_of_two()
            && block.addr().get().is_multiple_of(align)
            && self.resize(block, size, old)
        {
            return Ok(block);
        }
        let new = match self.alloc(size, align) {
            Ok(new) => new,
            // Shrinking never fails, if need be nothing is won by it.
            Err(_) if size <= old && block.addr().get().is_multiple_of(align) => return Ok(block),
            Err(error) => return Err(error.into()),
        };
        // SAFETY: both blocks have that many bytes, and do not overlap since both are in use.
        unsafe { new.copy_from_nonoverlapping(block, old.min(size)) };
        // SAFETY: the caller's.
        unsafe { self.free(block) }.map(|()| new).map_err(ReallocError::from)
    }

    /// How many bytes of a block may be used: what was asked for at least.
    ///
    /// # Errors
    /// The pointer does not lead to the start of a block that is in use.
    pub fn usable_size(&self, block: NonNull<u8>) -> Result<usize, BadPointer> {
        match self.find(block)? {
            Block::Small(place) => {
                let run = self.space.runs.get(place.run);
                let (word, bit) = split(place.block);
                let free = run.avail[word].load(Ordering::Relaxed)
                    | run.freed[word].load(Ordering::Relaxed)
                    | run.kept[word].load(Ordering::Relaxed);
                if free & bit != 0 {
                    return Err(BadPointer::NotInUse);
                }
                Ok(TABLE[usize::from(run.class())].size as usize)
            }
            Block::Large(id) => Ok(self.space.runs.get(id).pages() as usize * PAGE),
        }
    }

    /// Whether the address is in the range that blocks of this heap can be in. True also for what is not a block.
    #[inline]
    #[must_use]
    pub fn owns(&self, address: *const u8) -> bool {
        self.offset(address) < self.space.limit as usize * PAGE
    }

    /// Gives back to the backing what is free: blocks that this thread keeps, content of free pages, pages at the top but
    /// for `keep` bytes.
    pub fn trim(&self, keep: usize) {
        if let Some(slot) = self.slots.mine() {
            slot.lock.lock();
            self.flush_all(slot);
            slot.lock.unlock();
        }
        self.slots.for_each_orphan(|slot| self.flush_all(slot));
        for slot in self.slots.iter() {
            slot.lock.lock();
            self.release_all(slot);
            slot.lock.unlock();
        }
        self.purging.lock();
        let mut go_on = true;
        while go_on {
            go_on = self.purge_one(0);
        }
        self.pages.lock().lower_top(&self.space, pages_of(keep).unwrap_or(u32::MAX));
        self.purging.unlock();
    }

    /// Waits until no other thread is in the middle of anything, and keeps it so: to be called before `fork`, with
    /// [`Core::after_fork_parent`] and [`Core::after_fork_child`] behind it. Until then this thread must not use the heap.
    pub fn prepare_fork(&self) {
        self.slots.hold();
        self.purging.lock();
        self.pages.bare().lock();
    }

    /// Undoes [`Core::prepare_fork`] in the parent, also if `fork` failed.
    pub fn after_fork_parent(&self) {
        self.pages.bare().unlock();
        self.purging.unlock();
        self.slots.let_go();
    }

    /// Undoes [`Core::prepare_fork`] in the child, where what other threads kept falls to those that come.
    pub fn after_fork_child(&self) {
        self.slots.adopt();
        self.after_fork_parent();
    }

    pub(super) fn count_misuse(&self) {
        self.misuse.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn misuse(&self) -> u64 {
        self.misuse.load(Ordering::Relaxed)
    }

    #[inline]
    fn alloc_small(&self, class: u8) -> Result<NonNull<u8>, Unavailable> {
        match self.slots.mine() {
            Some(slot) => loop {
                if let Some(block) = self.pop(slot, class) {
                    return Ok(block);
                }
                slot.lock.lock();
                let filled = self.refill(slot, class);
                slot.lock.unlock();
                filled?;
            },
            None => self.alloc_common(class),
        }
    }

    #[cold]
    fn alloc_common(&self, class: u8) -> Result<NonNull<u8>, Unavailable> {
        let slot = self.slots.get(COMMON);
        slot.lock.lock();
        let block = loop {
            if let Some(block) = self.pop(slot, class) {
                break Ok(block);
            }
            if let Err(error) = self.refill(slot, class) {
                break Err(error);
            }
        };
        slot.lock.unlock();
        block
    }

    /// A kept block, from now on in use.
    #[inline]
    fn pop(&self, slot: &Slot, class: u8) -> Option<NonNull<u8>> {
        let of = &TABLE[usize::from(class)];
        loop {
            let place = slot.pop(class, of)?;
            let run = self.space.runs.get(place.run);
            let (word, bit) = split(place.block);
            clear(&run.kept[word], bit);
            if run.freed[word].load(Ordering::Relaxed) & bit == 0 {
                let offset = run.start() as usize * PAGE + (place.block * of.size) as usize;
                return Some(self.address(offset));
            }
            // Freed twice, by two threads at the same moment: it will be collected as the other one's.
            self.count_misuse();
        }
    }

    fn alloc_large(&self, size: usize, align: usize) -> Result<(u32, bool), Unavailable> {
        let pages = pages_of(size).ok_or(Unavailable)?.max(1);
        let align = pages_of(align).ok_or(Unavailable)?;
        self.pages.lock().take(&self.space, pages, align)
    }

    #[inline]
    fn free_small(&self, place: Place) -> Result<GaveBack, BadPointer> {
        let run = self.space.runs.get(place.run);
        let (word, bit) = split(place.block);
        let before = run.avail[word].load(Ordering::Relaxed) | run.kept[word].load(Ordering::Relaxed);
        if (before | run.freed[word].load(Ordering::Relaxed)) & bit != 0 {
            return Err(BadPointer::NotInUse);
        }
        match self.slots.mine() {
            Some(slot) if slot.number() == run.owner() => Ok(self.keep(slot, run.class(), place)),
            _ => self.free_elsewhere(place),
        }
    }

    /// Keeps a block of a slab of the thread's own.
    #[inline]
    fn keep(&self, slot: &Slot, class: u8, place: Place) -> GaveBack {
        let of = &TABLE[usize::from(class)];
        let (word, bit) = split(place.block);
        let mut gave_back = false;
        if slot.kept(class) == of.kept {
            slot.lock.lock();
            gave_back = self.flush(slot, class, of.kept / 2);
            slot.lock.unlock();
        }
        set(&self.space.runs.get(place.run).kept[word], bit);
        slot.push(class, of, place);
        gave_back
    }

    /// Frees a block of another thread's slab.
    fn free_elsewhere(&self, place: Place) -> Result<GaveBack, BadPointer> {
        let run = self.space.runs.get(place.run);
        let (word, bit) = split(place.block);
        let before = run.freed[word].fetch_or(bit, Ordering::SeqCst);
        if before & bit != 0 {
            return Err(BadPointer::NotInUse);
        }
        let avail = run.avail[word].load(Ordering::SeqCst);
        if (avail | run.kept[word].load(Ordering::SeqCst)) & bit != 0 && self.was_free(place) {
            return Err(BadPointer::NotInUse);
        }
        let all = before | bit | avail;
        let complete = all == TABLE[usize::from(run.class())].mask(word);
        let settle =
            run.state() == State::Full || complete && Self::is_empty(run, &TABLE[usize::from(run.class())]);
        Ok(settle && self.settle(place.run))
    }

    /// Whether a block that has just been marked as freed, and is among those that its slot may hand out, was there before.
    /// It may also have come there by our mark, or its slab be another one since: then the mark is gone, which is certain
    /// only while the slot collects nothing. If it was free, takes the mark back.
    #[cold]
    fn was_free(&self, place: Place) -> bool {
        let run = self.space.runs.get(place.run);
        let (word, bit) = split(place.block);
        let owner = run.owner();
        let slot = self.slots.get(owner);
        slot.lock.lock();
        let free = run.avail[word].load(Ordering::SeqCst) | run.kept[word].load(Ordering::SeqCst);
        let twice = run.owner() == owner && run.freed[word].load(Ordering::SeqCst) & free & bit != 0;
        if twice {
            run.freed[word].fetch_and(!bit, Ordering::SeqCst);
        }
        slot.lock.unlock();
        twice
    }

    fn free_large(&self, id: u32, block: NonNull<u8>) -> Result<GaveBack, BadPointer> {
        let mut pages = self.pages.lock();
        // Once more, with the lock: another thread may have freed it since.
        let run = self.space.runs.get(id);
        let offset = self.offset(block.as_ptr());
        if run.state() != State::Large || run.start() as usize * PAGE != offset {
            return Err(BadPointer::NotInUse);
        }
        pages.give(&self.space, id);
        Ok(pages.dirty_pages > self.dirty_limit.load(Ordering::Relaxed))
    }

    /// Whether the block can serve for `size` bytes without moving, and if so makes it.
    fn resize(&self, block: NonNull<u8>, size: usize, old: usize) -> bool {
        let Ok(Block::Large(id)) = self.find(block) else {
            // A small block may be up to twice as large as needed.
            return size <= old && size > old / 2 || fitting(size, 1) == fitting(old, 1);
        };
        let (Some(pages), true) = (pages_of(size), size > MAX_SMALL / 2) else { return false };
        let mut guard = self.pages.lock();
        let has = self.space.runs.get(id).pages();
        let done = if pages > has {
            guard.extend(&self.space, id, pages)
        } else {
            guard.shrink(&self.space, id, pages).is_ok()
        };
        drop(guard);
        if pages < has {
            self.purge();
        }
        done
    }

    /// What block begins at an address.
    #[inline]
    fn find(&self, block: NonNull<u8>) -> Result<Block, BadPointer> {
        let offset = self.offset(block.as_ptr());
        if offset >= self.space.top() as usize * PAGE {
            return Err(if self.owns(block.as_ptr()) { BadPointer::NotInUse } else { BadPointer::Foreign });
        }
        // Below the top, which has 32 bits.
        #[allow(clippy::cast_possible_truncation, reason = "see above")]
        let page = (offset / PAGE) as u32;
        let id = self.space.noted(page);
        let run = self.space.runs.get(id);
        // A note at a page inside of a large or a free run is old, and leads to a run that may not contain the page.
        let within = offset.wrapping_sub(run.start() as usize * PAGE);
        match run.state() {
            State::Listed | State::Full => {
                let of = &TABLE[usize::from(run.class())];
                if within >= of.pages as usize * PAGE {
                    return Err(BadPointer::NoBlock);
                }
                // A slab has 64 KiB at most.
                #[allow(clippy::cast_possible_truncation, reason = "see above")]
                let number = ((within as u64 * of.reciprocal) >> 32) as u32;
                if (number * of.size) as usize != within || number >= of.blocks {
                    return Err(BadPointer::NoBlock);
                }
                Ok(Block::Small(Place { run: id, block: number }))
            }
            State::Large if within == 0 => Ok(Block::Large(id)),
            State::Large => Err(BadPointer::NoBlock),
            _ => Err(BadPointer::NotInUse),
        }
    }

    #[inline]
    fn address(&self, offset: usize) -> NonNull<u8> {
        // SAFETY: offsets come from runs, which are within the backing.
        unsafe { self.space.backing.base().add(offset) }
    }

    #[inline]
    pub(super) fn offset(&self, address: *const u8) -> usize {
        address.addr().wrapping_sub(self.space.backing.base().addr().get())
    }

    /// Drops the content of dirty runs beyond the limit. If another thread does so already, it is left to it.
    #[cold]
    fn purge(&self) {
        let limit = self.dirty_limit.load(Ordering::Relaxed);
        if self.pages.lock().dirty_pages <= limit || !self.purging.try_lock() {
            return;
        }
        for _ in 0..MOST_PURGES {
            if !self.purge_one(limit) {
                break;
            }
        }
        self.purging.unlock();
    }

    /// Drops the content of the oldest dirty run if there are more dirty pages than `limit`. The caller holds `purging`.
    fn purge_one(&self, limit: u32) -> bool {
        let id = {
            let mut pages = self.pages.lock();
            let more = pages.dirty_pages > limit;
            let Some(id) = more.then(|| pages.begin_purge(&self.space)).flatten() else { return false };
            id
        };
        // SAFETY: the run is free and in no list, so nobody else gets it.
        let dropped = unsafe { self.space.backing.discard(self.space.range(id)) }.is_ok();
        self.pages.lock().end_purge(&self.space, id, dropped);
        dropped
    }

    /// Gives all kept blocks of a slot back to their slabs.
    fn flush_all(&self, slot: &Slot) {
        for class in 0..TABLE.len() {
            // There are 36.
            #[allow(clippy::cast_possible_truncation, reason = "see above")]
            let class = class as u8;
            self.flush(slot, class, slot.kept(class));
        }
    }

    /// Gives all empty slabs of a slot back.
    fn release_all(&self, slot: &Slot) {
        for class in 0..TABLE.len() {
            let mut id = slot.lists[class].load(Ordering::Relaxed);
            while id != super::run::NIL {
                let next = self.space.runs.get(id).next();
                // There are 36.
                #[allow(clippy::cast_possible_truncation, reason = "see above")]
                self.release_if_empty(slot, class as u8, id, true);
                id = next;
            }
        }
    }
}

/// Bytes as pages, rounded up.
fn pages_of(bytes: usize) -> Option<u32> {
    u32::try_from(bytes.div_ceil(PAGE)).ok()
}
