//! Random histories of a whole client against the real pager core: a program with threads, its kernel, its agent and a
//! swap file, all simulated, and what every page must hold. Nothing here knows how the core works; whoever reads a
//! page must find what was written to it, whatever happened in between.
//!
//! A run is determined by its seed. `FMALLOC_MODEL_ROUNDS` sets how many runs there are, `FMALLOC_MODEL_SEED` runs one
//! seed and prints what happened.
//!
//! Two kinds of agents are simulated. With the *gate*, nothing is moved from the start of a change of the address
//! space until the core has been told of it, and a batch that was asked before is not gone on with: then the program
//! may do anything. Without it addresses do not come again, the agent runs into no faults, and MADV_FREE is used only
//! where no event is read before the agent is done.

mod agent;
mod disk;
mod kernel;
mod program;
pub(super) mod rng;

use std::collections::{HashMap, HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use fmalloc_proto::PAGE;
use fmalloc_proto::ring::Layout;

use super::page::{Buffer, PageId, QUEUED, STUCK, State, UNPACK, WANTED};
use super::{Action, Packed, Pager, Sizes, Source};
use crate::arena::Arena;
use crate::pager::actions::Stop;
use agent::Agent;
use disk::{InFlight, TestStore};
use kernel::{Cell, Event, Kernel, Token, Trap, Vpn};
use program::{Reg, Task, Thread};
use rng::Rng;

/// When events are read while pages are being moved out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// They are read and fed.
    AtOnce,
    /// They are read, and fed when no page is on its way out.
    Kept,
    /// They are not read before no page is on its way out, unless the agent waits for a fault.
    Unread,
}

/// The agent, where threads are numbered.
const AGENT: usize = usize::MAX;

impl Pager<TestStore> {
    /// What is still to be done, if anything.
    fn next_wait(&self) -> Option<&'static str> {
        let mapping = |page: &PageId| self.word(*page).state() == State::Mapping;
        let waits = [
            (!self.waiting.is_empty(), "faults wait for frames or buffers"),
            (self.map_queue.iter().any(mapping), "pages wait to be mapped"),
            (!self.poison_queue.is_empty(), "pages wait to be poisoned"),
            (self.has_unknown(), "unknown faults or absent pages"),
            (!self.discarded.is_empty() || !self.discarded_later.is_empty(), "discarded pages"),
            (!self.dirty.is_empty(), "pages wait to be written"),
            (!self.willneed.is_empty(), "hints"),
            (!self.drains.is_empty(), "drains"),
            (!self.stuck.is_empty() && self.free_frames() < self.low_water(), "stuck pages"),
            (!self.protect.is_empty(), "pages to be protected"),
            (self.emptying.is_some(), "a segment to be emptied"),
            (self.warm_limit == 0 && self.warm.segments() > 0, "a pool without a share"),
            (!self.unpack_queue.is_empty(), "pages to be unpacked"),
        ];
        waits.iter().find(|(waits, _)| *waits).map(|(_, what)| *what)
    }
}

struct Sim {
    pager: Pager<TestStore>,
    disk: TestStore,
    buffers: Vec<Token>,
    io: Vec<InFlight>,
    kernel: Kernel,
    agent: Agent,
    threads: Vec<Thread>,
    regs: Vec<Reg>,
    /// Cells by the names that the pager gives their pages.
    names: HashMap<PageId, usize>,
    /// Events that were read and not yet fed.
    unfed: VecDeque<Event>,
    /// Faults of the agent to be answered with zeros.
    assists: Vec<Vpn>,
    drains: HashSet<u64>,
    /// Pages in the order in which the agent was asked for them.
    asked: Vec<PageId>,
    used_before: HashSet<Vpn>,
    next_vpn: Vpn,
    max_pages: u64,
    batch_pages: usize,
    frames: (u64, u64),
    now: u64,
    serial: u64,
    rng: Rng,
    gate: bool,
    reading: Reading,
    /// The agent waits for a fault: events are read although it has pages to move.
    agent_waits: bool,
    /// The kernel cannot poison.
    protect: bool,
    errors: bool,
    /// Reader of messages, agent, reads and writes of the disk: do nothing in all but one of so many steps.
    slow: [u64; 4],
    /// One of so many pages that the agent could move or look at fails.
    clumsy: u64,
    stopped: bool,
    steps: u64,
    tracing: bool,
    trace: VecDeque<String>,
}

