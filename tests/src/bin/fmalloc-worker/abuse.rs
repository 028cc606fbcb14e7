//! What programs do to themselves, within their rights, that is hard on a pager.

use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use fmalloc_client::{PAGE_SIZE, Pager, Region};
use fmalloc_proto::num::to_u64;
use fmalloc_tests::pattern::{self, WORDS};
use fmalloc_tests::rng::Rng;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use serde_json::{Value, json};

use crate::Outcome;
use crate::state::{Args, State, page_at};

/// `usurp SEED ROUNDS`: unmaps the end of a region while another thread makes regions of just that size, until one gets
/// the same addresses. Gives how often one did.
pub(crate) fn usurp(state: &State, args: &mut Args<'_>) -> Outcome {
    const PAGES: usize = 32;
    const TRIES: usize = 50;
    let (seed, rounds): (u64, u64) = (args.number()?, args.number()?);
    let (pager, mut rng) = (&state.pager()?, Rng::new(seed));
    let (mut kept, mut usurped) = (Vec::new(), 0_u64);
    for round in 0..rounds {
        let mut region = Region::new(pager, 2 * PAGES * PAGE_SIZE)?;
        fill(&mut region, 2 * round);
        let hole = region.as_ptr().expose_provenance() + PAGES * PAGE_SIZE;
        let begun = &AtomicBool::new(false);
        let pause = rng.below(100);
        let usurper = thread::scope(|scope| {
            let usurper = scope.spawn(move || -> anyhow::Result<_> {
                let mut misses = Vec::new();
                begun.store(true, Ordering::Relaxed);
                for _ in 0..TRIES {
                    let mut region = Region::new(pager, PAGES * PAGE_SIZE)?;
                    if region.as_ptr().expose_provenance() == hole {
                        fill(&mut region, 2 * round + 1);
                        return Ok(Some(region));
                    }
                    misses.push(region);
                }
                Ok(None)
            });
            while !begun.load(Ordering::Relaxed) {
                thread::yield_now();
            }
            thread::sleep(Duration::from_micros(pause));
            // SAFETY: half of a region that nothing refers to any more.
            Errno::result(unsafe {
                libc::munmap(std::ptr::with_exposed_provenance_mut(hole), PAGES * PAGE_SIZE)
            })?;
            usurper.join().map_err(|_| anyhow!("the usurper panicked"))?
        })?;
        check_words(&region.as_slice_of()[..PAGES * WORDS], 2 * round)?;
        // The library would unmap all of it, and some is another's: it stays.
        std::mem::forget(region);
        if let Some(usurper) = usurper {
            usurped += 1;
            kept.push((usurper, 2 * round + 1));
        }
    }
    for (region, seed) in &kept {
        check_words(region.as_slice_of(), *seed).with_context(|| format!("a usurper of {usurped}"))?;
    }
    Ok(json!({ "usurped": usurped }))
}

fn fill(region: &mut Region, seed: u64) {
    let pages = region.as_mut_slice_of::<u64>().chunks_exact_mut(WORDS);
    pages.zip(0..).for_each(|(page, index)| pattern::write(seed, index, page));
}

fn check_words(words: &[u64], seed: u64) -> anyhow::Result<()> {
    let mut pages = words.chunks_exact(WORDS).zip(0..);
    pages.try_for_each(|(page, index)| pattern::check(seed, index, page)).map_err(|text| anyhow!(text))
}

