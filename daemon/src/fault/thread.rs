//! The loop of a fault thread: waits, feeds the pager core with what happened, does what it says.
//!
//! One thread per client; nothing here is shared with other clients but the swap file and its slots. The loop neither
//! logs nor allocates for a fault, and takes no lock.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use fmalloc_proto::PAGE;
use fmalloc_proto::messages::Register;
use nix::sys::eventfd::EventFd;

use super::files::{Files, NewFile};
use super::forks::Forks;
use super::group::{Membership, Needs};
use super::handle::{Answer, Command};
use super::latency::{Sampler, Step};
use super::memory::{Memory, ZERO_PAGES};
use super::pack::unpack;
use super::placement::{IDLE, Placement, SPIN};
use super::processor::Processor;
use super::reactor::{Completion, Io, Reactor, Ready};
use super::remaps::Remaps;
use super::requests::AgentRing;
use super::stats::{Condition, SharedStats};
use super::trouble::Trouble;
use super::uffd::{BATCH, ClientUffd, Message};
use crate::pager::{Action, Packed, Pager, Source, Stop, Transfer};
use crate::swap::{ClientSlots, Swap};

/// How long to wait before mapping is tried again after the kernel said EAGAIN and no message explains it: the thread
/// that raised the event has not run on yet.
const RETRY: Duration = Duration::from_micros(200);
/// The same after ENOMEM.
const MEMORY_RETRY: Duration = Duration::from_millis(5);
/// An agent that takes longer is called silent.
const SILENT: Duration = Duration::from_secs(2);
/// How often the thread looks around when nothing happens but something is wrong.
const LOOK_AROUND: Duration = Duration::from_millis(100);
/// How long a forked child with an agent keeps all that it inherited: most of them run another program by then.
const CREDIT: Duration = Duration::from_millis(20);

/// Requests that cannot be answered at once.
#[derive(Default)]
pub(super) struct Rows {
    pub(super) registering: VecDeque<Registering>,
    pub(super) closing: Vec<(u16, Answer<()>)>,
    pub(super) budgets: Vec<(Instant, Answer<()>)>,
    pub(super) drains: Vec<(u64, Answer<u64>)>,
    /// With the number of children, which are handed over first.
    pub(super) forks: Vec<(u64, Answer<u64>)>,
}

/// A range to be paged as soon as all older events have been read: one of them may tell of an unmapping at the same
/// address, without which the range would seem to overlap another.
pub(super) struct Registering {
    pub(super) region: Register,
    pub(super) file: Option<NewFile>,
    pub(super) answer: Answer<u32>,
}

pub(super) struct FaultThread {
    pub(super) client: u64,
    pub(super) pid: u32,
    pub(super) agent_tid: u32,
    /// Forked children have the regions too.
    pub(super) inherits: bool,
    pub(super) forks: Forks,
    pub(super) membership: Membership,
    /// Of a forked child that keeps what it inherited for now: since when, or since when it has an agent.
    pub(super) credit: Option<Instant>,
    /// The group may have something to say.
    pub(super) due: bool,
    pub(super) pager: Pager<ClientSlots>,
    pub(super) uffd: ClientUffd,
    pub(super) agent: AgentRing,
    pub(super) reactor: Box<dyn Reactor>,
    pub(super) memory: Memory,
    pub(super) swap: Arc<Swap>,
    pub(super) files: Files,
    pub(super) commands: Receiver<Command>,
    pub(super) wake: Arc<EventFd>,
    pub(super) stats: Arc<SharedStats>,
    /// Of an agent that evicts by write-protection.
    pub(super) remaps: Option<Remaps>,
    pub(super) started: Instant,
    pub(super) messages: Vec<Message>,
    pub(super) done: Vec<Completion>,
    pub(super) rows: Rows,
    /// The userfaultfd may have messages that were not read yet.
    pub(super) unread: bool,
    /// The agent itself waits for a fault: events are read although pages are on their way out.
    pub(super) agent_waits: bool,
    pub(super) agent_gone: bool,
    pub(super) stopping: bool,
    pub(super) retry_after: Option<Duration>,
    pub(super) next_token: u64,
    pub(super) trouble: Trouble,
    pub(super) sampler: Sampler,
    pub(super) placement: Placement,
    pub(super) processor: Processor,
    /// When messages were last waited for.
    pub(super) woken: Instant,
}

