//! Slots: what one thread has to itself, its slabs and a few free blocks of each class, so that it allocates and frees
//! without a lock.
//!
//! A thread claims a slot when it first allocates. Nothing runs when it ends: the slot stays as it is, and another thread
//! that needs one finds that the owner does not live any more and takes over slabs and blocks. So no destructor of a
//! thread-local can come too early or too late. Threads beyond [`MAX_SLOTS`] share slot 0 and its lock.

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::class::{ALL_KEPT, CLASSES, Class};
use super::lock::{Guarded, Lock};
use super::run::NIL;
use super::sys;
use super::table::{Table, Zeroed};

/// Most slots. A thread beyond that shares one with others.
pub(super) const MAX_SLOTS: u32 = 4096;
/// The slot that is shared.
pub(super) const COMMON: u16 = 0;
/// How many slots a new thread looks at for one whose owner has ended.
const PROBES: u32 = 16;
/// How many heaps a thread can use in turn without searching for its slot again.
const HEAPS: usize = 4;

/// See the module. All zeros is a slot without owner, slabs and blocks.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct Slot {
    /// For `lists`, and the `avail` bitmaps of its slabs.
    pub(super) lock: Lock,
    /// The thread; 0 if none.
    owner: AtomicU32,
    number: AtomicU32,
    /// First listed slab of each class.
    pub(super) lists: [AtomicU32; CLASSES],
    /// The rest is the owner's; of the common slot, under its lock.
    lens: [AtomicU32; CLASSES],
    kept: [AtomicU64; ALL_KEPT],
}

// SAFETY: zero is a number and a free lock.
unsafe impl Zeroed for Slot {}

/// A block of a slab, in 64 bits: the run and the block's number in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) run: u32,
    pub(super) block: u32,
}

impl Slot {
    /// Its number.
    #[inline]
    pub(super) fn number(&self) -> u16 {
        // There are 4096.
        #[allow(clippy::cast_possible_truncation, reason = "see above")]
        let number = self.number.load(Ordering::Relaxed) as u16;
        number
    }

    /// Whether its thread has ended, or it has none.
    pub(super) fn is_orphan(&self) -> bool {
        let owner = self.owner.load(Ordering::Relaxed);
        owner == 0 || !sys::thread_lives(owner)
    }

    /// The number of blocks kept of a class.
    #[inline]
    pub(super) fn kept(&self, class: u8) -> u32 {
        self.lens[usize::from(class)].load(Ordering::Relaxed)
    }

    /// Takes the block that was kept last.
    #[inline]
    pub(super) fn pop(&self, class: u8, of: &Class) -> Option<Place> {
        let len = &self.lens[usize::from(class)];
        let rest = len.load(Ordering::Relaxed).checked_sub(1)?;
        len.store(rest, Ordering::Relaxed);
        Some(self.place(of, rest))
    }

    /// Keeps a block; false if there are as many as may be.
    #[inline]
    pub(super) fn push(&self, class: u8, of: &Class, place: Place) -> bool {
        let len = &self.lens[usize::from(class)];
        let at = len.load(Ordering::Relaxed);
        if at >= of.kept {
            return false;
        }
        let word = u64::from(place.run) << 32 | u64::from(place.block);
        self.kept[(of.kept_from + at) as usize].store(word, Ordering::Relaxed);
        len.store(at + 1, Ordering::Relaxed);
        true
    }

    /// The block that was kept as the `at`th, oldest first.
    #[inline]
    #[allow(clippy::cast_possible_truncation, reason = "the two halves of a word")]
    pub(super) fn place(&self, of: &Class, at: u32) -> Place {
        let word = self.kept[(of.kept_from + at) as usize].load(Ordering::Relaxed);
        Place { run: (word >> 32) as u32, block: word as u32 }
    }

    /// Forgets the `count` oldest blocks.
    pub(super) fn drop_oldest(&self, class: u8, of: &Class, count: u32) {
        let rest = self.kept(class) - count;
        for at in 0..rest {
            let word = self.kept[(of.kept_from + count + at) as usize].load(Ordering::Relaxed);
            self.kept[(of.kept_from + at) as usize].store(word, Ordering::Relaxed);
        }
        self.lens[usize::from(class)].store(rest, Ordering::Relaxed);
    }
}

/// All slots of a heap.
#[derive(Debug)]
pub(super) struct Slots {
    /// Names the heap in the threads' own memory; never given twice.
    id: u64,
    table: Table<Slot>,
    registry: Guarded<Registry>,
}

#[derive(Debug)]
struct Registry {
    count: u32,
    cursor: u32,
}

/// What a thread remembers of a heap that it uses.
struct Memory {
    heap: Cell<u64>,
    /// Null for the common slot.
    slot: Cell<*const Slot>,
}

