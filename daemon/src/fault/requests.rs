//! The daemon's end of a client's ring: asks the agent, and takes its answers.
//!
//! What was asked is kept here; nothing that the client can write to is believed. Bytes are copied to a private buffer
//! before anybody looks at them.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::ptr;
use std::time::Instant;

use fmalloc_proto::PAGE_SIZE;
use fmalloc_proto::ring::{BatchKind, Layout, PageResult, Ring, STATE_DONE, STATE_FREE, STATE_REQUESTED};
use nix::sys::eventfd::EventFd;

use super::memory::Memory;
use super::pack::Packer;
use super::remaps::Remaps;
use crate::hash::{PageKey, fill};
use crate::pager::page::PageId;
use crate::pager::{Content, Pager, Store};

/// A batch that the agent has.
#[derive(Debug, Clone, Copy)]
struct Asked {
    kind: BatchKind,
    count: u32,
    since: Instant,
}

/// See the module.
#[derive(Debug)]
pub struct AgentRing {
    ring: Ring,
    agent: EventFd,
    daemon: EventFd,
    asked: Vec<Option<Asked>>,
    packer: Packer,
}

impl AgentRing {
    /// Maps the ring, whose header the control plane has written.
    ///
    /// # Errors
    /// What `mmap` says.
    pub fn new(memfd: &OwnedFd, layout: Layout, agent: EventFd, daemon: EventFd) -> std::io::Result<Self> {
        let ring = Ring::map(memfd.as_fd(), layout)?;
        let asked = (0..layout.batches()).map(|_| None).collect();
        Ok(Self { ring, agent, daemon, asked, packer: Packer::default() })
    }

    /// For polling: rung by the agent.
    #[must_use]
    pub fn doorbell(&self) -> RawFd {
        self.daemon.as_fd().as_raw_fd()
    }

    /// Makes the doorbell quiet again. Do this before [`AgentRing::collect`], so that no ring is missed.
    pub fn clear_doorbell(&self) {
        let _ = nix::unistd::read(self.daemon.as_fd(), &mut [0; 8]);
    }

