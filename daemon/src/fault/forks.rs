//! Forks of a client, as its fault thread sees them: announced, read from the userfaultfd, and handed to the control plane,
//! which makes a client of the child.
//!
//! The child runs as soon as the event has been read. Its pager is made at that moment; that of another thread's mremap may
//! be told of later, so the child's faults wait until no change of the parent's address space is under way. From the
//! reading on, the child's userfaultfd exists in this process only, until the child holds a descriptor of its own: if it is
//! closed here, the child reads zeros. So it never is while the child lives.
//!
//! A fork that nobody announced (a raw `clone`) has no agent and no claim in swap: it is not served. What is not resident
//! makes such a child wait; it can run another program.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use fmalloc_proto::PAGE_SIZE;
use fmalloc_proto::groups::Token;
use fmalloc_proto::ring::Layout;
use tokio::sync::mpsc::UnboundedSender;

use super::memory::Memory;
use super::uffd::ClientUffd;
use crate::arena::Arena;
use crate::hash::PageKey;
use crate::pager::{Forked, Pager, Sizes, Stop};
use crate::swap::{ClientSlots, Swap};

/// Children at once that nobody announced; with more of them no events are read.
const MAX_STRANGERS: usize = 64;
/// Moves of memory that are remembered.
const MOVES: usize = 16;

/// A child for the control plane to make a client of.
#[derive(Debug)]
pub struct Birth {
    /// By which the child will say who it is.
    pub token: Token,
    /// Its pager, not served yet.
    pub pager: Box<Pager<ClientSlots>>,
    /// The pager's buffers.
    pub memory: Memory,
    /// Its userfaultfd.
    pub uffd: ClientUffd,
    /// Layout of the ring that the pager expects.
    pub layout: Layout,
}

/// A fork that was announced.
#[derive(Debug)]
pub struct Announced {
    /// Names the child.
    pub token: Token,
    /// Number of the child, which spreads its slots.
    pub child: u64,
    /// Layout of the child's ring.
    pub layout: Layout,
    /// Pages claimed for it that no child has yet.
    pub claimed: u64,
}

/// A child that is not handed over yet.
#[derive(Debug)]
struct Nascent {
    token: Token,
    layout: Layout,
    forked: Forked<ClientSlots>,
    memory: Memory,
    uffd: ClientUffd,
}

/// See the module.
#[derive(Debug)]
pub struct Forks {
    births: UnboundedSender<Birth>,
    announced: Option<Announced>,
    nascent: Vec<Nascent>,
    strangers: Vec<ClientUffd>,
    /// Children since the fork was announced.
    conceived: u64,
    /// Latest first: from, to, length.
    moves: VecDeque<(u64, u64, u64)>,
}

impl Forks {
    /// No forks yet; children go to `births`.
    #[must_use]
    pub fn new(births: UnboundedSender<Birth>) -> Self {
        Self {
            births,
            announced: None,
            nascent: Vec::new(),
            strangers: Vec::new(),
            conceived: 0,
            moves: VecDeque::new(),
        }
    }

    /// Whether a fork is announced.
    #[must_use]
    pub fn is_announced(&self) -> bool {
        self.announced.is_some()
    }

    /// A fork is about to happen. The claim for it has been made.
    pub fn announce(&mut self, announced: Announced) {
        self.announced = Some(announced);
        self.conceived = 0;
    }

    /// The fork has happened, or will not: gives the number of children, and the pages that were claimed for nothing.
    pub fn conclude(&mut self) -> (u64, u64) {
        let claimed = self.announced.take().map_or(0, |announced| announced.claimed);
        (std::mem::take(&mut self.conceived), claimed)
    }

