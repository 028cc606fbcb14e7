//! System calls on the memory of regions, behind the library's back: one by one, and at random against a model.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use fmalloc_client::PAGE_SIZE;
use fmalloc_proto::num::to_u64;
use fmalloc_tests::pattern;
use fmalloc_tests::rng::Rng;
use nix::errno::Errno;
use serde_json::Value;

use crate::Outcome;
use crate::state::{Args, Memory, State, page_at};

const READ: i32 = libc::PROT_READ;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// `madvise NAME ADVICE [OFFSET LENGTH]`.
pub(crate) fn advise(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let advice = match args.text()? {
        "dontneed" => libc::MADV_DONTNEED,
        "free" => libc::MADV_FREE,
        other => bail!("no advice {other:?}"),
    };
    let part = args.part(&memory)?;
    madvise(memory.base() + part.start, part.len(), advice)?;
    Ok(Value::Null)
}

/// `munmap NAME OFFSET LENGTH`.
pub(crate) fn unmap(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let part = args.part(&memory)?;
    keep(&memory);
    munmap(memory.base() + part.start, part.len())?;
    Ok(Value::Null)
}

/// `mprotect NAME ACCESS [OFFSET LENGTH]`.
pub(crate) fn protect(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let access = match args.text()? {
        "none" => libc::PROT_NONE,
        "read" => READ,
        "write" => READ_WRITE,
        "execute" => libc::PROT_READ | libc::PROT_EXEC,
        other => bail!("no access {other:?}"),
    };
    let part = args.part(&memory)?;
    mprotect(memory.base() + part.start, part.len(), access)?;
    Ok(Value::Null)
}

/// `mremap NAME LENGTH in-place|may-move|elsewhere`.
pub(crate) fn remap(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let len = args.bytes()?;
    keep(&memory);
    let (from, old) = (memory.base(), memory.len());
    let base = match args.text()? {
        "in-place" => mremap(from, old, len, 0, 0)?,
        "may-move" => mremap(from, old, len, libc::MREMAP_MAYMOVE, 0)?,
        "elsewhere" => move_to_new_place(from, old, len)?,
        other => bail!("how is {other:?}?"),
    };
    memory.set_place(base, len);
    Ok((base == from).into())
}

/// `mlock NAME lock|unlock OFFSET LENGTH`.
pub(crate) fn lock(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let locks = args.text()? == "lock";
    let part = args.part(&memory)?;
    let start = pointer(memory.base() + part.start);
    // SAFETY: changes no content.
    let outcome =
        unsafe { if locks { libc::mlock(start, part.len()) } else { libc::munlock(start, part.len()) } };
    Errno::result(outcome)?;
    Ok(Value::Null)
}

/// What a page must hold.
#[derive(Debug, Clone)]
enum Content {
    Zeros,
    Pattern(u64),
    Words(Box<[u64]>),
    /// That, or zeros: MADV_FREE was called and nothing written since.
    Freed(Box<Content>),
}

impl Content {
    fn matches(&self, index: u64, page: &[u64]) -> bool {
        match self {
            Self::Zeros => page.iter().all(|word| *word == 0),
            Self::Pattern(seed) => pattern::check(*seed, index, page).is_ok(),
            Self::Words(words) => **words == *page,
            Self::Freed(old) => old.matches(index, page) || Self::Zeros.matches(index, page),
        }
    }

    fn check(&self, index: u64, page: &[u64]) -> anyhow::Result<()> {
        if self.matches(index, page) {
            return Ok(());
        }
        let text = match self {
            Self::Pattern(seed) => pattern::check(*seed, index, page).err(),
            Self::Zeros => Some(format!("starts with {:x?}", &page[..4])),
            _ => Some(format!("starts with {:x?}; expected {self:x?}", &page[..4])),
        };
        bail!("page {index} must be {:.8}: {}", format!("{self:?}"), text.unwrap_or_default())
    }
}