impl Sim {
    fn new(seed: u64, tracing: bool) -> Self {
        let mut rng = Rng::new(seed);
        let layout =
            Layout::new(u32::try_from(rng.range(1, 4)).unwrap(), u32::try_from(rng.range(1, 24)).unwrap())
                .unwrap();
        let read_buffers = Buffer::try_from(rng.range(1, 40)).unwrap();
        let write_buffers = Buffer::try_from(layout.batches() * layout.batch_pages()).unwrap();
        let frames = (rng.range(24, 60), rng.range(60, 600));
        let max_pages = rng.range(100, 2500);
        let disk = TestStore::new(max_pages, rng.range(0, 30), Rng::new(seed ^ 77));
        let mut sizes = Sizes { budget: 0, ring: layout, read_buffers, write_buffers };
        sizes.budget = sizes.overhead() + (frames.1 + 30) * PAGE;
        let pager = Pager::new(disk.clone(), Arena::new().unwrap(), sizes);
        let threads = (0..rng.range(1, 6)).map(|_| Thread::new()).collect();
        let mut sim = Self {
            pager,
            disk,
            buffers: vec![0; usize::from(read_buffers + write_buffers)],
            io: Vec::new(),
            kernel: Kernel::default(),
            agent: Agent::default(),
            threads,
            regs: Vec::new(),
            names: HashMap::new(),
            unfed: VecDeque::new(),
            assists: Vec::new(),
            drains: HashSet::new(),
            asked: Vec::new(),
            used_before: HashSet::new(),
            next_vpn: 16,
            max_pages,
            batch_pages: layout.batch_pages() as usize,
            frames,
            now: 0,
            serial: 1,
            gate: rng.one_in(2),
            reading: [Reading::AtOnce, Reading::Kept, Reading::Unread][rng.index(3)],
            agent_waits: false,
            protect: rng.one_in(3),
            errors: rng.one_in(2),
            slow: [(); 4].map(|()| [1, 1, 4, 40][rng.index(4)]),
            clumsy: [4, 60, 60][rng.index(3)],
            stopped: false,
            steps: 0,
            tracing,
            trace: VecDeque::new(),
            rng,
        };
        sim.register_anchor();
        sim
    }

    /// One page that never goes: what grows always has a region below it.
    fn register_anchor(&mut self) {
        assert!(self.disk.0.borrow_mut().claim(1));
        let number = self.pager.register(self.next_vpn * PAGE, PAGE, true, String::new()).unwrap();
        let page = PageId::new(number, 0);
        let mut cell = Cell::new(0, Some(page), true);
        cell.users = 1;
        self.kernel.place_new(self.next_vpn, cell);
        self.names.insert(page, 0);
        self.regs.push(Reg { number, vpn: self.next_vpn, cells: vec![0], closing: false });
        self.next_vpn += 8;
    }

