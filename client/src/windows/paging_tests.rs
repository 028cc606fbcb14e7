//! The paging core against a model of what is around it: threads that touch pages, memory that checks their access, and
//! work that ends at any later time, in any order.

use std::collections::HashMap;

use super::frames::{Fate, Origin, Place};
use super::pages::{Page, Pages};
use super::paging::{Job, Paging, Step, Want, Work};
use super::space::tests::Random;
use super::table::Table;

const UNIT: usize = 64 << 10;
const PAGES: u32 = 24;
const REGIONS: u32 = 2;
const LIMIT: u32 = 9;
/// At least one for each thread, as in the pager: else they could take each other's pages away for ever.
const RESERVE: u32 = 5;
const THREADS: u32 = 4;

/// What the hardware lets a program do with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Access {
    None,
    Read,
    Write,
}

/// A page as memory and disk have it.
#[derive(Debug, Clone, Copy)]
struct Cell {
    access: Access,
    /// What a read gives.
    memory: u32,
    /// What was written out.
    disk: u32,
    /// What a program must find.
    expected: u32,
}

/// What a thread is about.
#[derive(Debug, Clone)]
enum Task {
    Touch { place: Place, write: bool, first: bool },
    Pin { place: Place, write: bool, first: bool },
    Expel { place: Place, fate: Fate },
    Shrink,
}

#[derive(Debug, Default, Clone)]
struct Thread {
    task: Option<Task>,
    work: Option<Work>,
    pins: Vec<Place>,
}

struct World {
    paging: Paging,
    cells: HashMap<(u32, u32), Cell>,
    threads: Vec<Thread>,
    limit: u32,
    stamp: u32,
}

impl World {
    /// One region never used before, one over a part of the file that has other bytes.
    fn new() -> Self {
        let mut paging = Paging::new(Table::new(12).unwrap(), LIMIT, RESERVE);
        let mut cells = HashMap::new();
        for (region, origin, old) in [(0, Origin::Fresh, 0), (1, Origin::Stale, 0xdead)] {
            let pages = Pages::new(PAGES, UNIT, Page::Out(origin)).unwrap();
            assert_eq!(paging.add(pages).unwrap(), region);
            let cell = Cell { access: Access::None, memory: old, disk: old, expected: 0 };
            cells.extend((0..PAGES).map(|page| ((region, page), cell)));
        }
        Self {
            paging,
            cells,
            threads: (0..THREADS).map(|_| Thread::default()).collect(),
            limit: LIMIT,
            stamp: 0,
        }
    }

    fn cell(&mut self, place: Place) -> &mut Cell {
        self.cells.get_mut(&(place.region, place.page)).unwrap()
    }

    /// Whether anybody else has the page in hand, so that a discard would not be exclusive.
    fn is_shared(&self, place: Place) -> bool {
        self.threads.iter().any(|thread| {
            let tasks = match &thread.task {
                Some(Task::Touch { place, .. } | Task::Pin { place, .. } | Task::Expel { place, .. }) => {
                    Some(*place)
                }
                Some(Task::Shrink) | None => None,
            };
            tasks == Some(place) || thread.pins.contains(&place)
        })
    }

    fn start(&mut self, thread: usize, kind: u8, place: Place, write: bool) {
        let discarded = |thread: &Thread| match &thread.task {
            Some(Task::Expel { place: other, fate: Fate::Discard }) => *other == place,
            _ => false,
        };
        if self.threads.iter().any(discarded) {
            return;
        }
        let task = match kind {
            0..=5 => Task::Touch { place, write, first: true },
            6 => Task::Pin { place, write, first: true },
            7 => {
                if let Some(place) = self.threads[thread].pins.pop() {
                    self.paging.unpin(place);
                }
                return;
            }
            8 => Task::Expel { place, fate: Fate::Keep },
            9 if !self.is_shared(place) => Task::Expel { place, fate: Fate::Discard },
            10 => {
                let limit = LIMIT + 2 - u32::from(write) * 3;
                if limit >= self.paging.least_limit() {
                    self.paging.set_limit(limit);
                    self.limit = limit;
                }
                Task::Shrink
            }
            _ => return,
        };
        self.threads[thread].task = Some(task);
    }

