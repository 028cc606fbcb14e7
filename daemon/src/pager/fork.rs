//! Makes the pager of a forked child.
//!
//! The kernel copies the page tables, then raises an event and lets nobody map anything until the event has been read: so
//! what the pager has mapped by then is present on both sides, with the same bytes, and everything else is present on
//! neither. One kind of page is uncertain: one that the agent moved out between the copying and the reading may be present
//! in the child, with the bytes of the fork, while what was moved may have been changed since. The child takes it for moved
//! out, like the parent: if the child ever waits for it, it is not present there, so it left before the fork, and the bytes
//! are right; if it is present, the kernel refuses to map anything over it.
//!
//! Slots are shared, each side owning them; packed copies, and bytes that only a buffer holds, are copied.

use super::page::{
    Buffer, FRESH, FROM_BUFFER, HAS_SLOT, MAIN, PACKED_COPY, PageId, QUEUED, State, UNPACK, Word,
};
use super::table::{CHUNK_PAGES, Table};
use super::warm::Place;
use super::{Pager, Sizes, Store};
use crate::arena::Arena;

/// What a fork brings about.
#[derive(Debug)]
pub struct Forked<S> {
    /// The child's pager. It asks its agent for nothing before [`Pager::set_agent`].
    pub pager: Pager<S>,
    /// Pages whose bytes only a buffer of the parent has, and the child's buffer that shall have them: to be copied before
    /// either pager goes on, and answered with [`Forked::has_carried`].
    pub carried: Vec<(PageId, Buffer, Buffer)>,
    /// Pages that the parent's agent has: see [`Pager::settle_fork`].
    out: Vec<PageId>,
    /// The parent's count of pages that were discarded on their way out.
    discarded_out: u64,
}

impl<S: Store> Forked<S> {
    /// A page's bytes are in the child's buffer, with this hash: the parent need not know it.
    pub fn has_carried(&mut self, page: PageId, hash: u64) {
        self.pager.set_hash(page, hash);
    }

    /// Whether [`Pager::settle_fork`] has something to do, once the parent's [`Pager::evicting`] is zero.
    #[must_use]
    pub fn is_unsettled(&self) -> bool {
        !self.out.is_empty()
    }
}

impl<S: Store> Pager<S> {
    /// A pager for a child that was forked just before the event that was read last. What its committed pages claim in
    /// swap the caller has claimed. None if the arena is too small; nothing has changed then.
    pub fn fork(&mut self, store: S, arena: Arena, mut sizes: Sizes) -> Option<Forked<S>> {
        // Each page that is carried over needs a buffer for good; the agent's pages may have to be.
        let carried = self.write_buffers.len() - self.write_buffers.free();
        let most = u64::try_from(carried).unwrap_or(u64::MAX) + self.evicting();
        sizes.write_buffers =
            sizes.write_buffers.saturating_add(Buffer::try_from(most).unwrap_or(Buffer::MAX));
        let mut child = Self::new(store, arena, sizes);
        child.agentless = true;
        child.early.clone_from(&self.early);
        (child.warm_limit, child.evictions) = (self.warm_limit, self.evictions);
        let mut complete = true;
        child.regions = self.regions.fork(|region| {
            let table = Table::like(&region.table, &self.arena, &mut child.arena);
            complete &= table.is_some();
            child.table_bytes += table.as_ref().map_or(0, Table::bytes);
            child.stats.claimed_pages += region.committed.total();
            table
        });
        if !complete {
            return None;
        }
        let mut forked =
            Forked { pager: child, carried: Vec::new(), out: Vec::new(), discarded_out: self.discarded_out };
        for (number, region) in
            self.regions.iter().filter(|(_, region)| !region.closing && region.file.is_none())
        {
            let mut index = 0;
            while index < region.pages {
                let page = PageId::new(number, index);
                if region.table.has_chunk(&self.arena, index) {
                    let word = region.table.word(&self.arena, index);
                    self.pass_on(page, word, &mut forked);
                    index += 1;
                } else {
                    index = (index + 1).next_multiple_of(CHUNK_PAGES);
                }
            }
        }
        for page in self.probation.iter().chain(&self.main).chain(&self.stuck) {
            let word = forked.pager.word(*page);
            if word.state() == State::Hot && !word.has(QUEUED) && !word.has(FRESH) {
                forked.pager.enqueue(*page);
            }
        }
        Some(forked)
    }

    /// Pages that a child would have to claim.
    #[must_use]
    pub fn claimed_by_fork(&self) -> u64 {
        let open = self.regions.iter().filter(|(_, region)| !region.closing && region.file.is_none());
        open.map(|(_, region)| region.committed.total()).sum()
    }

    /// Buffers in all.
    #[must_use]
    pub fn buffers(&self) -> usize {
        self.read_buffers.len() + self.write_buffers.len()
    }

