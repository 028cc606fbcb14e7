//! What real programs allocate and free, recorded by `tests/traces/record.c` (which tells the format): cc1 compiling C, Perl
//! with hashes and sorted keys, Python with objects by `malloc`, sqlite3 with a database in memory.

use std::fs;
use std::path::Path;
use std::ptr::NonNull;

use fmalloc_proto::num::to_usize;

/// Names of the traces.
pub const TRACES: [&str; 4] = ["cc1", "perl", "python", "sqlite"];

/// What a program did. Blocks are counted as they are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Makes a block of so many bytes.
    Alloc(usize),
    /// Frees a block.
    Free(usize),
    /// Makes a block of another one and so many bytes.
    Realloc(usize, usize),
}

/// An allocator to replay a trace with.
pub trait Subject {
    /// `malloc`.
    fn alloc(&mut self, size: usize) -> NonNull<u8>;
    /// `free` of a block of `size` bytes.
    fn free(&mut self, block: NonNull<u8>, size: usize);
    /// `realloc`.
    fn realloc(&mut self, block: NonNull<u8>, old: usize, size: usize) -> NonNull<u8>;
}

/// Reads a trace by name.
///
/// # Panics
/// If it is not there or damaged.
#[must_use]
pub fn read(name: &str) -> Vec<Event> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("traces").join(name).with_extension("trace");
    let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut rest = bytes.as_slice();
    let mut number = || {
        let mut number = 0;
        for shift in (0..63).step_by(7) {
            let (byte, behind) = rest.split_first()?;
            rest = behind;
            number |= u64::from(byte & 127) << shift;
            if *byte < 128 {
                return Some(to_usize(number));
            }
        }
        None
    };
    let (mut events, mut made) = (Vec::new(), 0);
    while let Some(word) = number() {
        events.push(match word & 3 {
            0 => Event::Alloc(word >> 2),
            1 => Event::Free(made - 1 - (word >> 2)),
            _ => Event::Realloc(made - 1 - (word >> 2), number().expect("a size")),
        });
        made += usize::from(!matches!(events.last(), Some(Event::Free(_))));
    }
    events
}

/// Lets an allocator do what the program did, writes each block, checks it before it goes, and frees at the end what the
/// program did not. Gives the most bytes that the program had at any time; `at_peak` is called at each new peak that is
/// a 64th above the last.
///
/// # Panics
/// If a block has lost its content.
pub fn replay(events: &[Event], subject: &mut impl Subject, mut at_peak: impl FnMut()) -> usize {
    let mut blocks: Vec<Option<(NonNull<u8>, usize)>> = Vec::new();
    let (mut bytes, mut peak, mut told) = (0, 0, 0);
    let mark = |number: usize| u8::try_from(number % 251).expect("a small number");
    let write = |block: NonNull<u8>, size: usize, number: usize| {
        // SAFETY: the block has that many bytes.
        unsafe { block.write_bytes(mark(number), size) };
    };
    let check = |block: NonNull<u8>, size: usize, number: usize| {
        // SAFETY: the block has that many bytes, all of which were written.
        let content = unsafe { std::slice::from_raw_parts(block.as_ptr(), size) };
        assert!(content.iter().all(|byte| *byte == mark(number)), "block {number} has lost its content");
    };
    for event in events {
        let (block, size) = match *event {
            Event::Alloc(size) => (subject.alloc(size), size),
            Event::Free(number) => {
                let (block, size) = blocks[number].take().expect("a block in use");
                check(block, size, number);
                subject.free(block, size);
                bytes -= size;
                continue;
            }
            Event::Realloc(number, size) => {
                let (block, old) = blocks[number].take().expect("a block in use");
                let moved = subject.realloc(block, old, size);
                check(moved, old.min(size), number);
                bytes -= old;
                (moved, size)
            }
        };
        write(block, size, blocks.len());
        blocks.push(Some((block, size)));
        bytes += size;
        if bytes > peak {
            peak = bytes;
            if peak - told > told / 64 {
                told = peak;
                at_peak();
            }
        }
    }
    for (number, block) in blocks.into_iter().enumerate() {
        if let Some((block, size)) = block {
            check(block, size, number);
            subject.free(block, size);
        }
    }
    peak
}