    /// Has a thread do the next thing that it can.
    fn run(&mut self, thread: usize) {
        if let Some(work) = self.threads[thread].work.take() {
            self.paging.finish(&work, true);
            // As the engine does: who evicts a page does not fight with those who touch it.
            if matches!(self.threads[thread].task, Some(Task::Expel { fate: Fate::Keep, .. })) {
                self.threads[thread].task = None;
            }
            return;
        }
        let Some(task) = self.threads[thread].task.clone() else { return };
        let step = match task {
            Task::Touch { place, write, first } => {
                if self.touch(place, write) {
                    self.threads[thread].task = None;
                    return;
                }
                self.threads[thread].task = Some(Task::Touch { place, write, first: false });
                self.paging.fault(place, Want { write, pin: false }, first)
            }
            Task::Pin { place, write, first } => {
                self.threads[thread].task = Some(Task::Pin { place, write, first: false });
                self.paging.fault(place, Want { write, pin: true }, first)
            }
            Task::Expel { place, fate } => self.paging.expel(place, fate),
            Task::Shrink => self.paging.shrink(),
        };
        match step {
            Step::Wait => {}
            Step::Work(work) => {
                self.carry_out(&work);
                self.threads[thread].work = Some(work);
            }
            Step::Done => self.done(thread, &task),
            // The bytes do not go away.
            Step::Pinned => self.threads[thread].task = None,
            Step::AllPinned => {
                assert!(matches!(task, Task::Pin { .. }), "{task:?} has no room");
                self.threads[thread].task = None;
            }
            Step::NotOurs => panic!("{task:?} is of no region"),
        }
    }

    /// The instruction, if the hardware lets it pass.
    fn touch(&mut self, place: Place, write: bool) -> bool {
        self.stamp += 1;
        let stamp = self.stamp;
        let cell = self.cell(place);
        if cell.access < if write { Access::Write } else { Access::Read } {
            return false;
        }
        assert_eq!(cell.memory, cell.expected, "{place:?} has wrong bytes");
        if write {
            cell.memory = stamp;
            cell.expected = stamp;
        }
        true
    }

    fn done(&mut self, thread: usize, task: &Task) {
        match task {
            // The instruction is tried again, and may fault again.
            Task::Touch { place, write, .. } => {
                self.threads[thread].task = Some(Task::Touch { place: *place, write: *write, first: true });
                return;
            }
            Task::Pin { place, write, .. } => {
                let access = if *write { Access::Write } else { Access::Read };
                assert!(self.cell(*place).access >= access, "pinned without access");
                self.threads[thread].pins.push(*place);
            }
            Task::Expel { place, fate: Fate::Discard } => self.cell(*place).expected = 0,
            Task::Expel { .. } | Task::Shrink => {}
        }
        self.threads[thread].task = None;
    }

    /// The system calls, all at once: the page is this thread's until it says that it has finished.
    fn carry_out(&mut self, work: &Work) {
        let pinned = self.threads.iter().any(|thread| thread.pins.contains(&work.place));
        let discards = self.threads.iter().any(
            |thread| matches!(&thread.task, Some(Task::Expel { place, fate: Fate::Discard }) if *place == work.place),
        );
        let cell = self.cell(work.place);
        match &work.job {
            Job::Show { zero, write, read, .. } => {
                if *zero {
                    assert_eq!(cell.access, Access::None, "zeros are written before anybody can look");
                    assert_eq!(cell.expected, 0, "zeros over what somebody wrote");
                    cell.memory = 0;
                    cell.disk = 0;
                }
                assert!(!*read || cell.access == Access::None);
                let access = if *write { Access::Write } else { Access::Read };
                assert!(access >= cell.access, "access is not taken away by giving it");
                cell.access = access;
            }
            Job::Hide => {
                assert!(!pinned);
                cell.access = Access::None;
            }
            Job::Evict { hide, write } => {
                assert!(!pinned);
                assert_eq!(*hide, cell.access != Access::None);
                cell.access = Access::None;
                if *write {
                    cell.disk = cell.memory;
                }
                if discards && !*write {
                    cell.expected = 0;
                } else {
                    assert_eq!(cell.disk, cell.memory, "left RAM without having been written out");
                }
            }
        }
    }

    fn check(&self) {
        assert!(self.paging.held() <= LIMIT + 2, "beyond any budget so far");
        let shown = self.cells.values().filter(|cell| cell.access != Access::None).count();
        assert!(shown <= usize::try_from(self.paging.held()).unwrap(), "access to what has no frame");
        let pinned: std::collections::HashSet<_> = self
            .threads
            .iter()
            .flat_map(|thread| &thread.pins)
            .map(|place| (place.region, place.page))
            .collect();
        assert_eq!(pinned.len(), usize::try_from(self.paging.pinned()).unwrap());
        assert!(self.paging.pinned() + RESERVE <= self.limit);
    }

    /// Everybody ends what they are about; then all content is as it must be.
    fn end(&mut self) {
        for _ in 0..100_000 {
            if self.threads.iter().all(|thread| thread.task.is_none() && thread.work.is_none()) {
                break;
            }
            (0..self.threads.len()).for_each(|thread| self.run(thread));
            self.check();
        }
        let waiting: Vec<_> =
            self.threads.iter().map(|thread| (&thread.task, &thread.work, &thread.pins)).collect();
        let done = waiting.iter().all(|(task, work, _)| task.is_none() && work.is_none());
        assert!(done, "somebody waits for ever, limit {}: {waiting:?}", self.limit);
        for region in 0..REGIONS {
            for page in 0..PAGES {
                let place = Place { region, page };
                while !self.touch(place, false) {
                    match self.paging.fault(place, Want::default(), true) {
                        Step::Work(work) => {
                            self.carry_out(&work);
                            self.paging.finish(&work, true);
                        }
                        Step::Done => {}
                        other => panic!("{other:?}"),
                    }
                    assert!(self.paging.held() <= self.limit.max(LIMIT + 2));
                }
            }
        }
    }
}

