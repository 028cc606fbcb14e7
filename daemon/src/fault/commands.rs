//! What the control thread asks of a fault thread, and when it is answered.

use std::time::{Duration, Instant};

use fmalloc_proto::PAGE;
use fmalloc_proto::groups::Token;
use fmalloc_proto::limits::MAX_ROWS;
use fmalloc_proto::messages::{ErrorCode, Failure, RegionRange, Register};
use fmalloc_proto::ring::Layout;
use fmalloc_proto::size::Size;

use super::files::NewFile;
use super::forks::{self, Announced};
use super::handle::{Answer, Command};
use super::thread::{FaultThread, Registering};
use crate::pager::RegisterError;

/// How long a change of budget may take before it is answered anyway.
const BUDGET_PATIENCE: Duration = Duration::from_secs(5);

impl FaultThread {
    pub(super) fn command(&mut self, command: Command) {
        match command {
            Command::Register { addr, len, commit, label, answer } => {
                self.start_register(Register { addr, len, commit, label }, None, answer);
            }
            Command::RegisterFile { region, mode, file, answer } => {
                match self.files.admit(*file, mode, region.len) {
                    Ok(file) => self.start_register(region, Some(file), answer),
                    Err(failure) => drop(answer.send(Err(failure))),
                }
            }
            Command::RegisterLike { region, of, answer } => {
                match self.open(of).and_then(|of| self.files.admit_like(of, region.len)) {
                    Ok(file) => self.start_register(region, Some(file), answer),
                    Err(failure) => drop(answer.send(Err(failure))),
                }
            }
            Command::Flush { range, answer } => self.flush(&range, answer),
            Command::MakeWritable { region, answer } => {
                let result = self.open(region).and_then(|region| self.make_writable(region));
                drop(answer.send(result));
            }
            Command::Changed { range, answer } => self.find_changed(&range, answer),
            Command::Prefetch { range, answer } => self.prefetch(&range, answer),
            Command::Commit { range, answer } => drop(answer.send(self.commit(&range))),
            Command::Decommit { range, answer } => {
                let result = self.part(&range).map(|(region, pages)| {
                    let unclaimed = self.pager.decommit(region, pages);
                    self.swap.unclaim(unclaimed);
                });
                drop(answer.send(result));
            }
            Command::Unregister { region, answer } => match self.open(region) {
                Ok(region) => {
                    self.pager.close(region);
                    self.rows.closing.push((region, answer));
                }
                Err(failure) => drop(answer.send(Err(failure))),
            },
            Command::Advise { range, advice, answer } => {
                let result =
                    self.part(&range).map(|(region, pages)| self.pager.advise(region, pages, advice));
                drop(answer.send(result));
            }
            Command::SetBudget { answer } => {
                self.balance();
                self.rows.budgets.push((Instant::now(), answer));
            }
            Command::Evict { region, pages, answer } => {
                let range = match region.map(|region| self.open(region)).transpose() {
                    Ok(region) => region.and_then(|r| Some((r, 0..self.pager.open_region(r)?.pages))),
                    Err(failure) => return drop(answer.send(Err(failure))),
                };
                self.next_token += 1;
                self.pager.drain(self.next_token, range, pages);
                self.rows.drains.push((self.next_token, answer));
            }
            Command::Regions { from, answer } => {
                drop(answer.send(Ok(self.pager.region_rows(self.client, from, MAX_ROWS))));
            }
            Command::PrepareFork { token, child, layout, answer } => {
                drop(answer.send(self.prepare_fork(token, child, layout)));
            }
            Command::EndFork { answer } => {
                let (children, unused) = self.forks.conclude();
                self.swap.unclaim(unused);
                self.rows.forks.push((children, answer));
            }
            Command::AgentReady { agent_tid, pid } => {
                (self.agent_tid, self.pid) = (agent_tid, pid);
                self.pager.set_agent();
                self.credit = self.credit.map(|_| Instant::now());
            }
            Command::AgentGone => self.agent_gone = true,
            Command::Stop => self.stopping = true,
        }
    }

    fn prepare_fork(&mut self, token: Token, child: u64, layout: Layout) -> Result<(), Failure> {
        if !self.inherits {
            let text = "this client did not ask for forked children to have its memory".to_owned();
            return Err(Failure { code: ErrorCode::Invalid, text });
        }
        if self.forks.is_announced() {
            let text = "one fork at a time: end the one that was prepared before".to_owned();
            return Err(Failure { code: ErrorCode::Invalid, text });
        }
        let sizes = forks::child_sizes(layout);
        let overhead = sizes.overhead() + self.pager.table_bytes();
        if !self.membership.group().has_room(overhead) {
            let text = format!(
                "the budget of {} is too small for another process: {} would be taken by its page tables and buffers",
                Size(self.membership.group().budget()),
                Size(overhead)
            );
            return Err(Failure { code: ErrorCode::Limit, text });
        }
        let claimed = self.pager.claimed_by_fork();
        self.claim(claimed)?;
        self.forks.announce(Announced { token, child, layout, claimed });
        Ok(())
    }