    fn tick(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    fn log(&mut self, text: impl FnOnce() -> String) {
        if self.tracing {
            self.trace.push_back(format!("{:6} {:5} ms  {}", self.steps, self.now, text()));
            if self.trace.len() > 3000 {
                self.trace.pop_front();
            }
        }
    }

    /// Whether the pager has not yet been told of all that happened to the address space.
    fn has_events(&self) -> bool {
        !(self.kernel.events.is_empty() && self.unfed.is_empty())
    }

    /// Reads one message.
    fn read(&mut self) {
        if let Some((vpn, who)) = self.kernel.faults.pop_front() {
            self.log(|| format!("fault at {vpn:x} by {who:x}"));
            self.agent_waits |= who == AGENT;
            self.pager.fault(vpn * PAGE + 123, who == AGENT);
            return;
        }
        let Some(&(thread, event)) = self.kernel.events.front() else { return };
        if self.reading != Reading::AtOnce && self.pager.evicting() > 0 {
            self.pager.hold_evictions(true);
            if self.reading == Reading::Unread && !self.agent_waits {
                return;
            }
        }
        self.log(|| format!("read {event:x?}"));
        self.kernel.events.pop_front();
        self.was_read(thread);
        self.agent.stop_moving();
        self.unfed.push_back(event);
        self.feed();
    }

    /// Tells the pager of events, as soon as its rules allow.
    fn feed(&mut self) {
        if self.unfed.is_empty() || (self.reading == Reading::Kept && self.pager.evicting() > 0) {
            return;
        }
        while let Some(event) = self.unfed.pop_front() {
            self.log(|| format!("feed {event:x?}"));
            match event {
                Event::Remove { vpn, pages } => self.pager.discard(vpn * PAGE, pages * PAGE),
                Event::Unmap { vpn, pages } => self.pager.unmap(vpn * PAGE, pages * PAGE),
                Event::Remap { from, to, pages } => self.pager.remap(from * PAGE, to * PAGE, pages * PAGE),
            }
        }
        self.agent_waits = false;
        self.pager.hold_evictions(false);
        self.unclaim();
    }

    fn unclaim(&mut self) {
        let pages = self.pager.take_unclaimed();
        self.disk.0.borrow_mut().unclaim(pages);
    }

    fn drained(&mut self) {
        if !self.has_events() && self.kernel.changing == 0 {
            self.pager.events_drained();
        }
    }

    /// Does what the pager wants.
    fn pump(&mut self) {
        for round in 0.. {
            assert!(round < 100_000, "next_action never ends");
            let Some(action) = self.pager.next_action() else { break };
            self.log(|| format!("{action:x?}"));
            match action {
                Action::Map { page, addr, pages, source } => {
                    let (done, stop) = self.map(page, addr / PAGE, pages, source);
                    self.log(|| format!("  mapped {done}, {stop:?}"));
                    assert!(done < pages || stop.is_none());
                    self.pager.mapped(page, pages, done, stop);
                    self.unclaim();
                }
                Action::Unpack { page, buffer, from } => {
                    let token = match from {
                        Packed::Fill(token) => token,
                        Packed::Bytes { offset, len } => {
                            let bytes = self.pager.packed_bytes(offset, len);
                            Token::from_le_bytes(bytes[..8].try_into().unwrap())
                        }
                    };
                    self.buffers[usize::from(buffer)] = token;
                    let bad = self.errors && self.rng.one_in(200);
                    if bad && let Some(id) = self.names.get(&page) {
                        self.kernel.cells[*id].errors += 2;
                    }
                    self.pager.unpacked(page, !bad);
                }
                Action::Wake { addr, pages } => self.wake(addr / PAGE, pages),
                Action::Assist { addr } => self.assists.push(addr / PAGE),
                Action::Poison { page, addr } => self.poison(page, addr / PAGE),
                Action::Read(transfer) => self.submit(transfer, false),
                Action::Write(transfer) => self.submit(transfer, true),
                // The files of regions have a model of their own.
                Action::ReadFile(_) | Action::WriteFile(_) => unreachable!("no region has a file"),
                Action::Ask { batch, kind } => self.ask(batch, kind),
            }
        }
        for (token, _) in self.pager.drained() {
            assert!(token == u64::MAX || self.drains.remove(&token), "drain {token} ended twice");
        }
    }

    fn map(&mut self, page: PageId, vpn: Vpn, pages: u64, source: Source) -> (u64, Option<Stop>) {
        assert!(pages > 0);
        if self.kernel.changing > 0 {
            return (0, Some(Stop::Again));
        }
        let vma = self.kernel.get(vpn).map(|cell| cell.vma);
        if vma.is_none() || (0..pages).any(|n| self.kernel.get(vpn + n).map(|cell| cell.vma) != vma) {
            return (0, Some(Stop::NoRange));
        }
        let (limit, limited) = match self.rng.below(120) {
            0 => (self.rng.below(pages), Stop::NoMemory),
            1 => (self.rng.below(pages), Stop::Again),
            _ => (pages, Stop::Again),
        };
        for n in 0..limit {
            let token = match source {
                Source::Zeros => 0,
                Source::Buffer(first) => self.buffers[usize::from(first) + usize::try_from(n).unwrap()],
            };
            let id = self.kernel.mem[&(vpn + n)];
            let cell = &mut self.kernel.cells[id];
            if cell.token.is_some() || cell.trap == Trap::Marker {
                return (n, Some(Stop::Exists));
            }
            assert!(
                cell.allows(token),
                "{:?} at {:x} is mapped with {token}, but may have {:?}",
                page.plus(n),
                vpn + n,
                cell.allowed
            );
            cell.token = Some(token);
            cell.page = Some(page.plus(n));
            self.names.insert(page.plus(n), id);
            self.wake(vpn + n, 1);
        }
        (limit, (limit < pages).then_some(limited))
    }

    fn wake(&mut self, first: Vpn, pages: u64) {
        for thread in &mut self.threads {
            if let Task::Access { vpn, asleep, .. } = &mut thread.task
                && (first..first + pages).contains(vpn)
            {
                *asleep = false;
            }
        }
        self.agent.wake(first, pages);
    }

    fn assist(&mut self) {
        if self.kernel.changing > 0 {
            return;
        }
        for vpn in std::mem::take(&mut self.assists) {
            if let Some(cell) = self.kernel.cell(vpn).filter(|cell| cell.token.is_none()) {
                assert!(cell.allows(0), "zeros for the agent at {vpn:x}");
                cell.token = Some(0);
            }
            self.wake(vpn, 1);
        }
    }

    fn poison(&mut self, page: PageId, vpn: Vpn) {
        if self.kernel.changing > 0 {
            self.pager.poisoned(page, Some(Stop::Again));
            return;
        }
        let Some(cell) = self.kernel.cell(vpn) else {
            self.pager.poisoned(page, Some(Stop::NoRange));
            return;
        };
        let grown = cell.page.is_none(); // there was no swap to be claimed for it
        assert!(cell.errors > 1 || grown, "{page:?} at {vpn:x} is poisoned without disk errors");
        (cell.page, cell.errors) = (Some(page), 2);
        if self.protect {
            self.pager.protect(page);
        } else if cell.token.is_some() {
            self.pager.poisoned(page, Some(Stop::Exists));
        } else {
            cell.trap = Trap::Marker;
            self.wake(vpn, 1);
            self.pager.poisoned(page, None);
        }
        self.names.insert(page, self.kernel.mem[&vpn]);
    }

    fn advance(&mut self, most: u64) {
        let until = self.now + self.rng.range(0, most);
        // No discard stays between "let go" and "done" for longer than the core allows for.
        for at in 0..self.threads.len() {
            while matches!(&self.threads[at].task, Task::Discard(discard) if discard.until < until) {
                self.run_thread(at);
            }
        }
        self.now = until;
        self.pager.set_now(self.now);
    }

    fn step(&mut self) {
        self.steps += 1;
        let used = self.pager.stats().resident_pages;
        let frames = self.pager.frames();
        let shrank = self.random_step();
        self.pump();
        let now_used = self.pager.stats().resident_pages;
        assert!(
            now_used <= used || now_used <= self.pager.frames() || shrank,
            "{now_used} frames of {} were taken, before it was {used} of {frames}",
            self.pager.frames()
        );
        if self.steps.is_multiple_of(64) {
            self.audit();
        }
    }

    /// Says whether frames may have been taken away.
    fn random_step(&mut self) -> bool {
        match self.rng.below(100) {
            0..34 => {
                for _ in 0..self.rng.range(1, 6) {
                    let at = self.rng.index(self.threads.len());
                    self.run_thread(at);
                }
            }
            34..48 if self.rng.one_in(self.slow[0]) => (0..self.rng.range(1, 6)).for_each(|_| self.read()),
            48..70 if self.rng.one_in(self.slow[1]) => {
                (0..self.rng.range(1, 8)).for_each(|_| self.agent_step())
            }
            70..76 => self.take_done_batch(),
            76..86 if !self.io.is_empty() => {
                let at = self.rng.index(self.io.len());
                if self.rng.one_in(self.slow[2 + usize::from(self.io[at].write)]) {
                    self.complete(at);
                }
            }
            86..88 => self.feed(),
            88..90 => self.drained(),
            90 => self.assist(),
            91..93 => self.pager.retry(),
            93..96 => self.advance(4),
            96 => self.meddle(),
            97 => {
                let lazy = self.rng.index(self.kernel.cells.len());
                let cell = &mut self.kernel.cells[lazy];
                if cell.lazy {
                    cell.zap();
                }
                if self.errors && self.rng.one_in(4) {
                    self.damage();
                }
            }
            98 if self.rng.one_in(6) => {
                let frames = self.rng.range(self.frames.0, self.frames.1);
                self.log(|| format!("budget: {frames} frames"));
                self.pager.set_budget(self.pager.sizes.overhead() + (frames + 30) * PAGE);
                return true;
            }
            98 if self.rng.one_in(3) => {
                let segments = self.rng.below(self.frames.1 / 4);
                self.log(|| format!("warm pool: {segments} segments"));
                self.pager.warm_limit = segments;
            }
            99 if self.rng.one_in(6) => {
                let token = self.tick();
                let pages = self.rng.below(100);
                let reg = self.rng.index(self.regs.len());
                let reg = &self.regs[reg];
                let part = !reg.closing && self.rng.one_in(2);
                let range = part.then_some((reg.number, 0..reg.cells.len() as u64));
                self.drains.insert(token);
                self.pager.drain(token, range, pages);
            }
            _ => {}
        }
        false
    }

    /// What must hold at any time.
    fn audit(&self) {
        let closing = |page: PageId| self.regs.iter().any(|reg| reg.closing && reg.number == page.region());
        let counted = |id: &&usize| {
            let cell = &self.kernel.cells[**id];
            cell.token.is_some() && cell.page.is_some_and(|page| !closing(page))
        };
        let present = self.kernel.mem.values().filter(counted).count() as u64;
        let resident = self.pager.stats().resident_pages;
        if present > resident {
            for (vpn, id) in &self.kernel.mem {
                let cell = &self.kernel.cells[*id];
                if let (Some(page), Some(_)) = (cell.page, cell.token)
                    && !self.pager.word(page).state().has_frame()
                {
                    eprintln!("{page:?} at {vpn:x} is present: {:?}, {cell:?}", self.pager.word(page));
                }
            }
            panic!("{present} pages are present, {resident} are known to be");
        }
        let slots: u64 = self.disk.0.borrow().used() as u64;
        assert!(self.pager.stats().slots <= slots);
    }

    fn is_settled(&self) -> bool {
        let pager = &self.pager;
        self.threads.iter().all(Thread::is_idle)
            && self.io.is_empty()
            && self.agent.works.is_empty()
            && !self.has_events()
            && self.drains.is_empty()
            && pager.is_within_budget()
            && pager.next_wait().is_none()
    }

    /// Lets everything come to an end: nothing new is begun, all that hinders goes away.
    fn settle(&mut self) {
        self.errors = false;
        self.stopped = true;
        for cell in &mut self.kernel.cells {
            (cell.pinned, cell.readonly) = (false, false);
        }
        for _ in 0..4000 {
            if self.is_settled() {
                return;
            }
            self.steps += 1;
            for at in 0..self.threads.len() {
                self.run_thread(at);
            }
            for _ in 0..self.rng.range(1, 20) {
                self.read();
            }
            self.feed();
            self.drained();
            self.assist();
            self.pager.retry();
            self.pump();
            for _ in 0..self.batch_pages * 4 {
                self.agent_step();
            }
            self.take_done_batch();
            self.pump();
            while !self.io.is_empty() {
                self.complete(0);
                self.pump();
            }
            self.advance(14);
        }
        let tasks: Vec<_> =
            self.threads.iter().map(|thread| &thread.task).filter(|t| !matches!(t, Task::Idle)).collect();
        panic!(
            "no end: waits for {:?}, tasks {tasks:x?}, io {:?}, agent {:?}, drains {:?}, used {} of {}, queues {}, {:?}",
            self.pager.next_wait(),
            self.io,
            self.agent,
            self.drains,
            self.pager.used,
            self.pager.frames(),
            self.pager.probation.len() + self.pager.main.len(),
            self.pager.stats(),
        );
    }

    /// Reads every page of the program.
    fn read_back(&mut self) {
        let all: Vec<Vpn> = self.kernel.mem.keys().copied().collect();
        for group in all.chunks(self.threads.len()) {
            for (at, vpn) in group.iter().enumerate() {
                self.start_read(at, *vpn);
            }
            self.settle();
        }
    }

    /// Counts everything anew and compares.
    fn recount(&self) {
        let pager = &self.pager;
        let stats = pager.stats();
        let mut slots = HashSet::new();
        let (mut used, mut swapped, mut stuck, mut lost, mut held) = (0, 0, 0, 0, 0);
        for (number, region) in pager.regions.iter() {
            let (mut resident, mut out) = (0, 0);
            for index in 0..region.pages {
                let page = PageId::new(number, index);
                let word = pager.word(page);
                if let Some(slot) = word.slot() {
                    assert!(slots.insert(slot), "slot {slot} has two owners");
                    assert!(self.disk.0.borrow().slots[slot as usize].taken, "slot {slot} is not taken");
                }
                assert!(!word.has(WANTED), "{page:?} is wanted, but nobody waits: {word:?}");
                let queued = pager.probation.contains(&page) || pager.main.contains(&page);
                assert!(!word.has(QUEUED) || queued, "{page:?} is not queued: {word:?}");
                assert!(!word.has(UNPACK), "{page:?} is to be unpacked: {word:?}");
                let settled = [
                    State::Zero,
                    State::Hot,
                    State::Cold,
                    State::Held,
                    State::Poisoned,
                    State::Warm,
                    State::Filled,
                ];
                assert!(settled.contains(&word.state()), "{page:?} is {word:?}");
                if word.state() == State::Hot {
                    assert!(word.has(QUEUED) || word.has(STUCK), "{page:?} can never be evicted: {word:?}");
                }
                resident += u64::from(word.state().has_frame());
                out += u64::from(word.state().is_swapped());
                stuck += u64::from(word.has(STUCK));
                lost += u64::from(word.state() == State::Poisoned);
                held += usize::from(word.state() == State::Held);
            }
            assert_eq!((resident, out), (region.resident, region.swapped));
            assert_eq!(region.at_agent, 0);
            used += resident;
            swapped += out;
        }
        for (vpn, id) in &self.kernel.mem {
            let cell = &self.kernel.cells[*id];
            let Some(page) = cell.page else { continue };
            let known = pager.regions.place(page).map(|(addr, _)| addr / PAGE);
            assert_eq!(known, Some(*vpn), "place of {page:?}");
            let state = pager.word(page).state();
            assert!(cell.token.is_none() || state == State::Hot, "{page:?} is present and {state:?}");
        }
        assert_eq!(
            (stats.resident_pages, stats.swapped_pages, stats.unevictable_pages, stats.poisoned_pages),
            (used, swapped, stuck, lost)
        );
        assert_eq!(stats.slots, slots.len() as u64);
        assert_eq!(self.disk.0.borrow().used(), slots.len(), "slots leaked");
        assert_eq!(pager.read_buffers.free() + held, pager.read_buffers.len(), "read buffers leaked");
        assert_eq!(pager.write_buffers.free(), pager.write_buffers.len(), "write buffers leaked");
        assert_eq!((pager.evicting(), pager.awaits_reads()), (0, false));
    }

    /// Unregisters everything and looks for leaks.
    fn tear_down(&mut self) {
        let anchor = self.names[&PageId::new(0, 0)];
        self.kernel.cells[anchor].users = 0;
        while !self.regs.is_empty() {
            self.close_region(0, 0);
            self.settle();
        }
        let pager = &self.pager;
        let stats = pager.stats();
        assert_eq!((stats.resident_pages, stats.swapped_pages, stats.slots), (0, 0, 0));
        assert_eq!((stats.unevictable_pages, stats.poisoned_pages, stats.claimed_pages), (0, 0, 0));
        assert_eq!(self.disk.0.borrow().used(), 0, "slots leaked");
        assert_eq!(self.disk.0.borrow().claimed, 0, "claims leaked");
        assert_eq!(pager.read_buffers.free(), pager.read_buffers.len(), "read buffers leaked");
        assert_eq!(pager.write_buffers.free(), pager.write_buffers.len(), "write buffers leaked");
        assert_eq!(pager.table_bytes, 0, "page tables leaked");
        assert_eq!(pager.warm.live_pages(), 0, "packed pages leaked");
        assert!(!pager.has_io());
    }

    fn run(&mut self, steps: u64) {
        let (errors, mut rest) = (self.errors, steps);
        while rest > 0 {
            let now = rest.min(self.rng.range(100, 4000));
            (self.errors, self.stopped) = (errors, false);
            (0..now).for_each(|_| self.step());
            rest -= now;
            self.settle();
            self.recount();
        }
        self.read_back();
        self.recount();
        self.tear_down();
    }
}

/// Runs one seed. Gives the number of steps, of faults answered by unpacking, and of pages spilled.
fn run_seed(seed: u64, tracing: bool) -> (u64, u64, u64) {
    let steps = 200 << (seed % 7);
    let mut sim = Sim::new(seed, tracing);
    let result = catch_unwind(AssertUnwindSafe(|| sim.run(steps)));
    if let Err(panic) = result {
        for line in &sim.trace {
            eprintln!("{line}");
        }
        eprintln!(
            "seed {seed} failed at step {}: gate {}, {:?}, protect {}, read buffers {}, batches {}, {:?}",
            sim.steps,
            sim.gate,
            sim.reading,
            sim.protect,
            sim.pager.read_buffers.len(),
            sim.batch_pages,
            sim.pager.stats()
        );
        eprintln!(
            "for the whole story: FMALLOC_MODEL_SEED={seed} cargo test -p fmallocd random_histories -- --nocapture"
        );
        resume_unwind(panic);
    }
    let stats = sim.pager.stats();
    (sim.steps, stats.faults_packed, stats.pages_spilled)
}

#[test]
fn random_histories_keep_every_byte() {
    let number = |name| std::env::var(name).ok().and_then(|value: String| value.parse::<u64>().ok());
    if let Some(seed) = number("FMALLOC_MODEL_SEED") {
        run_seed(seed, true);
        return;
    }
    let rounds = number("FMALLOC_MODEL_ROUNDS").unwrap_or(2000);
    let first = number("FMALLOC_MODEL_FIRST").unwrap_or(0);
    let (mut steps, mut unpacked, mut spilled) = (0, 0, 0);
    for seed in first..first + rounds {
        let (s, u, p) = run_seed(seed, false);
        (steps, unpacked, spilled) = (steps + s, unpacked + u, spilled + p);
    }
    println!("{rounds} histories, {steps} steps, {unpacked} pages unpacked for faults, {spilled} spilled");
    assert!(rounds < 500 || (unpacked > 1000 && spilled > 1000), "the warm pool was hardly used");
}