impl FaultThread {
    pub(super) fn run(mut self) {
        if let Err(error) = self.serve() {
            tracing::error!(client = self.client, pid = self.pid, %error, "fault thread failed; its client waits for ever");
        }
        // The children of a parent that has gone.
        self.forks.settle(&self.pager, &self.memory, &self.swap.key);
        self.forks.hand_over();
        self.give_back();
        self.publish();
        self.membership.leave(&self.pager.stats());
        self.stats.set_ended();
    }

    fn serve(&mut self) -> std::io::Result<()> {
        while !self.stopping {
            self.balance();
            self.act();
            // Figures first: who gets an answer may look at them at once.
            self.publish();
            self.answer();
            if self.stopping {
                break;
            }
            let mut done = std::mem::take(&mut self.done);
            let ready = self.wait(&mut done)?;
            self.woken = Instant::now();
            let now = u64::try_from((self.woken - self.started).as_millis()).unwrap_or(u64::MAX);
            self.pager.set_now(now);
            for completion in done.drain(..) {
                self.complete(completion);
            }
            self.done = done;
            self.end_file_writes();
            // Who has waited for a read goes on before the agent's pages are looked through.
            self.act();
            self.handle(ready);
        }
        Ok(())
    }

    /// Waits until something happens: awake for a while if a read is in flight and it pays.
    fn wait(&mut self, done: &mut Vec<Completion>) -> std::io::Result<Ready> {
        let timeout = self.timeout();
        let way = self.placement.way();
        self.processor.go(self.pid, way);
        if !self.processor.is_bound() {
            return self.reactor.wait(timeout, !self.unread, done);
        }
        if self.pager.awaits_reads() {
            let begin = Instant::now();
            while begin.elapsed() < SPIN {
                let ready = self.reactor.wait(Some(Duration::ZERO), !self.unread, done)?;
                if ready != Ready::default() || !done.is_empty() {
                    return Ok(ready);
                }
            }
        }
        let ready =
            self.reactor.wait(Some(timeout.map_or(IDLE, |timeout| timeout.min(IDLE))), !self.unread, done)?;
        if ready == Ready::default() && done.is_empty() && !self.pager.has_io() {
            self.placement.rest();
        }
        Ok(ready)
    }

    fn handle(&mut self, ready: Ready) {
        if ready.agent {
            self.agent.clear_doorbell();
        }
        self.collect();
        if ready.uffd_error {
            self.uffd.restore_nonblocking();
        }
        self.unread |= ready.uffd | self.has_kept();
        if self.forks.is_unsettled() && self.pager.evicting() == 0 {
            self.forks.settle(&self.pager, &self.memory, &self.swap.key);
        }
        if self.unread || self.pager.is_blocked() || self.waits_for_events() {
            self.read_messages();
        }
        if self.retry_after.take().is_some() {
            self.pager.retry();
        }
        if ready.commands {
            self.due = true;
            let _ = nix::unistd::read(self.wake.as_fd(), &mut [0; 8]);
            while let Ok(command) = self.commands.try_recv() {
                self.command(command);
            }
        }
        if (self.agent_gone || self.agent_tid == 0) && self.uffd.test() == Some(Stop::Gone) {
            self.stopping = true;
        }
        if self.forks.has_strangers() {
            self.forks.look_after_strangers();
        }
    }

    /// Whether something can be done only when all events have been read.
    fn waits_for_events(&self) -> bool {
        self.pager.has_unknown() || !self.rows.registering.is_empty() || self.forks.is_pending()
    }