thread_local! {
    /// Without a destructor, so that it needs neither memory nor registration, and lives as long as the thread.
    static MINE: [Memory; HEAPS] = const {
        [const { Memory { heap: Cell::new(0), slot: Cell::new(ptr::null()) } }; HEAPS]
    };
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl Slots {
    /// None if there are no addresses or no memory.
    pub(super) fn new() -> Option<Self> {
        let table = Table::new(MAX_SLOTS as usize)?;
        table.ensure(1).then(|| Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            table,
            registry: Guarded::new(Registry { count: 1, cursor: 1 }),
        })
    }

    /// The calling thread's slot; none if it has to share the common one.
    #[inline]
    pub(super) fn mine(&self) -> Option<&Slot> {
        #[allow(clippy::cast_possible_truncation, reason = "only the lowest bits matter")]
        let index = self.id as usize % HEAPS;
        MINE.with(|mine| {
            let memory = &mine[index];
            let slot = if memory.heap.get() == self.id { memory.slot.get() } else { self.claim(memory) };
            // SAFETY: null, or a slot of this heap's table, which does not move and lives as long as `self`: no other heap
            // ever has the same id.
            unsafe { slot.as_ref() }
        })
    }

    /// A slot by its number.
    #[inline]
    pub(super) fn get(&self, number: u16) -> &Slot {
        self.table.get(u32::from(number))
    }

    /// All slots that were ever used.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Slot> {
        let count = self.registry.lock().count;
        (0..count).map(|number| self.table.get(number))
    }

    /// As [`Slots::iter`], between [`Slots::hold`] and [`Slots::let_go`].
    pub(super) fn iter_held(&self) -> impl Iterator<Item = &Slot> {
        (0..self.count_held()).map(|number| self.table.get(number))
    }

    /// Bytes of RAM that the slots may take.
    pub(super) fn bytes(&self) -> usize {
        self.table.bytes()
    }

    /// Runs `act` on each slot that belongs to no living thread, the common one too, with its lock held and while nobody
    /// can claim it.
    pub(super) fn for_each_orphan(&self, mut act: impl FnMut(&Slot)) {
        let registry = self.registry.lock();
        for slot in (0..registry.count).map(|number| self.table.get(number)) {
            if slot.is_orphan() {
                slot.lock.lock();
                act(slot);
                slot.lock.unlock();
            }
        }
    }

    /// Takes the locks of all slots, and keeps new ones from coming.
    pub(super) fn hold(&self) {
        self.registry.bare().lock();
        // The registry is held, and so its count is stable, until `let_go`.
        for number in 0..self.count_held() {
            self.table.get(number).lock.lock();
        }
    }

    /// Undoes [`Slots::hold`].
    pub(super) fn let_go(&self) {
        for number in 0..self.count_held() {
            self.table.get(number).lock.unlock();
        }
        self.registry.bare().unlock();
    }

    /// In a forked child: this thread is the only one, and has another number than in the parent.
    pub(super) fn adopt(&self) {
        let mine = self.mine_if_any();
        for number in 1..self.count_held() {
            let slot = self.table.get(number);
            let owner = if ptr::eq(slot, mine) { sys::thread_id() } else { 0 };
            slot.owner.store(owner, Ordering::Relaxed);
        }
    }

    fn count_held(&self) -> u32 {
        // SAFETY: who calls this holds the lock.
        unsafe { self.registry.peek() }.count
    }

    fn mine_if_any(&self) -> *const Slot {
        #[allow(clippy::cast_possible_truncation, reason = "only the lowest bits matter")]
        let index = self.id as usize % HEAPS;
        MINE.with(|mine| {
            let memory = &mine[index];
            if memory.heap.get() == self.id { memory.slot.get() } else { ptr::null() }
        })
    }

    #[cold]
    fn claim(&self, memory: &Memory) -> *const Slot {
        let slot = self.find_slot().map_or(ptr::null(), ptr::from_ref);
        memory.slot.set(slot);
        memory.heap.set(self.id);
        slot
    }

    /// The slot that this thread had before it used other heaps, or that of a thread that has ended, or a new one.
    fn find_slot(&self) -> Option<&Slot> {
        let me = sys::thread_id();
        let mut registry = self.registry.lock();
        let mut slots = (1..registry.count).map(|number| self.table.get(number));
        if let Some(slot) = slots.find(|slot| slot.owner.load(Ordering::Relaxed) == me) {
            return Some(slot);
        }
        for _ in 0..PROBES.min(registry.count - 1) {
            registry.cursor = if registry.cursor + 1 < registry.count { registry.cursor + 1 } else { 1 };
            let slot = self.table.get(registry.cursor);
            if slot.is_orphan() {
                // Whatever the last owner did happened before the kernel let go of it, as the check above has found.
                slot.owner.store(me, Ordering::Relaxed);
                return Some(slot);
            }
        }
        if registry.count == MAX_SLOTS || !self.table.ensure(registry.count as usize + 1) {
            return None;
        }
        let slot = self.table.get(registry.count);
        slot.number.store(registry.count, Ordering::Relaxed);
        slot.owner.store(me, Ordering::Relaxed);
        registry.count += 1;
        Some(slot)
    }
}

const _: () = assert!(NIL == 0, "an empty list is all zeros");
