//! The program: threads that read and write pages, discard, unmap, move, register and unregister them.

use std::collections::VecDeque;
use std::ops::Range;

use fmalloc_proto::PAGE;
use fmalloc_proto::messages::Advice;

use super::super::page::PageId;
use super::kernel::{Cell, Event, Token, Trap, Vpn};
use super::{Reading, Sim};

/// What a thread is about.
#[derive(Debug)]
pub(super) enum Task {
    Idle,
    Access { vpn: Vpn, write: Option<Token>, asleep: bool },
    Discard(Discard),
    Change(Change),
    Close { number: u16, cells: Vec<Vpn>, asked: bool },
}

/// A call of madvise with MADV_DONTNEED or MADV_FREE.
#[derive(Debug)]
pub(super) struct Discard {
    free: bool,
    cells: Vec<usize>,
    /// Still to be done.
    left: Vec<Vpn>,
    called: u64,
    read: bool,
    ran_on: bool,
    /// When it must have ended.
    pub(super) until: u64,
    decommit: Option<(u16, Range<u64>)>,
}

/// A call of munmap or mremap that has changed the address space already.
#[derive(Debug)]
pub(super) struct Change {
    /// Events to be raised, one after the other.
    events: VecDeque<Event>,
    raised: bool,
    read: bool,
    cells: Vec<usize>,
}

#[derive(Debug)]
pub(super) struct Thread {
    pub(super) task: Task,
    cursor: Vpn,
    stride: Option<bool>,
}

impl Thread {
    pub(super) fn new() -> Self {
        Self { task: Task::Idle, cursor: 0, stride: None }
    }

    pub(super) fn is_idle(&self) -> bool {
        matches!(self.task, Task::Idle)
    }
}

/// A region as the library sees it.
#[derive(Debug)]
pub(super) struct Reg {
    pub(super) number: u16,
    pub(super) vpn: Vpn,
    pub(super) cells: Vec<usize>,
    pub(super) closing: bool,
}

impl Sim {
    /// The thread's event has been read.
    pub(super) fn was_read(&mut self, thread: usize) {
        let now = self.now;
        match &mut self.threads[thread].task {
            Task::Discard(discard) => (discard.read, discard.until) = (true, now + 90),
            Task::Change(change) => change.read = true,
            task => panic!("model: {task:?} raised an event"),
        }
    }

    pub(super) fn run_thread(&mut self, at: usize) {
        let task = std::mem::replace(&mut self.threads[at].task, Task::Idle);
        self.threads[at].task = match task {
            Task::Idle => {
                if !self.stopped {
                    self.start(at);
                }
                return;
            }
            Task::Access { vpn, write, asleep: false } => self.access(at, vpn, write),
            Task::Discard(discard) if discard.read => self.discard(discard),
            Task::Change(change) => self.change(at, change),
            Task::Close { number, cells, asked } => self.close(number, cells, asked),
            blocked => blocked,
        };
    }

    fn access(&mut self, at: usize, vpn: Vpn, write: Option<Token>) -> Task {
        self.kernel.faults.retain(|(_, who)| *who != at);
        let serial = self.tick();
        let cell = self.kernel.cell(vpn).expect("model: access to nothing");
        if cell.trap != Trap::None {
            cell.users -= 1;
            return Task::Idle; // SIGBUS or SIGSEGV; that it was allowed was checked when the trap was set
        }
        let Some(token) = cell.token else {
            self.kernel.faults.push_back((vpn, at));
            return Task::Access { vpn, write, asleep: true };
        };
        assert!(cell.allows(token), "page {vpn:x} has {token}, but may have {:?}", cell.allowed);
        match write {
            Some(token) => {
                cell.shared = false;
                cell.wrote(token, serial);
            }
            None => cell.was_read(serial),
        }
        cell.users -= 1;
        self.log(|| format!("thread {at}: access {vpn:x} {write:?}, was {token}"));
        Task::Idle
    }