    /// Whether the agent has anything to do.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.asked.iter().any(Option::is_some)
    }

    /// Since when the agent owes an answer.
    #[must_use]
    pub fn waits_since(&self) -> Option<Instant> {
        self.asked.iter().flatten().map(|asked| asked.since).min()
    }

    /// Asks the agent to work on the pages at `addrs`.
    pub fn ask(&mut self, batch: u32, kind: BatchKind, addrs: impl Iterator<Item = u64>) {
        let most = self.ring.layout().batch_pages();
        let mut count = 0;
        for (index, addr) in (0..most).zip(addrs) {
            self.ring.set_addr(batch, index, addr);
            count += 1;
        }
        self.ring.set_request(batch, kind, count);
        self.asked[batch as usize] = Some(Asked { kind, count, since: Instant::now() });
        self.ring.set_state(batch, STATE_REQUESTED);
        // A full counter is a ring too.
        let _ = nix::unistd::write(self.agent.as_fd(), &1_u64.to_ne_bytes());
    }

    /// Asks the agent to leave in place what it has not taken yet.
    pub fn stop(&self) {
        let busy = (0..self.ring.layout().batches()).zip(&self.asked).filter(|(_, asked)| asked.is_some());
        busy.for_each(|(batch, _)| self.ring.stop(batch));
    }

    /// Has the agent take nothing from now on, or go on.
    pub fn shut_gate(&self, shut: bool) {
        self.ring.set_gate(shut);
    }

    /// Whether the agent works on evicting this page.
    #[must_use]
    pub fn is_out<S: Store>(&self, pager: &Pager<S>, page: PageId) -> bool {
        let evicts = |asked: &Option<Asked>| asked.is_some_and(|asked| asked.kind == BatchKind::Evict);
        let batches = (0..self.ring.layout().batches()).zip(&self.asked).filter(|(_, asked)| evicts(asked));
        batches.into_iter().any(|(batch, _)| pager.batch_pages(batch).contains(&page))
    }

    /// Hands the answers of finished batches to the pager.
    pub fn collect<S: Store>(
        &mut self,
        pager: &mut Pager<S>,
        memory: &Memory,
        key: &PageKey,
        remaps: Option<&Remaps>,
    ) {
        for batch in 0..self.ring.layout().batches() {
            let Some(asked) = self.asked[batch as usize] else { continue };
            if self.ring.state(batch) != STATE_DONE {
                continue;
            }
            self.asked[batch as usize] = None;
            match asked.kind {
                BatchKind::Evict | BatchKind::Copy => {
                    self.collect_pages(batch, asked, pager, memory, key, remaps);
                }
                BatchKind::Probe | BatchKind::Protect => {
                    for index in 0..asked.count {
                        let page = pager.batch_pages(batch)[index as usize];
                        let result = PageResult::from_number(self.ring.result(batch, index));
                        match (asked.kind, result) {
                            (BatchKind::Protect, _) => pager.protected(page),
                            (_, Some(PageResult::Present)) => pager.probed(batch, index as usize, page, true),
                            (_, Some(PageResult::Absent)) => pager.probed(batch, index as usize, page, false),
                            _ => pager.not_probed(batch, index as usize, page),
                        }
                    }
                }
            }
            self.ring.set_state(batch, STATE_FREE);
            pager.batch_ended(batch);
        }
    }

    /// Takes pages that the agent has moved or copied out.
    fn collect_pages<S: Store>(
        &mut self,
        batch: u32,
        asked: Asked,
        pager: &mut Pager<S>,
        memory: &Memory,
        key: &PageKey,
        remaps: Option<&Remaps>,
    ) {
        let mut spare = None;
        let copies = asked.kind == BatchKind::Copy;
        let came = if copies { PageResult::Copied } else { PageResult::Moved };
        for index in 0..asked.count {
            let page: PageId = pager.batch_pages(batch)[index as usize];
            let result =
                PageResult::from_number(self.ring.result(batch, index)).unwrap_or(PageResult::Failed);
            if result != came {
                if copies {
                    pager.not_copied(page, result)
                } else {
                    pager.not_evicted(page, result)
                }
                continue;
            }
            let place = pager.regions().place(page).map(|(addr, _)| addr);
            if !copies && remaps.zip(place).is_some_and(|(remaps, addr)| remaps.is_strange(addr)) {
                pager.not_evicted(page, PageResult::Absent);
                continue;
            }
            let Some(buffer) = spare.take().or_else(|| pager.take_write_buffer()) else {
                if copies {
                    pager.not_copied(page, PageResult::Busy);
                    continue;
                }
                // Not to happen: the pager asks for no more pages than it has buffers. The bytes are in the ring alone.
                tracing::error!("no buffer for an evicted page: its content is lost");
                pager.not_evicted(page, PageResult::Absent);
                continue;
            };
            // SAFETY: a page of the ring, into a buffer that nobody else uses. The client may write to the ring meanwhile:
            // then the copy holds a mixture of its own bytes.
            unsafe {
                ptr::copy_nonoverlapping(
                    self.ring.page(batch, index).as_ptr(),
                    memory.buffer(buffer).as_ptr(),
                    PAGE_SIZE,
                );
            }
            let bytes = memory.page(buffer);
            // Zeros in a file are as good a content as any.
            let fill = if pager.has_file(page) { None } else { fill(bytes) };
            let content = Content { fill, hash: if fill.is_some() { 0 } else { key.hash(bytes) } };
            let kept = if copies {
                pager.copied(page, content, buffer)
            } else {
                let packed = if fill.is_none() && pager.wants_packed(page, content.hash) {
                    self.packer.pack(bytes)
                } else {
                    None
                };
                pager.evicted(page, content, packed, buffer)
            };
            if !kept {
                spare = Some(buffer);
            }
        }
        if let Some(buffer) = spare {
            pager.give_write_buffer(buffer);
        }
    }
}
