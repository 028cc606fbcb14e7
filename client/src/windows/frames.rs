//! The frames: one for each page that may be in RAM, in one of three lists. Pure; called with the pager's lock held.

use super::table::{Table, Zeroed};

/// No frame, where a frame's number stands.
const NONE: u32 = u32::MAX;

/// A page of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// The region's slot.
    pub(super) region: u32,
    /// The page's number in it, in units of paging.
    pub(super) page: u32,
}

/// What a frame is doing. Zero, which tables begin with, is `Free`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum State {
    /// In the list of free frames.
    Free,
    /// A thread is changing access to it, and will say when it has.
    Busy,
    /// The program has access; in the list of active frames unless it is pinned.
    Active,
    /// Access was taken away to see whether the page is still in use; in the list of idle frames.
    Idle,
}

/// What the page is when it is not in RAM and nobody wrote to it while it was. Zero is `Fresh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Origin {
    /// Zeros, as in the file.
    Fresh,
    /// Zeros, but the file has something else.
    Stale,
    /// Its bytes are in the file.
    Cold,
}

/// What becomes of a page that leaves RAM. Zero is `Keep`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Fate {
    /// It keeps its content.
    Keep,
    /// It becomes zeros.
    Discard,
    /// It goes out of use.
    Void,
}

/// A page's worth of RAM and the page in it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Frame {
    pub(super) region: u32,
    pub(super) page: u32,
    prev: u32,
    next: u32,
    /// Guards that want it to stay.
    pub(super) pins: u32,
    pub(super) state: State,
    pub(super) origin: Origin,
    pub(super) fate: Fate,
    /// The program may have written to it since it was last written out.
    pub(super) dirty: bool,
}

// SAFETY: zero is a value of each field, and nothing needs dropping.
unsafe impl Zeroed for Frame {}

impl Frame {
    pub(super) fn place(&self) -> Place {
        Place { region: self.region, page: self.page }
    }
}

/// First in, first out, with removal from the middle.
#[derive(Debug, Clone, Copy)]
struct List {
    head: u32,
    tail: u32,
    len: u32,
}

impl List {
    const EMPTY: Self = Self { head: NONE, tail: NONE, len: 0 };
}

/// All frames.
#[derive(Debug)]
pub(super) struct Frames {
    table: Table<Frame>,
    free: List,
    active: List,
    idle: List,
}

impl Frames {
    /// Frames as the table has entries, all of them free.
    pub(super) fn new(table: Table<Frame>) -> Self {
        let mut frames = Self { table, free: List::EMPTY, active: List::EMPTY, idle: List::EMPTY };
        frames.free_from(0);
        frames
    }

    /// Moves everything to a larger table and gives the old one back.
    pub(super) fn grow(&mut self, mut table: Table<Frame>) -> Table<Frame> {
        let old = self.table.len();
        if let Some(part) = table.get_mut(..old) {
            part.copy_from_slice(&self.table);
            std::mem::swap(&mut self.table, &mut table);
            self.free_from(old);
        }
        table
    }

    fn free_from(&mut self, first: usize) {
        for frame in first..self.table.len() {
            let Ok(frame) = u32::try_from(frame) else { return };
            self.push(frame, State::Free);
        }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    pub(super) fn idle(&self) -> u32 {
        self.idle.len
    }

    pub(super) fn first_free(&self) -> Option<u32> {
        Some(self.free.head).filter(|frame| *frame != NONE)
    }

    pub(super) fn first_active(&self) -> Option<u32> {
        Some(self.active.head).filter(|frame| *frame != NONE)
    }

    pub(super) fn first_idle(&self) -> Option<u32> {
        Some(self.idle.head).filter(|frame| *frame != NONE)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Frame)> {
        (0_u32..).zip(self.table.iter())
    }

    pub(super) fn get(&self, frame: u32) -> &Frame {
        &self.table[index(frame)]
    }

    pub(super) fn get_mut(&mut self, frame: u32) -> &mut Frame {
        &mut self.table[index(frame)]
    }

    /// Gives a frame another state: takes it out of its list and puts it at the end of the new one.
    pub(super) fn set(&mut self, frame: u32, state: State) {
        self.unlink(frame);
        self.push(frame, state);
    }

    /// Takes a frame out of its list; its state stays.
    pub(super) fn unlink(&mut self, frame: u32) {
        let Frame { prev, next, state, pins, .. } = *self.get(frame);
        if state == State::Active && pins > 0 {
            return;
        }
        let Some(list) = self.list(state) else { return };
        list.len -= 1;
        if list.head == frame {
            list.head = next;
        }
        if list.tail == frame {
            list.tail = prev;
        }
        if prev != NONE {
            self.get_mut(prev).next = next;
        }
        if next != NONE {
            self.get_mut(next).prev = prev;
        }
    }

    /// Puts a frame that is in no list at the end of the one for a state, if there is one. Pinned frames are in none.
    pub(super) fn push(&mut self, frame: u32, state: State) {
        self.get_mut(frame).state = state;
        if state == State::Active && self.get(frame).pins > 0 {
            return;
        }
        let Some(list) = self.list(state) else { return };
        let last = list.tail;
        list.tail = frame;
        list.len += 1;
        if last == NONE {
            list.head = frame;
        }
        let entry = self.get_mut(frame);
        entry.prev = last;
        entry.next = NONE;
        if last != NONE {
            self.get_mut(last).next = frame;
        }
    }

    fn list(&mut self, state: State) -> Option<&mut List> {
        match state {
            State::Free => Some(&mut self.free),
            State::Active => Some(&mut self.active),
            State::Idle => Some(&mut self.idle),
            State::Busy => None,
        }
    }
}

fn index(frame: u32) -> usize {
    fmalloc_proto::num::to_usize(u64::from(frame))
}
