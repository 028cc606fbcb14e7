//! Floors: what the disk gives without any paging. Direct reads of the very swap file, by io_uring, in order and at random
//! at several depths.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fmalloc_proto::PAGE;
use fmalloc_proto::num::{to_u64, to_usize};
use io_uring::{IoUring, opcode, types};

use super::kinds::Unit;
use super::memory::Memory;
use super::peers::swap::SwapFile;
use super::plan::Kind;
use crate::rng::Rng;

/// Bytes of a read in order, and how many are in flight.
const SEQUENTIAL: (u32, usize) = (1 << 20, 4);
/// One floor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Floor {
    /// In order.
    Sequential,
    /// Pages at random, so many at once.
    Random(usize),
}

/// All of them.
pub(crate) const ALL: [Floor; 4] = [Floor::Sequential, Floor::Random(1), Floor::Random(8), Floor::Random(32)];

impl Floor {
    /// Its name in the JSON.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Sequential => "raw-seq-read".to_owned(),
            Self::Random(depth) => format!("raw-rand-read-qd{depth}"),
        }
    }

    /// Its unit.
    pub(crate) fn unit(self) -> Unit {
        match self {
            Self::Sequential => Unit::Megabytes,
            Self::Random(_) => Unit::Operations,
        }
    }

    /// Measures it once, for so long, in its unit.
    ///
    /// # Errors
    /// What the system says; an io_uring that is not allowed among it.
    pub(crate) fn measure(self, swap: &SwapFile, seed: u64, time: Duration) -> Result<f64> {
        let (length, depth) = match self {
            Self::Sequential => SEQUENTIAL,
            Self::Random(depth) => (u32::try_from(PAGE)?, depth),
        };
        let mut rng = Rng::new(seed);
        let blocks = swap.bytes / u64::from(length);
        let mut order = 0;
        let next = || {
            let block = if self == Self::Sequential { order % blocks } else { rng.below(blocks) };
            order += 1;
            block * u64::from(length)
        };
        let (reads, seconds) = read(swap, length, depth, time, next)?;
        let amount = if self == Self::Sequential { reads * f64::from(length) } else { reads };
        Ok(amount / seconds / self.unit().scale())
    }
}

/// Keeps `depth` reads in flight for so long; gives how many ended and how long it took.
fn read(
    swap: &SwapFile,
    length: u32,
    depth: usize,
    time: Duration,
    mut next: impl FnMut() -> u64,
) -> Result<(f64, f64)> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&swap.path)?;
    let fd = types::Fd(file.as_raw_fd());
    let step = usize::try_from(length)?;
    // Page by page from the kernel, as direct reads want it.
    let buffers = Memory::new(&Kind::Anonymous, to_u64(step * depth))?;
    let mut ring = IoUring::new(64).context("io_uring")?;
    let mut submit = |ring: &mut IoUring, slot: usize| -> Result<()> {
        let place = buffers.shared()[slot * step / 8].as_ptr().cast();
        let entry = opcode::Read::new(fd, place, length).offset(next()).build().user_data(to_u64(slot));
        // SAFETY: no other read uses the buffer of this slot until this one has ended.
        unsafe { ring.submission().push(&entry) }.context("the queue is full")
    };
    (0..depth).try_for_each(|slot| submit(&mut ring, slot))?;
    let begin = Instant::now();
    let (mut reads, mut flying) = (0.0, depth);
    while flying > 0 {
        ring.submit_and_wait(1)?;
        let done: Vec<_> = ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        for (slot, result) in done {
            flying -= 1;
            ensure!(result == i32::try_from(length)?, "a read of the swap file gave {result}");
            reads += 1.0;
            if begin.elapsed() < time {
                submit(&mut ring, to_usize(slot))?;
                flying += 1;
            }
        }
    }
    Ok((reads, begin.elapsed().as_secs_f64()))
}
