//! The client's agent: works on what it is asked, page by page in any order, and finds what is true at that moment.

use fmalloc_proto::PAGE;
use fmalloc_proto::ring::{BatchKind, PageResult};

use super::super::evict::Content;
use super::super::page::PageId;
use super::kernel::{Token, Trap, Vpn};
use super::{AGENT, Sim};

#[derive(Debug)]
pub(super) struct Entry {
    page: PageId,
    vpn: Option<Vpn>,
    result: Option<(PageResult, Token)>,
    /// MOVE has said that the page is shared: the agent writes to it next.
    populate: bool,
    /// The page was to be lost when it was asked for.
    lost: bool,
}

/// A batch in the ring.
#[derive(Debug)]
pub(super) struct Work {
    batch: u32,
    kind: BatchKind,
    entries: Vec<Entry>,
    /// An event was read since it was asked: nothing is moved any more (only if the run has the gate).
    stopped: bool,
}

#[derive(Debug, Default)]
pub(super) struct Agent {
    pub(super) works: Vec<Work>,
    /// Waits for its own fault at this page; whether it still sleeps.
    pub(super) blocked: Option<(Vpn, bool)>,
}

impl Agent {
    pub(super) fn wake(&mut self, first: Vpn, pages: u64) {
        if let Some((vpn, asleep)) = &mut self.blocked
            && (first..first + pages).contains(vpn)
        {
            *asleep = false;
        }
    }

    pub(super) fn stop_moving(&mut self) {
        self.works.iter_mut().for_each(|work| work.stopped = true);
    }
}

impl Sim {
    pub(super) fn ask(&mut self, batch: u32, kind: BatchKind) {
        let pages = self.pager.batch_pages(batch).to_vec();
        assert!(!pages.is_empty() && pages.len() <= self.batch_pages, "batch of {}", pages.len());
        assert!(self.agent.works.iter().all(|work| work.batch != batch), "batch used twice");
        let entry = |page| {
            let vpn = self.pager.regions().place(page).map(|(addr, _)| addr / PAGE);
            let lost = vpn.and_then(|vpn| self.kernel.get(vpn)).is_some_and(|cell| cell.errors > 1);
            Entry { page, vpn, result: None, populate: false, lost }
        };
        let entries = pages.iter().copied().map(entry).collect();
        self.agent.works.push(Work { batch, kind, entries, stopped: false });
        self.asked.extend(pages.iter().filter(|_| kind == BatchKind::Evict));
        self.asked.drain(..self.asked.len().saturating_sub(4096));
    }

    /// Lets the agent work on one page.
    pub(super) fn agent_step(&mut self) {
        if let Some((vpn, asleep)) = self.agent.blocked {
            if !asleep {
                self.kernel.faults.retain(|(_, who)| *who != AGENT);
                let absent = self.kernel.get(vpn).is_some_and(|cell| cell.token.is_none());
                self.agent.blocked = absent.then_some((vpn, true));
                if absent {
                    self.kernel.faults.push_back((vpn, AGENT));
                }
            }
            return;
        }
        let open: Vec<(usize, usize)> = (0..self.agent.works.len())
            .flat_map(|w| (0..self.agent.works[w].entries.len()).map(move |n| (w, n)))
            .filter(|(w, n)| self.agent.works[*w].entries[*n].result.is_none())
            .collect();
        if open.is_empty() {
            return;
        }
        let (w, n) = open[self.rng.index(open.len())];
        let result = match self.agent.works[w].kind {
            BatchKind::Evict => self.try_move(w, n),
            BatchKind::Probe => self.probe(w, n),
            BatchKind::Protect => self.take_access(w, n),
            BatchKind::Copy => unreachable!("no region has a file"),
        };
        if let Some(result) = result {
            let entry = &mut self.agent.works[w].entries[n];
            entry.result = Some(result);
            let (page, vpn) = (entry.page, entry.vpn);
            self.log(|| format!("agent: {page:?} at {vpn:x?}: {result:?}"));
        }
    }

