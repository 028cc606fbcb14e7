//! Answers faults: first touches at once, everything else as soon as the bytes are there.

use fmalloc_proto::PAGE;
use fmalloc_proto::messages::Advice;

use super::page::{FROM_BUFFER, HAS_SLOT, PENDING_SLOT, PageId, State, WANTED};
use super::{Action, Pager, Store};

/// Most pages that one fault on untouched memory maps.
const FILL_MAX: u64 = 256;

impl<S: Store> Pager<S> {
    /// A thread waits for the page at `addr`.
    pub fn fault(&mut self, addr: u64, by_agent: bool) {
        self.stats.faults += 1;
        let addr = addr - addr % PAGE;
        let Some(page) = self.regions.resolve(addr) else {
            // After mremap the fault may come before the event that tells of the move.
            self.unknown.push(addr);
            return;
        };
        if by_agent && self.word(page).state() == State::Evicting {
            self.out.push_back(Action::Assist { addr });
            return;
        }
        self.serve(page, addr);
    }

    /// No event is left unread: what is still unknown is memory that the program added to a region with mremap.
    pub fn events_drained(&mut self) {
        self.events_drained += 1;
        for addr in std::mem::take(&mut self.unknown) {
            match self.regions.resolve(addr) {
                Some(page) => self.serve(page, addr),
                None => self.adopt(addr),
            }
        }
    }

    /// Whether faults wait for [`Pager::events_drained`].
    #[must_use]
    pub fn has_unknown(&self) -> bool {
        !self.unknown.is_empty()
    }

    /// Takes a page into the region below it.
    fn adopt(&mut self, addr: u64) {
        let Some(segment) = self.regions.below(addr) else {
            // No region at all: a fault left over from one that was just unregistered.
            self.out.push_back(Action::Wake { addr, pages: 1 });
            return;
        };
        let Some(region) = self.regions.get_mut(segment.region) else { return };
        let (pages, bytes) = (region.pages + 1, region.table.bytes());
        if region.closing || !region.table.grow(&mut self.arena, pages) {
            self.out.push_back(Action::Wake { addr, pages: 1 });
            return;
        }
        let grown = region.table.bytes();
        self.table_bytes = self.table_bytes + grown - bytes;
        let Some(page) = self.regions.append(segment.region, addr) else { return };
        if self.store.claim_page() {
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
        if self.reserve(page) {
            let word = self.word(page).with_state(State::Poisoned).without(WANTED);
            self.set(page, word);
        }
        if let Some((addr, _)) = self.regions.place(page) {
            self.out.push_back(Action::Poison { page, addr });
        }
    }

    fn serve(&mut self, page: PageId, addr: u64) {
        let word = self.word(page);
        match word.state() {
            State::Zero | State::Cold | State::Writing => self.bring(page),
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
                self.set(page, word.with(WANTED));
            }
            State::Mapping | State::Probing => self.set(page, word.with(WANTED)),
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
            State::Poisoned => self.out.push_back(Action::Poison { page, addr }),
        }
    }

    /// Starts to bring in a page that is not there, or lets it wait for a frame or a buffer.
    fn bring(&mut self, page: PageId) {
        let word = self.word(page);
        if word.has(WANTED) {
            return; // waits already
        }
        if !self.try_bring(page) {
            self.stats.faults_stalled += 1;
            self.set(page, word.with(WANTED));
            self.waiting.push_back(page);
        }
    }

    /// Lets waiting faults go on as far as frames and buffers allow.
    pub(super) fn serve_waiting(&mut self) {
        while let Some(&page) = self.waiting.front() {
            let word = self.word(page);
            let waits = matches!(word.state(), State::Zero | State::Cold | State::Writing) && word.has(WANTED);
            if waits && !self.try_bring(page) {
                return;
            }
            self.waiting.pop_front();
        }
    }

    /// Whether a page's table entry can be written and a frame is free for it.
    fn reserve(&mut self, page: PageId) -> bool {
        let Some(region) = self.regions.get_mut(page.region()) else { return false };
        let bytes = region.table.bytes();
        let ready = region.table.prepare(&mut self.arena, page.index(), 1);
        let grown = region.table.bytes() - bytes;
        self.table_bytes += grown;
        ready
    }

    fn try_bring(&mut self, page: PageId) -> bool {
        if !self.reserve(page) || self.free_frames() == 0 {
            return false;
        }
        let word = self.word(page);
        match word.state() {
            State::Zero => {
                self.stats.faults_zero += 1;
                self.fill(page);
                true
            }
            State::Writing => {
                self.stats.faults_rescued += 1;
                self.share_buffer(word.buffer());
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
            _ => true,
        }
    }

    /// Maps zeros at `page`, and on behind it if the program is filling memory from front to back.
    fn fill(&mut self, page: PageId) {
        let (number, index) = (page.region(), page.index());
        let limit = FILL_MAX.min(self.frames() / 16);
        let window = self.streams.advance(number, index).map(|stream| {
            let window = stream.grow(limit);
            stream.end = stream.end.max(index + window);
            window
        });
        self.map_zeros(page, WANTED);
        let Some(region) = self.regions.get(number) else { return };
        let (Some((_, run)), Some(committed)) = (self.regions.place(page), region.committed.end_from(index)) else {
            return;
        };
        if region.advice_at(index) == Advice::Random {
            return;
        }
        let end = (index + window.unwrap_or(1)).min(index + run).min(committed);
        for next in index + 1..end {
            let next = PageId::new(number, next);
            if self.free_frames() == 0 || self.word(next).state() != State::Zero || !self.reserve(next) {
                break;
            }
            self.map_zeros(next, 0);
        }
    }

    fn map_zeros(&mut self, page: PageId, flags: u64) {
        let word = self.word(page);
        self.set(page, word.with_state(State::Mapping).without(FROM_BUFFER).with(flags));
        self.map_queue.push_back(page);
    }
}