    /// Keeps to the client's share of its group's budget.
    pub(super) fn balance(&mut self) {
        let stats = self.pager.stats();
        let held = stats.resident_pages * PAGE + stats.overhead_bytes;
        self.membership.count(stats.resident_pages, held);
        if !self.membership.group().is_shared() {
            if std::mem::take(&mut self.due) {
                self.pager.set_budget(self.membership.group().budget());
            }
            return;
        }
        if let Some(since) = self.credit {
            let over = self.agent_tid != 0 && since.elapsed() > CREDIT;
            if !(over || self.pager.is_starved()) {
                return;
            }
            (self.credit, self.due) = (None, true);
        }
        let short = self.pager.lacks_frames();
        if short || std::mem::take(&mut self.due) || held > stats.budget_bytes {
            let overhead = self.pager.least_overhead();
            let needs = Needs { held, overhead, faults: stats.faults, short };
            self.pager.ease_budget(self.membership.balance(needs, Instant::now()));
        }
    }

    /// How long nothing needs to be done if nothing happens.
    fn timeout(&self) -> Option<Duration> {
        let clock = self.pager.deadline().map(|at| {
            let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
            Duration::from_millis(at.saturating_sub(now).max(1))
        });
        let events = self.waits_for_events().then_some(RETRY);
        let watchful = self.agent_gone
            || self.agent_tid == 0
            || !self.rows.budgets.is_empty()
            || self.agent.is_busy()
            || self.forks.has_strangers();
        let credit = self.credit.map(|since| CREDIT.saturating_sub(since.elapsed()) + RETRY);
        let credit = credit.filter(|_| self.agent_tid != 0);
        let look = watchful.then_some(LOOK_AROUND);
        // Writes that needed no waiting: the pager is to hear of them.
        let ended = self.files.has_ended().then_some(Duration::ZERO);
        [clock, self.retry_after, events, look, credit, ended].into_iter().flatten().min()
    }

    /// Reads what the kernel has to tell. Faults always; events only while no page is on its way out, since what an event
    /// means for such a page would depend on whether it had left already.
    fn read_messages(&mut self) {
        loop {
            let mut most = BATCH;
            let remaps = self.remaps.is_some();
            if (self.pager.evicting() > 0 && !self.agent_waits && !remaps) || self.forks.is_full() {
                if !self.uffd.is_readable() {
                    break;
                }
                most = self.uffd.pending_faults();
                if most == 0 {
                    // Readable without a fault: an event waits, and is read when the last batch is back.
                    self.pager.hold_evictions(true);
                    self.unread = true;
                    return;
                }
            }
            let mut messages = std::mem::take(&mut self.messages);
            if remaps {
                self.agent.shut_gate(true);
            }
            let timed = self.sampler.start();
            self.uffd.read(&mut messages, most);
            let nothing = messages.is_empty();
            // Fewer than asked for were all. Behind an event more may come.
            let only_faults = messages.iter().all(|message| matches!(message, Message::Fault { .. }));
            let drained = nothing || messages.len() < most && only_faults;
            if !only_faults && !remaps && self.pager.evicting() > 0 {
                // A signal has ended a fault that was counted, and an event was read in its place.
                self.agent.stop();
            }
            if !nothing {
                self.sampler.end(&self.stats.latency, Step::Message, timed.map(|_| self.woken));
            }
            for message in messages.drain(..) {
                self.message(message);
            }
            if nothing && self.uffd.lacks_descriptors() {
                // A child's userfaultfd cannot be had for now.
                self.messages = messages;
                self.unread = true;
                self.retry_after = Some(MEMORY_RETRY);
                return;
            }
            if remaps {
                self.agent.shut_gate(false);
            }
            self.messages = messages;
            if drained {
                break;
            }
        }
        self.unread = false;
        if !self.feed_kept() {
            return;
        }
        self.agent_waits = false;
        self.pager.hold_evictions(self.forks.is_unsettled());
        self.pager.retry();
        // An empty queue is not enough: an event may be on its way into it.
        if self.waits_for_events() && self.uffd.test() != Some(Stop::Again) {
            self.pager.events_drained();
            if !self.forks.is_unsettled() {
                self.forks.hand_over();
            }
            self.finish_registering();
        }
    }

