//! Page accesses replayed through the pager core, which decides as it does in the daemon, beside what other ways of
//! choosing would have done with as many frames: LRU, FIFO, and the optimum, which knows the future (Belady).
//!
//! Everything that the core wants is done at once: a replay counts misses, not time. Pages do not pack, so there is no warm
//! pool, and the region is advised `Random`, so nothing is read ahead: only the choice of pages to evict is compared.
//! As in the daemon, the core sees misses alone.

use std::collections::{BTreeSet, HashMap, VecDeque};

use fmalloc_proto::PAGE;
use fmalloc_proto::messages::Advice;
use fmalloc_proto::ring::{BatchKind, Layout};
use fmallocd::arena::Arena;
use fmallocd::pager::page::Slot;
use fmallocd::pager::{Action, Content, Pager, Sizes, Store};

use crate::bench::work::zipf::Zipf;
use crate::rng::Rng;

const BASE: u64 = 1 << 30;

/// A trace: the pages that a program touches, one after the other.
#[derive(Debug, Clone)]
pub struct Trace {
    /// For the table.
    pub name: &'static str,
    /// What it is like.
    pub about: &'static str,
    /// Pages there are.
    pub pages: u64,
    /// Which are touched.
    pub accesses: Vec<u32>,
}

/// Misses of one trace with as many frames, those of first touches not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Misses {
    /// The pager core.
    pub fmalloc: u64,
    /// The page evicted is the one that came in first.
    pub fifo: u64,
    /// The one not used for the longest time, which no pager can know that sees misses only.
    pub lru: u64,
    /// The one that is needed last from now on.
    pub optimum: u64,
    /// Frames that all of them have.
    pub frames: u64,
}

/// The traces, each of some accesses to `pages` pages: the same for the same seed.
#[must_use]
pub fn traces(pages: u64, seed: u64) -> Vec<Trace> {
    let mut rng = Rng::new(seed);
    let count = usize::try_from(pages * 12).unwrap();
    let page = |page: u64| u32::try_from(page % pages).unwrap();
    let make = |name, about, accesses| Trace { name, about, pages, accesses };
    let zipf = Zipf::new(usize::try_from(pages).unwrap(), 0.99);
    let uniform = (0..count).map(|_| page(rng.word())).collect();
    let skewed = (0..count).map(|_| u32::try_from(zipf.page(&mut rng)).unwrap()).collect();
    let round = (0..count as u64).map(page).collect();
    // A set of an eighth in steady use, while others are read once each.
    let mut next = 0;
    let churn = (0..count)
        .map(|n| match n % 4 {
            0 => {
                next += 1;
                page(pages / 8 + next % (pages - pages / 8))
            }
            _ => page(rng.word() % (pages / 8)),
        })
        .collect();
    // A skewed use that a scan of everything interrupts now and then.
    let mut scanned = Vec::with_capacity(count);
    while scanned.len() < count {
        scanned.extend((0..pages * 2).map(|_| u32::try_from(zipf.page(&mut rng)).unwrap()));
        scanned.extend((0..pages).map(page));
    }
    // Each of several sets in turn.
    let phases = (0..count)
        .map(|n| page(n as u64 * 5 / count as u64 * pages / 5 + rng.word() % (pages / 5)))
        .collect();
    vec![
        make("uniform", "any page, all alike", uniform),
        make("zipf", "Zipf 0.99 over scattered pages", skewed),
        make("loop", "all pages in order, again and again", round),
        make("churn", "three in four accesses to an eighth, the others in order", churn),
        make("zipf+scan", "Zipf 0.99, and a scan of everything after each two rounds", scanned),
        make("phases", "a fifth of the pages for a while, then the next", phases),
    ]
}

/// Replays a trace with a budget for about so many frames.
#[must_use]
pub fn replay(trace: &Trace, frames: u64) -> Misses {
    let mut driver = Driver::new(trace.pages, frames);
    let fmalloc = trace.accesses.iter().filter(|page| driver.access(u64::from(**page))).count() as u64;
    let frames = driver.pager.frames();
    let room = usize::try_from(frames).unwrap();
    let touched = trace.accesses.iter().collect::<BTreeSet<_>>().len() as u64;
    Misses {
        fmalloc: fmalloc - touched,
        fifo: fifo(&trace.accesses, room) - touched,
        lru: lru(&trace.accesses, room) - touched,
        optimum: optimum(&trace.accesses, room) - touched,
        frames,
    }
}

