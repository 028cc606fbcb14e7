//! Figures of the heap, beside glibc's malloc and an allocator with its records in the memory (rlsf, TLSF) in a region of the
//! same kind: page faults of frees and allocations of cold blocks, operations per second on warm memory, and what programs
//! take beyond what they asked for. Build it with `--release`.

#![allow(clippy::unwrap_used, reason = "a failure ends the program, which says why")]

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::{Barrier, Mutex};
use std::time::Instant;

use clap::Parser;
use fmalloc_client::heap::{Backing, Core, Heap, Plain};
use fmalloc_client::{Pager, PrivateOptions, Region};
use fmalloc_proto::num::{to_u64, to_usize};
use fmalloc_proto::size::Size;
use fmalloc_tests::rng::Rng;
use fmalloc_tests::trace::{self, Subject, TRACES};
use rlsf::Tlsf;
use serde_json::{Value, json};

/// Measures the heap beside glibc's malloc and rlsf
#[derive(Debug, Parser)]
#[command(name = "fmalloc-heap-bench")]
struct Options {
    /// RAM budget of the measurement of faults; eight times as much is allocated
    #[arg(long, default_value = "32M")]
    ram: Size,
    /// Operations of each thread
    #[arg(long, default_value_t = 3_000_000)]
    operations: u64,
    /// Runs, interleaved, of which the medians are printed
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Replays one trace with glibc's malloc and prints the peak: a process of its own for each
    #[arg(long, hide = true)]
    glibc_trace: Option<String>,
}

/// An allocator that all threads share.
trait Shared: Sync {
    fn alloc(&self, size: usize) -> NonNull<u8>;
    fn free(&self, block: NonNull<u8>);
}

impl<B: Backing + Sync> Shared for Core<B> {
    fn alloc(&self, size: usize) -> NonNull<u8> {
        self.alloc(size, 16).unwrap()
    }

    fn free(&self, block: NonNull<u8>) {
        // SAFETY: the benchmark has no other use for it.
        unsafe { self.free(block) }.unwrap();
    }
}

/// The C library's.
struct Glibc;

impl Shared for Glibc {
    fn alloc(&self, size: usize) -> NonNull<u8> {
        // SAFETY: takes a number.
        NonNull::new(unsafe { libc::malloc(size) }.cast()).unwrap()
    }

    fn free(&self, block: NonNull<u8>) {
        // SAFETY: as above.
        unsafe { libc::free(block.as_ptr().cast()) };
    }
}

/// TLSF in a region, behind a lock since it has none.
struct InBand<'a>(Mutex<Tlsf<'a, u32, u32, 30, 32>>);

impl<'a> InBand<'a> {
    fn new(region: &'a mut Region) -> Self {
        let mut tlsf = Tlsf::new();
        let whole = NonNull::slice_from_raw_parts(NonNull::new(region.as_ptr()).unwrap(), region.len());
        // SAFETY: the region is borrowed exclusively for as long as the allocator lives.
        unsafe { tlsf.insert_free_block_ptr(whole) }.unwrap();
        Self(Mutex::new(tlsf))
    }
}

impl Shared for InBand<'_> {
    fn alloc(&self, size: usize) -> NonNull<u8> {
        self.0.lock().unwrap().allocate(Layout::from_size_align(size, 16).unwrap()).unwrap()
    }

    fn free(&self, block: NonNull<u8>) {
        // SAFETY: the benchmark has no other use for it; the alignment is that of `alloc`.
        unsafe { self.0.lock().unwrap().deallocate(block, 16) };
    }
}

fn pager(ram: u64, swap: u64) -> anyhow::Result<Pager> {
    Ok(Pager::private(&PrivateOptions { swap_size: Some(swap), ..PrivateOptions::new(ram) })?)
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    if let Some(name) = &options.glibc_trace {
        println!("{}", glibc_peak(name));
        return Ok(());
    }
    let figures = json!({
        "faults_of_cold_blocks": faults(options.ram.0)?,
        "million_operations_per_second": speeds(&options)?,
        "peak_bytes_of_traces": peaks()?,
    });
    if options.json {
        println!("{figures:#}");
    } else {
        print(&figures);
    }
    Ok(())
}

/// Faults per free and per allocation, where nearly all blocks are swapped out.
fn faults(ram: u64) -> anyhow::Result<Value> {
    let total = to_usize(ram) * 8;
    let mut rows = Vec::new();
    for (what, least, most) in [("16 to 512 bytes", 16, 512), ("1 to 16 KiB", 1 << 10, 16 << 10)] {
        let mut row = json!({ "blocks": what });
        for name in ["fmalloc", "rlsf"] {
            let pager = pager(ram, to_u64(total) * 2 + ram)?;
            let (free, alloc) = if name == "fmalloc" {
                let heap = Heap::new(&pager, total * 2)?;
                cold(&*heap, &pager, total, least..most)?
            } else {
                let mut region = Region::new(&pager, total * 3 / 2)?;
                cold(&InBand::new(&mut region), &pager, total, least..most)?
            };
            row[name] = json!({ "per_free": free, "per_alloc": alloc });
        }
        rows.push(row);
    }
    Ok(rows.into())
}