    fn message(&mut self, message: Message) {
        if let Some(remaps) = &mut self.remaps
            && !matches!(message, Message::Fault { .. })
        {
            if remaps.is_own(&message) {
                return;
            }
            if self.pager.evicting() > 0 || remaps.has_kept() {
                remaps.keep(message);
                self.agent.stop();
                self.pager.hold_evictions(true);
                return;
            }
        }
        self.feed(message);
    }

    fn has_kept(&self) -> bool {
        self.remaps.as_ref().is_some_and(Remaps::has_kept)
    }

    /// Tells the pager of events that were kept back until nothing is on its way out. False if something still is.
    fn feed_kept(&mut self) -> bool {
        if self.has_kept() {
            if self.pager.evicting() > 0 {
                return false;
            }
            let kept = self.remaps.as_mut().map(Remaps::take_kept).unwrap_or_default();
            kept.into_iter().for_each(|event| self.feed(event));
        }
        true
    }

    fn feed(&mut self, message: Message) {
        match message {
            // What is on its way out will be gone, or unprotected, when it is back.
            Message::Fault { addr, protected: true, .. } if !self.is_out(addr) => {
                if let Some(remaps) = &mut self.remaps {
                    remaps.unprotect_later(addr - addr % PAGE);
                }
            }
            Message::Fault { addr, thread, .. } => {
                let by_agent = thread == self.agent_tid;
                if !by_agent {
                    self.placement.fault(thread, self.woken);
                    self.sampler.fault(|| self.pager.regions().resolve(addr));
                }
                self.agent_waits |= by_agent;
                self.pager.fault(addr, by_agent);
            }
            Message::Remove { start, end } => self.pager.discard(start, end.saturating_sub(start)),
            Message::Unmap { start, end } => self.pager.unmap(start, end.saturating_sub(start)),
            Message::Remap { from, to, len } => {
                self.forks.note_move(from, to, len);
                self.pager.remap(from, to, len);
            }
            Message::Fork => {
                if let Some(child) = self.uffd.next_forked() {
                    let (pager, poison) = (&mut self.pager, self.uffd.poison);
                    self.forks.forked(child, pager, &self.memory, &self.swap, poison);
                }
            }
            Message::Other(_) => {}
        }
    }

    fn is_out(&self, addr: u64) -> bool {
        let page = self.pager.regions().resolve(addr);
        page.is_none_or(|page| self.agent.is_out(&self.pager, page))
    }

    /// Takes protection off where it has outlived its eviction, since the page was moved meanwhile.
    fn unprotect(&mut self) {
        let addrs = self.remaps.as_mut().map(Remaps::take_protected).unwrap_or_default();
        for addr in addrs {
            if self.is_out(addr) {
                self.pager.fault(addr, false);
            } else if self.uffd.unprotect(addr) == Some(Stop::Again) {
                self.note(Some(Stop::Again));
                self.remaps.iter_mut().for_each(|remaps| remaps.unprotect_later(addr));
            }
        }
    }