    fn try_move(&mut self, w: usize, n: usize) -> Option<(PageResult, Token)> {
        let stopped = self.gate && self.agent.works[w].stopped;
        let entry = &mut self.agent.works[w].entries[n];
        let failed = Some((PageResult::Failed, 0));
        let Some(vpn) = entry.vpn else { return failed };
        let changing = self.gate && self.kernel.changing > 0;
        let Some(cell) = self.kernel.cell(vpn) else { return Some((PageResult::Refused, 0)) };
        if stopped {
            return failed;
        }
        if changing {
            return self.rng.one_in(8).then_some((PageResult::Busy, 0));
        }
        if cell.trap != Trap::None || self.rng.one_in(self.clumsy) {
            return failed;
        }
        let Some(token) = cell.token else {
            if !entry.populate {
                return Some((PageResult::Absent, 0));
            }
            // It was there when MOVE said that it is shared: now the agent runs into a fault itself.
            self.agent.blocked = Some((vpn, true));
            self.kernel.faults.push_back((vpn, AGENT));
            return None;
        };
        if !cell.open || cell.readonly {
            return Some((PageResult::Refused, 0));
        }
        if cell.pinned {
            return Some((PageResult::Busy, 0));
        }
        if cell.shared {
            cell.shared = !entry.populate;
            entry.populate = true;
            return None;
        }
        (cell.token, cell.lazy) = (None, false);
        Some((PageResult::Moved, token))
    }

    fn probe(&mut self, w: usize, n: usize) -> Option<(PageResult, Token)> {
        let failed = (PageResult::Failed, 0);
        let Some(vpn) = self.agent.works[w].entries[n].vpn else { return Some(failed) };
        if self.rng.one_in(self.clumsy) {
            return Some(failed);
        }
        let present = self.kernel.get(vpn).is_some_and(|cell| cell.token.is_some());
        Some((if present { PageResult::Present } else { PageResult::Absent }, 0))
    }

    fn take_access(&mut self, w: usize, n: usize) -> Option<(PageResult, Token)> {
        let Entry { vpn, lost, .. } = self.agent.works[w].entries[n];
        if let Some(cell) = vpn.and_then(|vpn| self.kernel.cell(vpn)) {
            // A page that is discarded between question and answer is the price of a kernel that cannot poison.
            assert!(lost, "access taken away without a disk error");
            cell.trap = Trap::Protected;
        }
        Some((PageResult::Protected, 0))
    }

    /// The daemon's part once a batch is done.
    pub(super) fn take_done_batch(&mut self) {
        let done = |work: &Work| work.entries.iter().all(|entry| entry.result.is_some());
        let Some(at) = self.agent.works.iter().position(done) else { return };
        let Work { batch, kind, entries, .. } = self.agent.works.swap_remove(at);
        self.log(|| format!("batch {batch} {kind:?} is done"));
        for (n, Entry { page, result, .. }) in entries.into_iter().enumerate() {
            let (result, token) = result.unwrap();
            match (kind, result) {
                (BatchKind::Evict, PageResult::Moved) => {
                    let buffer = self.pager.take_write_buffer().expect("a free write buffer");
                    self.buffers[usize::from(buffer)] = token;
                    let fill = (token == 0 || token.is_multiple_of(11)).then_some(token);
                    let packed = self.pager.wants_packed(page, token).then(|| {
                        let mut bytes = token.to_le_bytes().to_vec();
                        bytes.resize(self.rng.index(4000) + 8, 0);
                        bytes
                    });
                    let content = Content { hash: token, fill };
                    if !self.pager.evicted(page, content, packed.as_deref(), buffer) {
                        self.pager.give_write_buffer(buffer);
                    }
                }
                (BatchKind::Evict, _) => self.pager.not_evicted(page, result),
                (BatchKind::Probe, PageResult::Present | PageResult::Absent) => {
                    self.pager.probed(batch, n, page, result == PageResult::Present);
                }
                (BatchKind::Probe, _) => self.pager.not_probed(batch, n, page),
                (BatchKind::Protect, _) => self.pager.protected(page),
                (BatchKind::Copy, _) => unreachable!("no region has a file"),
            }
        }
        self.pager.batch_ended(batch);
    }
}