fn cold(
    subject: &dyn Shared,
    pager: &Pager,
    total: usize,
    sizes: std::ops::Range<usize>,
) -> anyhow::Result<(f64, f64)> {
    const COUNT: usize = 20_000;
    let mut rng = Rng::new(1);
    let mut size = || sizes.start + rng.index(sizes.len());
    let (mut blocks, mut bytes) = (Vec::new(), 0);
    while bytes < total {
        let size = size();
        let block = subject.alloc(size);
        // SAFETY: the block has that many bytes.
        unsafe { block.write_bytes(1, size) };
        blocks.push(block);
        bytes += size;
    }
    let sizes: Vec<usize> = (0..COUNT).map(|_| size()).collect();
    let mut rng = Rng::new(2);
    (1..blocks.len()).rev().for_each(|at| blocks.swap(at, rng.index(at + 1)));
    let count = COUNT.min(blocks.len() / 2);
    let begin = pager.stats()?.faults;
    blocks.iter().take(count).for_each(|block| subject.free(*block));
    let between = pager.stats()?.faults;
    let again: Vec<_> = sizes.iter().take(count).map(|size| subject.alloc(*size)).collect();
    let end = pager.stats()?.faults;
    let rate =
        |faults: u64| f64::from(u32::try_from(faults).unwrap()) / f64::from(u32::try_from(count).unwrap());
    drop(again);
    Ok((rate(between - begin), rate(end - between)))
}

/// Millions of operations per second, an operation being an allocation or a free.
fn speeds(options: &Options) -> anyhow::Result<Value> {
    type Work = fn(&dyn Shared, u64, u64);
    let works: [(&str, Work); 3] = [
        ("one block comes and goes", one),
        ("random of 1000 blocks replaced", replace),
        ("in batches of 1000", batches),
    ];
    // All of it stays in RAM.
    let pager = pager(1 << 30, 2 << 30)?;
    let mut region = Region::new(&pager, 512 << 20)?;
    let in_band = InBand::new(&mut region);
    let heap = Heap::new(&pager, 8 << 30)?;
    let subjects: [(&str, &dyn Shared); 3] = [("fmalloc", &*heap), ("glibc", &Glibc), ("rlsf", &in_band)];
    let mut rows = Vec::new();
    for (what, work) in works {
        for threads in [1, 8] {
            let mut results = vec![Vec::new(); subjects.len()];
            for _ in 0..=options.runs {
                for (result, (_, subject)) in results.iter_mut().zip(subjects) {
                    result.push(rate(subject, threads, options.operations / threads, work));
                }
            }
            let mut row = json!({ "work": what, "threads": threads });
            for (mut result, (name, _)) in results.into_iter().zip(subjects) {
                // The first run warms up.
                result.remove(0);
                result.sort_by(f64::total_cmp);
                row[name] = json!((result[result.len() / 2] * 10.0).round() / 10.0);
            }
            rows.push(row);
        }
    }
    Ok(rows.into())
}

fn rate(subject: &dyn Shared, threads: u64, operations: u64, work: fn(&dyn Shared, u64, u64)) -> f64 {
    let barrier = Barrier::new(to_usize(threads) + 1);
    let begin = std::thread::scope(|scope| {
        for thread in 0..threads {
            let barrier = &barrier;
            scope.spawn(move || {
                barrier.wait();
                work(subject, thread, operations);
            });
        }
        barrier.wait();
        Instant::now()
    });
    f64::from(u32::try_from(threads * operations).unwrap()) / begin.elapsed().as_secs_f64() / 1e6
}

/// Sizes as programs use them: mostly small, up to 1 KiB.
fn size(rng: &mut Rng) -> usize {
    let word = to_usize(rng.word());
    16 + word % (16 << (word >> 32 & 7) >> 1)
}

fn touch(block: NonNull<u8>) {
    // SAFETY: blocks have 16 bytes at least.
    unsafe { block.cast::<u64>().write_volatile(1) };
}

fn one(subject: &dyn Shared, seed: u64, operations: u64) {
    let mut rng = Rng::new(seed);
    for _ in 0..operations / 2 {
        let block = subject.alloc(size(&mut rng));
        touch(block);
        subject.free(block);
    }
}

fn replace(subject: &dyn Shared, seed: u64, operations: u64) {
    let mut rng = Rng::new(seed);
    let mut blocks: Vec<_> = (0..1000).map(|_| subject.alloc(size(&mut rng))).collect();
    for _ in 0..operations / 2 {
        let at = rng.index(blocks.len());
        subject.free(blocks[at]);
        blocks[at] = subject.alloc(size(&mut rng));
        touch(blocks[at]);
    }
    blocks.into_iter().for_each(|block| subject.free(block));
}