/// `slow-discard NAME SEED ROUNDS`: one thread discards parts of the region, but gets hardly any CPU time, so that it is
/// long in the middle of it; others fault meanwhile.
pub(crate) fn slow_discard(state: &State, args: &mut Args<'_>) -> Outcome {
    const STRETCH: usize = 16;
    let memory = &*state.memory(args.text()?)?;
    let (seed, rounds): (u64, usize) = (args.number()?, args.number()?);
    let kept = STRETCH * rounds..memory.pages();
    ensure!(kept.len() > 256, "the region is too short");
    (0..memory.pages()).for_each(|index| pattern::write(seed, to_u64(index), memory.page(index)));
    let over = &AtomicBool::new(false);
    let checked = thread::scope(|scope| {
        let hog = scope.spawn(move || {
            pin_to_first_cpu()?;
            while !over.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
            anyhow::Ok(())
        });
        let slow = scope.spawn(move || {
            pin_to_first_cpu()?;
            let idle = libc::sched_param { sched_priority: 0 };
            // SAFETY: the calling thread gets what CPU time is left over.
            Errno::result(unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const idle) })?;
            for round in 0..rounds {
                let start = memory.base() + round * STRETCH * PAGE_SIZE;
                let start = std::ptr::with_exposed_provenance_mut(start);
                // SAFETY: pages that nothing refers to.
                Errno::result(unsafe { libc::madvise(start, STRETCH * PAGE_SIZE, libc::MADV_DONTNEED) })?;
            }
            anyhow::Ok(())
        });
        let (mut rng, mut checked) = (Rng::new(seed), 0_u64);
        let mut failed = None;
        while !slow.is_finished() && failed.is_none() {
            let index = kept.start + rng.index(kept.len());
            failed = pattern::check(seed, to_u64(index), memory.page(index)).err();
            checked += 1;
        }
        let slow = slow.join().map_err(|_| anyhow!("a thread panicked"))?;
        over.store(true, Ordering::Relaxed);
        hog.join().map_err(|_| anyhow!("a thread panicked"))??;
        slow?;
        failed.map_or(Ok(checked), |text| Err(anyhow!(text)))
    })?;
    let zeros = (0..kept.start).all(|index| memory.page(index).iter().all(|word| *word == 0));
    ensure!(zeros, "a discarded page is not zero");
    Ok(checked.into())
}

fn pin_to_first_cpu() -> anyhow::Result<()> {
    // SAFETY: a set of CPUs without any is a valid value.
    let mut all: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is valid for its size.
    Errno::result(unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut all) })?;
    // SAFETY: looks into the set.
    let first = (0..1024).find(|cpu| unsafe { libc::CPU_ISSET(*cpu, &all) }).context("no CPU")?;
    // SAFETY: as above.
    let mut one: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: changes the set.
    unsafe { libc::CPU_SET(first, &mut one) };
    // SAFETY: the set is valid for its size.
    Errno::result(unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const one) })?;
    Ok(())
}

/// `fork-storm MIB MILLISECONDS`: forks again and again with so much ordinary memory resident, which keeps the lock of
/// the address space from whoever else needs it. Gives how often.
pub(crate) fn fork_storm(args: &mut Args<'_>) -> Outcome {
    let (mib, time): (usize, u64) = (args.number()?, args.number()?);
    let memory = std::hint::black_box(vec![7_u8; mib << 20]);
    let (begin, mut forks) = (Instant::now(), 0_u64);
    while begin.elapsed() < Duration::from_millis(time) {
        // SAFETY: the child ends at once.
        let child = Errno::result(unsafe { libc::fork() })?;
        if child == 0 {
            // SAFETY: as above.
            unsafe { libc::_exit(0) };
        }
        // SAFETY: waits for our own child.
        Errno::result(unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) })?;
        forks += 1;
    }
    drop(memory);
    Ok(forks.into())
}

/// `hold-stderr NAME OFFSET`: makes stderr a pipe, and writes a page of the region to it. If nobody brings that page, the
/// pipe is locked for ever.
pub(crate) fn hold_stderr(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let addr = memory.base() + args.bytes()?;
    let (reader, writer) = nix::unistd::pipe()?;
    fcntl(&writer, FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
    nix::unistd::dup2_stderr(&writer)?;
    // Open for as long as the process.
    std::mem::forget(reader);
    let from = std::ptr::with_exposed_provenance(addr);
    // SAFETY: the kernel reads from memory of the region.
    let got = unsafe { libc::write(writer.as_raw_fd(), from, PAGE_SIZE) };
    Ok(Errno::result(got)?.into())
}

/// `twins NAME INDEX first|second`: writes one of two pages that differ, but that XXH3 cannot tell apart, to a page of
/// the region; `twins NAME INDEX is-first|is-second` checks which one is there.
pub(crate) fn twins(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let page = page_at(memory.base() + args.number::<usize>()? * PAGE_SIZE);
    let [first, second] = fmalloc_tests::twins::pages();
    match args.text()? {
        "first" => page.copy_from_slice(&first),
        "second" => page.copy_from_slice(&second),
        "is-first" => ensure!(*page == first, "another page"),
        "is-second" => ensure!(*page == second, "another page"),
        other => anyhow::bail!("which is {other:?}?"),
    }
    Ok(Value::Null)
}

/// `pagers N`: makes and drops pagers one after the other.
pub(crate) fn pagers(args: &mut Args<'_>) -> Outcome {
    for _ in 0..args.number::<u32>()? {
        drop(Pager::connect()?);
    }
    Ok(Value::Null)
}
