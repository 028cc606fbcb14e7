//! What a client needs whose agent evicts by write-protection and mremap (kernels before 6.8; see `client/agent/remapper`).
//!
//! Each remapping raises an event among those of the program, and the agent waits until it has been read: so events are
//! read at any time, and the agent's are known by their target, which lies in its staging area. When one turns out to be
//! the program's while pages are on their way out, the batches are stopped, and it is kept back until they have come back.
//! Then it is as if it had been read no earlier, but for this: the thread that raised it goes on meanwhile. What it can do
//! to a page on its way out, and what comes of it:
//!
//! - Write: no. Pages are protected before the agent takes any, and with the gate shut nothing is read before that.
//!   So for a page that has left, the discard came after the last write, whether it was MADV_DONTNEED or MADV_FREE; one
//!   that has stayed is as if nobody had touched it.
//! - Move or unmap it: then the agent finds nothing, or has been quicker. It makes sure before and after.
//! - Move another page on its way out to where it was, in the instant between the agent's last look and its taking it:
//!   what the agent has then is a stranger's. The order of the events shows it, and nothing of it is believed.

use std::collections::VecDeque;
use std::ops::Range;

use fmalloc_proto::messages::Staging;

use super::uffd::Message;

/// See the module.
#[derive(Debug)]
pub struct Remaps {
    staging: Range<u64>,
    kept: VecDeque<Message>,
    strangers: Vec<Range<u64>>,
    /// Pages with a write-protection that nobody is about to take off, and threads that wait for it.
    protected: Vec<u64>,
}

impl Remaps {
    /// For an agent with this staging area.
    #[must_use]
    pub fn new(staging: Staging) -> Self {
        let staging = staging.addr..staging.addr.saturating_add(staging.len);
        Self { staging, kept: VecDeque::new(), strangers: Vec::new(), protected: Vec::new() }
    }

    /// Whether the agent raised this event, which then means nothing.
    pub fn is_own(&mut self, event: &Message) -> bool {
        match *event {
            Message::Remap { from, to, len } if self.staging.contains(&to) => {
                let taken = from..from.saturating_add(len);
                let arrived = |kept: &Message| match kept {
                    Message::Remap { to, len, .. } => {
                        *to < taken.end && taken.start < to.saturating_add(*len)
                    }
                    _ => false,
                };
                if self.kept.iter().any(arrived) {
                    self.strangers.push(taken);
                }
                true
            }
            Message::Unmap { start, .. } | Message::Remove { start, .. } => self.staging.contains(&start),
            _ => false,
        }
    }

    /// Keeps an event of the program back.
    pub fn keep(&mut self, event: Message) {
        self.kept.push_back(event);
    }

    /// Whether events are kept back.
    #[must_use]
    pub fn has_kept(&self) -> bool {
        !self.kept.is_empty()
    }

    /// The events that were kept back, in order; nothing is on its way out any more.
    pub fn take_kept(&mut self) -> VecDeque<Message> {
        self.strangers.clear();
        std::mem::take(&mut self.kept)
    }

    /// Whether what the agent took from `addr` belongs to another page than the one that was asked for.
    #[must_use]
    pub fn is_strange(&self, addr: u64) -> bool {
        self.strangers.iter().any(|range| range.contains(&addr))
    }

    /// Somebody waits to write to the page at `addr`, which is not on its way out.
    pub fn unprotect_later(&mut self, addr: u64) {
        if !self.protected.contains(&addr) {
            self.protected.push(addr);
        }
    }

    /// Pages whose protection is to be taken off.
    pub fn take_protected(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.protected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remaps() -> Remaps {
        Remaps::new(Staging { addr: 0x10_0000, len: 0x1_0000 })
    }

    #[test]
    fn events_are_the_agents_by_their_target() {
        let mut remaps = remaps();
        assert!(remaps.is_own(&Message::Remap { from: 0x5000, to: 0x10_1000, len: 0x1000 }));
        assert!(!remaps.is_own(&Message::Remap { from: 0x5000, to: 0x11_0000, len: 0x1000 }));
        assert!(!remaps.is_own(&Message::Remap { from: 0x10_1000, to: 0x5000, len: 0x1000 }));
        assert!(remaps.is_own(&Message::Unmap { start: 0x10_0000, end: 0x10_1000 }));
        assert!(!remaps.is_own(&Message::Remove { start: 0x5000, end: 0x6000 }));
    }

    #[test]
    fn what_was_taken_after_another_page_had_come_there_is_strange() {
        let mut remaps = remaps();
        assert!(remaps.is_own(&Message::Remap { from: 0x4000, to: 0x10_0000, len: 0x2000 }));
        remaps.keep(Message::Remap { from: 0x5000, to: 0x9000, len: 0x1000 });
        remaps.keep(Message::Remap { from: 0x7000, to: 0x5000, len: 0x1000 });
        assert!(!remaps.is_strange(0x5000), "it was taken before");
        assert!(remaps.is_own(&Message::Remap { from: 0x5000, to: 0x10_0000, len: 0x2000 }));
        assert!(remaps.is_strange(0x5000) && remaps.is_strange(0x6000) && !remaps.is_strange(0x4000));
        assert_eq!(remaps.take_kept().len(), 2);
        assert!(!remaps.is_strange(0x5000) && !remaps.has_kept());
    }
}