    /// Whether a child waits to be handed over.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        !self.nascent.is_empty()
    }

    /// Whether a child needs to know what becomes of the pages that the agent has.
    #[must_use]
    pub fn is_unsettled(&self) -> bool {
        self.nascent.iter().any(|nascent| nascent.forked.is_unsettled())
    }

    /// Whether there are children that nobody announced.
    #[must_use]
    pub fn has_strangers(&self) -> bool {
        !self.strangers.is_empty()
    }

    /// Whether so many unannounced children live that no more can be borne.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.strangers.len() >= MAX_STRANGERS
    }

    /// Lets go of unannounced children that have ended or run another program.
    pub fn look_after_strangers(&mut self) {
        self.strangers.retain(|uffd| uffd.test() != Some(Stop::Gone));
    }

    /// Memory was moved.
    pub fn note_move(&mut self, from: u64, to: u64, len: u64) {
        self.moves.truncate(MOVES - 1);
        self.moves.push_front((from, to, len));
    }

    /// The event of a fork has been read.
    pub fn forked(
        &mut self,
        fd: OwnedFd,
        parent: &mut Pager<ClientSlots>,
        memory: &Memory,
        swap: &Arc<Swap>,
        poison: bool,
    ) {
        let uffd = match ClientUffd::inherited(fd, poison) {
            Ok(uffd) => uffd,
            // The descriptor is closed: nothing can be done for a child that we have not even room for.
            Err(error) => return tracing::error!(%error, "a forked child is lost: it reads zeros"),
        };
        let Some(announced) = &mut self.announced else {
            tracing::warn!("a fork that was not announced: the child can only run another program");
            return self.strangers.push(uffd);
        };
        match conceive(announced, parent, memory, swap) {
            Ok((forked, memory)) => {
                let (token, layout) = (announced.token, announced.layout);
                self.nascent.push(Nascent { token, layout, forked, memory, uffd });
                self.conceived += 1;
            }
            Err(error) => {
                tracing::error!("a forked child cannot be paged, it can only run another program: {error:#}");
                self.strangers.push(uffd);
            }
        }
    }

    /// The agent has nothing of the parent's pages any more.
    pub fn settle(&mut self, parent: &Pager<ClientSlots>, memory: &Memory, key: &PageKey) {
        for nascent in &mut self.nascent {
            parent.settle_fork(&mut nascent.forked);
            carry(&mut nascent.forked, memory, &nascent.memory, key);
        }
    }

    /// No change of the address space is under way, or the parent is gone: hands over the children.
    pub fn hand_over(&mut self) {
        for nascent in std::mem::take(&mut self.nascent) {
            let Nascent { token, layout, forked, memory, uffd } = nascent;
            let mut pager = Box::new(forked.pager);
            let ends = |addr: u64, len: u64| uffd.covers(addr) && uffd.covers(addr + len - PAGE_SIZE as u64);
            pager.correct_places(self.moves.make_contiguous(), ends);
            let birth = Birth { token, pager, memory, uffd, layout };
            if let Err(unborn) = self.births.send(birth) {
                // The daemon ends; the child waits rather than read zeros for as long as this process lives.
                std::mem::forget(unborn);
            }
        }
    }
}

/// Makes the child's pager, claims and all.
fn conceive(
    announced: &mut Announced,
    parent: &mut Pager<ClientSlots>,
    memory: &Memory,
    swap: &Arc<Swap>,
) -> anyhow::Result<(Forked<ClientSlots>, Memory)> {
    use anyhow::Context;
    let needed = parent.claimed_by_fork();
    // Memory may have been committed since, and a fork that the system began anew takes a claim again.
    let more = needed.saturating_sub(announced.claimed);
    swap.claim(more)?;
    let left = (announced.claimed + more) - needed;
    announced.claimed = 0;
    swap.unclaim(left);
    let mut make = || {
        let sizes = child_sizes(announced.layout);
        let store = ClientSlots::new(Arc::clone(swap), announced.child);
        let arena = Arena::new().context("the arena for page tables")?;
        let mut forked = parent.fork(store, arena, sizes).context("no room for page tables")?;
        let own = Memory::new(forked.pager.buffers()).context("memory for I/O buffers")?;
        carry(&mut forked, memory, &own, &swap.key);
        Ok((forked, own))
    };
    make().inspect_err(|_: &anyhow::Error| swap.unclaim(needed))
}

/// Sizes that a child begins with; its budget is set when it is served.
#[must_use]
pub fn child_sizes(layout: Layout) -> Sizes {
    Sizes::for_budget(0, layout)
}

fn carry(forked: &mut Forked<ClientSlots>, from: &Memory, to: &Memory, key: &PageKey) {
    for (page, theirs, own) in std::mem::take(&mut forked.carried) {
        // SAFETY: both are whole pages of different mappings; the parent's holds a page and changes no more, the child's
        // is not used by anybody yet.
        unsafe {
            std::ptr::copy_nonoverlapping(from.buffer(theirs).as_ptr(), to.buffer(own).as_ptr(), PAGE_SIZE);
        }
        forked.has_carried(page, key.hash(to.page(own)));
    }
}
