//! Answers faults: first touches at once, everything else as soon as the bytes are there.

use fmalloc_proto::PAGE;
use fmalloc_proto::messages::Advice;

use super::page::{FRESH, FROM_BUFFER, HAS_SLOT, MAIN, PENDING_SLOT, PageId, STUCK, State, WANTED};
use super::table::CHUNK_FRAMES;
use super::{Action, MAX_UNKNOWN, Pager, Store};

/// Most pages that one fault on untouched memory maps.
const FILL_MAX: u64 = 256;

impl<S: Store> Pager<S> {
    /// A thread waits for the page at `addr`.
    pub fn fault(&mut self, addr: u64, by_agent: bool) {
        self.stats.faults += 1;
        let addr = addr - addr % PAGE;
        let Some(page) = self.regions.resolve(addr) else {
            // After mremap the fault may come before the event that tells of the move.
            if self.unknown.len() < MAX_UNKNOWN {
                self.unknown.push(addr);
            } else {
                self.out.push_back(Action::Wake { addr, pages: 1 });
            }
            return;
        };
        if by_agent && self.word(page).state() == State::Evicting {
            self.out.push_back(Action::Assist { addr });
            return;
        }
        self.serve(page, addr);
    }

    /// After all that was fed so far, no event was left unread or unfed, and no change of the address space was under
    /// way (an empty queue does not show that; an ioctl that does not give EAGAIN does). What is still unknown is memory
    /// that the program added to a region with mremap; what the agent did not find is not there.
    pub fn events_drained(&mut self) {
        self.settle_early();
        for entry in std::mem::take(&mut self.absent) {
            self.settle_absent(entry);
        }
        for addr in std::mem::take(&mut self.unknown) {
            match self.regions.resolve(addr) {
                Some(page) => self.serve(page, addr),
                None => self.adopt(addr),
            }
        }
    }

    /// Whether anything waits for [`Pager::events_drained`].
    #[must_use]
    pub fn has_unknown(&self) -> bool {
        !(self.unknown.is_empty() && self.absent.is_empty() && self.early.is_empty())
    }

    /// Takes a page into the region below it, and claims swap for it.
    fn adopt(&mut self, addr: u64) {
        let Some(segment) = self.regions.below(addr) else { return }; // as in `serve`
        let Some(region) = self.regions.get_mut(segment.region) else { return };
        if region.closing {
            self.unknown.push(addr);
            return;
        }
        let (pages, bytes) = (region.pages + 1, region.table.bytes());
        if !region.table.grow(&mut self.arena, pages) {
            self.out.push_back(Action::Wake { addr, pages: 1 });
            return;
        }
        // A discard of it may have gone unnoticed.
        region.removed = true;
        let grown = region.table.bytes();
        self.table_bytes = self.table_bytes + grown - bytes;
        let Some(page) = self.regions.append(segment.region, addr) else { return };
        // What is mapped behind the pages of a file is none of its pages.
        if !self.has_file(page) && self.store.claim_page() {
            if let Some(region) = self.regions.get_mut(segment.region) {
                region.committed.insert(page.index()..page.index() + 1);
                self.stats.claimed_pages += 1;
            }
            self.serve(page, addr);
        } else {
            self.lose(page);
        }
    }

    /// A page that cannot be had: any access must fail.
    pub(super) fn lose(&mut self, page: PageId) {
        if self.prepare(page) {
            let word = self.word(page).with_state(State::Poisoned).without(WANTED | FRESH | STUCK);
            self.set(page, word);
            self.poison_queue.push_back(page);
        }
    }

    fn serve(&mut self, page: PageId, addr: u64) {
        if self.open_region(page.region()).is_none() {
            return; // unregistering the range with the kernel ends the wait
        }
        let word = self.word(page);
        match word.state() {
            State::Zero | State::Cold | State::Writing | State::Warm | State::Filled => self.bring(page),
            State::Hot if self.has_file(page) => {
                if self.regions.get(page.region()).is_some_and(|region| region.removed) {
                    // It may have been emptied after we mapped it: then it is as the file has it.
                    self.settle_in_file(page, word.with(WANTED));
                } else {
                    self.out.push_back(Action::Wake { addr, pages: 1 });
                }
            }
            State::Hot => {
                let removed = self.regions.get(page.region()).is_some_and(|region| region.removed);
                if removed {
                    // It may have been emptied after we mapped it; if it is there after all, the kernel says so.
                    self.set(page, word.with_state(State::Mapping).with(WANTED).without(FROM_BUFFER));
                    self.map_queue.push_back(page);
                } else {
                    self.out.push_back(Action::Wake { addr, pages: 1 });
                }
            }
            State::Evicting => {
                self.stats.faults_rescued += u64::from(!word.has(WANTED));
                self.set(page, word.with(WANTED | MAIN));
            }
            State::Mapping | State::Probing | State::Copying => self.set(page, word.with(WANTED)),
            State::Fetching => {
                self.stats.faults_rescued += u64::from(!word.has(WANTED));
                self.set(page, word.with(WANTED));
                self.read_ahead(page);
            }
            State::Held => {
                self.stats.faults_rescued += 1;
                // The read's use of the buffer becomes the mapping's.
                self.set(page, word.with_state(State::Mapping).with(WANTED | FROM_BUFFER));
                self.map_queue.push_back(page);
                self.read_ahead(page);
            }
            State::Poisoned => self.poison_queue.push_back(page),
        }
    }

