//! The swap file: slots with content, transfers that end in any order, errors and corruption on demand.

use std::cell::RefCell;
use std::rc::Rc;

use super::super::page::{PageId, Slot};
use super::super::{Store, Transfer};
use super::Sim;
use super::kernel::Token;
use super::rng::Rng;

/// What a damaged slot holds.
const GARBAGE: Token = 1 << 60;

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct SlotState {
    pub(super) taken: bool,
    pub(super) content: Option<Token>,
    pub(super) damaged: bool,
    readers: u32,
    writing: bool,
}

#[derive(Debug)]
pub(super) struct Disk {
    pub(super) slots: Vec<SlotState>,
    pub(super) claimed: u64,
    pub(super) limit: u64,
    cursor: usize,
    rng: Rng,
}

impl Disk {
    pub(super) fn claim(&mut self, pages: u64) -> bool {
        let fits = self.claimed + pages <= self.limit;
        self.claimed += if fits { pages } else { 0 };
        fits
    }

    pub(super) fn unclaim(&mut self, pages: u64) {
        self.claimed = self.claimed.checked_sub(pages).expect("more unclaimed than claimed");
    }

    pub(super) fn used(&self) -> usize {
        self.slots.iter().filter(|slot| slot.taken).count()
    }
}

/// The pager's access to the slots.
#[derive(Debug, Clone)]
pub(super) struct TestStore(pub(super) Rc<RefCell<Disk>>);

impl TestStore {
    pub(super) fn new(limit: u64, spare: u64, rng: Rng) -> Self {
        let slots = vec![SlotState::default(); usize::try_from(limit + spare).unwrap()];
        Self(Rc::new(RefCell::new(Disk { slots, claimed: 0, limit, cursor: 0, rng })))
    }
}

impl Store for TestStore {
    fn take(&mut self, want: u32) -> Option<(Slot, u32)> {
        let disk = &mut *self.0.borrow_mut();
        if disk.rng.one_in(50) {
            return None; // another client is using up what is free
        }
        let len = disk.slots.len();
        let start = if disk.rng.one_in(8) { disk.rng.index(len) } else { disk.cursor };
        let first = (start..len).chain(0..start).find(|slot| !disk.slots[*slot].taken)?;
        let mut count = 0;
        while count < want as usize && first + count < len && !disk.slots[first + count].taken {
            assert!(!disk.slots[first + count].writing && disk.slots[first + count].readers == 0);
            disk.slots[first + count] = SlotState { taken: true, ..SlotState::default() };
            count += 1;
        }
        disk.cursor = (first + count) % len;
        Some((Slot::try_from(first).unwrap(), u32::try_from(count).unwrap()))
    }

    fn share(&mut self, _: Slot) -> bool {
        false // no forks here
    }

    fn give(&mut self, slot: Slot) {
        let slot = &mut self.0.borrow_mut().slots[slot as usize];
        assert!(slot.taken, "slot given back twice");
        assert!(!slot.writing && slot.readers == 0, "slot given back while a transfer uses it");
        *slot = SlotState::default();
    }

    fn claim_page(&mut self) -> bool {
        self.0.borrow_mut().claim(1)
    }
}

/// A transfer in flight.
#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) transfer: Transfer,
    pub(super) write: bool,
    /// What is being written.
    tokens: Vec<Token>,
    /// For whom, as far as reads go.
    pages: Vec<PageId>,
}

impl Sim {
    pub(super) fn submit(&mut self, transfer: Transfer, write: bool) {
        let pages = self.pager.op_pages(transfer.op).to_vec();
        assert_eq!(pages.len(), transfer.pages as usize);
        assert!(transfer.pages > 0, "empty transfer");
        let mut tokens = Vec::new();
        {
            let disk = &mut *self.disk.0.borrow_mut();
            for n in 0..transfer.pages as usize {
                let slot = &mut disk.slots[transfer.slot as usize + n];
                assert!(slot.taken, "transfer on a slot that is not taken");
                assert!(!slot.writing, "transfer on a slot that is being written");
                tokens.push(self.buffers[usize::from(transfer.buffer) + n]);
                if write {
                    assert_eq!(slot.readers, 0, "write to a slot that is being read");
                    slot.writing = true;
                } else {
                    assert!(slot.content.is_some(), "read of a slot that was never written");
                    slot.readers += 1;
                }
            }
        }
        self.io.push(InFlight { transfer, write, tokens, pages });
    }

    /// Ends the `at`-th transfer.
    pub(super) fn complete(&mut self, at: usize) {
        let InFlight { transfer, write, tokens, pages } = self.io.swap_remove(at);
        self.log(|| format!("io ends: write {write} {transfer:?} {pages:?}"));
        let disk = self.disk.clone();
        let slot_of = |n: usize| transfer.slot as usize + n;
        if write {
            let good = !(self.errors && self.rng.one_in(12));
            for (n, token) in tokens.iter().enumerate() {
                let slot = &mut disk.0.borrow_mut().slots[slot_of(n)];
                slot.writing = false;
                slot.content = Some(if good || self.rng.one_in(2) { *token } else { GARBAGE + *token });
                assert_eq!(
                    self.buffers[usize::from(transfer.buffer) + n],
                    *token,
                    "buffer changed under a write"
                );
            }
            self.pager.write_ended(transfer.op, good);
            return;
        }
        for (n, page) in pages.into_iter().enumerate() {
            let (token, damaged) = {
                let slot = &mut disk.0.borrow_mut().slots[slot_of(n)];
                slot.readers -= 1;
                (slot.content.unwrap(), slot.damaged)
            };
            let error = self.errors && self.rng.one_in(25);
            self.buffers[usize::from(transfer.buffer) + n] = token;
            if let Some(id) = self.names.get(&page) {
                self.kernel.cells[*id].errors += u32::from(error) + 2 * u32::from(damaged);
            }
            let good = !error && token == self.pager.slot_hash(page);
            self.pager.page_read(transfer.op, n, good);
        }
        self.pager.read_ended(transfer.op);
    }

    /// Damages a slot at rest.
    pub(super) fn damage(&mut self) {
        let disk = &mut *self.disk.0.borrow_mut();
        let at = self.rng.index(disk.slots.len());
        let slot = &mut disk.slots[at];
        if slot.taken && !slot.writing && slot.readers == 0 && slot.content.is_some() {
            slot.content = slot.content.map(|token| token | GARBAGE);
            slot.damaged = true;
        }
    }
}
