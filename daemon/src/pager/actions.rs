//! Hands out work and takes the results of mapping and poisoning.

use super::page::{FROM_BUFFER, PageId, State, WANTED};
use super::{Action, Pager, Source, Store};

/// Why fewer pages were mapped than asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Events wait to be read; try again after [`Pager::retry`].
    Again,
    /// The next page is present already.
    Exists,
    /// The next page is not in a registered mapping any more.
    NoRange,
    /// The client's cgroup or the machine has no memory: evict, then [`Pager::retry`].
    NoMemory,
    /// The address space is gone.
    Gone,
}

impl<S: Store> Pager<S> {
    /// The next thing to do, if there is any. Mapping comes first: threads wait for it.
    pub fn next_action(&mut self) -> Option<Action> {
        if !self.maps_blocked
            && let Some(action) = self.next_map()
        {
            return Some(action);
        }
        if self.out.is_empty() {
            self.write_dirty();
            self.plan();
        }
        self.out.pop_front()
    }

    /// Allows mapping again after [`Stop::Again`] or [`Stop::NoMemory`].
    pub fn retry(&mut self) {
        self.maps_blocked = false;
        for (page, addr) in std::mem::take(&mut self.poison_later) {
            self.out.push_back(Action::Poison { page, addr });
        }
    }

    /// Whether pages wait for [`Pager::retry`].
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        (self.maps_blocked && !self.map_queue.is_empty()) || !self.poison_later.is_empty()
    }

    /// As many pages as can be mapped by one call: neighbours, from one source.
    fn next_map(&mut self) -> Option<Action> {
        while let Some(&page) = self.map_queue.front() {
            let first = self.word(page);
            if first.state() != State::Mapping {
                self.map_queue.pop_front();
                continue;
            }
            let Some((addr, run)) = self.regions.place(page) else {
                // Unmapped: whoever waits there finds out by itself.
                self.map_queue.pop_front();
                self.unmapped(page);
                continue;
            };
            let from_buffer = first.has(FROM_BUFFER);
            let follows = |n: u64, next: PageId| {
                let word = self.word(next);
                n < run
                    && next == page.plus(n)
                    && word.state() == State::Mapping
                    && word.has(FROM_BUFFER) == from_buffer
                    && (!from_buffer || u64::from(word.buffer()) == u64::from(first.buffer()) + n)
            };
            let pages =
                (1..).zip(self.map_queue.iter().skip(1)).take_while(|(n, next)| follows(*n, **next)).count() + 1;
            let source = if from_buffer { Source::Buffer(first.buffer()) } else { Source::Zeros };
            self.map_queue.drain(..pages);
            return Some(Action::Map { page, addr, pages: pages as u64, source });
        }
        None
    }

    /// Result of [`Action::Map`]: the first `done` pages are mapped; `stop` says why not all of them.
    pub fn mapped(&mut self, page: PageId, pages: u64, done: u64, stop: Option<Stop>) {
        for n in 0..done {
            self.finish_map(page.plus(n));
        }
        let Some(stop) = stop else { return };
        let mut rest = done;
        match stop {
            Stop::Exists => {
                let there = page.plus(done);
                self.finish_map(there);
                if let Some((addr, _)) = self.regions.place(there) {
                    self.out.push_front(Action::Wake { addr, pages: 1 });
                }
                rest += 1;
            }
            Stop::NoRange => {
                self.unmapped(page.plus(done));
                rest += 1;
            }
            Stop::Again => self.maps_blocked = true,
            Stop::NoMemory => {
                self.maps_blocked = true;
                let pages = u64::from(self.sizes.ring.batch_pages());
                if self.drains.is_empty() {
                    self.drain(u64::MAX, None, pages);
                }
            }
            Stop::Gone => return,
        }
        for n in (rest..pages).rev() {
            self.map_queue.push_front(page.plus(n));
        }
    }

    fn finish_map(&mut self, page: PageId) {
        let word = self.word(page);
        if word.state() != State::Mapping {
            return;
        }
        let word = self.drop_source(word);
        self.set(page, word.with_state(State::Hot).without(WANTED));
        self.enqueue(page);
    }

    /// A page whose mapping has gone while it was on its way: nobody can reach it. Drops what was to be mapped; an event
    /// will tell, or has told, the rest.
    fn unmapped(&mut self, page: PageId) {
        let word = self.word(page);
        let word = self.drop_source(word);
        let word = self.drop_slot(word).without(WANTED);
        self.set(page, word.with_state(State::Zero));
    }

    /// Result of [`Action::Poison`].
    pub fn poisoned(&mut self, page: PageId, stop: Option<Stop>) {
        if stop == Some(Stop::Again)
            && self.word(page).state() == State::Poisoned
            && let Some((addr, _)) = self.regions.place(page)
        {
            self.poison_later.push((page, addr));
        }
    }
}
