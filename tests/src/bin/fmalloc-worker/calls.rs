//! System calls that read and write the memory of regions: pipes, files, and O_DIRECT beside evictions.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::thread;

use anyhow::{Context, anyhow, ensure};
use fmalloc_client::PAGE_SIZE;
use fmalloc_proto::num::to_u64;
use fmalloc_tests::pattern::{self, WORDS};
use fmalloc_tests::rng::Rng;
use nix::errno::Errno;
use serde_json::Value;

use crate::Outcome;
use crate::state::{Args, Memory, State};

/// Pages of one call.
const CHUNK: usize = 128;

/// `pipe-out NAME SEED`: write(2) from the region into a pipe; what comes out is checked.
pub(crate) fn pipe_out(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let seed = args.number()?;
    let (reader, writer) = nix::unistd::pipe()?;
    let pages = memory.pages();
    let check = thread::spawn(move || -> anyhow::Result<()> {
        let mut reader = File::from(reader);
        let mut bytes = [0; PAGE_SIZE];
        for index in 0..pages {
            reader.read_exact(&mut bytes)?;
            pattern::check(seed, to_u64(index), &to_words(&bytes)).map_err(|text| anyhow!(text))?;
        }
        Ok(())
    });
    let sent = all(&memory, |start, len| {
        // SAFETY: the kernel reads from memory of the region.
        unsafe { libc::write(writer.as_raw_fd(), start, len) }
    });
    drop(writer);
    let checked = check.join().unwrap();
    sent.and_then(|sent| checked.map(|()| sent))
}

/// `pipe-in NAME SEED`: read(2) from a pipe into the region.
pub(crate) fn pipe_in(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let seed = args.number()?;
    let (reader, writer) = nix::unistd::pipe()?;
    let pages = memory.pages();
    let send = thread::spawn(move || write_pattern(File::from(writer), seed, pages));
    all(&memory, |start, len| {
        // SAFETY: the kernel writes to memory of the region, which nothing else uses.
        unsafe { libc::read(reader.as_raw_fd(), start, len) }
    })?;
    drop(reader);
    send.join().unwrap()?;
    Ok(Value::Null)
}

/// `file-out NAME SEED PATH`: write(2) from the region into a file, which is then checked.
pub(crate) fn file_out(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let (seed, path) = (args.number()?, args.text()?);
    let file = File::create(path)?;
    all(&memory, |start, len| {
        // SAFETY: the kernel reads from memory of the region.
        unsafe { libc::write(file.as_raw_fd(), start, len) }
    })?;
    let (mut file, mut bytes) = (File::open(path)?, [0; PAGE_SIZE]);
    for index in 0..memory.pages() {
        file.read_exact(&mut bytes)?;
        pattern::check(seed, to_u64(index), &to_words(&bytes)).map_err(|text| anyhow!(text))?;
    }
    Ok(Value::Null)
}

/// `file-in NAME SEED PATH`: writes a file, and reads it into the region by read(2).
pub(crate) fn file_in(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let (seed, path) = (args.number()?, args.text()?);
    write_pattern(File::create(path)?, seed, memory.pages())?;
    let file = File::open(path)?;
    all(&memory, |start, len| {
        // SAFETY: the kernel writes to memory of the region, which nothing else uses.
        unsafe { libc::read(file.as_raw_fd(), start, len) }
    })
}

/// Makes a call for the next stretch of the region until it is through.
fn all(memory: &Memory, call: impl Fn(*mut libc::c_void, usize) -> isize) -> Outcome {
    let mut at = 0;
    while at < memory.len() {
        let len = (CHUNK * PAGE_SIZE).min(memory.len() - at);
        let start = std::ptr::with_exposed_provenance_mut(memory.base() + at);
        let done = Errno::result(call(start, len)).with_context(|| format!("at {at:#x} of the region"))?;
        ensure!(done > 0, "the other side has ended at {at:#x}");
        at += usize::try_from(done)?;
    }
    Ok(at.into())
}

