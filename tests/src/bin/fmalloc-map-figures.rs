//! How fast files in memory are beside memmap2, both within a memory cgroup of the same size: in-process work on one file,
//! in child processes that take turns. Medians, as times and as ratios. Needs root; build it with `--release`.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::{Parser, ValueEnum};
use fmalloc_client::{Pager, PrivateOptions};
use fmalloc_proto::num::{to_u64, to_usize};
use fmalloc_proto::size::Size;
use fmalloc_tests::rng::Rng;
use serde_json::json;

/// Bytes of a record of the file: a key of eight letters, random letters, a line end.
const RECORD: usize = 64;
const PAGE: usize = 4096;
/// What the group may have beyond the budget: for the program, its stacks, and its index.
const BESIDE: u64 = 24 << 20;
const THREADS: u64 = 8;
const READS: u64 = 4000;

/// Compares fmalloc's mappings of files with memmap2's.
#[derive(Debug, Parser)]
#[command(name = "fmalloc-map-figures")]
struct Options {
    /// Length of the file
    #[arg(long, default_value = "512M")]
    size: Size,
    /// RAM, for the runs in which it is short
    #[arg(long, default_value = "128M")]
    ram: Size,
    /// Runs of each, of which the medians are printed
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Directory of the file, on a real disk
    #[arg(long, default_value = "/var/tmp")]
    dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// For the program itself: do this, in the group that it is in
    #[arg(long, hide = true, num_args = 3)]
    child: Option<Vec<String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Peer {
    Memmap2,
    Fmalloc,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Work {
    Scan,
    Rescan,
    Random,
    Update,
    Index,
}

impl Work {
    const ALL: [Self; 5] = [Self::Scan, Self::Rescan, Self::Random, Self::Update, Self::Index];

    fn title(self) -> &'static str {
        match self {
            Self::Scan => "sequential scan",
            Self::Rescan => "the same again",
            Self::Random => "random reads, 8 threads",
            Self::Update => "10 % updated, flush",
            Self::Index => "building an index",
        }
    }
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    if let Some(child) = &options.child {
        let [peer, work, file] = child.as_slice() else { bail!("three words") };
        let (peer, work) = (value(peer)?, value(work)?);
        println!("{}", run_child(peer, work, Path::new(file), options.ram.0)?.as_nanos());
        return Ok(());
    }
    let file = tempfile::Builder::new().prefix("fmalloc-map-figures-").tempfile_in(&options.dir)?;
    fill(file.as_file(), options.size.0)?;
    let mut rows = Vec::new();
    // Where all fits, twice the file: the kernel needs room for its own records too.
    for (scenario, ram) in [("short", options.ram.0), ("fits", options.size.0 * 2)] {
        for work in Work::ALL {
            let mut times = [Vec::new(), Vec::new()];
            for _ in 0..options.runs {
                for (peer, times) in [Peer::Memmap2, Peer::Fmalloc].into_iter().zip(&mut times) {
                    times.push(run(peer, work, file.path(), ram)?);
                }
            }
            let [memmap2, fmalloc] = times.map(median);
            rows.push((scenario, work, memmap2, fmalloc));
        }
    }
    if options.json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(scenario, work, memmap2, fmalloc)| {
                json!({
                    "ram": scenario,
                    "work": work.title(),
                    "memmap2_seconds": memmap2.as_secs_f64(),
                    "fmalloc_seconds": fmalloc.as_secs_f64(),
                    "ratio": memmap2.as_secs_f64() / fmalloc.as_secs_f64(),
                })
            })
            .collect();
        println!("{:#}", json!({ "size_bytes": options.size.0, "runs": options.runs, "rows": rows }));
        return Ok(());
    }
    println!("{} in {} of RAM, medians of {} runs, in seconds", options.size, options.ram, options.runs);
    println!("{:<8}{:<26}{:>10}{:>10}{:>8}", "RAM", "", "memmap2", "fmalloc", "ratio");
    for (scenario, work, memmap2, fmalloc) in rows {
        let (memmap2, fmalloc) = (memmap2.as_secs_f64(), fmalloc.as_secs_f64());
        let ratio = memmap2 / fmalloc;
        println!("{scenario:<8}{:<26}{memmap2:>10.3}{fmalloc:>10.3}{ratio:>8.2}", work.title());
    }
    Ok(())
}

fn value<T: ValueEnum>(text: &str) -> anyhow::Result<T> {
    T::from_str(text, false).map_err(|error| anyhow::anyhow!(error))
}

fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Records whose keys are in no order.
fn fill(file: &File, len: u64) -> anyhow::Result<()> {
    let mut rng = Rng::new(1);
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut record = [b'\n'; RECORD];
    for _ in 0..len / to_u64(RECORD) {
        for letters in record[..RECORD - 1].chunks_mut(8) {
            let word = rng.word().to_le_bytes();
            letters.iter_mut().zip(word).for_each(|(letter, byte)| *letter = b'a' + byte % 26);
        }
        out.write_all(&record)?;
    }
    out.flush()?;
    file.sync_all()?;
    Ok(())
}

