//! A first figure of how fast paging is: writes and reads memory larger than its RAM budget in order, and reads it at
//! random, all of it verified. Medians of a few runs. Build it with `--release`.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use fmalloc_client::{ConnectOptions, PAGE_SIZE, Pager, PrivateOptions, Region};
use fmalloc_proto::num::{to_u64, to_usize};
use fmalloc_proto::size::Size;
use fmalloc_tests::pattern::WORDS;
use fmalloc_tests::rng::Rng;
use serde_json::json;

/// Words of a page that are random; the others name the page.
const HALF: usize = WORDS / 2;

/// Prints how fast memory beyond a RAM budget is.
#[derive(Debug, Parser)]
#[command(name = "fmalloc-figures")]
struct Options {
    /// Memory to work on
    #[arg(long, default_value = "1G")]
    size: Size,
    /// RAM budget
    #[arg(long, default_value = "256M")]
    ram: Size,
    /// Random reads per run
    #[arg(long, default_value_t = 20_000)]
    reads: u32,
    /// Runs, of which the medians are printed
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Use the running service instead of a daemon of our own
    #[arg(long)]
    service: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What one run took.
struct Run {
    write: Duration,
    read: Duration,
    random: Duration,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    ensure!(options.runs > 0 && options.reads > 0 && options.size.0 >= 1 << 20, "nothing to measure");
    let runs = (0..options.runs).map(|n| run(&options, to_u64(n))).collect::<anyhow::Result<Vec<_>>>()?;
    let median = |get: fn(&Run) -> Duration| {
        let mut times: Vec<Duration> = runs.iter().map(get).collect();
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64()
    };
    let pages = f64::from(u32::try_from(options.size.0 / to_u64(PAGE_SIZE)).context("too many pages")?);
    let write = pages / median(|run| run.write);
    let read = pages / median(|run| run.read);
    let random = median(|run| run.random) * 1e6 / f64::from(options.reads);
    if options.json {
        let figures = json!({
            "size_bytes": options.size.0,
            "budget_bytes": options.ram.0,
            "runs": options.runs,
            "sequential_write_pages_per_second": write.round(),
            "sequential_read_pages_per_second": read.round(),
            "random_read_microseconds": (random * 10.0).round() / 10.0,
        });
        println!("{figures:#}");
    } else {
        println!(
            "{} within {} of RAM, medians of {} runs, all data verified",
            options.size, options.ram, options.runs
        );
        let speed = |what: &str, rate: f64| {
            println!("{what:<18}{rate:>9.0} pages/s{:>8.0} MB/s", rate * 4096.0 / 1e6)
        };
        speed("sequential write", write);
        speed("sequential read", read);
        println!("{:<18}{random:>9.1} µs per read, one thread", "random read");
    }
    Ok(())
}

fn run(options: &Options, number: u64) -> anyhow::Result<Run> {
    let pager = if options.service {
        Pager::connect_with(&ConnectOptions { budget: Some(options.ram.0), ..ConnectOptions::default() })?
    } else {
        let swap_size = Some(options.size.0 + options.ram.0);
        Pager::private(&PrivateOptions { swap_size, ..PrivateOptions::new(options.ram.0) })?
    };
    let mut region = Region::new(&pager, to_usize(options.size.0))?;
    let mut rng = Rng::new(number);
    let bank: Vec<u64> = (0..257 * HALF).map(|_| rng.word()).collect();
    // Half of a page as other pages have it too, but at another distance from its start for each neighbour.
    let random_half = |index: usize| {
        let start = index.wrapping_mul(0x9e37_79b1) % (256 * HALF);
        &bank[start..start + HALF]
    };
    let stamp = |index: usize| to_u64(index) << 8 | number;

    let begin = Instant::now();
    for (index, page) in region.as_mut_slice_of::<u64>().chunks_exact_mut(WORDS).enumerate() {
        let (front, back) = page.split_at_mut(HALF);
        front.copy_from_slice(random_half(index));
        back.fill(stamp(index));
    }
    let write = begin.elapsed();

    let words = region.as_slice_of::<u64>();
    let begin = Instant::now();
    for (index, page) in words.chunks_exact(WORDS).enumerate() {
        let (front, back) = page.split_at(HALF);
        let good = front == random_half(index) && back.iter().all(|word| *word == stamp(index));
        ensure!(good, "page {index} is wrong");
    }
    let read = begin.elapsed();

    let pages = words.len() / WORDS;
    let begin = Instant::now();
    for _ in 0..options.reads {
        let index = rng.index(pages);
        ensure!(words[index * WORDS + HALF] == stamp(index), "page {index} is wrong");
    }
    Ok(Run { write, read, random: begin.elapsed() })
}
