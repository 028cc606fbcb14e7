//! Swap I/O that fails on demand. The daemon `fmallocd-failing` puts `Failing` between its fault threads and the swap
//! file; a test says through a [`Plan`], which is memory that both share, what is to fail, and reads there what did.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fmalloc_proto::PAGE_SIZE;
use fmallocd::fault::reactor::{Completion, Interposer, Io, IoFailure, Reactor, Ready};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap};

/// Where `fmallocd-failing` finds the plan: the name of a file.
pub const PLAN: &str = "FMALLOC_TEST_PLAN";

/// What a transfer can suffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Fault {
    /// A read fails with EIO.
    ReadError = 1,
    /// A read ends half way.
    ShortRead = 2,
    /// A read succeeds with a bit changed.
    FlippedBit = 3,
    /// A write fails with EIO and has written nothing.
    WriteError = 4,
    /// A write ends half way.
    ShortWrite = 5,
    /// A write fails with ENOSPC.
    FullDisk = 6,
    /// A write succeeds and has written nothing.
    LostWrite = 7,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::ReadError,
        Self::ShortRead,
        Self::FlippedBit,
        Self::WriteError,
        Self::ShortWrite,
        Self::FullDisk,
        Self::LostWrite,
    ];

    /// Whether it strikes reads.
    #[must_use]
    pub fn is_of_reads(self) -> bool {
        matches!(self, Self::ReadError | Self::ShortRead | Self::FlippedBit)
    }

    fn from_number(number: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|fault| *fault as u64 == number)
    }
}

/// No end to it.
pub const FOR_EVER: u64 = u64::MAX;

/// What is to fail, in memory that a test and its daemon share.
#[derive(Debug)]
pub struct Plan {
    words: NonNull<Words>,
}

#[derive(Debug)]
#[repr(C)]
struct Words {
    fault: AtomicU64,
    first: AtomicU64,
    count: AtomicU64,
    /// If not zero: every so manieth transfer, from the first on.
    period: AtomicU64,
    client: AtomicU64,
    reads: AtomicU64,
    writes: AtomicU64,
    injected: AtomicU64,
}

// SAFETY: atomics in shared memory that stays mapped for ever.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

impl Plan {
    /// Maps the plan in a file, which is made if it is not there: nothing fails then.
    ///
    /// # Panics
    /// If it cannot be mapped.
    #[must_use]
    pub fn open(path: &Path) -> Self {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.expect("a file for the plan");
        file.set_len(PAGE_SIZE as u64).expect("a page");
        let len = PAGE_SIZE.try_into().expect("not zero");
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping of a whole page of a file that nobody shortens.
        let words = unsafe { mmap(None, len, access, MapFlags::MAP_SHARED, file.as_fd(), 0) };
        Self { words: words.expect("a mapping").cast() }
    }

    fn words(&self) -> &Words {
        // SAFETY: mapped for ever, aligned to a page, and any bytes are such words.
        unsafe { self.words.as_ref() }
    }

    /// From now on `fault` strikes `count` transfers of its direction, the first of them being number `first` (from 0)
    /// from now, of one client or of all.
    pub fn arm(&self, fault: Fault, first: u64, count: u64, client: Option<u64>) {
        self.set(fault, first, count, 0, client);
    }

    /// From now on `fault` strikes the transfers of its direction with the numbers `first`, `first + period` and so on,
    /// of one client.
    pub fn arm_every(&self, fault: Fault, first: u64, period: u64, client: u64) {
        self.set(fault, first, FOR_EVER, period, Some(client));
    }

    fn set(&self, fault: Fault, first: u64, count: u64, period: u64, client: Option<u64>) {
        self.disarm();
        let words = self.words();
        for (word, value) in [
            (&words.first, first),
            (&words.count, count),
            (&words.period, period),
            (&words.client, client.unwrap_or(0)),
            (&words.reads, 0),
            (&words.writes, 0),
            (&words.injected, 0),
        ] {
            word.store(value, Ordering::Relaxed);
        }
        words.fault.store(fault as u64, Ordering::Release);
    }

    /// Nothing fails any more. Counts stay.
    pub fn disarm(&self) {
        self.words().fault.store(0, Ordering::Release);
    }

