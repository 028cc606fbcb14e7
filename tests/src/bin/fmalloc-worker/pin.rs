//! Pages that the kernel has pinned for I/O: buffers registered with io_uring.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Mutex;

use anyhow::{Context, ensure};
use fmalloc_client::PAGE_SIZE;
use io_uring::{IoUring, opcode, types};
use serde_json::Value;

use crate::Outcome;
use crate::state::{Args, State};

static RING: Mutex<Option<IoUring>> = Mutex::new(None);

/// `pin NAME OFFSET LENGTH`.
pub(crate) fn pin(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let part = args.part(&memory)?;
    let ring = IoUring::new(4)?;
    let buffer = libc::iovec {
        iov_base: std::ptr::with_exposed_provenance_mut(memory.base() + part.start),
        iov_len: part.len(),
    };
    // SAFETY: memory of a region that stays mapped until `unpin`.
    unsafe { ring.submitter().register_buffers(&[buffer]) }?;
    *RING.lock().unwrap() = Some(ring);
    Ok(Value::Null)
}

/// `pinned-in NAME OFFSET LENGTH PATH`: the kernel writes the same part of a file into the pinned pages, by the pins
/// alone.
pub(crate) fn read_in(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let part = args.part(&memory)?;
    let file = File::open(args.text()?)?;
    let mut ring = RING.lock().unwrap();
    let ring = ring.as_mut().context("nothing is pinned")?;
    for offset in part.step_by(PAGE_SIZE) {
        let place = std::ptr::with_exposed_provenance_mut(memory.base() + offset);
        let read = opcode::ReadFixed::new(types::Fd(file.as_raw_fd()), place, u32::try_from(PAGE_SIZE)?, 0)
            .offset(u64::try_from(offset)?);
        // SAFETY: the buffer is the registered one, and the file stays open until the answer is there.
        unsafe { ring.submission().push(&read.build()) }?;
        ring.submit_and_wait(1)?;
        let done = ring.completion().next().context("no completion")?.result();
        ensure!(usize::try_from(done) == Ok(PAGE_SIZE), "the read gave {done}");
    }
    Ok(Value::Null)
}

/// `unpin`.
pub(crate) fn unpin() -> Outcome {
    *RING.lock().unwrap() = None;
    Ok(Value::Null)
}
