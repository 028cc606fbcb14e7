//! Which I/O buffers are in use, and by how many. Reading and writing have pools of their own, so that neither can
//! starve the other. A buffer is one page; neighbours make larger transfers.

use std::ops::Range;

use super::page::Buffer;

/// A pool of numbered buffers.
#[derive(Debug)]
pub struct Buffers {
    first: Buffer,
    users: Vec<u8>,
    next: usize,
    free: usize,
}

impl Buffers {
    /// The buffers of `range`, all free.
    #[must_use]
    pub fn new(range: Range<Buffer>) -> Self {
        let count = usize::from(range.end - range.start);
        Self { first: range.start, users: vec![0; count], next: 0, free: count }
    }

    /// Buffers that nobody uses.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free
    }

    /// Buffers in all.
    #[must_use]
    pub fn len(&self) -> usize {
        self.users.len()
    }

    /// Whether the pool has no buffers at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.users.is_empty()
    }

    /// Takes up to `want` neighbours, each with one user, and gives the first and how many. None if all are in use.
    pub fn take(&mut self, want: usize) -> Option<(Buffer, usize)> {
        if self.free == 0 || want == 0 {
            return None;
        }
        let len = self.users.len();
        if self.next >= len {
            self.next = 0;
        }
        let start = (self.next..len).chain(0..self.next).find(|place| self.users[*place] == 0)?;
        let count = self.users[start..].iter().take(want).take_while(|users| **users == 0).count();
        self.users[start..start + count].fill(1);
        self.free -= count;
        self.next = start + count;
        Some((self.first + Buffer::try_from(start).ok()?, count))
    }

    /// Adds a user to a buffer that has one.
    pub fn share(&mut self, buffer: Buffer) {
        let users = &mut self.users[usize::from(buffer - self.first)];
        debug_assert!(*users > 0, "sharing a free buffer");
        *users += 1;
    }

    /// Takes a user off a buffer.
    pub fn give(&mut self, buffer: Buffer) {
        let users = &mut self.users[usize::from(buffer - self.first)];
        debug_assert!(*users > 0, "buffer given back twice");
        *users = users.saturating_sub(1);
        self.free += usize::from(*users == 0);
    }
}