    /// Reads and writes since the plan was armed or made.
    #[must_use]
    pub fn seen(&self) -> (u64, u64) {
        (self.words().reads.load(Ordering::Relaxed), self.words().writes.load(Ordering::Relaxed))
    }

    /// Transfers that were struck since the plan was armed.
    #[must_use]
    pub fn injected(&self) -> u64 {
        self.words().injected.load(Ordering::Relaxed)
    }

    /// What happens to the next transfer of this kind.
    fn judge(&self, client: u64, is_read: bool) -> Option<Fault> {
        let words = self.words();
        let fault = Fault::from_number(words.fault.load(Ordering::Acquire));
        let only = words.client.load(Ordering::Relaxed);
        if only != 0 && only != client {
            return None;
        }
        let number = if is_read { &words.reads } else { &words.writes }.fetch_add(1, Ordering::Relaxed);
        let (first, count) = (words.first.load(Ordering::Relaxed), words.count.load(Ordering::Relaxed));
        let fault = fault.filter(|fault| fault.is_of_reads() == is_read)?;
        let period = words.period.load(Ordering::Relaxed).max(1);
        if number < first || number - first >= count || !(number - first).is_multiple_of(period) {
            return None;
        }
        words.injected.fetch_add(1, Ordering::Relaxed);
        Some(fault)
    }
}

/// Puts a `Failing` before the reactor of every client.
#[derive(Debug)]
pub struct Sabotage(pub Arc<Plan>);

impl Interposer for Sabotage {
    fn interpose(&self, client: u64, reactor: Box<dyn Reactor>) -> Box<dyn Reactor> {
        Box::new(Failing { plan: Arc::clone(&self.0), client, reactor, done: Vec::new(), struck: Vec::new() })
    }
}

/// A reactor whose transfers fail as planned; everything else is the real reactor's.
struct Failing {
    plan: Arc<Plan>,
    client: u64,
    reactor: Box<dyn Reactor>,
    /// Ended without having begun.
    done: Vec<Completion>,
    /// Under way, and not to end well.
    struck: Vec<(Io, Fault)>,
}

impl Reactor for Failing {
    unsafe fn submit(&mut self, io: Io) {
        let ended = |result| Completion { token: io.token, result };
        match self.plan.judge(self.client, io.is_read) {
            Some(Fault::ReadError | Fault::WriteError) => {
                self.done.push(ended(Err(IoFailure::System(Errno::EIO))));
            }
            Some(Fault::FullDisk) => self.done.push(ended(Err(IoFailure::System(Errno::ENOSPC)))),
            Some(Fault::LostWrite) => self.done.push(ended(Ok(()))),
            Some(fault) => {
                self.struck.push((io, fault));
                let len = if fault == Fault::FlippedBit { io.len } else { io.len / 2 };
                // SAFETY: the caller's promise, for all of the memory or half of it.
                unsafe { self.reactor.submit(Io { len, ..io }) };
            }
            // SAFETY: the caller's promise is passed on.
            None => unsafe { self.reactor.submit(io) },
        }
    }

    fn wait(
        &mut self,
        timeout: Option<Duration>,
        watch_uffd: bool,
        done: &mut Vec<Completion>,
    ) -> std::io::Result<Ready> {
        let timeout = if self.done.is_empty() { timeout } else { Some(Duration::ZERO) };
        let before = done.len();
        let ready = self.reactor.wait(timeout, watch_uffd, done)?;
        for completion in &mut done[before..] {
            let Some(place) = self.struck.iter().position(|(io, _)| io.token == completion.token) else {
                continue;
            };
            let (io, fault) = self.struck.swap_remove(place);
            if completion.result.is_err() {
                continue;
            }
            if fault == Fault::FlippedBit {
                let at = usize::try_from(io.offset / 4096 * 37 % u64::from(io.len)).unwrap_or(0);
                // SAFETY: inside the memory of a transfer that has ended and that nobody has heard of yet.
                unsafe { *io.memory.add(at).as_ptr() ^= 0x10 };
            } else {
                completion.result = Err(IoFailure::Short(u64::from(io.len / 2)));
            }
        }
        done.append(&mut self.done);
        Ok(ready)
    }
}