/// One child in a group with so much RAM.
fn run(peer: Peer, work: Work, file: &Path, ram: u64) -> anyhow::Result<Duration> {
    // What the page cache has would make the first reader slow and the second one quick.
    let opened = File::open(file)?;
    opened.sync_all()?;
    nix::fcntl::posix_fadvise(&opened, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    let group = Group::new(ram + BESIDE)?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--ram", &ram.to_string(), "--child", &name(peer), &name(work)]).arg(file);
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    group.add(child.id())?;
    // It waits for the end of its input, so that all it does is done in the group.
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{peer:?} {work:?}: {}", output.status);
    let nanos: u64 = String::from_utf8(output.stdout)?.trim().parse()?;
    Ok(Duration::from_nanos(nanos))
}

/// A memory cgroup, version 1 or 2, that ends with the value.
struct Group(PathBuf);

impl Group {
    fn new(limit: u64) -> anyhow::Result<Self> {
        let own = format!("fmalloc-map-figures-{}", std::process::id());
        let places = [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")];
        for (root, file) in places {
            let path = Path::new(root).join(&own);
            if fs::create_dir(&path).is_ok() {
                let group = Self(path);
                if fs::write(group.0.join(file), limit.to_string()).is_ok() {
                    return Ok(group);
                }
            }
        }
        bail!("no memory cgroup can be made; run this as root")
    }

    fn add(&self, pid: u32) -> anyhow::Result<()> {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).context("entering the group")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The daemon of a child ends a moment after it.
        for _ in 0..500 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn run_child(peer: Peer, work: Work, path: &Path, ram: u64) -> anyhow::Result<Duration> {
    // In the group by then.
    std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink())?;
    let file = File::options().read(true).write(true).open(path)?;
    match peer {
        Peer::Memmap2 => {
            if work == Work::Update {
                // SAFETY: the file is this benchmark's alone.
                let mut map = unsafe { memmap2::MmapMut::map_mut(&file)? };
                return timed(|| {
                    update(&mut map);
                    Ok(map.flush()?)
                });
            }
            // SAFETY: as above.
            read(work, &unsafe { memmap2::Mmap::map(&file)? })
        }
        Peer::Fmalloc => {
            let pager = Pager::private(&PrivateOptions::new(ram))?;
            let mut options = fmalloc_client::mmap::MmapOptions::new();
            options.pager(&pager);
            if work == Work::Update {
                // SAFETY: as above.
                let mut map = unsafe { options.map_mut(&file)? };
                return timed(|| {
                    update(&mut map);
                    Ok(map.flush()?)
                });
            }
            // SAFETY: as above.
            read(work, &unsafe { options.map(&file)? })
        }
    }
}

fn timed(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Duration> {
    let begin = Instant::now();
    work()?;
    Ok(begin.elapsed())
}

fn read(work: Work, bytes: &[u8]) -> anyhow::Result<Duration> {
    match work {
        Work::Scan => timed(|| scan(bytes)),
        Work::Rescan => {
            scan(bytes)?;
            timed(|| scan(bytes))
        }
        Work::Random => timed(|| random(bytes)),
        Work::Index => timed(|| index(bytes)),
        Work::Update => bail!("not a reader"),
    }
}

fn scan(bytes: &[u8]) -> anyhow::Result<()> {
    let lines =
        bytes.chunks(1 << 16).map(|part| part.iter().filter(|byte| **byte == b'\n').count()).sum::<usize>();
    ensure!(lines == bytes.len() / RECORD, "{lines} lines");
    Ok(())
}

fn random(bytes: &[u8]) -> anyhow::Result<()> {
    std::thread::scope(|scope| {
        let read = |thread| {
            let mut rng = Rng::new(thread);
            (0..READS).all(|_| bytes[rng.index(bytes.len() / RECORD) * RECORD + RECORD - 1] == b'\n')
        };
        let threads: Vec<_> = (1..=THREADS).map(|thread| scope.spawn(move || read(thread))).collect();
        let good = threads.into_iter().all(|thread| thread.join().is_ok_and(|good| good));
        ensure!(good, "a line has no end");
        Ok(())
    })
}

/// A letter in every tenth page.
fn update(bytes: &mut [u8]) {
    for page in bytes.chunks_mut(PAGE).step_by(10) {
        page[9] = if page[9] == b'z' { b'a' } else { page[9] + 1 };
    }
}

/// Keys in order with their places, for one record of each page, and a look at some of them by it.
fn index(bytes: &[u8]) -> anyhow::Result<()> {
    let key = |record: &[u8]| u64::from_be_bytes(record[..8].try_into().unwrap_or_default());
    let mut entries: Vec<(u64, u32)> = Vec::with_capacity(bytes.len() / PAGE);
    for (place, page) in (0_u32..).zip(bytes.chunks_exact(PAGE)) {
        let least = page.chunks_exact(RECORD).map(key).min().unwrap_or(0);
        entries.push((least, place));
    }
    entries.sort_unstable();
    let mut rng = Rng::new(3);
    for _ in 0..READS {
        let (least, place) = entries[rng.index(entries.len())];
        let page = &bytes[to_usize(place.into()) * PAGE..][..PAGE];
        ensure!(page.chunks_exact(RECORD).map(key).min() == Some(least), "page {place} has another key");
    }
    Ok(())
}
