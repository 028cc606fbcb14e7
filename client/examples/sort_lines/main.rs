//! Sorts all lines of the files it is given, in memory larger than its RAM budget, and writes them out.
//!
//! The lines and the index over them live in fmalloc regions; on the heap there are only buffers of a few hundred
//! KiB. Nothing here knows about swapping: it is a merge sort over byte slices, written so that it goes through its
//! memory in order, which any paged memory rewards. Lines are bytes; the order is that of `LC_ALL=C sort`.
//!
//! At the end the program checks that its whole resident set never exceeded the budget by more than 16 MiB.

mod input;
mod merge;
mod run;
mod show;

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use fmalloc_client::{ClientStats, ConnectOptions, Error, Pager, PrivateOptions, Region};
use fmalloc_proto::size::Size;

use input::Inputs;
use show::Show;

/// What the process may use beyond its budget: program text, stacks, heap.
const ALLOWANCE: u64 = 16 << 20;
/// More threads than this only make the runs shorter and more.
const MAX_THREADS: usize = 8;
/// Longest run: offsets within a run have 32 bits.
const MAX_RUN: u64 = 1 << 30;

/// Sorts all lines of files in memory larger than the RAM it may use.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// RAM budget, such as 64M
    #[arg(long, value_name = "SIZE")]
    ram: Size,
    /// Where to write the sorted lines; may be one of the inputs
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Threads that sort [default: as many as there are CPUs, at most 8]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Use a running fmallocd, and fail if there is none
    #[arg(long, conflicts_with = "private")]
    connect: bool,
    /// Start a private fmallocd even if one is running
    #[arg(long)]
    private: bool,
    /// Write the final figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    stats_json: Option<PathBuf>,
    /// Read the names of further inputs from this file, each ended by a zero byte
    #[arg(long, value_name = "FILE")]
    files0_from: Option<PathBuf>,
    /// Files, and directories whose regular files are taken
    #[arg(required_unless_present = "files0_from")]
    paths: Vec<PathBuf>,
}

fn main() -> ExitCode {
    match sort(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sort_lines: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn sort(args: Args) -> Result<()> {
    let start = Instant::now();
    let output = open_output(&args.output)?;
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.unwrap_or(cpus).clamp(1, MAX_THREADS);
    let inputs = Inputs { paths: args.paths, list: args.files0_from };
    let room = inputs.room().context("cannot look through the inputs")?;

    let pager = open_pager(args.ram.0, args.connect, args.private)?;
    let show = Show::new(&pager);
    // Each thread sorts a run in place with an index and a copy beside it: three runs a thread make up three quarters of
    // the budget, and the pager has the rest to read ahead and to write behind.
    let run_len = usize::try_from((pager.budget() / (4 * threads as u64)).clamp(64 << 10, MAX_RUN))?;

    let mut text = Region::labelled(&pager, room.bytes.max(1), "text")
        .with_context(|| format!("cannot get {} of memory for the text", Size(room.bytes as u64)))?;
    let loaded = show.phase("load", room.bytes as u64, |done| {
        input::load(&inputs, &mut text, run_len, run::max_lines(run_len), done)
    })?;
    let text = &mut text[..loaded.bytes];
    show.phase("sort runs", loaded.bytes as u64, |done| {
        run::sort_all(&pager, text, &loaded.runs, run_len, threads, done)
    })?;
    if output.metadata()?.is_file() {
        output.set_len(0).with_context(|| format!("cannot empty {}", args.output.display()))?;
    }
    show.phase("merge", loaded.bytes as u64, |done| {
        merge::write_all(text, &loaded.runs, threads, &output, done)
            .with_context(|| format!("cannot write {}", args.output.display()))
    })?;

    let report = Report {
        files: room.files,
        bytes: loaded.bytes as u64,
        lines: loaded.lines,
        budget: pager.budget(),
        peak: peak_resident()?,
        elapsed: start.elapsed(),
        stats: pager.stats()?,
    };
    report.print();
    if let Some(path) = args.stats_json {
        std::fs::write(&path, report.json()).with_context(|| format!("cannot write {}", path.display()))?;
    }
    ensure!(
        report.peak <= report.budget + ALLOWANCE,
        "peak resident set of {} exceeds the budget of {} by more than {}: a fault of fmalloc, please report it",
        Size(report.peak),
        Size(report.budget),
        Size(ALLOWANCE),
    );
    Ok(())
}

/// Opened before the work, so that a bad name is noticed at once; emptied after loading, so that it may be an input.
fn open_output(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false);
    options.open(path).with_context(|| format!("cannot open {} for writing", path.display()))
}

fn open_pager(budget: u64, connect: bool, private: bool) -> Result<Pager> {
    let name = Some("sort_lines".to_owned());
    if !private {
        let options =
            ConnectOptions { budget: Some(budget), name: name.clone(), ..ConnectOptions::default() };
        match Pager::connect_with(&options) {
            Err(Error::NoDaemon { .. }) if !connect => {}
            result => return result.context("cannot use the running fmallocd"),
        }
    }
    let mut options = PrivateOptions::new(budget);
    options.name = name;
    Pager::private(&options).context("cannot start a private fmallocd")
}

/// Highest resident set of this process so far, in bytes, everything included.
fn peak_resident() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    for line in status.lines() {
        if let Some(rest) = line.strip_prefix("VmHWM:") {
            let kib: u64 = rest.trim().trim_end_matches(" kB").parse()?;
            return Ok(kib << 10);
        }
    }
    bail!("/proc/self/status has no VmHWM")
}