    fn discard(&mut self, mut discard: Discard) -> Task {
        if !discard.ran_on {
            discard.ran_on = true;
            self.kernel.changing -= 1;
            return Task::Discard(discard);
        }
        if !discard.left.is_empty() {
            let vpn = discard.left.swap_remove(self.rng.index(discard.left.len()));
            self.log(|| format!("discard of {vpn:x} (free {})", discard.free));
            let cell = self.kernel.cell(vpn).expect("model: discarded page has gone");
            cell.discards -= 1;
            if discard.free {
                (cell.lazy, cell.freed) = (cell.token.is_some(), true);
                if cell.trap == Trap::Marker {
                    cell.zap();
                }
            } else {
                cell.zap();
            }
            return Task::Discard(discard);
        }
        for id in &discard.cells {
            let cell = &mut self.kernel.cells[*id];
            cell.users -= 1;
            if !discard.free {
                cell.allowed.retain(|(token, when)| *token == 0 || *when > discard.called);
            }
        }
        if let Some((region, range)) = discard.decommit {
            self.log(|| format!("decommit {region} {range:?}"));
            let pages = self.pager.decommit(region, range);
            self.disk.0.borrow_mut().unclaim(pages);
        }
        Task::Idle
    }

    fn change(&mut self, at: usize, mut change: Change) -> Task {
        if change.raised && !change.read {
            return Task::Change(change);
        }
        if change.raised {
            self.kernel.changing -= 1;
            (change.raised, change.read) = (false, false);
        }
        if let Some(event) = change.events.pop_front() {
            self.log(|| format!("thread {at} raises {event:x?}"));
            self.kernel.events.push_back((at, event));
            change.raised = true;
            return Task::Change(change);
        }
        self.let_go(&change.cells);
        Task::Idle
    }

    fn close(&mut self, number: u16, cells: Vec<Vpn>, asked: bool) -> Task {
        if self.has_events() || (asked && !self.pager.is_closed(number)) {
            return Task::Close { number, cells, asked };
        }
        if !asked {
            self.log(|| format!("close {number}"));
            self.pager.close(number);
            return Task::Close { number, cells, asked: true };
        }
        self.log(|| format!("unregistered {number}"));
        let (_, claimed) = self.pager.unregister(number);
        self.disk.0.borrow_mut().unclaim(claimed);
        cells.into_iter().for_each(|vpn| self.kernel.remove(vpn));
        self.regs.retain(|reg| reg.number != number);
        Task::Idle
    }

    /// Addresses that go when region `number` goes: its pages and what grew out of it and was never touched.
    fn cells_of(&self, number: u16) -> Vec<Vpn> {
        let of = |(vpn, id): (&Vpn, &usize)| {
            let owner = match self.kernel.cells[*id].page {
                Some(page) => page.region(),
                None => self.pager.regions().below(vpn * PAGE)?.region,
            };
            (owner == number).then_some(*vpn)
        };
        self.kernel.mem.iter().filter_map(of).collect()
    }

    fn let_go(&mut self, cells: &[usize]) {
        for id in cells {
            let cell = &mut self.kernel.cells[*id];
            cell.users -= 1;
            cell.moving = false;
        }
    }

    /// A thread finds something to do.
    fn start(&mut self, at: usize) {
        let Some(vpn) = self.pick_vpn(at) else { return self.register() };
        match self.rng.below(1000) {
            0..940 => self.start_access(at, vpn),
            940..960 => self.start_discard(at, vpn),
            960..968 => self.start_unmap(at, vpn),
            968..982 => self.start_remap(at, vpn),
            982..985 => self.start_close(at),
            985..989 => self.start_decommit(at),
            989..992 => self.register(),
            992..996 => self.commit(),
            _ => self.hint(),
        }
    }

    fn pick_vpn(&mut self, at: usize) -> Option<Vpn> {
        let other = self.rng.index(self.threads.len());
        if self.rng.one_in(10)
            && let Task::Access { vpn, .. } = self.threads[other].task
        {
            return Some(vpn);
        }
        let thread = &mut self.threads[at];
        if self.rng.one_in(30) {
            thread.stride = (!self.rng.one_in(3)).then(|| self.rng.one_in(2));
        }
        let from = if thread.stride.is_some() && !self.rng.one_in(40) {
            thread.cursor + 1
        } else {
            self.rng.below(self.next_vpn + 1)
        };
        let (vpn, _) = self.kernel.mem.range(from..).next().or_else(|| self.kernel.mem.iter().next())?;
        thread.cursor = *vpn;
        Some(*vpn)
    }

    fn start_access(&mut self, at: usize, vpn: Vpn) {
        let write = match self.threads[at].stride {
            Some(writes) => writes,
            None => self.rng.one_in(2),
        };
        let token = match self.rng.below(12) {
            0 => 0,
            1 => self.kernel.get(vpn).map_or(0, |cell| cell.allowed[0].0),
            _ => self.tick(),
        };
        let cell = self.kernel.cell(vpn).expect("model: picked a page that is not there");
        if !cell.open {
            return;
        }
        cell.users += 1;
        let write = (write && !cell.readonly).then_some(token);
        self.threads[at].task = Task::Access { vpn, write, asleep: false };
    }