/// `mix NAME SEED THREADS MILLISECONDS`: madvise(DONTNEED), madvise(FREE) and mprotect at random between writes and
/// checks, each thread on a stretch of its own of a fresh region.
pub(crate) fn mix(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let (seed, threads): (u64, usize) = (args.number()?, args.number()?);
    let time = Duration::from_millis(args.number()?);
    let memory = &*memory;
    let counts = thread::scope(|scope| {
        let pages = memory.pages() / threads;
        let running: Vec<_> = (0..threads)
            .map(|n| scope.spawn(move || mix_stretch(memory, n * pages, pages, seed ^ to_u64(n) << 32, time)))
            .collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect::<anyhow::Result<Vec<u64>>>()
    })?;
    Ok(counts.iter().sum::<u64>().into())
}

fn mix_stretch(
    memory: &Memory,
    first: usize,
    pages: usize,
    seed: u64,
    time: Duration,
) -> anyhow::Result<u64> {
    let (mut rng, mut model) = (Rng::new(seed), vec![Content::Zeros; pages]);
    let (begin, mut done) = (Instant::now(), 0);
    let number = |index: usize| to_u64(first + index);
    let page = |index: usize| memory.page(first + index);
    while begin.elapsed() < time {
        done += 1;
        let index = rng.index(pages);
        let range = rng.range(pages, 64);
        let (start, len) = (memory.base() + (first + range.start) * PAGE_SIZE, range.len() * PAGE_SIZE);
        match rng.below(20) {
            0..8 => {
                pattern::write(done, number(index), page(index));
                model[index] = Content::Pattern(done);
            }
            8..11 => {
                // One word: the rest stays what it is. Of a page that was freed only now is it certain which.
                model[index].check(number(index), page(index)).with_context(|| format!("step {done}"))?;
                let (word, value) = (rng.index(pattern::WORDS), rng.word());
                let before = page(index)[word];
                page(index)[word] = value;
                let mut now: Box<[u64]> = page(index).into();
                ensure!(now[word] == value, "page {}: a word is not as it was written", number(index));
                let whole = now.clone();
                now[word] = before;
                if !model[index].matches(number(index), &now) {
                    // It may have been emptied between the look and the write.
                    now[word] = 0;
                    model[index]
                        .check(number(index), &now)
                        .with_context(|| format!("step {done}, a word"))?;
                }
                model[index] = Content::Words(whole);
            }
            11..15 => {
                model[index].check(number(index), page(index)).with_context(|| format!("step {done}"))?;
            }
            15..17 => {
                madvise(start, len, libc::MADV_DONTNEED)?;
                model[range.clone()].fill(Content::Zeros);
                Content::Zeros.check(number(range.start), page(range.start))?;
            }
            17..19 => {
                madvise(start, len, libc::MADV_FREE)?;
                for content in &mut model[range] {
                    *content = match std::mem::replace(content, Content::Zeros) {
                        Content::Zeros => Content::Zeros,
                        Content::Freed(old) => Content::Freed(old),
                        other => Content::Freed(Box::new(other)),
                    };
                }
            }
            _ => {
                mprotect(start, len, READ)?;
                for _ in 0..4 {
                    let index = range.start + rng.index(range.len());
                    model[index]
                        .check(number(index), page(index))
                        .with_context(|| format!("step {done}, read-only"))?;
                    thread::sleep(Duration::from_micros(rng.below(500)));
                }
                mprotect(start, len, READ_WRITE)?;
            }
        }
    }
    for (index, content) in model.iter().enumerate() {
        content.check(number(index), page(index)).context("at the end")?;
    }
    Ok(done)
}

/// A part of a region, wherever it is.
#[derive(Debug, Clone, Copy)]
struct Piece {
    addr: usize,
    /// The page of the region that it starts with.
    first: usize,
    pages: usize,
}