/// `direct NAME SEED ROUNDS THREADS PATH`: O_DIRECT from a file into chunks of the region and out of them into another
/// part of the file, each checked. Run `press` beside it, so that the chunks are evicted all the while.
pub(crate) fn direct(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let (seed, rounds, threads): (u64, usize, usize) = (args.number()?, args.number()?, args.number()?);
    let path = Path::new(args.text()?);
    write_pattern(File::create(path)?, seed, memory.pages())?;
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)?;
    let (memory, fd) = (&*memory, file.as_fd().try_clone_to_owned()?);
    thread::scope(|scope| {
        let fd = &fd;
        let running: Vec<_> = (0..threads)
            .map(|n| scope.spawn(move || direct_chunks(memory, fd, seed, rounds, n, threads)))
            .collect();
        running.into_iter().try_for_each(|thread| thread.join().unwrap())
    })?;
    Ok(Value::Null)
}

fn direct_chunks(
    memory: &Memory,
    fd: &OwnedFd,
    seed: u64,
    rounds: usize,
    thread: usize,
    threads: usize,
) -> anyhow::Result<()> {
    let mut rng = Rng::new(seed ^ to_u64(thread) << 32);
    let copy = File::from(fd.try_clone()?);
    let stretch = memory.pages() / threads;
    let mut plain = vec![0_u64; (CHUNK + 1) * WORDS];
    for round in 0..rounds {
        let range = rng.range(stretch, CHUNK);
        let (first, pages) = (thread * stretch + range.start, range.len());
        let (start, len) = (memory.base() + first * PAGE_SIZE, pages * PAGE_SIZE);
        let check = |what: &str, page: &dyn Fn(usize) -> Vec<u64>| {
            (first..first + pages).try_for_each(|index| {
                pattern::check(seed, to_u64(index), &page(index))
                    .map_err(|text| anyhow!("round {round}, {what}: {text}"))
            })
        };
        // Something else first, so that a transfer that gets lost shows.
        (first..first + pages)
            .for_each(|index| pattern::write(seed + 1 + to_u64(round), to_u64(index), memory.page(index)));
        let offset = i64::try_from(first * PAGE_SIZE)?;
        // SAFETY: the device writes to pages of the region that are this thread's.
        let got =
            unsafe { libc::pread(fd.as_raw_fd(), std::ptr::with_exposed_provenance_mut(start), len, offset) };
        ensure!(Errno::result(got)? == isize::try_from(len)?, "a short read of {got}");
        if rng.below(2) == 0 {
            thread::yield_now();
        }
        check("read in", &|index| memory.page(index).to_vec())?;
        let behind = offset + i64::try_from(memory.len())?;
        // SAFETY: the device reads from pages of the region.
        let put =
            unsafe { libc::pwrite(fd.as_raw_fd(), std::ptr::with_exposed_provenance(start), len, behind) };
        ensure!(Errno::result(put)? == isize::try_from(len)?, "a short write of {put}");
        // SAFETY: the words are plain memory; a page's worth of them is skipped at most, for the alignment.
        let (_, aligned, _) = unsafe { plain.align_to_mut::<Aligned>() };
        let aligned = &mut aligned[..pages];
        // SAFETY: pages of bytes.
        let bytes = unsafe { std::slice::from_raw_parts_mut(aligned.as_mut_ptr().cast::<u8>(), len) };
        copy.read_exact_at(bytes, u64::try_from(behind)?)?;
        check("written out", &|index| aligned[index - first].0.to_vec())?;
    }
    Ok(())
}

/// A page where O_DIRECT wants it.
#[repr(C, align(4096))]
struct Aligned([u64; WORDS]);

fn write_pattern(mut file: File, seed: u64, pages: usize) -> anyhow::Result<()> {
    for first in (0..pages).step_by(CHUNK) {
        let bytes: Vec<u8> = (first..pages.min(first + CHUNK))
            .flat_map(|index| pattern::words(seed, to_u64(index)))
            .flat_map(u64::to_ne_bytes)
            .collect();
        file.write_all(&bytes)?;
    }
    // A pipe has nothing to sync.
    let _ = file.sync_all();
    Ok(())
}

fn to_words(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word)).collect()
}