    /// Does all that the pager wants done.
    fn act(&mut self) {
        self.unprotect();
        while let Some(action) = self.pager.next_action() {
            match action {
                Action::Map { page, addr, pages, source } => {
                    let (asked, src) = match source {
                        Source::Zeros => (pages.min(ZERO_PAGES as u64), self.memory.zeros()),
                        Source::Buffer(buffer) => (pages, self.memory.buffer(buffer)),
                    };
                    let timed = self.sampler.start();
                    let (mut done, mut stop) = self.uffd.copy(addr, src.as_ptr(), asked);
                    self.sampler.end(&self.stats.latency, Step::Map, timed);
                    while stop.is_none() && done < pages {
                        let more = (pages - done).min(ZERO_PAGES as u64);
                        let (count, why) = self.uffd.copy(addr + done * PAGE, src.as_ptr(), more);
                        done += count;
                        stop = why;
                    }
                    self.note(stop);
                    let mapped = page.index()..page.index() + done;
                    self.sampler.mapped(&self.stats.latency, page.region(), &mapped);
                    self.pager.mapped(page, pages, done, stop);
                }
                Action::Unpack { page, buffer, from } => {
                    let into = self.memory.page_mut(buffer);
                    let good = match from {
                        Packed::Fill(word) => {
                            into.as_chunks_mut().0.fill(word.to_ne_bytes());
                            true
                        }
                        Packed::Bytes { offset, len } => {
                            let timed = self.sampler.start();
                            let good = unpack(self.pager.packed_bytes(offset, len), into);
                            self.sampler.end(&self.stats.latency, Step::Unpack, timed);
                            good
                        }
                    };
                    self.pager.unpacked(page, good);
                }
                Action::Wake { addr, pages } => self.uffd.wake(addr, pages),
                Action::Assist { addr } => {
                    let stop = self.uffd.assist(addr, self.memory.zeros().as_ptr());
                    self.note(stop);
                    // Whatever came of it, the agent looks again, and faults again if it must.
                    self.uffd.wake(addr, 1);
                }
                Action::Poison { page, addr } => {
                    if self.pager.has_file(page) {
                        let why = "its file ends before it or could not be read";
                        tracing::error!(
                            client = self.client,
                            pid = self.pid,
                            "page at {addr:#x} is lost: {why}"
                        );
                    } else {
                        self.trouble.lost(self.client, self.pid, addr);
                    }
                    if self.uffd.poison {
                        let stop = self.uffd.poison_page(addr);
                        self.note(stop);
                        if stop == Some(Stop::Exists) {
                            self.uffd.wake(addr, 1);
                        }
                        self.pager.poisoned(page, stop);
                    } else {
                        self.pager.protect(page);
                    }
                }
                Action::Read(transfer) => self.transfer(transfer, true),
                Action::Write(transfer) => self.transfer(transfer, false),
                Action::ReadFile(transfer) => self.read_file(transfer),
                Action::WriteFile(transfer) => self.write_file(transfer),
                Action::Ask { batch, kind } => {
                    let pages = self.pager.batch_pages(batch);
                    let place = |page| self.pager.regions().place(page).map_or(0, |(addr, _)| addr);
                    self.agent.ask(batch, kind, pages.iter().map(|page| place(*page)));
                }
            }
        }
    }

    /// Takes note of why a page could not be mapped.
    fn note(&mut self, stop: Option<Stop>) {
        let after = match stop {
            Some(Stop::Again) => RETRY,
            Some(Stop::NoMemory) => MEMORY_RETRY,
            Some(Stop::Gone) => {
                // The address space is gone: the process has ended or runs another program.
                self.agent_gone = true;
                return;
            }
            _ => return,
        };
        self.retry_after = Some(self.retry_after.map_or(after, |now| now.min(after)));
    }

    fn transfer(&mut self, transfer: Transfer, is_read: bool) {
        let io = Io {
            token: u64::from(transfer.op) << 1 | u64::from(is_read),
            file: None,
            is_read,
            offset: u64::from(transfer.slot) * PAGE,
            memory: self.memory.buffer(transfer.buffer),
            len: transfer.pages * u32::try_from(PAGE).unwrap_or(4096),
        };
        // SAFETY: the buffers are the transfer's until the pager hears that it ended, and the memory lives as long as
        // the thread, which does not end while transfers are in flight.
        unsafe { self.reactor.submit(io) };
        if is_read {
            self.sampler.submitted(&self.stats.latency, self.pager.op_pages(transfer.op));
        }
    }