    pub(super) fn start_register(&mut self, region: Register, file: Option<NewFile>, answer: Answer<u32>) {
        self.rows.registering.push_back(Registering { region, file, answer });
        self.unread = true;
    }

    /// Registers what waits for that. No older event can be about its addresses any more.
    pub(super) fn finish_registering(&mut self) {
        for Registering { region, file, answer } in std::mem::take(&mut self.rows.registering) {
            let result = self.register(region);
            if let (Ok(number), Some(file)) = (&result, file) {
                self.pager.set_file(*number, file.mode);
                self.files.insert(*number, file);
            }
            drop(answer.send(result.map(u32::from)));
        }
    }

    fn register(&mut self, region: Register) -> Result<u16, Failure> {
        let Register { addr, len, commit, label } = region;
        let overlap = || Failure {
            code: ErrorCode::Invalid,
            text: "the range overlaps a region that is registered already".to_owned(),
        };
        if self.pager.regions().overlaps(addr, len) {
            return Err(overlap());
        }
        let claimed = if commit { len / PAGE } else { 0 };
        if commit {
            self.claim(claimed)?;
        }
        let registered = self.uffd.register(addr, len).map_err(|error| {
            let text = format!("registering {addr:#x}+{len:#x} with userfaultfd failed: {error}; the range must be private anonymous memory of this process");
            Failure { code: ErrorCode::Invalid, text }
        });
        let counted = registered.and_then(|()| {
            self.pager.register(addr, len, commit, label).map_err(|error| {
                self.uffd.unregister(addr, len);
                match error {
                    RegisterError::Overlap => overlap(),
                    RegisterError::Full => Failure {
                        code: ErrorCode::Limit,
                        text: "no room for the page tables of another region".to_owned(),
                    },
                }
            })
        });
        counted.inspect_err(|_| self.swap.unclaim(claimed))
    }

    pub(super) fn claim(&self, pages: u64) -> Result<(), Failure> {
        self.swap.claim(pages).map_err(|error| Failure { code: ErrorCode::SwapFull, text: error.to_string() })
    }

    fn commit(&mut self, range: &RegionRange) -> Result<(), Failure> {
        let (region, pages) = self.part(range)?;
        let missing = self.pager.uncommitted(region, &pages).unwrap_or(0);
        self.claim(missing)?;
        self.pager.commit(region, pages);
        Ok(())
    }

    /// The region with this number, if it is there.
    pub(super) fn open(&self, region: u32) -> Result<u16, Failure> {
        let number = u16::try_from(region).ok();
        number.filter(|number| self.pager.open_region(*number).is_some()).ok_or_else(|| Failure {
            code: ErrorCode::NotFound,
            text: format!("client {} has no region {region}", self.client),
        })
    }

    /// The pages of a part of a region, if the region has them.
    pub(super) fn part(&self, range: &RegionRange) -> Result<(u16, std::ops::Range<u64>), Failure> {
        let region = self.open(range.region)?;
        let pages = range.offset / PAGE..(range.offset + range.len) / PAGE;
        let inside = self.pager.open_region(region).is_some_and(|region| pages.end <= region.pages);
        inside.then_some((region, pages)).ok_or_else(|| Failure {
            code: ErrorCode::Invalid,
            text: format!("region {} is shorter than offset {} + {}", range.region, range.offset, range.len),
        })
    }

    /// Answers what had to wait.
    pub(super) fn answer(&mut self) {
        for (region, answer) in std::mem::take(&mut self.rows.closing) {
            if self.pager.is_closed(region) {
                let (segments, claimed) = self.pager.unregister(region);
                for segment in segments {
                    self.uffd.unregister(segment.addr, segment.pages * PAGE);
                }
                self.swap.unclaim(claimed);
                self.files.remove(region);
                self.publish();
                drop(answer.send(Ok(())));
            } else {
                self.rows.closing.push((region, answer));
            }
        }
        if self.pager.is_within_budget()
            || self.rows.budgets.iter().any(|(at, _)| at.elapsed() > BUDGET_PATIENCE)
        {
            for (_, answer) in self.rows.budgets.drain(..) {
                drop(answer.send(Ok(())));
            }
        }
        if !self.forks.is_pending() {
            self.rows.forks.drain(..).for_each(|(children, answer)| drop(answer.send(Ok(children))));
        }
        self.answer_files();
        for (token, pages) in self.pager.drained() {
            if let Some(place) = self.rows.drains.iter().position(|(other, _)| *other == token) {
                let (_, answer) = self.rows.drains.swap_remove(place);
                drop(answer.send(Ok(pages * PAGE)));
            }
        }
    }
}
