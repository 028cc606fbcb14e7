//! Hands out work and takes the results of mapping and poisoning.

use fmalloc_proto::PAGE;

use super::page::{FRESH, FROM_BUFFER, PageId, State, WANTED};
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
        if let Some(action) = self.ready_action() {
            return Some(action);
        }
        self.write_dirty();
        self.write_files();
        self.continue_willneed();
        self.plan();
        self.ready_action()
    }

    fn ready_action(&mut self) -> Option<Action> {
        self.serve_waiting();
        let mut action = self.next_unpack();
        if action.is_some() {
            return action;
        }
        // While an event is kept back, what is to be mapped may have been discarded, and its place may be wrong.
        if !self.maps_blocked && !self.held {
            action = self.next_map().or_else(|| self.next_poison());
        }
        action.or_else(|| self.out.pop_front())
    }

    /// Allows mapping again after [`Stop::Again`] or [`Stop::NoMemory`].
    pub fn retry(&mut self) {
        self.maps_blocked = false;
    }

    /// Whether pages wait for [`Pager::retry`].
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.maps_blocked && !(self.map_queue.is_empty() && self.poison_queue.is_empty())
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
                // Nobody can reach it.
                self.map_queue.pop_front();
                self.forget_page(page, true);
                continue;
            };
            let run = if self.single_maps > 0 { 1 } else { run };
            self.single_maps = self.single_maps.saturating_sub(1);
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
                (1..).zip(self.map_queue.iter().skip(1)).take_while(|(n, next)| follows(*n, **next)).count()
                    + 1;
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
            // The kernel says this too where a run crosses from one of its mappings into the next.
            Stop::NoRange if pages - done > 1 => self.single_maps = pages - done,
            Stop::NoRange => {
                // Nobody can reach it, and no event will tell.
                if let Some((addr, _)) = self.regions.place(page.plus(done)) {
                    self.apply_unmap(addr, PAGE);
                }
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
        if word.has(FRESH) {
            self.suspect(page);
        }
    }

    fn next_poison(&mut self) -> Option<Action> {
        while let Some(page) = self.poison_queue.pop_front() {
            if self.word(page).state() == State::Poisoned
                && let Some((addr, _)) = self.regions.place(page)
            {
                return Some(Action::Poison { page, addr });
            }
        }
        None
    }

    /// Result of [`Action::Poison`].
    pub fn poisoned(&mut self, page: PageId, stop: Option<Stop>) {
        if stop == Some(Stop::Again) {
            self.maps_blocked = true;
            self.poison_queue.push_front(page);
        }
    }
}