    /// Starts to bring in a page that is not there, or lets it wait for a frame or a buffer.
    pub(super) fn bring(&mut self, page: PageId) {
        let word = self.word(page);
        if word.has(WANTED) {
            return; // waits already
        }
        if !self.waiting.is_empty() || !self.try_bring(page) {
            self.stats.faults_stalled += 1;
            // Not worth a piece of the table.
            if self.is_described(page) {
                self.set(page, word.with(WANTED));
            } else if self.waiting.contains(&page) {
                return;
            }
            self.waiting.push_back(page);
        }
    }

    /// Lets waiting faults go on as far as frames and buffers allow.
    pub(super) fn serve_waiting(&mut self) {
        while let Some(&page) = self.waiting.front() {
            let waits = matches!(
                self.word(page).state(),
                State::Zero | State::Cold | State::Writing | State::Warm | State::Filled
            );
            if waits && self.regions.place(page).is_some() && !self.try_bring(page) {
                return;
            }
            self.waiting.pop_front();
        }
    }

    /// Whether a frame is free for a page and its table entry can be written.
    pub(super) fn reserve(&mut self, page: PageId) -> bool {
        // The budget pays for a new piece of the table too.
        self.free_frames() > if self.is_described(page) { 0 } else { CHUNK_FRAMES } && self.prepare(page)
    }

    fn is_described(&self, page: PageId) -> bool {
        let region = self.regions.get(page.region());
        region.is_some_and(|region| region.table.has_chunk(&self.arena, page.index()))
    }

    /// Makes sure that a page's table entry can be written.
    fn prepare(&mut self, page: PageId) -> bool {
        let Some(region) = self.regions.get_mut(page.region()) else { return false };
        let bytes = region.table.bytes();
        let ready = region.table.prepare(&mut self.arena, page.index(), 1);
        self.table_bytes += region.table.bytes() - bytes;
        ready
    }

    fn try_bring(&mut self, page: PageId) -> bool {
        if !self.reserve(page) {
            return false;
        }
        let word = self.word(page);
        match word.state() {
            State::Zero if self.has_file(page) => self.fetch_from_file(page),
            State::Zero => {
                self.stats.faults_zero += 1;
                self.fill(page);
                true
            }
            State::Writing => {
                self.stats.faults_rescued += 1;
                self.share_buffer(word.buffer());
                let word = self.came_back(page, word, true);
                let mut word = word.with_state(State::Mapping).with(WANTED | FROM_BUFFER);
                if word.has(HAS_SLOT) {
                    word = word.without(HAS_SLOT).with(PENDING_SLOT);
                }
                self.set(page, word);
                self.map_queue.push_back(page);
                true
            }
            State::Cold => {
                if !self.fetch_one(page) {
                    return false;
                }
                self.stats.faults_read += 1;
                self.read_ahead(page);
                true
            }
            State::Warm | State::Filled => {
                if !self.unpack_one(page) {
                    return false;
                }
                self.stats.faults_packed += 1;
                self.read_ahead(page);
                true
            }
            _ => true,
        }
    }

    /// Maps zeros at `page`, and on behind it if the program is filling memory from front to back.
    fn fill(&mut self, page: PageId) {
        let (number, index) = (page.region(), page.index());
        let limit = FILL_MAX.min(self.frames() / 16);
        let window = self.streams.advance(number, index).filter(|stream| stream.step == 1).map(|stream| {
            let window = stream.grow(limit);
            stream.fills = true;
            stream.end = stream.end.max(index + window);
            window
        });
        self.map_zeros(page, WANTED);
        let Some(region) = self.regions.get(number) else { return };
        let (Some((_, run)), Some(committed)) = (self.regions.place(page), region.committed.end_from(index))
        else {
            return;
        };
        if region.advice_at(index) == Advice::Random {
            return;
        }
        let end = (index + window.unwrap_or(1)).min(index + run).min(committed);
        for next in index + 1..end {
            let next = PageId::new(number, next);
            let spare = self.free_frames() > self.low_water() / 2;
            if !spare || self.word(next).state() != State::Zero || !self.reserve(next) {
                break;
            }
            self.map_zeros(next, 0);
        }
    }

    fn map_zeros(&mut self, page: PageId, flags: u64) {
        let word = self.word(page);
        self.set(page, word.with_state(State::Mapping).without(FROM_BUFFER | MAIN).with(flags));
        self.map_queue.push_back(page);
    }
}