/// The final figures.
struct Report {
    files: usize,
    bytes: u64,
    lines: u64,
    budget: u64,
    peak: u64,
    elapsed: Duration,
    stats: ClientStats,
}

impl Report {
    #[allow(clippy::cast_precision_loss, reason = "for people")]
    fn megabytes_per_second(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.elapsed.as_secs_f64().max(1e-3)
    }

    fn print(&self) {
        let stats = &self.stats;
        let pages = |count: u64| Size(count << 12).to_string();
        let (seconds, rate) = (self.elapsed.as_secs_f64(), self.megabytes_per_second());
        println!("sorted   {} lines, {}; files read: {}", self.lines, Size(self.bytes), self.files);
        println!("time     {seconds:.1} s, {rate:.1} MB/s");
        println!("budget   {}, of which {} held by fmallocd", Size(self.budget), Size(stats.overhead_bytes));
        println!("peak     {} resident, everything included", Size(self.peak));
        println!(
            "faults   {}: {} first touches, {} read, {} rescued on the way out; {} waited for a frame",
            stats.faults, stats.faults_zero, stats.faults_read, stats.faults_rescued, stats.faults_stalled
        );
        println!(
            "in       {} pages, {}; {} of them read ahead",
            stats.pages_in,
            pages(stats.pages_in),
            stats.pages_readahead
        );
        println!(
            "out      {} pages, {}; besides {} clean and {} zero, not written",
            stats.pages_out,
            pages(stats.pages_out),
            stats.pages_clean,
            stats.pages_zero
        );
    }

    fn json(&self) -> String {
        let stats = &self.stats;
        let fields = [
            ("files", self.files as u64),
            ("bytes", self.bytes),
            ("lines", self.lines),
            ("budget_bytes", self.budget),
            ("peak_resident_bytes", self.peak),
            ("daemon_overhead_bytes", stats.overhead_bytes),
            ("peak_resident_pages", stats.peak_resident_pages),
            ("faults", stats.faults),
            ("faults_zero", stats.faults_zero),
            ("faults_read", stats.faults_read),
            ("faults_rescued", stats.faults_rescued),
            ("faults_stalled", stats.faults_stalled),
            ("pages_in", stats.pages_in),
            ("pages_readahead", stats.pages_readahead),
            ("pages_out", stats.pages_out),
            ("pages_clean", stats.pages_clean),
            ("pages_zero", stats.pages_zero),
            ("io_errors", stats.io_errors),
            ("faults_packed", stats.faults_packed),
        ];
        let mut json = String::from("{\n");
        for (name, value) in fields {
            json += &format!("  \"{name}\": {value},\n");
        }
        json + &format!("  \"seconds\": {:.3}\n}}\n", self.elapsed.as_secs_f64())
    }
}