/// `wander NAME SEED MILLISECONDS`: moves pieces of a fresh region about with mremap between writes and checks.
pub(crate) fn wander(state: &State, args: &mut Args<'_>) -> Outcome {
    const MOST: usize = 48;
    let memory = state.memory(args.text()?)?;
    let (mut rng, time) = (Rng::new(args.number()?), Duration::from_millis(args.number()?));
    keep(&memory);
    let mut seeds = vec![0; memory.pages()];
    let mut pieces = vec![Piece { addr: memory.base(), first: 0, pages: memory.pages() }];
    let check = |piece: &Piece, n: usize, seeds: &[u64]| {
        let (index, page) = (piece.first + n, page_at(piece.addr + n * PAGE_SIZE));
        let good = match seeds[index] {
            0 if page.iter().all(|word| *word == 0) => Ok(()),
            0 => Err(format!("page {index} is not zero")),
            seed => pattern::check(seed, to_u64(index), page),
        };
        good.map_err(|text| anyhow!("{text} (in {piece:x?})"))
    };
    let (begin, mut moves) = (Instant::now(), 0_u64);
    while begin.elapsed() < time {
        let at = rng.index(pieces.len());
        let piece = pieces[at];
        let n = rng.index(piece.pages);
        match rng.below(16) {
            0..6 => {
                moves += 1;
                seeds[piece.first + n] = moves;
                pattern::write(moves, to_u64(piece.first + n), page_at(piece.addr + n * PAGE_SIZE));
            }
            6..14 => check(&piece, n, &seeds)?,
            _ => {
                let part = if pieces.len() < MOST { rng.range(piece.pages, 512) } else { 0..piece.pages };
                let (from, len) = (piece.addr + part.start * PAGE_SIZE, part.len() * PAGE_SIZE);
                let addr = move_to_new_place(from, len, len)?;
                moves += 1;
                pieces.swap_remove(at);
                let rest = Piece {
                    addr: piece.addr + part.end * PAGE_SIZE,
                    first: piece.first + part.end,
                    pages: piece.pages - part.end,
                };
                let moved = Piece { addr, first: piece.first + part.start, pages: part.len() };
                let all = [Piece { pages: part.start, ..piece }, moved, rest];
                pieces.extend(all.into_iter().filter(|piece| piece.pages > 0));
            }
        }
    }
    for piece in &pieces {
        (0..piece.pages).try_for_each(|n| check(piece, n, &seeds))?;
    }
    Ok(moves.into())
}

/// The region's memory is not where the library thinks any more: nobody must unmap that place.
fn keep(memory: &std::sync::Arc<Memory>) {
    std::mem::forget(std::sync::Arc::clone(memory));
}

/// Moves to addresses that nothing else uses, with nothing beside them.
fn move_to_new_place(from: usize, old: usize, new: usize) -> anyhow::Result<usize> {
    let room = new + 2 * PAGE_SIZE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
    let place = unsafe { libc::mmap(std::ptr::null_mut(), room, libc::PROT_NONE, flags, -1, 0) };
    ensure!(place != libc::MAP_FAILED, "no addresses: {}", Errno::last());
    let to = place.expose_provenance() + PAGE_SIZE;
    let moved = mremap(from, old, new, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to)?;
    munmap(to - PAGE_SIZE, PAGE_SIZE)?;
    munmap(to + new, PAGE_SIZE)?;
    Ok(moved)
}

fn mremap(from: usize, old: usize, new: usize, flags: i32, to: usize) -> anyhow::Result<usize> {
    // SAFETY: both ranges belong to this test; it uses the memory by numbers, not by references that live on.
    let moved = unsafe { libc::mremap(pointer(from), old, new, flags, pointer(to)) };
    if moved == libc::MAP_FAILED {
        bail!("mremap: {}", Errno::last());
    }
    Ok(moved.expose_provenance())
}

fn munmap(start: usize, len: usize) -> anyhow::Result<()> {
    // SAFETY: the range belongs to this test, which does not use it after this, or expects the fault.
    Errno::result(unsafe { libc::munmap(pointer(start), len) }).context("munmap").map(drop)
}

fn madvise(start: usize, len: usize, advice: i32) -> anyhow::Result<()> {
    // SAFETY: the range belongs to this test, which expects its content to go.
    Errno::result(unsafe { libc::madvise(pointer(start), len, advice) }).context("madvise").map(drop)
}

fn mprotect(start: usize, len: usize, access: i32) -> anyhow::Result<()> {
    // SAFETY: the range belongs to this test; content does not change.
    Errno::result(unsafe { libc::mprotect(pointer(start), len, access) }).context("mprotect").map(drop)
}

fn pointer(addr: usize) -> *mut libc::c_void {
    std::ptr::with_exposed_provenance_mut(addr)
}