    fn complete(&mut self, completion: Completion) {
        let (op, is_read) =
            (u32::try_from(completion.token >> 1).unwrap_or(u32::MAX), completion.token & 1 == 1);
        if self.files.has_op(op) {
            return self.complete_file(op, completion);
        }
        let good = completion.result.is_ok();
        if let Err(failure) = completion.result {
            self.trouble.report(self.client, self.pid, if is_read { "read" } else { "write" }, failure);
        }
        if !is_read {
            self.pager.write_ended(op, good);
            return;
        }
        self.sampler.read(&self.stats.latency, self.pager.op_pages(op));
        let mut wrong = 0;
        for n in 0..self.pager.op_pages(op).len() {
            let entry = self.pager.op_pages(op)[n];
            let matches = good && {
                let buffer = self.pager.op_buffer(op, n);
                self.swap.key.hash(self.memory.page(buffer)) == self.pager.slot_hash(entry)
            };
            if good && !matches {
                // It counts only if the page was not discarded meanwhile.
                let before = self.pager.stats().io_errors;
                self.pager.page_read(op, n, false);
                wrong += self.pager.stats().io_errors - before;
            } else {
                self.pager.page_read(op, n, matches);
            }
        }
        if wrong > 0 {
            let text = format_args!("{wrong} pages are not as they were written");
            self.trouble.report(self.client, self.pid, "check", text);
        }
        self.pager.read_ended(op);
    }

    /// Takes what the agent has finished.
    fn collect(&mut self) {
        self.agent.collect(&mut self.pager, &self.memory, &self.swap.key, self.remaps.as_ref());
    }

    pub(super) fn publish(&mut self) {
        let unclaimed = self.pager.take_unclaimed();
        if unclaimed > 0 {
            self.swap.unclaim(unclaimed);
        }
        let stats = self.pager.stats();
        self.stats.publish(&stats);
        self.stats.set_regions(u32::try_from(self.pager.regions().count()).unwrap_or(u32::MAX));
        let condition = if self.agent_gone {
            Condition::AgentGone
        } else if self.agent.waits_since().is_some_and(|since| since.elapsed() > SILENT) {
            Condition::AgentSilent
        } else if self.pager.has_write_errors() {
            Condition::WriteErrors
        } else if self.pager.is_starved() && self.pager.is_filled_by_tables() {
            Condition::Tables
        } else if self.pager.has_file_errors() {
            Condition::FileErrors
        } else if self.pager.is_starved() && stats.unevictable_pages > 0 {
            Condition::Unevictable
        } else {
            Condition::Fine
        };
        self.stats.set_condition(condition);
    }

    /// The client has ended: gives back all slots and claims, when no transfer uses them any more.
    fn give_back(&mut self) {
        let numbers: Vec<u16> = self.pager.regions().iter().map(|(number, _)| number).collect();
        for number in &numbers {
            self.pager.close(*number);
        }
        self.rows.registering.clear();
        self.start_transfers();
        while self.pager.has_io() || self.pager.has_file_writes() {
            let mut done = Vec::new();
            let patience = if self.files.has_ended() { Duration::ZERO } else { LOOK_AROUND };
            if self.reactor.wait(Some(patience), false, &mut done).is_err() {
                // Transfers that nobody can wait for may still write to the buffers: keep those for ever.
                tracing::error!(client = self.client, "swap I/O cannot be waited for; its slots stay taken");
                let memory = Memory::new(1).map(|spare| std::mem::replace(&mut self.memory, spare));
                std::mem::forget(memory);
                break;
            }
            done.into_iter().for_each(|completion| self.complete(completion));
            self.end_file_writes();
            self.start_transfers();
        }
        for number in numbers {
            let (_, claimed) = self.pager.unregister(number);
            self.swap.unclaim(claimed);
        }
        self.swap.unclaim(self.pager.take_unclaimed() + self.forks.conclude().1);
    }

    /// Starts transfers that were decided on before the end; everything else no longer matters.
    fn start_transfers(&mut self) {
        self.pager.hold_evictions(true);
        while let Some(action) = self.pager.next_action() {
            match action {
                Action::Read(transfer) => self.transfer(transfer, true),
                Action::Write(transfer) => self.transfer(transfer, false),
                Action::ReadFile(transfer) => self.read_file(transfer),
                Action::WriteFile(transfer) => self.write_file(transfer),
                Action::Map { page, pages, .. } => self.pager.mapped(page, pages, 0, Some(Stop::Gone)),
                _ => {}
            }
        }
    }
}
