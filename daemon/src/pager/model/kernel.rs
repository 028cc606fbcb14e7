//! The kernel's part: which pages are present, who waits for them, what a userfaultfd reports and when it says EAGAIN.

use std::collections::{BTreeMap, VecDeque};

use super::super::page::PageId;

/// Content of a page; 0 is zeros.
pub(super) type Token = u64;
/// An address divided by the page size.
pub(super) type Vpn = u64;

/// What makes an access fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trap {
    None,
    /// UFFDIO_POISON; a discard clears it.
    Marker,
    /// mprotect(PROT_NONE) by the agent.
    Protected,
}

/// A page of the program: what the kernel has there, and what the program may find in it.
#[derive(Debug, Clone)]
pub(super) struct Cell {
    pub(super) token: Option<Token>,
    /// MADV_FREE was done while it was present: the kernel may drop it until it is written.
    pub(super) lazy: bool,
    pub(super) pinned: bool,
    pub(super) readonly: bool,
    /// Shared with a child that has exited: MOVE refuses until the agent has written to it.
    pub(super) shared: bool,
    pub(super) trap: Trap,
    /// Not PROT_NONE.
    pub(super) open: bool,
    /// Neighbours in one kernel mapping have the same number.
    pub(super) vma: u64,
    /// What a read may find, with the time at which it was written.
    pub(super) allowed: Vec<(Token, u64)>,
    /// MADV_FREE since the last write.
    pub(super) freed: bool,
    /// Discards that the program has called and that have not returned.
    pub(super) discards: u32,
    /// An mremap that moves it has not returned.
    pub(super) moving: bool,
    /// Tasks of the program that touch it.
    pub(super) users: u32,
    /// Disk errors that were injected where its bytes were. One must not be enough to lose it.
    pub(super) errors: u32,
    /// Its name, once the pager has used one for it.
    pub(super) page: Option<PageId>,
    pub(super) mapped: bool,
}

impl Cell {
    pub(super) fn new(vma: u64, page: Option<PageId>, open: bool) -> Self {
        Self {
            token: None,
            lazy: false,
            pinned: false,
            readonly: false,
            shared: false,
            trap: Trap::None,
            open,
            vma,
            allowed: vec![(0, 0)],
            freed: false,
            discards: 0,
            moving: false,
            users: 0,
            errors: 0,
            page,
            mapped: true,
        }
    }

    pub(super) fn allows(&self, token: Token) -> bool {
        self.allowed.iter().any(|(allowed, _)| *allowed == token)
    }

    /// The program wrote `token`.
    pub(super) fn wrote(&mut self, token: Token, now: u64) {
        (self.token, self.lazy, self.freed, self.errors) = (Some(token), false, false, 0);
        self.allowed = vec![(token, now)];
        if self.discards > 0 && token != 0 {
            self.allowed.push((0, now));
        }
    }

    /// The program read what is there: from now on nothing else but what may still happen.
    pub(super) fn was_read(&mut self, now: u64) {
        let Some(token) = self.token else { return };
        let when = self.allowed.iter().find(|(allowed, _)| *allowed == token).map_or(now, |(_, when)| *when);
        self.errors = 0;
        self.allowed = vec![(token, when)];
        if token != 0 && (self.discards > 0 || self.freed) {
            self.allowed.push((0, now));
        }
    }

    pub(super) fn zap(&mut self) {
        (self.token, self.lazy, self.pinned, self.shared) = (None, false, false, false);
        if self.trap == Trap::Marker {
            self.trap = Trap::None;
        }
    }
}

/// An event, in pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    Remove { vpn: Vpn, pages: u64 },
    Unmap { vpn: Vpn, pages: u64 },
    Remap { from: Vpn, to: Vpn, pages: u64 },
}

/// Address space and userfaultfd of the program.
#[derive(Debug, Default)]
pub(super) struct Kernel {
    pub(super) cells: Vec<Cell>,
    pub(super) mem: BTreeMap<Vpn, usize>,
    /// Unread faults: where, and which thread.
    pub(super) faults: VecDeque<(Vpn, usize)>,
    /// Unread events and who raised them.
    pub(super) events: VecDeque<(usize, Event)>,
    /// `mmap_changing`: above zero from before a change until its raiser has run on after its event was read.
    pub(super) changing: u32,
    pub(super) vmas: u64,
}

impl Kernel {
    pub(super) fn cell(&mut self, vpn: Vpn) -> Option<&mut Cell> {
        self.mem.get(&vpn).map(|id| &mut self.cells[*id])
    }

    pub(super) fn get(&self, vpn: Vpn) -> Option<&Cell> {
        self.mem.get(&vpn).map(|id| &self.cells[*id])
    }

    pub(super) fn new_vma(&mut self) -> u64 {
        self.vmas += 1;
        self.vmas
    }

    pub(super) fn place_new(&mut self, vpn: Vpn, cell: Cell) {
        self.cells.push(cell);
        let id = self.cells.len() - 1;
        assert!(self.mem.insert(vpn, id).is_none(), "model: page placed twice");
    }

    pub(super) fn remove(&mut self, vpn: Vpn) {
        if let Some(id) = self.mem.remove(&vpn) {
            self.cells[id].mapped = false;
        }
    }

    pub(super) fn is_free(&self, vpn: Vpn, pages: u64) -> bool {
        self.mem.range(vpn..vpn + pages).next().is_none()
    }
}