    /// Makes thread `at` read the page at `vpn`.
    pub(super) fn start_read(&mut self, at: usize, vpn: Vpn) {
        if let Some(cell) = self.kernel.cell(vpn).filter(|cell| cell.open) {
            cell.users += 1;
            self.threads[at].task = Task::Access { vpn, write: None, asleep: false };
        }
    }

    /// The ids of up to `most` neighbouring pages from `vpn` on, all of which `fits` approves.
    fn run_of(&self, vpn: Vpn, most: u64, fits: impl Fn(&Cell) -> bool) -> Vec<usize> {
        let ids = (vpn..vpn + most).map_while(|vpn| self.kernel.mem.get(&vpn).copied());
        ids.take_while(|id| fits(&self.kernel.cells[*id])).collect()
    }

    fn start_discard(&mut self, at: usize, vpn: Vpn) {
        let most = if self.rng.one_in(4) { 200 } else { self.rng.range(1, 12) };
        let cells = self.run_of(vpn, most, |cell| cell.open && !cell.moving);
        let free = (self.gate || self.reading == Reading::Unread) && self.rng.one_in(3);
        self.raise_discard(at, vpn, cells, free, None);
    }

    fn raise_discard(
        &mut self,
        at: usize,
        vpn: Vpn,
        cells: Vec<usize>,
        free: bool,
        decommit: Option<(u16, Range<u64>)>,
    ) {
        if cells.is_empty() {
            return;
        }
        let called = self.tick();
        let pages = cells.len() as u64;
        self.log(|| format!("thread {at} discards {vpn:x}+{pages} (free {free})"));
        for id in &cells {
            let cell = &mut self.kernel.cells[*id];
            cell.users += 1;
            cell.discards += 1;
            if !cell.allows(0) {
                cell.allowed.push((0, called));
            }
        }
        self.kernel.changing += 1;
        self.kernel.events.push_back((at, Event::Remove { vpn, pages }));
        let left = (vpn..vpn + pages).collect();
        let discard =
            Discard { free, cells, left, called, read: false, ran_on: false, until: u64::MAX, decommit };
        self.threads[at].task = Task::Discard(discard);
    }

    fn start_decommit(&mut self, at: usize) {
        let Some((region, range)) = self.pick_range() else { return };
        let reg = &self.regs[region];
        let (vpn, number) = (reg.vpn + range.start, reg.number);
        let ids: Vec<usize> = range.clone().map(|n| reg.cells[usize::try_from(n).unwrap()]).collect();
        let fits = |(vpn, id): (Vpn, &usize)| {
            self.kernel.mem.get(&vpn) == Some(id) && self.kernel.cells[*id].users == 0
        };
        if !(vpn..).zip(&ids).all(fits) {
            return;
        }
        ids.iter().for_each(|id| self.kernel.cells[*id].open = false);
        self.raise_discard(at, vpn, ids, false, Some((number, range)));
    }

    /// A range of indices of a region that is open.
    fn pick_range(&mut self) -> Option<(usize, Range<u64>)> {
        if self.regs.is_empty() {
            return None;
        }
        let region = self.rng.index(self.regs.len());
        let pages = self.regs[region].cells.len() as u64;
        let start = self.rng.below(pages);
        let end = (start + self.rng.range(1, 40)).min(pages);
        (!self.regs[region].closing).then_some((region, start..end))
    }

    fn commit(&mut self) {
        let Some((region, range)) = self.pick_range() else { return };
        let number = self.regs[region].number;
        let ids: Vec<usize> =
            range.clone().map(|n| self.regs[region].cells[usize::try_from(n).unwrap()]).collect();
        if ids.iter().any(|id| self.kernel.cells[*id].users > 0) {
            return;
        }
        let Some(pages) = self.pager.uncommitted(number, &range) else { return };
        if self.disk.0.borrow_mut().claim(pages) {
            self.log(|| format!("commit {number} {range:?}"));
            self.pager.commit(number, range);
            ids.iter().for_each(|id| self.kernel.cells[*id].open = true);
        }
    }

    fn hint(&mut self) {
        let Some((region, range)) = self.pick_range() else { return };
        let number = self.regs[region].number;
        let advice = [Advice::Normal, Advice::Sequential, Advice::Random, Advice::WillNeed, Advice::Cold]
            [self.rng.index(5)];
        self.log(|| format!("advise {number} {range:?} {advice:?}"));
        self.pager.advise(number, range, advice);
    }

