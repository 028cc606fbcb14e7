//! `make realworld`: programs of the distribution with work for several times the RAM that they get, natively, under
//! `fmallocctl run`, and under the kernel's swap within a memory cgroup of the same size, in turn. Checks that all print the
//! same, and prints a table.

#![allow(clippy::unwrap_used, reason = "a tool for people who can read a panic")]

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Parser;
use comfy_table::{Table, presets};
use fmalloc_tests::kernel_swap::KernelSwap;
use fmalloc_tests::realworld::{Case, cases};
use fmalloc_tests::{MIB, place};
use serde_json::Value;

/// Runs programs of the distribution within a third of the memory that they need, and compares.
#[derive(Debug, Parser)]
struct Options {
    /// How much larger than in the tests
    #[arg(long, default_value_t = 8)]
    scale: u64,
    /// Runs of each
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Only programs whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Directory for input and swap, on a real disk
    #[arg(long, default_value = "/var/tmp")]
    dir: PathBuf,
    /// Write the table as Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let dir = tempfile::Builder::new().prefix("fmalloc-realworld-").tempdir_in(&options.dir)?;
    let kernel = KernelSwap::start(dir.path(), 4096)
        .inspect_err(|error| eprintln!("no comparison with kernel swap: {error:#}"))
        .ok();
    let headings = [
        "program",
        "RAM, MiB",
        "native, s",
        "fmalloc, s",
        "kernel swap, s",
        "kernel / fmalloc",
        "written, MiB",
    ];
    let mut rows = Vec::new();
    for case in cases(dir.path(), options.scale) {
        if case.name.contains(&options.only) {
            rows.push(measure(&case, &options, dir.path(), kernel.as_ref()).context(case.name)?);
        }
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(headings).add_rows(&rows);
    println!("{}", table.trim_fmt());
    if let Some(path) = &options.markdown {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let mut text = line(&headings.map(str::to_owned));
        text.push_str(&line(&headings.map(|_| "---".to_owned())));
        rows.iter().for_each(|row| text.push_str(&line(row)));
        fs::write(path, text)?;
    }
    Ok(())
}

/// A row of the table: medians.
fn measure(
    case: &Case,
    options: &Options,
    dir: &std::path::Path,
    kernel: Option<&KernelSwap>,
) -> anyhow::Result<Vec<String>> {
    let budget = case.budget_mib * MIB;
    let json = dir.join("stats.json");
    let (mut native, mut paged, mut swapped, mut written) = (vec![], vec![], vec![], 0);
    let mut expected = None;
    for round in 0..options.rounds {
        let mut plain = Command::new(&case.command[0]);
        plain.args(&case.command[1..]);
        native.push(run(&mut plain, &mut expected)?);
        let mut run_paged = Command::new(place::binary("fmallocctl"));
        run_paged.args(["run", "--ram", &budget.to_string(), "--swap-size", "8G", "--swap-dir"]).arg(dir);
        run_paged.arg("--stats-json").arg(&json).arg("--").args(&case.command);
        paged.push(run(&mut run_paged, &mut expected)?);
        let stats: Value = serde_json::from_slice(&fs::read(&json)?)?;
        written = stats["pages_out"].as_u64().unwrap() / 256;
        ensure!(written > 0, "nothing was swapped out");
        if let Some(kernel) = kernel {
            let mut confined = Command::new(&case.command[0]);
            kernel.confine(confined.args(&case.command[1..]), budget)?;
            swapped.push(run(&mut confined, &mut expected)?);
        }
        let times = |times: &[f64]| times.last().map_or("-".to_owned(), |time| format!("{time:.2} s"));
        let (native, paged, swapped) = (times(&native), times(&paged), times(&swapped));
        eprintln!("{}, round {round}: native {native}, fmalloc {paged}, kernel swap {swapped}", case.name);
    }
    let (native, paged) = (median(native), median(paged));
    let (kernel, ratio) = match swapped.is_empty() {
        true => ("-".to_owned(), "-".to_owned()),
        false => {
            let swapped = median(swapped);
            (format!("{swapped:.2}"), format!("{:.2}", swapped / paged))
        }
    };
    let cells =
        [case.name.to_owned(), case.budget_mib.to_string(), format!("{native:.2}"), format!("{paged:.2}")];
    Ok(cells.into_iter().chain([kernel, ratio, written.to_string()]).collect())
}

/// Seconds that a run took. It must print what the others have printed.
fn run(command: &mut Command, expected: &mut Option<Vec<u8>>) -> anyhow::Result<f64> {
    command.stdin(Stdio::null()).stderr(Stdio::inherit());
    // SAFETY: one system call.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    let begin = Instant::now();
    let output = command.output()?;
    let seconds = begin.elapsed().as_secs_f64();
    ensure!(output.status.success(), "{command:?}: {}", output.status);
    let expected = expected.get_or_insert_with(|| output.stdout.clone());
    ensure!(*expected == output.stdout, "another result than natively");
    Ok(seconds)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