#[test]
fn no_byte_is_lost_and_no_frame_too_many_whatever_the_order() {
    for seed in 0..600 {
        println!("seed {seed}");
        let mut random = Random::new(seed);
        let mut world = World::new();
        for _ in 0..random.below(900) {
            let thread = usize::try_from(random.below(THREADS)).unwrap();
            if world.threads[thread].task.is_none() && world.threads[thread].work.is_none() {
                let place = Place { region: random.below(REGIONS), page: random.below(PAGES) };
                let kind = u8::try_from(random.below(11)).unwrap();
                world.start(thread, kind, place, random.below(2) == 0);
            } else {
                world.run(thread);
            }
            world.check();
        }
        world.end();
    }
}

/// The whole of a fault by one thread.
fn fault(paging: &mut Paging, page: u32, write: bool) -> Vec<Work> {
    let place = Place { region: 0, page };
    let mut works = Vec::new();
    loop {
        match paging.fault(place, Want { write, pin: false }, works.is_empty()) {
            Step::Work(work) => {
                paging.finish(&work, true);
                works.push(work);
            }
            Step::Done => return works,
            other => panic!("{other:?}"),
        }
    }
}

fn one_region(limit: u32) -> Paging {
    let mut paging = Paging::new(Table::new(12).unwrap(), limit, RESERVE);
    paging.add(Pages::new(PAGES, UNIT, Page::Out(Origin::Fresh)).unwrap()).unwrap();
    paging
}

#[test]
fn clean_pages_are_not_written_and_fresh_ones_not_read() {
    let mut paging = one_region(8);
    for round in 0..3 {
        for page in 0..PAGES {
            for Work { job, .. } in fault(&mut paging, page, false) {
                assert!(!matches!(job, Job::Evict { write: true, .. }), "round {round}");
                assert!(
                    !matches!(job, Job::Show { read: true, .. } | Job::Show { zero: true, .. }),
                    "round {round}"
                );
            }
        }
    }
    assert_eq!((paging.counters.pages_out, paging.counters.pages_in), (0, 0));

    fault(&mut paging, 0, true);
    for page in 1..PAGES {
        fault(&mut paging, page, false);
    }
    assert_eq!(paging.counters.pages_out, 1, "one page was written to");
    let last = fault(&mut paging, 0, false).pop().map(|work| work.job);
    assert!(matches!(last, Some(Job::Show { read: true, write: false, .. })));
    (1..PAGES).for_each(|page| drop(fault(&mut paging, page, false)));
    assert_eq!((paging.counters.pages_out, paging.counters.pages_in), (1, 1), "it was only read since");
}

#[test]
fn a_page_in_use_stays_while_others_come_and_go() {
    let mut paging = one_region(8);
    // Once round, so that there are idle pages.
    (0..PAGES).for_each(|page| drop(fault(&mut paging, page, false)));
    fault(&mut paging, 0, true);
    for page in (1..PAGES).chain(1..PAGES) {
        let works = fault(&mut paging, page, false);
        assert!(!works.iter().any(|work| work.place.page == 0 && matches!(work.job, Job::Evict { .. })));
        if works.iter().any(|work| work.place.page == 0) {
            // Its access is gone, and it is touched again before it is evicted.
            assert_eq!(fault(&mut paging, 0, true).len(), 1);
        }
    }
    assert!(paging.counters.faults_rescued > 0);
}

#[test]
fn a_refused_system_call_leaves_every_page_as_it_was() {
    let mut paging = one_region(8);
    let place = Place { region: 0, page: 3 };
    let refuse = |paging: &mut Paging| match paging.fault(place, Want { write: true, pin: false }, true) {
        Step::Work(work) => paging.finish(&work, false),
        other => panic!("{other:?}"),
    };
    refuse(&mut paging);
    assert!(paging.is_in(place), "it has a frame, and the next touch tries again");
    assert_eq!(fault(&mut paging, 3, true).len(), 1);

    let stale = Pages::new(4, UNIT, Page::Out(Origin::Stale)).unwrap();
    let region = paging.add(stale).unwrap();
    let place = Place { region, page: 0 };
    let Step::Work(work) = paging.fault(place, Want::default(), true) else { panic!("no work") };
    assert!(matches!(work.job, Job::Show { zero: true, .. }));
    paging.finish(&work, false);
    assert!(!paging.is_in(place));
    let Step::Work(work) = paging.fault(place, Want::default(), true) else { panic!("no work") };
    assert!(matches!(work.job, Job::Show { zero: true, .. }), "what the file has is not shown");
    paging.finish(&work, true);
    assert!(paging.remove(region).is_some());
    assert_eq!(paging.fault(place, Want::default(), true), Step::NotOurs);
}