    /// Pages that may be unmapped or moved: nobody touches them, and the pager knows them.
    fn changeable(&self, vpn: Vpn, most: u64) -> Vec<usize> {
        let closing = |page: PageId| self.regs.iter().any(|reg| reg.number == page.region() && reg.closing);
        self.run_of(vpn, most, |cell| cell.users == 0 && cell.page.is_some_and(|page| !closing(page)))
    }

    fn begin_change(&mut self, at: usize, events: Vec<Event>, cells: Vec<usize>) {
        self.kernel.changing += u32::try_from(events.len()).unwrap();
        for id in &cells {
            let cell = &mut self.kernel.cells[*id];
            cell.users += 1;
            cell.moving = true;
        }
        let change = Change { events: events.into(), raised: false, read: false, cells };
        self.threads[at].task = Task::Change(change);
    }

    fn start_unmap(&mut self, at: usize, vpn: Vpn) {
        let most = self.rng.range(1, 20);
        let pages = self.changeable(vpn, most).len() as u64;
        if pages == 0 || self.kernel.mem.len() < 40 {
            return;
        }
        self.log(|| format!("thread {at} unmaps {vpn:x}+{pages}"));
        (vpn..vpn + pages).for_each(|vpn| self.kernel.remove(vpn));
        self.begin_change(at, vec![Event::Unmap { vpn, pages }], Vec::new());
    }

    fn start_remap(&mut self, at: usize, from: Vpn) {
        let most = self.rng.range(1, 30);
        let mut ids = self.changeable(from, most);
        if ids.is_empty() {
            return;
        }
        let mut tail = None;
        match self.rng.below(8) {
            0 | 1 => return self.grow_in_place(from + ids.len() as u64 - 1),
            2 if ids.len() > 1 => {
                // The tail goes, the rest moves.
                let keep = self.rng.range(1, ids.len() as u64 - 1);
                tail = Some((from + keep, ids.len() as u64 - keep));
                ids.truncate(usize::try_from(keep).unwrap());
            }
            _ => {}
        }
        let (pages, grow) = (ids.len() as u64, if self.rng.one_in(4) { self.rng.range(1, 8) } else { 0 });
        let dontunmap = self.gate && grow == 0 && tail.is_none() && self.rng.one_in(5);
        let mut events = Vec::new();
        let victim = if grow == 0 && tail.is_none() { self.victim(from, pages) } else { None };
        events.extend(victim.map(|vpn| Event::Unmap { vpn, pages }));
        let to = victim.unwrap_or_else(|| self.new_place(pages + grow));
        events.push(Event::Remap { from, to, pages });
        if let Some((vpn, pages)) = tail {
            (vpn..vpn + pages).for_each(|vpn| self.kernel.remove(vpn));
            events.push(Event::Unmap { vpn, pages });
        }
        let vma = self.kernel.new_vma();
        for n in 0..pages {
            let id = self.kernel.mem.remove(&(from + n)).expect("model: moved page");
            self.kernel.cells[id].vma = vma;
            self.kernel.mem.insert(to + n, id);
        }
        (0..grow).for_each(|n| self.kernel.place_new(to + pages + n, Cell::new(vma, None, true)));
        if dontunmap {
            let vma = self.kernel.new_vma();
            for n in 0..pages {
                self.kernel.place_new(from + n, Cell::new(vma, None, true));
                ids.push(self.kernel.cells.len() - 1);
            }
        }
        self.log(|| {
            format!("thread {at} moves {from:x}+{pages} to {to:x}, grows {grow}, dontunmap {dontunmap}")
        });
        self.begin_change(at, events, ids);
    }

    /// Sometimes: pages that go because others are moved to their place (MREMAP_FIXED).
    fn victim(&mut self, from: Vpn, pages: u64) -> Option<Vpn> {
        if !self.gate || !self.rng.one_in(4) {
            return None;
        }
        let to = self.pick_vpn(0)?;
        let disjoint = to + pages <= from || from + pages <= to;
        (disjoint && self.changeable(to, pages).len() as u64 == pages).then(|| {
            (to..to + pages).for_each(|vpn| self.kernel.remove(vpn));
            to
        })
    }