fn fifo(accesses: &[u32], room: usize) -> u64 {
    let (mut present, mut queue, mut misses) = (BTreeSet::new(), VecDeque::new(), 0);
    for page in accesses {
        if present.insert(*page) {
            misses += 1;
            queue.push_back(*page);
            if queue.len() > room {
                queue.pop_front().map(|page| present.remove(&page));
            }
        }
    }
    misses
}

fn lru(accesses: &[u32], room: usize) -> u64 {
    evict_least(accesses, room, |now| now)
}

/// Belady's choice, which may also be not to keep what has just come.
fn optimum(accesses: &[u32], room: usize) -> u64 {
    // The later it is needed, the less it is worth; nothing if never.
    let mut worth = vec![0; accesses.len()];
    let mut later = HashMap::new();
    for (now, page) in accesses.iter().enumerate().rev() {
        worth[now] = later.insert(*page, now).map_or(0, |next| usize::MAX - next);
    }
    evict_least(accesses, room, |now| worth[now])
}

/// Misses if each access gives its page a worth, and the page that is worth least goes.
fn evict_least(accesses: &[u32], room: usize, worth: impl Fn(usize) -> usize) -> u64 {
    let (mut last, mut order, mut misses) = (HashMap::new(), BTreeSet::new(), 0);
    for (now, page) in accesses.iter().enumerate() {
        match last.insert(*page, worth(now)) {
            Some(before) if order.remove(&(before, *page)) => {}
            _ => misses += 1,
        }
        order.insert((worth(now), *page));
        if order.len() > room {
            order.pop_first();
        }
    }
    misses
}

/// Slots without end; what is given back is not used again.
#[derive(Debug, Default)]
struct Endless(Slot);

impl Store for Endless {
    fn take(&mut self, want: u32) -> Option<(Slot, u32)> {
        self.0 += want;
        Some((self.0 - want, want))
    }

    fn share(&mut self, _: Slot) -> bool {
        false
    }

    fn give(&mut self, _: Slot) {}

    fn claim_page(&mut self) -> bool {
        true
    }
}

/// A pager whose every wish comes true at once.
struct Driver {
    pager: Pager<Endless>,
    present: Vec<bool>,
}

impl Driver {
    fn new(pages: u64, frames: u64) -> Self {
        let ring = Layout::new(4, 16).unwrap();
        let mut sizes = Sizes::for_budget(0, ring);
        sizes.budget = sizes.overhead() + (frames + 4 * pages.div_ceil(512)) * PAGE;
        let mut pager = Pager::new(Endless::default(), Arena::new().unwrap(), sizes);
        pager.register(BASE, pages * PAGE, true, String::new()).unwrap();
        pager.advise(0, 0..pages, Advice::Random);
        Self { pager, present: vec![false; usize::try_from(pages).unwrap()] }
    }

    /// Touches a page. Whether that was a miss.
    fn access(&mut self, page: u64) -> bool {
        let place = usize::try_from(page).unwrap();
        if self.present[place] {
            return false;
        }
        self.pager.fault(BASE + page * PAGE, false);
        self.work();
        assert!(self.present[place], "page {page} never came");
        true
    }

    fn work(&mut self) {
        while let Some(action) = self.pager.next_action() {
            match action {
                Action::Map { page, pages, .. } => {
                    let first = usize::try_from(page.index()).unwrap();
                    self.present[first..][..usize::try_from(pages).unwrap()].fill(true);
                    self.pager.mapped(page, pages, pages, None);
                }
                Action::Read(transfer) => {
                    (0..self.pager.op_pages(transfer.op).len())
                        .for_each(|n| self.pager.page_read(transfer.op, n, true));
                    self.pager.read_ended(transfer.op);
                }
                Action::Write(transfer) => self.pager.write_ended(transfer.op, true),
                Action::Ask { batch, kind: BatchKind::Evict } => self.evict(batch),
                Action::Wake { .. } => {}
                other => panic!("nothing that asks for {other:?} has happened"),
            }
        }
    }

    fn evict(&mut self, batch: u32) {
        for page in self.pager.batch_pages(batch).to_vec() {
            self.present[usize::try_from(page.index()).unwrap()] = false;
            // All pages differ, and none ever changes or packs.
            let content = Content { fill: None, hash: page.index() + 1 };
            let packed = self.pager.wants_packed(page, content.hash).then_some(&[0_u8; 4096][..]);
            let buffer = self.pager.take_write_buffer().unwrap();
            if !self.pager.evicted(page, content, packed, buffer) {
                self.pager.give_write_buffer(buffer);
            }
        }
        self.pager.batch_ended(batch);
    }
}