    /// Deals with what the agent had when the child was forked, and has answered for now, or never will.
    pub fn settle_fork(&self, forked: &mut Forked<S>) {
        for page in std::mem::take(&mut forked.out) {
            let word = self.word(page);
            self.pass_on(page, word, forked);
            let child = &mut forked.pager;
            match word.state() {
                State::Hot if child.word(page).state() == State::Hot => child.enqueue(page),
                // It may have been discarded since the fork: then what it held is gone, unless the child has it in memory.
                State::Zero if self.discarded_out != forked.discarded_out => child.lose(page),
                State::Evicting => child.lose(page),
                _ => {}
            }
        }
        forked.out.clear();
    }

    /// Gives a page of the child the state that follows from the parent's.
    fn pass_on(&self, page: PageId, word: Word, forked: &mut Forked<S>) {
        let child = &mut forked.pager;
        let state = word.state();
        // What the agent has is settled later; zeros are nobody's.
        let zeros = state == State::Mapping && !word.has_any(FROM_BUFFER | UNPACK);
        if state == State::Evicting {
            // What was discarded before the fork is zeros.
            if !word.has(FRESH) {
                forked.out.push(page);
            }
            return;
        } else if state == State::Zero || zeros {
            return;
        }
        child.set_hash(page, self.slot_hash(page));
        if matches!(state, State::Hot | State::Probing) {
            let new = self.share_slot(word, &mut child.store).with(word.0 & MAIN);
            child.set(page, new.with_state(State::Hot));
            if word.has(FRESH) {
                child.suspect(page);
            }
            return;
        }
        // Anything else is brought in from one place, the nearest that has the bytes.
        let buffered = matches!(state, State::Writing | State::Mapping) && !word.has(UNPACK);
        if word.has(PACKED_COPY) && state != State::Poisoned && self.copy_packed(page, word, child) {
            return;
        }
        let filled = state == State::Filled || (state == State::Mapping && word.has(UNPACK));
        if filled && !word.has(PACKED_COPY) {
            child.set_aux(page, self.aux(page));
            return child.set(page, Word::default().with_state(State::Filled));
        }
        if state != State::Writing {
            let new = self.share_slot(word, &mut child.store);
            if new.has(HAS_SLOT) {
                child.set_aux(page, self.stamp_now().into());
                return child.set(page, new.with_state(State::Cold));
            }
        }
        match if buffered { child.take_write_buffer() } else { None } {
            Some(buffer) => {
                child.set(page, Word::default().with_state(State::Writing).with_buffer(buffer));
                child.dirty.push_back((page, buffer));
                forked.carried.push((page, word.buffer(), buffer));
            }
            None => child.lose(page),
        }
    }

    /// A word with the slot of `word`, if that has a valid one, which gets another owner.
    fn share_slot(&self, word: Word, store: &mut S) -> Word {
        // The slot of a page that is being written belongs to the write.
        let slot = word.slot().filter(|_| word.state() != State::Writing);
        slot.filter(|slot| store.share(*slot)).map_or(Word::default(), |slot| Word::default().with_slot(slot))
    }

    /// Copies a packed copy into the child's pool. False if that has no room.
    fn copy_packed(&self, page: PageId, word: Word, child: &mut Self) -> bool {
        let place = Place::from_word(self.aux(page));
        let (offset, len) = self.warm.data(place);
        let (stamp, bytes) = (self.warm.stamp(&self.arena, place), self.packed_bytes(offset, len));
        let Some(place) = child.warm.add(&mut child.arena, page, stamp, bytes, true) else { return false };
        child.set_aux(page, place.word());
        let new = self.share_slot(word, &mut child.store).with(PACKED_COPY);
        child.set(page, new.with_state(State::Warm));
        true
    }

    /// The agent is there. Before, nothing is asked of it.
    pub fn set_agent(&mut self) {
        self.agentless = false;
    }

    /// Where the child's memory is not where it should be, the pieces that lie in no mapping of its userfaultfd according
    /// to `is_there` are put where one of `moves` (from, to, length; latest first) has them, else forgotten. Such a move
    /// was made by another thread during the fork.
    pub fn correct_places(&mut self, moves: &[(u64, u64, u64)], is_there: impl Fn(u64, u64) -> bool) {
        let segments: Vec<_> =
            self.regions.iter().flat_map(|(_, region)| region.segments().to_vec()).collect();
        let len = |pages: u64| pages * fmalloc_proto::PAGE;
        for segment in segments.into_iter().filter(|segment| !is_there(segment.addr, len(segment.pages))) {
            let inside = |start: u64, size: u64| {
                (start <= segment.addr && segment.addr + len(segment.pages) <= start + size)
                    .then(|| segment.addr - start)
            };
            let place = moves.iter().find_map(|&(from, to, size)| {
                let other = inside(from, size).map(|into| to + into);
                let other = other.or_else(|| inside(to, size).map(|into| from + into));
                other.filter(|addr| is_there(*addr, len(segment.pages)))
            });
            match place {
                Some(addr) => self.regions.remap(segment.addr, addr, len(segment.pages)),
                None => self.apply_unmap(segment.addr, len(segment.pages)),
            }
        }
    }
}