    fn grow_in_place(&mut self, last: Vpn) {
        let pages = self.rng.range(1, 6);
        let free = self.kernel.is_free(last + 1, pages);
        let new = (last + 1..last + 1 + pages).all(|vpn| !self.used_before.contains(&vpn));
        if free && (new || self.gate) {
            let vma = self.kernel.get(last).map_or(0, |cell| cell.vma);
            self.log(|| format!("grows in place: {:x}+{pages}", last + 1));
            for vpn in last + 1..last + 1 + pages {
                self.used_before.insert(vpn);
                self.kernel.place_new(vpn, Cell::new(vma, None, true));
            }
            self.next_vpn = self.next_vpn.max(last + 1 + pages);
        }
    }

    /// A free place for a mapping.
    fn new_place(&mut self, pages: u64) -> Vpn {
        // Old addresses come again only where the agent cannot mix them up.
        if self.gate && self.rng.one_in(2) {
            for _ in 0..20 {
                let vpn = self.rng.range(1, self.next_vpn);
                if self.kernel.is_free(vpn, pages) {
                    self.next_vpn = self.next_vpn.max(vpn + pages);
                    return vpn;
                }
            }
        }
        let vpn = self.next_vpn + if self.rng.one_in(2) { 0 } else { self.rng.below(12) };
        self.next_vpn = vpn + pages;
        self.used_before.extend(vpn..vpn + pages);
        vpn
    }

    fn start_close(&mut self, at: usize) {
        if self.regs.is_empty() || (self.regs.len() < 2 && !self.rng.one_in(4)) {
            return;
        }
        let region = self.rng.index(self.regs.len());
        self.close_region(at, region);
    }

    /// Begins to unregister a region, unless somebody uses it.
    pub(super) fn close_region(&mut self, at: usize, region: usize) {
        let gone = self.cells_of(self.regs[region].number);
        let busy = gone.iter().any(|vpn| self.kernel.get(*vpn).is_some_and(|cell| cell.users > 0));
        // What moved or went and is not yet known to the pager could be taken for another region's.
        if busy || self.has_events() || self.kernel.changing > 0 || self.regs[region].closing {
            return;
        }
        for vpn in &gone {
            if let Some(cell) = self.kernel.cell(*vpn) {
                cell.open = false;
            }
        }
        let reg = &mut self.regs[region];
        reg.closing = true;
        self.threads[at].task = Task::Close { number: reg.number, cells: gone, asked: false };
    }

    fn register(&mut self) {
        let most = self.max_pages.saturating_sub(self.kernel.mem.len() as u64);
        if most < 8 || self.has_events() || self.kernel.changing > 0 {
            return;
        }
        let pages = self.rng.range(8, most.min(700));
        let sparse = self.rng.one_in(4);
        let vpn = self.new_place(pages);
        if !sparse && !self.disk.0.borrow_mut().claim(pages) {
            return;
        }
        let number =
            self.pager.register(vpn * PAGE, pages * PAGE, !sparse, String::new()).expect("room for a region");
        self.log(|| format!("registered {number} at {vpn:x}+{pages}, sparse {sparse}"));
        let vma = self.kernel.new_vma();
        self.names.retain(|page, _| page.region() != number);
        let mut cells = Vec::new();
        for n in 0..pages {
            let page = PageId::new(number, n);
            self.kernel.place_new(vpn + n, Cell::new(vma, Some(page), !sparse));
            self.names.insert(page, self.kernel.cells.len() - 1);
            cells.push(self.kernel.cells.len() - 1);
        }
        self.regs.push(Reg { number, vpn, cells, closing: false });
    }

    /// Pins, unpins and protects pages now and then.
    pub(super) fn meddle(&mut self) {
        let Some(vpn) = self.pick_vpn(0) else { return };
        let (pages, kind, on) = (self.rng.range(1, 6), self.rng.below(3), self.rng.one_in(3));
        let ids = self.run_of(vpn, pages, |cell| cell.users == 0);
        let vma = (self.kernel.new_vma(), self.kernel.new_vma());
        for id in &ids {
            let cell = &mut self.kernel.cells[*id];
            match kind {
                0 => cell.pinned = on && cell.token.is_some(),
                1 => cell.shared = self.gate && on && cell.token.is_some(),
                _ => (cell.readonly, cell.vma) = (on, vma.0),
            }
        }
        if kind == 2 {
            // What follows in the same mapping is one of its own now.
            let after = vpn + ids.len() as u64;
            let old = self.kernel.get(after).map_or(0, |cell| cell.vma);
            for id in self.run_of(after, 1000, |cell| cell.vma == old) {
                self.kernel.cells[id].vma = vma.1;
            }
        }
    }
}