fn batches(subject: &dyn Shared, seed: u64, operations: u64) {
    let mut rng = Rng::new(seed);
    let mut blocks = Vec::with_capacity(1000);
    for _ in 0..operations / 2000 {
        for _ in 0..1000 {
            let block = subject.alloc(size(&mut rng));
            touch(block);
            blocks.push(block);
        }
        blocks.drain(..).for_each(|block| subject.free(block));
    }
}

/// The allocator on ordinary memory.
struct Ours<'a>(&'a Core<Plain>);

impl Subject for Ours<'_> {
    fn alloc(&mut self, size: usize) -> NonNull<u8> {
        Shared::alloc(self.0, size)
    }

    fn free(&mut self, block: NonNull<u8>, _: usize) {
        Shared::free(self.0, block);
    }

    fn realloc(&mut self, block: NonNull<u8>, _: usize, size: usize) -> NonNull<u8> {
        // SAFETY: the replay does not use the old address any more.
        unsafe { self.0.realloc(block, size, 16) }.unwrap()
    }
}

impl Subject for Glibc {
    fn alloc(&mut self, size: usize) -> NonNull<u8> {
        Shared::alloc(self, size)
    }

    fn free(&mut self, block: NonNull<u8>, _: usize) {
        Shared::free(self, block);
    }

    fn realloc(&mut self, block: NonNull<u8>, _: usize, size: usize) -> NonNull<u8> {
        // SAFETY: as above; no trace has a size of zero here.
        NonNull::new(unsafe { libc::realloc(block.as_ptr().cast(), size.max(1)) }.cast()).unwrap()
    }
}

/// Peaks of what programs asked for, what their blocks took, and what was taken from the system for them.
fn peaks() -> anyhow::Result<Value> {
    let mut rows = Vec::new();
    for name in TRACES {
        let events = trace::read(name);
        let core = Core::new(Plain::new(4 << 30).unwrap()).unwrap();
        let mut resident = 0;
        let base = core.backing().base();
        let asked = trace::replay(&events, &mut Ours(&core), || {
            resident = resident.max(resident_bytes(base, core.stats().committed_bytes));
        });
        let own = std::env::current_exe()?;
        let output = std::process::Command::new(own).args(["--glibc-trace", name]).output()?;
        let glibc: u64 = String::from_utf8(output.stdout)?.trim().parse()?;
        let stats = core.stats();
        rows.push(json!({
            "trace": name,
            "asked": asked,
            "fmalloc_touched": resident,
            "fmalloc_claimed": stats.peak_bytes,
            "fmalloc_tables_usable": stats.table_bytes,
            "glibc": glibc,
        }));
    }
    Ok(rows.into())
}

fn resident_bytes(base: NonNull<u8>, len: usize) -> usize {
    let mut map = vec![0_u8; len / 4096];
    // SAFETY: the vector has a byte for each page of the range.
    let outcome = unsafe { libc::mincore(base.as_ptr().cast(), len, map.as_mut_ptr()) };
    assert_eq!(outcome, 0);
    map.iter().filter(|page| **page & 1 != 0).count() * 4096
}

/// What glibc has taken from the system at the peak of a trace.
fn glibc_peak(name: &str) -> usize {
    let events = trace::read(name);
    let taken = || {
        // SAFETY: gives figures.
        let info = unsafe { libc::mallinfo2() };
        info.arena + info.hblkhd
    };
    let (before, mut peak) = (taken(), 0);
    trace::replay(&events, &mut Glibc, || peak = peak.max(taken()));
    peak - before
}

fn print(figures: &Value) {
    let list = |name: &str| figures[name].as_array().cloned().unwrap_or_default();
    println!("faults per free and per allocation of cold blocks");
    for row in list("faults_of_cold_blocks") {
        let (ours, theirs) = (&row["fmalloc"], &row["rlsf"]);
        let text = |row: &Value| format!("{:.3} {:.3}", row["per_free"], row["per_alloc"]);
        println!("  {:<34}fmalloc {}   rlsf {}", row["blocks"].as_str().unwrap(), text(ours), text(theirs));
    }
    println!("million operations per second");
    for row in list("million_operations_per_second") {
        println!(
            "  {:<34}{} threads   fmalloc {}   glibc {}   rlsf {}",
            row["work"].as_str().unwrap(),
            row["threads"],
            row["fmalloc"],
            row["glibc"],
            row["rlsf"]
        );
    }
    println!("KiB at the peak of a program");
    for row in list("peak_bytes_of_traces") {
        let kib = |name: &str| row[name].as_u64().unwrap() >> 10;
        println!(
            "  {:<8}asked for {}   fmalloc {} touched, {} claimed   glibc {}",
            row["trace"].as_str().unwrap(),
            kib("asked"),
            kib("fmalloc_touched"),
            kib("fmalloc_claimed"),
            kib("glibc")
        );
    }
}
